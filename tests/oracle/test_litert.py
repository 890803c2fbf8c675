"""LiteRT on this host, to the bit: its reference kernels, and XNNPACK, which is what it uses where nobody asks.

They give two answers of one model. In XNNPACK every scale is computed in float32; `Kernels.XNNPACK` makes sure that it
took the operator over. Written for x86-64: XNNPACK's kernels for ARM requantize some ops in other ways.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from oracle.adversarial import activation_scales, boundary_accumulators, near_tie, scale_pairs
from oracle.litert import Kernels, run_litert
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
from oracle.tflite_writer import ModelWriter

from qir import integer_functions as functions
from qir.fixed_point import (
    RequantizeForm,
    Rounding,
    quantize_multipliers,
    requantize,
    round_divide,
    round_shift,
    saturate,
)

Array = npt.NDArray[Any]
F32 = np.float32
INT8 = np.arange(-128, 128, dtype=np.int8)
#: Every pair of int8 values, as two arrays of 65536.
PAIRS = tuple(np.ascontiguousarray(grid.reshape(-1)) for grid in np.meshgrid(INT8, INT8))
ZERO_POINTS = [(-128, -128), (0, 3), (5, -9), (127, 0)]
LINEAR = ["CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"]
LEAST_OUTPUTS = 10_000


def q8(scale: float, zero_point: int = 0) -> Quantized:
    return Quantized(float(F32(scale)), zero_point)


def on_reference(model: bytes, *inputs: Array) -> Array:
    return run_litert(model, *inputs, kernels=Kernels.REFERENCE).astype(np.int64)


def on_xnnpack(model: bytes, *inputs: Array) -> Array:
    return run_litert(model, *inputs, kernels=Kernels.XNNPACK).astype(np.int64)


def linear_scales(rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Scales of input, weights and output: full of ties, and such that an accumulator lies near a tie."""
    drawn = [(float(sx), float(sw)) for sx, sw in rng.uniform(0.001, 0.01, (10, 2)).astype(F32)]
    near = [(sx, sw, float(near_tie(sx * sw, 1 << int(rng.integers(22, 31)), rng))) for sx, sw in drawn]
    return [(0.5, 0.25, 0.125 * multiple) for multiple in (0.5, 1, 2, 4, 6, 10, 14)] + near


# The reference kernels


def reference_factors(sx: float, sw: float, so: float) -> dict[str, float]:
    """Ways to derive a factor; the first is right."""
    product = F32(sx) * F32(sw)
    return {
        "float64": sx * sw / so,
        "float32 product": float(product) / so,
        "float32": float(product / F32(so)),
    }


@pytest.mark.parametrize("per_channel", [True, False])
def test_the_reference_of_fully_connected_is_double_away(per_channel: bool) -> None:
    rng = np.random.default_rng(1)
    wrong = dict.fromkeys(["double_round", *reference_factors(1, 1, 1)], 0)
    outputs = 0
    for sx, sw, so in linear_scales(rng):
        acc = boundary_accumulators(sx * sw / so)
        out = q8(so, 3)
        weight_scale = np.full(acc.size if per_channel else 1, sw, F32)
        model, shape = biased_op("FULLY_CONNECTED", q8(sx), weight_scale, acc.astype(np.int32), out)
        got = on_reference(model, np.zeros(shape, np.int8)).reshape(-1)
        for name, factor in reference_factors(sx, sw, so).items():
            wrong[name] += int((rescaled(acc, (factor, 0), out, RequantizeForm.DOUBLE_AWAY) != got).sum())
        in_integers = rescaled(acc, functions.product_multiplier(sx, sw, so), out, RequantizeForm.DOUBLE_ROUND)
        wrong["double_round"] += int((in_integers != got).sum())
        outputs += got.size
    assert outputs >= LEAST_OUTPUTS
    assert wrong.pop("float64") == 0
    assert min(wrong.values()) > 100, "the accumulators do not tell the factors apart"


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("kind", ["CONV_2D", "DEPTHWISE_CONV_2D"])
def test_the_reference_of_convolutions_is_double_round(kind: str, per_channel: bool) -> None:
    rng = np.random.default_rng(2)
    wrong = dict.fromkeys((RequantizeForm.DOUBLE_ROUND, RequantizeForm.SINGLE_ROUND, RequantizeForm.NEON), 0)
    outputs = 0
    for sx, sw, so in linear_scales(rng):
        acc = boundary_accumulators(sx * sw / so)
        out = q8(so, 3)
        weight_scale = np.full(acc.size if per_channel else 1, sw, F32)
        model, shape = biased_op(kind, q8(sx), weight_scale, acc.astype(np.int32), out)
        got = on_reference(model, np.zeros(shape, np.int8)).reshape(-1)
        for form in wrong:
            wrong[form] += int((rescaled(acc, functions.product_multiplier(sx, sw, so), out, form) != got).sum())
        outputs += got.size
    assert outputs >= LEAST_OUTPUTS
    assert wrong.pop(RequantizeForm.DOUBLE_ROUND) == 0
    assert min(wrong.values()) > 100, "the accumulators do not tell the forms apart"


