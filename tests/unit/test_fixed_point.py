"""qir.fixed_point against definitions in exact rationals, on Python ints, int64 arrays and object arrays alike."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qir.fixed_point import (
    INT32_MAX,
    INT32_MIN,
    FixedPointError,
    Overflow,
    RequantizeForm,
    Rounding,
    multiply_by_quantized_multiplier,
    narrow,
    quantize_multiplier,
    quantize_multipliers,
    reduced_multiplier,
    requantize,
    round_divide,
    round_half_away,
    round_shift,
    rounding_divide_by_pot,
    saturate,
    saturating_rounding_doubling_high_mul,
    wrap,
)

INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1
INTEGER_FORMS = [
    RequantizeForm.DOUBLE_ROUND,
    RequantizeForm.SINGLE_ROUND,
    RequantizeForm.NEON,
    RequantizeForm.REDUCED_16,
]

#: int64 values, many of which are small odd multiples of a power of two: ties of some shift.
values = st.one_of(
    st.integers(INT64_MIN, INT64_MAX),
    st.builds(lambda odd, shift: odd << shift, st.integers(-9, 9), st.integers(0, 58)),
    st.sampled_from([INT64_MIN, INT64_MIN + 1, INT64_MAX, -1, 0, 1]),
)
int32s = st.one_of(
    st.integers(INT32_MIN, INT32_MAX),
    st.integers(-200, 200),
    st.sampled_from([INT32_MIN, INT32_MIN + 1, INT32_MAX, -(1 << 30), 1 << 30]),
)
multipliers = st.one_of(st.just(0), st.integers(1 << 30, INT32_MAX), st.sampled_from([1 << 30, 3 << 29, INT32_MAX]))
roundings = st.sampled_from(list(Rounding))


def exact_round(value: Fraction, rounding: Rounding) -> int:
    """The rounding modes by their definition: the integer below or above, by mode and distance."""
    below, above = math.floor(value), math.ceil(value)
    if below == above:
        return below
    nearest = below if value - below < above - value else above
    tie = value - below == above - value
    toward_zero, away = (below, above) if value > 0 else (above, below)
    return {
        Rounding.FLOOR: below,
        Rounding.TOWARD_ZERO: toward_zero,
        Rounding.HALF_UP: above if tie else nearest,
        Rounding.HALF_DOWN: below if tie else nearest,
        Rounding.HALF_AWAY: away if tie else nearest,
        Rounding.HALF_TOWARD_ZERO: toward_zero if tie else nearest,
        Rounding.HALF_EVEN: (below if below % 2 == 0 else above) if tie else nearest,
    }[rounding]


def same_on_arrays(expected: int, function: Any, *operands: Any) -> None:
    """Asserts that a function gives `expected` on ints, int64 arrays and object arrays, in value and in kind."""
    assert function(*operands) == expected
    assert type(function(*operands)) is int
    as_int64 = function(*(np.array([operand], np.int64) for operand in operands))
    assert as_int64.dtype == np.int64
    assert as_int64.tolist() == [expected]
    as_object = function(*(np.array([operand], object) for operand in operands))
    assert as_object.dtype == object
    assert as_object.tolist() == [expected]
    assert type(as_object[0]) is int


@given(values, st.integers(0, 62), roundings)
@example(INT64_MIN, 62, Rounding.HALF_AWAY)
@example(INT64_MAX, 62, Rounding.HALF_UP)
@example(-(1 << 61), 62, Rounding.HALF_EVEN)
def test_round_shift_is_its_definition(value: int, shift: int, rounding: Rounding) -> None:
    expected = exact_round(Fraction(value, 1 << shift), rounding)
    same_on_arrays(expected, lambda v, s: round_shift(v, s, rounding), value, shift)
    assert round_shift(np.array([value, value]), shift, rounding).tolist() == [expected, expected]


@given(st.integers(-(1 << 40), 1 << 40), st.integers(-22, 0), roundings)
def test_a_negative_shift_is_an_exact_left_shift(value: int, shift: int, rounding: Rounding) -> None:
    same_on_arrays(value * 2**-shift, lambda v, s: round_shift(v, s, rounding), value, shift)


@given(values, st.integers(1, INT64_MAX), roundings)
@example(INT64_MIN, 1, Rounding.HALF_AWAY)
@example(INT64_MIN, INT64_MAX, Rounding.HALF_UP)
def test_round_divide_is_its_definition(numerator: int, denominator: int, rounding: Rounding) -> None:
    expected = exact_round(Fraction(numerator, denominator), rounding)
    same_on_arrays(expected, lambda n, d: round_divide(n, d, rounding), numerator, denominator)


@given(st.integers(), st.integers(0, 200), roundings)
def test_python_ints_are_unbounded(value: int, shift: int, rounding: Rounding) -> None:
    huge = value << 100
    assert round_shift(huge, shift, rounding) == exact_round(Fraction(huge, 1 << shift), rounding)
    assert round_shift(np.array([huge], object), shift, rounding)[0] == round_shift(huge, shift, rounding)


def test_shifts_broadcast_over_the_last_axis() -> None:
    result = round_shift(np.array([[5, 5, 5], [-5, -5, -5]]), np.array([0, 1, -2]), Rounding.HALF_UP)
    assert result.tolist() == [[5, 3, 20], [-5, -2, -20]]


def test_int64_arrays_never_lose_bits_silently() -> None:
    with pytest.raises(FixedPointError, match="loses bits"):
        round_shift(np.array([1 << 40]), -23, Rounding.FLOOR)
    with pytest.raises(FixedPointError, match="at most 62"):
        round_shift(np.array([1]), 63, Rounding.FLOOR)
    with pytest.raises(FixedPointError, match="Python ints"):
        requantize(np.array([1 << 32]), 1 << 30, 0, RequantizeForm.SINGLE_ROUND)
    with pytest.raises(FixedPointError, match="unsigned bits"):
        wrap(np.array([-1]), 64, signed=False)


@pytest.mark.parametrize("operand", [1.5, "1", np.array([1.0]), np.array([1], np.uint64)])
def test_operands_must_be_integers(operand: Any) -> None:
    with pytest.raises(FixedPointError, match="integer"):
        round_shift(operand, 1, Rounding.FLOOR)


def test_narrow_arrays_are_widened() -> None:
    assert round_shift(np.array([127], np.int8), -8, Rounding.FLOOR).tolist() == [127 << 8]
    assert type(round_shift(np.int8(127), -8, Rounding.FLOOR)) is int


def test_denominators_must_be_positive() -> None:
    for denominator in (0, -3):
        with pytest.raises(FixedPointError, match="positive"):
            round_divide(1, denominator, Rounding.FLOOR)


@given(values, st.integers(1, 63), st.booleans())
def test_wrap_keeps_the_low_bits(value: int, bits: int, signed: bool) -> None:
    lo = -(1 << (bits - 1)) if signed else 0
    expected = (value - lo) % (1 << bits) + lo
    same_on_arrays(expected, lambda v: wrap(v, bits, signed), value)
    same_on_arrays(expected, lambda v: narrow(v, lo, lo + (1 << bits) - 1, Overflow.WRAP), value)


@given(values, st.integers(-1000, 0), st.integers(0, 1000))
def test_the_other_overflow_modes(value: int, lo: int, hi: int) -> None:
    inside = lo <= value <= hi
    expected = {
        Overflow.NONE: value,
        Overflow.SATURATE: min(max(value, lo), hi),
        Overflow.SATURATE_ZERO: value if inside else 0,
        Overflow.SATURATE_SYMMETRIC: min(max(value, max(lo, -hi)), hi),
    }
    for overflow, result in expected.items():
        same_on_arrays(result, lambda v, mode=overflow: narrow(v, lo, hi, mode), value)


def test_symmetric_saturation_moves_the_minimum() -> None:
    assert narrow(np.array([-128, -127, 200]), -128, 127, Overflow.SATURATE_SYMMETRIC).tolist() == [-127, -127, 127]


def test_wrap_needs_the_range_of_a_width() -> None:
    for lo, hi in [(-127, 127), (-128, 126), (0, 127), (-127, 128), (-64, 191)]:
        if (lo, hi) == (0, 127):
            assert narrow(130, lo, hi, Overflow.WRAP) == 2
            continue
        with pytest.raises(FixedPointError, match="whole number of bits"):
            narrow(0, lo, hi, Overflow.WRAP)


def test_saturate_takes_bounds_beyond_int64() -> None:
    assert saturate(np.array([INT64_MIN, INT64_MAX]), -(1 << 80), 1 << 80).tolist() == [INT64_MIN, INT64_MAX]


@given(st.floats(-1e15, 1e15))
@example(0.49999999999999994)
@example(-2.5)
def test_round_half_away_of_floats(value: float) -> None:
    assert round_half_away(value) == exact_round(Fraction(value), Rounding.HALF_AWAY)


def test_floats_beyond_the_limit_are_clipped() -> None:
    assert round_half_away(np.array([1e30, -np.inf])).tolist() == [1 << 62, -(1 << 62)]


@given(st.floats(2.0**-31, 2.0**30))
def test_quantize_multiplier_has_31_bits(real: float) -> None:
    multiplier, shift = quantize_multiplier(real)
    assert 1 << 30 <= multiplier < 1 << 31
    mantissa, exponent = math.frexp(real)
    scaled = exact_round(Fraction(mantissa) * (1 << 31), Rounding.HALF_AWAY)
    assert Fraction(multiplier) * Fraction(2) ** shift == Fraction(scaled) * Fraction(2) ** exponent
    assert [array.tolist() for array in quantize_multipliers([[real]])] == [[[multiplier]], [[shift]]]


def test_quantize_multiplier_at_the_edges() -> None:
    assert quantize_multiplier(0.0) == (0, 0)
    assert quantize_multiplier(1.0) == (1 << 30, 1)
    assert quantize_multiplier(1.0 - 2.0**-53) == (1 << 30, 1)  # the mantissa rounds up to 2^31
    assert quantize_multiplier(2.0**-32) == (1 << 30, -31)
    assert quantize_multiplier(2.0**-32 * (1 - 2.0**-31)) == (0, 0)
    assert quantize_multiplier(np.float32(0.75)) == (3 << 29, 0)
    for real in (-0.5, math.inf, math.nan, 2.0**31):
        with pytest.raises(FixedPointError, match="multiplier"):
            quantize_multiplier(real)


@given(int32s, int32s)
@example(INT32_MIN, INT32_MIN)
def test_high_mul_rounds_ties_up_and_saturates_once(a: int, b: int) -> None:
    expected = min(exact_round(Fraction(a * b, 1 << 31), Rounding.HALF_UP), INT32_MAX)
    same_on_arrays(expected, saturating_rounding_doubling_high_mul, a, b)


@given(st.integers(-32768, 32767), st.integers(-32768, 32767))
@example(-32768, -32768)
def test_high_mul_of_16_bits(a: int, b: int) -> None:
    expected = min(exact_round(Fraction(a * b, 1 << 15), Rounding.HALF_UP), 32767)
    same_on_arrays(expected, lambda x, y: saturating_rounding_doubling_high_mul(x, y, bits=16), a, b)


def defined_requantize(acc: int, multiplier: int, shift: int, form: RequantizeForm) -> int:
    """The integer forms in rationals."""
    if form is RequantizeForm.SINGLE_ROUND:
        return exact_round(acc * multiplier * Fraction(2) ** (shift - 31), Rounding.HALF_UP)
    if form is RequantizeForm.REDUCED_16:
        reduced = 0x7FFF if multiplier >= 0x7FFF0000 else (multiplier + (1 << 15)) >> 16
        rounded = exact_round(acc * reduced * Fraction(2) ** (shift - 15), Rounding.HALF_UP)
        return (rounded + (1 << 31)) % (1 << 32) - (1 << 31)
    shifted = ((acc << max(shift, 0)) + (1 << 31)) % (1 << 32) - (1 << 31)
    high = exact_round(Fraction(shifted * multiplier, 1 << 31), Rounding.HALF_UP)
    second = Rounding.HALF_AWAY if form is RequantizeForm.DOUBLE_ROUND else Rounding.HALF_UP
    return exact_round(Fraction(high, 1 << max(-shift, 0)), second)


@given(int32s, multipliers, st.integers(-31, 7), st.sampled_from(INTEGER_FORMS))
@example(3, 1 << 30, -1, RequantizeForm.DOUBLE_ROUND)
@example(-3, 1 << 30, -1, RequantizeForm.NEON)
def test_requantize_is_its_definition(acc: int, multiplier: int, shift: int, form: RequantizeForm) -> None:
    expected = defined_requantize(acc, multiplier, shift, form)
    same_on_arrays(expected, lambda a, m, s: requantize(a, m, s, form), acc, multiplier, shift)


def test_requantize_forms_differ_on_ties() -> None:
    acc = np.arange(-8, 9)
    results = {tuple(requantize(acc, 3 << 29, -1, form).tolist()) for form in INTEGER_FORMS[:3]}
    assert len(results) == 3


def test_requantize_takes_one_multiplier_per_channel() -> None:
    acc = np.array([[100, 100], [-100, -100]])
    multiplier, shift = quantize_multipliers([0.5, 0.03])
    result = requantize(acc, multiplier, shift, RequantizeForm.DOUBLE_ROUND)
    assert result.tolist() == [[50, 3], [-50, -3]]


@given(int32s, st.integers(-31, 20), roundings)
def test_the_shift_form_names_its_rounding(acc: int, shift: int, rounding: Rounding) -> None:
    expected = exact_round(acc * Fraction(2) ** shift, rounding)
    assert requantize(acc, None, shift, RequantizeForm.SHIFT, rounding) == expected
    assert requantize(np.array([acc]), None, np.array([shift]), RequantizeForm.SHIFT, rounding).tolist() == [expected]


def test_the_shift_form_needs_a_rounding() -> None:
    with pytest.raises(FixedPointError, match="rounding"):
        requantize(1, None, -1, RequantizeForm.SHIFT)


@given(int32s, st.floats(2.0**-30, 4, width=32))
def test_the_float_forms(acc: int, real: float) -> None:
    single = np.float32(acc) * np.float32(real)
    expected = exact_round(Fraction(float(single)), Rounding.HALF_EVEN)
    assert requantize(acc, np.float32(real), 0, RequantizeForm.FLOAT32) == expected
    array = requantize(np.array([[acc]]), np.array([real], np.float32), 0, RequantizeForm.FLOAT32)
    assert array.dtype == np.int64
    assert array.tolist() == [[expected]]
    away = exact_round(Fraction(float(acc) * real), Rounding.HALF_AWAY)
    assert requantize(acc, real, 0, RequantizeForm.DOUBLE_AWAY) == away


def test_float32_conversion_of_an_accumulator_rounds_once() -> None:
    value = (1 << 60) + (1 << 36) + 1  # by way of float64 it would round to even, down
    assert requantize(value, np.float32(1), 0, RequantizeForm.FLOAT32) == (1 << 60) + (1 << 37)


@given(multipliers)
def test_reduced_multiplier_fits_16_bits(multiplier: int) -> None:
    expected = min((multiplier + (1 << 15)) >> 16, 0x7FFF)
    same_on_arrays(expected, reduced_multiplier, multiplier)


@given(int32s, st.integers(0, 31))
def test_rounding_divide_by_pot_takes_ties_away(value: int, exponent: int) -> None:
    expected = exact_round(Fraction(value, 1 << exponent), Rounding.HALF_AWAY)
    same_on_arrays(expected, rounding_divide_by_pot, value, exponent)


def test_a_left_shift_of_the_accumulator_wraps_at_32_bits() -> None:
    assert multiply_by_quantized_multiplier(1 << 30, 1 << 30, 2) == 0
    assert multiply_by_quantized_multiplier(np.array([3 << 29]), 1 << 30, 1).tolist() == [-(1 << 29)]
