"""insert-saturation: overflow handling where values may overflow and nowhere else; repairs for sums where so asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from qir.errors import Diagnostic, PassError
from qir.fixed_point import Overflow
from qir.idle import is_idle, is_product_idle, overflow_room
from qir.ir import Graph, Op, Stage
from qir.ops.accumulate import STEPWISE, Accumulating
from qir.pass_manager import Pass, PassContext
from qir.passes.dead_clamps import remove_dead_clamps
from qir.passes.range_analysis import RangeAnalysis
from qir.passes.repairs.ladder import Repair, repair_accumulators
from qir.proof import Proof, claims_method, prove
from qir.rewrite import map_values


@dataclass(frozen=True)
class InsertSaturation(Pass):
    """Writes `overflow=none` exactly where the proof shows that no value of the op, or partial sum, overflows.

    Clamps that no output depends on are removed with their bounds.
    `repair` says how far to go for a sum that may overflow: each rung up to it is tried in order, but those in `skip`,
    and the first after which the sum is proved not to overflow is taken. With `prove` every output keeps its bits; a
    repair changes results where sums overflowed, or weights did not fit.
    """

    name: ClassVar[str] = "insert-saturation"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.FIXED})
    ensures: ClassVar[Stage] = Stage.FIXED

    repair: Repair = Repair.PROVE
    skip: tuple[Repair, ...] = ()

    def __post_init__(self) -> None:
        if Repair.PROVE in self.skip:
            raise PassError("a proof is not skipped; skip widen, split, narrow or saturate")
        rungs = list(Repair)
        beyond = [r for r in self.skip if rungs.index(r) > rungs.index(self.repair)]
        if beyond:
            raise PassError(f"skip={beyond[0]} leaves nothing out of repair={self.repair}; skip what comes before it")

    @property
    def preserves_bits(self) -> bool:
        """Only repairs change bits."""
        return self.repair is Repair.PROVE

    def run(self, graph: Graph, context: PassContext) -> Graph:
        """The graph with idle overflow handling turned off; the same object where nothing changes.

        Warns of each op whose sums may still overflow.
        """
        stepwise = any(isinstance(op, Accumulating) and op.overflow in STEPWISE for op in graph.ops)
        method = claims_method(graph)
        graph = remove_dead_clamps(graph, method, context)
        if self.repair is not Repair.PROVE:
            target = context.need_target(self.name)
            repaired = repair_accumulators(graph, target, self.repair, self.skip, method, context)
            graph = graph if repaired is graph else RangeAnalysis(method).run(repaired, PassContext())
        proof = prove(graph, method)
        self._report(graph, proof, stepwise, context)
        idle = _idle(graph, proof, context)
        return map_values(graph, lambda value: {}, attributes=lambda op: idle.get(op, {})) if idle else graph

    def _report(self, graph: Graph, proof: Proof, stepwise: bool, context: PassContext) -> None:
        """How many layers are proved, and a warning for each that is not."""
        layers = [op for op in graph.ops if isinstance(op, Accumulating)]
        open_ones = [op for op in layers if not is_idle(op, proof.steps.get(op))]
        if layers:
            fault = "step-wise saturation" if stepwise else "overflow"
            context.note(f"{len(layers) - len(open_ones)} of {len(layers)} layers are proved free of {fault}")
        for op in open_ones:
            if self.repair is not Repair.SATURATE or op.overflow not in STEPWISE:
                message = f"{_fault(op, proof)}; {self._mend()}; qir check shows such an input"
                context.diagnostics.append(Diagnostic(op.describe(), message, "warning"))

    def _mend(self) -> str:
        """The rungs that were not tried; there is one where a sum may still overflow, for steps can always saturate."""
        rungs = list(Repair)
        first, *rest = [r for r in rungs if r in self.skip or rungs.index(r) > rungs.index(self.repair)]
        return f"repair it by insert-saturation{{repair={first}}}{', or ' * bool(rest)}{', '.join(rest)}"


def _idle(graph: Graph, proof: Proof, context: PassContext) -> Mapping[Op, Mapping[str, Any]]:
    """The overflow handling of each op that is proved idle, turned off; notes how much of each mode is."""
    idle: dict[Op, dict[str, Any]] = {}
    kept: Counter[str] = Counter()
    proved: Counter[str] = Counter()
    for op in graph.ops:
        for name, is_proved in (("overflow", is_idle), ("product_overflow", is_product_idle)):
            overflow = getattr(op, name, None)
            if overflow in (None, Overflow.NONE):
                continue
            mode = f"{'products ' if name == 'product_overflow' else ''}{overflow}"
            if is_proved(op, proof.steps.get(op)):
                idle.setdefault(op, {})[name] = Overflow.NONE
                proved[mode] += 1
            else:
                kept[mode] += 1
    for mode in sorted({Overflow.SATURATE, Overflow.WRAP} | kept.keys() | proved.keys()):
        context.note(f"{mode}: {kept[mode]} kept, {proved[mode]} proved idle")
    return idle


def _fault(op: Accumulating, proof: Proof) -> str:
    """What sums of an op may do, in the words of a warning."""
    step, room = proof.steps.get(op), overflow_room(op)
    found = step.unsaturated if step is not None else None
    reach = f"reach [{found.lo}, {found.hi}]" if found is not None else "be anything"
    assert room is not None
    what = "saturate at a step" if op.overflow in STEPWISE else "wrap"
    return f"its partial sums may {reach}, beyond the [{room.lo}, {room.hi}] of {op.accumulator}, and then {what}"
