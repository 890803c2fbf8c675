"""Integer arithmetic element by element, with NumPy broadcasting, on centred operands (`q - zero_point`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qir.affine import Form
from qir.errors import QirError
from qir.fixed_point import Overflow, Rounding, kept_bounds, narrow, round_divide
from qir.interval import EVERYTHING, Bounds, Interval, exact, gcd
from qir.ir import FIXED_ONLY, Op, OpBounds
from qir.opdef import broadcast_shapes, known_dim, normalize_axis
from qir.ops.accumulate import bits_of, centered, centre, integer_operands, narrowing_faults, zero_ends
from qir.types import ElementType, IntegerType, Shape, storage_of, zero_array

Tensor = npt.NDArray[Any]


@dataclass(frozen=True, eq=False, kw_only=True)
class Elementwise(Op):
    """Base: two operands, one exact result narrowed to the storage bounds of the result by `overflow`."""

    stages = FIXED_ONLY
    operand_names = ("a", "b")
    overflow: Overflow

    def infer(self) -> tuple[Shape, ...]:
        """The broadcast shape."""
        return (broadcast_shapes([v.type.shape for v in self.operands]),)

    def check(self) -> Iterator[str]:
        """All are of integers, and values can be narrowed to those of the result."""
        yield from integer_operands(self)
        yield from result_faults(self.result.type.element, self.overflow)

    @property
    def storage(self) -> IntegerType:
        """The storage of the result."""
        storage = storage_of(self.result.type.element)
        assert storage is not None
        return storage

    def combine(self, a: Tensor, b: Tensor) -> Tensor:
        """The exact result for centred operands."""
        raise NotImplementedError

    def eval_int(self, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        """The definition of the op."""
        exact = self.combine(centre(a, self.operands[0].type), centre(b, self.operands[1].type))
        return (narrow(exact, self.storage.lo, self.storage.hi, self.overflow),)

    def affine(self, operands: Sequence[Form | None], bounds: Sequence[Bounds]) -> Form | None:
        """The exact result less the zero point of the result's type."""
        form, (low, high) = self.combined(operands, bounds), zero_ends(self.result.type)
        return None if form is None else form.shifted(-high, -low)

    def combined(self, operands: Sequence[Form | None], bounds: Sequence[Bounds]) -> Form | None:
        """The exact result from the forms and bounds of the operands; None: unknown."""
        return None

    def step(self, a: Bounds, b: Bounds) -> Tensor | None:
        """Of what exact results are multiples, apart from an offset; None: not known."""
        return None

    def corners(self, a: Bounds, b: Bounds) -> list[Tensor]:
        """Results among which the extremes lie, for centred bounds."""
        return [exact(self.combine(x, y)) for x in (a.lo, a.hi) for y in (b.lo, b.hi)]

    def bounds(self, operands: Sequence[Bounds]) -> OpBounds:
        """The extremes of the corners, narrowed."""
        a, b = (self._whole(centered(v.type, o), v.type.shape) for v, o in zip(self.operands, operands, strict=True))
        corners = self.corners(a, b)
        free = Bounds.of(np.minimum.reduce(corners), np.maximum.reduce(corners), self.step(a, b))
        return narrowed(free, self.storage, self.overflow)

    def _sum(self, operands: Sequence[Form | None], bounds: Sequence[Bounds], sign: int = 1) -> Form | None:
        """`a + sign * b`: of both forms where they align, else one form and the bounds of the other operand."""
        forms = [form if form is None or i == 0 or sign > 0 else form.negative() for i, form in enumerate(operands)]
        shape = self.result.type.shape
        if forms[0] is not None and forms[1] is not None and shape in [v.type.shape for v in self.operands]:
            both = forms[0].plus(forms[1])
            if both is not None:
                return both
        for form, _, other in self._sides(forms, bounds):
            is_first = form is forms[0]
            ends = (-other.hi, -other.lo) if is_first and sign < 0 else (other.lo, other.hi)
            absorbed = form.absorbed | {self.operands[is_first].name}
            return replace(form.shifted(*ends), absorbed=absorbed)
        return None

    def _sides(self, forms: Sequence[Form | None], bounds: Sequence[Bounds]) -> Iterator[tuple[Form, Bounds, Bounds]]:
        """Forms of the result's shape, each with its centred bounds and those of the other operand."""
        spans = [self._whole(centered(v.type, b), v.type.shape) for v, b in zip(self.operands, bounds, strict=True)]
        for i, form in enumerate(forms):
            if form is not None and self.operands[i].type.shape == self.result.type.shape:
                yield form, spans[i], spans[1 - i]

    def _whole(self, bounds: Bounds, shape: Shape) -> Bounds:
        """Channel bounds of an operand whose last axis is broadcast hold for every channel of the result."""
        last = self.result.type.shape[-1] if self.result.type.shape else 1
        return bounds if shape and shape[-1] == last else bounds.flat()


