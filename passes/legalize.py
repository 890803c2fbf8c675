"""legalize: real ops on quantized types become integer ops with every numeric choice spelled out (stage `fixed`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from qir.errors import Diagnostic, PassError
from qir.fixed_point import FixedPointError
from qir.ir import Graph, Op, Stage, Value
from qir.ops.constant import Const
from qir.pass_manager import Pass, PassContext
from qir.passes.lowering.context import Lowering, NoIntegerForm
from qir.passes.lowering.rules import RULES
from qir.rewrite import live_ops
from qir.target import Target
from qir.types import QuantizedType


@dataclass(frozen=True)
class Legalize(Pass):
    """Lower every op by its rule; layout is channels last from here, the program's borders keep ONNX's.

    Every op that narrows does what the contract says of results that do not fit. An op without an integer form stays as
    a float island where the target has floating point, and is counted; elsewhere it is an error.
    """

    name: ClassVar[str] = "legalize"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.TYPED})
    ensures: ClassVar[Stage | None] = Stage.FIXED

    def run(self, graph: Graph, context: PassContext) -> Graph:
        """The integer graph, without proved ranges yet."""
        lowered = lower(graph, context.need_target(self.name))
        fixed = lowered.graph.with_changes(ops=tuple(live_ops(lowered.graph)))
        marks = Counter(op.island_mark for op in fixed.ops if op.island_mark)
        found = f"{marks.total()} float islands"
        if marks["island tolerance"]:
            found += f", {marks['island tolerance']} of them with a tolerance"
        context.note(f"{len(graph.ops)} ops became {len(fixed.ops)}, {found}")
        for reason in lowered.islands:
            context.note(reason)
        for name, element in lowered.vanished.items():
            message = (
                f"nothing but zeros is left of it in {element.storage}; give it more bits, or sums a wider accumulator"
            )
            context.diagnostics.append(Diagnostic(f"%{name}", message, "warning"))
        return fixed


@dataclass(frozen=True, eq=False)
class Lowered:
    """The integer graph, ops that nothing reads included, and what in it stands for the values of the typed graph.

    `layouts` maps an old value, in ONNX's layout (False) or with channels last (True), to its new one; the layout that
    its rule made comes first. `islands` says of each op that stayed in floating point why, `vanished` has constants of
    which nothing but zeros is left.
    """

    graph: Graph
    layouts: Mapping[tuple[Value, bool], Value]
    islands: tuple[str, ...]
    vanished: Mapping[str, QuantizedType]


def lower(graph: Graph, target: Target) -> Lowered:
    """Lower every op of a typed graph. Raises PassError for one without an integer form that may not be an island."""
    lowering = Lowering(graph, target)
    for value in graph.inputs:
        lowering.define(value, lowering.keep_input(value, range=None))
    islands: list[str] = []
    for op in graph.ops:
        if isinstance(op, Const):
            lowering.claim(op.result)
        else:
            reason = _lower(lowering, op, target)
            islands += [reason] if reason else []
    outputs = tuple(lowering.read(v) for v in graph.outputs)
    border = {"input_rule": str(target.input.rule), "input_rounding": str(target.input.rounding)}
    fixed = Graph(
        graph.name,
        Stage.FIXED,
        tuple(lowering.inputs),
        tuple(lowering.ops),
        outputs,
        graph.output_names,
        target.name,
        {**graph.attributes, **border},
    )
    return Lowered(fixed, lowering.layouts, tuple(islands), lowering.vanished)


def _lower(lowering: Lowering, op: Op, target: Target) -> str:
    """Lower one op; the reason why it stayed in floating point, or nothing. Raises PassError where it may not."""
    rule = RULES.get(type(op))
    try:
        if rule is None:
            raise NoIntegerForm("it has no lowering rule")
        rule(lowering, op)
        return ""
    except (NoIntegerForm, FixedPointError) as fault:
        reason = f"{op.describe()} has no integer form on {target.name}: {fault}"
        if not target.floating_point:
            raise PassError(f"{reason}; {target.name} has no floating point: replace the op in the model") from fault
        lowering.island(op)
        return reason
