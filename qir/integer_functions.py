"""Integer-only algorithms of TensorFlow Lite's int8 reference kernels, which TensorFlow Lite Micro runs.

Each function works on int64 arrays that hold int8 values, uses nothing but integer arithmetic, and takes the integer
parameters that a `prepare_...` or `..._multiplier` function derives from the scales exactly as the runtime does: the
scales are float32 values, and every step on them is in float64 unless the docstring says otherwise.

`softmax`, `logistic` and `tanh` return values of int8; the others return the value with its zero point added, before
it is narrowed to the bounds of the output.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np

from qir.fixed_point import (
    INT32_MAX,
    FixedPointError,
    Integers,
    RequantizeForm,
    Rounding,
    multiply_by_quantized_multiplier,
    quantize_multiplier,
    reduced_multiplier,
    requantize,
    round_half_away,
    round_shift,
    rounding_divide_by_pot,
    saturate,
    saturating_rounding_doubling_high_mul,
    wrap,
)

Scale = float | np.floating[Any]

#: Integer bits of the fixed-point argument of exp in softmax, and of the argument of logistic and tanh.
_SOFTMAX_BITS: Final = 5
_SIGMOID_BITS: Final = 4
#: Add and Sub bring both inputs to the common scale at this left shift.
ADD_LEFT_SHIFT: Final = 20
#: Integer bits of the sum of exponentials in softmax; it bounds the length of a row.
_SUM_BITS: Final = 12
#: A row of softmax has fewer elements than this, because a longer sum of exponentials overflows 32 bits. Shorter rows
#: of which 512 elements or more are (nearly) at the maximum have an answer here, but abort TensorFlow Lite Micro.
SOFTMAX_ROW_LIMIT: Final = 1 << _SUM_BITS

#: 16-bit values can be shifted right by at most 15.
_LEAST_SHIFT_16: Final = -15
INT8_MIN: Final = -128
INT8_MAX: Final = 127

# Constants in Q0.31: exp(-1/8), 1/3, and exp(-2^k) for k = -2, -1, ...
_EXP_MINUS_EIGHTH: Final = 1895147668
_THIRD: Final = 715827883
_EXP_MINUS_POWERS: Final = (1672461947, 1302514674, 790015084, 290630308, 39332535, 720401, 242)
# Constants in Q2.29: 48/17 and -32/17, the first guess of Newton's division, and one.
_48_OVER_17: Final = 1515870810
_MINUS_32_OVER_17: Final = -1010580540
_ONE_Q2: Final = 1 << 29


class Multiplier(NamedTuple):
    """A real factor as `multiplier * 2**(shift - 31)`."""

    multiplier: int
    shift: int


class SoftmaxParameters(NamedTuple):
    """Input scale times beta in Q5.26, and the difference from the row's maximum below which exp counts as zero."""

    multiplier: int
    left_shift: int
    diff_min: int


class SigmoidParameters(NamedTuple):
    """Input scale in Q4.27, and the distance from the zero point from which logistic and tanh are saturated."""

    multiplier: int
    left_shift: int
    radius: int


class HardSwishParameters(NamedTuple):
    """16-bit multipliers from the input scale (times 2^-7) to the output's, and to the scale on which 3.0 is 2^15."""

    output_multiplier: int
    output_shift: int
    gate_multiplier: int
    gate_shift: int


class AddParameters(NamedTuple):
    """Multipliers of both inputs to the common scale, and from there to the output."""

    input1: Multiplier
    input2: Multiplier
    output: Multiplier


def product_multiplier(input_scale: Scale, weight_scale: Scale, output_scale: Scale) -> Multiplier:
    """`input_scale * weight_scale / output_scale`.

    Used by convolutions, fully connected (per tensor and per channel), batched matrix multiplication, Mul, and the
    negative side of PRelu and LeakyRelu.
    """
    return _multiplier(_double(input_scale) * _double(weight_scale) / _double(output_scale))


def rescale_multiplier(input_scale: Scale, output_scale: Scale) -> Multiplier:
    """`input_scale / output_scale`. Used by Quantize, Relu, Sum, and the positive side of PRelu and LeakyRelu."""
    return _multiplier(_double(input_scale) / _double(output_scale))