# XNNPACK


def float32_factor(first: float, second: npt.ArrayLike, out: float) -> Any:
    """The product, then the quotient, each in float32."""
    return F32(first) * np.asarray(second, F32) / F32(out)


def bounds_of_xnnpack(activation: str, q: Quantized) -> tuple[int, int]:
    """The zero point is added before the bound is rounded, ties to even: TensorFlow Lite adds it after."""
    low, high = (
        int(np.clip(np.rint(F32(real) / F32(q.scale) + F32(q.zero_point)), -128, 127))
        for real in ACTIVATIONS[activation]
    )
    return low, high


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("kind", LINEAR)
def test_xnnpack_requantizes_linear_ops_by_float32(kind: str, per_channel: bool) -> None:
    rng = np.random.default_rng(3)
    wrong = dict.fromkeys(("float32", "float32 of the float64 factor", "reference"), 0)
    outputs = 0
    for sx, sw, so in linear_scales(rng):
        acc = boundary_accumulators(sx * sw / so)
        out = q8(so, 3)
        weight_scale = np.full(acc.size if per_channel else 1, sw, F32)
        model, shape = biased_op(kind, q8(sx), weight_scale, acc.astype(np.int32), out)
        x = np.zeros(shape, np.int8)
        got = on_xnnpack(model, x).reshape(-1)
        expected = {
            "float32": rescaled(acc, (float32_factor(sx, sw, so), 0), out, RequantizeForm.FLOAT32),
            "float32 of the float64 factor": rescaled(acc, (sx * sw / so, 0), out, RequantizeForm.FLOAT32),
            "reference": on_reference(model, x).reshape(-1),
        }
        for name, values in expected.items():
            wrong[name] += int((values != got).sum())
        outputs += got.size
    assert outputs >= LEAST_OUTPUTS
    assert wrong.pop("float32") == 0
    assert min(wrong.values()) > 100, "the accumulators do not tell the factors apart"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", LINEAR)
def test_linear_ops_of_xnnpack(kind: str, activation: str) -> None:
    """Zero points, windows with stride and padding, a scale for each channel, and fused activations."""
    rng = np.random.default_rng(4)
    channels, depth, zero = 24, 8, 11
    shape = (300, depth) if kind == "FULLY_CONNECTED" else (3, 31, 29, depth)
    weight_shape = {
        "CONV_2D": (channels, 3, 3, depth),
        "DEPTHWISE_CONV_2D": (1, 3, 3, channels),
        "FULLY_CONNECTED": (channels, depth),
    }[kind]
    w, x = rng.integers(-127, 128, weight_shape, np.int8), rng.integers(-128, 128, shape, np.int8)
    sw = 2.0 ** rng.integers(-4, 0, channels).astype(F32)
    bias = rng.integers(-900, 900, channels).astype(np.int32)
    stride, padding = (1, "VALID") if kind == "FULLY_CONNECTED" else (2, "SAME")
    options = {} if kind == "FULLY_CONNECTED" else {"padding": padding, "stride_h": stride, "stride_w": stride}
    acc = accumulate(kind, x.astype(np.int64) - zero, w, bias, stride, padding)
    outputs = differing = 0
    for so, out_zero in ((1.75, -100), (3.5, 5), (2.4, 0)):
        out = q8(so, out_zero)
        model = linear_op(
            kind, (shape, q8(0.25, zero)), w, sw, bias, (acc.shape, out), activation=activation, **options
        )
        got = on_xnnpack(model, x)
        rounded = requantize(acc, float32_factor(0.25, sw, out.scale), 0, RequantizeForm.FLOAT32) + out_zero
        assert np.array_equal(got, saturate(rounded, *bounds_of_xnnpack(activation, out)))
        differing += int((on_reference(model, x) != got).sum())
        outputs += got.size
    assert outputs >= LEAST_OUTPUTS
    assert differing > 0 or activation == "RELU_N1_TO_1"  # which leaves a step or two


