"""Rounding modes, overflow modes and requantization forms: the one definition of each.

Every integer function takes Python ints, int64 arrays (any narrower NumPy integer is widened) and object arrays of
Python ints, and broadcasts as NumPy does. Python ints and object arrays are unbounded. On int64 arrays the result is
exact or a FixedPointError is raised: nothing wraps silently. A call whose arguments are all scalars returns an int.

`shift` is the power of two that the result is *divided* by in `round_shift`, and the power of two that the product is
*multiplied* by in the requantization functions, as in TensorFlow Lite: there a negative shift is a right shift.
"""

from __future__ import annotations

import math
from enum import StrEnum
from fractions import Fraction
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from qir.errors import QirError

#: An int, an int64 array or an object array of Python ints; NumPy's typing cannot say more about the three together.
Integers: TypeAlias = Any
#: A float, a NumPy float, or an array of them.
Floats: TypeAlias = Any

INT32_MIN: Final = -(1 << 31)
INT32_MAX: Final = (1 << 31) - 1
#: int64 arrays can be divided by at most 2 to this power.
MAX_ARRAY_SHIFT: Final = 62
#: Floating-point results beyond this magnitude are clipped to it before they become int64.
_FLOAT_LIMIT: Final = float(1 << 62)


class FixedPointError(QirError):
    """An operand is not an integer, or lies outside the domain on which a fixed-point function is defined."""


class Rounding(StrEnum):
    """How a quotient that is not an integer becomes one; the ap_fixed name of each stands beside it."""

    FLOOR = "floor"  # TRN
    TOWARD_ZERO = "toward_zero"  # TRN_ZERO
    HALF_UP = "half_up"  # RND: ties toward plus infinity
    HALF_TOWARD_ZERO = "half_toward_zero"  # RND_ZERO
    HALF_AWAY = "half_away"  # RND_INF
    HALF_DOWN = "half_down"  # RND_MIN_INF: ties toward minus infinity
    HALF_EVEN = "half_even"  # RND_CONV


class Overflow(StrEnum):
    """What becomes of a value outside the bounds of its type."""

    WRAP = "wrap"  # two's complement
    SATURATE = "saturate"  # the nearer bound
    NONE = "none"  # a proof says that there is no such value
    SATURATE_ZERO = "saturate_zero"  # zero
    SATURATE_SYMMETRIC = "saturate_symmetric"  # the nearer of -hi and hi (0 and hi if unsigned); the minimum goes too


class RequantizeForm(StrEnum):
    """The formulas by which runtimes bring an accumulator to the scale of its output; `requantize` defines each."""

    DOUBLE_ROUND = "double_round"
    SINGLE_ROUND = "single_round"
    NEON = "neon"
    REDUCED_16 = "reduced_16"
    SHIFT = "shift"
    FLOAT32 = "float32"
    DOUBLE_AWAY = "double_away"


#: Forms that multiply in floating point and round once, which have no intermediate of integers.
FLOAT_FORMS: Final = frozenset({RequantizeForm.FLOAT32, RequantizeForm.DOUBLE_AWAY})


def round_shift(value: Integers, shift: Integers, rounding: Rounding) -> Integers:
    """`value / 2**shift`, rounded; a negative shift is an exact left shift. Shifts broadcast against the values.

    On int64 arrays shift is at most 62 and a left shift must not lose bits, or FixedPointError is raised.
    """
    value, shift = _operands(value, shift)
    in_arrays = _is_int64(value) or _is_int64(shift)
    if in_arrays and np.max(shift, initial=0) > MAX_ARRAY_SHIFT:
        raise FixedPointError(
            f"a shift by {int(np.max(shift))} is too wide for int64 arrays, which take at most {MAX_ARRAY_SHIFT}; "
            "use Python ints"
        )
    if np.min(shift, initial=0) < 0:
        value = _shift_left(value, _positive_part(-shift))
    right = _positive_part(shift)
    floor = value >> right
    divisor = 1 << right
    return _round(floor, value - (floor << right), divisor, rounding)


