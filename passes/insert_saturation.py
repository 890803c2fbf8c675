"""insert-saturation: keeps saturation and wrapping where values may overflow, and turns them off where none can."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

from qir.fixed_point import Overflow
from qir.ir import Graph, Op, Stage
from qir.pass_manager import Pass, PassContext
from qir.proof import is_idle, is_product_idle, prove
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
        if not idle:
            return graph
        return map_values(graph, lambda value: {}, attributes=lambda op: idle.get(op, {}))
