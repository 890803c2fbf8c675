"""Ops of integer programs of the form `float32`, run by kernels and interpreter, against ONNX Runtime, to the bit.

Scales are powers of two and outputs `sx * sw * {2, 6, 10, 14}`, or such that outputs lie within a float32 rounding
error of a tie, so that wrong rounding shows, which `sharp` asserts. Each test compares at least 10,000 outputs, and
every bit must agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from oracle.adversarial import boundary_accumulators, near_tie, scale_pairs
from oracle.float32_graphs import (
    CONVOLUTIONS,
    F32,
    WEIGHTS,
    Ints,
    Scales,
    accumulation,
    around,
    both,
    island,
    linear,
    matmul,
    mean,
    near_ties,
    odd_multiples,
    proved,
    random_integers,
    requantized,
    rounded_otherwise,
    small_weights,
    summing_to,
    window,
)
from oracle.graph_to_onnx import OPSET, NotOnnx, OnnxRuntime, graph_to_onnx

from qir.arrays import Array
from qir.fixed_point import RequantizeForm, Rounding
from qir.interpreter import interpret
from qir.ir import Graph, Op, Value
from qir.ops.fixed_elementwise import FixedArgMax
from qir.ops.fixed_linear import ReduceSum
from qir.ops.fixed_pool import FixedAveragePool, FixedMaxPool
from qir.ops.fixed_rescale import Dequantize, Quantize, QuantizeRule, Requantize
from qir.ops.float_elementwise import Add, Clip, Div, LeakyRelu, Mul, Relu, Sub
from qir.ops.float_pool import AveragePool
from qir.ops.movement import FixedConcat, FixedGather, FixedPad, FixedReshape, FixedSlice, FixedTranspose
from qir.rewrite import GraphBuilder
from qir.types import BATCH, S8, S16, S32, S64, U8, FloatType, IntegerType, Shape, TensorType, affine, integer

LEAST_OUTPUTS = 10_000
U16 = integer(16, signed=False)
SAMPLES = 3  # where the batch is N


class Oracle:
    """Runs graphs on ONNX Runtime and here, and counts the outputs that agreed."""

    def __init__(self) -> None:
        self.outputs = 0
        self.differ = np.zeros(3, np.int64)

    def agree(self, graph: Graph, *feeds: Ints, sharp: bool = False) -> Ints:
        """The output of ONNX Runtime, which must be that of kernels and interpreter; `sharp` also rounds otherwise."""
        named = {f"x{i}": x for i, x in enumerate(feeds)}
        theirs, ours = OnnxRuntime(graph_to_onnx(graph)).run(named)["y"], both(graph, named)
        assert theirs.dtype == ours.dtype
        assert theirs.shape == ours.shape
        assert int((theirs != ours).sum()) == 0
        if sharp:
            self.differ += [int((interpret(g, named)["y"] != theirs).sum()) for g in rounded_otherwise(graph)]
        self.outputs += theirs.size
        return theirs


@pytest.fixture
def oracle() -> Iterator[Oracle]:
    """An oracle that has compared enough outputs when the test is over."""
    made = Oracle()
    yield made
    assert made.outputs >= LEAST_OUTPUTS


def assert_sharp(oracle: Oracle) -> None:
    """Ties away from zero and neighbouring multipliers would each have given other outputs."""
    assert np.all(oracle.differ > 0), oracle.differ


# Convolutions; layout NHWC, weights [O, kh, kw, C / groups]


@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_conv(oracle: Oracle, kind: str, per_channel: bool) -> None:
    shape, weight_shape, options = CONVOLUTIONS[kind]
    for multiple, zero in ((2, -5), (6, 0), (10, 127), (14, -128)):
        rng = np.random.default_rng(multiple)
        weight, bias, largest = small_weights(rng, weight_shape, 0, per_channel)
        x, result = affine(S8, 0.5, zero // 3), affine(S8, 0.5 * largest * multiple, zero)
        if zero == 127:
            result = result.with_storage(S8.narrowed(-20, 60))  # what a fused activation leaves
        feed = around(rng, S8, zero // 3, 24, TensorType(shape).concrete(SAMPLES))
        for biases in (bias, None) if multiple == 6 else (bias,):
            oracle.agree(linear((shape, x), weight, biases, result, options), feed, sharp=multiple <= 6)
    assert_sharp(oracle)


@pytest.mark.parametrize("kind", ["1x1", "3x3", "grouped", "depthwise"])
def test_conv_of_the_extremes(oracle: Oracle, kind: str) -> None:
    rng = np.random.default_rng(1)
    shape, weight_shape, options = CONVOLUTIONS[kind]
    ends = np.array([-128, 127], np.int8)
    count = int(np.prod(weight_shape[1:]))
    for zero, out_zero in ((0, 0), (127, -3), (-128, 127)):
        for low in (0.0, 0.5, 1.0):  # how many of the integers are -128
            data = rng.choice(ends, (weight_shape), p=[low, 1 - low])
            x = rng.choice(ends, TensorType(shape).concrete(SAMPLES), p=[low, 1 - low])
            weight = data, affine(S8, 2.0**-6, 0)
            reach = 255 * 128 * (count if low in (0, 1) else 2 * count**0.5)
            result = affine(S8, 2.0 ** np.ceil(np.log2(reach / 100) - 8), out_zero)
            oracle.agree(linear((shape, affine(S8, 0.25, zero)), weight, None, result, options), x)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("depthwise", [False, True])
def test_conv_near_ties_of_every_channel(oracle: Oracle, depthwise: bool, biased: bool) -> None:
    rng = np.random.default_rng(2)
    channels, zero = 10_000, -11
    groups = channels if depthwise else 1
    shape = (1, 3, 3, channels if depthwise else 2)
    weights = random_integers(rng, WEIGHTS, (channels, 3, 3, 1 if depthwise else 2))
    x = random_integers(rng, S8, shape)
    bias = rng.integers(-20_000, 20_000, channels) if biased else None
    taps, kernels = x[0].astype(np.int64) - zero, weights.astype(np.int64)
    acc = np.einsum("ijo,oij->o", taps, kernels[..., 0]) if depthwise else np.einsum("ijc,oijc->o", taps, kernels)
    acc += 0 if bias is None else bias
    sx, so = F32(rng.uniform(0.01, 0.1)), F32(rng.uniform(0.5, 2))
    weight = weights, affine(WEIGHTS, near_ties(acc, sx, so, rng), 0, 0)
    graph = linear((shape, affine(S8, sx, zero)), weight, bias, affine(S8, so, 5), window(groups=groups))
    oracle.agree(graph, x, sharp=True)
    assert_sharp(oracle)


# Matrix products


@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
@pytest.mark.parametrize("biased", [False, True], ids=["QLinearMatMul", "QGemm"])
@pytest.mark.parametrize("shape", [(100, 37), (2, 50, 37), (2, 5, 10, 37), (BATCH, 34, 37)], ids=str)
def test_matmul(oracle: Oracle, shape: Shape, biased: bool, per_channel: bool) -> None:
    for multiple, zero in ((2, -5), (6, 0), (10, 127), (14, -128)):
        rng = np.random.default_rng(multiple)
        weight, bias, largest = small_weights(rng, (37, 101), 1, per_channel)
        x, result = affine(S8, 0.5, zero // 3), affine(S8, 0.5 * largest * multiple, zero)
        feed = around(rng, S8, zero // 3, 24, TensorType(shape).concrete(SAMPLES))
        oracle.agree(linear((shape, x), weight, bias if biased else None, result), feed, sharp=multiple <= 6)
    assert_sharp(oracle)


@pytest.mark.parametrize("biased", [False, True], ids=["QLinearMatMul", "QGemm"])
def test_matmul_of_the_extremes(oracle: Oracle, biased: bool) -> None:
    rng = np.random.default_rng(3)
    ends = np.array([-128, 127], np.int8)
    for zero, low in ((0, 0.0), (0, 0.5), (0, 1.0), (127, 1.0), (-128, 0.0)):
        weight = rng.choice(ends, (2048, 100), p=[low, 1 - low]), affine(S8, 2.0**-6)
        x = rng.choice(ends, (40, 2048), p=[low, 1 - low])
        bias = rng.integers(-(2**29), 2**29, 100) if biased else None
        result = affine(S8, 2.0 ** (13 if biased else 11 if low in (0, 1) else 5), -1)
        oracle.agree(linear(((40, 2048), affine(S8, 0.25, zero)), weight, bias, result), x)


@pytest.mark.parametrize("biased", [False, True], ids=["QLinearMatMul", "QGemm"])
def test_matmul_near_ties_of_every_column(oracle: Oracle, biased: bool) -> None:
    rng = np.random.default_rng(4)
    columns, zero = 10_000, 7
    weights, x = random_integers(rng, WEIGHTS, (24, columns)), random_integers(rng, S8, (1, 24))
    bias = rng.integers(-20_000, 20_000, columns) if biased else None
    acc = ((x.astype(np.int64) - zero) @ weights)[0] + (0 if bias is None else bias)
    sx, so = F32(rng.uniform(0.01, 0.1)), F32(rng.uniform(0.5, 2))
    weight = weights, affine(WEIGHTS, near_ties(acc, sx, so, rng), 0, 1)
    oracle.agree(linear(((1, 24), affine(S8, sx, zero)), weight, bias, affine(S8, so, -8)), x, sharp=True)
    assert_sharp(oracle)


@pytest.mark.parametrize("kind", ["QLinearConv", "QLinearMatMul", "QGemm"])
def test_near_ties_of_one_multiplier(oracle: Oracle, kind: str) -> None:
    """The input is 127 and 1, and the weights are what makes the accumulator of it."""
    rng = np.random.default_rng(5)
    for _ in range(40):
        unit = int(rng.integers(1, 60))
        acc = odd_multiples(unit)
        high, low = np.divmod(acc, 127)
        sx, sw = (F32(s) for s in rng.uniform(0.01, 0.1, 2))
        x, weight, result = affine(S8, sx), affine(WEIGHTS, sw), affine(S8, F32(float(sx) * float(sw) * 2 * unit), 3)
        weights, feed = np.stack([high, low]).astype(np.int8), np.array([[127, 1]], np.int8)
        if kind == "QLinearConv":
            kernels = np.ascontiguousarray(weights.T)[:, None, None]
            graph = linear(((1, 1, 1, 2), x), (kernels, weight), None, result, window())
            oracle.agree(graph, feed.reshape(1, 1, 1, 2), sharp=True)
        elif kind == "QLinearMatMul":
            oracle.agree(linear(((1, 2), x), (weights, weight), None, result), feed, sharp=True)
        else:
            graph = linear(((1, 2), x), (0 * weights, weight), acc, result)
            oracle.agree(graph, feed, sharp=True)
    assert_sharp(oracle)


@pytest.mark.parametrize("kind", ["QLinearConv", "QGemm"])
def test_biases_around_every_boundary_between_outputs(oracle: Oracle, kind: str) -> None:
    for sx, sw, so in ((0.5, 0.25, 0.25), (0.5, 0.25, 0.75), (2.0**-10, 2.0**-10, 2.0**3), (0.0137, 0.0029, 11.3)):
        acc = boundary_accumulators(float(F32(sx) * F32(sw) / F32(so)))
        x, weight, result = affine(S8, sx, 9), affine(WEIGHTS, sw), affine(S8, so, -40)
        shape = (1, 1, 1, 1) if kind == "QLinearConv" else (1, 1)
        data = np.zeros((acc.size, 1, 1, 1) if kind == "QLinearConv" else (1, acc.size), np.int8)
        options = window() if kind == "QLinearConv" else None
        graph = linear((shape, x), (data, weight), acc, result, options)
        oracle.agree(graph, np.full(shape, 9, np.int8), sharp=True)
    assert_sharp(oracle)


@pytest.mark.parametrize("shape", [(141, 7), (6, 41, 7), (2, 3, 41, 7)], ids=str)
def test_matmul_of_two_activations(oracle: Oracle, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(6)
    other = (*shape[:-2], 7, 73)
    for multiple in (2, 6, 10, 14):
        a, b = (shape, affine(S8, 0.5, -3)), (other, affine(S8, 0.25, 5))
        feeds = around(rng, S8, -3, 9, shape), around(rng, S8, 5, 9, other)
        oracle.agree(matmul(a, b, affine(S8, 0.125 * multiple, 9)), *feeds, sharp=True)
    assert_sharp(oracle)


def test_requantize_between_scales(oracle: Oracle) -> None:
    rng = np.random.default_rng(7)
    feed = np.arange(-128, 128, dtype=np.int8)
    for scale, out_scale in scale_pairs(rng, 40):
        for zero, out_zero in ((0, 0), (-128, 17), (5, -9)):
            x, result = affine(S8, scale, zero), affine(S8, out_scale, out_zero)

            def make(builder: GraphBuilder, value: Value, x: Any = x, result: Any = result) -> Value:
                return requantized(builder, value, np.asarray(x.scale.data / result.scale.data, F32), result)

            oracle.agree(proved([((256,), x)], make), feed, sharp=True)
    assert_sharp(oracle)


# 8-bit unsigned activations times 8-bit signed weights
#
# Without VNNI, x86 adds two products in a 16-bit lane that saturates (vpmaddubsw). It cannot where 2 * 255 * 64 = 32640
# or 2 * 127 * 127 = 32258 is the most: weights of 7 bits, or activations of 7 bits.

UNSIGNED: dict[str, tuple[IntegerType, IntegerType]] = {
    "7-bit weights": (U8, S8.narrowed(-64, 63)),
    "7-bit activations": (U8.narrowed(0, 127), WEIGHTS),
}


@pytest.mark.parametrize("kind", ["1x1", "3x3", "grouped", "depthwise", "matmul"])
@pytest.mark.parametrize("width", UNSIGNED)
def test_unsigned_activations(oracle: Oracle, width: str, kind: str) -> None:
    activations, weights = UNSIGNED[width]
    convolves = kind != "matmul"
    shape, weight_shape, options = CONVOLUTIONS[kind] if convolves else ((300, 96), (96, 50), None)
    rng = np.random.default_rng(8)
    outputs = weight_shape[0] if convolves else weight_shape[1]
    along = (-1, 1, 1, 1) if convolves else (1, -1)
    for zero, out_zero in ((0, 0), (activations.hi, 3), (64, 255)):
        for extremes in (False, True):
            x = around(rng, activations, zero, 255, TensorType(shape).concrete(SAMPLES))
            data = random_integers(rng, weights, weight_shape)
            if extremes:
                x = rng.choice(np.array([activations.lo, activations.hi], np.uint8), x.shape, p=[0.2, 0.8])
                signs = rng.integers(0, 2, outputs).reshape(along)
                data = np.where(rng.random(weight_shape) < 0.9, signs, 1 - signs)  # a channel is mostly of one sign
                data = np.where(data, weights.hi, weights.lo).astype(np.int8)
            scales = 2.0 ** rng.integers(-9, -7, outputs)
            weight = data, affine(weights, scales, 0, 0 if convolves else 1)
            reach = np.abs(x.astype(np.int64) - zero).max() * 64 * data.size / outputs
            result = affine(U8, 2.0 ** np.ceil(np.log2(reach / 700)) * 0.5 * scales.max(), out_zero)
            bias = rng.integers(-3000, 3000, outputs) if zero else None
            oracle.agree(linear((shape, affine(activations, 0.5, zero)), weight, bias, result, options), x, sharp=True)
    assert_sharp(oracle)


def test_full_unsigned_activations_times_full_weights_may_saturate(record_property: Any) -> None:
    """Recorded, not asserted: hosts with VNNI or ARM's dot products give 64770, others 32767."""
    x, weight = affine(U8, 1.0), (np.full((2, 1), 127, np.int8), affine(S8, 1.0))
    graph = linear(((1, 2), x), weight, None, affine(U8, 512.0))
    feeds = {"x0": np.full((1, 2), 255, np.uint8)}
    assert both(graph, feeds).tolist() == [[127]]  # 64770 / 512
    record_property("64770 / 512", OnnxRuntime(graph_to_onnx(graph)).run(feeds)["y"].tolist())