def test_bounds_of_activations_in_xnnpack() -> None:
    a, differing = PAIRS[0], 0
    for six in np.arange(0.5, 100, 0.5):
        for zero in (-128, -127, 0, 3):
            q = q8(6 / six, zero)
            got = on_xnnpack(one_op("ADD", [(a.shape, q8(q.scale))] * 2, (a.shape, q), activation="RELU6"), *PAIRS)
            assert (got.min(), got.max()) == bounds_of_xnnpack("RELU6", q)
            differing += activation_bounds("RELU6", q) != bounds_of_xnnpack("RELU6", q)
    assert differing > 100


def added_by_xnnpack(kind: str, left: Quantized, right: Quantized, out: Quantized) -> Array:
    """The larger factor in 21 bits, the other on the same scale, one rounding: ties up."""
    first, second = F32(left.scale) / F32(out.scale), F32(right.scale) / F32(out.scale)
    shift = 21 - math.frexp(float(max(first, second)))[1]
    to_common = [round(math.ldexp(float(factor), shift)) for factor in (first, second)]
    a, b = (x.astype(np.int64) - q.zero_point for x, q in zip(PAIRS, (left, right), strict=True))
    total = a * to_common[0] + b * to_common[1] * (1 if kind == "ADD" else -1)
    return np.asarray(saturate(round_shift(total, shift, Rounding.HALF_UP) + out.zero_point, -128, 127))


def multiplied_by_xnnpack(left: Quantized, right: Quantized, out: Quantized) -> Array:
    a, b = (x.astype(np.int64) - q.zero_point for x, q in zip(PAIRS, (left, right), strict=True))
    return rescaled(a * b, (float32_factor(left.scale, right.scale, out.scale), 0), out, RequantizeForm.FLOAT32)


@pytest.mark.parametrize("kind", ["ADD", "SUB", "MUL"])
def test_arithmetic_of_xnnpack_on_all_pairs(kind: str) -> None:
    rng = np.random.default_rng(5)
    cases = [(0.25, 0.5, 0.25 * multiple) for multiple in (0.5, 1, 2, 6, 10, 14)]
    cases += [
        (0.125, 0.125, 0.375),
        (0.5, 0.0625, 0.75),
        (0.1, 0.0005, 0.05),
        (0.001, 0.1, 0.07),
        (0.5, 0.475, 0.00225),
    ]
    for s1, s2 in rng.uniform(0.01, 0.1, (14, 2)).astype(F32).tolist():
        cases.append(
            (s1, s2, float(near_tie(s1 * s2 * 100 if kind == "MUL" else s1, int(rng.integers(100, 256)), rng)))
        )
    differing = 0
    for s1, s2, so in cases:
        for z1, z2, zo in ((0, 0, 0), (-128, 17, -5), (127, -128, 100)):
            left, right, out = q8(s1, z1), q8(s2, z2), q8(so, zo)
            model = one_op(kind, [(PAIRS[0].shape, left), (PAIRS[0].shape, right)], (PAIRS[0].shape, out))
            got = on_xnnpack(model, *PAIRS)
            expected = multiplied_by_xnnpack(left, right, out)
            if kind != "MUL":
                expected = added_by_xnnpack(kind, left, right, out)
            assert np.array_equal(got, expected), (left, right, out)
            differing += int((on_reference(model, *PAIRS) != got).sum())
    assert differing > 1000


