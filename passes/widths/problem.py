"""Widths of least loss within budgets, or of least cost within a loss: costs are those of `qir.cost`, losses add up.

Real costs and losses become integers for the solver: exactly where few bits hold them, else in steps of a millionth of
what a budget leaves, with the last word to the exact costs, and of 2**-20 of the best objective.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Final

import numpy as np

from qir.cost import Homes, Room, graph_cost, rooms
from qir.errors import PassError
from qir.ir import Graph
from qir.passes.widths.budgets import BudgetText
from qir.passes.widths.costs import PLACED, GraphCosts, Metric, fractions, unit_of, unstated, value_of
from qir.passes.widths.decisions import Decision, with_storages
from qir.passes.widths.solver import MOST, Factor, Problem, Solution, Total, solve
from qir.target import Target

#: The objective that is no metric of costs.
LOSS: Final = "loss"
_LIMIT_STEPS: Final = 1_000_000
_COARSE_STEPS: Final = 1 << 18
_FINE_STEPS: Final = 1 << 20

Losses = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Budget:
    """The most of a metric, in its unit."""

    metric: Metric
    most: Fraction

    def __str__(self) -> str:
        return f"{self.metric} of at most {float(self.most):,.6g}"


@dataclass(frozen=True, eq=False)
class Assignment:
    """Widths of a graph: the choice of each decision by its name, the loss that they are estimated to have, and costs.

    `gap` is how far the objective may be from the best by the solver's proof, relative to it. `graph` has the storages.
    """

    choices: tuple[tuple[Decision, str], ...]
    loss: float
    costs: Mapping[Metric, Fraction]
    gap: float
    graph: Graph


class InfeasibleError(PassError):
    """Budgets that no widths keep; the message states the best attainable value of each."""


class WidthProblem:
    """The decisions of a graph whose values have storages, with what each choice costs and loses.

    `losses` has for each decision the loss of each choice. Losses of different decisions add up to that of the graph:
    an approximation, which is why a front is measured again.
    """

    def __init__(self, graph: Graph, target: Target, decisions: Sequence[Decision], losses: Losses) -> None:
        self.graph, self.target, self.decisions = graph, target, tuple(decisions)
        self.costs = GraphCosts(graph, target, decisions)
        factors = []
        for place, (decision, own) in enumerate(zip(decisions, losses, strict=True)):
            missing = [c for c in decision.choices if c not in own]
            if missing:
                raise PassError(
                    f"{decision.kind} of %{decision.name}: no loss is known of {', '.join(missing)} bits; "
                    "measure these widths too, or choose from those that are"
                )
            factors.append(Factor((place,), fractions(own[c] for c in decision.choices)))
        self.loss = Total(tuple(factors))

    def best(
        self, budgets: Sequence[Budget] = (), minimize: Metric | None = None, most_loss: Fraction | None = None
    ) -> Assignment:
        """The widths of least loss within budgets, or those of least `minimize` whose loss is `most_loss` at most.

        Among equals the one of least cost, in the order of the budgets, or of least loss. Raises InfeasibleError where
        there are none, and PassError where the target states no costs of a metric.
        """
        found = self._best(budgets, minimize, most_loss)
        if found is None:
            raise InfeasibleError(self._attainable(budgets, most_loss))
        return found

    def budget(self, text: BudgetText) -> Budget:
        """The budget in the unit of its metric; what is relative is so to the widths of the graph itself."""
        if not text.relative:
            return Budget(text.metric, text.amount)
        own = value_of(text.metric, self.graph, self.target, graph_cost(self.graph, self.target))
        return Budget(text.metric, own * text.amount)

    def assignment(self, chosen: Sequence[int], gap: float = 0.0) -> Assignment:
        """What these choices, one for each decision by its number, come to."""
        names = [tuple(d.choices)[c] for d, c in zip(self.decisions, chosen, strict=True)]
        storages = {v: d.choices[n] for d, n in zip(self.decisions, names, strict=True) for v in d.values}
        graph = with_storages(self.graph, storages)
        cost, costs = graph_cost(graph, self.target), dict[Metric, Fraction]()
        for metric in Metric:
            if self.states(metric):
                costs[metric] = value_of(metric, graph, self.target, cost)
        choices = tuple(zip(self.decisions, names, strict=True))
        return Assignment(choices, float(self.loss.of(chosen)), costs, gap, graph)

    def most(self, metric: Metric) -> Fraction:
        """What no choices take more of a metric than, wherever data lives."""
        totals = [t for room in rooms(self.target) for t in self.costs.totals(metric, room.homes)]
        return Fraction(max(t.span[1] for t in totals)) * unit_of(metric, self.target)

    def exact(self, metric: Metric, chosen: Sequence[int]) -> Fraction:
        """What choices, one for each decision by its number, take of a metric."""
        if metric in PLACED:  # memories depend on the choices
            return self.assignment(chosen).costs[metric]
        totals = self.costs.totals(metric, rooms(self.target)[0].homes)
        return Fraction(max(t.of(chosen) for t in totals)) * unit_of(metric, self.target)

    def states(self, metric: Metric) -> bool:
        """Whether the target states what a metric takes."""
        costs = self.target.costs
        fabric = costs.fabric
        return {
            Metric.LATENCY: costs.has_latency and costs.clock is not None,
            Metric.ENERGY: bool(costs.mac_energy),
            Metric.LUT: fabric is not None and fabric.has_logic,
            Metric.DSP: fabric is not None and bool(fabric.dsp),
            Metric.BRAM: fabric is not None and fabric.bram_bits is not None,
        }.get(metric, True)

    def need(self, metric: Metric) -> None:
        """Raises PassError where the target does not state what a metric takes."""
        if not self.states(metric):
            unit_of(metric, self.target)  # a latency may lack its clock alone
            raise PassError(unstated(metric, self.target))

    def _best(
        self, budgets: Sequence[Budget], minimize: Metric | None, most_loss: Fraction | None
    ) -> Assignment | None:
        metrics = [b.metric for b in budgets] + ([minimize] if minimize is not None else [])
        placed = tuple(dict.fromkeys(m for m in metrics if m in PLACED))
        candidates = self._rooms() if placed else [(rooms(self.target)[0], ())]
        found: list[tuple[tuple[Fraction, ...], Solution]] = []
        for room, limits in candidates:
            best = self._best_in(room.homes, budgets, minimize, most_loss, limits, placed)
            if best is not None:
                found.append(best)
        if not found:
            return None
        _, solution = min(found, key=lambda f: (f[0], f[1].chosen))
        return self.assignment(solution.chosen, solution.gap)

    def _rooms(self) -> Iterator[tuple[Room, Sequence[tuple[Total, int]]]]:
        """Where data can live, with what must fit for it, up to the first where everything does."""
        for room, limits in self._all_rooms:
            if all(total.span[0] <= most for total, most in limits):
                yield room, [(total, most) for total, most in limits if total.span[1] > most]
            if all(total.span[1] <= most for total, most in limits):
                return

    @cached_property
    def _all_rooms(self) -> list[tuple[Room, list[tuple[Total, int]]]]:
        return [(room, list(self.costs.room(room))) for room in rooms(self.target)]

    def _best_in(
        self,
        homes: Homes,
        budgets: Sequence[Budget],
        minimize: Metric | None,
        most_loss: Fraction | None,
        limits: Sequence[tuple[Total, int]],
        placed: Sequence[Metric],
    ) -> tuple[tuple[Fraction, ...], Solution] | None:
        """The best of what keeps these limits, with data in these memories, and its objectives.

        What fits into an earlier room lives there. Where it takes no more of the `placed` metrics there, it is among
        the choices of that room; else what fits there is left out, by one limit of that room after the other.
        """
        best: tuple[tuple[Fraction, ...], Solution] | None = None
        left = [tuple(limits)]
        while left:
            own = left.pop()
            found = self._solve(homes, budgets, minimize, most_loss, own)
            if found is None or (best is not None and found[0] >= best[0]):
                continue
            earlier = self._dearer(found[1].chosen, homes, placed)
            if not earlier:
                best = found
            left += [(*own, _beyond(*limit)) for limit in earlier]
        return best

    def _dearer(self, chosen: Sequence[int], homes: Homes, metrics: Sequence[Metric]) -> Sequence[tuple[Total, int]]:
        """The limits of the room where choices live, if they take more there than in these memories; else none."""
        if not metrics:
            return ()
        own, limits = next(
            (room.homes, limits)
            for room, limits in self._all_rooms
            if room.homes == homes or all(t.of(chosen) <= most for t, most in limits)
        )
        pairs = ((self.costs.totals(m, own), self.costs.totals(m, homes)) for m in metrics)
        holds = all(max(t.of(chosen) for t in a) <= max(t.of(chosen) for t in b) for a, b in pairs)
        return () if holds else limits

    def _solve(
        self,
        homes: Homes,
        budgets: Sequence[Budget],
        minimize: Metric | None,
        most_loss: Fraction | None,
        room: Sequence[tuple[Total, int]],
    ) -> tuple[tuple[Fraction, ...], Solution] | None:
        """The best with data in these memories, and its objectives."""
        limits = [(total, Fraction(most)) for total, most in room]
        objectives: list[tuple[Total, ...]] = []
        for budget in budgets:
            totals, unit = self.costs.totals(budget.metric, homes), unit_of(budget.metric, self.target)
            limits += [(total, budget.most / unit) for total in totals]
            objectives.append(totals)
        if most_loss is not None:
            limits.append((self.loss, most_loss))
        if minimize is not None:
            objectives = [self.costs.totals(minimize, homes), (self.loss,), *objectives]
        else:
            objectives = [(self.loss,), *objectives]
        sizes = tuple(len(d.choices) for d in self.decisions)
        kept = tuple(scaled_limit(total, most) for total, most in limits)

        def accepts(chosen: Sequence[int]) -> bool:
            return all(total.of(chosen) <= most for total, most in limits)

        def solved(*scaled: Sequence[Total]) -> Solution | None:
            return solve(Problem(sizes, tuple(map(tuple, scaled)), kept, self.costs.forbidden, accepts))

        known = _refined(objectives[0], solved)
        if known is None:
            return None
        solution = solved(_scaled(objectives[0], known), *(_scaled(o, None) for o in objectives[1:]))
        assert solution is not None
        return tuple(max(t.of(solution.chosen) for t in o) for o in objectives), solution

    def _attainable(self, budgets: Sequence[Budget], most_loss: Fraction | None) -> str:
        """Why no widths keep all budgets: what is attainable of each alone, or of each within the others."""
        lines, alone = list[str](), True
        for budget in budgets:
            least = self._best((), budget.metric, None)
            assert least is not None
            value = least.costs[budget.metric]
            alone = alone and value <= budget.most
            lines.append(f"{budget}: the least is {float(value):,.6g}")
        if most_loss is not None:
            least = self._best((), None, None)
            assert least is not None
            alone = alone and least.loss <= most_loss
            lines.append(f"loss of at most {float(most_loss):.6g}: the least is {least.loss:.6g}")
        head = "no widths keep the budgets"
        if alone:
            head += " together, though each alone can be kept"
            for place, budget in enumerate(budgets):
                others = [b for i, b in enumerate(budgets) if i != place]
                least = self._best(others, budget.metric, most_loss)
                if least is not None:
                    lines[place] += f" alone, {float(least.costs[budget.metric]):,.6g} within the others"
        return f"{head}; " + "; ".join(lines)


def scaled_limit(total: Total, most: Fraction) -> tuple[Total, int]:
    """A limit in integers: exact where they are small, else rounded down to a millionth of what the limit leaves."""
    low, high = total.span
    unit = total.step
    if unit is None or (high - low) / unit > MOST:
        left = most - low
        unit = (left if left > 0 else high - low) / _LIMIT_STEPS
    if unit == 0:  # nothing to choose
        return Total((), 0), 0 if low <= most else -1
    limit = min(math.floor((most - low) / unit), math.ceil((high - low) / unit))  # no floats beyond their range
    factors = []
    for factor in total.factors:
        entries = [math.floor((e - factor.ends[0]) / unit) for e in factor.table.reshape(-1)]
        table = np.minimum(np.array(entries, object), max(limit, 0) + 1).astype(np.int64)
        factors.append(Factor(factor.scope, table.reshape(factor.table.shape)))
    return Total(tuple(factors)), limit


def _beyond(total: Total, most: int) -> tuple[Total, int]:
    """The limit that only what does not keep this one keeps, of whole numbers."""
    turned = tuple(Factor(f.scope, -f.table) for f in total.factors)
    return Total(turned, -total.constant), -most - 1


def _refined(totals: Sequence[Total], solved: Callable[[Sequence[Total]], Solution | None]) -> Fraction | None:
    """About the least that an objective can be, and attained: steps get finer until it hardly falls any more."""
    low = min(t.span[0] for t in totals)
    known: Fraction | None = None
    while True:
        found = solved(_scaled(totals, known))
        if found is None:
            return known
        value = Fraction(max(t.of(found.chosen) for t in totals))
        if _steps(totals) is not None or value == low or (known is not None and 2 * (value - low) >= known - low):
            return value if known is None else min(value, known)
        known = value


def _scaled(totals: Sequence[Total], known: Fraction | None) -> list[Total]:
    """An objective in integers: exact where they are small, else to the nearest of many steps.

    `known` is an objective that can be attained: what is worse need not be told apart, so that steps are finer.
    """
    low, high = min(t.span[0] for t in totals), max(t.span[1] for t in totals)
    unit, top = _steps(totals), high - low
    if unit is None:
        unit = top / _COARSE_STEPS
        if known is not None and len(totals) == 1 and known > low:
            # Sums of rounded entries may be above what is known by half a step for each: what is cut off must be more.
            unit = min(unit, (known - low) / _FINE_STEPS)
            top = known - low + unit * (len(totals[0].factors) + 1)
    found = []
    for total in totals:
        factors = []
        for factor in total.factors:
            entries = [min(e - factor.ends[0], top) / unit if unit else 0 for e in factor.table.reshape(-1)]
            table = np.array([round(e) for e in entries], np.int64).reshape(factor.table.shape)
            factors.append(Factor(factor.scope, table))
        found.append(Total(tuple(factors), round((total.span[0] - low) / unit) if unit else 0))
    return found


def _steps(totals: Sequence[Total]) -> Fraction | None:
    """The step in which an objective is exact, where it has few of them."""
    low, high = min(t.span[0] for t in totals), max(t.span[1] for t in totals)
    unit = totals[0].step if len(totals) == 1 else Fraction(1)
    return None if unit is None or (high - low) / unit > MOST else unit
