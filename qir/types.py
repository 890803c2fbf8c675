"""What the bits of a tensor mean: shapes, plain integers, affine-quantized integers and power-of-two fixed point.

A type says what bits mean; how they were made (rounding, overflow) belongs to ops.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from qir.arrays import Array
from qir.errors import QirError

#: The symbolic batch: the leading dimension that stays open, so that one program runs any batch size.
BATCH: Final = "N"
#: An integer type lists at most this many levels, so that its text stays one line: an index of 6 bits.
MOST_LEVELS: Final = 64
#: Levels have at most this many bits, so that float64 holds them and their middles.
MOST_LEVEL_BITS: Final = 32
Dim = int | Literal["N"]
Shape = tuple[Dim, ...]


@dataclass(frozen=True, slots=True)
class FloatType:
    """IEEE 754 binary32: the only floating-point element type."""

    def __str__(self) -> str:
        return "f32"


F32: Final = FloatType()


@dataclass(frozen=True, slots=True)
class IntegerType:
    """An integer of 1 to 64 bits whose values lie in [lo, hi], which may be narrower than the container.

    `levels` are the only values that there are, where not every integer from lo to hi is one: of constants, whose data
    are the levels themselves and which are stored as their indices.

    Raises QirError when the width is outside 1..64, the bounds are empty or do not fit the width, or the levels do not
    ascend from lo to hi.
    """

    bits: int
    signed: bool
    lo: int
    hi: int
    levels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.levels is not None:
            self._check_levels(self.levels)
        low, high = container_bounds(self.bits, self.signed)
        if not low <= self.lo <= self.hi <= high:
            raise QirError(
                f"storage bounds [{self.lo}, {self.hi}] do not fit {self.base_name}, which holds [{low}, {high}]"
            )

    def _check_levels(self, levels: tuple[int, ...]) -> None:
        if self.bits > MOST_LEVEL_BITS:
            raise QirError(f"an integer type with levels has at most {MOST_LEVEL_BITS} bits, not {self.bits}")
        if not 2 <= len(levels) <= MOST_LEVELS:
            raise QirError(f"an integer type has 2 to {MOST_LEVELS} levels, not {len(levels)}")
        if any(a >= b for a, b in itertools.pairwise(levels)):
            raise QirError(f"levels ascend, and {list(levels)} do not")
        if (self.lo, self.hi) != (levels[0], levels[-1]):
            raise QirError(f"bounds [{self.lo}, {self.hi}] are not those of the levels {list(levels)}")

    @property
    def base_name(self) -> str:
        """The container alone: `s8`, `u4`."""
        return f"{'s' if self.signed else 'u'}{self.bits}"

    @property
    def is_narrowed(self) -> bool:
        """Whether the storage bounds are narrower than the container."""
        return (self.lo, self.hi) != container_bounds(self.bits, self.signed)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest NumPy dtype that holds the container."""
        width = next(w for w in (8, 16, 32, 64) if self.bits <= w)
        return np.dtype(f"{'i' if self.signed else 'u'}{width // 8}")

    @property
    def stored_bits(self) -> int:
        """The bits that an element takes where it is stored: those of the index of its level, else of the container."""
        return self.bits if self.levels is None else (len(self.levels) - 1).bit_length()

    @property
    def is_shift(self) -> bool:
        """Whether every value is 0 or plus or minus a power of two, so that a product with it is a shift."""
        if self.levels is None and not -2 <= self.lo <= self.hi <= 2:
            return False
        values = range(self.lo, self.hi + 1) if self.levels is None else self.levels
        return all(abs(v).bit_count() <= 1 for v in values)

    def narrowed(self, lo: int, hi: int) -> IntegerType:
        """The same container with these storage bounds, every integer between them included."""
        return IntegerType(self.bits, self.signed, lo, hi)

    def __str__(self) -> str:
        if self.levels is not None:
            return f"{self.base_name}{{{', '.join(map(str, self.levels))}}}"
        return f"{self.base_name}[{self.lo}, {self.hi}]" if self.is_narrowed else self.base_name


def container_bounds(bits: int, signed: bool) -> tuple[int, int]:
    """The least and the greatest value of a two's complement or unsigned container of `bits` bits.

    Raises QirError when the width is outside 1..64.
    """
    if not 1 <= bits <= 64:
        raise QirError(f"an integer type has 1 to 64 bits, not {bits}")
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