# Means and pools


REDUCTIONS: dict[str, tuple[Shape, tuple[int, ...]]] = {
    "maps": ((BATCH, 7, 7, 60), (1, 2)),
    "maps, as listed": ((BATCH, 5, 6, 60), (2, 1)),
    "columns": ((4, 6, 9, 40), (1,)),
    "channels": ((4, 9, 9, 33), (3,)),
    "samples": ((BATCH, 3, 3, 11), (1, 2, 3)),
    "rows of a matrix": ((BATCH, 50), (1,)),
    "first of a sequence": ((7, 40, 30), (0,)),
}


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("kind", REDUCTIONS)
def test_mean(oracle: Oracle, kind: str, keepdims: bool) -> None:
    rng = np.random.default_rng(9)
    shape, axes = REDUCTIONS[kind]
    cases = 0
    while oracle.outputs < LEAST_OUTPUTS or cases < 24:
        cases += 1
        concrete = TensorType(shape).concrete(400)
        kept = [d for axis, d in enumerate(concrete) if axis not in axes]
        reduced = [concrete[axis] for axis in axes]
        count = int(np.prod(reduced))
        zero, out_zero = (int(z) for z in rng.integers(-3, 3, 2))
        unit = int(rng.integers(1, max(2, int(0.4 * count))))
        if cases % 2:
            sx = F32(0.125 * rng.choice([1, 3, 5, 7]))
            so = F32(sx * 2 * unit / count) if cases % 4 == 1 else F32(sx * rng.choice([0.25, 0.5, 1, 2]))
        else:
            sx = F32(rng.uniform(0.01, 0.1))
            so = F32(float(sx) * 2 * unit / count)
        rows = summing_to(rng, rng.choice(odd_multiples(unit), kept), count, zero).reshape(*kept, *reduced)
        x = np.ascontiguousarray(np.moveaxis(rows, range(len(kept), len(shape)), axes))
        graph = mean((shape, affine(S8, sx, zero)), axes, keepdims, affine(S8, so, out_zero))
        oracle.agree(graph, x, sharp=True)
    assert_sharp(oracle)