def narrowed(free: Bounds, storage: IntegerType, overflow: Overflow) -> OpBounds:
    """The bounds after narrowing exact results to `storage`."""
    hull = free.hull
    if overflow is Overflow.SATURATE or overflow is Overflow.NONE:
        return OpBounds((free.clamp(storage.lo, storage.hi),), None, hull)
    kept = Interval(*kept_bounds(storage.lo, storage.hi, overflow))
    return OpBounds((free if kept.contains(hull) else Bounds.of(storage.lo, storage.hi),), None, hull)


def result_faults(element: ElementType, overflow: Overflow) -> Iterator[str]:
    """What keeps values from being narrowed to the storage bounds of a result, one sentence each."""
    storage = storage_of(element)
    if storage is None:
        yield "the result must be integers"
    else:
        yield from narrowing_faults(storage, overflow)


class FixedAdd(Elementwise):
    """`(a - za) + (b - zb)`."""

    mnemonic = "add"

    def intermediate_bits(self) -> int:
        """One bit more than the wider operand."""
        return max(bits_of(v.type) for v in self.operands) + 1

    def combine(self, a: Tensor, b: Tensor) -> Tensor:
        """The sum."""
        return a + b

    def combined(self, operands: Sequence[Form | None], bounds: Sequence[Bounds]) -> Form | None:
        """The sum of both."""
        return self._sum(operands, bounds)

    def step(self, a: Bounds, b: Bounds) -> Tensor:
        """What divides the steps of both."""
        return gcd(a.steps, b.steps)


class FixedSub(Elementwise):
    """`(a - za) - (b - zb)`."""

    mnemonic = "sub"

    def intermediate_bits(self) -> int:
        """One bit more than the wider operand."""
        return max(bits_of(v.type) for v in self.operands) + 1

    def combine(self, a: Tensor, b: Tensor) -> Tensor:
        """The difference."""
        return a - b

    def combined(self, operands: Sequence[Form | None], bounds: Sequence[Bounds]) -> Form | None:
        """The difference of both."""
        return self._sum(operands, bounds, -1)

    def step(self, a: Bounds, b: Bounds) -> Tensor:
        """What divides the steps of both."""
        return gcd(a.steps, b.steps)


class FixedMul(Elementwise):
    """`(a - za) * (b - zb)`."""

    mnemonic = "mul"

    def intermediate_bits(self) -> int:
        """The bits of both operands."""
        return sum(bits_of(v.type) for v in self.operands)

    def combine(self, a: Tensor, b: Tensor) -> Tensor:
        """The product."""
        return a * b

    def combined(self, operands: Sequence[Form | None], bounds: Sequence[Bounds]) -> Form | None:
        """One operand times the bounds of the other."""
        for form, own, other in self._sides(operands, bounds):
            hull, whole = own.hull, other.flat()
            ends = (form.along(other.lo), form.along(other.hi))
            lo, hi = (form.along(w) if e is None else e for e, w in zip(ends, (whole.lo, whole.hi), strict=True))
            reach = form.along(max(int(hull.hi), -int(hull.lo)))
            assert lo is not None
            assert hi is not None
            assert reach is not None
            return form.times(lo, hi, reach)
        return None

    def step(self, a: Bounds, b: Bounds) -> Tensor:
        """What divides each step times what it meets."""
        return gcd(a.lo * b.steps, b.lo * a.steps, a.steps * b.steps)


