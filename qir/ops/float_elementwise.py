"""Float ops that work element by element: arithmetic with broadcasting, activations and casts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from qir.interval import Interval
from qir.opdef import broadcast_shapes
from qir.ops.float_base import Clipped, FloatOp, Ranges, Tensor, clip_array, outward, products
from qir.types import F32, ElementType, IntegerType, Shape


@dataclass(frozen=True, eq=False, kw_only=True)
class _Binary(Clipped):
    operand_names = ("a", "b")

    def infer(self) -> tuple[Shape, ...]:
        """The broadcast shape. Raises QirError when there is none."""
        return (broadcast_shapes([v.type.shape for v in self.operands]),)


class Add(_Binary):
    """`a + b`, broadcast as in NumPy."""

    mnemonic = "Add"

    def real_range(self, operands: Sequence[Interval]) -> Ranges | None:
        """The sums of the ends."""
        a, b = operands
        return self.clipped_range(a.lo + b.lo, a.hi + b.hi)

    def compute(self, *arrays: Tensor) -> Tensor:
        """NumPy's sum."""
        return self.clipped(np.add(*arrays))


class Sub(_Binary):
    """`a - b`, broadcast as in NumPy."""

    mnemonic = "Sub"

    def real_range(self, operands: Sequence[Interval]) -> Ranges | None:
        """The differences of the opposite ends."""
        a, b = operands
        return self.clipped_range(a.lo - b.hi, a.hi - b.lo)

    def compute(self, *arrays: Tensor) -> Tensor:
        """NumPy's difference."""
        return self.clipped(np.subtract(*arrays))


class Mul(_Binary):
    """`a * b`, broadcast as in NumPy."""

    mnemonic = "Mul"

    def real_range(self, operands: Sequence[Interval]) -> Ranges | None:
        """The extreme products of the ends."""
        corners = products(*operands)
        return self.clipped_range(min(corners), max(corners))

    def compute(self, *arrays: Tensor) -> Tensor:
        """NumPy's product."""
        return self.clipped(np.multiply(*arrays))


