"""One model on several targets: how each layer differs from the first target's, on the same inputs, and by which rule.

A layer is an op of the typed graph. It is replayed on every other target on the integers that the first target has
there, so that a difference is the layer's own and not that of the layers before it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from qir.backend import target_of
from qir.calibration import Calibration
from qir.comparison.attribution import Cause, find_cause, type_cause
from qir.comparison.replay import Side, Tensor, Values, make_side, onnx_layout, reals, replay, same_step, steps
from qir.comparison.result import Comparison, Gap, LayerComparison, OutputComparison, TargetComparison
from qir.comparison.swaps import Rule
from qir.errors import PassError, QirError, RunError
from qir.frontend.onnx_import import import_onnx
from qir.interpreter import check_feeds, evaluate_op, interpret
from qir.ir import Graph, Value
from qir.ops.constant import Const
from qir.ops.fixed_rescale import dequantize_array, quantize_array
from qir.pass_manager import Feeds, PassContext, Progress, no_progress
from qir.passes.pipelines import default_pipeline
from qir.printer import element_text
from qir.target import Target
from qir.types import ElementType, is_quantized, storage_of
from qir.verifier import verify

_CHUNK: Final = 32  # samples replayed at a time
Named = Mapping[str, Tensor]


def compare(
    graph: Graph | str | os.PathLike[str],
    targets: Sequence[Target | str | os.PathLike[str]],
    calibration: Iterable[Feeds] | Calibration | None = None,
    inputs: Iterable[Feeds] | None = None,
    *,
    samples: int = 64,
    progress: Progress = no_progress,
) -> Comparison:
    """How a model (a float graph, or the path of an ONNX file) on other targets differs from what it is on the first.

    Targets are at least two, given as such, by name or by path. All are calibrated on the same data; `inputs` are feeds
    as of calibration, of which the first `samples` samples are replayed, by default those of the calibration.

    Raises a QirError as `qir.compile` does, and where targets are too few, of one name, or cannot compile the model.
    """
    source = graph if isinstance(graph, Graph) else import_onnx(graph)
    contracts = _contracts(targets)
    verify(source)
    if inputs is None and isinstance(calibration, Calibration):
        raise RunError("a Calibration holds no samples to compare on; pass inputs=[{input name: array}, ...]")
    if inputs is None and calibration is not None and not isinstance(calibration, Mapping):
        calibration = inputs = list(calibration)
    feeds = [] if inputs is None else list(_parts(source, inputs, samples))
    tally = _Tallies(source, list(_sides(source, contracts, calibration, progress)))
    for number, feed in enumerate(feeds):
        for done in tally.add(feed):
            progress("compare", number * len(contracts) + done, len(feeds) * len(contracts))
    return tally.finished()


def _contracts(targets: Sequence[Target | str | os.PathLike[str]]) -> list[Target]:
    if isinstance(targets, str) or len(targets) < 2:
        raise QirError("compare takes at least two targets, the first of which the others are compared with")
    found = [target_of(t) for t in targets]
    names = [t.name for t in found]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise QirError(
            f"two of the targets are named {twice!r}; give each target once, and contracts names of their own"
        )
    return found


def _parts(graph: Graph, inputs: Iterable[Feeds], samples: int) -> Iterator[dict[str, Tensor]]:
    """The first samples in chunks of the batch. Raises RunError where there are none or they do not fit."""
    if samples < 1:
        raise RunError(f"the number of samples to compare on is at least 1, not {samples}")
    left = samples
    for number, feed in enumerate(inputs):
        if left <= 0:
            return
        try:
            arrays = check_feeds(graph.inputs, feed)
        except RunError as fault:
            raise RunError(f"samples to compare on, feed {number}: {fault}") from fault
        size = _samples(arrays)
        is_open = any(v.type.is_batched for v in graph.inputs)
        taken = min(size, left) if is_open else size
        left -= taken
        for start in range(0, taken, _CHUNK) if is_open else (0,):
            part = slice(start, min(start + _CHUNK, taken))
            yield {v.name: a[part] if v.type.is_batched else a for v, a in arrays.items()}
    if left == samples:
        raise RunError("there are no samples to compare on; give at least one")


def _samples(arrays: Mapping[Value, Tensor]) -> int:
    """The size of the batch, open or fixed."""
    batched = next((a for v, a in arrays.items() if v.type.is_batched), None)
    found = batched if batched is not None else next(iter(arrays.values()), np.zeros(()))
    return len(found) if found.ndim else 1


def _sides(
    source: Graph, contracts: Sequence[Target], calibration: Iterable[Feeds] | Calibration | None, progress: Progress
) -> Iterator[Side]:
    """The graph on each target; up to the widths, which are a target's own, all are one."""
    pipeline = default_pipeline()
    widths = pipeline.position("assign-bit-widths")
    ranged = pipeline[:widths].run(source, PassContext(None, calibration, progress))
    if all(isinstance(op, Const) for op in ranged.ops):
        raise PassError(f"graph @{source.name} has no op left to compare; what it returns is an input or constant")
    for number, target in enumerate(contracts):
        progress(f"compile for {target.name}", number, len(contracts))
        try:
            typed = pipeline[widths : pipeline.position("legalize")].run(ranged, PassContext(target))
            yield make_side(typed, target)
        except QirError as fault:
            raise PassError(f"{target.name} cannot take the model: {fault}") from fault


