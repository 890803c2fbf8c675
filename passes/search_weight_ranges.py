"""search-weight-ranges: clips the ranges of weights where coarser steps cost more than what is cut off."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from qir.ir import Graph, Stage, Value
from qir.pass_manager import Pass, PassContext
from qir.passes.lattice import distance
from qir.passes.layer_inputs import DAMPING, Moments, has_rows, rows_of
from qir.passes.layer_walk import (
    Layer,
    LayerWalk,
    layers_of,
    nearest_reals,
    quantized_element,
    with_constants,
    with_own_parameters,
)
from qir.passes.lowering.weight_only import uses_weights_alone
from qir.passes.weight_formats import WeightForm, bias_type, check_percent, scale_of_type
from qir.target import Scales, Scheme, Target
from qir.types import QuantizedType, TensorType, scale_array, storage_of

Vector = npt.NDArray[np.float64]
Ends = tuple[Vector, Vector]
Cost = Callable[[QuantizedType], npt.NDArray[Any]]

_OCTAVES: Final = 4  # the tightest range tried is 2**-4 of the whole
_TRIED_PER_OCTAVE: Final = 8  # 1 where scales are powers of two
_ROUNDS: Final = 4  # of moving one end at a time, at most: neither moves any more after one or two
_PERCENT: Final = 99.9


class Method(enum.StrEnum):
    """What decides how much of a range of weights is cut off."""

    MSE = "mse"  # the least squared error of the rounded weights
    OUTPUT = "output"  # the least squared error that rounding to nearest makes in the output, its mean apart
    PERCENTILE = "percentile"  # so many percent of the weights are kept


@dataclass(frozen=True)
class SearchWeightRanges(Pass):
    """Gives constant weights of Conv and MatMul the scale that costs least, one a tensor or a channel as they have it.

    Tried are the whole range and parts of it down to a sixteenth, of affine weights on both ends and then on either
    alone; the widest of equals is taken. `method=output` weights errors by the covariance of what the weights multiply
    over the calibration feeds, damped as learn-rounding does by default; weights of rank 3 and more of MatMul, and
    those that meet an input without a batch, count as by `mse`. `percentile` keeps `percent` (99.9) of the weights, of
    affine ones as much on either side; few levels, whose scale is fitted already, are searched as by `mse`. No scale
    leaves sums less room than select-q-formats does; the type of the bias follows. What does not get better keeps its
    type, and weights that are quantized alone by blocks theirs.

    Raises PassError for a `percent` outside (0, 100] or with another method, and, by `output`, CalibrationError for no
    feeds, and for those that can be walked only once or do not fit.
    """

    name: ClassVar[str] = "search-weight-ranges"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.TYPED})
    ensures: ClassVar[Stage | None] = Stage.TYPED
    method: Method = Method.MSE
    percent: float | None = None

    def __post_init__(self) -> None:
        check_percent(self.percent, "method", self.method)

    def run(self, graph: Graph, context: PassContext) -> Graph:
        """The graph with other types of weights and biases; the same object where all stay."""
        target = context.need_target(self.name)
        owned = with_own_parameters(graph, target, bias=False)
        layers = [layer for layer in layers_of(owned) if not uses_weights_alone(target, layer.operands[1])]
        types: dict[Value, TensorType] = {}
        left: list[float] = []
        for layer, moments in self._with_moments(owned, layers, context, target):
            form = _form(owned, layer, target)
            cost = _cost(layer, form, moments)
            old = quantized_element(layer.operands[1])
            cuts = self._cuts and not form.is_fitted
            new = form.type_of(*(_percentile(form, self.percent or _PERCENT) if cuts else _search(form, cost)))
            before, after = float(cost(old).sum()), float(cost(new).sum())
            if cuts or after < before:
                types.update(_types(layer, new, target))
                left.append(after / before if before else 1.0)
            else:
                left.append(1.0)
        changed = sum(layer.operands[1] in types for layer in layers)
        share = f"; squared error {np.mean(left):.0%} of before on average" if left else ""
        context.note(f"{changed} of {len(layers)} weights have other scales by {self.method}{share}")
        return with_constants(owned, {}, types) if types else graph

    @property
    def _cuts(self) -> bool:
        return self.method == Method.PERCENTILE

    def _with_moments(
        self, graph: Graph, layers: Sequence[Layer], context: PassContext, target: Target
    ) -> Iterator[tuple[Layer, Moments | None]]:
        """The layers, each with the moments of what it reads in floating point where they serve."""
        if self.method != Method.OUTPUT:
            yield from ((layer, None) for layer in layers)
            return
        walk = LayerWalk(graph, target, context, self.name, rounded=False)
        for number, level in enumerate(walk.levels):
            chosen = [layer for layer in level if layer in layers]
            found = {layer: Moments(layer, walk.samples) for layer in chosen if has_rows(layer)}
            for part in walk.inputs(number):
                for moments in found.values():
                    moments.add(part)
            yield from ((layer, found.get(layer)) for layer in chosen)


def _form(graph: Graph, layer: Layer, target: Target) -> WeightForm:
    weight, bias = layer.operands[1], layer.optional_operand(2)
    storage = storage_of(weight.type.element)
    assert storage is not None
    added = None if bias is None else graph.constants[bias]
    return WeightForm.of(layer, graph.constants[weight], added, scale_of_type(layer.operands[0].type), storage, target)


def _types(layer: Layer, element: QuantizedType, target: Target) -> dict[Value, TensorType]:
    """The types of weights and bias of a layer where that of the weights is this one."""
    source, weight, *biases = layer.operands
    found = {weight: weight.type.with_element(element)}
    for bias in biases:
        storage = storage_of(bias.type.element)
        assert storage is not None
        kind = bias_type(layer, scale_of_type(source.type), scale_array(element), storage, target, bias.name)
        found[bias] = bias.type.with_element(kind)
    return found


def _cost(layer: Layer, form: WeightForm, moments: Moments | None) -> Cost:
    """What weights of a type cost: a number for each channel that has a scale, or one for the tensor."""
    data = form.data.data

    def of_weights(element: QuantizedType) -> npt.NDArray[Any]:
        error = nearest_reals(data, element).astype(np.float64) - data
        return np.asarray((error * error).sum(axis=form.others))

    if moments is None:
        return of_weights
    metric = moments.covariances(DAMPING)[1]
    rows = rows_of(layer, data).astype(np.float64)

    def of_outputs(element: QuantizedType) -> npt.NDArray[Any]:
        rounded = nearest_reals(data, element).astype(np.float64)
        found = distance(rows_of(layer, rounded), rows, metric).reshape(-1)
        return found if form.axis is not None else np.asarray(found.sum())

    return of_outputs


def _search(form: WeightForm, cost: Cost) -> Ends:
    """The part of each range that costs least."""
    count = _OCTAVES * (1 if form.target.weights.scales is Scales.POWER_OF_TWO else _TRIED_PER_OCTAVE)
    factors = 2.0 ** (-_OCTAVES * np.arange(count + 1) / count)
    low, high = whole = form.ends()

    def best(lows: Sequence[Vector], highs: Sequence[Vector]) -> Vector:
        costs = np.array([cost(form.type_of(*ends)) for ends in zip(lows, highs, strict=True)])
        return np.asarray(factors[costs.argmin(axis=0)])

    lows, highs = [low * f for f in factors], [high * f for f in factors]
    factor = best(lows, highs)
    low, high = low * factor, high * factor
    for _ in range(_ROUNDS if form.target.weights.scheme is Scheme.AFFINE else 0):
        before = low, high
        high = whole[1] * best([low] * len(factors), highs)
        low = whole[0] * best(lows, [high] * len(factors))
        if np.array_equal(before, (low, high)):
            break
    return low, high


def _percentile(form: WeightForm, percent: float) -> Ends:
    """The least range that leaves out at most the rest of the weights: by magnitude, or half of it on either side."""

    def reach(reals: Vector, share: float) -> Vector:
        return np.maximum(np.quantile(reals, share, axis=form.others, method="inverted_cdf"), 0.0)

    low, high = form.ends()
    data = form.data.data.astype(np.float64)
    if form.target.weights.scheme is Scheme.AFFINE:
        share = (100 + percent) / 200
        least, greatest = -reach(-data, share), reach(data, share)
    else:
        largest = reach(np.abs(data), percent / 100)
        least, greatest = np.maximum(low, -largest), np.minimum(high, largest)
    nothing = (least == 0) & (greatest == 0)  # so many zeros are no range: the whole stays
    return np.where(nothing, low, least), np.where(nothing, high, greatest)