def integer(bits: int, signed: bool = True) -> IntegerType:
    """The integer type that uses its whole container."""
    return IntegerType(bits, signed, *container_bounds(bits, signed))


def of_levels(levels: Sequence[int]) -> IntegerType:
    """The integer type of these levels, ascending, in the narrowest signed container that holds them.

    Raises QirError as IntegerType does.
    """
    bits = max((max(v, ~v).bit_length() + 1 for v in levels), default=1)
    return IntegerType(bits, True, min(levels, default=0), max(levels, default=0), tuple(levels))


S8: Final = integer(8)
S16: Final = integer(16)
S32: Final = integer(32)
S64: Final = integer(64)
U8: Final = integer(8, signed=False)
BOOL: Final = integer(1, signed=False)
#: Binary weights: a sign, which is stored in a bit.
BINARY: Final = of_levels((-1, 1))


@dataclass(frozen=True, slots=True)
class AffineType:
    """Integers q that stand for the reals `(q - zero_point) * scale`, per tensor (axis None) or along one axis.

    `scale` is a float32 array and `zero_point` an int64 array, both 0-d per tensor or 1-d per axis.
    Raises QirError when a scale is not positive and finite, a zero point is outside the container of `storage`, or the
    arrays are not of these dtypes or do not fit the axis.
    """

    storage: IntegerType
    scale: Array
    zero_point: Array
    axis: int | None = None

    def __post_init__(self) -> None:
        rank = 0 if self.axis is None else 1
        if self.scale.data.ndim != rank or self.zero_point.shape != self.scale.shape:
            raise QirError("scale and zero point are scalars per tensor, or equally long 1-d arrays per axis")
        if not bool(np.all(np.isfinite(self.scale.data) & (self.scale.data > 0))):
            raise QirError("every scale must be positive and finite")
        dtypes = self.scale.data.dtype, self.zero_point.data.dtype
        if dtypes[0] != np.float32 or dtypes[1] != np.int64:
            raise QirError(f"scales are float32 and zero points int64, not {dtypes[0]} and {dtypes[1]}")
        low, high = container_bounds(self.storage.bits, self.storage.signed)
        if any(not low <= zero <= high for zero in self.zero_point.data.reshape(-1).tolist()):
            raise QirError(f"every zero point must lie in {self.storage.base_name}, which holds [{low}, {high}]")
        if self.storage.levels is not None and self.has_zero_point:
            raise QirError(f"levels have no zero point but 0, and {self.storage} is given one")

    @property
    def parameters(self) -> Array:
        """The array that runs along the axis."""
        return self.scale

    @property
    def has_zero_point(self) -> bool:
        """Whether some zero point differs from 0."""
        return bool(self.zero_point.data.any())

    def with_storage(self, storage: IntegerType) -> AffineType:
        """The same scale and zero point on other storage bounds."""
        return AffineType(storage, self.scale, self.zero_point, self.axis)


@dataclass(frozen=True, slots=True)
class FixedPointType:
    """Integers q that stand for the reals `q * 2**exponent`; `exponent` is an int64 array, 0-d or along `axis`.

    Raises QirError when a scale `2**exponent` is no float32, or the array is of another dtype or does not fit the axis.
    """

    storage: IntegerType
    exponent: Array
    axis: int | None = None

    def __post_init__(self) -> None:
        if self.exponent.data.ndim != (0 if self.axis is None else 1):
            raise QirError("an exponent is a scalar per tensor, or a 1-d array per axis")
        if self.exponent.data.dtype != np.int64:
            raise QirError(f"exponents are int64, not {self.exponent.data.dtype}")
        if self.exponent.size and not -149 <= self.exponent.data.min() <= self.exponent.data.max() <= 127:
            raise QirError("every exponent must lie in [-149, 127], so that float32 holds its power of two")

    @property
    def parameters(self) -> Array:
        """The array that runs along the axis."""
        return self.exponent

    def with_storage(self, storage: IntegerType) -> FixedPointType:
        """The same binary point on other storage bounds."""
        return FixedPointType(storage, self.exponent, self.axis)


QuantizedType = AffineType | FixedPointType
ElementType = FloatType | IntegerType | AffineType | FixedPointType


