"""qir.integer_functions against real arithmetic, and its refusals; the oracle tests hold it to the runtime's bits."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from typing import Any

import numpy as np
import pytest

from qir import integer_functions as functions
from qir.fixed_point import FixedPointError, RequantizeForm, requantize, saturate

INT8 = np.arange(-128, 128)


def test_the_constants_of_exp_are_rounded_to_31_bits() -> None:
    with localcontext() as context:
        context.prec = 40
        exact = [(-(Decimal(2) ** power)).exp() * (1 << 31) for power in range(-2, 5)]
        assert list(functions._EXP_MINUS_POWERS) == [int(value.to_integral_value()) for value in exact]
        assert int((Decimal("-0.125").exp() * (1 << 31)).to_integral_value()) == functions._EXP_MINUS_EIGHTH


@pytest.mark.parametrize("integer_bits", [4, 5])
def test_exp_is_close_to_the_real_function(integer_bits: int) -> None:
    a = -np.arange(0, 1 << 31, 9_999_991)
    got = functions.exp_on_negative_values(a, integer_bits) / 2.0**31
    assert np.abs(got - np.exp(a / 2.0 ** (31 - integer_bits))).max() < 1e-6


def test_the_reciprocals_are_close_to_the_real_functions() -> None:
    x = np.arange(0, 1 << 31, 9_999_991)
    real = x / 2.0**31
    assert np.abs(functions.one_over_one_plus_x(x) / 2.0**31 - 1 / (1 + real)).max() < 1e-7
    assert np.abs(functions.one_minus_x_over_one_plus_x(x) / 2.0**31 - (1 - real) / (1 + real)).max() < 1e-7


@pytest.mark.parametrize("scale", [0.001, 0.03, 0.125, 1.0, 2.0])
def test_activations_are_within_one_unit_of_the_real_functions(scale: float) -> None:
    real = float(np.float32(scale)) * (INT8 - 5)
    sigmoid = functions.prepare_sigmoid(scale)
    expected = np.clip(np.round(256 / (1 + np.exp(-real))) - 128, -128, 127)
    assert np.abs(functions.logistic(INT8, 5, sigmoid) - expected).max() <= 1
    expected = np.clip(np.round(128 * np.tanh(real)), -128, 127)
    assert np.abs(functions.tanh(INT8, 5, sigmoid) - expected).max() <= 1
    exponentials = np.exp(real - real.max())
    expected = np.clip(np.round(256 * exponentials / exponentials.sum()) - 128, -128, 127)
    assert np.abs(functions.softmax(INT8, functions.prepare_softmax(scale)) - expected).max() <= 1


def test_hard_swish_and_leaky_relu_are_within_one_unit_of_the_real_functions() -> None:
    scale, out_scale = 0.0625, 0.05
    real = scale * (INT8 - 3)
    hard_swish = functions.hard_swish(INT8, 3, functions.prepare_hard_swish(scale, out_scale), -7)
    expected = real * np.clip(real + 3, 0, 6) / 6 / out_scale - 7
    assert np.abs(hard_swish - expected).max() <= 1
    leaky_relu = functions.leaky_relu(INT8, 3, *functions.prepare_leaky_relu(scale, -0.2, out_scale), -7)
    assert np.abs(leaky_relu - (np.where(real >= 0, real, -0.2 * real) / out_scale - 7)).max() <= 1


def test_prelu_is_within_one_unit_of_the_real_function() -> None:
    a, b = np.meshgrid(INT8, INT8)
    scales = 0.05, 0.03, 0.09
    above, below = functions.rescale_multiplier(0.05, 0.09), functions.product_multiplier(*scales)
    slope = functions.prelu(a, 4, b, -9, above, below, 1)
    real = np.where(a >= 4, 0.05 * (a - 4), 0.05 * (a - 4) * 0.03 * (b + 9))
    assert np.abs(slope - real / 0.09 - 1).max() <= 1


@pytest.mark.parametrize("count", [1, 3, 49, 64, 1000])
def test_the_mean_multiplier_divides(count: int) -> None:
    multiplier, shift = functions.mean_multiplier(0.1, 0.05, count)
    assert math.isclose(multiplier * 2.0 ** (shift - 31), 2.0 / count, rel_tol=1e-8)
    total = 100 * count
    assert requantize(total, multiplier, shift, RequantizeForm.DOUBLE_ROUND) == 200


def test_bounds_round_half_away_from_the_zero_point() -> None:
    assert functions.quantized_bound(6.0, 4.0, -128) == -126
    assert functions.quantized_bound(-1.0, 2.0, 10) == 9
    assert functions.quantized_bound(6.0, np.float32(0.0235), -128) == 127


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: functions.prepare_add(1.0, 0.5, 2.0**-19), "addition"),
        (lambda: functions.prepare_softmax(2.0**-26), "softmax"),
        (lambda: functions.prepare_sigmoid(2.0**-29), "logistic"),
        (lambda: functions.prepare_sigmoid(16.0), "logistic"),
        (lambda: functions.prepare_hard_swish(12.8, 0.1), "hard_swish"),
        (lambda: functions.prepare_hard_swish(0.001, 1.0), "hard_swish"),
        (lambda: functions.softmax(np.zeros((1, 4096), np.int64), functions.prepare_softmax(0.1)), "softmax"),
    ],
)
def test_what_is_undefined_is_refused(call: Any, message: str) -> None:
    with pytest.raises(FixedPointError, match=message):
        call()


def test_softmax_of_the_longest_row_sums_in_32_bits() -> None:
    row = np.zeros((1, functions.SOFTMAX_ROW_LIMIT - 1), np.int64)
    assert set(functions.softmax(row, functions.prepare_softmax(0.1)).reshape(-1).tolist()) == {-128}


def test_results_before_narrowing_may_leave_int8() -> None:
    wide = functions.leaky_relu(INT8, 0, *functions.prepare_leaky_relu(1.0, 0.5, 0.25), 0)
    assert wide.max() == 508
    assert saturate(wide, -128, 127).max() == 127