@dataclass
class _Tally:
    """Sums over chunks of what a Gap says."""

    elements: int = 0
    differing: int = 0
    largest: float = 0
    signal: float = 0.0
    noise: float = 0.0
    has_one_step: bool = True

    def add(self, left: Tensor, ours: ElementType, right: Tensor, theirs: ElementType) -> bool:
        """Count data of the first target and of another; whether they differ."""
        self.elements += left.size
        self.add_reals(reals(left, ours), reals(right, theirs))
        if not same_step(ours, theirs):
            self.has_one_step = False
            return True
        gap = np.abs(steps(left, ours) - steps(right, theirs))
        self.differing += int(np.count_nonzero(gap))
        self.largest = max(self.largest, gap.max(initial=0).item())
        return bool(gap.any())

    def add_reals(self, reference: Tensor, found: Tensor) -> None:
        """Count the reals alone."""
        known = reference.astype(np.float64)
        finite = np.isfinite(known) & np.isfinite(found)
        self.signal += float(np.square(known, where=finite, out=np.zeros_like(known)).sum())
        self.noise += float(np.square(np.subtract(found, known, where=finite, out=np.zeros_like(known))).sum())

    @property
    def sqnr(self) -> float:
        """The signal-to-noise ratio in dB."""
        if not self.noise:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    def gap(self) -> Gap:
        """What was counted."""
        if not self.has_one_step:
            return Gap(self.elements, None, None, self.sqnr)
        return Gap(self.elements, self.differing, self.largest, self.sqnr)


@dataclass
class _Layer:
    """What is counted of a layer on another target."""

    gap: _Tally = field(default_factory=_Tally)
    accumulated: _Tally = field(default_factory=_Tally)
    to_float: tuple[_Tally, _Tally] = field(default_factory=lambda: (_Tally(), _Tally()))
    cause: Cause | None = None


@dataclass
class _Output:
    """What is counted of an output on a target."""

    gap: _Tally = field(default_factory=_Tally)
    to_float: _Tally = field(default_factory=_Tally)
    choices: int = 0
    same: int = 0
    same_float: int = 0