class Div(_Binary):
    """`a / b`, broadcast as in NumPy; what calibration must not see is a zero divisor."""

    mnemonic = "Div"

    def compute(self, *arrays: Tensor) -> Tensor:
        """NumPy's quotient; a division by zero gives infinity or NaN, as IEEE 754 does."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.clipped(np.divide(*arrays))


@dataclass(frozen=True, eq=False, kw_only=True)
class _Unary(FloatOp):
    def infer(self) -> tuple[Shape, ...]:
        """The shape of the input."""
        return (self.operands[0].type.shape,)


class Activation(_Unary):
    """Base of Relu and Clip: the operand clipped to `activation` = (lo, hi)."""

    @property
    def activation(self) -> tuple[float, float]:
        """The bounds; infinite where there is none."""
        raise NotImplementedError

    def real_range(self, operands: Sequence[Interval]) -> Ranges:
        """The ends, clipped."""
        lo, hi = self.activation
        return (Interval(*(min(max(float(end), lo), hi) for end in (operands[0].lo, operands[0].hi))),)

    def compute(self, *arrays: Tensor) -> Tensor:
        """The clipped elements."""
        return clip_array(arrays[0], *self.activation)


class Relu(Activation):
    """`max(x, 0)`."""

    mnemonic = "Relu"

    @property
    def activation(self) -> tuple[float, float]:
        """[0, infinity]."""
        return 0.0, math.inf


@dataclass(frozen=True, eq=False, kw_only=True)
class Clip(Activation):
    """`min(max(x, minimum), maximum)`; a bound may be infinite."""

    mnemonic = "Clip"
    minimum: float
    maximum: float

    @property
    def activation(self) -> tuple[float, float]:
        """The stated bounds; where they cross, the maximum wins, as in ONNX."""
        return min(self.minimum, self.maximum), self.maximum

    def check(self) -> Iterator[str]:
        """No bound is NaN."""
        yield from super().check()
        if math.isnan(self.minimum) or math.isnan(self.maximum):
            yield "a bound is NaN"


@dataclass(frozen=True, eq=False, kw_only=True)
class LeakyRelu(_Unary):
    """`x` where it is not negative, else `alpha * x`."""

    mnemonic = "LeakyRelu"
    alpha: float

    def real_range(self, operands: Sequence[Interval]) -> Ranges | None:
        """The function is monotone on either side of 0."""
        return _leaky_range(operands[0], Interval(self.alpha, self.alpha))

    def compute(self, *arrays: Tensor) -> Tensor:
        """The definition."""
        return np.where(arrays[0] < 0, arrays[0] * np.float32(self.alpha), arrays[0])


@dataclass(frozen=True, eq=False, kw_only=True)
class PRelu(FloatOp):
    """`x` where it is not negative, else `slope * x`; the slope broadcasts to x as in NumPy."""

    mnemonic = "PRelu"
    operand_names = ("input", "slope")

    def infer(self) -> tuple[Shape, ...]:
        """The broadcast shape. Raises QirError when there is none."""
        return (broadcast_shapes([v.type.shape for v in self.operands]),)

    def real_range(self, operands: Sequence[Interval]) -> Ranges | None:
        """The function is monotone on either side of 0 for every slope."""
        return _leaky_range(*operands)

    def compute(self, *arrays: Tensor) -> Tensor:
        """The definition."""
        return np.where(arrays[0] < 0, arrays[0] * arrays[1], arrays[0])


def _leaky_range(source: Interval, slope: Interval) -> Ranges | None:
    ends: list[float] = []
    if source.hi >= 0:
        ends += [max(source.lo, 0.0), source.hi]
    if source.lo < 0:
        ends += products(Interval(source.lo, min(source.hi, 0.0)), slope)
    return outward(min(ends), max(ends))


@dataclass(frozen=True, eq=False, kw_only=True)
class HardSigmoid(_Unary):
    """`min(max(alpha * x + beta, 0), 1)`."""

    mnemonic = "HardSigmoid"
    alpha: float
    beta: float

    def real_range(self, operands: Sequence[Interval]) -> Ranges:
        """[0, 1]."""
        return (Interval(0.0, 1.0),)

    def compute(self, *arrays: Tensor) -> Tensor:
        """The definition."""
        return _hard_sigmoid(arrays[0], self.alpha, self.beta)


def _hard_sigmoid(x: Tensor, alpha: float, beta: float) -> Tensor:
    return clip_array(x * np.float32(alpha) + np.float32(beta), 0.0, 1.0)


class HardSwish(_Unary):
    """`x * min(max(x / 6 + 1/2, 0), 1)`."""

    mnemonic = "HardSwish"

    def real_range(self, operands: Sequence[Interval]) -> Ranges | None:
        """The function falls to -3/8 at -3/2 and rises from there."""
        lo, hi = float(operands[0].lo), float(operands[0].hi)
        ends = [x * min(max(x / 6 + 0.5, 0.0), 1.0) for x in (lo, hi, *((-1.5,) if lo < -1.5 < hi else ()))]
        # Just right of -3, x / 6 + 1/2 cancels: the error there is absolute. It never changes the sign.
        hair = 2.0**-20
        low = min(ends) - hair if lo < 0 else min(ends)
        high = min(max(ends) + hair, 0.0) if hi < 0 else max(ends)
        return outward(low, high, 4)

    def compute(self, *arrays: Tensor) -> Tensor:
        """The definition."""
        return arrays[0] * _hard_sigmoid(arrays[0], 1 / 6, 0.5)


class Sigmoid(_Unary):
    """`1 / (1 + exp(-x))`."""

    mnemonic = "Sigmoid"
    has_tolerance = True

    def real_range(self, operands: Sequence[Interval]) -> Ranges:
        """[0, 1]."""
        return (Interval(0.0, 1.0),)

    def compute(self, *arrays: Tensor) -> Tensor:
        """The definition on -|x|, so that exp cannot overflow."""
        x = arrays[0]
        small = np.exp(-np.abs(x))
        return np.where(x < 0, small, np.float32(1)) / (np.float32(1) + small)


class Tanh(_Unary):
    """The hyperbolic tangent."""

    mnemonic = "Tanh"
    has_tolerance = True

    def real_range(self, operands: Sequence[Interval]) -> Ranges:
        """[-1, 1]."""
        return (Interval(-1.0, 1.0),)

    def compute(self, *arrays: Tensor) -> Tensor:
        """NumPy's tanh."""
        return np.tanh(arrays[0])


@dataclass(frozen=True, eq=False, kw_only=True)
class Cast(_Unary):
    """Reals to integers, truncated towards zero and saturated; integers to integers, wrapping; integers to float32.

    `to` is a whole container of 8, 16, 32 or 64 bits, or absent for float32.
    """

    mnemonic = "Cast"
    to: IntegerType | None = None

    def infer_elements(self) -> tuple[ElementType, ...]:
        """The target type."""
        return (F32 if self.to is None else self.to,)

    def check(self) -> Iterator[str]:
        """The result has the target type, or, for float32, a real one. The operand may be anything."""
        found = self.result.type.element
        if (found != self.to) if self.to is not None else isinstance(found, IntegerType):
            yield f"the result is {found}, the op casts to {self.to or F32}"
        if self.to is not None and (self.to.is_narrowed or self.to.bits not in (8, 16, 32, 64)):
            yield f"casts to whole integers of 8, 16, 32 or 64 bits, not to {self.to}"

    def real_range(self, operands: Sequence[Interval]) -> Ranges | None:
        """The ends, cast; everything where integers may wrap."""
        lo, hi = operands[0].lo, operands[0].hi
        if self.to is None:
            return outward(lo, hi)
        whole = Interval(float(self.to.lo), float(self.to.hi))
        if not whole.contains(operands[0]):
            return (whole,)
        return (Interval(float(math.trunc(lo)), float(math.trunc(hi))),)

    def compute(self, *arrays: Tensor) -> Tensor:
        """The definition."""
        x = arrays[0]
        if self.to is None:
            return x.astype(np.float32)
        if x.dtype.kind != "f":
            return x.astype(self.to.dtype)
        # The float64 next to each bound on the inner side: 2**63 - 1 itself is none.
        lo, hi = (
            float(b) if int(float(b)) == b else float(np.nextafter(float(b), 0)) for b in (self.to.lo, self.to.hi)
        )
        return np.clip(np.trunc(x.astype(np.float64)), lo, hi).astype(self.to.dtype)
