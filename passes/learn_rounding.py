"""learn-rounding: which integer each weight becomes is chosen for the output of its layer, not for the weight.

The objective is that of Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020, section
3.2, with the inputs of layers behind rounded ones (section 3.4); it is a quadratic form, and integers are found by
rounding in turn and coordinate descent instead of gradients: without chance, and in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from qir.errors import PassError
from qir.ir import Graph, Stage, Value
from qir.ops.fixed_rescale import dequantize_array
from qir.pass_manager import Pass, PassContext
from qir.passes.lattice import distance, nearest_integers
from qir.passes.layer_inputs import DAMPING, Moments, from_rows, has_rows, rows_of
from qir.passes.layer_walk import (
    Layer,
    LayerWalk,
    Tensor,
    integers_of,
    layers_of,
    quantized_element,
    with_constants,
    with_own_parameters,
)
from qir.passes.lowering.weight_only import uses_weights_alone
from qir.target import Target
from qir.types import scale_array, zero_array

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LearnRounding(Pass):
    """Chooses the integers of the weights of each Conv and MatMul so that its output over the feeds is near.

    For every output channel that is the least E[(w x - v y - c)^2] over the allowed integers of v and over c, which is
    added to the bias: w are the weights, x the inputs in floating point, v the rounded weights, y the inputs behind
    layers rounded already. Layers go in order, so that each mends what those before it have left; one without a bias
    gets one. On the calibration feeds no layer comes out farther than by rounding to nearest with its bias corrected.

    `damping` adds that multiple of the mean variance of the inputs, times the square of v - w: what the feeds hardly
    excite would else move freely, and with fewer samples than weights the form has no single minimum.

    The weights become the reals of their integers, so that legalize finds those again; passes behind this one see no
    others. What stands in the graph counts as the model in floating point: biases that correct-bias has changed, for
    weights rounded to nearest, would be wrong, so that it does not stand in front.

    Weights that are quantized alone by blocks stay as they are, since legalize makes their scales anew, as do MatMul's
    weights of rank 3 and more and those that meet an input without a batch.

    Raises PassError for a damping outside [1e-6, 1e6], CalibrationError for no feeds, and for those that can be walked
    only once or do not fit.
    """

    name: ClassVar[str] = "learn-rounding"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.TYPED})
    ensures: ClassVar[Stage | None] = Stage.TYPED
    damping: float = DAMPING

    def __post_init__(self) -> None:
        if not 1e-6 <= self.damping <= 1e6:
            raise PassError(f"damping={self.damping} must be from 1e-6 to 1e6")

    def run(self, graph: Graph, context: PassContext) -> Graph:
        """The graph with other weights and biases; the same object where no layer has weights to learn."""
        target = context.need_target(self.name)
        if not any(_learns(layer, target) for layer in layers_of(graph)):
            context.note("no weights to learn")
            return graph
        graph = with_own_parameters(graph, target)
        walk = LayerWalk(graph, target, context, self.name)
        data: dict[Value, Tensor] = {}
        kept, moved, total = list[Vector](), 0, 0
        for number, level in enumerate(walk.levels):
            moments = {layer: Moments(layer, walk.samples) for layer in level if _learns(layer, target)}
            for part in walk.inputs(number):
                for found in moments.values():
                    found.add(part)
            for layer, found in moments.items():
                learned = self._learned(layer, walk, found)
                _, weight, bias = layer.operands
                data[weight], data[bias] = learned.weight, learned.bias
                walk.set_weight(layer, learned.weight)
                walk.set_bias(layer, learned.bias)
                kept.append(learned.kept)
                moved, total = moved + learned.moved, total + learned.weight.size
        share = float(np.concatenate(kept).mean())
        context.note(
            f"{moved} of {total} weights moved from the nearest integer; what rounding costs outputs is "
            f"{share:.0%} of before on average"
        )
        return with_constants(graph, data)

    def _learned(self, layer: Layer, walk: LayerWalk, moments: Moments) -> _Learned:
        """What becomes of one layer. In units of its steps, the metric is the same for all outputs of a group."""
        element = quantized_element(layer.operands[1])
        real = walk.weight(layer, Stage.FLOAT)
        rows = rows_of(layer, real).astype(np.float64)
        crossed, metric = moments.covariances(self.damping)
        # Without integers, this is the best there is: the slope is 0.
        best = np.linalg.solve(metric, crossed @ rows.transpose(0, 2, 1)).transpose(0, 2, 1)
        scales, zeros = (
            np.broadcast_to(a, rows[..., 0].size).reshape(*rows.shape[:2], 1)
            for a in (scale_array(element), zero_array(element))
        )
        wanted: Vector = np.asarray(best / scales + zeros, np.float64)
        start = rows_of(layer, integers_of(real, element)).astype(np.float64)
        found = nearest_integers(wanted, metric, start, element.storage)
        before, after = (distance(q, wanted, metric) for q in (start, found))
        reals = dequantize_array(from_rows(layer, found).astype(np.int64), element)
        source, rounded = moments.means
        lacking = (rows * source - rows_of(layer, reals) * rounded).sum(axis=-1)
        return _Learned(
            weight=reals,
            bias=walk.bias(layer) + lacking.reshape(-1),
            moved=int((found != start).sum()),
            kept=(after / np.where(before > 0, before, 1.0)).reshape(-1),
        )


@dataclass(frozen=True, eq=False)
class _Learned:
    """What a layer gets; of each output, what part of the error by rounding is left; how many integers moved."""

    weight: Tensor
    bias: Vector
    moved: int
    kept: Vector


def _learns(layer: Layer, target: Target) -> bool:
    return has_rows(layer) and not uses_weights_alone(target, layer.operands[1])
