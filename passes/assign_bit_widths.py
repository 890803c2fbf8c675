"""assign-bit-widths: which integer storage each value gets, from what the target has and what it costs there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import ClassVar, Final

from qir.errors import PassError
from qir.ir import Graph, Op, Stage, Value
from qir.ops.constant import Const
from qir.ops.float_nn import Conv, MatMul
from qir.pass_manager import Pass, PassContext
from qir.passes.widths.storage import bias_storage, default_widths, weight_storage
from qir.rewrite import Rewriter
from qir.target import Target
from qir.types import FloatType, IntegerType

_OVERRIDE: Final = re.compile(r"(?P<pattern>.+):(?P<kind>[aw]?)(?P<bits>\d{1,2})")


@dataclass(frozen=True)
class AssignBitWidths(Pass):
    """Give every real value the width that the target takes by default, or the cheapest pair of widths in its table.

    `override` names exceptions as `pattern:bits`, several apart by `;`: the pattern (as in a shell) matches names of
    results or locations of ops, the last match counts, and the width holds for the op's results and its weights;
    `pattern:w4` is for the weights alone, `pattern:a8` for the results.
    """

    name: ClassVar[str] = "assign-bit-widths"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.RANGED})
    ensures: ClassVar[Stage | None] = Stage.RANGED
    override: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for text in self.override:
            if not _OVERRIDE.fullmatch(text):
                raise PassError(f"override {text!r} is not of the form pattern:bits, pattern:w4 or pattern:a8")

    def run(self, graph: Graph, context: PassContext) -> Graph:
        """The same graph with a storage on every real value."""
        target = context.need_target(self.name)
        weight_bits, activation_bits = default_widths(target)
        overrides = self._matches(graph, target)
        rewriter = Rewriter(graph)
        for value in graph.inputs:
            rewriter.keep_input(value, storage=target.activations.storage(activation_bits))
        stored = 0
        for op in graph.ops:
            if isinstance(op, Const) and _only_parameters(graph, op.result):
                continue  # each reader gets a constant of its own
            chosen = overrides.get(op, {})
            if isinstance(op, Conv | MatMul):
                _own_constants(rewriter, op, target, chosen.get("w", weight_bits))
            storage = target.activations.storage(chosen.get("a", activation_bits))
            results = [_stored(r, storage) for r in op.results]
            stored += sum(r.storage is not None for r in results)
            rewriter.keep(op, results)
        widths = f"activations {activation_bits} bits, weights {weight_bits}"
        context.note(f"{stored} values: {widths}; {len(overrides)} ops overridden")
        return rewriter.finish_graph()

    def _matches(self, graph: Graph, target: Target) -> Mapping[Op, dict[str, int]]:
        """Ops whose widths, `w` and `a`, are overridden.

        Raises PassError for a pattern without a match or a width the chip lacks.
        """
        found: dict[Op, dict[str, int]] = {}
        alone = target.weight_only.bits if target.weight_only is not None else ()
        kinds = {"a": ("activations", target.activations.bits), "w": ("weights", (*target.weights.bits, *alone))}
        for text in self.override:
            match = _OVERRIDE.fullmatch(text)
            assert match is not None
            bits, which = int(match["bits"]), match["kind"] or "aw"
            for kind in which:
                name, widths = kinds[kind]
                if bits not in widths:
                    listed = ", ".join(map(str, widths))
                    raise PassError(f"override {text!r}: {target.name} has {name} of {listed} bits, not {bits}")
            matched = [op for op in graph.ops if not isinstance(op, Const) and _matches(op, match["pattern"])]
            if not matched:
                raise PassError(f"override {text!r} matches no result and no location of the graph")
            for op in matched:
                found.setdefault(op, {}).update(dict.fromkeys(which, bits))
        return found


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
    for old, storage in ((weight, weight_storage(target, weight_bits)), (bias, bias_storage(target))):
        data = None if old is None else rewriter.graph.constants.get(old)
        if old is None or data is None:
            continue
        if _only_parameters(rewriter.graph, old):
            rewriter.claim(old)
        owned = replace(old, name=rewriter.fresh(old.name), storage=storage)
        rewriter.ops.append(Const(value=data, results=(owned,)))
        rewriter.set(old, owned)
