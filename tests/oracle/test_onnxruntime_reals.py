"""The border of integer programs to reals, ops on reals, and ops that only move integers, against ONNX Runtime.

Each test compares at least 10,000 outputs, on ties and beside them, and every bit must agree.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from oracle.adversarial import near_tie, scale_pairs
from oracle.float32_graphs import (
    F32,
    Ints,
    Scales,
    around,
    both,
    constant,
    island,
    proved,
    random_integers,
    single,
    slides,
)
from oracle.graph_to_onnx import OPSET, OnnxRuntime
from oracle.onnx_oracle import Oracle

from qir.arrays import Array
from qir.fixed_point import Rounding
from qir.ir import Graph, Op, Value
from qir.ops.dequantize_blocks import DequantizeBlocks, Packing
from qir.ops.fixed_elementwise import FixedArgMax
from qir.ops.fixed_pool import FixedMaxPool
from qir.ops.fixed_rescale import Dequantize, Quantize, QuantizeRule
from qir.ops.float_elementwise import Add, Clip, Div, LeakyRelu, Mul, Relu, Sub
from qir.ops.movement import FixedConcat, FixedGather, FixedPad, FixedReshape, FixedSlice, FixedTranspose
from qir.rewrite import GraphBuilder
from qir.types import BATCH, S8, S16, S32, S64, U8, FloatType, IntegerType, Shape, TensorType, affine, integer

U16 = integer(16, signed=False)

# Between reals and integers


def near_boundaries(rng: np.random.Generator, scale: Scales, storage: IntegerType) -> Scales:
    """Reals on both sides of boundaries between two integers, of all magnitudes, and far outside."""
    reach = min(storage.hi - storage.lo, 3000) + 10
    ties = ((rng.integers(-reach, reach, 5000) + 0.5) * scale).astype(F32)
    ends = np.array([3e38, -3e38, 1e-45, -0.0, 2.0**31, -(2.0**31)], F32) * np.minimum(scale, 1)
    return np.concatenate([ties, *(np.nextafter(ties, F32(e)) for e in (-np.inf, np.inf)), ends.astype(F32)])


def quantizing(shape: Shape, element: Any, rule: QuantizeRule) -> Graph:
    inputs = [(shape, FloatType())]
    return single(Quantize, inputs, elements=[element], rule=rule, rounding=Rounding.HALF_EVEN)


@pytest.mark.parametrize("rule", [QuantizeRule.DIVIDE, QuantizeRule.RECIPROCAL])
@pytest.mark.parametrize("storage", [S8, U8, S16, U16, S8.narrowed(-127, 127), U8.narrowed(0, 127)], ids=str)
def test_quantize(storage: IntegerType, rule: QuantizeRule) -> None:
    oracle = Oracle()
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
    oracle.finish()


def test_quantize_and_dequantize_by_channel() -> None:
    oracle = Oracle()
    rng = np.random.default_rng(14)
    scales, zeros = rng.uniform(0.01, 0.1, 12), rng.integers(-128, 128, 12)
    for axis, shape in ((0, (12, 40, 30)), (1, (40, 12, 30)), (2, (40, 30, 12))):
        element = affine(S8, scales, zeros, axis)
        along = [-1 if i == axis else 1 for i in range(3)]
        x = ((rng.integers(-130, 130, shape) + 0.5) * scales.reshape(along)).astype(F32)
        integers = oracle.agree(quantizing(shape, element, QuantizeRule.DIVIDE), x)
        oracle.agree(single(Dequantize, [(shape, element)]), integers)
    oracle.finish()


@pytest.mark.parametrize("storage", [S8, U8, S16, U16, S32], ids=str)
def test_dequantize(storage: IntegerType) -> None:
    oracle = Oracle()
    rng = np.random.default_rng(15)
    for scale in (0.25, *rng.uniform(0.001, 0.2, 10)):
        for zero in (0,) if storage is S32 else (0, storage.lo, storage.hi, 11):
            graph = single(Dequantize, [((1000,), affine(storage, scale, zero))])
            oracle.agree(graph, random_integers(rng, storage, (1000,)))
    oracle.finish()


# Ops on reals between dequantize and quantize

GRID = tuple(np.ascontiguousarray(g) for g in np.meshgrid(np.arange(256), np.arange(256)))


@pytest.mark.parametrize("storage", [S8, U8], ids=str)
@pytest.mark.parametrize("op", [Add, Sub, Mul, Div])
def test_arithmetic_on_all_pairs(op: type[Op], storage: IntegerType) -> None:
    oracle = Oracle()
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
    oracle.finish()


@pytest.mark.parametrize("other", [(2, 30, 31, 9), (9,), (30, 1, 9), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("op", [Add, Sub, Mul])
def test_arithmetic_with_a_fused_activation(op: type[Op], other: Shape) -> None:
    oracle = Oracle()
    rng = np.random.default_rng(17)
    inputs = [((2, 30, 31, 9), affine(S8, 0.1, -3)), (other, affine(S8, 0.0731, 11))]
    for clip in ((0.0, np.inf), (0.0, 6.0), (-1.0, 1.0)):
        feeds = [random_integers(rng, S8, TensorType(shape).concrete(1)) for shape, _ in inputs]
        oracle.agree(island(inputs, op, affine(S8, 0.05, -20), clip=clip), *feeds)
    oracle.finish()


@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        (Relu, {}),
        (Clip, {"minimum": -1.0, "maximum": 6.0}),
        (LeakyRelu, {"alpha": 0.3}),
        (Clip, {"minimum": -np.inf, "maximum": 2.5}),
    ],
)
def test_activations(op: type[Op], attributes: dict[str, Any]) -> None:
    oracle = Oracle()
    rng = np.random.default_rng(18)
    feed = np.arange(-128, 128, dtype=np.int8)
    for scale, out_scale in scale_pairs(rng, 30):
        x, result = affine(S8, scale, -7), affine(S8, out_scale, 11)
        oracle.agree(island([((256,), x)], op, result, **attributes), feed)
    oracle.finish()


# Ops that copy integers


def test_ops_that_move_integers() -> None:
    oracle = Oracle()
    rng = np.random.default_rng(19)
    shape: Shape = (BATCH, 20, 18, 12)
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
        graph = single(op_class, [(shape, affine(S8, 0.1, 3))] * count, **attributes)
        oracle.agree(graph, *(random_integers(rng, S8, (3, 20, 18, 12)) for _ in range(count)))
    oracle.finish()


@pytest.mark.parametrize("last", [False, True])
def test_argmax(last: bool) -> None:
    oracle = Oracle()
    rng = np.random.default_rng(20)
    shape = (12_000, 10)
    for keepdims in (False, True):
        attributes = {"axis": 1, "keepdims": keepdims, "select_last_index": last}
        graph = single(FixedArgMax, [(shape, affine(S8, 0.1, 3))], elements=[S64], **attributes)
        oracle.agree(graph, around(rng, S8, 0, 3, shape))
    oracle.finish()


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


def blockwise(shape: tuple[int, ...], axis: int, block: int) -> tuple[int, ...]:
    """The shape of the scales."""
    return tuple(-(-d // block) if i == axis else d for i, d in enumerate(shape))


def spread(blocks: Ints, shape: tuple[int, ...], axis: int, block: int) -> Ints:
    """One number for each element, given one for each block."""
    return np.repeat(blocks, block, axis).take(range(shape[axis]), axis)


@pytest.mark.parametrize("signed", [True, False], ids=["s4", "u4"])
@pytest.mark.parametrize(("shape", "axis", "block"), BLOCKS, ids=str)
def test_4_bit_weights_with_a_scale_a_block(shape: tuple[int, ...], axis: int, block: int, signed: bool) -> None:
    """`float32(q - zero) * scale`, one rounding; scale and zero point are those of the block."""
    rng = np.random.default_rng(21)
    storage, blocks = integer(4, signed), blockwise(shape, axis, block)
    kind = onnx.TensorProto.INT4 if signed else onnx.TensorProto.UINT4
    weights, zeros = random_integers(rng, storage, shape), random_integers(rng, storage, blocks)
    scales = np.exp(rng.uniform(-9, 1, blocks)).astype(F32)
    tensors = {"scales": numpy_helper.from_array(scales, "scales")}
    for name, data in (("weights", weights), ("zeros", zeros)):
        tensor = helper.make_tensor(name, kind, data.shape, pack_int4(data).tobytes(), raw=True)
        assert np.array_equal(numpy_helper.to_array(tensor).astype(np.int8), data)
        assert np.array_equal(unpack_int4(np.frombuffer(tensor.raw_data, np.uint8), data.shape, signed), data)
        tensors[name] = tensor
    result = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)
    for operands, zero in ((["weights", "scales"], 0 * zeros), (["weights", "scales", "zeros"], zeros)):
        node = helper.make_node("DequantizeLinear", operands, ["y"], axis=axis, block_size=block)
        graph = helper.make_graph([node], "graph", [], [result], [tensors[name] for name in operands])
        opsets = [helper.make_opsetid("", OPSET)]
        theirs = OnnxRuntime(helper.make_model(graph, opset_imports=opsets, ir_version=10)).run({})["y"]
        ours = (weights.astype(F32) - spread(zero, shape, axis, block)) * spread(scales, shape, axis, block)
        assert theirs.size > 10_000
        assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("packing", Packing)
@pytest.mark.parametrize(("shape", "axis", "block"), BLOCKS, ids=str)
def test_dequantize_blocks(shape: tuple[int, ...], axis: int, block: int, packing: Packing) -> None:
    oracle = Oracle()
    rng = np.random.default_rng(23)
    packed = pack_int4(random_integers(rng, integer(4), shape))
    if packing is Packing.HIGH_FIRST:
        packed = packed << 4 | packed >> 4
    scales = np.exp(rng.uniform(-9, 1, blockwise(shape, axis, block))).astype(F32)

    def make(builder: GraphBuilder) -> Value:
        operands = [constant(builder, packed, U8), constant(builder, scales, FloatType())]
        return builder.emit(DequantizeBlocks, operands, shape=shape, axis=axis, block=block, packing=packing)

    oracle.agree(proved([], make))
    oracle.finish()