@dataclass(frozen=True, eq=False, kw_only=True)
class FixedDiv(Elementwise):
    """`round((a - za) / (b - zb) * multiplier * 2**(shift - 31)) + z`, ties away from zero: qir's own rule.

    No runtime of the TensorFlow Lite family defines an integer division of two activations. A zero divisor gives the
    bound on the side of the dividend's sign, and 0 / 0 gives the zero point.
    """

    mnemonic = "div"
    multiplier: int
    shift: int

    def intermediate_bits(self) -> int:
        """Dividend and divisor carry the multiplier and the whole shift; a zero divisor gives 2 bits over the bound."""
        return max(max(bits_of(v.type) for v in self.operands) + 31 + abs(31 - self.shift), self.storage.bits + 4)

    def check(self) -> Iterator[str]:
        """The factor is that of `quantize_multiplier`, and a bound is what a zero divisor gives."""
        yield from super().check()
        if not (0 <= self.multiplier < 1 << 31 and -31 <= self.shift <= 31):
            yield "the multiplier is in [0, 2^31) and the shift in [-31, 31]"
        if self.overflow not in (Overflow.SATURATE, Overflow.NONE):
            yield "a quotient saturates: what a zero divisor gives is a bound"
        if zero_array(self.result.type.element).ndim:
            yield "the result has one zero point"

    def combine(self, a: Tensor, b: Tensor) -> Tensor:
        """The quotient at the result's scale, zero point added."""
        if not np.ndim(a) * np.ndim(b):  # of 0-d arrays NumPy makes scalars, which may wrap
            found = self.combine(np.atleast_1d(exact(a)), np.atleast_1d(exact(b)))
            return found if np.ndim(a) or np.ndim(b) else exact(found[0])
        down = 31 - self.shift
        numerator = np.where(b < 0, -a, a) * self.multiplier * (1 << max(-down, 0))
        denominator = np.abs(b) * (1 << max(down, 0))
        safe = np.where(b == 0, 1, denominator)
        limit = 1 << (self.storage.bits + 2)
        quotient = np.where(b == 0, np.sign(a) * limit, round_divide(numerator, safe, Rounding.HALF_AWAY))
        return quotient + int(zero_array(self.result.type.element))

    def bounds(self, operands: Sequence[Bounds]) -> OpBounds:
        """The storage bounds where the divisor may be zero, else the corners."""
        b = centered(self.operands[1].type, operands[1]).hull
        if b.lo <= 0 <= b.hi:
            return OpBounds((Bounds.of(self.storage.lo, self.storage.hi),))
        return super().bounds(operands)


