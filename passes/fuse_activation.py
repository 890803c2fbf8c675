"""fuse-activation: a Relu or Clip becomes the `clip` of the op that feeds it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from qir.ir import Graph, Op, Stage, Value
from qir.ops.float_base import Clipped
from qir.ops.float_elementwise import Activation
from qir.pass_manager import Pass, PassContext
from qir.rewrite import Rewriter, rewrite

Clip = tuple[float, float]
UNCLIPPED: Clip = (-math.inf, math.inf)


@dataclass(frozen=True)
class FuseActivation(Pass):
    """Fuses Relu and Clip into the Conv, MatMul, Add, Sub, Mul or Div before them, where nothing else reads its result.

    Exact: the fused op clips the same float32 numbers.
    """

    name: ClassVar[str] = "fuse-activation"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.FLOAT})
    ensures: ClassVar[Stage] = Stage.FLOAT

    def run(self, graph: Graph, context: PassContext) -> Graph:
        """The fused graph; the same object where nothing fuses."""
        readers = sole_readers(graph)
        last: dict[Clipped, tuple[Op, Clip]] = {}  # producer -> the last activation behind it, and the clip of all
        fused: set[Op] = set()
        for op in graph.ops:
            if not isinstance(op, Clipped):
                continue
            clip, end = clip_of(op), readers.get(op.result)
            while isinstance(end, Activation):
                clip = compose(clip, end.activation)
                last[op] = end, clip
                fused.add(end)
                end = readers.get(end.result)
        context.note(f"{len(fused)} activations fused")
        if not fused:
            return graph

        def visit(rewriter: Rewriter, op: Op) -> bool:
            if not isinstance(op, Clipped) or op not in last:
                return op in fused
            end, clip = last[op]
            replace_chain(rewriter, op, end, rewriter.operands(op), clip)
            return True

        return rewrite(graph, visit)


def sole_readers(graph: Graph) -> Mapping[Value, Op]:
    """The reader of each value that exactly one op and no output reads."""
    outputs = set(graph.outputs)
    return {v: ops[0] for v, ops in graph.users.items() if len(ops) == 1 and v not in outputs}


def clip_of(op: Clipped) -> Clip:
    """The clip of an op as a pair."""
    return (op.clip[0], op.clip[1]) if op.clip is not None else UNCLIPPED


def compose(first: Clip, second: Clip) -> Clip:
    """The one clip that does what two in a row do; a single number where they are disjoint."""
    lo, hi = (min(max(bound, second[0]), second[1]) for bound in first)
    return lo, hi


def replace_chain(rewriter: Rewriter, head: Clipped, end: Op, operands: tuple[Value, ...], clip: Clip) -> None:
    """Emit `head` on other operands and with `clip` in place of itself and all ops up to `end`, under `end`'s name."""
    changed = head.with_changes(operands=operands, results=end.results, clip=None if clip == UNCLIPPED else clip)
    rewriter.claim(end.result)
    rewriter.set(end.result, *rewriter.append(changed))
