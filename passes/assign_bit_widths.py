"""assign-bit-widths: which integer storage each value gets, from what the target has and what it costs there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import ClassVar, Final

from qir.errors import PassError
from qir.ir import Graph, Op, Stage, Value
from qir.ops.constant import Const
from qir.ops.float_nn import Conv, MatMul
from qir.pass_manager import Pass, PassContext, Pipeline
from qir.passes.select_q_formats import SelectQFormats
from qir.passes.widths.budgets import metric_of, parse_budget, parse_floor
from qir.passes.widths.decisions import Kind, Widths, decisions
from qir.passes.widths.problem import Assignment, WidthProblem
from qir.passes.widths.quality import SQNR, quality_of
from qir.passes.widths.sensitivity import Analysis, read_sensitivity
from qir.passes.widths.storage import bias_storage, default_widths, scale_axis, weight_storage
from qir.rewrite import Rewriter
from qir.target import Target, WeightFormat
from qir.types import FloatType, IntegerType

_OVERRIDE: Final = re.compile(
    rf"(?P<pattern>.+):(?:(?P<kind>[aw]?)(?P<bits>\d{{1,2}})|w(?P<width>\d{{1,2}})/(?P<format>{'|'.join(WeightFormat)}))"
)
#: Width and format by `w` and `a` of ops; the format says something of weights alone.
_Overrides = Mapping[Op, Mapping[str, tuple[int, WeightFormat]]]


@dataclass(frozen=True)
class AssignBitWidths(Pass):
    """Give every real value the width that the target takes by default, or the cheapest pair of widths in its table.

    `override` names exceptions as `pattern:bits`, several apart by `;`: the pattern (as in a shell) matches names of
    results or locations of ops, the last match counts, and the width holds for the op's results and its weights;
    `pattern:w4` is for the weights alone, `pattern:a8` for the results. `pattern:w4/power_of_two` and
    `pattern:w4/codebook` ask for a format of weights that the target lists; without one they are uniform.

    With `budget`, such as `weights:0.5x;latency:120us`, widths are those of least loss within it, and with `minimize`,
    such as `energy`, those that take least while the loss keeps to `floor`, such as `sqnr:30`: proved best by an
    integer linear program over what `qir.cost` gives for each layer and what each width costs in `quality` (`sqnr` or
    `kl`), measured on the calibration feeds with weights rounded to nearest, or taken from the file `sensitivity`.
    `proxy` measures one width of each layer only. `weights`, such as `8;6;4/codebook`, and `activations` are the widths
    to choose from, all of the target's without; what is overridden stays. Widths for weights alone are left to
    overrides.

    Raises PassError for what does not fit the target, and InfeasibleError, with the best attainable values, where no
    widths keep the budgets.
    """

    name: ClassVar[str] = "assign-bit-widths"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.RANGED})
    ensures: ClassVar[Stage | None] = Stage.RANGED
    override: tuple[str, ...] = ()
    budget: tuple[str, ...] = ()
    minimize: str = ""
    floor: str = ""
    quality: str = SQNR.name
    weights: tuple[str, ...] = ()
    activations: tuple[int, ...] = ()
    sensitivity: str = ""
    proxy: bool = False

    def __post_init__(self) -> None:
        for text in self.override:
            if not _OVERRIDE.fullmatch(text):
                raise PassError(
                    f"override {text!r} is not of the form pattern:bits, pattern:w4 or pattern:a8, "
                    f"where w4 may end in a format of weights: {', '.join(f'w4/{item}' for item in WeightFormat)}"
                )
        for text in self.budget:
            parse_budget(text)
        quality_of(self.quality)
        if bool(self.minimize) != bool(self.floor):
            raise PassError("minimize and floor go together, such as minimize=energy,floor=sqnr:30")
        if self.floor:
            metric_of(self.minimize)
            if self.quality not in (SQNR.name, parse_floor(self.floor)[0].name):
                raise PassError(f"quality={self.quality} and floor={self.floor} are two measures; leave out quality")
        if not self.optimizes and (self.weights or self.activations or self.sensitivity or self.proxy):
            raise PassError("there is nothing to choose by; give a budget, or minimize and floor")

    @property
    def optimizes(self) -> bool:
        """Whether widths are chosen by costs and losses."""
        return bool(self.budget or self.minimize)

    def run(self, graph: Graph, context: PassContext) -> Graph:
        """The same graph with a storage on every real value."""
        target = context.need_target(self.name)
        assigned, settled, count = self.by_default(graph, target)
        if not self.optimizes:
            weight_bits, activation_bits = default_widths(target)
            values = sum(v.storage is not None for op in assigned.ops for v in op.results if not isinstance(op, Const))
            widths = f"activations {activation_bits} bits, weights {weight_bits}"
            context.note(f"{values} values: {widths}; {count} ops overridden")
            return assigned
        found = self._best(assigned, target, settled, context)
        context.note(_summary(found))
        return found.graph

    def by_default(self, graph: Graph, target: Target) -> tuple[Graph, set[Value], int]:
        """The graph with the default widths, but for what is overridden; those values; and how many ops that are.

        Raises PassError for an override without a match, and for a width or a format that the chip lacks.
        """
        overrides = self._matches(graph, target)
        assigned = _by_default(graph, target, overrides)
        names = {kind: {op.results[0].name for op, chosen in overrides.items() if kind in chosen} for kind in "aw"}
        settled = {r for op in assigned.ops if op.results[0].name in names["a"] for r in op.results}
        settled |= {op.operands[1] for op in assigned.ops if op.results[0].name in names["w"] and len(op.operands) > 1}
        return assigned, settled, len(overrides)

    def _best(self, graph: Graph, target: Target, settled: set[Value], context: PassContext) -> Assignment:
        quality, most_loss = parse_floor(self.floor) if self.floor else (quality_of(self.quality), None)
        choices = decisions(graph, target, Widths(self.weights, self.activations), settled)
        if self.sensitivity:
            losses = read_sensitivity(Path(self.sensitivity))
            losses.check(graph, target, quality)
        else:
            analysis = Analysis(graph, target, choices, context.need_feeds(self.name), quality)
            losses = analysis.run(
                Pipeline([SelectQFormats()]),
                proxy=self.proxy,
                executor=context.executor,
                cache=context.cache,
                progress=context.progress,
            )
        problem = WidthProblem(graph, target, choices, [losses.of(d) for d in choices])
        budgets = [problem.budget(parse_budget(text)) for text in self.budget]
        return problem.best(budgets, metric_of(self.minimize) if self.minimize else None, most_loss)

    def _matches(self, graph: Graph, target: Target) -> _Overrides:
        """Ops whose widths, `w` and `a`, are overridden, each with a format, which says something of weights alone.

        Raises PassError for a pattern without a match, and for a width or a format that the chip lacks.
        """
        found: dict[Op, dict[str, tuple[int, WeightFormat]]] = {}
        for text in self.override:
            match = _OVERRIDE.fullmatch(text)
            assert match is not None
            bits, item = int(match["width"] or match["bits"]), WeightFormat(match["format"] or WeightFormat.UNIFORM)
            which = "w" if match["format"] else match["kind"] or "aw"
            for kind in which:
                name, widths = ("activations", target.activations.bits) if kind == "a" else _offered(target, item)
                if not widths:
                    has = f"no {name}, only {', '.join(target.weights.formats)}; list {item} under its weights.formats"
                    raise PassError(f"override {text!r}: {target.name} has {has}")
                if bits not in widths:
                    has = f"{name} of {', '.join(map(str, widths))} bits, not {bits}"
                    raise PassError(f"override {text!r}: {target.name} has {has}")
            matched = [op for op in graph.ops if not isinstance(op, Const) and _matches(op, match["pattern"])]
            if not matched:
                raise PassError(f"override {text!r} matches no result and no location of the graph")
            for op in matched:
                found.setdefault(op, {}).update(dict.fromkeys(which, (bits, item)))
        return found


def _offered(target: Target, item: WeightFormat) -> tuple[str, tuple[int, ...]]:
    """What weights of a format are called in messages, and the widths that the target has of them."""
    widths = target.weights.widths(item)
    if item is not WeightFormat.UNIFORM:
        return f"{item} weights", widths
    return "weights", (*widths, *(target.weight_only.bits if target.weight_only is not None else ()))


def _by_default(graph: Graph, target: Target, overrides: _Overrides) -> Graph:
    """The graph with the default widths, but for the ops that are overridden."""
    weight_bits, activation_bits = default_widths(target)
    rewriter = Rewriter(graph)
    for value in graph.inputs:
        rewriter.keep_input(value, storage=target.activations.storage(activation_bits))
    for op in graph.ops:
        if isinstance(op, Const) and _only_parameters(graph, op.result):
            continue  # each reader gets a constant of its own
        chosen = overrides.get(op, {})
        if isinstance(op, Conv | MatMul):
            _own_constants(rewriter, op, target, *chosen.get("w", (weight_bits, WeightFormat.UNIFORM)))
        storage = target.activations.storage(chosen["a"][0] if "a" in chosen else activation_bits)
        rewriter.keep(op, [_stored(r, storage) for r in op.results])
    return rewriter.finish_graph()


def _summary(found: Assignment) -> str:
    """How many decisions got each width, and what they come to."""
    parts = []
    for kind in Kind:
        counts = Counter(choice for decision, choice in found.choices if decision.kind is kind)
        listed = ", ".join(f"{count} of {choice} bits" for choice, count in counts.items())
        parts.append(f"{kind}: {listed}")
    costs = ", ".join(f"{metric} {float(value):,.6g}" for metric, value in found.costs.items())
    return f"{'; '.join(parts)}; loss {found.loss:.4g} estimated, gap {found.gap:g}; {costs}"


def _matches(op: Op, pattern: str) -> bool:
    return any(fnmatchcase(n, pattern) for n in (op.location, *(r.name for r in op.results)))


def _stored(value: Value, storage: IntegerType) -> Value:
    return replace(value, storage=storage) if isinstance(value.type.element, FloatType) else value


def _only_parameters(graph: Graph, value: Value) -> bool:
    """Whether a constant is read as weights or bias and as nothing else."""
    users = graph.users.get(value, ())
    return bool(users) and all(isinstance(u, Conv | MatMul) and u.operands[0] is not value for u in users)


def _own_constants(
    rewriter: Rewriter, op: Conv | MatMul, target: Target, weight_bits: int, format: WeightFormat
) -> None:
    """Give the op constants of its own as weights and bias: their types follow from this op and no other."""
    weight, bias = op.operands[1], op.optional_operand(2)
    for old in (weight, bias):
        data = None if old is None else rewriter.graph.constants.get(old)
        if old is None or data is None:
            continue
        storage = bias_storage(target)
        if old is weight:
            storage = weight_storage(target, weight_bits, format, data.data, scale_axis(target, op))
        if _only_parameters(rewriter.graph, old):
            rewriter.claim(old)
        owned = replace(old, name=rewriter.fresh(old.name), storage=storage)
        rewriter.ops.append(Const(value=data, results=(owned,)))
        rewriter.set(old, owned)