def rescaled_in_8_bits(difference: Array, factor: np.float32) -> Array:
    """A factor of 8 fractional bits, ties up."""
    return np.asarray(round_shift(difference * int(np.rint(F32(256) * factor)), 8, Rounding.HALF_UP))


ENDS = [(32.0, 0.25), (2.0**-7, 2.0), (0.05, 0.05 * 100)]


def test_quantize_of_xnnpack_between_scales() -> None:
    differing = 0
    x = INT8.astype(np.int64)
    for scale, out_scale in scale_pairs(np.random.default_rng(6), 40) + ENDS:
        for zero, out_zero in ZERO_POINTS:
            q, out = q8(scale, zero), q8(out_scale, out_zero)
            model = one_op("QUANTIZE", [(INT8.shape, q)], (INT8.shape, out))
            got = on_xnnpack(model, INT8)
            scaled = rescaled_in_8_bits(x - zero, F32(q.scale) / F32(out.scale))
            assert np.array_equal(got, saturate(scaled + out_zero, -128, 127)), (q, out)
            differing += int((on_reference(model, INT8) != got).sum())
    assert differing > 1000


@pytest.mark.parametrize("alpha", [0.25, 0.1, -0.3, 1.7, -1.0])
def test_leaky_relu_of_xnnpack(alpha: float) -> None:
    differing = 0
    x = INT8.astype(np.int64)
    for scale, out_scale in scale_pairs(np.random.default_rng(7), 20):
        for zero, out_zero in ZERO_POINTS:
            q, out = q8(scale, zero), q8(out_scale, out_zero)
            model = one_op("LEAKY_RELU", [(INT8.shape, q)], (INT8.shape, out), alpha=alpha)
            got = on_xnnpack(model, INT8)
            factor = F32(q.scale) / F32(out.scale)
            above, below = (rescaled_in_8_bits(x - zero, f) for f in (factor, factor * F32(alpha)))
            expected = saturate(np.where(x >= zero, above, below) + out_zero, -128, 127)
            assert np.array_equal(got, expected), (q, out)
            differing += int((on_reference(model, INT8) != got).sum())
    assert differing > 1000


def reduced_by_xnnpack(kind: str, x: Array, axes: tuple[int, ...], q: Quantized, out: Quantized) -> Array:
    """Rounded once, with both zero points added before, so that which way a tie goes depends on the output's."""
    count = F32(np.prod([x.shape[axis] for axis in axes]))
    scale = F32(q.scale) / F32(out.scale) * (F32(1) / count if kind == "MEAN" else F32(1))
    total = x.astype(np.int64).sum(axis=axes).astype(F32)
    shifted = total * scale + (F32(out.zero_point) - F32(q.zero_point) * count * scale)
    return np.asarray(saturate(np.rint(shifted).astype(np.int64), -128, 127))


