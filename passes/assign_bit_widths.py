"""assign-bit-widths: which integer storage each value gets, from what the target has and what it costs there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Final

import numpy.typing as npt

from qir.errors import PassError, QirError
from qir.ir import Graph, Op, Stage, Value
from qir.levels import codebook, power_of_two_levels
from qir.ops.constant import Const
from qir.ops.float_nn import Conv, MatMul
from qir.pass_manager import Pass, PassContext
from qir.rewrite import Rewriter
from qir.target import Granularity, Scales, Target, WeightFormat
from qir.types import FloatType, IntegerType, integer

_OVERRIDE: Final = re.compile(
    rf"(?P<pattern>.+):(?:(?P<kind>[aw]?)(?P<bits>\d{{1,2}})|w(?P<width>\d{{1,2}})/(?P<format>{'|'.join(WeightFormat)}))"
)


@dataclass(frozen=True)
class AssignBitWidths(Pass):
    """Give every real value the width that the target takes by default, or the cheapest pair of widths in its table.

    `override` names exceptions as `pattern:bits`, several apart by `;`: the pattern (as in a shell) matches names of
    results or locations of ops, the last match counts, and the width holds for the op's results and its weights;
    `pattern:w4` is for the weights alone, `pattern:a8` for the results. `pattern:w4/power_of_two` and
    `pattern:w4/codebook` ask for a format of weights that the target lists; without one they are uniform.
    """

    name: ClassVar[str] = "assign-bit-widths"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.RANGED})
    ensures: ClassVar[Stage | None] = Stage.RANGED
    override: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for text in self.override:
            if not _OVERRIDE.fullmatch(text):
                raise PassError(
                    f"override {text!r} is not of the form pattern:bits, pattern:w4 or pattern:a8, "
                    f"where w4 may end in a format of weights: {', '.join(f'w4/{item}' for item in WeightFormat)}"
                )

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
                _own_constants(rewriter, op, target, *chosen.get("w", (weight_bits, WeightFormat.UNIFORM)))
            storage = target.activations.storage(chosen["a"][0] if "a" in chosen else activation_bits)
            results = [_stored(r, storage) for r in op.results]
            stored += sum(r.storage is not None for r in results)
            rewriter.keep(op, results)
        widths = f"activations {activation_bits} bits, weights {weight_bits}"
        context.note(f"{stored} values: {widths}; {len(overrides)} ops overridden")
        return rewriter.finish_graph()

    def _matches(self, graph: Graph, target: Target) -> Mapping[Op, dict[str, tuple[int, WeightFormat]]]:
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


def default_widths(target: Target) -> tuple[int, int]:
    """Weight and activation bits: the target's defaults, else those that cost least; of equals, the widest."""
    weights, activations = (
        item.bits if item.default is None else (item.default,) for item in (target.weights, target.activations)
    )
    return min(((w, a) for w in weights for a in activations), key=lambda p: (target.costs.of_mac(*p), -p[0] - p[1]))


def weight_storage(
    target: Target,
    bits: int,
    format: WeightFormat = WeightFormat.UNIFORM,
    data: npt.NDArray[Any] | None = None,
    axis: int | None = None,
) -> IntegerType:
    """The storage of weights of this width and format: a width for weights alone uses all of it.

    A codebook is made for `data`, with a scale for each index of `axis` or one for all; see `scale_axis`. Which formats
    a target has at a width says `target.weights.formats_of(bits)`. Raises QirError for a codebook without data, and for
    a width that the format lacks.
    """
    match format:
        case WeightFormat.POWER_OF_TWO:
            return power_of_two_levels(bits)
        case WeightFormat.CODEBOOK:
            if data is None:
                raise QirError("a codebook is made for weights; give their data")
            return codebook(data, bits, axis, powers=target.weights.scales is Scales.POWER_OF_TWO)
    return integer(bits) if bits not in target.weights.bits else target.weights.storage(bits)


def scale_axis(target: Target, op: Conv | MatMul) -> int | None:
    """The axis of constant weights along which the target has scales of their own; None for one scale."""
    rank = op.operands[1].type.rank
    granularity = target.weights.conv if isinstance(op, Conv) else target.weights.matmul
    if granularity is Granularity.PER_TENSOR or rank not in (2, 3, 4):
        return None
    return 0 if isinstance(op, Conv) else rank - 1


def bias_storage(target: Target) -> IntegerType:
    """The integers that are added to an accumulator."""
    bits = target.accumulator.bits
    return integer(target.bias_bits or (bits if isinstance(bits, int) else 32))


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