def affine(
    storage: IntegerType,
    scale: npt.ArrayLike,
    zero_point: npt.ArrayLike = 0,
    axis: int | None = None,
    name: str = "",
) -> AffineType:
    """An affine type from plain numbers: scales are rounded to float32, a scalar zero point serves the whole axis."""
    scales = np.asarray(scale, np.float32)
    zeros = np.broadcast_to(np.asarray(zero_point, np.int64), scales.shape).copy()
    prefix = f"{name}." if name else ""
    return AffineType(storage, Array(scales, f"{prefix}scale"), Array(zeros, f"{prefix}zero"), axis)


def fixed_point(storage: IntegerType, exponent: npt.ArrayLike, axis: int | None = None) -> FixedPointType:
    """A power-of-two type from plain numbers."""
    return FixedPointType(storage, Array(np.asarray(exponent, np.int64), "exponent"), axis)


def scaled_by(element: QuantizedType, bits: int) -> QuantizedType:
    """The same integers at `2**bits` times the scale. Raises QirError when that is no float32."""
    if isinstance(element, FixedPointType):
        return fixed_point(element.storage, element.exponent.data + bits, element.axis)
    scales = np.ldexp(element.scale.data, bits)
    return affine(element.storage, scales, element.zero_point.data, element.axis)


def storage_of(element: ElementType) -> IntegerType | None:
    """The integer storage of an element type, or None for float32."""
    if isinstance(element, FloatType):
        return None
    return element if isinstance(element, IntegerType) else element.storage


def stored_in(element: ElementType, storage: IntegerType) -> ElementType:
    """The integer type of another storage whose integers mean what those of `element` do."""
    return element.with_storage(storage) if isinstance(element, AffineType | FixedPointType) else storage


def is_quantized(element: ElementType) -> bool:
    """Whether integers of this type stand for reals."""
    return isinstance(element, AffineType | FixedPointType)


def scale_array(element: QuantizedType) -> npt.NDArray[np.float64]:
    """The scale(s) as float64: exact for float32 scales and for powers of two."""
    if isinstance(element, AffineType):
        return element.scale.data.astype(np.float64)
    return np.ldexp(1.0, element.exponent.data.astype(np.int64))


def zero_array(element: ElementType) -> npt.NDArray[np.int64]:
    """The zero point(s): 0 for plain integers and fixed point."""
    return element.zero_point.data if isinstance(element, AffineType) else np.zeros((), np.int64)


@dataclass(frozen=True, slots=True)
class TensorType:
    """A shape, whose leading dimension may be the symbolic batch, and an element type."""

    shape: Shape
    element: ElementType = F32

    def __post_init__(self) -> None:
        for place, dim in enumerate(self.shape):
            if dim == BATCH:
                if place:
                    raise QirError(f"only the leading dimension can be the batch N, not dimension {place}")
            elif not isinstance(dim, int) or isinstance(dim, bool) or dim < 0:
                raise QirError(f"a dimension is a non-negative integer or N, not {dim!r}")
        if isinstance(self.element, AffineType | FixedPointType) and self.element.axis is not None:
            axis, length = self.element.axis, self.element.parameters.size
            if not 0 <= axis < len(self.shape) or self.shape[axis] != length:
                raise QirError(f"{length} scales do not fit axis {axis} of shape {shape_text(self.shape)}")

    @property
    def rank(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    @property
    def is_batched(self) -> bool:
        """Whether the leading dimension is the symbolic batch."""
        return bool(self.shape) and self.shape[0] == BATCH

    @property
    def sample_size(self) -> int:
        """The number of elements, one sample of the batch counted."""
        return math.prod(d for d in self.shape if isinstance(d, int))

    def concrete(self, batch: int) -> tuple[int, ...]:
        """The shape with the batch filled in."""
        return tuple(d if isinstance(d, int) else batch for d in self.shape)

    def with_element(self, element: ElementType) -> TensorType:
        """The same shape with another element type."""
        return TensorType(self.shape, element)

    def with_shape(self, shape: Sequence[Dim]) -> TensorType:
        """The same element type with another shape."""
        return TensorType(tuple(shape), self.element)

    def __str__(self) -> str:
        """Shape and storage, without scales: a label, not the text form."""
        element = storage_of(self.element) or self.element
        return f"{shape_text(self.shape)} x {element}" if self.shape else str(element)


def shape_text(shape: Shape) -> str:
    """`Nx8x8x16`; the empty string for a scalar."""
    return "x".join(str(d) for d in shape)
