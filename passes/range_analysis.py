"""range-analysis: an interval for every value, calibrated on reals and proved on integers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from qir.calibration import Histogram
from qir.errors import CalibrationError, Diagnostic, PassError
from qir.interval import Interval, bits_of_interval
from qir.ir import Graph, Op, Stage, Value
from qir.observers import Observer, observer_from_string
from qir.ops.accumulate import Accumulating
from qir.ops.constant import Const
from qir.pass_manager import Pass, PassContext
from qir.proof import Method, Proof, prove
from qir.rewrite import map_values
from qir.types import FloatType


@dataclass(frozen=True)
class RangeAnalysis(Pass):
    """Writes the range of each value.

    At stage `float` a real value gets what `observer` makes of its histogram, cut to what its op can give for operands
    within their ranges; the graph becomes `ranged`. At stage `fixed` an integer value gets its proved bounds, and an
    accumulating op those of its partial sums; the calibration plays no part.

    `method` says how integers are bounded: `interval`, each by itself, or `affine`, also as a linear function of
    others, so that what cancels or rejoins is seen (`x - mean(x)`); never wider, and slower. `observer` is the name of
    an observer with its options behind colons: `minmax`, `percentile:percent=99.9`, `entropy`,
    `mse:levels=16:symmetric=True`. Raises PassError for another method and CalibrationError for another observer.
    """

    method: str = Method.INTERVAL
    observer: str = "minmax"
    name: ClassVar[str] = "range-analysis"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.FLOAT, Stage.FIXED})

    def __post_init__(self) -> None:
        if self.method not in tuple(Method):
            raise PassError(f"range-analysis has no method {self.method!r}; there are: {', '.join(Method)}")
        self.chosen_observer()

    def chosen_observer(self) -> Observer:
        """The observer that the option names."""
        name, *options = self.observer.split(":")
        return observer_from_string(f"{name}{{{','.join(options)}}}" if options else name)

    def run(self, graph: Graph, context: PassContext) -> Graph:
        """The graph with ranges; the same object where they stand already."""
        return self._proved(graph, context) if graph.stage is Stage.FIXED else self._calibrated(graph, context)

    def _calibrated(self, graph: Graph, context: PassContext) -> Graph:
        observer = self.chosen_observer()
        ranges: dict[Value, Interval] = {}
        for value in graph.inputs:
            if isinstance(value.type.element, FloatType):
                ranges[value] = _observed(value, observer)
        cut = 0
        for op in graph.ops:
            possible = _possible(op, ranges)
            for place, value in enumerate(op.results):
                if not isinstance(value.type.element, FloatType):
                    continue
                bound = possible[place] if possible else None
                if isinstance(op, Const) and bound is not None:
                    ranges[value] = bound
                    continue
                observed = _observed(value, observer)
                # Disjoint only where an observer clipped: the quantized program then gives what the op can give.
                ranges[value] = (observed.intersect(bound) or bound) if bound is not None else observed
                cut += ranges[value] != observed
        context.note(f"{len(ranges)} values ranged by {observer}, {cut} cut to what their op can give")
        return map_values(graph, lambda v: {"range": ranges[v]} if v in ranges else {}, Stage.RANGED)

    def _proved(self, graph: Graph, context: PassContext) -> Graph:
        proof = prove(graph, self.method)
        context.diagnostics.extend(proof.diagnostics)
        found = f"{len(proof.bounds)} integer ranges proved"
        if self.method == Method.AFFINE:
            found += f", {sum(bool(s.sources) for s in proof.steps.values())} of them tighter by affine forms"
        context.note(found)
        widest = max((bits_of_interval(p) for op in graph.ops if (p := _partial(op, proof)) is not None), default=0)
        if widest:
            context.note(f"the widest partial sum takes {widest} bits")
        context.diagnostics.extend(_constant_outputs(graph, proof))
        if not any(_facts(v, proof) for v in graph.values()) and not any(_sums(op, proof) for op in graph.ops):
            return graph
        return map_values(graph, lambda v: _facts(v, proof), attributes=lambda op: _sums(op, proof))


def _constant_outputs(graph: Graph, proof: Proof) -> Iterator[Diagnostic]:
    """A warning for each output that no input changes, which formats that leave too few bits make of a model."""
    for value in dict.fromkeys(graph.outputs):
        bounds = proof.bounds.get(value)
        is_fixed = bounds is not None and bounds.lo.size and bool((bounds.lo == bounds.hi).all())
        if is_fixed and bounds is not None and graph.inputs and value.type.sample_size:
            message = f"is [{bounds.hull.lo}, {bounds.hull.hi}] whatever the inputs are"
            mend = "give the values before it more bits, or finer scales"
            yield Diagnostic(f"output %{value.name}", f"{message}; {mend}", "warning")


def _facts(value: Value, proof: Proof) -> Mapping[str, Any]:
    """The proved range where it differs from the stated one."""
    proved = proof.interval(value)
    return {} if proved is None or proved == value.range else {"range": proved}


def _partial(op: Op, proof: Proof) -> Interval | None:
    step = proof.steps.get(op)
    return step.partial if step is not None and isinstance(op, Accumulating) else None


def _sums(op: Op, proof: Proof) -> Mapping[str, Any]:
    """The proved partial sums where they differ from the stated ones."""
    proved = _partial(op, proof)
    return {} if proved is None or proved == getattr(op, "partial", None) else {"partial": proved}


def _observed(value: Value, observer: Observer) -> Interval:
    if value.histogram is None:
        raise CalibrationError(f"%{value.name} has no histogram; run calibrate before range-analysis")
    try:
        lo, hi = observer.range(Histogram.from_array(value.histogram.data))
    except CalibrationError as fault:
        raise CalibrationError(f"%{value.name}: {fault}") from fault
    return Interval(lo, hi)


def _possible(op: Op, ranges: Mapping[Value, Interval]) -> tuple[Interval, ...] | None:
    """What an op can give for operands within their ranges; None where nothing is known."""
    known = [ranges[v] for v in op.operands if v in ranges]
    return op.real_range(known) if len(known) == len(op.operands) else None
