"""assign-bit-widths: which integer storage each value gets, from what the target has and what it costs there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import ClassVar

from qir.errors import PassError
from qir.ir import Graph, Op, Stage, Value
from qir.ops.constant import Const
from qir.ops.float_nn import Conv, MatMul
from qir.pass_manager import Pass, PassContext
from qir.rewrite import Rewriter
from qir.target import Target
from qir.types import FloatType, IntegerType


@dataclass(frozen=True)
class AssignBitWidths(Pass):
    """Give every real value the storage of the cheapest pair of widths in the target's table.

    `override` names exceptions as `pattern:bits`, several apart by `;`: the pattern (as in a shell) matches names of
    results or locations of ops, the last match counts, and the width holds for the op's results and its weights.
    """

    name: ClassVar[str] = "assign-bit-widths"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.RANGED})
    ensures: ClassVar[Stage | None] = Stage.RANGED
    override: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for text in self.override:
            pattern, colon, bits = text.rpartition(":")
            if not colon or not pattern or not bits.isdigit():
                raise PassError(f"override {text!r} is not of the form pattern:bits")

    def run(self, graph: Graph, context: PassContext) -> Graph:
        """The same graph with a storage on every real value."""
        target = context.need_target(self.name)
        weight_bits, activation_bits = cheapest_widths(target)
        overrides = self._matches(graph, target)
        rewriter = Rewriter(graph)
        for value in graph.inputs:
            rewriter.keep_input(value, storage=target.activations.storage(activation_bits))
        stored = 0
        for op in graph.ops:
            if isinstance(op, Const) and _only_parameters(graph, op.result):
                continue  # each reader gets a constant of its own
            chosen = overrides.get(op)
            if isinstance(op, Conv | MatMul):
                _own_constants(rewriter, op, target, chosen or weight_bits)
            storage = target.activations.storage(chosen or activation_bits)
            results = [_stored(r, storage) for r in op.results]
            stored += sum(r.storage is not None for r in results)
            rewriter.keep(op, results)
        widths = f"activations {activation_bits} bits, weights {weight_bits}"
        context.note(f"{stored} values: {widths}; {len(overrides)} ops overridden")
        return rewriter.finish_graph()

    def _matches(self, graph: Graph, target: Target) -> Mapping[Op, int]:
        """Ops whose width is overridden. Raises PassError for a pattern without a match or a width the chip lacks."""
        found: dict[Op, int] = {}
        for text in self.override:
            pattern, _, digits = text.rpartition(":")
            bits = int(digits)
            for kind, widths in (("activations", target.activations.bits), ("weights", target.weights.bits)):
                if bits not in widths:
                    listed = ", ".join(map(str, widths))
                    raise PassError(f"override {text!r}: {target.name} has {kind} of {listed} bits, not {bits}")
            matched = [op for op in graph.ops if not isinstance(op, Const) and _matches(op, pattern)]
            if not matched:
                raise PassError(f"override {text!r} matches no result and no location of the graph")
            found.update(dict.fromkeys(matched, bits))
        return found


def cheapest_widths(target: Target) -> tuple[int, int]:
    """Weight and activation bits of the pair that costs least per multiply-accumulate; of equals, the widest."""
    pairs = [(w, a) for w in target.weights.bits for a in target.activations.bits]
    return min(pairs, key=lambda p: (target.costs.mac[f"{p[0]}x{p[1]}"], -p[0] - p[1]))


def _matches(op: Op, pattern: str) -> bool:
    return any(fnmatchcase(n, pattern) for n in (op.location, *(r.name for r in op.results)))


def _stored(value: Value, storage: IntegerType) -> Value:
    return replace(value, storage=storage) if isinstance(value.type.element, FloatType) else value


def _only_parameters(graph: Graph, value: Value) -> bool:
    """Whether a constant is read as weights or bias and as nothing else."""
    users = graph.users.get(value, ())
    return bool(users) and all(isinstance(u, Conv | MatMul) and u.operands[0] is not value for u in users)


def _own_constants(rewriter: Rewriter, op: Op, target: Target, weight_bits: int) -> None:
    """Give the op constants of its own as weights and bias: their types follow from this op and no other."""
    weight, bias = op.operands[1], op.optional_operand(2)
    for old, storage in ((weight, target.weights.storage(weight_bits)), (bias, target.accumulator_type)):
        data = None if old is None else rewriter.graph.constants.get(old)
        if old is None or data is None:
            continue
        if _only_parameters(rewriter.graph, old):
            rewriter.claim(old)
        owned = replace(old, name=rewriter.fresh(old.name), storage=storage)
        rewriter.ops.append(Const(value=data, results=(owned,)))
        rewriter.set(old, owned)
