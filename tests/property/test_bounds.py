"""Bounds that differ from channel to channel stay sound however elements are moved, joined, picked and summed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qir.arrays import Array
from qir.fixed_point import Overflow, RequantizeForm
from qir.interpreter import trace
from qir.ir import Graph, Op, Stage, Value
from qir.ops.accumulate import Order
from qir.ops.fixed_elementwise import FixedAdd, FixedArgMax, FixedMul, FixedSub, Table
from qir.ops.fixed_linear import FixedMatMul, ReduceSum
from qir.ops.fixed_pool import FixedMaxPool
from qir.ops.fixed_rescale import Requantize
from qir.ops.movement import FixedConcat, FixedGather, FixedPad, FixedReshape, FixedSlice, FixedTranspose
from qir.proof import prove
from qir.rewrite import GraphBuilder
from qir.types import BATCH, S8, S64, TensorType, integer
from qir.verifier import find_faults

WIDE = integer(48)


class Chain:
    """A graph that grows by one op at a time on `value`, of 48-bit integers of shape [N, ...]."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.builder = GraphBuilder("chain", Stage.FIXED)
        sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
        self.value = self.builder.input("x", TensorType((BATCH, *sizes), S8))
        self.arithmetic(FixedMul)

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.value.type.concrete(0)[1:]

    def pick(self, least: int, most: int) -> int:
        return self.draw(st.integers(least, most))

    def numbers(self, *shape: int, least: int = -9, most: int = 9) -> Value:
        few = self.draw(st.lists(st.integers(least, most), min_size=1, max_size=6))
        data = np.resize(np.array(few, np.int8), shape)
        return self.builder.constant(Array(data), TensorType(shape, S8), "k")

    def emit(self, op_class: type[Op], *operands: Value, elements: Any = (WIDE,), **attributes: Any) -> None:
        self.value = self.builder.emit(op_class, operands, elements=elements, **attributes)

    def arithmetic(self, op_class: type[Op]) -> None:
        shape = [size if self.draw(st.booleans()) else 1 for size in self.sizes]
        operands = [self.value, self.numbers(*shape[self.pick(0, len(shape) - 1) :])]
        if self.draw(st.booleans()):
            operands.reverse()
        self.emit(op_class, *operands, overflow=Overflow.SATURATE)

    def reshape(self) -> None:
        count = math.prod(self.sizes)
        shape: list[int] = []
        while count > 1 and len(shape) < 3:
            divisors = [d for d in range(1, count + 1) if count % d == 0]
            shape.append(self.draw(st.sampled_from(divisors)))
            count //= shape[-1]
        self.emit(FixedReshape, self.value, shape=(*shape, count))

    def transpose(self) -> None:
        perm = self.draw(st.permutations(range(1, self.value.type.rank)))
        self.emit(FixedTranspose, self.value, perm=(0, *perm))

    def concat(self) -> None:
        other = self.value
        self.arithmetic(FixedSub)
        if other.type.shape == self.value.type.shape:
            self.emit(FixedConcat, self.value, other, axis=self.pick(1, self.value.type.rank - 1))

    def slice(self) -> None:
        axis = self.pick(1, self.value.type.rank - 1)
        size = self.sizes[axis - 1]
        start, step = self.pick(0, size - 1), self.draw(st.sampled_from([1, 2, -1, -2]))
        end = self.pick(start + 1, size) if step > 0 else self.pick(-1, start - 1)
        self.emit(FixedSlice, self.value, starts=(start,), ends=(end,), axes=(axis,), steps=(step,))

    def gather(self) -> None:
        axis = self.pick(1, self.value.type.rank - 1)
        shape = self.draw(st.sampled_from([(), (1,), (3,), (2, 2)] if self.value.type.rank < 4 else [(2,)]))
        few = self.draw(st.lists(st.integers(0, self.sizes[axis - 1] - 1), min_size=1, max_size=4))
        self.emit(FixedGather, self.value, indices=Array(np.resize(np.array(few), shape)), axis=axis)

    def pad(self) -> None:
        rank = self.value.type.rank
        ends = [0 if i % rank == 0 else self.draw(st.sampled_from([0, 0, 1])) for i in range(2 * rank)]
        self.emit(FixedPad, self.value, pads=tuple(ends), value=self.pick(-5, 5))

    def reduce(self) -> None:
        axes = self.draw(st.lists(st.integers(1, self.value.type.rank - 1), unique=True, max_size=2))
        keepdims = self.draw(st.booleans()) or len(axes) == self.value.type.rank - 1
        self.emit(
            ReduceSum, self.value, elements=None, accumulator=WIDE, overflow=Overflow.SATURATE, order=Order.KHWC,
            axes=tuple(axes), keepdims=keepdims,
        )  # fmt: skip

    def matmul(self) -> None:
        if self.value.type.rank < 3:
            return
        weights = self.numbers(self.sizes[-1], self.pick(1, 3))
        bias = [self.numbers(weights.type.concrete(0)[1])] if self.draw(st.booleans()) else []
        self.emit(
            FixedMatMul, self.value, weights, *bias, elements=None,
            accumulator=WIDE, overflow=Overflow.SATURATE, order=self.draw(st.sampled_from(Order)),
        )  # fmt: skip

    def rescale(self) -> None:
        per_channel = (self.sizes[-1],) if self.draw(st.booleans()) else ()
        shift = np.resize(np.array(self.draw(st.lists(st.integers(-4, 2), min_size=1, max_size=3))), per_channel)
        self.emit(
            Requantize, self.value, multiplier=Array(np.full(per_channel, 1 << 30)), shift=Array(shift),
            form=RequantizeForm.SINGLE_ROUND, overflow=Overflow.SATURATE,
        )  # fmt: skip

    def table(self) -> None:
        """Through three bits, by a table for all channels or one for each."""
        self.emit(
            Requantize, self.value, elements=(integer(3),), multiplier=Array(np.array(1 << 30)),
            shift=Array(np.array(-5)), form=RequantizeForm.SINGLE_ROUND, overflow=Overflow.SATURATE,
        )  # fmt: skip
        rows = (self.sizes[-1],) if self.draw(st.booleans()) else ()
        self.emit(Table, self.value, self.numbers(*rows, 8))

    def argmax(self) -> None:
        self.emit(
            FixedArgMax, self.value, elements=(S64,), axis=self.pick(1, self.value.type.rank - 1), keepdims=True,
            select_last_index=False,
        )  # fmt: skip
        self.emit(FixedAdd, self.value, self.numbers(1), overflow=Overflow.SATURATE)

    def pool(self) -> None:
        if self.value.type.rank == 4:
            self.emit(FixedMaxPool, self.value, kernel=(1, 1), strides=(1, 1), pads=(0,) * 4, dilations=(1, 1))


