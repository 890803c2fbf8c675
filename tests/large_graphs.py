"""A float graph of as many small ops as asked for: a deep chain with branches, and values that a thousand ops read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from qir.arrays import Array
from qir.ir import Graph, Op, Value
from qir.ops.float_elementwise import Add, Mul, Relu, Sigmoid
from qir.ops.float_nn import Conv
from qir.ops.float_pool import MaxPool, ReduceMean
from qir.ops.movement import Concat, Reshape, Slice, Transpose
from qir.rewrite import GraphBuilder
from qir.types import BATCH, TensorType

#: Channels, height and width of the input and of every block's result.
SHAPE = (4, 2, 2)
_TAIL = 3
_BLOCK = 10


def large_graph(nodes: int) -> Graph:
    """A graph of at least `nodes` ops, constants not counted, on an input `x` of N x 4 x 2 x 2.

    Each block of the chain squashes what the one before made and adds the input: an error of one block has died out a
    few blocks on, so that outputs can be compared however long the chain is. `last` is the chain's end and `mean`, one
    number for each channel of each block, that of all its blocks.
    """
    rng = np.random.default_rng(0)
    builder = GraphBuilder("large")
    source = builder.input("x", TensorType((BATCH, *SHAPE)))
    half = _constant(builder, np.float32(0.5), "half")
    ends = [source]
    for _ in range(-(-max(nodes - _TAIL, 1) // _BLOCK)):
        ends.append(_block(builder, rng, ends[-1], source, half))
    blocks = ends[1:]
    wide = builder.emit(Concat, blocks, axis=1)
    means = builder.emit(ReduceMean, [wide], axes=(2, 3), keepdims=False)
    return builder.finish([blocks[-1], builder.emit(Reshape, [means], shape=(len(blocks), SHAPE[0]))], ["last", "mean"])


def _block(builder: GraphBuilder, rng: np.random.Generator, value: Value, source: Value, half: Value) -> Value:
    """Ten ops, each of a kind that passes treat apart."""
    weight = _constant(builder, rng.uniform(-0.5, 0.5, (SHAPE[0], SHAPE[0], 1, 1)), "weight")
    bias = _constant(builder, rng.uniform(-0.5, 0.5, SHAPE[0]), "bias")

    def emit(op_class: type[Op], *operands: Value, **attributes: Any) -> Value:
        return builder.emit(op_class, operands, location=f"{op_class.mnemonic.lower()}{len(builder.ops)}", **attributes)

    conv = emit(Conv, value, weight, bias, groups=1, strides=(1, 1), pads=(0,) * 4, dilations=(1, 1))
    relu = emit(Relu, conv)
    turned = emit(Transpose, relu, perm=(0, 1, 3, 2))
    total = emit(Add, relu, turned)
    pooled = emit(MaxPool, total, kernel=(2, 2), strides=(1, 1), pads=(0, 0, 1, 1), dilations=(1, 1))
    joined = emit(Concat, relu, pooled, axis=1)
    middle = emit(Slice, joined, starts=(2,), ends=(6,), axes=(1,), steps=(1,))
    squashed = emit(Sigmoid, middle)
    return emit(Add, emit(Mul, squashed, half), source)


def _constant(builder: GraphBuilder, data: Any, name: str) -> Value:
    array = Array(np.asarray(data, np.float32), name)
    return builder.constant(array, TensorType(array.shape), name)


def samples(count: int) -> Iterator[dict[str, Any]]:
    """Feeds of one sample each."""
    rng = np.random.default_rng(1)
    yield from ({"x": rng.uniform(-1, 1, (1, *SHAPE)).astype(np.float32)} for _ in range(count))