def mean_multiplier(input_scale: Scale, output_scale: Scale, count: int) -> Multiplier:
    """The factor on the sum of `count` inputs (less their zero points) that makes it their mean at the output scale.

    The division by the count is of the quantized multiplier, shifted up by floor(log2(count)) first.
    """
    multiplier, shift = rescale_multiplier(input_scale, output_scale)
    up = min(count.bit_length() - 1, 32, 31 + shift)
    return Multiplier((multiplier << up) // count, shift - up)


def quantized_bound(real: float, scale: Scale, zero_point: int) -> int:
    """The integer at which a fused activation clamps: `zero_point + real / scale`, in float32, ties away from zero."""
    return int(zero_point + round_half_away(np.float32(real) / np.float32(scale)))


def prepare_add(
    input1_scale: Scale, input2_scale: Scale, output_scale: Scale, left_shift: int = ADD_LEFT_SHIFT
) -> AddParameters:
    """The parameters of Add and Sub. The common scale is twice the larger input scale, less `left_shift` bits.

    The left shift is 20 for operands of 8 bits, 15 for those of 16.

    Raises FixedPointError when the output scale is so small that the runtime refuses the op.
    """
    common = 2 * max(_double(input1_scale), _double(input2_scale))
    output = common / (2.0**left_shift * _double(output_scale))
    if output >= 1.0:
        raise FixedPointError(
            f"the output scale of an addition is at most 2^-{left_shift - 1} times the larger input scale; enlarge it"
        )
    factors = (_double(input1_scale) / common, _double(input2_scale) / common, output)
    return AddParameters(*(_multiplier(factor) for factor in factors))


def prepare_softmax(input_scale: Scale, beta: Scale = 1.0) -> SoftmaxParameters:
    """The parameters of softmax: `beta * input_scale * 2^26`, at most 2^31 - 1.

    Raises FixedPointError when that is not above one, which the runtime refuses.
    """
    scale = _double(beta) * _double(input_scale)
    real = min(scale * 2.0 ** (31 - _SOFTMAX_BITS), 2.0**31 - 1.0)
    if real <= 1.0:
        raise FixedPointError(f"softmax needs an input scale times beta above 2^-26, not {scale!r}")
    multiplier, left_shift = _multiplier(real)
    return SoftmaxParameters(multiplier, left_shift, -_input_radius(_SOFTMAX_BITS, left_shift))


def prepare_sigmoid(input_scale: Scale) -> SigmoidParameters:
    """The parameters of logistic and tanh alike: `input_scale * 2^27`. From scale 8 on, both are -128 at zero.

    Raises FixedPointError when that is outside [1/2, 2^31), where the runtime's shifts are undefined.
    """
    real = _double(input_scale) * 2.0 ** (31 - _SIGMOID_BITS)
    if not 0.5 <= real < 2.0**31:
        raise FixedPointError(f"logistic and tanh need an input scale from 2^-28 to 16, not {_double(input_scale)!r}")
    multiplier, left_shift = _multiplier(real)
    return SigmoidParameters(multiplier, left_shift, _input_radius(_SIGMOID_BITS, left_shift))


def prepare_hard_swish(input_scale: Scale, output_scale: Scale) -> HardSwishParameters:
    """The parameters of hard_swish.

    Raises FixedPointError where the runtime refuses the op (the input scale is 128 times the output's or more), and
    where its 16-bit shifts are undefined (it is below 2^-9 times the output's, or below about 2^-23).
    """
    fine = _double(input_scale) / 128.0
    output, gate = _multiplier(fine / _double(output_scale)), _multiplier(fine / (3.0 / 32768.0))
    if not _LEAST_SHIFT_16 <= output.shift <= 0 or gate.shift < _LEAST_SHIFT_16:
        raise FixedPointError(
            f"hard_swish needs an input scale of 2^-9 to 128 times the output's, not {_double(input_scale)!r} for "
            f"{_double(output_scale)!r}"
        )
    return HardSwishParameters(
        reduced_multiplier(output.multiplier), output.shift, reduced_multiplier(gate.multiplier), gate.shift
    )


def prepare_leaky_relu(input_scale: Scale, alpha: Scale, output_scale: Scale) -> tuple[Multiplier, Multiplier]:
    """The factors on inputs from the zero point up, and below it. Alpha is a float32, and the second has its sign."""
    magnitude = product_multiplier(input_scale, abs(_double(alpha)), output_scale)
    below = Multiplier(-magnitude.multiplier, magnitude.shift) if alpha < 0 else magnitude
    return rescale_multiplier(input_scale, output_scale), below


def softmax(x: Integers, parameters: SoftmaxParameters) -> Integers:
    """Softmax over the last axis, at scale 1/256 and zero point -128.

    Raises FixedPointError when the last axis has SOFTMAX_ROW_LIMIT elements or more.
    """
    if x.shape[-1] >= SOFTMAX_ROW_LIMIT:
        raise FixedPointError(
            f"softmax over {x.shape[-1]} elements overflows 32 bits; it takes {SOFTMAX_ROW_LIMIT - 1}"
        )
    exponential = softmax_exponentials(x - x.max(axis=-1, keepdims=True), parameters)
    reciprocal, shift = softmax_reciprocal(softmax_terms(exponential).sum(axis=-1, keepdims=True))
    ratio = rounding_divide_by_pot(saturating_rounding_doubling_high_mul(reciprocal, exponential), shift)
    return saturate(ratio + INT8_MIN, INT8_MIN, INT8_MAX)


def softmax_exponentials(difference: Integers, parameters: SoftmaxParameters) -> Integers:
    """Exp of the distance from the row's maximum in Q0.31; 0 for what is too far below it to count."""
    counted = difference >= parameters.diff_min
    inside = np.where(counted, difference, 0)
    scaled = multiply_by_quantized_multiplier(inside, parameters.multiplier, parameters.left_shift)
    return np.where(counted, exp_on_negative_values(scaled, _SOFTMAX_BITS), 0)


def softmax_terms(exponential: Integers) -> Integers:
    """What an exponential adds to the sum of its row, in Q12.19."""
    return rounding_divide_by_pot(exponential, _SUM_BITS)


def softmax_reciprocal(total: Integers) -> tuple[Integers, Integers]:
    """1 / the sum of a row as a Q0.31 factor, and the right shift that brings its products to the scale 1/256."""
    length = np.frexp(total.astype(np.float64))[1].astype(np.int64)
    return one_over_one_plus_x((total << (32 - length)) - (1 << 31)), length - (32 - _SUM_BITS) + (31 - 8)


def logistic(x: Integers, zero_point: int, parameters: SigmoidParameters) -> Integers:
    """The logistic function, at scale 1/256 and zero point -128."""
    difference = x - zero_point
    scaled = _inside(difference, parameters)
    positive = one_over_one_plus_x(exp_on_negative_values(-np.abs(scaled), _SIGMOID_BITS))
    result = np.where(scaled > 0, positive, INT32_MAX - positive)
    result = np.where(scaled == 0, 1 << 30, result)
    return _saturate_outside(difference, parameters.radius, rounding_divide_by_pot(result, 31 - 8) + INT8_MIN)


def tanh(x: Integers, zero_point: int, parameters: SigmoidParameters) -> Integers:
    """The hyperbolic tangent, at scale 1/128 and zero point 0."""
    difference = x - zero_point
    scaled = _inside(difference, parameters)
    magnitude = one_minus_x_over_one_plus_x(exp_on_negative_values(-np.abs(scaled), _SIGMOID_BITS + 1))
    result = np.sign(scaled) * magnitude
    return _saturate_outside(difference, parameters.radius, rounding_divide_by_pot(result, 31 - 7))


def hard_swish(x: Integers, zero_point: int, parameters: HardSwishParameters, output_zero_point: int) -> Integers:
    """`x * clip(x + 3, 0, 6) / 6` in 16-bit arithmetic, in which the sum with the zero point wraps."""
    fine = (x - zero_point) << 7
    value = saturating_rounding_doubling_high_mul(fine, parameters.output_multiplier, bits=16)
    gate = _hard_swish_gate(fine, parameters.gate_multiplier, parameters.gate_shift)
    product = round_shift(gate * value, 15, Rounding.TOWARD_ZERO)
    return wrap(rounding_divide_by_pot(product, -parameters.output_shift) + output_zero_point, 16)


def leaky_relu(
    x: Integers,
    zero_point: int,
    above: Multiplier,
    below: Multiplier,
    output_zero_point: int,
    form: RequantizeForm = RequantizeForm.DOUBLE_ROUND,
) -> Integers:
    """One factor from the zero point up, another below it; a negative factor negates the rounded product."""
    difference = x - zero_point
    negative_side = requantize(difference, abs(below.multiplier), below.shift, form)
    rescaled: Integers = np.where(
        difference >= 0,
        requantize(difference, *above, form),
        -negative_side if below.multiplier < 0 else negative_side,
    )
    return rescaled + output_zero_point


def prelu(
    x: Integers,
    zero_point: int,
    slope: Integers,
    slope_zero_point: int,
    above: Multiplier,
    below: Multiplier,
    output_zero_point: int,
    form: RequantizeForm = RequantizeForm.DOUBLE_ROUND,
) -> Integers:
    """Leaky relu whose slope is a tensor that broadcasts; `below` holds its scale."""
    difference = x - zero_point
    rescaled: Integers = np.where(
        difference >= 0,
        requantize(difference, *above, form),
        requantize(difference * (slope - slope_zero_point), *below, form),
    )
    return rescaled + output_zero_point


def exp_on_negative_values(a: Integers, integer_bits: int) -> Integers:
    """exp(a) in Q0.31 for a <= 0 with `integer_bits` integer bits of 31, at most 5: gemmlowp's function of the name.

    A Taylor polynomial on [-1/4, 0), times exp(-2^k) for every bit of the multiple of 1/4 that was taken out.
    """
    fraction_bits = 31 - integer_bits
    quarter = 1 << (fraction_bits - 2)
    rest = (a & (quarter - 1)) - quarter
    result = _exp_near_zero(rest << integer_bits)
    quarters = rest - a
    for power, factor in zip(range(-2, integer_bits), _EXP_MINUS_POWERS, strict=False):
        taken = (quarters >> (fraction_bits + power)) & 1 == 1
        result = np.where(taken, saturating_rounding_doubling_high_mul(result, factor), result)
    return np.where(a == 0, INT32_MAX, result)


def one_over_one_plus_x(x: Integers) -> Integers:
    """1 / (1 + x) in Q0.31 for x in [0, 1) in Q0.31: gemmlowp's one_over_one_plus_x_for_x_in_0_1."""
    return _shift_left_saturating(_two_over_one_plus_x(x), 1)


def one_minus_x_over_one_plus_x(x: Integers) -> Integers:
    """(1 - x) / (1 + x) in Q0.31 for x in [0, 1) in Q0.31: gemmlowp's one_minus_x_over_one_plus_x_for_x_in_0_1."""
    return _shift_left_saturating(_two_over_one_plus_x(x) - _ONE_Q2, 2)


def _two_over_one_plus_x(x: Integers) -> Integers:
    """2 / (1 + x) in Q2.29: three steps of Newton's division by (1 + x) / 2."""
    half_denominator = round_shift(x + INT32_MAX, 1, Rounding.HALF_AWAY)
    quotient = _48_OVER_17 + saturating_rounding_doubling_high_mul(half_denominator, _MINUS_32_OVER_17)
    for _ in range(3):
        error = _ONE_Q2 - saturating_rounding_doubling_high_mul(half_denominator, quotient)
        quotient = quotient + _shift_left_saturating(saturating_rounding_doubling_high_mul(quotient, error), 2)
    return quotient


def _exp_near_zero(a: Integers) -> Integers:
    """exp(a) in Q0.31 for a in [-1/4, 0) in Q0.31: a polynomial of degree 4 about -1/8."""
    mul = saturating_rounding_doubling_high_mul
    x = a + (1 << 28)
    x2 = mul(x, x)
    x3, x4 = mul(x2, x), mul(x2, x2)
    cubic = mul(rounding_divide_by_pot(x4, 2) + x3, _THIRD)
    return _EXP_MINUS_EIGHTH + mul(_EXP_MINUS_EIGHTH, x + rounding_divide_by_pot(cubic + x2, 1))


def _hard_swish_gate(fine: Integers, multiplier: int, shift: int) -> Integers:
    """clip(x + 3, 0, 6) / 6 in Q0.15. A left shift saturates in two steps, the last bit after the product."""
    gate = _shift_left_saturating(fine, max(shift - 1, 0), bits=16)
    gate = saturating_rounding_doubling_high_mul(gate, multiplier, bits=16)
    gate = _shift_left_saturating(gate, 1, bits=16) if shift > 0 else rounding_divide_by_pot(gate, -shift)
    return (gate + (1 << 15)) >> 1


def _inside(difference: Integers, parameters: SigmoidParameters) -> Integers:
    """The argument in Q4.27 where it lies inside the radius; zero elsewhere, where its shift would overflow."""
    inside = np.where(np.abs(difference) < parameters.radius, difference, 0)
    return multiply_by_quantized_multiplier(inside, parameters.multiplier, parameters.left_shift)


def _saturate_outside(difference: Integers, radius: int, value: Integers) -> Integers:
    value = np.where(difference >= radius, INT8_MAX, saturate(value, INT8_MIN, INT8_MAX))
    return np.where(difference <= -radius, INT8_MIN, value)


def _shift_left_saturating(value: Integers, left: int, bits: int = 32) -> Integers:
    return saturate(value << left, -(1 << (bits - 1)), (1 << (bits - 1)) - 1)


def _input_radius(integer_bits: int, left_shift: int) -> int:
    """The largest input difference whose rescaled value fits: `(2^bits - 1) * 2^(31 - bits)`, shifted back."""
    return (((1 << integer_bits) - 1) << (31 - integer_bits)) >> left_shift


def _multiplier(real: float) -> Multiplier:
    return Multiplier(*quantize_multiplier(real))


def _double(value: Scale) -> float:
    """A scale as the runtime holds it, a float32, widened to float64."""
    return float(np.float32(value))
