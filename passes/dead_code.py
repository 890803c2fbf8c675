"""eliminate-dead-code: drops what no output depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qir.ir import Graph
from qir.pass_manager import Pass, PassContext
from qir.rewrite import live_ops


@dataclass(frozen=True)
class EliminateDeadCode(Pass):
    """Drops every op that no output depends on. Graph inputs stay: they are the program's signature."""

    name: ClassVar[str] = "eliminate-dead-code"

    def run(self, graph: Graph, context: PassContext) -> Graph:
        """The graph with its live ops; the same object where all of them are."""
        live = live_ops(graph)
        dropped = len(graph.ops) - len(live)
        context.note(f"{dropped} ops dropped")
        return graph.with_changes(ops=tuple(live)) if dropped else graph
