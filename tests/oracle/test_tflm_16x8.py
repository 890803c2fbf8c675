"""TensorFlow Lite Micro with 16-bit activations and 8-bit weights, to the bit.

Linear ops add in 64 bits and requantize by `reduced_16`, or add in 32 bits and requantize by `double_round` where their
bias has 32 bits. Every other op is `double_round` in 32 bits, as for 8-bit activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from oracle.adversarial import near_tie
from oracle.single_op import (
    ACTIVATIONS,
    Quantized,
    accumulate,
    activation_bounds,
    biased_op,
    linear_op,
    one_op,
    patches,
    rescaled,
)
from oracle.tflite_writer import ModelWriter, run_tflite_micro

from qir import integer_functions as functions
from qir.fixed_point import (
    RequantizeForm,
    Rounding,
    multiply_by_reduced_multiplier,
    quantize_multiplier,
    quantize_multipliers,
    requantize,
    round_divide,
    round_half_away,
    round_shift,
    saturate,
    wrap,
)
from qir.integer_functions import Multiplier
from qir.integer_functions_16 import logistic_16, tanh_16

Array = npt.NDArray[Any]
F32 = np.float32
I16_MIN, I16_MAX = -(1 << 15), (1 << 15) - 1
INT16 = np.arange(I16_MIN, I16_MAX + 1, dtype=np.int16)
#: Add and Sub bring 16-bit inputs to the common scale at this left shift; it is 20 for 8-bit ones.
ADD_LEFT_SHIFT = 15
LEAST_OUTPUTS = 10_000

LINEAR = ["CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"]
#: The kinds, and the dtypes of bias that they read; a depthwise op takes the bytes of any bias for int64.
BIASED = [(kind, np.int64) for kind in LINEAR] + [("CONV_2D", np.int32), ("FULLY_CONNECTED", np.int32)]
MULTIPLES = (0.5, 1, 2, 4, 6, 10, 14)


def q16(scale: float, zero_point: int = 0) -> Quantized:
    return Quantized(float(F32(scale)), zero_point, np.int16)


def form_of(bias: npt.DTypeLike | None) -> RequantizeForm:
    return RequantizeForm.DOUBLE_ROUND if bias == np.int32 else RequantizeForm.REDUCED_16


def run(model: bytes, *inputs: Array) -> Array:
    return run_tflite_micro(model, *inputs)[0].astype(np.int64)


def near_ties(real: float, rng: np.random.Generator, count: int = 150) -> Array:
    """Accumulators on both sides of boundaries between outputs all over 16 bits."""
    outputs = np.concatenate([rng.integers(I16_MIN, I16_MAX, count), np.arange(-20, 20), [I16_MIN, I16_MAX]])
    ties = np.round((outputs + 0.5) / real).astype(np.int64)
    return np.unique(np.clip(ties[:, None] + np.arange(-5, 6), -(2**31) + 1, 2**31 - 1))


def scales(rng: np.random.Generator, count: int = 4) -> list[tuple[float, float, float]]:
    """Scales of input, weights and output: full of ties, and awkward ones."""
    tied = [(0.5, 0.25, 0.125 * multiple) for multiple in MULTIPLES]
    drawn = rng.uniform(1, 2, (count, 3)).astype(F32) * np.array([0.001, 0.01, 0.0004], F32)
    return tied + [(sx, sw, so) for sx, sw, so in drawn.tolist()]


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(("kind", "bias"), BIASED)
def test_requantization_of_linear_ops(kind: str, bias: type, per_channel: bool) -> None:
    rng = np.random.default_rng(1)
    wrong = dict.fromkeys(RequantizeForm, 0)
    outputs = 0
    for sx, sw, so in scales(rng):
        factor = functions.product_multiplier(sx, sw, so)
        acc = near_ties(math.ldexp(factor.multiplier, factor.shift - 31), rng)
        weight_scale = np.full(acc.size if per_channel else 1, sw, F32)
        model, shape = biased_op(kind, q16(sx), weight_scale, acc.astype(bias), q16(so))
        got = run(model, np.zeros(shape, np.int16)).reshape(-1)
        for form in (RequantizeForm.DOUBLE_ROUND, RequantizeForm.SINGLE_ROUND, RequantizeForm.REDUCED_16):
            wrong[form] += int((rescaled(acc, factor, q16(so), form) != got).sum())
        outputs += got.size
    assert outputs >= LEAST_OUTPUTS
    assert wrong.pop(form_of(bias)) == 0
    assert sum(count > 200 for count in wrong.values()) == 2, "the accumulators do not tell the forms apart"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("kind", "bias"), [*BIASED, *((kind, None) for kind in LINEAR)])
def test_linear_ops(kind: str, bias: type | None, activation: str) -> None:
    """3x3 windows with stride and padding, full-range inputs, an output scale per channel, every fused activation."""
    rng = np.random.default_rng(2)
    channels, depth = 24, 8
    shape = (300, depth) if kind == "FULLY_CONNECTED" else (2, 31, 29, depth)
    weight_shape = {
        "CONV_2D": (channels, 3, 3, depth),
        "DEPTHWISE_CONV_2D": (1, 3, 3, channels),
        "FULLY_CONNECTED": (channels, depth),
    }[kind]
    w = rng.integers(-127, 128, weight_shape, np.int8)
    x = (rng.integers(I16_MIN, I16_MAX + 1, shape) >> rng.integers(0, 12, shape)).astype(np.int16)
    sw = 2.0 ** rng.integers(-4, 0, channels).astype(F32)
    b: Array | None = None if bias is None else rng.integers(-(1 << 20), 1 << 20, channels).astype(bias)
    stride, padding = (1, "VALID") if kind == "FULLY_CONNECTED" else (2, "SAME")
    options = {} if kind == "FULLY_CONNECTED" else {"padding": padding, "stride_h": stride, "stride_w": stride}
    acc = accumulate(kind, x, w, b, stride, padding)
    outputs = 0
    for sx, so in ((2.0**-14, 3.5 * 2.0**-10), (2.0**-9, 10 * 2.0**-9)):
        factors = quantize_multipliers(np.float64(sx) * sw / np.float64(so))
        model = linear_op(kind, (shape, q16(sx)), w, sw, b, (acc.shape, q16(so)), activation=activation, **options)
        got = run(model, x)
        assert np.array_equal(got, rescaled(acc, factors, q16(so), form_of(bias), activation))
        assert set(activation_bounds(activation, q16(so))) <= set(got.reshape(-1).tolist()) or activation == "NONE"
        outputs += got.size
    assert outputs >= LEAST_OUTPUTS


@pytest.mark.parametrize("bias", [np.int32, np.int64])
@pytest.mark.parametrize("kind", ["CONV_2D", "FULLY_CONNECTED"])
def test_accumulators_have_the_width_of_the_bias(kind: str, bias: type) -> None:
    rng = np.random.default_rng(3)
    depth, channels, rows = 600, 40, 300
    lead = (rows,) if kind == "FULLY_CONNECTED" else (1, 1, rows)
    w = rng.integers(100, 128, (channels, depth) if kind == "FULLY_CONNECTED" else (channels, 1, 1, depth), np.int8)
    x = rng.integers(30_000, 1 << 15, (*lead, depth), np.int16)
    b: Array = rng.integers(-(1 << 31), 1 << 31, channels).astype(bias)
    acc = accumulate(kind, x, w, b)
    assert 0.1 < (wrap(acc, 32) != acc).mean() < 0.9
    out = q16(2.0**17)
    got = run(linear_op(kind, (x.shape, q16(1.0)), w, 1.0, b, (acc.shape, out)), x)
    kept = wrap(acc, 32) if bias == np.int32 else acc
    assert np.array_equal(got, rescaled(kept, functions.product_multiplier(1.0, 1.0, out.scale), out, form_of(bias)))


@pytest.mark.parametrize("kind", LINEAR)
def test_a_scaled_64_bit_accumulator_wraps_at_32_bits_before_it_is_clamped(kind: str) -> None:
    rng = np.random.default_rng(4)
    acc, out = rng.integers(-(1 << 46), 1 << 46, LEAST_OUTPUTS), q16(2.0**12)
    model, shape = biased_op(kind, q16(1.0), np.ones(acc.size, F32), acc, out)
    got = run(model, np.zeros(shape, np.int16)).reshape(-1)
    factor = functions.product_multiplier(1.0, 1.0, out.scale)
    assert np.array_equal(got, saturate(requantize(acc, *factor, RequantizeForm.REDUCED_16), I16_MIN, I16_MAX))
    assert (got != saturate(multiply_by_reduced_multiplier(acc, *factor), I16_MIN, I16_MAX)).mean() > 0.1


@pytest.mark.parametrize("real", [2.0**-31, 3 * 2.0**-20, 0.75, 100.0, 127.99, 128.0, 5000.0, 16383.0])
@pytest.mark.parametrize("kind", LINEAR)
def test_linear_ops_of_any_factor(kind: str, real: float) -> None:
    """Their authors state shifts below 8, factors below 128; they are right up to a shift of 14."""
    rng = np.random.default_rng(5)
    acc = np.unique(np.round(rng.integers(-(1 << 16), 1 << 16, LEAST_OUTPUTS) / 2 / real).astype(np.int64))
    acc = acc[np.abs(acc) < 1 << 46]
    sx = float(F32(real))
    factor = functions.product_multiplier(sx, 1.0, 1.0)
    assert factor.shift <= 14
    model, shape = biased_op(kind, q16(sx), np.ones(acc.size, F32), acc, q16(1.0))
    got = run(model, np.zeros(shape, np.int16)).reshape(-1)
    assert np.array_equal(got, rescaled(acc, factor, q16(1.0), RequantizeForm.REDUCED_16))


@pytest.mark.parametrize("transposed", [False, True])
def test_batch_matmul_of_16_bits(transposed: bool) -> None:
    rng = np.random.default_rng(6)
    left = rng.integers(-300, 300, (2, 50, 61), np.int16)
    right = rng.integers(-300, 300, (2, 61, 40), np.int16)
    stored = np.ascontiguousarray(right.swapaxes(1, 2) if transposed else right)
    acc = left.astype(np.int64) @ right.astype(np.int64)
    outputs = 0
    for multiple in (2, 6, 10, 14):
        out = q16(0.125 * multiple)
        operands = [(left.shape, q16(0.5)), (stored.shape, q16(0.25))]
        got = run(one_op("BATCH_MATMUL", operands, (acc.shape, out), adj_y=transposed), left, stored)
        factor = functions.product_multiplier(0.5, 0.25, out.scale)
        assert np.array_equal(got, rescaled(acc, factor, out, RequantizeForm.REDUCED_16))
        outputs += got.size
    assert outputs >= LEAST_OUTPUTS


def add_or_subtract(kind: str, a: Array, b: Array, left: Quantized, right: Quantized, out: Quantized) -> Array:
    common = 2 * max(left.scale, right.scale)
    to_output = quantize_multiplier(common / (2.0**ADD_LEFT_SHIFT * out.scale))
    first, second = (
        requantize(
            (x.astype(np.int64) - q.zero_point) << ADD_LEFT_SHIFT,
            *quantize_multiplier(q.scale / common),
            RequantizeForm.DOUBLE_ROUND,
        )
        for x, q in ((a, left), (b, right))
    )
    total = first + second if kind == "ADD" else first - second
    return np.asarray(requantize(total, *to_output, RequantizeForm.DOUBLE_ROUND) + out.zero_point)


def multiplied(a: Array, b: Array, left: Quantized, right: Quantized, out: Quantized) -> Array:
    factor = functions.product_multiplier(left.scale, right.scale, out.scale)
    return np.asarray(requantize(a.astype(np.int64) * b, *factor, RequantizeForm.DOUBLE_ROUND))


def operands(rng: np.random.Generator, count: int = LEAST_OUTPUTS) -> tuple[Array, Array]:
    """Pairs of all sizes, with every pair of extremes."""
    ends = np.array(np.meshgrid([I16_MIN, -1, 0, 1, I16_MAX], [I16_MIN, -1, 0, 1, I16_MAX])).reshape(2, -1)
    drawn = rng.integers(I16_MIN, I16_MAX + 1, (2, count)) >> rng.integers(0, 14, (2, count))
    a, b = np.concatenate([ends, drawn], axis=1).astype(np.int16)
    return a, b


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["ADD", "SUB", "MUL"])
def test_arithmetic(kind: str, activation: str) -> None:
    rng = np.random.default_rng(7)
    a, b = operands(rng)
    ties = [(0.25, 0.5, 0.25 * multiple) for multiple in MULTIPLES] + [(0.125, 0.125, 0.375), (0.5, 0.0625, 0.75)]
    cases = ties + [tuple(rng.uniform(0.0001, 0.001, 3)) for _ in range(6)]
    zero_points = [(0, 0, 0)] if kind == "MUL" else [(0, 0, 0), (100, -3000, 77), (I16_MIN, I16_MAX, 5)]
    for s1, s2, so in cases:
        for z1, z2, zo in zero_points:
            left, right, out = q16(s1, z1), q16(s2, z2), q16(so * (16 * s2 if kind == "MUL" else 1), zo)
            got = run(one_op(kind, [(a.shape, left), (b.shape, right)], (a.shape, out), activation=activation), a, b)
            exact = (
                multiplied(a, b, left, right, out) if kind == "MUL" else add_or_subtract(kind, a, b, left, right, out)
            )
            assert np.array_equal(got, saturate(exact, *activation_bounds(activation, out))), (left, right, out)


def test_arithmetic_broadcasts() -> None:
    rng = np.random.default_rng(8)
    a, b = rng.integers(I16_MIN, I16_MAX, (2, 40, 30, 5), np.int16), rng.integers(I16_MIN, I16_MAX, (5,), np.int16)
    left, right, out = q16(0.25), q16(0.125), q16(0.75)
    for kind in ("ADD", "SUB", "MUL"):
        got = run(one_op(kind, [(a.shape, left), (b.shape, right)], (a.shape, out), activation="NONE"), a, b)
        exact = multiplied(a, b, left, right, out) if kind == "MUL" else add_or_subtract(kind, a, b, left, right, out)
        assert np.array_equal(got, saturate(exact, I16_MIN, I16_MAX))


@pytest.mark.parametrize("kind", ["MEAN", "SUM"])
@pytest.mark.parametrize("axes", [(1, 2), (2,), (3,)])
def test_reductions(kind: str, axes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(9)
    outputs = 0
    for step in range(16):
        shape = (30, *(int(size) for size in rng.integers(2, 9, 2)), 36)
        x = (rng.integers(I16_MIN, I16_MAX + 1, shape) >> rng.integers(0, 12, (30, 1, 1, 36))).astype(np.int16)
        count = int(np.prod([x.shape[axis] for axis in axes]))
        zero, out_zero = ((0, 0), (-77, 1000))[step % 2]
        acc = (x.astype(np.int64) - zero).sum(axis=axes)
        scale = 0.125 * float(rng.choice([1, 4, 5, 7, 12]))
        if step % 3 == 0:
            scale = float(F32(rng.uniform(0.01, 0.1)))
        source, out = q16(scale, zero), q16(0.5 * scale * (count if kind == "SUM" else 1) * (1 + step % 4), out_zero)
        factor = (
            functions.mean_multiplier(source.scale, out.scale, count)
            if kind == "MEAN"
            else functions.rescale_multiplier(source.scale, out.scale)
        )
        got = run(one_op(kind, [(shape, source)], (acc.shape, out), [np.array(axes, np.int32)], keep_dims=False), x)
        assert np.array_equal(got, rescaled(acc, factor, out, RequantizeForm.DOUBLE_ROUND))
        outputs += got.size
    assert outputs >= LEAST_OUTPUTS


@pytest.mark.parametrize("activation", ["NONE", "RELU", "RELU6"])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_pools(padding: str, activation: str) -> None:
    rng = np.random.default_rng(10)
    x = rng.integers(I16_MIN, I16_MAX + 1, (2, 13, 11, 60), np.int16)
    for size, stride in ((2, 2), (3, 2), (3, 1), (4, 3)):
        for zero in (0, -900):
            q = q16(0.0005, zero)
            wide = x.astype(np.int64)
            sums = patches(wide, size, stride, padding).sum(axis=(4, 5))
            counts = patches(np.ones_like(wide), size, stride, padding).sum(axis=(4, 5))
            expected = {
                "AVERAGE_POOL_2D": round_divide(sums, counts, Rounding.HALF_AWAY),
                "MAX_POOL_2D": patches(wide, size, stride, padding, I16_MIN).max(axis=(4, 5)),
            }
            window: dict[str, Any] = {"stride_h": stride, "stride_w": stride}
            window |= {"filter_height": size, "filter_width": size}
            for kind, values in expected.items():
                output = values.shape, q
                got = run(one_op(kind, [(x.shape, q)], output, padding=padding, activation=activation, **window), x)
                assert np.array_equal(got, np.clip(values, *activation_bounds(activation, q)))


def pairs(rng: np.random.Generator, count: int = 20) -> list[tuple[float, float]]:
    """Input and output scales: powers of two times small odd numbers, and such that an input lies near a tie."""
    ties = [(0.5, 0.5 * n / m) for n in (1, 2, 3, 5, 6, 7, 10, 14) for m in (1, 4)]
    drawn = [float(F32(scale)) for scale in rng.uniform(0.001, 0.01, count)]
    return ties + [(scale, float(near_tie(scale, int(rng.integers(100, 256)), rng))) for scale in drawn]


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (np.int16, np.int16),
        (np.int8, np.int16),
        (np.int16, np.int8),
        (np.int16, np.int32),
        (np.int32, np.int16),
    ],
)
def test_requantize_between_widths(source: type[np.signedinteger[Any]], target: type[np.signedinteger[Any]]) -> None:
    rng = np.random.default_rng(11)
    limits = np.iinfo(source)
    x = np.concatenate([np.arange(max(limits.min, I16_MIN), min(limits.max, I16_MAX) + 1), [limits.min, limits.max]])
    x = np.concatenate([x, rng.integers(limits.min, limits.max, 20_000, endpoint=True)]).astype(source)
    zero_points = {1: (0, 100), 2: (0, -3000), 4: (0, 0)}
    source_zeros, target_zeros = (zero_points[np.dtype(kind).itemsize] for kind in (source, target))
    for scale, out_scale in pairs(rng):
        for zero, out_zero in zip(source_zeros, target_zeros, strict=True):
            q, out = Quantized(scale, zero, source), Quantized(out_scale, out_zero, target)
            factor = functions.rescale_multiplier(scale, out_scale)
            expected = rescaled(x.astype(np.int64) - zero, factor, out, RequantizeForm.DOUBLE_ROUND)
            assert np.array_equal(run(one_op("QUANTIZE", [(x.shape, q)], (x.shape, out)), x), expected)


def test_relu_between_scales_and_relu6() -> None:
    x = INT16.astype(np.int64)
    for scale, out_scale in pairs(np.random.default_rng(12)):
        q, out = q16(scale), q16(out_scale)
        expected = rescaled(x, functions.rescale_multiplier(scale, out_scale), out, RequantizeForm.DOUBLE_ROUND)
        got = run(one_op("RELU", [(x.shape, q)], (x.shape, out)), INT16)
        assert np.array_equal(got, np.maximum(expected, 0))
    for six in (100.0, 2999.5, 8001.5, 20000.5, 30000.25, 60000.0):
        q = q16(6 / six)
        got = run(one_op("RELU6", [(x.shape, q)], (x.shape, q)), INT16)
        assert np.array_equal(got, np.clip(x, *activation_bounds("RELU6", q)))


@pytest.mark.parametrize("alpha", [0.25, 0.1, -0.3, 1.7])
def test_leaky_relu(alpha: float) -> None:
    for scale, out_scale in pairs(np.random.default_rng(13)):
        parameters = functions.prepare_leaky_relu(scale, alpha, out_scale)
        for zero, out_zero in ((0, 0), (500, -70)):
            q, out = q16(scale, zero), q16(out_scale, out_zero)
            got = run(one_op("LEAKY_RELU", [(INT16.shape, q)], (INT16.shape, out), alpha=alpha), INT16)
            expected = functions.leaky_relu(INT16.astype(np.int64), zero, *parameters, out_zero)
            assert np.array_equal(got, saturate(expected, I16_MIN, I16_MAX))


@pytest.mark.parametrize(("kind", "function"), [("LOGISTIC", logistic_16), ("TANH", tanh_16)])
def test_logistic_and_tanh(kind: str, function: Callable[[Array, float], Array]) -> None:
    awkward = [float(F32(scale)) for scale in np.exp(np.random.default_rng(14).uniform(-11, 0.5, 20))]
    for scale in [*(2.0**-k for k in range(7, 16)), *awkward]:
        got = run(one_op(kind, [(INT16.shape, q16(scale))], (INT16.shape, q16(2.0**-15))), INT16)
        assert np.array_equal(got, function(INT16.astype(np.int64), scale)), scale


def interpolation_table(function: Callable[[float], float], scale: np.float32, zero_point: int) -> Array:
    """513 entries of a function of 16-bit inputs, in float32, lowered by half of what a line has too much midway."""
    low, high = scale * F32(I16_MIN - zero_point), scale * F32(I16_MAX - zero_point)
    step = (high - low) / F32(512)
    unit = F32(65536) / (F32(2) / F32(65535) * F32(65535))

    def at(position: Any) -> np.float32:
        return F32(function(float(position))) * unit

    def rounded(value: Any) -> np.float32:
        return F32(round_half_away(float(value)))

    entries = []
    for index in range(512):
        start = low + F32(index) * step
        here, middle, following = at(start), at(start + step / F32(2)), at(low + F32(index + 1) * step)
        excess = rounded((following + rounded(here)) / F32(2)) - rounded(middle)
        entries.append(rounded(here) - rounded(excess / F32(2)))
    return np.clip(np.array([*entries, rounded(at(high))]).astype(np.int64), I16_MIN, I16_MAX)


def looked_up(table: Array, x: Array) -> Array:
    index = 256 + (x >> 7)
    slope = table[index + 1] - table[index]
    return np.asarray(table[index] + round_shift(slope * (x & 127), 7, Rounding.HALF_UP))


def softmax_16(x: Array, scale: float, beta: float) -> Array:
    """Over the last axis, at scale 2^-15; exp(-10) counts as zero."""
    exponentials = interpolation_table(math.exp, F32(10) / F32(65535), I16_MAX)
    reciprocals = interpolation_table(lambda value: 1 / (1 + value), F32(1) / F32(65535), I16_MIN)
    factor = Multiplier(*quantize_multiplier(scale * float(F32(beta)) / (10.0 / 65535.0)))
    difference = requantize(x - x.max(axis=-1, keepdims=True), *factor, RequantizeForm.DOUBLE_ROUND)
    exponential = looked_up(exponentials, saturate(difference + I16_MAX, I16_MIN, I16_MAX))
    total = exponential.sum(axis=-1, keepdims=True)
    headroom = 31 - np.frexp(total.astype(np.float64))[1].astype(np.int64)
    shifted = round_shift(total << headroom, 14, Rounding.HALF_UP) - 3 * (1 << 15)
    reciprocal = looked_up(reciprocals, saturate(shifted, I16_MIN, I16_MAX))
    return np.asarray(saturate(round_shift(exponential * reciprocal, 30 - headroom, Rounding.HALF_UP), 0, I16_MAX))


@pytest.mark.parametrize("length", [2, 10, 100, 1000])
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_softmax(length: int, beta: float) -> None:
    rng = np.random.default_rng(15)
    rows = max(30, 12_000 // length)
    for scale in (2.0**-8, 0.001, 2.0**-12, 0.0001, 2.0**-15):
        x = np.clip(rng.normal(0, rng.choice([100, 1000, 10_000], (rows, 1)), (rows, length)), I16_MIN, I16_MAX)
        x[0] = 5
        x = x.astype(np.int16)
        got = run(one_op("SOFTMAX", [(x.shape, q16(scale))], (x.shape, q16(2.0**-15)), beta=beta), x)
        assert np.array_equal(got, softmax_16(x.astype(np.int64), q16(scale).scale, beta)), scale


@pytest.mark.parametrize(("kind", "function"), [("MAXIMUM", np.maximum), ("MINIMUM", np.minimum)])
def test_maximum_and_minimum(kind: str, function: Callable[..., Array]) -> None:
    a, b = operands(np.random.default_rng(16))
    q = q16(0.1)
    assert np.array_equal(run(one_op(kind, [(a.shape, q), (b.shape, q)], (a.shape, q)), a, b), function(a, b))


def test_ops_that_move_values() -> None:
    rng = np.random.default_rng(17)
    x, q = rng.integers(I16_MIN, I16_MAX + 1, (2, 20, 30, 10), np.int16), q16(0.1)
    pads = np.array([[0, 0], [1, 2], [0, 1], [0, 0]], np.int32)
    masks = ("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask", "shrink_axis_mask")
    bounds = [np.array(part, np.int32) for part in ([0, 1, 0, 0], [2, 20, 30, 10], [1, 2, 1, 1])]
    cases: list[tuple[str, list[Array], Array, dict[str, int]]] = [
        ("PAD", [pads], np.pad(x, pads), {}),
        ("RESHAPE", [np.array([2, 6000], np.int32)], x.reshape(2, 6000), {}),
        ("TRANSPOSE", [np.array([0, 3, 1, 2], np.int32)], x.transpose(0, 3, 1, 2), {}),
        ("STRIDED_SLICE", bounds, x[:, 1:20:2], dict.fromkeys(masks, 0)),
    ]
    for kind, constants, values, options in cases:
        assert np.array_equal(run(one_op(kind, [(x.shape, q)], (values.shape, q), constants, **options), x), values), (
            kind
        )
    got = run(one_op("CONCATENATION", [(x.shape, q)] * 2, ((2, 20, 30, 20), q), axis=3), x, x[::-1].copy())
    assert np.array_equal(got, np.concatenate([x, x[::-1]], axis=3))


def test_a_pad_fills_with_zero_whatever_the_zero_point_is() -> None:
    x, q = np.full((1, 2, 2, 1), 9, np.int16), q16(0.1, 3)
    pads = np.array([[0, 0], [1, 1], [1, 1], [0, 0]], np.int32)
    assert np.array_equal(run(one_op("PAD", [(x.shape, q)], ((1, 4, 4, 1), q), [pads]), x), np.pad(x, pads))


def test_quantize_and_dequantize_between_float_and_int16() -> None:
    rng = np.random.default_rng(18)
    scale, zero = F32(0.1), 7
    ties = (rng.integers(-33_000, 33_000, 5000) + F32(0.5)) * scale
    x = np.concatenate([ties, np.nextafter(ties, F32(1e9)), np.nextafter(ties, F32(-1e9))]).astype(F32)
    model = ModelWriter()
    source, result = model.tensor("x", x.shape, np.float32), model.tensor("y", x.shape, np.int16, scale, zero)
    model.operator("QUANTIZE", [source], [result])
    got = run(model.finish([source], [result]), x)
    assert np.array_equal(got, saturate(round_half_away(x / scale) + zero, I16_MIN, I16_MAX))
    model = ModelWriter()
    source, result = model.tensor("x", INT16.shape, np.int16, scale, zero), model.tensor("y", INT16.shape, np.float32)
    model.operator("DEQUANTIZE", [source], [result])
    restored = run_tflite_micro(model.finish([source], [result]), INT16)[0]
    assert np.array_equal(restored, (INT16.astype(F32) - zero) * scale)


def test_convolutions_ignore_zero_points_and_fully_connected_ops_do_not() -> None:
    for kind, expected in (("CONV_2D", 10), ("DEPTHWISE_CONV_2D", 10), ("FULLY_CONNECTED", 10 - 4 + 300)):
        lead = (1,) if kind == "FULLY_CONNECTED" else (1, 1, 1)
        weights = np.ones((*lead, 1), np.int8)
        model = linear_op(kind, ((*lead, 1), q16(1.0, 4)), weights, 1.0, None, ((*lead, 1), q16(1.0, 300)))
        assert run(model, np.full((*lead, 1), 10, np.int16)).item() == expected


NONZERO = q16(0.1, 1)
REFUSED: dict[str, tuple[Quantized, Quantized, dict[str, Any]]] = {
    "MUL": (NONZERO, q16(0.1), {"activation": "NONE"}),
    "RELU": (NONZERO, NONZERO, {}),
    "LOGISTIC": (NONZERO, q16(2.0**-15), {}),
    "TANH": (q16(0.1), q16(2.0**-14), {}),
    "SOFTMAX": (NONZERO, q16(2.0**-15), {"beta": 1.0}),
    "CONCATENATION": (NONZERO, NONZERO, {"axis": 0}),
    "BATCH_MATMUL": (NONZERO, q16(0.1), {}),
    "MAX_POOL_2D": (q16(0.1), q16(0.2), {"filter_height": 1, "filter_width": 1, "stride_h": 1, "stride_w": 1}),
    "HARD_SWISH": (q16(0.1), q16(0.1), {}),
    "PRELU": (q16(0.1), q16(0.1), {}),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_runtime_refuses(kind: str) -> None:
    source, out, options = REFUSED[kind]
    count = 2 if kind in ("MUL", "CONCATENATION", "BATCH_MATMUL", "PRELU") else 1
    shape = (1, 4, 4, 4)
    out_shape = (2, 4, 4, 4) if kind == "CONCATENATION" else shape
    model = one_op(kind, [(shape, source)] * count, (out_shape, out), **options)
    with pytest.raises(RuntimeError):
        run(model, *[np.zeros(shape, np.int16)] * count)