class _Tallies:
    """All that is counted, chunk by chunk."""

    def __init__(self, source: Graph, sides: Sequence[Side]) -> None:
        self.source, self.first, self.others = source, sides[0], sides[1:]
        self.samples = 0
        self.inputs = [v.name for v in self.first.typed.inputs if is_quantized(v.type.element)]
        self.layers = [{n: _Layer() for n in (*self.inputs, *self.first.segments)} for _ in self.others]
        outputs = zip(self.first.typed.output_names, self.first.typed.outputs, strict=True)
        self.outputs = {name: v.name for name, v in outputs if v.name in self.first.places}
        self.ends = [{name: _Output() for name in self.outputs} for _ in sides]

    def add(self, feed: Named) -> Iterator[int]:
        """Replay a chunk of samples; yields the number of targets that are done."""
        self.samples += _samples({v: feed[v.name] for v in self.source.inputs})
        traced = self.first.trace(feed)
        floats = interpret(self.source, feed)
        reference = {name: self._reference(name, traced) for name in self.first.segments}
        self._ends(self.ends[0], self.first, traced, traced, floats)
        yield 1
        for number, (other, layers) in enumerate(zip(self.others, self.layers, strict=True)):
            own = other.trace(feed)
            self._ends(self.ends[number + 1], other, traced, own, floats)
            for name in self.inputs:
                self._input(layers[name], other, name, feed[name], traced, own)
            for name, replayed in replay(self.first, traced, other).items():
                self._layer(layers[name], other, name, traced, replayed, own, reference[name])
            yield number + 2

    def _at(self, side: Side, name: str, values: Mapping[Value, Tensor]) -> tuple[Tensor, ElementType]:
        place = side.places[name]
        return onnx_layout(values[place.value], place.last), place.value.type.element

    def _reference(self, name: str, traced: Values) -> Tensor:
        """The layer in float32 on the reals that enter it on the first target."""
        op, constants = self.first.segments[name].layer, self.first.typed.constants
        operands = []
        for value in op.operands:
            if value in constants:
                operands.append(constants[value].data)
            else:
                array, element = self._at(self.first, value.name, traced)
                operands.append(dequantize_array(array, element) if is_quantized(element) else array)
        return evaluate_op(op, operands)[0]

    def _layer(
        self,
        layer: _Layer,
        other: Side,
        name: str,
        traced: Values,
        replayed: Values,
        own: Values,
        reference: Tensor,
    ) -> None:
        ours, left = self._at(self.first, name, traced)
        theirs, right = self._at(other, name, replayed)
        differs = layer.gap.add(ours, left, theirs, right)
        layer.accumulated.add(ours, left, *self._at(other, name, own))
        layer.to_float[0].add_reals(reference, reals(ours, left))
        layer.to_float[1].add_reals(reference, reals(theirs, right))
        if differs:
            layer.cause = find_cause(self.first, traced, other, replayed, name, layer.cause)

    def _input(self, layer: _Layer, other: Side, name: str, given: Tensor, traced: Values, own: Values) -> None:
        ours, left = self._at(self.first, name, traced)
        theirs, right = self._at(other, name, own)
        layer.accumulated.add(ours, left, theirs, right)
        layer.to_float[0].add_reals(given, reals(ours, left))
        layer.to_float[1].add_reals(given, reals(theirs, right))
        if layer.gap.add(ours, left, theirs, right) and layer.cause is None:
            layer.cause = _border_cause(self.first.target, other.target, name, given, ours, (left, right))

    def _ends(self, ends: Mapping[str, _Output], side: Side, traced: Values, own: Values, floats: Named) -> None:
        for name, end in ends.items():
            ours, left = self._at(self.first, self.outputs[name], traced)
            theirs, right = self._at(side, self.outputs[name], own)
            end.gap.add(ours, left, theirs, right)
            end.to_float.add_reals(floats[name], reals(theirs, right))
            choices = [_choices(array, kind) for array, kind in ((theirs, right), (ours, left), (floats[name], right))]
            if choices[0] is not None:
                end.choices += choices[0].size
                end.same += int(np.count_nonzero(choices[0] == choices[1]))
                end.same_float += int(np.count_nonzero(choices[0] == choices[2]))

    def finished(self) -> Comparison:
        """What was counted."""
        names = tuple(side.target.name for side in (self.first, *self.others))
        outputs = [
            self._output(side, name, end)
            for side, ends in zip((self.first, *self.others), self.ends, strict=True)
            for name, end in ends.items()
        ]
        others = [
            TargetComparison(side.target.name, tuple(self._finished(side, n, layer) for n, layer in layers.items()))
            for side, layers in zip(self.others, self.layers, strict=True)
        ]
        return Comparison(self.source.name, self.samples, names, tuple(outputs), tuple(others))

    def _output(self, side: Side, name: str, end: _Output) -> OutputComparison:
        element = side.places[self.outputs[name]].value.type.element
        has_reals = storage_of(element) is None or is_quantized(element)
        sqnr = end.to_float.sqnr if has_reals else None
        same, same_float = (end.same, end.same_float) if end.choices else (None, None)
        return OutputComparison(side.target.name, name, end.gap.gap(), sqnr, end.choices, same, same_float)

    def _finished(self, side: Side, name: str, layer: _Layer) -> LayerComparison:
        kinds = [s.places[name].value.type.element for s in (self.first, side)]
        gap, segment = layer.gap.gap(), self.first.segments.get(name)
        has_reals = all(is_quantized(kind) or storage_of(kind) is None for kind in kinds)
        return LayerComparison(
            name,
            segment.layer.location if segment is not None else "",
            segment.layer.mnemonic if segment is not None else "input",
            (element_text(kinds[0]), element_text(kinds[1])),
            gap,
            layer.accumulated.gap(),
            (layer.to_float[0].sqnr, layer.to_float[1].sqnr) if has_reals else None,
            None if gap.is_none else layer.cause,
        )


def _choices(array: Tensor, element: ElementType) -> Tensor | None:
    """What an output decides: the greatest of several classes [N, C], or the integers that it is; None for others."""
    if storage_of(element) is not None and not is_quantized(element):
        return array
    return array.argmax(axis=1) if array.ndim == 2 and array.shape[1] > 1 else None


def _border_cause(
    first: Target, other: Target, name: str, given: Tensor, ours: Tensor, kinds: tuple[ElementType, ElementType]
) -> Cause:
    """Why a real input becomes other integers: their types, how they are rounded, or the bounds that they must fit."""
    left, right = kinds
    if not same_step(left, right):
        return type_cause(left, right, "quantize", name)
    rules = first.input, other.input
    words = [(str(a), str(b)) for a, b in ((r.rule, r.rounding) for r in rules)]
    details = [f"{a} / {b}" for a, b in zip(*words, strict=True) if a != b]
    swapped = quantize_array(given, right, rules[0].rule, rules[0].rounding)
    if details and np.array_equal(steps(swapped, right), steps(ours, left)):
        return Cause("quantize", name, (Rule.ROUNDING,), ", ".join(details), True)
    bounds = f"{storage_of(left)} / {storage_of(right)}"
    return Cause("quantize", name, (*([Rule.ROUNDING] if details else []), Rule.SATURATION), bounds, not details)