POOLS: dict[str, tuple[tuple[int, int], tuple[int, int], tuple[int, int, int, int]]] = {
    "2x2": ((2, 2), (2, 2), (0, 0, 0, 0)),
    "3x3": ((3, 3), (2, 2), (1, 1, 1, 1)),
    "overlapping": ((3, 2), (1, 1), (1, 0, 2, 1)),
    "strides that differ": ((2, 3), (3, 1), (0, 1, 1, 2)),
    "4x4": ((4, 4), (1, 2), (0, 0, 0, 0)),
}
MAPS = (2, 23, 22, 60)
MAPS_FIRST = (2, 60, 23, 22)


def slides(kind: str) -> dict[str, Any]:
    kernel, strides, pads = POOLS[kind]
    return {"kernel": kernel, "strides": strides, "pads": pads, "dilations": (1, 1)}


@pytest.mark.parametrize("storage", [S8, U8], ids=str)
@pytest.mark.parametrize("kind", POOLS)
def test_max_pool(oracle: Oracle, kind: str, storage: IntegerType) -> None:
    x = random_integers(np.random.default_rng(10), storage, MAPS)
    attributes = slides(kind)
    for dilations in ((1, 1), (2, 1), (2, 3)):
        if dilations == (1, 1) or not any(attributes["pads"]):
            graph = pooled(MAPS, affine(storage, 0.1, 3), FixedMaxPool, **attributes | {"dilations": dilations})
            oracle.agree(graph, x)