def round_divide(numerator: Integers, denominator: Integers, rounding: Rounding) -> Integers:
    """`numerator / denominator`, rounded; exact for every int64.

    Raises FixedPointError unless all denominators are positive.
    """
    numerator, denominator = _operands(numerator, denominator)
    if np.min(denominator, initial=1) <= 0:
        raise FixedPointError(f"a denominator must be positive, not {int(np.min(denominator))}")
    floor = numerator // denominator
    return _round(floor, numerator - floor * denominator, denominator, rounding)


def wrap(value: Integers, bits: int, signed: bool = True) -> Integers:
    """The low `bits` bits of `value`, read as two's complement or as unsigned.

    int64 arrays take up to 63 bits, or 64 signed ones; FixedPointError otherwise.
    """
    (value,) = _operands(value)
    if _is_int64(value):
        if bits == 64 and signed:
            return value
        if bits >= 64:
            raise FixedPointError(f"{bits} unsigned bits do not fit int64 arrays; use Python ints")
    low = value & ((1 << bits) - 1)
    if not signed:
        return low
    sign = 1 << (bits - 1)
    return (low ^ sign) - sign


def saturate(value: Integers, lo: int, hi: int) -> Integers:
    """The nearest value in [lo, hi]."""
    (value,) = _operands(value)
    if isinstance(value, int):
        return min(max(value, lo), hi)
    if _is_int64(value):
        lo, hi = max(lo, -(1 << 63)), min(hi, (1 << 63) - 1)
    return np.clip(value, lo, hi)


def narrow(value: Integers, lo: int, hi: int, overflow: Overflow) -> Integers:
    """`value` brought into [lo, hi] by an overflow mode; `none` returns it as it is.

    Raises FixedPointError when `wrap` is asked for and [lo, hi] is not the whole range of a signed or unsigned width.
    """
    match Overflow(overflow):
        case Overflow.NONE:
            return _operands(value)[0]
        case Overflow.SATURATE:
            return saturate(value, lo, hi)
        case Overflow.SATURATE_SYMMETRIC:
            return saturate(value, *kept_bounds(lo, hi, overflow))
        case Overflow.SATURATE_ZERO:
            (value,) = _operands(value)
            return value * ((value >= lo) & (value <= hi))
        case Overflow.WRAP:
            bits = (hi - lo).bit_length()
            if hi - lo + 1 != 1 << bits or lo not in (0, -(1 << bits) >> 1):
                raise FixedPointError(
                    f"[{lo}, {hi}] is not the range of a whole number of bits, so values cannot wrap to it"
                )
            return wrap(value, bits, signed=lo < 0)


def kept_bounds(lo: int, hi: int, overflow: Overflow) -> tuple[int, int]:
    """The bounds of what `narrow` to [lo, hi] leaves as it is: `saturate_symmetric` changes values below -hi too."""
    return (max(lo, -hi) if overflow is Overflow.SATURATE_SYMMETRIC else lo), hi


def round_half_away(value: Floats) -> Integers:
    """The nearest integer to a float64, ties away from zero: C's `round`, and TfLiteRound. Clipped to +-2^62."""
    value = np.clip(np.asarray(value, np.float64), -_FLOAT_LIMIT, _FLOAT_LIMIT)
    whole = np.trunc(value)
    return _to_integers(whole + np.where(np.abs(value - whole) >= 0.5, np.copysign(1.0, value), 0.0))


def floor_log2(value: Floats) -> npt.NDArray[np.int64]:
    """The floor of the binary logarithm of positive reals: the exponent of those that are powers of two."""
    return np.asarray(np.frexp(value)[1] - 1, np.int64)


