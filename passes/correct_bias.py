"""correct-bias: the mean error that rounded weights leave in the output of each layer goes into its bias.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, appendix D: empirical bias
correction, each layer behind corrected ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from qir.arrays import Array
from qir.errors import CalibrationError
from qir.fixed_point import Rounding
from qir.interpreter import evaluate
from qir.interval import Interval
from qir.ir import Graph, Op, Stage, Value
from qir.ops.constant import Const
from qir.ops.fixed_rescale import QuantizeRule, dequantize_array, quantize_array
from qir.ops.float_nn import Conv, MatMul
from qir.pass_manager import Feeds, Pass, PassContext
from qir.passes.accumulation import sum_scale
from qir.passes.calibrate import parts_of
from qir.passes.fuse_activation import clip_of, replace_chain, sole_readers
from qir.passes.lowering.weight_only import block_axis, quantize_blocks, uses_weights_alone
from qir.passes.select_q_formats import bias_format
from qir.passes.widths.storage import bias_storage
from qir.rewrite import Rewriter, live_ops, map_values, rewrite
from qir.target import Target
from qir.types import F32, AffineType, FixedPointType, TensorType, is_quantized, scale_array

Tensor = npt.NDArray[Any]
Vector = npt.NDArray[np.float64]
Layer = Conv | MatMul


@dataclass(frozen=True)
class CorrectBias(Pass):
    """Adds to the bias of each Conv and MatMul with constant weights what its output lacks on average, per channel.

    The averages are over the calibration feeds: of the graph in floating point, and of the same with weights and values
    rounded to their formats. Layers are corrected in order, each with those before it corrected already, so that the
    feeds are walked once, and once more for every layer on the longest way through the graph. A layer without a bias
    gets one. What the rounding of results by the target's own formula shifts is not seen.

    Raises CalibrationError for no feeds, and for those that can be walked only once or do not fit.
    """

    name: ClassVar[str] = "correct-bias"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.TYPED})
    ensures: ClassVar[Stage | None] = Stage.TYPED

    def run(self, graph: Graph, context: PassContext) -> Graph:
        """The graph with other biases; the same object where no layer has quantized constant weights."""
        target = context.need_target(self.name)
        feeds = context.need_feeds(self.name)
        if not _layers(graph):
            context.note("no layers to correct")
            return graph
        graph = _with_own_biases(graph, target)
        levels = _levels(graph)
        averages = _Averages(graph, feeds, context, walks=len(levels) + 1)
        wanted = averages.of_inputs(averages.real, _layers(graph))
        shares: list[Vector] = []
        for level in levels:
            found = averages.of_inputs(_rounded(graph, target), level)
            biases: dict[Value, Vector] = {}
            for layer in level:
                weight, bias = (graph.constants[v].data for v in layer.operands[1:])
                source = layer.operands[0].name
                error = _output(layer, found[source], _rounded_weight(layer, weight, target))
                error -= _output(layer, wanted[source], weight)
                assert isinstance(layer.operands[2], Value)
                biases[layer.operands[2]] = bias - error
                span = layer.sum_range
                if span is not None and span.hi > span.lo:
                    shares.append(np.abs(error) / float(span.hi - span.lo))
            graph = _with_biases(graph, biases)
        share = float(np.concatenate(shares).mean()) if shares else 0.0
        context.note(
            f"{sum(map(len, levels))} biases corrected; outputs were off by {share:.2%} of their range on average"
        )
        return graph


def _layers(graph: Graph) -> list[Layer]:
    """Layers with quantized operands, constant weights, and a constant bias or none."""
    return [
        op
        for op in graph.ops
        if isinstance(op, Conv | MatMul)
        and all(v in graph.constants for v in op.operands[1:])
        and all(is_quantized(v.type.element) for v in op.operands)
    ]


def _levels(graph: Graph) -> list[list[Layer]]:
    """The layers, those together that lie behind equally many others: each level depends on those before it."""
    depths: dict[Value, int] = {}
    levels: dict[int, list[Layer]] = {}
    layers = set(_layers(graph))
    for op in graph.ops:
        depth = max((depths.get(v, 0) for v in op.operands), default=0)
        if isinstance(op, Conv | MatMul) and op in layers:
            levels.setdefault(depth, []).append(op)
            depth += 1
        depths.update(dict.fromkeys(op.results, depth))
    return [levels[depth] for depth in sorted(levels)]


def _with_own_biases(graph: Graph, target: Target) -> Graph:
    """The graph in which each layer has a bias that nothing else reads, of zeros where it had none."""
    readers = sole_readers(graph)
    layers = set(_layers(graph))

    def visit(rewriter: Rewriter, op: Op) -> bool:
        if not isinstance(op, Conv | MatMul) or op not in layers:
            return False
        old = op.optional_operand(2)
        if old is not None and old in readers:
            return False
        name = f"{op.result.name}.bias" if old is None else old.name
        if old is None:
            source, weight = (_scales(v) for v in op.operands)
            steps = sum_scale(target, float(source), weight, op.sum_range).step
            channels = op.result.type.shape[1 if isinstance(op, Conv) else -1]
            kind = TensorType((channels,), bias_format(bias_storage(target), steps, target, name))
            zeros = np.zeros(kind.concrete(1), np.float32)
            own = Value(rewriter.fresh(name), kind, Interval(0.0, 0.0))
            data = Array(zeros, name)
        else:
            own, data = replace(old, name=rewriter.fresh(old.name)), graph.constants[old]
        rewriter.ops.append(Const(value=data, results=(own,)))
        operands = (*map(rewriter.get, op.operands[:2]), own)
        replace_chain(rewriter, op, op, operands, clip_of(op))
        return True

    return rewrite(graph, visit)


def _scales(value: Value) -> npt.NDArray[np.float32]:
    element = value.type.element
    assert isinstance(element, AffineType | FixedPointType)
    return scale_array(element).astype(np.float32)


def _with_biases(graph: Graph, biases: Mapping[Value, Vector]) -> Graph:
    def visit(rewriter: Rewriter, op: Op) -> bool:
        if not isinstance(op, Const) or op.result not in biases:
            return False
        data = biases[op.result].astype(np.float32)
        span = Interval(float(data.min(initial=np.inf)), float(data.max(initial=-np.inf)))
        rewriter.keep(op, [replace(op.result, range=span)], value=Array(data, op.value.name))
        return True

    return rewrite(graph, visit)


def _rounded(graph: Graph, target: Target) -> Graph:
    """The graph with the weights that legalize makes, as reals: evaluated, it rounds every value but them."""
    weights = {layer.operands[1]: layer for layer in _layers(graph)}

    def visit(rewriter: Rewriter, op: Op) -> bool:
        if not isinstance(op, Const) or op.result not in weights:
            return False
        real = replace(op.result, type=op.result.type.with_element(F32))
        data = _rounded_weight(weights[op.result], op.value.data, target)
        rewriter.keep(op, [real], value=Array(data, op.value.name))
        return True

    return rewrite(graph, visit)


def _rounded_weight(layer: Layer, data: Tensor, target: Target) -> Tensor:
    """Weights as the program has them, in float32."""
    weight = layer.operands[1]
    if uses_weights_alone(target, weight) and target.weight_only is not None:
        contract, axis = target.weight_only, block_axis(layer)
        integers, scales = quantize_blocks(data, axis, contract.block, contract.bits[0])
        spread = np.repeat(scales, contract.block, axis=axis).take(range(data.shape[axis]), axis=axis)
        return (integers.astype(np.float32) * spread).astype(np.float32)
    element = weight.type.element
    integers = quantize_array(data.astype(np.float32), element, QuantizeRule.DIVIDE, Rounding.HALF_AWAY)
    return dequantize_array(integers, element)


def _output(layer: Layer, source: Tensor, weight: Tensor) -> Vector:
    """The mean of each output channel without bias and activation: [channels]. A layer is linear, so that the mean of
    its inputs is all it takes.
    """
    bare = layer.with_changes(operands=layer.operands[:2], clip=None, unclipped=None)
    found = bare.compute(source.astype(np.float32), weight.astype(np.float32)).astype(np.float64)
    axis = 1 if isinstance(layer, Conv) else found.ndim - 1
    return np.asarray(found.mean(axis=tuple(i for i in range(found.ndim) if i != axis)), np.float64)


class _Averages:
    """Mean values of graphs over the feeds; shows how far its walks are."""

    def __init__(self, graph: Graph, feeds: Iterable[Feeds], context: PassContext, walks: int) -> None:
        self.real = map_values(
            graph, lambda v: {"type": v.type.with_element(F32)} if is_quantized(v.type.element) else {}, Stage.FLOAT
        )
        self._feeds = feeds
        self._progress = context.progress
        self._total = walks * len(feeds) if isinstance(feeds, Sized) else 0
        self._done = 0

    def of_inputs(self, graph: Graph, layers: Sequence[Layer]) -> dict[str, Vector]:
        """The mean over all samples of what these layers read, by name; a batch has size 1."""
        names = dict.fromkeys(layer.operands[0].name for layer in layers)
        outputs = tuple(v for v in graph.values() if v.name in names)
        part_graph = graph.with_changes(outputs=outputs, output_names=tuple(v.name for v in outputs))
        part_graph = part_graph.with_changes(ops=tuple(live_ops(part_graph)))
        sums: dict[str, Vector] = {}
        samples = 0
        for number, feed in enumerate(self._feeds):
            for part in parts_of(self.real, feed, number):
                size = next((len(part[v.name]) for v in graph.inputs if v.type.is_batched), 1)
                for value, array in evaluate(part_graph, part):
                    if value.name in names:
                        real = array.astype(np.float64)
                        added = real.sum(axis=0, keepdims=True) if value.type.is_batched else real * size
                        sums[value.name] = sums[value.name] + added if value.name in sums else added
                samples += size
            self._done += 1
            self._progress("correct-bias", self._done, self._total)
        if not samples:
            raise CalibrationError("calibration data is empty: give at least one feed with one sample")
        return {name: total / samples for name, total in sums.items()}
