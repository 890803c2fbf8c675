"""The costs of a graph as sums of tables over the choices of its decisions: exactly what `qir.cost` gives for each."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qir.cost import (
    Cost,
    GraphCost,
    Homes,
    Room,
    Work,
    layer_cost,
    layer_name,
    layer_ops,
    lifetimes,
    value_bits,
    with_seen,
    work_of,
)
from qir.errors import PassError
from qir.ir import Graph, Op, Value
from qir.passes.widths.decisions import Decision, Kind
from qir.passes.widths.solver import Factor, Total
from qir.target import Target

#: Fractions by the choices of some decisions.
Table = npt.NDArray[Any]
_MOST_JOINT: Final = 1 << 17  # choices of one layer together, all of which get a cost


class Metric(enum.StrEnum):
    """What a budget may be of, and the unit that it is given in."""

    WEIGHTS = "weights"  # bytes of the weights of convolutions and matrix products
    CONSTANTS = "constants"  # bytes of all constants
    PEAK = "peak"  # bytes of the activations of a sample that are alive at once
    MOVED = "moved"  # bytes of activations that are loaded and stored for a sample
    BIT_OPERATIONS = "bit_operations"  # products of both widths, of every multiply-accumulate
    LATENCY = "latency"  # seconds a sample
    ENERGY = "energy"  # joules a sample
    LUT = "lut"
    DSP = "dsp"
    BRAM = "bram"


#: What a layer has of each metric that is a sum over layers; None is what the target says nothing of.
_OF_LAYER: Final[Mapping[Metric, Callable[[Cost], float | None]]] = {
    Metric.CONSTANTS: lambda c: c.constant_bytes,
    Metric.MOVED: lambda c: c.moved_bytes,
    Metric.BIT_OPERATIONS: lambda c: c.bit_operations,
    Metric.LATENCY: lambda c: c.cycles,
    Metric.ENERGY: lambda c: c.energy,
    Metric.LUT: lambda c: c.lut,
    Metric.DSP: lambda c: c.dsp,
    Metric.BRAM: lambda c: c.bram,
}
#: The metrics that depend on where data lives.
PLACED: Final = (Metric.LATENCY, Metric.ENERGY)


def unit_of(metric: Metric, target: Target) -> Fraction:
    """What one unit of a table is in the unit of the metric: cycles are of a clock, energy is in pJ.

    Raises PassError where the target has no clock.
    """
    if metric is Metric.ENERGY:
        return Fraction(1, 10**12)
    if metric is not Metric.LATENCY:
        return Fraction(1)
    if target.costs.clock is None:
        raise PassError(f"{target.name} states no costs.clock, so that there is no latency in seconds")
    return 1 / Fraction(target.costs.clock)


def value_of(metric: Metric, graph: Graph, target: Target, cost: GraphCost) -> Fraction:
    """What a graph has of a metric, exactly. Raises PassError where the target says nothing of it."""
    if metric is Metric.WEIGHTS:
        weights = {v for op in graph.ops if op.macs() for v in op.operands[1:2] if v in graph.constants}
        return Fraction(sum(-(-value_bits(v) // 8) for v in weights))
    if metric is Metric.PEAK:
        return Fraction(cost.peak_bytes)
    found = [_stated(metric, layer.cost, target) for layer in cost.layers]
    return sum(map(Fraction, found), Fraction(0)) * unit_of(metric, target)


def _stated(metric: Metric, cost: Cost, target: Target) -> float:
    """What a layer has of a metric. Raises PassError where the target says nothing of it."""
    found = _OF_LAYER[metric](cost)
    if found is None:
        raise PassError(unstated(metric, target))
    return found


def unstated(metric: Metric, target: Target) -> str:
    """What is said where a target does not state a metric."""
    return f"{target.name} states no costs of {metric}; see [costs] in docs/add-a-backend.md"


class GraphCosts:
    """The tables of a graph whose values have storages, over the choices of these decisions."""

    def __init__(self, graph: Graph, target: Target, decisions: Sequence[Decision]) -> None:
        groups = layer_ops(graph)
        self.graph, self.target = graph, target
        self._groups = list(with_seen(groups))
        self._alive = list(_alive(graph, groups))
        self._decision = {v: i for i, d in enumerate(decisions) for v in d.values}
        self._storages = [tuple(d.choices.values()) for d in decisions]
        self._weights = [v for d in decisions if d.kind is Kind.WEIGHTS for v in d.values]
        self._known: dict[tuple[Metric, Homes], tuple[Total, ...]] = {}

    def totals(self, metric: Metric, homes: Homes) -> tuple[Total, ...]:
        """The totals whose largest is the metric, in units of `unit_of`, with data in these memories.

        Raises PassError where the target says nothing of it, and for a layer with too many joint choices.
        """
        if (metric, homes) not in self._known:
            self._known[metric, homes] = self._totals(metric, homes)
        return self._known[metric, homes]

    def _totals(self, metric: Metric, homes: Homes) -> tuple[Total, ...]:
        if metric is Metric.PEAK:
            return tuple(self._bytes(values) for values in self._alive)
        if metric is Metric.WEIGHTS:
            return (self._bytes(self._weights),)
        factors, constant = list[Factor](), Fraction(0)
        for scope, works in self._layers:
            found, rest = apart(scope, _map(works, lambda work: self._cost(work, metric, homes)))
            factors += found
            constant += rest
        return (Total(tuple(factors), constant),)

    @cached_property
    def forbidden(self) -> tuple[Factor, ...]:
        """Where the tables of the target lack the pair of widths of a layer: 1, else 0.

        Raises QirError for a layer without a pair that they have.
        """
        found = []
        for scope, works in self._layers:
            table = _map(works, lambda work: int(self._is_uncovered(work)))
            if table.all():
                layer_cost(works.item(0), self.target, Homes())  # says what is missing
            if table.any():
                found.append(Factor(scope, table.astype(np.int64)))
        return tuple(found)

    def room(self, room: Room) -> Iterator[tuple[Total, int]]:
        """What must fit so that data lives in these memories: totals, and the bytes that there are."""
        (constants,) = self.totals(Metric.CONSTANTS, room.homes)
        for peak in self.totals(Metric.PEAK, room.homes):
            if room.activations is not None:
                yield peak, room.activations
            if room.both is not None:
                yield Total(peak.factors + constants.factors, peak.constant + constants.constant), room.both

    def _bytes(self, values: Iterable[Value]) -> Total:
        """The bytes of some values together."""
        factors, constant = list[Factor](), Fraction(0)
        for value in values:
            place = self._decision.get(value)
            if place is None:
                constant += -(-value_bits(value) // 8)
                continue
            sizes = [-(-value_bits(value, {value: s}) // 8) for s in self._storages[place]]
            factors.append(Factor((place,), fractions(sizes)))
        return Total(tuple(factors), constant)

    def _cost(self, work: Work, metric: Metric, homes: Homes) -> Fraction:
        """What a layer has of a metric."""
        if self._is_uncovered(work):
            return Fraction(0)  # and forbidden
        return Fraction(_stated(metric, layer_cost(work, self.target, homes), self.target))

    def _is_uncovered(self, work: Work) -> bool:
        named = self.target.costs.uncovered(work.weight_bits, work.activation_bits) if work.macs else ()
        return any(name != "mac" for name in named)

    @cached_property
    def _layers(self) -> list[tuple[tuple[int, ...], Table]]:
        """For each layer the decisions that it depends on, and its work for each joint choice of them."""
        found = []
        for ops, seen in self._groups:
            values = [v for op in ops for v in (*op.operands, *op.results) if v in self._decision]
            scope = tuple(sorted({self._decision[v] for v in values}))
            works = np.empty([len(self._storages[d]) for d in scope], object)
            if works.size > _MOST_JOINT:
                raise PassError(
                    f"{layer_name(ops)} has {works.size:,} choices of widths together; list fewer by weights and "
                    "activations"
                )
            for chosen in np.ndindex(*works.shape):
                at = dict(zip(scope, chosen, strict=True))
                storages = {v: self._storages[self._decision[v]][at[self._decision[v]]] for v in values}
                works[chosen] = work_of(self.graph, ops, seen, storages)
            found.append((scope, works))
        return found


def _map(works: Table, number: Callable[[Work], object]) -> Table:
    """A number for each work."""
    found = np.empty(works.shape, object)
    for place in np.ndindex(*works.shape):
        found[place] = number(works.item(*place))
    return found


def apart(scope: tuple[int, ...], table: Table) -> tuple[list[Factor], Fraction]:
    """A table as a constant and factors of one decision each, where it is a sum of such; else as it is.

    Decisions that it does not depend on are left out.
    """
    first = table[(0,) * table.ndim]
    axes = []
    for axis in range(table.ndim):
        own = table[tuple(slice(None) if i == axis else 0 for i in range(table.ndim))] - first
        axes.append(own.reshape(tuple(-1 if i == axis else 1 for i in range(table.ndim))))
    if np.array_equal(sum(axes, np.full(table.shape, first)), table):
        singles = [Factor((d,), own.reshape(-1)) for d, own in zip(scope, axes, strict=True) if own.any()]
        return singles, Fraction(first)
    kept = [i for i in range(table.ndim) if (table != table.take([0], axis=i)).any()]
    reduced = table[tuple(slice(None) if i in kept else 0 for i in range(table.ndim))]
    return [Factor(tuple(scope[i] for i in kept), reduced)], Fraction(0)


def fractions(numbers: Iterable[float]) -> Table:
    """An array of fractions, exactly as large as these numbers."""
    found = [Fraction(n) for n in numbers]
    table = np.empty(len(found), object)
    table[:] = found
    return table


def _alive(graph: Graph, groups: Sequence[Sequence[Op]]) -> Iterator[list[Value]]:
    """The activations that take memory at each step, but for steps that have a part of those of another."""
    spans = lifetimes(graph, groups)
    steps = [[v for v, (first, last) in spans.items() if first <= step <= last] for step in range(len(groups) + 1)]
    for place, step in enumerate(steps):
        others = (*steps[max(place - 1, 0) : place], *steps[place + 1 : place + 2])
        if not any(set(step) < set(other) for other in others):
            yield step