def quantize_multiplier(real: float | np.floating[Any]) -> tuple[int, int]:
    """A non-negative real as `multiplier * 2**(shift - 31)`, with multiplier in [2^30, 2^31) or zero.

    TensorFlow Lite's QuantizeMultiplier: the mantissa rounds half away from zero, and reals below 2^-32 become (0, 0).
    Raises FixedPointError for a real that is negative or not finite, or needs a shift of more than 31, which no 32-bit
    runtime has.
    """
    real = float(real)
    if not (math.isfinite(real) and real >= 0):
        raise FixedPointError(
            f"a requantization multiplier must be finite and positive, not {real!r}; check the scales"
        )
    mantissa, shift = math.frexp(real)
    multiplier = int(round_half_away(mantissa * 2.0**31))
    if multiplier == 1 << 31:
        multiplier, shift = multiplier >> 1, shift + 1
    if multiplier == 0 or shift < -31:
        return 0, 0
    if shift > 31:
        raise FixedPointError(f"a requantization multiplier must be below 2^31, not {real!r}; enlarge the output scale")
    return multiplier, shift


def quantize_multipliers(reals: Floats) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """`quantize_multiplier` of every element: int64 arrays of multipliers and of shifts, in the shape of `reals`."""
    reals = np.asarray(reals, np.float64)
    pairs = np.array([quantize_multiplier(real) for real in reals.reshape(-1)], np.int64).reshape(*reals.shape, 2)
    return pairs[..., 0], pairs[..., 1]


def saturating_rounding_doubling_high_mul(a: Integers, b: Integers, bits: int = 32) -> Integers:
    """The high half of `2*a*b`, ties toward plus infinity: gemmlowp's function of the name and ARM's SQRDMULH.

    a and b are signed `bits`-bit values; only MIN*MIN saturates, to MAX.
    """
    a, b = _operands(a, b)
    high = round_shift(a * b, bits - 1, Rounding.HALF_UP)
    return saturate(high, -(1 << (bits - 1)), (1 << (bits - 1)) - 1)


def rounding_divide_by_pot(value: Integers, exponent: Integers) -> Integers:
    """`value / 2**exponent`, ties away from zero: gemmlowp's RoundingDivideByPOT."""
    return round_shift(value, exponent, Rounding.HALF_AWAY)


def multiply_by_quantized_multiplier(acc: Integers, multiplier: Integers, shift: Integers) -> Integers:
    """`acc * multiplier * 2**(shift - 31)`, rounded twice: TensorFlow Lite's MultiplyByQuantizedMultiplier for int32.

    `acc << shift` wraps at 32 bits, as the runtimes' registers do.
    """
    return _high_mul_then_shift(acc, multiplier, shift, Rounding.HALF_AWAY)


def requantize(
    acc: Integers,
    multiplier: Any,
    shift: Integers,
    form: RequantizeForm,
    rounding: Rounding | None = None,
) -> Integers:
    """An accumulator brought to the scale of its output, before the zero point is added and the result is narrowed.

    Multiplier and shift are scalars or arrays that broadcast on the last axis (one per output channel).

    - `double_round`: SQRDMULH of `acc << max(shift, 0)` and the multiplier, then / 2^max(-shift, 0), ties away.
    - `neon`: the same, but the second rounding takes ties up (the instruction pair vqrdmulh, vrshl).
    - `single_round`: `acc * multiplier * 2^(shift-31)`, ties up. int64 arrays: |acc| < 2^32.
    - `reduced_16`: `acc * reduced_multiplier(multiplier) * 2^(shift-15)`, ties up, wrapped to 32 bits. int64 arrays:
      |acc| < 2^48.
    - `shift`: `acc * 2^shift`, rounded by `rounding`; the multiplier is not read.
    - `float32`: `float32(acc) * float32(multiplier)` in float32, ties to even; the shift is not read.
    - `double_away`: `float64(acc) * float64(multiplier)` in float64, ties away from zero; the shift is not read.

    The multiplier of the first four is that of `quantize_multiplier`.
    Raises FixedPointError when the form is `shift` and no rounding is given, or an int64 accumulator is too wide.
    """
    match RequantizeForm(form):
        case RequantizeForm.DOUBLE_ROUND:
            return multiply_by_quantized_multiplier(acc, multiplier, shift)
        case RequantizeForm.NEON:
            return _high_mul_then_shift(acc, multiplier, shift, Rounding.HALF_UP)
        case RequantizeForm.SINGLE_ROUND:
            return _multiply_then_shift(acc, multiplier, shift, bits=31)
        case RequantizeForm.REDUCED_16:
            return wrap(multiply_by_reduced_multiplier(acc, multiplier, shift), 32)
        case RequantizeForm.SHIFT:
            if rounding is None:
                raise FixedPointError("the requantization form `shift` needs a rounding mode")
            acc, shift = _operands(acc, shift)
            return round_shift(acc, -shift, rounding)
        case RequantizeForm.FLOAT32:
            with np.errstate(over="ignore"):  # infinity is clipped like any large number
                scaled = _exact_int64(acc).astype(np.float32) * np.asarray(multiplier, np.float32)
            return _to_integers(np.rint(scaled))
        case RequantizeForm.DOUBLE_AWAY:
            return round_half_away(_exact_int64(acc).astype(np.float64) * np.asarray(multiplier, np.float64))


