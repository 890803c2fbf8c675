"""Ops that change the scale: requantize between integers, quantize and dequantize at the border to reals."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qir.affine import Form
from qir.arrays import Array
from qir.errors import QirError
from qir.fixed_point import (
    FLOAT_FORMS,
    Overflow,
    RequantizeForm,
    Rounding,
    kept_bounds,
    multiply_by_reduced_multiplier,
    narrow,
    requantize,
    rounded_product,
)
from qir.interval import EVERYTHING, Bounds, Interval, exact
from qir.ir import FIXED_ONLY, Graph, Op, OpBounds, Value
from qir.levels import nearest_levels
from qir.ops.accumulate import centered, centre, integer_operands
from qir.ops.fixed_elementwise import narrowed, result_faults
from qir.types import (
    F32,
    AffineType,
    ElementType,
    FixedPointType,
    FloatType,
    IntegerType,
    Shape,
    container_bounds,
    is_quantized,
    scale_array,
    storage_of,
    zero_array,
)

Tensor = npt.NDArray[Any]


class QuantizeRule(enum.StrEnum):
    """How a real is divided by the scale before it is rounded; they differ near ties."""

    DIVIDE = "divide"  # x / s in float32
    RECIPROCAL = "reciprocal"  # x * (1 / s) in float32
    RECIPROCAL_FUSED = "reciprocal_fused"  # x * (1 / s) + z, rounded to float32 once: the zero point is inside


@dataclass(frozen=True, eq=False, kw_only=True)
class Requantize(Op):
    """`round((x - zx) * 2**input_shift * multiplier * 2**shift) + z`, narrowed to the storage bounds of the result.

    `form` names the formula (`qir.fixed_point.requantize`); multiplier and shift are 0-d, or 1-d along the last axis;
    the multiplier is a 31-bit integer, or a float for the forms `float32` and `double_away`. A fused activation is
    nothing but narrower storage bounds of the result. `overflow=none` claims a proof that no value leaves them.
    """

    mnemonic = "requantize"
    stages = FIXED_ONLY
    multiplier: Array
    shift: Array
    form: RequantizeForm
    input_shift: int = 0
    rounding: Rounding | None = None
    overflow: Overflow

    def infer(self) -> tuple[Shape, ...]:
        """The operand's shape. Raises QirError when the multipliers do not fit the last axis."""
        shape = self.operands[0].type.shape
        if self.shift.shape != self.multiplier.shape or self.multiplier.data.ndim > 1:
            raise QirError("multiplier and shift are scalars, or equally long 1-d arrays")
        if self.multiplier.data.ndim == 1 and (not shape or self.multiplier.size != shape[-1]):
            raise QirError(f"{self.multiplier.size} multipliers do not fit the last axis of the operand")
        return (shape,)

    def check(self) -> Iterator[str]:
        """Multiplier, shift and rounding suit the form, and the types suit them."""
        yield from integer_operands(self)
        is_float = self.form in FLOAT_FORMS
        if self.multiplier.data.dtype.kind != ("f" if is_float else "i"):
            yield f"the form {self.form} takes {'float' if is_float else 'integer'} multipliers"
        if (self.form is RequantizeForm.SHIFT) != (self.rounding is not None):
            yield "a rounding mode belongs to the form shift, and only to it"
        limit = np.inf if is_float else 1 << 31
        if not bool(((self.multiplier.data >= 0) & (self.multiplier.data < limit)).all()):
            yield "multipliers are finite and not negative, and integers are below 2^31"
        reach = 62 if self.form is RequantizeForm.SHIFT else 31
        shift = self.shift.data
        if (
            shift.dtype.kind != "i"
            or bool(((shift < -reach) | (shift > reach)).any())
            or not 0 <= self.input_shift <= 31
        ):
            yield f"shifts are in [-{reach}, {reach}] and the input shift in [0, 31]"
        axis = getattr(self.result.type.element, "axis", None)
        if axis not in (None, self.result.type.rank - 1):
            yield "zero points of the result run along its last axis"
        if is_float and self.intermediate_bits() > 64:
            yield f"the form {self.form} takes operands that fit 64 bits, zero point and input shift included"
        yield from result_faults(self.result.type.element, self.overflow)

    def intermediate_bits(self) -> int:
        """The shifted operand, its product with a multiplier where the form does not wrap to 32 bits, and the sum."""
        kind = self.operands[0].type.element
        storage, zeros = storage_of(kind), zero_array(kind)
        if storage is None:
            return 64
        least, greatest = storage.lo - int(zeros.max(initial=0)), storage.hi - int(zeros.min(initial=0))
        bits = max(~least, greatest).bit_length() + 1 + self.input_shift
        match self.form:
            case RequantizeForm.DOUBLE_ROUND | RequantizeForm.NEON:
                bits, scaled = max(bits, 63), 32
            case RequantizeForm.SINGLE_ROUND | RequantizeForm.REDUCED_16:
                bits = scaled = bits + 31
            case RequantizeForm.SHIFT:
                bits = scaled = bits + max(int(self.shift.data.max(initial=0)), 0)
            case _:
                scaled = 62  # results are clipped to that magnitude
        added = int(self._largest_zero()).bit_length()
        return max(bits, max(scaled, added + 1) + 1) if added else bits

    def _largest_zero(self) -> int:
        """The largest magnitude of a zero point of the result."""
        zeros = zero_array(self.result.type.element)
        return max(int(zeros.max(initial=0)), -int(zeros.min(initial=0)))

    def unsaturated(self, x: Tensor) -> Tensor:
        """The value before it is narrowed, for centred x (last axis: the channels of the multipliers)."""
        shifted = x << self.input_shift if self.input_shift else x
        scaled = requantize(shifted, self.multiplier.data, self.shift.data, self.form, self.rounding)
        if isinstance(scaled, int) or self._largest_zero() >> 61 or self.storage.hi >> 63:
            scaled = exact(scaled)  # what follows may leave int64
        free = scaled + zero_array(self.result.type.element)
        return exact(free) if isinstance(free, int) else np.asarray(free)

    def eval_int(self, x: Tensor) -> tuple[Tensor, ...]:
        """The definition of the op."""
        storage = self.storage
        return (narrow(self.unsaturated(centre(x, self.operands[0].type)), storage.lo, storage.hi, self.overflow),)

    @property
    def storage(self) -> IntegerType:
        """The storage of the result."""
        storage = storage_of(self.result.type.element)
        assert storage is not None
        return storage

    def bounds(self, operands: Sequence[Bounds]) -> OpBounds:
        """The images of the ends: each form is monotonic as long as no left shift wraps."""
        x, storage = centered(self.operands[0].type, operands[0]), self.storage
        lanes = {"shifted": self._shifted(x)}
        if self._may_wrap(x.hull):
            return OpBounds((Bounds.of(storage.lo, storage.hi),), lanes=lanes)
        ends = []
        for end in (x.lo, x.hi):
            values = end.astype(np.int64) if self.form in FLOAT_FORMS else end
            ends.append(exact(self.unsaturated(np.atleast_1d(values))))
        channels = max(e.shape[0] for e in ends)
        if channels == 1 and self.multiplier.data.ndim == 0 and x.channels is None:
            ends = [e[0] for e in ends]
        return replace(narrowed(Bounds.of(ends[0], ends[1], self._step(x)), storage, self.overflow), lanes=lanes)

    def asked(self, demand: Bounds, operands: Sequence[Bounds]) -> tuple[Bounds, ...]:
        """From the last operand whose image is at or below what is kept and asked for, to the first at or above it.

        Each form is monotonic.
        """
        kind, storage = self.operands[0].type, storage_of(self.operands[0].type.element)
        monotonic = (Overflow.SATURATE, Overflow.SATURATE_SYMMETRIC, Overflow.NONE)
        if storage is None or storage.bits > 62 or self.overflow not in monotonic:
            return (EVERYTHING,)
        least, greatest = container_bounds(storage.bits, storage.signed)
        container = centered(kind, Bounds.of(least, greatest)).hull
        if self._may_wrap(container) or getattr(kind.element, "axis", None) not in (None, kind.rank - 1):
            return (EVERYTHING,)
        if self.overflow is not Overflow.NONE:
            demand = demand.clamp(*kept_bounds(self.storage.lo, self.storage.hi, self.overflow))
        size = greatest - least + 1
        dtype = np.int64 if self.form in FLOAT_FORMS or self.intermediate_bits() <= 63 else object
        zeros = zero_array(kind.element)

        def image(place: Tensor) -> Tensor:
            return self.unsaturated((place + least - zeros).astype(dtype))

        at_most = _count(lambda place: image(place) <= demand.lo, size)
        below = _count(lambda place: image(place) < demand.hi, size)
        low = np.where(at_most == 0, EVERYTHING.lo, least + at_most - 1)
        high = np.where(below == size, EVERYTHING.hi, least + below)
        found = Bounds.of(np.minimum(low, high), high)
        return (Bounds.of(found.lo[0], found.hi[0]) if found.lo.shape == (1,) else found,)

    def is_identity(self, x: Interval) -> bool:
        """Whether every integer of the operand, zero point included, within these bounds is given back as it is."""
        zeros = [zero_array(v.type.element) for v in (self.operands[0], self.result)]
        if zeros[0].ndim or zeros[1].ndim or zeros[0] != zeros[1]:
            return False
        centre = Interval(x.lo - int(zeros[0]), x.hi - int(zeros[0]))
        if self._may_wrap(centre) or not Interval(self.storage.lo, self.storage.hi).contains(x):
            return False
        multiplier, shift = self.multiplier.data, self.shift.data + self.input_shift
        if self.form in FLOAT_FORMS:  # float32 holds integers of 24 bits, float64 of 53
            digits = 24 if self.form is RequantizeForm.FLOAT32 else 53
            largest = max(-centre.lo, centre.hi)
            return not self.input_shift and bool((multiplier == 1).all()) and largest <= 1 << digits
        if self.form is RequantizeForm.SHIFT:
            return bool((shift == 0).all())
        return bool(((multiplier == 1 << 30) & (shift == 1)).all())

    def affine(self, operands: Sequence[Form | None], bounds: Sequence[Bounds]) -> Form | None:
        """The operand times the factor, off by what rounding may change."""
        x, form = centered(self.operands[0].type, bounds[0]), operands[0]
        if form is None or self._may_wrap(x.hull):
            return None
        multipliers, shifts = form.along(self.multiplier.data), form.along(self.shift.data)
        if multipliers is None or shifts is None:
            return None
        reach = int(max(-x.hull.lo, x.hull.hi, 0)) << self.input_shift
        known = [
            rounded_product(self.form, self.rounding, m, int(s), reach)
            for m, s in zip(multipliers, shifts, strict=True)
        ]
        factors, below, above = zip(*known, strict=True)
        if self.form in FLOAT_FORMS and max(factors) * reach >= 1 << 61:  # beyond 2^62 they are clipped
            return None
        return replace(form, scale=form.scale - self.input_shift).scaled(factors, (below, above))

    def _left_shift(self) -> Tensor:
        """By how many bits the operand is shifted left before anything else, as Python ints."""
        if self.form in (RequantizeForm.DOUBLE_ROUND, RequantizeForm.NEON, RequantizeForm.SHIFT):
            return exact(np.maximum(self.shift.data, 0)) + self.input_shift
        return exact(np.full(self.shift.shape, self.input_shift))

    def _shifted(self, x: Bounds) -> Interval:
        """Bounds of the register that holds the shifted operand."""
        factor = exact(np.left_shift(exact(1), self._left_shift()))
        ends = [int(e) for part in (x.lo, x.hi) for e in np.reshape(part * factor, -1)]
        return Interval(min(ends, default=0), max(ends, default=0))

    def _step(self, x: Bounds) -> Tensor | None:
        """The steps of what is only shifted, where no bit is lost on the way."""
        if self.form is not RequantizeForm.SHIFT:
            return None
        shift = exact(self.shift.data) + self.input_shift
        unit = exact(np.left_shift(exact(1), exact(np.maximum(-shift, 0))))
        if np.any(x.lo % unit) or np.any(x.steps % unit):
            return None
        return np.asarray(x.steps // unit * exact(np.left_shift(exact(1), exact(np.maximum(shift, 0)))))

    def _may_wrap(self, x: Interval) -> bool:
        """Whether 32 bits can wrap, which would break monotonicity: a left shift before, or `reduced_16` after."""
        lo, hi = (int(end) << self.input_shift for end in (x.lo, x.hi))
        if self.form is RequantizeForm.REDUCED_16:
            ends = [multiply_by_reduced_multiplier(exact(e), self.multiplier.data, self.shift.data) for e in (lo, hi)]
            lo, hi = int(np.min(ends, initial=0)), int(np.max(ends, initial=0))
        elif self.form in (RequantizeForm.DOUBLE_ROUND, RequantizeForm.NEON):
            left = max(int(self.shift.data.max(initial=0)), 0)
            lo, hi = lo << left, hi << left
        else:
            return False
        return not -(1 << 31) <= lo <= hi < 1 << 31


def _count(holds: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """How many of the first places of `size` a property holds for, which once it ends never holds again; a channel."""
    low = exact(np.zeros_like(np.atleast_1d(holds(exact([0]))), np.int64))
    high = low + size
    while bool((low < high).any()):
        middle = (low + high) // 2
        is_held = np.asarray(holds(np.minimum(middle, size - 1)), bool) & (middle < high)
        low, high = np.where(is_held, middle + 1, low), np.where(is_held, high, middle)
    return low


@dataclass(frozen=True, eq=False, kw_only=True)
class Quantize(Op):
    """Reals to integers: `round(x / scale) + zero_point`, saturated to the storage bounds. NaN: the zero point."""

    mnemonic = "quantize"
    stages = FIXED_ONLY
    rule: QuantizeRule
    rounding: Rounding
    overflow: Overflow = Overflow.SATURATE

    def infer(self) -> tuple[Shape, ...]:
        """The operand's shape."""
        return (self.operands[0].type.shape,)

    def check(self) -> Iterator[str]:
        """Reals in, quantized integers out."""
        if not isinstance(self.operands[0].type.element, FloatType) or not is_quantized(self.result.type.element):
            yield "quantize takes reals and gives a quantized type"
        if self.overflow is not Overflow.SATURATE:
            yield "reals have no proved bounds, so quantize saturates"
        yield from _wide(self.result)

    def eval_int(self, x: Tensor) -> tuple[Tensor, ...]:
        """The definition of the op; x is float32."""
        return (quantize_array(x, self.result.type.element, self.rule, self.rounding),)

    def bounds(self, operands: Sequence[Bounds]) -> OpBounds:
        """The storage bounds: the reals are unknown."""
        storage = storage_of(self.result.type.element)
        assert storage is not None
        return OpBounds((Bounds.of(storage.lo, storage.hi),))


def quantize_array(x: Tensor, element: ElementType, rule: QuantizeRule, rounding: Rounding) -> Tensor:
    """float32 reals as int64 integers of a quantized type, saturating; the division is in float32.

    Of a type with levels the integers are those that `qir.levels.nearest_levels` gives.
    Raises QirError when the type is not quantized.
    """
    storage = storage_of(element)
    if storage is None or not is_quantized(element):
        raise QirError("only quantized types have a scale to quantize by")
    scale, zero = along_axis(element, x.ndim)
    scaled: Tensor
    with np.errstate(over="ignore", invalid="ignore"):
        match rule:
            case QuantizeRule.DIVIDE:
                scaled = x / scale
            case QuantizeRule.RECIPROCAL:
                scaled = x * (np.float32(1) / scale)
            case QuantizeRule.RECIPROCAL_FUSED:
                scaled = fused_multiply_add(x, np.float32(1) / scale, zero)
                scaled = np.where(np.isnan(scaled), zero.astype(np.float32), scaled)
                zero = np.zeros_like(zero)
    if storage.levels is not None:
        return nearest_levels(scaled, storage.levels, rounding)
    return np.asarray(np.clip(quantize_reals(scaled, rounding) + zero, storage.lo, storage.hi))


def fused_multiply_add(a: Tensor, b: Tensor, c: Tensor) -> npt.NDArray[np.float32]:
    """`a * b + c` of float32 arrays a and b and small integers c, rounded to float32 once.

    The product is exact in float64. The sum is rounded there to odd, its exact error (Knuth's TwoSum) telling the side,
    so that rounding it again, to float32, is as rounding once.
    """
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = np.asarray(product + addend)
    back = total - product
    error = (product - (total - back)) + (addend - back)
    even = (total.view(np.int64) & 1) == 0
    toward = np.where(error > 0, np.inf, -np.inf)
    total = np.where((error != 0) & even & np.isfinite(total), np.nextafter(total, toward), total)
    return np.asarray(total.astype(np.float32))


def quantize_reals(scaled: Tensor, rounding: Rounding) -> npt.NDArray[np.int64]:
    """float32 reals as int64 integers within +-2^62, in any rounding; NaN becomes 0."""
    limit = np.float32(2.0**62)
    scaled = np.clip(np.where(np.isnan(scaled), np.float32(0), scaled), -limit, limit)
    # In float64, where the rest of -0.49999997, the float32 next to a tie, is no tie either.
    wide = scaled.astype(np.float64)
    floor = np.floor(wide)
    rest, negative, odd = wide - floor, floor < 0, np.mod(floor, 2) == 1
    match rounding:
        case Rounding.FLOOR:
            up = np.zeros_like(negative)
        case Rounding.TOWARD_ZERO:
            up = negative & (rest != 0)
        case _:
            at_tie = {
                Rounding.HALF_UP: True,
                Rounding.HALF_DOWN: False,
                Rounding.HALF_AWAY: ~negative,
                Rounding.HALF_TOWARD_ZERO: negative,
                Rounding.HALF_EVEN: odd,
            }[rounding]
            up = (rest > 0.5) | ((rest == 0.5) & at_tie)
    return np.asarray(floor.astype(np.int64) + up, np.int64)


def quantize_input(graph: Graph, value: Value, array: Tensor) -> Tensor:
    """Reals for a quantized input of a fixed-stage graph as integers of its storage, as the graph's attributes say.

    Integers pass as they are.

    Raises QirError when the graph does not say how its inputs are quantized.
    """
    if array.dtype.kind != "f" or not is_quantized(value.type.element):
        return array
    try:
        rule, rounding = (
            QuantizeRule(str(graph.attributes["input_rule"])),
            Rounding(str(graph.attributes["input_rounding"])),
        )
    except (KeyError, ValueError):
        raise QirError(f"graph @{graph.name} must state input_rule=divide|reciprocal and an input_rounding") from None
    element = value.type.element
    assert isinstance(element, AffineType | FixedPointType)
    return quantize_array(array.astype(np.float32), element, rule, rounding).astype(element.storage.dtype)


def dequantize_array(q: Tensor, element: ElementType) -> Tensor:
    """Integers of a quantized type as float32 reals: `float32(q - zero_point) * scale`, one rounding."""
    if not is_quantized(element):
        raise QirError("only quantized types have a scale to dequantize by")
    scale, zero = along_axis(element, q.ndim)
    return np.asarray((q.astype(np.int64) - zero).astype(np.float32) * scale, np.float32)


def round_to_grid(x: Tensor, element: ElementType, rounding: Rounding) -> Tensor:
    """float32 reals as the nearest, by `rounding`, that integers of a quantized type stand for."""
    return dequantize_array(quantize_array(x, element, QuantizeRule.DIVIDE, rounding), element)


def _wide(value: Value) -> Iterator[str]:
    storage = storage_of(value.type.element)
    if storage is not None and storage.bits > 62:
        yield f"reals meet integers of at most 62 bits, %{value.name} has {storage.bits}"


def along_axis(element: ElementType, rank: int) -> tuple[Tensor, Tensor]:
    """Scale (float32) and zero point (int64), shaped to broadcast along their axis of a tensor of this rank."""
    scale = scale_array(element).astype(np.float32)  # type: ignore[arg-type]
    zero = zero_array(element)
    axis = getattr(element, "axis", None)
    if axis is None:
        return scale, zero
    shape = [-1 if i == axis else 1 for i in range(rank)]
    return scale.reshape(shape), zero.reshape(shape) if isinstance(element, AffineType) else zero


@dataclass(frozen=True, eq=False, kw_only=True)
class Dequantize(Op):
    """Integers to reals: `float32(x - zero_point) * scale`."""

    mnemonic = "dequantize"
    stages = FIXED_ONLY

    def infer(self) -> tuple[Shape, ...]:
        """The operand's shape."""
        return (self.operands[0].type.shape,)

    def infer_elements(self) -> tuple[ElementType, ...]:
        """float32."""
        return (F32,)

    def check(self) -> Iterator[str]:
        """Quantized integers in."""
        if not is_quantized(self.operands[0].type.element):
            yield "dequantize takes a quantized type"
        yield from _wide(self.operands[0])

    def eval_int(self, x: Tensor) -> tuple[Tensor, ...]:
        """The definition of the op; the result is float32."""
        return (dequantize_array(x, self.operands[0].type.element),)
