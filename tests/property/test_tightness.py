"""Inputs made for a layer attain what is proved of it: every channel, both ends, results and partial sums."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from property.fixed_graphs import FixedMaker

from qir.counterexample import Reach, layer_graph, reach, tightness
from qir.fixed_point import Overflow
from qir.idle import is_idle
from qir.interpreter import interpret
from qir.interval import Bounds
from qir.ir import Graph
from qir.ops.accumulate import STEPWISE, Accumulating, Order
from qir.ops.constant import Const
from qir.ops.fixed_linear import Conv2d, FixedMatMul, ReduceSum
from qir.program import Program
from qir.proof import prove
from qir.testing.border import round_fraction
from qir.types import AffineType, IntegerType, TensorType, storage_of

Tensor = npt.NDArray[Any]
MONOTONIC = {Overflow.SATURATE, Overflow.SATURATE_SYMMETRIC, Overflow.NONE, None}


# The sums in words of their own: loops over Python integers


def narrowed(value: int, kept: IntegerType, overflow: Overflow | None) -> int:
    low = -kept.hi if overflow is Overflow.SATURATE_SYMMETRIC and -kept.hi > kept.lo else kept.lo
    if overflow in (None, Overflow.NONE) or low <= value <= kept.hi:
        return value
    if overflow is Overflow.WRAP:
        return (value - kept.lo) % (1 << kept.bits) + kept.lo
    return 0 if overflow is Overflow.SATURATE_ZERO else low if value < low else kept.hi


def centred(array: Tensor, kind: TensorType, *at: int) -> int:
    zero = 0
    if isinstance(kind.element, AffineType):
        axis, zeros = kind.element.axis, kind.element.zero_point.data
        zero = int(zeros if axis is None else zeros[at[axis]])
    return int(array[at]) - zero


def products(op: Accumulating, arrays: list[Tensor], at: tuple[int, ...]) -> Iterator[int | None]:
    """The products of the sum at a position of the result, in the order that the op states; None on padding."""
    kinds = [v.type for v in op.operands]
    if isinstance(op, Conv2d):
        outputs, rows, columns, per_group = arrays[1].shape
        taps = itertools.product(range(rows), range(columns), range(per_group))
        for r, s, c in sorted(taps, key=lambda t: t[2] * (op.order in (Order.CKHW, Order.BIAS_CKHW))):
            y = at[1] * op.strides[0] + r * op.dilations[0] - op.pads[0]
            x = at[2] * op.strides[1] + s * op.dilations[1] - op.pads[1]
            if 0 <= y < arrays[0].shape[1] and 0 <= x < arrays[0].shape[2]:
                channel = at[3] // (outputs // op.groups) * per_group + c
                weight = centred(arrays[1], kinds[1], at[3], r, s, c)
                yield centred(arrays[0], kinds[0], at[0], y, x, channel) * weight
            else:
                yield None
    elif isinstance(op, FixedMatMul):
        lead = [
            tuple(0 if d == 1 else i for d, i in zip(a.shape[:-2][::-1], at[:-2][::-1], strict=False))[::-1]
            for a in arrays[:2]
        ]
        for k in range(arrays[0].shape[-1]):
            left = centred(arrays[0], kinds[0], *lead[0], at[-2], k)
            yield left * centred(arrays[1], kinds[1], *lead[1], k, at[-1])
    elif isinstance(op, ReduceSum):
        for index in np.ndindex(*(arrays[0].shape[a] for a in op.axes)):
            place = [i for i, axis in zip(at, range(len(at)), strict=True) if not (op.keepdims and axis in op.axes)]
            for axis in sorted(op.axes):
                place.insert(axis, index[op.axes.index(axis)])
            yield centred(arrays[0], kinds[0], *place)


class Walk:
    """One sum: `seen` before each step narrows it, `products` summed when, `exact` as if none did, and the result."""

    def __init__(self, op: Accumulating, arrays: list[Tensor], at: tuple[int, ...]) -> None:
        bias = int(arrays[2][at[-1]]) if len(arrays) > 2 else 0
        self.op = op
        self.exact = total = bias if op.order.bias_first else 0
        self.seen = [(0, 0), (0, total)]
        steps = op.overflow in STEPWISE
        for product in products(op, arrays, at):
            if product is not None:  # a step on padding adds nothing, and narrows all the same
                self.exact, total = self.step(self.exact, product), self.step(total, product)
                self.seen.append((len(self.seen) - 1, total if steps else self.exact))
            total = narrowed(total, op.accumulator, op.overflow)
        last = 0 if op.order.bias_first else bias
        self.exact, total = self.exact + last, total + last
        self.seen.append((len(self.seen) - 2, total if steps else self.exact))
        self.result = narrowed(total, op.accumulator, op.overflow)

    def step(self, total: int, product: int) -> int:
        shifted = Fraction(product) * Fraction(2) ** self.op.shift
        if self.op.product is None:
            whole = total + shifted
            return int(whole) if self.op.rounding is None else round_fraction(whole, self.op.rounding)
        entering = int(shifted) if self.op.rounding is None else round_fraction(shifted, self.op.rounding)
        return total + narrowed(entering, self.op.product, self.op.product_overflow)


# Layers and their inputs


@st.composite
def layers(draw: st.DrawFn, /, kind: str, **accumulator: Any) -> Graph:
    maker = FixedMaker(draw)
    match kind:
        case "conv2d":
            value = maker.conv(**accumulator)
        case "matmul":
            value = maker.matmul(**accumulator)
        case "two activations":
            value = maker.batched_matmul()
        case _:
            value = maker.reduce_sum()
    return maker.builder.finish([value], ["y"])


@st.composite
def operands_of(draw: st.DrawFn, graph: Graph) -> list[Bounds]:
    """What is proved of the operands of the last op; at times as if ops before it bounded each channel by itself."""
    proof, found = prove(graph), []
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    for value in graph.ops[-1].operands:
        bounds, storage = proof.bounds[value], storage_of(value.type.element)
        assert storage is not None
        if bounds.data is None and value.type.concrete(1)[-1] and draw(st.booleans()):
            channels = int(value.type.shape[-1])
            ends = np.sort(random.integers(storage.lo, storage.hi, (2, channels), endpoint=True), axis=0)
            bounds = Bounds.of(ends[0], ends[1], random.integers(1, 5, channels))
        found.append(bounds)
    return found


def checked(graph: Graph, operands: list[Bounds]) -> Iterator[tuple[bool, Reach, Reach]]:
    """The inputs of every channel, held to the loops, the kernels and the unbounded interpreter: for partial or not."""
    op = graph.ops[-1]
    assert isinstance(op, Accumulating)
    bounds = op.bounds(operands)
    assert bounds is not None
    if is_idle(op, bounds):
        op = op.with_changes(overflow=Overflow.NONE)
    alone = layer_graph(op, operands)
    program = Program(alone)
    constants = {o.result: o.value.data for o in graph.ops if isinstance(o, Const)}
    for channel, partial in itertools.product(range(op.result.type.concrete(1)[-1]), (True, False)):
        if bounds.channel_partials is None or (channel and bounds.channel_partials.channels == 1):
            continue
        ends = [reach(op, operands, bounds, channel, high=high, partial=partial) for high in (False, True)]
        found = [e for e in ends if e is not None]
        if len(found) < 2:
            assert 0 in op.result.type.concrete(1)
            continue
        for end in found:
            arrays = [end.feeds[v.name] if v.name in end.feeds else constants[v] for v in op.operands]
            inside(op, operands, end)
            walk = Walk(op, arrays, end.position)
            assert (end.exact, end.result) == (walk.exact, walk.result)
            assert end.length == len(walk.seen) - 3
            assert (end.products, end.value) in (walk.seen if partial else [(None, walk.result)])
            for outputs in (program.run_integer(end.feeds), interpret(alone, end.feeds, unbounded=True)):
                assert int(next(iter(outputs.values()))[end.position]) == walk.result
        yield partial, found[0], found[1]


def inside(op: Accumulating, operands: list[Bounds], end: Reach) -> None:
    """Inputs have the shape of the operands, lie within their bounds, and on their steps."""
    for value, bounds in zip(op.operands, operands, strict=True):
        if value.name in end.feeds:
            array = end.feeds[value.name]
            storage = storage_of(value.type.element)
            assert storage is not None
            assert (array.shape, array.dtype) == (value.type.concrete(1), storage.dtype)
            data = array.astype(object)
            assert np.all((bounds.lo <= data) & (data <= bounds.hi))
            assert not np.any((data - bounds.lo) % np.maximum(bounds.steps, 1))


@pytest.mark.parametrize("kind", ["conv2d", "matmul", "two activations", "reduce_sum"])
@settings(max_examples=max(100, settings().max_examples))
@given(data=st.data())
def test_every_bound_is_attained(kind: str, data: st.DataObject) -> None:
    graph = data.draw(layers(kind))
    op = graph.ops[-1]
    assert isinstance(op, Accumulating)
    operands = data.draw(operands_of(graph))
    # A sum over channels is proved from their hull, which no element of the others attains.
    sums_channels = isinstance(op, ReduceSum) and op.operands[0].type.rank - 1 in op.axes and operands[0].channels
    attains = op.overflow in MONOTONIC | {Overflow.WRAP} and op.product_overflow in MONOTONIC and not sums_channels
    for partial, low, high in checked(graph, operands):
        if partial:
            assert low.bound <= low.value <= high.value <= high.bound
            assert 0 <= tightness(low, high) <= 1
        if attains and (partial or op.overflow is not Overflow.WRAP):
            assert (low.value, high.value) == (low.bound, high.bound)


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("kind", ["conv2d", "matmul"])
@settings(max_examples=max(40, settings().max_examples // 4))
@given(data=st.data())
def test_single_layers_with_room_attain_the_bounds_of_sums_and_results(
    kind: str, order: Order, data: st.DataObject
) -> None:
    accumulator = {"accumulator": IntegerType(64, True, -(2**63), 2**63 - 1), "overflow": Overflow.NONE, "order": order}
    graph = data.draw(layers(kind, **accumulator))
    for _, low, high in checked(graph, data.draw(operands_of(graph))):
        assert (low.value, high.value) == (low.bound, high.bound)
        assert not low.overflows
        assert not high.overflows
