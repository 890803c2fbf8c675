"""insert-saturation: keeps saturation and wrapping where values may overflow, and turns them off where none can."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

from qir.fixed_point import Overflow
from qir.ir import Graph, Op, Stage
from qir.pass_manager import Pass, PassContext
from qir.proof import is_idle, prove
from qir.rewrite import map_values


@dataclass(frozen=True)
class InsertSaturation(Pass):
    """Writes `overflow=none` exactly where the proof shows that no value of the op, or partial sum, overflows.

    The result of every op stays the same to the bit, and so does every stated range.
    """

    name: ClassVar[str] = "insert-saturation"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.FIXED})
    ensures: ClassVar[Stage] = Stage.FIXED

    def run(self, graph: Graph, context: PassContext) -> Graph:
        """The graph with idle overflow handling turned off; the same object where none is."""
        proof = prove(graph)
        idle: set[Op] = set()
        kept: Counter[str] = Counter()
        for op in graph.ops:
            overflow = getattr(op, "overflow", Overflow.NONE)
            if overflow is Overflow.NONE:
                continue
            if is_idle(op, proof.steps.get(op)):
                idle.add(op)
            else:
                kept[overflow] += 1
        proved = Counter(str(getattr(op, "overflow")) for op in idle)  # noqa: B009
        for mode in sorted({Overflow.SATURATE, Overflow.WRAP} | kept.keys() | proved.keys()):
            context.note(f"{mode}: {kept[mode]} kept, {proved[mode]} proved idle")
        if not idle:
            return graph

        def attributes(op: Op) -> dict[str, Any]:
            return {"overflow": Overflow.NONE} if op in idle else {}

        return map_values(graph, lambda value: {}, attributes=attributes)