def pooled(shape: Shape, element: Any, op_class: type[Op], **attributes: Any) -> Graph:
    return proved([(shape, element)], lambda builder, x: builder.emit(op_class, [x], **attributes))


@pytest.mark.parametrize("storage", [S8, U8], ids=str)
@pytest.mark.parametrize("kind", POOLS)
def test_average_pool_of_integers(oracle: Oracle, kind: str, storage: IntegerType) -> None:
    """The integers are averaged as they are stored, whatever their scale and zero point."""
    x = random_integers(np.random.default_rng(11), storage, MAPS)
    average = pooled(MAPS, affine(storage, 0.1, 3), FixedAveragePool, rounding=Rounding.HALF_EVEN, **slides(kind))
    away = pooled(MAPS, affine(storage, 0.1, 3), FixedAveragePool, rounding=Rounding.HALF_AWAY, **slides(kind))
    assert np.any(oracle.agree(average, x) != both(away, {"x0": x})), "the integers hold no ties"


@pytest.mark.parametrize("storage", [S8, U8], ids=str)
@pytest.mark.parametrize("kind", POOLS)
def test_average_pool_of_reals(oracle: Oracle, kind: str, storage: IntegerType) -> None:
    """DequantizeLinear, AveragePool, QuantizeLinear. The integers' average is another where the scale is awkward."""
    rng = np.random.default_rng(12)
    x = random_integers(rng, storage, MAPS_FIRST)
    for scale in (0.25, 0.75, *rng.uniform(0.01, 0.1, 6)):
        for zero in (0, 38):
            element = affine(storage, scale, zero)
            reals = island([(MAPS_FIRST, element)], AveragePool, element, count_include_pad=False, **slides(kind))
            average = pooled(MAPS, element, FixedAveragePool, rounding=Rounding.HALF_EVEN, **slides(kind))
            theirs = oracle.agree(reals, x)
            integers = both(average, {"x0": np.ascontiguousarray(x.transpose(0, 2, 3, 1))}).transpose(0, 3, 1, 2)
            assert np.any(theirs != integers) == (scale not in (0.25, 0.75))


