"""What can be chosen: the width of each layer's weights, and that of each group of activations with one format."""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from qir.errors import PassError
from qir.ir import Graph, Op, Value
from qir.ops.constant import Const
from qir.ops.float_nn import Conv, MatMul
from qir.passes.select_q_formats import share_formats
from qir.passes.widths.storage import weight_storage
from qir.rewrite import map_values
from qir.target import Target
from qir.types import IntegerType


class Kind(enum.StrEnum):
    """What gets a width."""

    WEIGHTS = "weights"
    ACTIVATIONS = "activations"


@dataclass(frozen=True)
class Widths:
    """The widths to choose from, of those that the target has; empty for all."""

    weights: tuple[int, ...] = ()
    activations: tuple[int, ...] = ()

    def of(self, kind: Kind, has: Collection[int], target: Target) -> tuple[int, ...]:
        """The widths, from wide to narrow. Raises PassError for one that the target lacks."""
        asked = self.weights if kind is Kind.WEIGHTS else self.activations
        for bits in asked:
            if bits not in has:
                listed = ", ".join(map(str, has))
                raise PassError(f"{target.name} has {kind} of {listed} bits, not {bits}; choose from these")
        return tuple(sorted(asked or has, reverse=True))


@dataclass(frozen=True, eq=False)
class Decision:
    """Values that get one storage together, and the storages to choose from, by a name of each such as `4`.

    Weights are named as the layer that reads them, activations as the first value of them.
    """

    name: str
    kind: Kind
    values: tuple[Value, ...]
    choices: Mapping[str, IntegerType]


def decisions(graph: Graph, target: Target, widths: Widths, settled: Collection[Value] = ()) -> tuple[Decision, ...]:
    """The decisions on a graph at stage `ranged` whose values have storages already, in the order of its ops.

    What is `settled`, and weights of a width that the target has for weights alone, keep the storage that they have.
    """
    parameters: dict[Value, Op] = {}
    for op in graph.ops:
        if isinstance(op, Conv | MatMul) and op.operands[1] in graph.constants:
            parameters |= dict.fromkeys(op.operands[1:], op)
    activations = widths.of(Kind.ACTIVATIONS, target.activations.bits, target)
    weights = widths.of(Kind.WEIGHTS, target.weights.bits, target)
    groups = share_formats(graph)
    for op in graph.ops:  # a constant that is read as a value goes with what it makes
        if isinstance(op, Const) and op.result.storage is not None and op.result not in parameters:
            reader = next(iter(graph.users.get(op.result, ())), None)
            if reader is not None and reader.results[0].storage == op.result.storage:
                groups.join(op.result, reader.results[0])
    found: dict[Value, Decision] = {}
    for value in graph.values():
        storage = value.storage
        if storage is None:
            continue
        if value in parameters:
            layer = parameters[value]
            if value is layer.operands[1]:
                kept = value in settled or storage.bits not in target.weights.bits
                choices = {str(storage.bits): storage} if kept else _weight_choices(target, weights)
                found[value] = Decision(layer.results[0].name, Kind.WEIGHTS, (value,), choices)
            continue
        leader = groups[value]
        members = tuple(groups.members(leader))
        if leader not in found:
            kept = any(v in settled for v in members)
            own = {str(storage.bits): storage}
            choices = own if kept else {str(b): target.activations.storage(b) for b in activations}
            found[leader] = Decision(value.name, Kind.ACTIVATIONS, members, choices)
    return tuple(found.values())


def _weight_choices(target: Target, widths: Collection[int]) -> dict[str, IntegerType]:
    return {str(bits): weight_storage(target, bits) for bits in widths}


def with_storages(graph: Graph, storages: Mapping[Value, IntegerType]) -> Graph:
    """The graph with these storages of some values."""
    return map_values(graph, lambda v: {"storage": storages[v]} if v in storages else {})