@dataclass(frozen=True, eq=False, kw_only=True)
class Table(Op):
    """`table[..., x - lo]`: any function of one operand of at most 16 bits, `lo` its container's least value.

    The table is [entries], or [channels, entries] with a row for each index of the operand's last axis.
    """

    mnemonic = "table"
    stages = FIXED_ONLY
    operand_names = ("input", "table")

    def infer(self) -> tuple[Shape, ...]:
        """The input's shape. Raises QirError when the table does not fit it."""
        return (self.operands[0].type.shape,)

    def check(self) -> Iterator[str]:
        """The table has an entry for each value of the operand's container."""
        storage = storage_of(self.operands[0].type.element)
        if storage is None or storage.bits > 16:
            yield "a table is indexed by integers of at most 16 bits"
            return
        shape, x = self.operands[1].type.shape, self.operands[0].type.shape
        if shape[-1:] != (1 << storage.bits,) or len(shape) > 2 or (len(shape) == 2 and shape[:1] != x[-1:]):
            yield f"the table must be [{1 << storage.bits}] or [channels, {1 << storage.bits}]"
        table, result = (storage_of(v.type.element) for v in (self.operands[1], self.result))
        if table is None or result is None or not result.lo <= table.lo <= table.hi <= result.hi:
            yield "the entries must be integers within the result's storage bounds"

    def intermediate_bits(self) -> int:
        """An index."""
        return 18

    @property
    def first(self) -> int:
        """The operand's value of entry 0."""
        storage = storage_of(self.operands[0].type.element)
        assert storage is not None
        return -(1 << (storage.bits - 1)) if storage.signed else 0

    def eval_int(self, x: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        """The definition of the op."""
        index = (x - self.first).astype(np.int64)
        if table.ndim == 1:
            return (table[index],)
        return (table[np.arange(table.shape[0]), index],)

    def bounds(self, operands: Sequence[Bounds]) -> OpBounds | None:
        """The extremes of the entries that the operand can reach."""
        data = operands[1].data
        if data is None:
            return None
        if self.result.type.sample_size == 0:
            return OpBounds((Bounds.of(0, 0),))
        rows = np.atleast_2d(data)
        x = operands[0].shifted(-self.first)
        count = max(rows.shape[0], x.channels or 1)
        rows = np.broadcast_to(rows, (count, rows.shape[1]))
        ends = (np.broadcast_to(e, (count,)) for e in (x.lo, x.hi, x.steps))
        parts = [row[int(a) : int(b) + 1 : int(step) or 1] for row, a, b, step in zip(rows, *ends, strict=True)]
        steps = [int(np.gcd.reduce(p.astype(np.int64) - int(p.min()))) for p in parts]
        result = Bounds.of([int(p.min()) for p in parts], [int(p.max()) for p in parts], steps)
        return OpBounds((result.flat() if count == 1 else result,))

    def asked(self, demand: Bounds, operands: Sequence[Bounds]) -> tuple[Bounds, ...]:
        """The operand from the end of each row's flat head to the start of its flat tail, entries clamped to demand."""
        data = operands[1].data
        if data is None:
            return super().asked(demand, operands)
        limits = demand if data.ndim == 2 and demand.channels is not None else demand.flat()
        low, high = (np.reshape(e, (-1, 1)) for e in (limits.lo, limits.hi))
        rows = np.clip(np.atleast_2d(exact(data)), low, high)
        last = rows.shape[1] - 1
        differs = rows[:, 1:] != rows[:, :-1]
        head = np.where(differs.any(axis=1), differs.argmax(axis=1), 0)
        tail = np.where(differs.any(axis=1), last - differs[:, ::-1].argmax(axis=1), 0)
        found = Bounds.of(head + self.first, tail + self.first)
        return (found if data.ndim == 2 else found.flat(), EVERYTHING)


@dataclass(frozen=True, eq=False, kw_only=True)
class FixedArgMax(Op):
    """The index of the greatest element along `axis`; the first of equals, or the last where so asked."""

    mnemonic = "argmax"
    stages = FIXED_ONLY
    axis: int
    keepdims: bool
    select_last_index: bool

    def infer(self) -> tuple[Shape, ...]:
        """The shape without the axis, or with a 1 in its place. Raises QirError for a bad, empty or batch axis."""
        shape = self.operands[0].type.shape
        if self.axis < 0 or not known_dim(shape[normalize_axis(self.axis, len(shape))], "the axis of an argmax"):
            raise QirError(f"axis {self.axis} is negative or empty")
        middle: Shape = (1,) if self.keepdims else ()
        return ((*shape[: self.axis], *middle, *shape[self.axis + 1 :]),)

    def check(self) -> Iterator[str]:
        """Integers in, indices that fit out."""
        yield from integer_operands(self)
        last = int(self.operands[0].type.shape[self.axis]) - 1
        if not (isinstance(kind := self.result.type.element, IntegerType) and kind.lo <= 0 and last <= kind.hi):
            yield f"indices 0 to {last} must be plain integers that the result's type holds"

    def intermediate_bits(self) -> int:
        """Nothing is computed."""
        return bits_of(self.operands[0].type)

    def eval_int(self, x: Tensor) -> tuple[Tensor, ...]:
        """The definition of the op."""
        return (argmax(x, self.axis, self.keepdims, self.select_last_index),)

    def bounds(self, operands: Sequence[Bounds]) -> OpBounds:
        """The indices of the axis."""
        return OpBounds((Bounds.of(0, int(self.operands[0].type.shape[self.axis]) - 1),))


def argmax(x: Tensor, axis: int, keepdims: bool, last: bool) -> Tensor:
    """NumPy's argmax, or the last of equal elements."""
    if not last:
        return np.asarray(np.argmax(x, axis=axis, keepdims=keepdims), np.int64)
    flipped = np.argmax(np.flip(x, axis), axis=axis, keepdims=keepdims)
    return np.asarray(x.shape[axis] - 1 - flipped, np.int64)