# Between reals and integers


def near_boundaries(rng: np.random.Generator, scale: Scales, storage: IntegerType) -> Scales:
    """Reals on both sides of boundaries between two integers, of all magnitudes, and far outside."""
    reach = min(storage.hi - storage.lo, 3000) + 10
    ties = ((rng.integers(-reach, reach, 5000) + 0.5) * scale).astype(F32)
    ends = np.array([3e38, -3e38, 1e-45, -0.0, 2.0**31, -(2.0**31)], F32) * np.minimum(scale, 1)
    return np.concatenate([ties, *(np.nextafter(ties, F32(e)) for e in (-np.inf, np.inf)), ends.astype(F32)])


def quantizing(shape: Shape, element: Any, rule: QuantizeRule) -> Graph:
    rounding = Rounding.HALF_EVEN
    return proved(
        [(shape, FloatType())],
        lambda builder, x: builder.emit(Quantize, [x], elements=[element], rule=rule, rounding=rounding),
    )


@pytest.mark.parametrize("rule", QuantizeRule)
@pytest.mark.parametrize("storage", [S8, U8, S16, U16, S8.narrowed(-127, 127), U8.narrowed(0, 127)], ids=str)
def test_quantize(oracle: Oracle, storage: IntegerType, rule: QuantizeRule) -> None:
    rng = np.random.default_rng(13)
    other = QuantizeRule.RECIPROCAL if rule is QuantizeRule.DIVIDE else QuantizeRule.DIVIDE
    differ = 0
    for scale in (0.25, 0.1, *rng.uniform(0.001, 0.2, 10)):
        for zero in (0, storage.lo, storage.hi, 11):
            element = affine(storage, scale, zero)
            x = near_boundaries(rng, element.scale.data, storage)
            theirs = oracle.agree(quantizing(x.shape, element, rule), x)
            differ += int((both(quantizing(x.shape, element, other), {"x0": x}) != theirs).sum())
    assert differ > 0, "the reals do not tell the rules apart"


