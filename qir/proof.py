"""The range engine: what every integer value, and every partial sum on the way to it, can be. Exact throughout.

One forward walk applies each op's own transfer function (`Op.bounds`); an op without a rule gets the whole range of its
type and a diagnostic, so that unknown is never skipped.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qir.correlation import Correlations
from qir.errors import Diagnostic, QirError
from qir.fixed_point import Overflow
from qir.idle import is_idle, is_product_idle
from qir.interval import Bounds, Interval, bits_of_interval
from qir.ir import Graph, Op, OpBounds, Value
from qir.ops.constant import Const
from qir.types import storage_of

_FLOAT_PLACEHOLDER = Bounds.of(0, 0)


@dataclass(frozen=True)
class Proof:
    """Sound bounds of a fixed-stage graph.

    `bounds` holds every integer value, `steps` every op that has a rule, `diagnostics` a warning for each without.
    """

    bounds: Mapping[Value, Bounds]
    steps: Mapping[Op, OpBounds]
    diagnostics: tuple[Diagnostic, ...]

    def interval(self, value: Value) -> Interval | None:
        """The hull of an integer value; None for a float one."""
        bounds = self.bounds.get(value)
        return bounds.hull if bounds is not None else None


class Method(enum.StrEnum):
    """How bounds are worked out."""

    INTERVAL = "interval"  # each value by itself
    AFFINE = "affine"  # also as a linear function of others, so that what cancels or rejoins is seen; never wider


def prove(graph: Graph, method: str = Method.INTERVAL) -> Proof:
    """Bounds of every integer value of a fixed-stage graph, from the storage bounds of its inputs.

    A graph never changes, so its proof is worked out once by each method and kept on it: the verifier, the next pass
    and the program ask for the same one.
    """
    known: dict[Method, Proof] = graph.__dict__.setdefault("_proofs", {})
    kind = Method(method)
    if kind not in known:
        known[kind] = _prove(graph, Correlations() if kind is Method.AFFINE else None)
    return known[kind]


def claims_method(graph: Graph) -> Method:
    """The method that what the graph states rests on: intervals where they support all of it, else affine forms."""
    return Method.INTERVAL if next(false_claims(graph, prove(graph)), None) is None else Method.AFFINE


def prove_claims(graph: Graph) -> Proof:
    """The proof by the method that what the graph states rests on."""
    return prove(graph, claims_method(graph))


def _prove(graph: Graph, correlations: Correlations | None) -> Proof:
    bounds: dict[Value, Bounds] = {}
    steps: dict[Op, OpBounds] = {}
    diagnostics: list[Diagnostic] = []
    for value in graph.inputs:
        _whole_range(value, bounds)
    for op in graph.ops:
        step = None
        if not op.is_float:
            try:
                step = op.bounds([bounds.get(v, _FLOAT_PLACEHOLDER) for v in op.operands])
                if step is not None and correlations is not None:
                    step = correlations.tighten(op, bounds, step)
            except QirError as fault:
                raise QirError(f"{op.describe()}: its bounds cannot be worked out: {fault}") from fault
        if step is not None:
            steps[op] = step
            # The data of a constant are not those of what an op moves or picks from it.
            found = step.results if isinstance(op, Const) else [Bounds(b.lo, b.hi, None, b.step) for b in step.results]
            bounds.update(zip(op.results, found, strict=True))
            continue
        for value in op.results:
            _whole_range(value, bounds)
        if not op.is_float and any(v in bounds for v in op.results):
            message = "no range rule for these operands; its results are taken to span their whole type"
            diagnostics.append(Diagnostic(op.describe(), message, "warning"))
    integer = {v: b for v, b in bounds.items() if storage_of(v.type.element) is not None}
    return Proof(integer, steps, tuple(diagnostics))


def _whole_range(value: Value, bounds: dict[Value, Bounds]) -> None:
    storage = storage_of(value.type.element)
    if storage is not None:
        bounds[value] = Bounds.of(storage.lo, storage.hi)


def false_claims(graph: Graph, proof: Proof) -> Iterator[Diagnostic]:
    """Every fact that the graph states and the proof does not support; the type of a value is such a fact."""
    for value in graph.values():
        proved, storage = proof.interval(value), storage_of(value.type.element)
        if proved is None or storage is None:
            continue
        if not storage.lo <= proved.lo <= proved.hi <= storage.hi and value.type.sample_size:
            message = f"is {storage}, but [{proved.lo}, {proved.hi}] is what is proved; widen it, or requantize first"
            yield Diagnostic(f"%{value.name}", message)
        if value.range is None:
            continue
        if not (isinstance(value.range.lo, int) and isinstance(value.range.hi, int)):
            yield Diagnostic(f"%{value.name}", "a range at stage fixed is of integers")
        elif not value.range.contains(proved):
            yield Diagnostic(
                f"%{value.name}",
                f"states the range [{value.range.lo}, {value.range.hi}], but [{proved.lo}, {proved.hi}] is what is "
                "proved; re-run range-analysis",
            )
    for op in graph.ops:
        step = proof.steps.get(op)
        stated = getattr(op, "partial", None)
        if stated is not None and (step is None or step.partial is None or not stated.contains(step.partial)):
            proved_text = (
                "nothing" if step is None or step.partial is None else f"[{step.partial.lo}, {step.partial.hi}]"
            )
            yield Diagnostic(
                op.describe(),
                f"states partial sums in [{stated.lo}, {stated.hi}], but {proved_text} is what is proved; "
                "re-run range-analysis",
            )
        if getattr(op, "overflow", None) is Overflow.NONE and not is_idle(op, step):
            yield Diagnostic(op.describe(), "claims overflow=none, which is not proved; use saturate or wrap")
        if getattr(op, "product_overflow", None) is Overflow.NONE and not is_product_idle(op, step):
            yield Diagnostic(op.describe(), "claims product_overflow=none, which is not proved; use saturate or wrap")
        yield from _false_channel_bits(op, step)


def _false_channel_bits(op: Op, step: OpBounds | None) -> Iterator[Diagnostic]:
    """A finding where some channel's partial sums take more bits than are stated."""
    stated = getattr(op, "channel_bits", None)
    if stated is None:
        return
    proved = channel_bits(step)
    if proved is None or np.any(proved > stated.data):
        message = "states channel_bits that are not proved; leave them to minimize-accumulators"
        yield Diagnostic(op.describe(), message)


def channel_bits(step: OpBounds | None) -> npt.NDArray[np.int64] | None:
    """The bits that hold the proved partial sums of each output channel of an accumulating op."""
    if step is None or step.channel_partials is None:
        return None
    partials = step.channel_partials
    ends = zip(np.atleast_1d(partials.lo), np.atleast_1d(partials.hi), strict=True)
    return np.array([bits_of_interval(Interval(int(lo), int(hi))) for lo, hi in ends], np.int64)