def rounded_product(
    form: RequantizeForm, rounding: Rounding | None, multiplier: Any, shift: int, reach: int
) -> tuple[Fraction, Fraction, Fraction]:
    """A dyadic factor f and exact bounds of `requantize(acc, ...) - f * acc` for |acc| <= reach, where nothing wraps.

    The factor has at most 31 bits; by how much a longer one differs is part of the bounds. In the floating-point forms
    each operation is off by at most half a unit in the last place (IEEE 754), and subnormals by less than 2**-60.
    """
    half = Fraction(1, 2)
    match RequantizeForm(form):
        case RequantizeForm.SHIFT:
            lost = 1 - Fraction(1, 1 << max(-shift, 0))  # the most that fraction bits hold
            below, above = min(half, lost), min(half, lost)
            if rounding in (Rounding.FLOOR, Rounding.TOWARD_ZERO):
                below, above = lost, lost if rounding is Rounding.TOWARD_ZERO else Fraction(0)
            return Fraction(2) ** shift, -below, above
        case RequantizeForm.SINGLE_ROUND:
            return Fraction(int(multiplier)) * Fraction(2) ** (shift - 31), -half, half
        case RequantizeForm.REDUCED_16:
            return Fraction(int(reduced_multiplier(int(multiplier)))) * Fraction(2) ** (shift - 15), -half, half
        case RequantizeForm.DOUBLE_ROUND | RequantizeForm.NEON:
            twice = half + (half * Fraction(2) ** shift if shift < 0 else 0)
            return Fraction(int(multiplier)) * Fraction(2) ** (shift - 31), -twice, twice
        case RequantizeForm.FLOAT32:
            exact, unit = Fraction(float(np.float32(multiplier))), Fraction(1, 1 << 22)
        case RequantizeForm.DOUBLE_AWAY:
            exact, unit = Fraction(float(multiplier)), Fraction(1, 1 << 51)
    power = Fraction(2) ** (math.frexp(float(exact))[1] - 31)
    factor = round(exact / power) * power
    error = half + abs(factor - exact) * reach + exact * reach * unit + Fraction(1, 1 << 60)
    return factor, -error, error


def multiply_by_reduced_multiplier(acc: Integers, multiplier: Integers, shift: Integers) -> Integers:
    """`acc * reduced_multiplier(multiplier) * 2^(shift-15)`, ties up: the form `reduced_16` before it wraps."""
    return _multiply_then_shift(acc, reduced_multiplier(multiplier), shift, bits=15)


def reduced_multiplier(multiplier: Integers) -> Integers:
    """A 31-bit multiplier rounded to 15 bits without overflowing 16: the one TensorFlow Lite's 16x8 kernels use."""
    (multiplier,) = _operands(multiplier)
    return saturate(round_shift(multiplier, 16, Rounding.HALF_UP), INT32_MIN, 0x7FFF)