def test_quantize_and_dequantize_by_channel(oracle: Oracle) -> None:
    rng = np.random.default_rng(14)
    scales, zeros = rng.uniform(0.01, 0.1, 12), rng.integers(-128, 128, 12)
    for axis, shape in ((0, (12, 40, 30)), (1, (40, 12, 30)), (2, (40, 30, 12))):
        element = affine(S8, scales, zeros, axis)
        along = [-1 if i == axis else 1 for i in range(3)]
        x = ((rng.integers(-130, 130, shape) + 0.5) * scales.reshape(along)).astype(F32)
        integers = oracle.agree(quantizing(shape, element, QuantizeRule.DIVIDE), x)
        oracle.agree(proved([(shape, element)], lambda builder, x: builder.emit(Dequantize, [x])), integers)


@pytest.mark.parametrize("storage", [S8, U8, S16, U16, S32], ids=str)
def test_dequantize(oracle: Oracle, storage: IntegerType) -> None:
    rng = np.random.default_rng(15)
    for scale in (0.25, *rng.uniform(0.001, 0.2, 10)):
        for zero in (0,) if storage is S32 else (0, storage.lo, storage.hi, 11):
            graph = proved([((1000,), affine(storage, scale, zero))], lambda builder, x: builder.emit(Dequantize, [x]))
            oracle.agree(graph, random_integers(rng, storage, (1000,)))


# Ops on reals between dequantize and quantize

GRID = tuple(np.ascontiguousarray(g) for g in np.meshgrid(np.arange(256), np.arange(256)))


