"""Layers with constant weights, and the walk over calibration feeds from each level of them to the next.

Passes that choose how weights round share it: a layer is seen behind those before it, which are rounded already.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qir.arrays import Array
from qir.errors import CalibrationError
from qir.fixed_point import Rounding
from qir.interpreter import entering, evaluate_at, on_grid
from qir.interval import Interval
from qir.ir import Graph, Op, Stage, Value
from qir.ops.constant import Const
from qir.ops.fixed_rescale import QuantizeRule, quantize_array, round_to_grid
from qir.ops.float_nn import Conv, MatMul
from qir.pass_manager import PassContext
from qir.passes.calibrate import parts_of
from qir.passes.fuse_activation import clip_of, replace_chain, sole_readers
from qir.passes.lowering.weight_only import block_axis, quantize_blocks, uses_weights_alone
from qir.passes.weight_formats import bias_type, scale_of_type
from qir.passes.widths.storage import bias_storage
from qir.rewrite import Rewriter, live_ops, map_values, rewrite
from qir.target import Target
from qir.types import F32, AffineType, ElementType, FixedPointType, QuantizedType, TensorType, is_quantized, scale_array

Tensor = npt.NDArray[Any]
Layer = Conv | MatMul
Values = dict[Value, Tensor]

_MOST_HELD: Final = 2 << 30  # bytes of values that a walk holds between levels


def layers_of(graph: Graph) -> list[Layer]:
    """Layers with quantized operands, constant weights, and a constant bias or none."""
    return [
        op
        for op in graph.ops
        if isinstance(op, Conv | MatMul)
        and all(v in graph.constants for v in op.operands[1:])
        and all(is_quantized(v.type.element) for v in op.operands)
    ]


def quantized_element(value: Value) -> QuantizedType:
    """The element type of an operand of a layer."""
    element = value.type.element
    assert isinstance(element, AffineType | FixedPointType)
    return element


def _rounded_weight(layer: Layer, data: Tensor, target: Target) -> Tensor:
    """Weights as the program has them, in float32."""
    weight = layer.operands[1]
    if uses_weights_alone(target, weight) and target.weight_only is not None:
        contract, axis = target.weight_only, block_axis(layer)
        integers, scales = quantize_blocks(data, axis, contract.block, contract.bits[0])
        spread = np.repeat(scales, contract.block, axis=axis).take(range(data.shape[axis]), axis=axis)
        return (integers.astype(np.float32) * spread).astype(np.float32)
    return nearest_reals(data, weight.type.element)


def integers_of(data: Tensor, element: ElementType) -> npt.NDArray[np.int64]:
    """The integers that legalize makes of weights in a type."""
    return quantize_array(data.astype(np.float32), element, QuantizeRule.DIVIDE, Rounding.HALF_AWAY)


def nearest_reals(data: Tensor, element: ElementType) -> Tensor:
    """The reals that legalize's integers of weights stand for."""
    return round_to_grid(data.astype(np.float32), element, Rounding.HALF_AWAY)


def with_own_parameters(graph: Graph, target: Target, *, bias: bool = True) -> Graph:
    """The graph in which each layer has weights and bias that nothing else reads; the same object where all have.

    With `bias`, a layer that had none gets one of zeros.
    """
    readers = sole_readers(graph)
    fewest = 3 if bias else 2
    lacking = {
        op for op in layers_of(graph) if len(op.operands) < fewest or any(v not in readers for v in op.operands[1:])
    }
    if not lacking:
        return graph

    def visit(rewriter: Rewriter, op: Op) -> bool:
        if not isinstance(op, Conv | MatMul) or op not in lacking:
            return False
        owned = [rewriter.get(op.operands[0])]
        for old in op.operands[1:]:
            if old not in readers:
                copy = replace(old, name=rewriter.fresh(old.name))
                rewriter.ops.append(Const(value=graph.constants[old], results=(copy,)))
                owned.append(copy)
            else:
                owned.append(rewriter.get(old))
        if len(owned) < fewest:
            source, scales = scale_of_type(op.operands[0].type), scale_array(quantized_element(op.operands[1]))
            name = f"{op.result.name}.bias"
            owned.append(zero_bias(rewriter, op, bias_type(op, source, scales, bias_storage(target), target, name)))
        replace_chain(rewriter, op, op, tuple(owned), clip_of(op))
        return True

    return rewrite(graph, visit)