def _high_mul_then_shift(acc: Integers, multiplier: Integers, shift: Integers, rounding: Rounding) -> Integers:
    acc, multiplier, shift = _operands(acc, multiplier, shift)
    left = _positive_part(shift)
    high = saturating_rounding_doubling_high_mul(wrap(wrap(acc, 32) << left, 32), multiplier)
    return round_shift(high, left - shift, rounding)


def _multiply_then_shift(acc: Integers, multiplier: Integers, shift: Integers, bits: int) -> Integers:
    acc, multiplier, shift = _operands(acc, multiplier, shift)
    if _is_int64(acc):
        limit = 1 << (63 - bits)
        if np.max(acc, initial=0) >= limit or np.min(acc, initial=0) <= -limit:
            raise FixedPointError(f"int64 accumulators must lie within +-2^{63 - bits} here; use Python ints")
    return round_shift(acc * multiplier, bits - shift, Rounding.HALF_UP)


def _round(floor: Integers, remainder: Integers, divisor: Integers, rounding: Rounding) -> Integers:
    """`floor + remainder / divisor`, rounded. The remainder is compared with what it lacks to avoid doubling it."""
    rest = divisor - remainder
    match Rounding(rounding):
        case Rounding.FLOOR:
            return floor
        case Rounding.TOWARD_ZERO:
            return floor + ((floor < 0) & (remainder != 0))
        case Rounding.HALF_UP:
            return floor + (remainder >= rest)
        case Rounding.HALF_DOWN:
            return floor + (remainder > rest)
        case Rounding.HALF_AWAY:
            return floor + ((remainder > rest) | ((remainder == rest) & (floor >= 0)))
        case Rounding.HALF_TOWARD_ZERO:
            return floor + ((remainder > rest) | ((remainder == rest) & (floor < 0)))
        case Rounding.HALF_EVEN:
            return floor + ((remainder > rest) | ((remainder == rest) & ((floor & 1) == 1)))


def _operands(*values: Any) -> tuple[Integers, ...]:
    """Each value as a Python int or an integer array; all arrays of objects when one operand exceeds int64."""
    converted = tuple(_integers(value) for value in values)
    if any(v.dtype == object if isinstance(v, np.ndarray) else not -(1 << 63) <= v < 1 << 63 for v in converted):
        return tuple(v.astype(object) if isinstance(v, np.ndarray) else v for v in converted)
    return converted


def _integers(value: Any) -> Integers:
    if isinstance(value, np.ndarray):
        if value.dtype == object or value.dtype == np.int64:
            return value
        if value.dtype.kind in "bi" or (value.dtype.kind == "u" and value.dtype.itemsize < 8):
            return value.astype(np.int64)
        raise FixedPointError(f"an array of {value.dtype} is not one of integers that fit int64")
    if isinstance(value, (int, np.integer, np.bool_)):
        return int(value)
    raise FixedPointError(f"{value!r} is not an integer")


def _is_int64(value: Integers) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == np.int64


def _exact_int64(value: Any) -> npt.NDArray[np.int64]:
    """The operand as int64, because NumPy converts Python ints to float32 by way of float64, which rounds twice."""
    (value,) = _operands(value)
    return np.asarray(value, np.int64)


def _to_integers(whole: npt.NDArray[np.floating[Any]]) -> Integers:
    clipped = np.clip(whole, -_FLOAT_LIMIT, _FLOAT_LIMIT).astype(np.int64)
    return clipped if clipped.ndim else int(clipped)


def _positive_part(value: Integers) -> Integers:
    return max(value, 0) if isinstance(value, int) else np.maximum(value, 0)


def _shift_left(value: Integers, left: Integers) -> Integers:
    shifted = value << left
    if (_is_int64(value) or _is_int64(left)) and not np.all(shifted >> left == value):
        raise FixedPointError(f"a left shift by up to {int(np.max(left))} loses bits of int64 values; use Python ints")
    return shifted
