"""What can be chosen: the width of each layer's weights, and that of each group of activations with one format."""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TypeVar

from qir.errors import PassError
from qir.ir import Graph, Value
from qir.ops.constant import Const
from qir.ops.float_nn import Conv, MatMul
from qir.passes.select_q_formats import share_formats
from qir.passes.widths.storage import scale_axis, weight_choices, weight_storage
from qir.rewrite import map_values
from qir.target import Target, WeightFormat
from qir.types import IntegerType

Layer = Conv | MatMul
Name = TypeVar("Name", int, str)


class Kind(enum.StrEnum):
    """What gets a width."""

    WEIGHTS = "weights"
    ACTIVATIONS = "activations"


@dataclass(frozen=True)
class Widths:
    """What to choose from, of what the target has; empty for all of it.

    Weights by bits and format, such as `8` or `4/codebook`, as overrides name them.
    """

    weights: tuple[str, ...] = ()
    activations: tuple[int, ...] = ()


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
    parameters: dict[Value, Layer] = {}
    for op in graph.ops:
        if isinstance(op, Conv | MatMul) and op.operands[1] in graph.constants:
            parameters |= {v: op for v in op.operands[1:] if v in graph.constants}
    activations = _chosen(widths.activations, target.activations.bits, Kind.ACTIVATIONS, target)
    offered = weight_choices(target)
    weights = {name: offered[name] for name in _chosen(widths.weights, tuple(offered), Kind.WEIGHTS, target)}
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
                kept = value in settled or storage.stored_bits not in target.weights.bits
                wanted = {n: c for n, c in offered.items() if c[0] >= storage.stored_bits} if kept else weights
                choices = _storages(graph, target, layer, wanted)
                if kept:
                    choices = {next((n for n, s in choices.items() if s == storage), str(storage.bits)): storage}
                found[value] = Decision(layer.results[0].name, Kind.WEIGHTS, (value,), choices)
            continue
        leader = groups[value]
        members = tuple(groups.members(leader))
        if leader not in found:
            kept = any(v in settled for v in members)
            own = {str(storage.bits): storage}
            choices = own if kept else {str(b): target.activations.storage(b) for b in sorted(activations)[::-1]}
            found[leader] = Decision(value.name, Kind.ACTIVATIONS, members, choices)
    return tuple(found.values())


def _chosen(asked: tuple[Name, ...], has: tuple[Name, ...], kind: Kind, target: Target) -> tuple[Name, ...]:
    """What is asked for, in the order of what the target has. Raises PassError for what it lacks."""
    for name in asked:
        if name not in has:
            listed = ", ".join(map(str, has))
            raise PassError(f"{target.name} has {kind} of {listed} bits, not {name}; choose from these")
    return tuple(name for name in has if not asked or name in asked)


def _storages(
    graph: Graph, target: Target, layer: Layer, weights: Mapping[str, tuple[int, WeightFormat]]
) -> dict[str, IntegerType]:
    """The storages of a layer's weights by name."""
    data, axis = graph.constants[layer.operands[1]].data, scale_axis(target, layer)
    return {name: weight_storage(target, bits, item, data, axis) for name, (bits, item) in weights.items()}


def without_widths(graph: Graph) -> Graph:
    """The graph without storages and without histograms: the reals alone."""
    return map_values(graph, lambda v: {"histogram": None, "storage": None})


def with_storages(graph: Graph, storages: Mapping[Value, IntegerType]) -> Graph:
    """The graph with these storages of some values."""
    return map_values(graph, lambda v: {"storage": storages[v]} if v in storages else {})
