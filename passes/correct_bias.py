"""correct-bias: the mean error that rounded weights leave in the output of each layer goes into its bias.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, appendix D: empirical bias
correction, each layer behind corrected ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from qir.ir import Graph, Stage, Value
from qir.ops.float_nn import Conv
from qir.pass_manager import Pass, PassContext
from qir.passes.layer_walk import Layer, LayerWalk, Tensor, layers_of, with_constants, with_own_parameters

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class CorrectBias(Pass):
    """Adds to the bias of each Conv and MatMul with constant weights what its output lacks on average, per channel.

    The averages are over the calibration feeds: of the graph in floating point, and of the same with weights and values
    rounded to their formats. Layers are corrected in order, each with those before it corrected already; a layer
    without a bias gets one. What the rounding of results by the target's own formula shifts is not seen.

    learn-rounding corrects biases too, and goes without this pass. Behind it, the weights that it chose would count as
    those of the model, and part of what it mended would be lost; in front of it, the biases that this pass has changed
    would count as the model's.

    Raises CalibrationError for no feeds, and for those that can be walked only once or do not fit.
    """

    name: ClassVar[str] = "correct-bias"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.TYPED})
    ensures: ClassVar[Stage | None] = Stage.TYPED

    def run(self, graph: Graph, context: PassContext) -> Graph:
        """The graph with other biases; the same object where no layer has quantized constant weights."""
        target = context.need_target(self.name)
        if not layers_of(graph):
            context.note("no layers to correct")
            return graph
        graph = with_own_parameters(graph, target)
        walk = LayerWalk(graph, target, context, self.name)
        biases: dict[Value, Tensor] = {}
        shares: list[Vector] = []
        for number, level in enumerate(walk.levels):
            wanted, found = _means(walk, number, level)
            for layer in level:
                source, bias = layer.operands[0], layer.operands[2]
                error = _output(layer, found[source], walk.weight(layer))
                error -= _output(layer, wanted[source], walk.weight(layer, Stage.FLOAT))
                biases[bias] = walk.bias(layer) - error
                walk.set_bias(layer, biases[bias])
                span = layer.sum_range
                if span is not None and span.hi > span.lo:
                    shares.append(np.abs(error) / float(span.hi - span.lo))
        share = float(np.concatenate(shares).mean()) if shares else 0.0
        context.note(f"{len(biases)} biases corrected; outputs were off by {share:.2%} of their range on average")
        return with_constants(graph, biases)


def _means(walk: LayerWalk, number: int, level: list[Layer]) -> tuple[dict[Value, Vector], dict[Value, Vector]]:
    """The means over all samples of what layers read, in floating point and rounded; a batch has size 1."""
    sources = dict.fromkeys(layer.operands[0] for layer in level)
    sums: tuple[dict[Value, Vector], dict[Value, Vector]] = ({}, {})
    for part in walk.inputs(number):
        for values, side in zip(part.sides, sums, strict=True):
            for source in sources:
                wide = values[source].astype(np.float64)
                added = wide.sum(axis=0, keepdims=True) if source.type.is_batched else wide * part.size
                side[source] = side[source] + added if source in side else added
    real, rounded = ({v: array / walk.samples for v, array in total.items()} for total in sums)
    return real, rounded


def _output(layer: Layer, source: Tensor, weight: Tensor) -> Vector:
    """The mean of each output channel without bias and activation: [channels]. A layer is linear, so that the mean of
    its inputs is all it takes.
    """
    bare = layer.with_changes(operands=layer.operands[:2], clip=None, unclipped=None)
    found = bare.compute(source.astype(np.float32), weight.astype(np.float32)).astype(np.float64)
    axis = 1 if isinstance(layer, Conv) else found.ndim - 1
    return np.asarray(found.mean(axis=tuple(i for i in range(found.ndim) if i != axis)), np.float64)