@pytest.mark.parametrize("storage", [S8, U8], ids=str)
@pytest.mark.parametrize("op", [Add, Sub, Mul, Div])
def test_arithmetic_on_all_pairs(oracle: Oracle, op: type[Op], storage: IntegerType) -> None:
    rng = np.random.default_rng(16)
    cases: list[tuple[float, float, float]] = [(0.5, 0.25, 0.75), (0.125, 0.125, 0.25), (0.5, 0.5, 3.5), (0.5, 0.25, 1)]
    for s1, s2 in rng.uniform(0.01, 0.1, (6, 2)).astype(F32).tolist():
        cases.append((s1, s2, float(near_tie(s1 * s2 * 100 if op is Mul else s1, int(rng.integers(100, 256)), rng))))
    a, b = (g.astype(np.int64) + storage.lo for g in GRID)
    for s1, s2, so in cases:
        for z1, z2, zo in ((0, 0, 0), (storage.lo + 3, storage.hi, 5)):
            right = np.where(b == z2, 7, b) if op is Div else b  # a divisor is not 0
            inputs = [((256, 256), affine(storage, s, z)) for s, z in ((s1, z1), (s2, z2))]
            graph = island(inputs, op, affine(storage, so, zo))
            oracle.agree(graph, a.astype(storage.dtype), right.astype(storage.dtype))


@pytest.mark.parametrize("other", [(2, 30, 31, 9), (9,), (30, 1, 9), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("op", [Add, Sub, Mul])
def test_arithmetic_with_a_fused_activation(oracle: Oracle, op: type[Op], other: Shape) -> None:
    rng = np.random.default_rng(17)
    inputs = [((2, 30, 31, 9), affine(S8, 0.1, -3)), (other, affine(S8, 0.0731, 11))]
    for clip in ((0.0, np.inf), (0.0, 6.0), (-1.0, 1.0)):
        feeds = [random_integers(rng, S8, TensorType(shape).concrete(1)) for shape, _ in inputs]
        oracle.agree(island(inputs, op, affine(S8, 0.05, -20), clip=clip), *feeds)


@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        (Relu, {}),
        (Clip, {"minimum": -1.0, "maximum": 6.0}),
        (LeakyRelu, {"alpha": 0.3}),
        (Clip, {"minimum": -np.inf, "maximum": 2.5}),
    ],
)
def test_activations(oracle: Oracle, op: type[Op], attributes: dict[str, Any]) -> None:
    rng = np.random.default_rng(18)
    feed = np.arange(-128, 128, dtype=np.int8)
    for scale, out_scale in scale_pairs(rng, 30):
        x, result = affine(S8, scale, -7), affine(S8, out_scale, 11)
        oracle.agree(island([((256,), x)], op, result, **attributes), feed)


# Ops that copy integers


def test_ops_that_move_integers(oracle: Oracle) -> None:
    rng = np.random.default_rng(19)
    shape, element = (BATCH, 20, 18, 12), affine(S8, 0.1, 3)
    cases: list[tuple[type[Op], int, dict[str, Any]]] = [
        (FixedConcat, 2, {"axis": 3}),
        (FixedGather, 1, {"axis": 2, "indices": Array(np.array([[3, 0], [17, 3]]))}),
        (FixedMaxPool, 1, slides("3x3")),
        (FixedPad, 1, {"pads": (0, 1, 0, 2, 0, 0, 3, 1), "value": 3}),
        (FixedReshape, 1, {"shape": (18, 240)}),
        (FixedSlice, 1, {"starts": (1, 17), "ends": (19, -1), "axes": (1, 2), "steps": (3, -2)}),
        *((FixedTranspose, 1, {"perm": perm}) for perm in ((0, 3, 1, 2), (0, 2, 3, 1), (0, 2, 1, 3))),
    ]
    for op_class, count, attributes in cases:
        graph = proved([(shape, element)] * count, moving(op_class, attributes))
        oracle.agree(graph, *(random_integers(rng, S8, (SAMPLES, *shape[1:])) for _ in range(count)))


def moving(op_class: type[Op], attributes: dict[str, Any]) -> Any:
    return lambda builder, *values: builder.emit(op_class, values, **attributes)


@pytest.mark.parametrize("last", [False, True])
def test_argmax(oracle: Oracle, last: bool) -> None:
    rng = np.random.default_rng(20)
    shape = (12_000, 10)
    for keepdims in (False, True):
        attributes = {"axis": 1, "keepdims": keepdims, "select_last_index": last}
        graph = proved(
            [(shape, affine(S8, 0.1, 3))],
            lambda builder, x, a=attributes: builder.emit(FixedArgMax, [x], elements=[S64], **a),  # type: ignore[misc]
        )
        oracle.agree(graph, around(rng, S8, 0, 3, shape))


