"""Random fixed-stage graphs of several ops, strung as in models, and inputs that drive numbers to their ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st
from property.fixed_graphs import STORAGES, FixedMaker, proved
from property.recorder import centred, places_of

from qir.arrays import Array
from qir.fixed_point import Overflow, RequantizeForm, Rounding
from qir.interpreter import evaluate_op
from qir.ir import Graph, Op, Value
from qir.ops.accumulate import STEPWISE, Accumulating
from qir.ops.fixed_elementwise import FixedAdd, FixedDiv, FixedMul, FixedSub, Table
from qir.ops.fixed_linear import ReduceSum
from qir.ops.fixed_pool import FixedAveragePool, FixedMaxPool
from qir.ops.fixed_rescale import Requantize
from qir.ops.movement import FixedConcat, FixedGather, FixedPad, FixedReshape, FixedSlice, FixedTranspose
from qir.probes import some_inputs
from qir.types import (
    BATCH,
    S8,
    S16,
    S32,
    U8,
    AffineType,
    ElementType,
    IntegerType,
    affine,
    container_bounds,
    integer,
    is_quantized,
    storage_of,
)

Tensor = npt.NDArray[Any]

_LARGEST = 72  # elements of a sample: beyond it a map is cut
_NARROW = tuple(s for s in STORAGES if s.bits <= 8)
_ONE_SIDED = (S8.narrowed(3, 17), U8.narrowed(1, 255), S8.narrowed(-90, -2))
_FEW_BITS = (integer(11), integer(12), S16)
_TRIED = 6  # samples that a graph is run on while it is made, so that scales fit


class ModelMaker(FixedMaker):
    """Builds a graph block by block on maps [N, H, W, C], and runs it on a few samples to choose scales that fit."""

    def __init__(self, draw: st.DrawFn) -> None:
        super().__init__(draw)
        self.lead = (BATCH,)
        self.samples: dict[Value, Tensor] = {}
        self.maps = [self.source() for _ in range(self.size(1, 2))]

    def source(self) -> Value:
        height, width, channels = self.size(), self.size(), self.size()
        element = self.channelwise(channels) if self.rarely() else self.element((*STORAGES, *_ONE_SIDED))
        x = self.input(height, width, channels, element=element)
        storage = _storage(x)
        ends = self.random.choice(np.array([storage.lo, storage.hi]), x.type.concrete(_TRIED))
        inside = self.random.integers(storage.lo, storage.hi, ends.shape, endpoint=True)
        self.samples[x] = np.where(self.random.random(ends.shape) < 0.5, ends, inside).astype(storage.dtype)
        return x

    def rarely(self) -> bool:
        return bool(self.pick([False, False, False, False, True]))

    def channelwise(self, channels: int) -> AffineType:
        """A zero point for each channel of a map."""
        storage = self.pick(STORAGES)
        zeros = self.random.integers(*container_bounds(storage.bits, storage.signed), channels, endpoint=True)
        return affine(storage, np.full(channels, 0.5), zeros, 3)

    def constant(self, data: Tensor, element: ElementType) -> Value:
        value = super().constant(data, element)
        self.samples[value] = data
        return value

    def emit(self, op_class: type[Op], operands: Sequence[Value], **attributes: Any) -> Value:
        value = super().emit(op_class, operands, **attributes)
        self.samples[value] = evaluate_op(self.builder.ops[-1], [self.samples[v] for v in operands])[0]
        return value

    def accumulator(self) -> dict[str, Any]:
        """At times one of few bits, whose sums depend on their order, or with products of few bits."""
        attributes = super().accumulator()
        if self.rarely():
            attributes["accumulator"] = self.pick(_FEW_BITS)
            attributes["overflow"] = self.pick(sorted(STEPWISE))
        if self.rarely():
            attributes["product"] = self.pick(_FEW_BITS)
            attributes["product_overflow"] = self.pick([Overflow.WRAP, *sorted(STEPWISE)])
        return attributes

    # What blocks are made of

    def fit(self, x: Value, element: ElementType | None = None) -> Value:
        """A requantize that brings what the samples reach to the width of the result or below it; at times, any."""
        if self.rarely():
            return self.rescale(x, element)
        if element is None and self.rarely() and x.type.rank == 4:
            element = self.channelwise(int(x.type.shape[3]))
        element = self.element() if element is None else element
        storage = storage_of(element)
        assert storage is not None
        reach = int(np.abs(centred(self.samples[x], x.type)).max())
        room = self.pick([0, 0, 1, 2, 4])
        return self.rescale(x, element, (storage.hi - storage.lo).bit_length() - 1 - reach.bit_length() - room)

    def plain(self, x: Value, storages: Sequence[IntegerType] = STORAGES) -> Value:
        """A value with one zero point and one of these storages: itself, or requantized."""
        is_plain = getattr(x.type.element, "axis", None) is None and storage_of(x.type.element) in storages
        return x if is_plain else self.fit(x, self.element(storages))

    def activation(self) -> Value:
        """A map of a few elements, of at most 16 bits."""
        x = self.maps[-1] if self.flag() else self.pick(self.maps)
        if x.type.sample_size > _LARGEST:
            x = self.cut(self.plain(x))
        return x if _storage(x).bits <= 16 else self.fit(x)

    def cut(self, x: Value) -> Value:
        sizes = [int(d) for d in x.type.shape[1:]]
        ends = tuple(min(d, 3) for d in sizes)
        return self.emit(FixedSlice, [x], starts=(0, 0, 0), ends=ends, axes=(1, 2, 3), steps=(1, 1, 1))

    def shifted(self, x: Value) -> Value:
        """A value at a finer scale, of which no bit is lost."""
        shift = np.array(self.size(0, 6))
        return self.emit(
            Requantize, [x], elements=[S32], multiplier=Array(np.array(1)), shift=Array(shift),
            form=RequantizeForm.SHIFT, rounding=self.pick(list(Rounding)), overflow=Overflow.SATURATE,
        )  # fmt: skip

    def branch(self, x: Value) -> Value:
        """A map of the shape of x: a layer, a table, a mean of all positions or channels, or x again."""
        match self.pick(["conv", "conv", "matmul", "table", "mean", "rescale", "x"]):
            case "conv":
                return self.fit(self.conv(x, keeps_shape=True))
            case "matmul":
                return self.fit(self.matmul(x, int(x.type.shape[3])))
            case "table":
                return self.table(self.plain(x, _NARROW))
            case "mean":
                return self.emit(FixedAdd, [x, self.mean(x)], elements=[S32], overflow=Overflow.SATURATE)
            case "rescale":
                return self.fit(x)
        return x

    def channel_table(self, x: Value) -> Value:
        """A function of its own for each channel, with what they reach far apart."""
        x = self.plain(x, _NARROW)
        storage, channels = _storage(x), int(x.type.shape[3])
        ends = np.sort(self.random.integers(S8.lo, S8.hi, (channels, 2, 1), endpoint=True), axis=1)
        rows = self.random.integers(ends[:, 0], ends[:, 1], (channels, 1 << storage.bits), np.int8, endpoint=True)
        return self.emit(Table, [x, self.constant(rows, S8)], elements=[affine(S8, 0.125, 3)])

    def mean(self, x: Value) -> Value:
        """At about the scale of x, and often with its type."""
        axes = self.pick([(1, 2), (2, 1), (1,), (2,), (3,), (1, 2, 3)])
        total = self.emit(ReduceSum, [x], axes=axes, keepdims=True, **self.accumulator())
        has_one_zero = getattr(x.type.element, "axis", None) is None
        element = x.type.element if has_one_zero and self.flag() else self.element()
        count = math.prod(int(x.type.shape[a]) for a in axes)
        return self.rescale(total, element, 1 - count.bit_length()) if self.flag() else self.fit(total, element)

    # Blocks

    def layer_block(self) -> Value:
        x = self.activation()
        return self.fit(self.conv(x) if self.pick([True, True, False]) else self.matmul(x, self.size()))

    def residual_block(self) -> Value:
        x = self.activation()
        parts = [x, self.branch(x)]
        if self.flag():
            parts.reverse()
        op_class = self.pick([FixedAdd, FixedAdd, FixedSub, FixedMul])
        if self.flag():
            return self.combine(op_class, parts)
        # As runtimes do: both at a common scale first.
        if self.flag():
            parts = [self.shifted(p) for p in parts]
        else:
            parts = [self.fit(p, S32.narrowed(-(1 << 20), 1 << 20)) for p in parts]
        return self.fit(self.emit(op_class, parts, elements=[integer(48)], overflow=Overflow.SATURATE))

    def concat_block(self) -> Value:
        x, element = self.activation(), self.element()
        parts = [self.fit(self.branch(x), element) for _ in range(self.size(1, 2))]
        return self.emit(FixedConcat, [*parts, self.fit(x, element)], axis=self.pick([1, 2, 3, 3]))

    def centred_block(self) -> Value:
        """A map less its mean."""
        x = self.activation()
        return self.combine(FixedSub, [x, self.mean(x)])

    def squeeze_block(self) -> Value:
        """Squeeze-and-excite: the mean of a map, through two layers and a table, scales its channels."""
        x = self.activation()
        total = self.emit(ReduceSum, [x], axes=(1, 2), keepdims=True, **self.accumulator())
        squeezed = self.fit(self.matmul(self.fit(total), self.size(1, 2)))
        gate = self.table(self.plain(self.fit(self.matmul(squeezed, int(x.type.shape[3]))), _NARROW))
        return self.fit(self.emit(FixedMul, [x, gate], elements=[S32], overflow=Overflow.SATURATE))

    def table_block(self) -> Value:
        return self.table(self.plain(self.activation(), _NARROW))

    def pool_block(self) -> Value:
        x = self.plain(self.activation())
        return self.pool(self.pick([FixedMaxPool, FixedAveragePool]), self.shifted(x) if self.flag() else x)

    def movement_block(self) -> Value:
        x = self.activation() if self.flag() else self.channel_table(self.activation())
        x = self.plain(x)
        h, w, c = (int(d) for d in x.type.shape[1:])
        match self.pick([FixedSlice, FixedGather, FixedPad, FixedReshape, FixedTranspose]):
            case op_class if op_class is FixedSlice:
                axis = self.pick([1, 2, 3, 3, 3])
                size = (h, w, c)[axis - 1]
                start, step = self.size(0, size - 1), self.pick([1, 2, -1])
                end = self.size(start + 1, size) if step > 0 else self.size(0, start) - 1
                return self.emit(op_class, [x], starts=(start,), ends=(end,), axes=(axis,), steps=(step,))
            case op_class if op_class is FixedGather:
                axis = self.pick([1, 2, 3, 3, 3])
                indices = self.random.integers(0, (h, w, c)[axis - 1], self.size(), np.int64)
                return self.emit(op_class, [x], indices=Array(indices), axis=axis)
            case op_class if op_class is FixedPad:
                widths = [self.size(0, 1) for _ in range(6)]
                value = self.pick([_storage(x).lo, _storage(x).hi])
                return self.emit(op_class, [x], pads=(0, *widths[:3], 0, *widths[3:]), value=value)
            case op_class if op_class is FixedReshape:
                shapes = [(1, h, w * c), (w, h, c), (1, 1, h * w * c), (h * w, c, 1), (h, 1, w * c)]
                return self.emit(op_class, [x], shape=self.pick(shapes))
            case op_class:
                return self.emit(op_class, [x], perm=(0, *self.draw(st.permutations([1, 2, 3]))))

    def attention_block(self) -> Value:
        """Products of two activations: pixels with pixels, or channels with channels; then weights of softmax."""
        x = self.plain(self.activation())
        h, w, c = (int(d) for d in x.type.shape[1:])
        rows = self.emit(FixedReshape, [x], shape=(h * w, c))
        columns = self.emit(FixedTranspose, [self.plain(rows)], perm=(0, 2, 1))
        pair = (rows, columns) if self.flag() else (columns, rows)
        product = self.batched_matmul(pair)
        weights = self.softmax(self.fit(product, affine(S8, 0.1, 7))) if self.flag() else self.fit(product)
        if self.flag():  # the weights times the rows again
            weights = self.fit(self.batched_matmul((weights, pair[0])))
        return self.emit(FixedReshape, [self.plain(weights)], shape=(1, *(int(d) for d in weights.type.shape[1:])))

    def argmax_block(self) -> Value:
        x = self.activation()
        indices = self.argmax(x)
        return self.combine(FixedAdd, [x, indices]) if indices.type.rank == 4 else self.fit(x)

    def division_block(self) -> Value:
        x = self.activation()
        return self.combine(FixedDiv, [x, self.fit(x, self.pick([affine(s, 0.5, 0) for s in _ONE_SIDED]))])

    def island_block(self) -> Value:
        x = self.activation()
        return self.quantize(x if is_quantized(x.type.element) else self.fit(x, affine(S8, 0.5, 3)))


BLOCKS: tuple[Callable[[ModelMaker], Value], ...] = (
    ModelMaker.layer_block,
    ModelMaker.layer_block,
    ModelMaker.layer_block,
    ModelMaker.residual_block,
    ModelMaker.residual_block,
    ModelMaker.concat_block,
    ModelMaker.centred_block,
    ModelMaker.squeeze_block,
    ModelMaker.table_block,
    ModelMaker.pool_block,
    ModelMaker.movement_block,
    ModelMaker.movement_block,
    ModelMaker.attention_block,
    ModelMaker.argmax_block,
    ModelMaker.division_block,
    ModelMaker.island_block,
)


class Model:
    """A graph and a batch of inputs for it; shows as the text of the graph."""

    def __init__(self, graph: Graph, feeds: dict[str, Tensor]) -> None:
        self.graph = graph
        self.feeds = feeds

    def __repr__(self) -> str:
        return str(self.graph)


@st.composite
def models(draw: st.DrawFn, may_be_proved: bool = True) -> Model:
    """A graph of a few blocks and inputs for it; where it may, some are without the overflow handling proved idle."""
    maker = ModelMaker(draw)
    for block in draw(st.lists(st.sampled_from(BLOCKS), min_size=2, max_size=4)):
        maker.maps.append(block(maker))
    graph = maker.builder.finish([maker.maps[-1]], ["y"])
    inputs = inputs_for(graph, maker.random)
    return Model(proved(graph) if may_be_proved and draw(st.booleans()) else graph, inputs)


def _storage(value: Value) -> IntegerType:
    storage = storage_of(value.type.element)
    assert storage is not None
    return storage


# Inputs


def inputs_for(graph: Graph, random: np.random.Generator) -> dict[str, Tensor]:
    """A batch: ends, random numbers, and what drives sums of the first layers to their ends at any of their windows."""
    batches = list(some_inputs(graph, 12, int(random.integers(1 << 32))))
    batches += [worst for op in graph.ops for worst in _worst_inputs(graph, op, random)]
    return {v.name: np.concatenate([b[v.name] for b in batches]) for v in graph.inputs}


def _worst_inputs(graph: Graph, op: Op, random: np.random.Generator) -> list[dict[str, Tensor]]:
    """Of an op that sums an input with constant weights: both ends of a few sums, the rest of the input at random."""
    if not isinstance(op, Accumulating) or op.operands[0] not in graph.inputs:
        return []
    x = op.operands[0]
    if isinstance(op, ReduceSum):
        weights = np.ones(1, np.int64)
    elif op.operands[1] in graph.constants:
        weights = centred(graph.constants[op.operands[1]].data, op.operands[1].type).reshape(-1)
    else:
        return []
    left, right = places_of(op, [v.type.concrete(1) for v in op.operands])
    left, right = left.reshape(len(left), -1), right.reshape(len(right), -1)
    found = []
    for place in random.integers(0, left.shape[1], 3):
        where, factors = left[:, place], weights[right[:, place]]
        for sign in (1, -1):
            batch = {v.name: _random_ends(v, random) for v in graph.inputs}
            driven = np.where(factors * sign > 0, _storage(x).hi, _storage(x).lo)
            batch[x.name].reshape(-1)[where[where >= 0]] = driven[where >= 0]
            found.append(batch)
    return found


def _random_ends(value: Value, random: np.random.Generator) -> Tensor:
    storage = _storage(value)
    return random.choice(np.array([storage.lo, storage.hi]).astype(storage.dtype), value.type.concrete(1))