def zero_bias(rewriter: Rewriter, layer: Layer, element: ElementType) -> Value:
    """A bias of zeros for a layer that has none."""
    name = rewriter.fresh(f"{layer.result.name}.bias")
    kind = TensorType((layer.result.type.shape[1 if isinstance(layer, Conv) else -1],), element)
    own = Value(name, kind, Interval(0.0, 0.0))
    rewriter.ops.append(Const(value=Array(np.zeros(kind.concrete(1), np.float32), name), results=(own,)))
    return own


def with_constants(
    graph: Graph, data: Mapping[Value, Tensor], types: Mapping[Value, TensorType] | None = None
) -> Graph:
    """The graph with other reals in some constants, and other types of some."""
    types = types or {}

    def visit(rewriter: Rewriter, op: Op) -> bool:
        if not isinstance(op, Const) or (op.result not in data and op.result not in types):
            return False
        value, result = op.value, replace(op.result, type=types.get(op.result, op.result.type))
        if op.result in data:
            reals = data[op.result].astype(np.float32)
            span = Interval(float(reals.min(initial=np.inf)), float(reals.max(initial=-np.inf)))
            value, result = Array(reals, op.value.name), replace(result, range=span)
        rewriter.keep(op, [result], value=value)
        return True

    return rewrite(graph, visit)


@dataclass(frozen=True, eq=False)
class Part:
    """Some samples, `size` of them, at one level of layers: what is read there, in floating point and rounded."""

    number: int
    size: int
    real: Values
    rounded: Values

    @property
    def sides(self) -> tuple[Values, Values]:
        """In floating point, and rounded."""
        return self.real, self.rounded