@pytest.mark.parametrize("kind", ["MEAN", "SUM"])
@pytest.mark.parametrize("axes", [(1, 2), (3,), (1,), (2, 3)])
def test_reductions_of_xnnpack(kind: str, axes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(8)
    outputs = differing = 0
    for step in range(60):
        height, width = (int(size) for size in rng.integers(1, 13, 2))
        shape = (30, height, width, int(rng.integers(20, 40)))
        x = np.clip(rng.normal(rng.normal(0, 30, (30, 1, 1, shape[3])), 20, shape), -128, 127).astype(np.int8)
        divisor = int(np.prod([shape[axis] for axis in axes])) if kind == "SUM" else 1
        zero, out_zero = (int(z) for z in rng.integers(-60, 60, 2))
        scale, out_scale = 0.125 * float(rng.choice([4, 5, 7, 12, 20])), float(rng.choice([0.5, 0.75, 1.5])) * divisor
        if step % 3 == 0:
            scale, out_scale = float(rng.uniform(0.01, 0.1)), float(rng.uniform(0.01, 0.1)) * divisor
        q, out = q8(scale, zero), q8(out_scale, out_zero)
        expected = reduced_by_xnnpack(kind, x, axes, q, out)
        model = one_op(kind, [(shape, q)], (expected.shape, out), [np.array(axes, np.int32)], keep_dims=False)
        got = on_xnnpack(model, x)
        assert np.array_equal(got, expected), (q, out)
        differing += int((on_reference(model, x) != got).sum())
        outputs += got.size
    assert outputs >= LEAST_OUTPUTS
    assert differing > 100


@pytest.mark.parametrize(
    ("kind", "function", "out"),
    [("LOGISTIC", lambda x: 1 / (1 + np.exp(-np.maximum(x, -700))), q8(1 / 256, -128)), ("TANH", np.tanh, q8(1 / 128))],
)
def test_logistic_and_tanh_of_litert_are_tables_of_the_real_function(
    kind: str, function: Callable[[Array], Array], out: Quantized
) -> None:
    """Both kernels, but not TensorFlow Lite Micro, which computes in integers."""
    differing = 0
    for scale in activation_scales(9, 60):
        for zero in (-128, 0, 5, 127):
            model = one_op(kind, [(INT8.shape, q8(scale, zero))], (INT8.shape, out))
            real = function(((INT8.astype(F32) - F32(zero)) * F32(scale)).astype(np.float64))
            expected = np.clip(np.rint(real / out.scale) + out.zero_point, -128, 127)
            assert np.array_equal(on_xnnpack(model, INT8), expected), (scale, zero)
            assert np.array_equal(on_reference(model, INT8), expected), (scale, zero)
            in_integers = functions.logistic if kind == "LOGISTIC" else functions.tanh
            parameters = functions.prepare_sigmoid(scale)
            differing += int((in_integers(INT8.astype(np.int64), zero, parameters) != expected).sum())
    assert differing > 0


def test_batch_matmul_of_xnnpack() -> None:
    rng = np.random.default_rng(10)
    outputs = differing = 0
    for step in range(24):
        left, right = rng.integers(-20, 20, (2, 40, 17), np.int8), rng.integers(-20, 20, (2, 17, 25), np.int8)
        acc = left.astype(np.int64) @ right.astype(np.int64)
        sl, sr, so = (0.5, 0.25, 0.125 * float(rng.choice([2, 6, 10, 14])))
        if step % 2:
            sl, sr = rng.uniform(0.01, 0.1, 2).astype(F32).tolist()
            so = float(near_tie(sl * sr, int(np.abs(acc).max()), rng))
        out = q8(so, 4)
        model = one_op("BATCH_MATMUL", [(left.shape, q8(sl)), (right.shape, q8(sr))], (acc.shape, out))
        got = on_xnnpack(model, left, right)
        assert np.array_equal(got, rescaled(acc, (float32_factor(sl, sr, so), 0), out, RequantizeForm.FLOAT32))
        differing += int((on_reference(model, left, right) != got).sum())
        outputs += got.size
    assert outputs >= LEAST_OUTPUTS
    assert differing > 100


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_pools(padding: str) -> None:
    """XNNPACK has no average of int8: it is left to other kernels, so that only the reference can be asked here."""
    x, q = np.random.default_rng(11).integers(-128, 128, (2, 13, 11, 60), np.int8), q8(0.1, -10)
    wide = x.astype(np.int64)
    for size, stride in ((2, 2), (3, 2), (3, 1)):
        sums = patches(wide, size, stride, padding).sum(axis=(4, 5))
        counts = patches(np.ones_like(wide), size, stride, padding).sum(axis=(4, 5))
        window: dict[str, Any] = {"padding": padding, "stride_h": stride, "stride_w": stride}
        window |= {"filter_height": size, "filter_width": size}
        average = one_op("AVERAGE_POOL_2D", [(x.shape, q)], (sums.shape, q), **window)
        assert np.array_equal(on_reference(average, x), round_divide(sums, counts, Rounding.HALF_AWAY))
        with pytest.raises(RuntimeError, match="does not run on XNNPACK"):
            on_xnnpack(average, x)
        peaks = patches(wide, size, stride, padding, -128).max(axis=(4, 5))
        assert np.array_equal(on_xnnpack(one_op("MAX_POOL_2D", [(x.shape, q)], (sums.shape, q), **window), x), peaks)


@pytest.mark.parametrize(("scale", "zero"), [(0.1, 7), (0.037, -20), (0.25, 3)])
def test_quantize_and_dequantize_of_xnnpack(scale: float, zero: int) -> None:
    """It multiplies by the reciprocal of the scale, and ties go to even; the reference divides, and they go away."""
    rng = np.random.default_rng(12)
    ties = (rng.integers(-140, 140, 5000) + F32(0.5)) * F32(scale)
    x = np.concatenate([ties, np.nextafter(ties, F32(1e9)), np.nextafter(ties, F32(-1e9))]).astype(F32)
    model = ModelWriter()
    source, result = model.tensor("x", x.shape, np.float32), model.tensor("y", x.shape, np.int8, scale, zero)
    model.operator("QUANTIZE", [source], [result])
    quantize = model.finish([source], [result])
    got = on_xnnpack(quantize, x)
    assert np.array_equal(got, saturate(np.rint(x * (F32(1) / F32(scale))).astype(np.int64) + zero, -128, 127))
    assert (on_reference(quantize, x) != got).sum() > 1000
    model = ModelWriter()
    source, result = model.tensor("x", INT8.shape, np.int8, scale, zero), model.tensor("y", INT8.shape, np.float32)
    model.operator("DEQUANTIZE", [source], [result])
    restored = run_litert(model.finish([source], [result]), INT8, kernels=Kernels.XNNPACK)
    assert np.array_equal(restored, (INT8.astype(F32) - zero) * F32(scale))


BEYOND: dict[str, list[tuple[float, float]]] = {
    "ADD": [(2.0**-11, 0.5), (1.0, 256.0)],
    "SUB": [(2.0**-11, 0.5), (1.0, 256.0)],
    "MUL": [(2.0**-17, 1.0), (256.0, 1.0)],
    "QUANTIZE": [(2.0**-9, 1.0), (129.0, 1.0)],
    "LEAKY_RELU": [(2.0**-8, 1.0), (129.0, 1.0)],
}


@pytest.mark.parametrize("kind", BEYOND)
def test_factors_that_xnnpack_leaves_to_other_kernels(kind: str) -> None:
    """Ratios to the output scale, which is one, outside [2^-10, 2^8) for sums, [2^-16, 2^8), and [2^-8, 2^7]."""
    for scales in BEYOND[kind]:
        count = 2 if kind in ("ADD", "SUB", "MUL") else 1
        operands = [((64,), q8(scale)) for scale in scales[:count]]
        options: dict[str, Any] = {"alpha": 0.5} if kind == "LEAKY_RELU" else {}
        model = one_op(kind, operands, ((64,), q8(1.0)), **options)
        with pytest.raises(RuntimeError, match="does not run on XNNPACK"):
            on_xnnpack(model, *[np.zeros(64, np.int8)] * count)


@pytest.mark.parametrize("kind", LINEAR)
def test_factors_from_256_on_are_refused_by_xnnpack(kind: str) -> None:
    acc = np.arange(-3, 4, dtype=np.int32)
    for factor in (F32(255.99998), F32(256)):
        model, shape = biased_op(kind, q8(float(factor)), F32(1.0), acc, q8(1.0))
        x = np.zeros(shape, np.int8)
        if factor < 256:
            assert np.array_equal(on_xnnpack(model, x).reshape(-1), np.clip(acc * 256, -128, 127))
        else:
            with pytest.raises(RuntimeError, match="failed to create XNNPACK runtime"):
                on_xnnpack(model, x)


def test_the_reference_scales_a_convolution_by_channel() -> None:
    rng = np.random.default_rng(13)
    x, w = rng.integers(-128, 128, (4, 20, 20, 6), np.int8), rng.integers(-127, 128, (24, 3, 3, 6), np.int8)
    sw = 2.0 ** rng.integers(-4, 0, 24).astype(F32)
    bias = rng.integers(-500, 500, 24).astype(np.int32)
    acc = accumulate("CONV_2D", x.astype(np.int64) - 11, w, bias)
    out = q8(3.5, -100)
    got = on_reference(linear_op("CONV_2D", (x.shape, q8(0.25, 11)), w, sw, bias, (acc.shape, out)), x)
    factors = quantize_multipliers(np.float64(0.25) * sw / np.float64(out.scale))
    assert np.array_equal(got, rescaled(acc, factors, out, RequantizeForm.DOUBLE_ROUND))