# 4-bit weights in blocks


def pack_int4(values: Ints) -> Ints:
    """Two to a byte, the first in the low half; a last one alone leaves the high half 0."""
    halves = np.append(values.reshape(-1), np.zeros(values.size % 2, values.dtype)).astype(np.uint8) & 15
    return np.asarray(halves[0::2] | halves[1::2] << 4, np.uint8)


def unpack_int4(packed: Ints, shape: tuple[int, ...], signed: bool) -> Ints:
    """The inverse."""
    halves = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1)[: int(np.prod(shape))].reshape(shape)
    return ((halves.astype(np.int8) ^ 8) - 8).astype(np.int8) if signed else halves


BLOCKS = [((256, 60), 0, 32), ((60, 256), 1, 32), ((51, 3, 70), 0, 17), ((37, 300), 1, 128), ((3, 5, 1001), 2, 64)]


@pytest.mark.parametrize("signed", [True, False], ids=["s4", "u4"])
@pytest.mark.parametrize(("shape", "axis", "block"), BLOCKS, ids=str)
def test_4_bit_weights_with_a_scale_a_block(
    oracle: Oracle, shape: tuple[int, ...], axis: int, block: int, signed: bool
) -> None:
    """`float32(q - zero) * scale`, one rounding, scale and zero point being those of the block."""
    rng = np.random.default_rng(21)
    storage = integer(4, signed)
    kind = onnx.TensorProto.INT4 if signed else onnx.TensorProto.UINT4
    blocks = tuple(-(-d // block) if i == axis else d for i, d in enumerate(shape))
    weights, zeros = random_integers(rng, storage, shape), random_integers(rng, storage, blocks)
    scales = np.exp(rng.uniform(-9, 1, blocks)).astype(F32)
    tensors = {"scales": numpy_helper.from_array(scales, "scales")}
    for name, data in (("weights", weights), ("zeros", zeros)):
        tensor = helper.make_tensor(name, kind, data.shape, pack_int4(data).tobytes(), raw=True)
        assert np.array_equal(numpy_helper.to_array(tensor).astype(np.int8), data)
        assert np.array_equal(unpack_int4(np.frombuffer(tensor.raw_data, np.uint8), data.shape, signed), data)
        tensors[name] = tensor
    result = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)
    for operands in (["weights", "scales"], ["weights", "scales", "zeros"]):
        node = helper.make_node("DequantizeLinear", operands, ["y"], axis=axis, block_size=block)
        model = helper.make_model(
            helper.make_graph([node], "graph", [], [result], [tensors[name] for name in operands]),
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=10,
        )
        theirs = OnnxRuntime(model).run({})["y"]
        per_element = [
            np.repeat(a, block, axis).take(range(shape[axis]), axis) for a in (scales, zeros.astype(np.int8))
        ]
        ours = (weights.astype(F32) - (per_element[1] if len(operands) > 2 else 0)) * per_element[0]
        assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))
        oracle.outputs += theirs.size


# What has no counterpart


def test_what_has_no_counterpart_is_refused() -> None:
    graph = mean(((BATCH, 4), affine(S8, 0.1)), (1,), False, affine(S8, 0.1))
    away = rounded_otherwise(graph)[0]
    assert {op.form for op in away.ops if isinstance(op, Requantize)} == {RequantizeForm.DOUBLE_AWAY}
    with pytest.raises(NotOnnx, match="is not of the form float32"):
        graph_to_onnx(away)
    accumulator = proved(
        [((2, 4), affine(S8, 0.1))],
        lambda builder, x: builder.emit(ReduceSum, [x], axes=(1,), keepdims=False, **accumulation()),
    )
    with pytest.raises(NotOnnx, match="accumulator"):
        graph_to_onnx(accumulator)
    halved = pooled((1, 4, 4, 1), affine(S8, 0.1), FixedAveragePool, rounding=Rounding.HALF_AWAY, **slides("2x2"))
    with pytest.raises(NotOnnx, match="average_pool2d"):
        graph_to_onnx(halved)