class LayerWalk:
    """The values that layers read over all calibration samples: in floating point, and behind layers rounded already.

    `levels` are the layers, those together that lie behind equally many others. Each level is visited in turn:
    `inputs` gives what it reads, `set_weight` and `set_bias` state what its layers hold for those behind it. Weights
    and biases that are not set are the graph's, rounded.

    Without `rounded`, the walk is in floating point alone, and what is rounded is the same.

    Between levels, the values that ops ahead still read are held, so that each op runs once over the samples in
    floating point and once rounded. They take up to 2 GiB; samples beyond are run again from the inputs at each level,
    so that the feeds must give the same samples in the same order every time.

    Raises CalibrationError for no feeds, and for those that can be walked only once or do not fit.
    """

    def __init__(self, graph: Graph, target: Target, context: PassContext, name: str, *, rounded: bool = True) -> None:
        self._feeds, self._name, self._progress = context.need_feeds(name), name, context.progress
        self._graph = graph
        self._real = map_values(
            graph, lambda v: {"type": v.type.with_element(F32)} if is_quantized(v.type.element) else {}, Stage.FLOAT
        )
        layers = layers_of(graph)
        self._segments, self.levels = _segments(graph, layers)
        self._last_use = {v: op for segment in self._segments for op in segment for v in op.operands}
        constants = {v: a.data for v, a in graph.constants.items()}
        self._constants = {Stage.FLOAT: constants}  # of each stage that is walked, those that its ops read
        if rounded:
            self._constants[Stage.TYPED] = {v: on_grid(a, v) for v, a in constants.items()}
            for layer in layers:
                self.set_weight(layer, _rounded_weight(layer, constants[layer.operands[1]], target))
        self._held: dict[int, list[Values]] = {}  # by the number of the part, at each stage
        self._done = 0
        self.samples = sum(self._size(part) for _, part in self._parts())
        if not self.samples:
            raise CalibrationError("calibration data is empty: give at least one feed with one sample")

    def weight(self, layer: Layer, stage: Stage = Stage.TYPED) -> Tensor:
        """The weights of a layer: rounded, or at stage `float` those of the graph."""
        return self._constants[stage][layer.operands[1]]

    def bias(self, layer: Layer) -> Tensor:
        """The bias of a layer in the graph."""
        return self._constants[Stage.FLOAT][layer.operands[2]]

    def set_weight(self, layer: Layer, reals: Tensor) -> None:
        """The rounded weights of a layer."""
        self._constants[Stage.TYPED][layer.operands[1]] = reals

    def set_bias(self, layer: Layer, reals: Tensor) -> None:
        """The bias of a layer behind which others are rounded; it is rounded to its type."""
        bias = layer.operands[2]
        self._constants[Stage.TYPED][bias] = on_grid(reals.astype(np.float32), bias)

    def inputs(self, level: int) -> Iterator[Part]:
        """What the layers of a level read, some samples at a time. Levels are visited in order, each to its end."""
        total = len(self._feeds) * len(self.levels) if isinstance(self._feeds, Sized) else 0
        taken, last = 0, -1
        for index, (number, part) in enumerate(self._parts()):
            if number != last and last >= 0:
                self._tell(total)
            last = number
            sides = self._held.pop(index, None)
            first = level if sides is not None else 0
            sides = sides or self._entering(part)
            for segment in self._segments[first : level + 1]:
                for stage, values in zip(self._constants, sides, strict=True):
                    self._run(segment, stage, values)
            yield Part(index, self._size(part), sides[0], sides[-1])
            if level == len(self.levels) - 1:
                continue
            taken += sum(a.nbytes for values in sides for a in values.values())
            if taken <= _MOST_HELD:
                self._held[index] = sides
        self._tell(total)

    def _tell(self, total: int) -> None:
        self._done += 1
        self._progress(self._name, self._done, total)

    def _parts(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        for number, feed in enumerate(self._feeds):
            for part in parts_of(self._real, feed, number):
                yield number, part

    def _size(self, part: Mapping[str, Tensor]) -> int:
        return next((len(part[v.name]) for v in self._graph.inputs if v.type.is_batched), 1)

    def _entering(self, part: Mapping[str, Tensor]) -> list[Values]:
        return [
            {v: a for v, a in entering(self._graph.with_changes(stage=stage), part).items() if v in self._last_use}
            for stage in self._constants
        ]

    def _run(self, segment: list[Op], stage: Stage, values: Values) -> None:
        """Run ops; of the values, only what ops ahead read stays."""
        constants = self._constants[stage]
        for op in segment:
            operands = [constants[v] if v in constants else values[v] for v in op.operands]
            values.update(zip(op.results, evaluate_at(stage, op, operands), strict=True))
            for value in (*op.operands, *op.results):
                if self._last_use.get(value, op) is op:
                    values.pop(value, None)


def _segments(graph: Graph, layers: list[Layer]) -> tuple[list[list[Op]], list[list[Layer]]]:
    """The ops to run before each level of layers and after the last, what no layer reads left out, and the levels.

    A level is run at the head of the next segment.
    """
    sources = tuple(dict.fromkeys(layer.operands[0] for layer in layers))
    part = graph.with_changes(outputs=sources, output_names=tuple(v.name for v in sources))
    known = set[Op](layers)
    needed = known.union(live_ops(part))
    depths: dict[Value, int] = {}
    segments: dict[int, list[Op]] = {}
    levels: dict[int, list[Layer]] = {}
    for op in graph.ops:
        depth = max((depths.get(v, 0) for v in op.operands), default=0)
        if isinstance(op, Conv | MatMul) and op in known:
            levels.setdefault(depth, []).append(op)
            depth += 1
        depths.update(dict.fromkeys(op.results, depth))
        if op in needed and not isinstance(op, Const):
            segments.setdefault(depth, []).append(op)
    return [segments.get(depth, []) for depth in range(len(levels) + 1)], [levels[d] for d in range(len(levels))]