STEPS: dict[str, Callable[[Chain], None]] = {
    "add": lambda c: c.arithmetic(FixedAdd),
    "sub": lambda c: c.arithmetic(FixedSub),
    "mul": lambda c: c.arithmetic(FixedMul),
    "reshape": Chain.reshape,
    "transpose": Chain.transpose,
    "concat": Chain.concat,
    "slice": Chain.slice,
    "gather": Chain.gather,
    "pad": Chain.pad,
    "reduce": Chain.reduce,
    "matmul": Chain.matmul,
    "rescale": Chain.rescale,
    "table": Chain.table,
    "argmax": Chain.argmax,
    "pool": Chain.pool,
}


@st.composite
def chains(draw: st.DrawFn) -> Graph:
    chain = Chain(draw)
    for step in draw(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=6)):
        if chain.value.type.rank > 1 and math.prod(chain.sizes) <= 200:
            STEPS[step](chain)
    return chain.builder.finish([chain.value], ["y"])


@settings(max_examples=max(400, settings().max_examples))
@given(graph=chains(), seed=st.integers(0, 2**32 - 1))
def test_no_element_leaves_the_bounds_of_its_channel(graph: Graph, seed: int) -> None:
    assert find_faults(graph) == ()
    x = np.random.default_rng(seed).choice(np.array([-128, -1, 0, 127], np.int8), graph.inputs[0].type.concrete(20))
    found, proof = trace(graph, {"x": x}), prove(graph)
    for value in graph.values():
        bounds, array = proof.bounds[value], found[value.name].astype(object)
        assert bounds.channels in (None, 1, array.shape[-1] if array.ndim else 1)
        assert np.all(bounds.lo <= array), f"%{value.name}"
        assert np.all(array <= bounds.hi), f"%{value.name}"
        steps = np.where(bounds.steps == 0, 1 << 99, bounds.steps)
        assert not np.any((array - bounds.lo) % steps), f"%{value.name}"
