"""The formulas of qir.fixed_point and qir.integer_functions against TensorFlow Lite Micro, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from oracle.adversarial import activation_scales, boundary_accumulators, hard_swish_scales, near_tie, scale_pairs
from oracle.tflite_writer import ModelWriter, run_tflite_micro

from qir import integer_functions as functions
from qir.fixed_point import (
    FixedPointError,
    RequantizeForm,
    Rounding,
    quantize_multipliers,
    requantize,
    round_divide,
    round_half_away,
    saturate,
)
from qir.integer_functions import Multiplier

Array = npt.NDArray[Any]
Factor = Multiplier | tuple[Array, Array]
F32 = np.float32

INT8 = np.arange(-128, 128, dtype=np.int8)
#: Every pair of int8 values, as two arrays of 65536.
PAIRS = tuple(np.ascontiguousarray(grid.reshape(-1)) for grid in np.meshgrid(INT8, INT8))
ZERO_POINTS = [(-128, -128), (0, 3), (5, -9), (127, 0)]


def rescaled(
    acc: Array, factor: Factor, zero_point: int, form: RequantizeForm = RequantizeForm.DOUBLE_ROUND, bits: int = 8
) -> Array:
    """What the runtime stores for these accumulators."""
    limit = 1 << (bits - 1)
    return np.asarray(saturate(requantize(acc, factor[0], factor[1], form) + zero_point, -limit, limit - 1))


def unary(
    kind: str, x: Array, scale: float, zero: int, out_scale: float, out_zero: int, shape: Any = None, **options: Any
) -> Array:
    """One op of one int8 input on TensorFlow Lite Micro, as int64."""
    model = ModelWriter()
    source = model.tensor("x", x.shape, np.int8, scale, zero)
    result = model.tensor("y", x.shape if shape is None else shape, np.int8, out_scale, out_zero)
    model.operator(kind, [source], [result], **options)
    return run_tflite_micro(model.finish([source], [result]), x)[0].astype(np.int64)


def binary(
    kind: str, left: tuple[float, int], right: tuple[float, int], out: tuple[float, int], **options: Any
) -> Array:
    """One op on all pairs of int8 values; each operand is given as (scale, zero point)."""
    model = ModelWriter()
    sources = [
        model.tensor(name, x.shape, np.int8, *quantization)
        for name, x, quantization in zip("ab", PAIRS, (left, right), strict=True)
    ]
    result = model.tensor("y", PAIRS[0].shape, np.int8, *out)
    model.operator(kind, sources, [result], **options)
    return run_tflite_micro(model.finish(sources, [result]), *PAIRS)[0].astype(np.int64)


def constant_input(
    model: ModelWriter,
    kind: str,
    source: int,
    out_shape: Sequence[int],
    out: tuple[float, int],
    data: Array,
    **options: Any,
) -> int:
    """Adds an op whose second input is a constant int32 tensor; returns its output."""
    constant = model.tensor("constant", data.shape, np.int32, data=data)
    result = model.tensor("y", out_shape, np.int8, *out)
    model.operator(kind, [source, constant], [result], **options)
    return result


def run_biased(
    kind: str, weights: Array, bias: Array, scales: tuple[float, Array, float], dtype: Any = np.int8
) -> Array:
    """A convolution or fully connected op whose input is zero, so that the bias is the accumulator."""
    input_scale, weight_scale, out_scale = scales
    count = bias.size
    fully_connected, depthwise = kind == "FULLY_CONNECTED", kind == "DEPTHWISE_CONV_2D"
    shape = (1, 1) if fully_connected else (1, 1, 1, count if depthwise else 1)
    model = ModelWriter()
    source = model.tensor("x", shape, dtype, input_scale)
    weight = model.tensor("w", weights.shape, np.int8, weight_scale, 0, 3 if depthwise else 0, weights)
    biases = model.tensor("b", bias.shape, bias.dtype, weight_scale * F32(input_scale), 0, 0, bias)
    result = model.tensor("y", (1, count) if fully_connected else (1, 1, 1, count), dtype, out_scale)
    window = {"padding": "VALID", "stride_h": 1, "stride_w": 1, "dilation_h_factor": 1, "dilation_w_factor": 1}
    options: dict[str, Any] = {} if fully_connected else window | ({"depth_multiplier": 1} if depthwise else {})
    model.operator(kind, [source, weight, biases], [result], **options)
    return run_tflite_micro(model.finish([source], [result]), np.zeros(shape, dtype))[0].reshape(-1).astype(np.int64)


def zero_weights(kind: str, count: int) -> Array:
    shape = {"FULLY_CONNECTED": (count, 1), "CONV_2D": (count, 1, 1, 1), "DEPTHWISE_CONV_2D": (1, 1, 1, count)}[kind]
    return np.zeros(shape, np.int8)


LINEAR = [
    ("CONV_2D", True),
    ("DEPTHWISE_CONV_2D", True),
    ("FULLY_CONNECTED", True),
    ("FULLY_CONNECTED", False),
]


@pytest.mark.parametrize(("kind", "per_channel"), LINEAR)
def test_linear_ops_requantize_by_double_round(kind: str, per_channel: bool) -> None:
    rng = np.random.default_rng(1)
    wrong = dict.fromkeys((RequantizeForm.DOUBLE_ROUND, RequantizeForm.SINGLE_ROUND, RequantizeForm.NEON), 0)
    outputs = 0
    awkward = [tuple(rng.uniform(low, high) for low, high in [(0.001, 0.01), (0.001, 0.01), (5, 40)]) for _ in range(4)]
    for sx, sw, so in [(0.5, 0.25, 0.125 * n) for n in (0.5, 1, 2, 4, 6, 10, 14)] + awkward:
        real = float(F32(sx)) * float(F32(sw)) / float(F32(so))
        acc = boundary_accumulators(real)
        weight_scale = np.full(acc.size if per_channel else 1, sw, F32)
        got = run_biased(kind, zero_weights(kind, acc.size), acc.astype(np.int32), (sx, weight_scale, so))
        factor = functions.product_multiplier(sx, sw, so)
        for form in wrong:
            wrong[form] += int((rescaled(acc, factor, 0, form) != got).sum())
        outputs += got.size
    assert outputs > 10_000
    assert wrong.pop(RequantizeForm.DOUBLE_ROUND) == 0
    assert min(wrong.values()) > 100, "the accumulators do not tell the forms apart"


def test_the_left_shift_of_an_accumulator_wraps() -> None:
    rng = np.random.default_rng(2)
    acc = rng.integers(-(2**31), 2**31, 10_000).astype(np.int32)
    got = run_biased("CONV_2D", zero_weights("CONV_2D", acc.size), acc, (1.0, np.full(acc.size, 1.0, F32), 1 / 11))
    factor = functions.product_multiplier(1.0, 1.0, F32(1 / 11))
    assert factor.shift == 4
    assert np.array_equal(got, rescaled(acc.astype(np.int64), factor, 0))


@pytest.mark.parametrize(
    ("bias_dtype", "form"), [(np.int64, RequantizeForm.REDUCED_16), (np.int32, RequantizeForm.DOUBLE_ROUND)]
)
def test_convolution_of_16_bit_activations(bias_dtype: Any, form: RequantizeForm) -> None:
    rng = np.random.default_rng(3)
    for so in (0.125, 0.25, 0.75, 1.25, 1.75, 0.3):
        acc = np.concatenate([rng.integers(-400_000, 400_000, 1500), np.arange(-300, 300)])
        scales = (0.5, np.full(acc.size, 0.25, F32), so)
        got = run_biased("CONV_2D", zero_weights("CONV_2D", acc.size), acc.astype(bias_dtype), scales, np.int16)
        assert np.array_equal(got, rescaled(acc, functions.product_multiplier(0.5, 0.25, so), 0, form, bits=16))


def windows(x: Array, size: int, stride: int, padding: str, fill: int, dilation: int = 1) -> Array:
    """NHWC -> N, out_h, out_w, C, size, size; SAME pads the smaller half before."""
    extent = (size - 1) * dilation + 1
    if padding == "SAME":
        totals = [max((-(-length // stride) - 1) * stride + extent - length, 0) for length in x.shape[1:3]]
        pads = [(0, 0), *((total // 2, total - total // 2) for total in totals), (0, 0)]
        x = np.pad(x, pads, constant_values=fill)
    view = np.lib.stride_tricks.sliding_window_view(x, (extent, extent), (1, 2))
    return view[:, ::stride, ::stride, :, ::dilation, ::dilation]


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("depthwise", [False, True])
def test_convolutions_with_zero_points_and_fused_activation(
    padding: str, stride: int, dilation: int, depthwise: bool
) -> None:
    rng = np.random.default_rng(4)
    sx, so, zx, zo = 0.25, 3.5, 11, -100
    x = rng.integers(-128, 128, (2, 23, 21, 6), np.int8)
    channels = 12
    sw = 2.0 ** rng.integers(-4, 0, channels).astype(F32)
    w = rng.integers(-127, 128, (1, 3, 3, channels) if depthwise else (channels, 3, 3, 6), np.int8)
    bias = rng.integers(-500, 500, channels).astype(np.int32)
    patches = windows(x.astype(np.int64) - zx, 3, stride, padding, 0, dilation)
    if depthwise:
        acc = np.einsum("nhwcij,ijcm->nhwcm", patches, w[0].astype(np.int64).reshape(3, 3, 6, 2))
        acc = acc.reshape(*acc.shape[:3], channels) + bias
    else:
        acc = np.einsum("nhwcij,oijc->nhwo", patches, w.astype(np.int64)) + bias

    model = ModelWriter()
    source = model.tensor("x", x.shape, np.int8, sx, zx)
    weight = model.tensor("w", w.shape, np.int8, sw, 0, 3 if depthwise else 0, w)
    biases = model.tensor("b", bias.shape, np.int32, sw * F32(sx), 0, 0, bias)
    result = model.tensor("y", acc.shape, np.int8, so, zo)
    window = {"stride_h": stride, "stride_w": stride, "dilation_h_factor": dilation, "dilation_w_factor": dilation}
    multiplier = {"depth_multiplier": 2} if depthwise else {}
    kind = "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D"
    model.operator(
        kind, [source, weight, biases], [result], padding=padding, activation="RELU6", **window, **multiplier
    )
    got = run_tflite_micro(model.finish([source], [result]), x)[0]

    expected = rescaled(acc, quantize_multipliers(np.float64(sx) * sw / np.float64(so)), zo)
    bounds = functions.quantized_bound(0.0, so, zo), functions.quantized_bound(6.0, so, zo)
    assert np.array_equal(got, np.clip(expected, *bounds))
    assert set(bounds) <= set(got.reshape(-1).tolist())


def test_batch_matmul() -> None:
    rng = np.random.default_rng(5)
    outputs = 0
    for transposed in (False, True):
        for _ in range(12):
            depth, zl, zr, zo = 2000, -128, -127, 4
            left = np.maximum(rng.integers(-128, 128, (2, 30, depth)), rng.integers(-128, 127, (2, 30, 1)))
            right = rng.integers(90, 128, (2, depth, 15))
            acc = (left - zl) @ (right - zr)
            sl, sr = (float(scale) for scale in rng.uniform(0.001, 0.01, 2).astype(F32))
            so = near_tie(sl * sr, int(acc[0, 0, 0]), rng)
            model = ModelWriter()
            stored = np.ascontiguousarray(right.swapaxes(1, 2) if transposed else right).astype(np.int8)
            a, b = model.tensor("a", left.shape, np.int8, sl, zl), model.tensor("b", stored.shape, np.int8, sr, zr)
            y = model.tensor("y", acc.shape, np.int8, so, zo)
            model.operator("BATCH_MATMUL", [a, b], [y], adj_y=transposed)
            got = run_tflite_micro(model.finish([a, b], [y]), left.astype(np.int8), stored)[0]
            assert np.array_equal(got, rescaled(acc, functions.product_multiplier(sl, sr, so), zo))
            outputs += got.size
    assert outputs > 10_000


def elementwise(kind: str, left: tuple[float, int], right: tuple[float, int], out: tuple[float, int]) -> Array:
    (s1, z1), (s2, z2), (so, zo) = left, right, out
    a, b = (x.astype(np.int64) for x in PAIRS)
    product = functions.product_multiplier(s1, s2, so)
    if kind in ("ADD", "SUB"):
        first, second, output = functions.prepare_add(s1, s2, so)
        common1, common2 = (
            requantize((x - z) << functions.ADD_LEFT_SHIFT, *factor, RequantizeForm.DOUBLE_ROUND)
            for x, z, factor in ((a, z1, first), (b, z2, second))
        )
        total = common1 + common2 if kind == "ADD" else common1 - common2
        result = requantize(total, *output, RequantizeForm.DOUBLE_ROUND) + zo
    elif kind == "MUL":
        result = requantize((a - z1) * (b - z2), *product, RequantizeForm.DOUBLE_ROUND) + zo
    else:
        result = functions.prelu(a, z1, b, z2, functions.rescale_multiplier(s1, so), product, zo)
    return np.asarray(saturate(result, -128, 127))


@pytest.mark.parametrize("kind", ["ADD", "SUB", "MUL", "PRELU"])
def test_elementwise_ops_on_all_pairs(kind: str) -> None:
    rng = np.random.default_rng(6)
    cases: list[tuple[float, float, float]] = []
    cases += [(0.25, 0.5, 0.25 * n) for n in (0.5, 1, 2, 6, 10, 14)] + [(0.125, 0.125, 0.375), (0.5, 0.0625, 0.75)]
    for s1, s2 in rng.uniform(0.01, 0.1, (16, 2)).astype(F32).tolist():
        tied = s1 * s2 * int(rng.integers(100, 256)) if kind in ("MUL", "PRELU") else s1
        cases.append((s1, s2, float(near_tie(tied, int(rng.integers(100, 256)), rng))))
    for s1, s2, so in cases:
        for z1, z2, zo in [(0, 0, 0), (-128, 17, -5)]:
            operands = (s1, z1), (s2, z2), (so, zo)
            assert np.array_equal(binary(kind, *operands), elementwise(kind, *operands)), operands


@pytest.mark.parametrize(("kind", "function"), [("MAXIMUM", np.maximum), ("MINIMUM", np.minimum)])
def test_maximum_and_minimum_on_all_pairs(kind: str, function: Callable[..., Array]) -> None:
    assert np.array_equal(binary(kind, (0.1, 3), (0.1, 3), (0.1, 3)), function(*PAIRS))


def test_requantize_and_relu_between_scales() -> None:
    x = INT8.astype(np.int64)
    for scale, out_scale in scale_pairs(np.random.default_rng(7), 100):
        for zero, out_zero in ZERO_POINTS:
            expected = rescaled(x - zero, functions.rescale_multiplier(scale, out_scale), out_zero)
            assert np.array_equal(unary("QUANTIZE", INT8, scale, zero, out_scale, out_zero), expected)
            got = unary("RELU", INT8, scale, zero, out_scale, out_zero)
            assert np.array_equal(got, np.maximum(expected, out_zero))


def test_relu6_clamps_at_the_rounded_bound() -> None:
    for six in np.arange(0.5, 250, 0.5):
        scale = float(F32(6 / six))
        high = min(127, functions.quantized_bound(6.0, scale, -128))
        assert np.array_equal(
            unary("RELU6", INT8, scale, -128, scale, -128), np.clip(INT8.astype(np.int64), -128, high)
        )


@pytest.mark.parametrize("alpha", [0.25, 0.1, -0.3, -1.0, 1.7])
def test_leaky_relu(alpha: float) -> None:
    rng = np.random.default_rng(8)
    pairs = scale_pairs(rng, 30)
    pairs += [
        (s, float(near_tie(float(F32(s)) * abs(float(F32(alpha))), int(rng.integers(100, 256)), rng))) for s, _ in pairs
    ]
    for scale, out_scale in pairs:
        parameters = functions.prepare_leaky_relu(scale, alpha, out_scale)
        for zero, out_zero in ZERO_POINTS:
            expected = saturate(functions.leaky_relu(INT8.astype(np.int64), zero, *parameters, out_zero), -128, 127)
            assert np.array_equal(unary("LEAKY_RELU", INT8, scale, zero, out_scale, out_zero, alpha=alpha), expected)


def test_logistic_and_tanh() -> None:
    for scale in [*activation_scales(9, 60), 8.0, 12.5, 15.9]:
        parameters = functions.prepare_sigmoid(scale)
        for zero in (-128, 0, 5, 127):
            x = INT8.astype(np.int64)
            got = unary("LOGISTIC", INT8, scale, zero, 1 / 256, -128)
            assert np.array_equal(got, functions.logistic(x, zero, parameters)), scale
            assert np.array_equal(unary("TANH", INT8, scale, zero, 1 / 128, 0), functions.tanh(x, zero, parameters))


def test_hard_swish() -> None:
    for scale, out_scale in hard_swish_scales():
        parameters = functions.prepare_hard_swish(scale, out_scale)
        for zero, out_zero in ZERO_POINTS:
            got = unary("HARD_SWISH", INT8, scale, zero, out_scale, out_zero)
            expected = functions.hard_swish(INT8.astype(np.int64), zero, parameters, out_zero)
            assert np.array_equal(got, saturate(expected, -128, 127)), (scale, out_scale)


def test_scales_that_the_runtime_refuses_are_refused() -> None:
    with pytest.raises(RuntimeError):
        unary("HARD_SWISH", INT8, 12.8, 0, 0.1, 0)
    with pytest.raises(FixedPointError, match="hard_swish"):
        functions.prepare_hard_swish(12.8, 0.1)


@pytest.mark.parametrize("length", [1, 2, 10, 100, 511])
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_softmax(length: int, beta: float) -> None:
    rng = np.random.default_rng(12)
    rows = max(20, 1000 // length)
    for scale in [*activation_scales(13, 10), 30.0, 100.0]:
        spread = rng.choice([3.0, 30.0, 100.0], (rows, 1))
        x = np.clip(rng.normal(0, spread, (rows, length)), -128, 127).astype(np.int8)
        x[0] = 5
        got = unary("SOFTMAX", x, scale, 3, 1 / 256, -128, beta=beta)
        assert np.array_equal(got, functions.softmax(x.astype(np.int64), functions.prepare_softmax(scale, beta))), scale


def test_softmax_of_long_rows_with_one_peak() -> None:
    """The runtime aborts where the exponentials sum to 512 or more, so these fall off steeply."""
    x = np.random.default_rng(18).integers(-128, 0, (4, 4095), np.int8)
    x[:, 1000] = 127
    for scale in (0.05, 0.0625, 0.3):
        got = unary("SOFTMAX", x, scale, 3, 1 / 256, -128, beta=1.0)
        assert np.array_equal(got, functions.softmax(x.astype(np.int64), functions.prepare_softmax(scale))), scale


@pytest.mark.parametrize("kind", ["MEAN", "SUM"])
@pytest.mark.parametrize("axes", [(1, 2), (2, 1), (1,), (3,), (1, 2, 3)])
def test_reductions(kind: str, axes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(14)
    outputs = 0
    for step in range(24):
        height, width = (int(size) for size in rng.integers(1, 13, 2))
        x = np.clip(rng.normal(rng.normal(0, 30, (30, 1, 1, 24)), 20, (30, height, width, 24)), -128, 127).astype(
            np.int8
        )
        count = int(np.prod([x.shape[axis] for axis in axes]))
        zero, out_zero = (int(z) for z in rng.integers(-30, 30, 2))
        acc = (x.astype(np.int64) - zero).sum(axis=axes, keepdims=bool(step % 2))
        divisor = count if kind == "SUM" else 1
        if step % 3:  # exact ties, also of the first rounding of a mean's multiplier
            scale, out_scale = 0.125 * float(rng.choice([4, 5, 7, 12, 20])), 0.5 * divisor
        else:
            scale = float(F32(rng.uniform(0.01, 0.1)))
            out_scale = float(near_tie(scale, int(np.abs(acc).max()) + 1, rng)) / (count // divisor)
        model = ModelWriter()
        source = model.tensor("x", x.shape, np.int8, scale, zero)
        keep = bool(step % 2)
        data = np.array(axes, np.int32)
        result = constant_input(model, kind, source, acc.shape, (out_scale, out_zero), data, keep_dims=keep)
        got = run_tflite_micro(model.finish([source], [result]), x)[0]
        mean = functions.mean_multiplier(scale, out_scale, count)
        factor = mean if kind == "MEAN" else functions.rescale_multiplier(scale, out_scale)
        assert np.array_equal(got, rescaled(acc, factor, out_zero))
        outputs += got.size
    assert outputs >= (10_000 if axes != (1, 2, 3) else 720)


@pytest.mark.parametrize("activation", ["NONE", "RELU", "RELU6"])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_pools(activation: str, padding: str) -> None:
    rng = np.random.default_rng(15)
    scale, zero = 0.1, -10
    x = rng.integers(-128, 128, (2, 13, 11, 60), np.int8)
    low = functions.quantized_bound(0.0, scale, zero) if activation != "NONE" else -128
    high = functions.quantized_bound(6.0, scale, zero) if activation == "RELU6" else 127
    for size, stride in [(2, 2), (3, 2), (3, 1), (4, 3)]:
        wide = x.astype(np.int64)
        counts = windows(np.ones_like(wide), size, stride, padding, 0).sum(axis=(4, 5))
        sums = windows(wide, size, stride, padding, 0).sum(axis=(4, 5))
        peaks = windows(wide, size, stride, padding, -128).max(axis=(4, 5))
        expected = {"AVERAGE_POOL_2D": round_divide(sums, counts, Rounding.HALF_AWAY), "MAX_POOL_2D": peaks}
        window = {"stride_h": stride, "stride_w": stride, "filter_height": size, "filter_width": size}
        for kind, values in expected.items():
            got = unary(
                kind, x, scale, zero, scale, zero, values.shape, padding=padding, activation=activation, **window
            )
            assert np.array_equal(got, np.clip(values, low, high))


def test_ops_that_move_values() -> None:
    rng = np.random.default_rng(16)
    x = rng.integers(-128, 128, (2, 20, 30, 10), np.int8)
    pads = np.array([[0, 0], [1, 2], [0, 1], [0, 0]], np.int32)
    expected = {
        "PAD": (pads, np.pad(x, pads, constant_values=3)),  # with the zero point
        "RESHAPE": (np.array([2, 6000], np.int32), x.reshape(2, 6000)),
        "TRANSPOSE": (np.array([0, 3, 1, 2], np.int32), x.transpose(0, 3, 1, 2)),
    }
    for kind, (data, values) in expected.items():
        model = ModelWriter()
        source = model.tensor("x", x.shape, np.int8, 0.1, 3)
        result = constant_input(model, kind, source, values.shape, (0.1, 3), data)
        assert np.array_equal(run_tflite_micro(model.finish([source], [result]), x)[0], values), kind
    model = ModelWriter()
    parts = [model.tensor(name, x.shape, np.int8, 0.1, 3) for name in "ab"]
    result = model.tensor("y", (2, 20, 30, 20), np.int8, 0.1, 3)
    model.operator("CONCATENATION", parts, [result], axis=3)
    got = run_tflite_micro(model.finish(parts, [result]), x, x[::-1].copy())[0]
    assert np.array_equal(got, np.concatenate([x, x[::-1]], axis=3))


def test_quantize_and_dequantize_between_float_and_int8() -> None:
    rng = np.random.default_rng(17)
    scale, zero = F32(0.1), 7
    ties = (rng.integers(-140, 140, 5000) + F32(0.5)) * scale
    x = np.concatenate([ties, np.nextafter(ties, F32(1e9)), np.nextafter(ties, F32(-1e9))]).astype(F32)
    model = ModelWriter()
    source, result = model.tensor("x", x.shape, np.float32), model.tensor("y", x.shape, np.int8, scale, zero)
    model.operator("QUANTIZE", [source], [result])
    got = run_tflite_micro(model.finish([source], [result]), x)[0]
    assert np.array_equal(got, saturate(round_half_away(x / scale) + zero, -128, 127))
    model = ModelWriter()
    source, result = model.tensor("x", INT8.shape, np.int8, scale, zero), model.tensor("y", INT8.shape, np.float32)
    model.operator("DEQUANTIZE", [source], [result])
    restored = run_tflite_micro(model.finish([source], [result]), INT8)[0]
    assert np.array_equal(restored, (INT8.astype(F32) - zero) * scale)
