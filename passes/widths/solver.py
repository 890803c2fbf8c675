"""Choices of least cost under limits, to proved optimality: an integer linear program for HiGHS, by way of scipy.

A problem is made of decisions, each with some choices, and of totals: sums of tables, each over the choices of a few
decisions. All numbers of a problem are integers, so that what the solver, which computes in floating point, calls a
solution is checked exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qir.errors import PassError

#: The largest sum of a table's entries for which rows of the program stay well within the tolerances of HiGHS.
MOST: Final = 1 << 20
_CUTS: Final = 1000
_TOLERANCE: Final = 1e-6  # of HiGHS, to which its bounds hold
_INFEASIBLE: Final = 2  # what scipy's milp gives as its status


@dataclass(frozen=True, eq=False)
class Factor:
    """Numbers by the choices of the decisions in `scope`, ascending: [choices of each], int64 or fractions."""

    scope: tuple[int, ...]
    table: npt.NDArray[Any]

    @cached_property
    def ends(self) -> tuple[Any, Any]:
        """The least and the greatest number."""
        return self.table.min(), self.table.max()


@dataclass(frozen=True, eq=False)
class Total:
    """A sum of factors and a constant: whole numbers for the solver, fractions before they are scaled."""

    factors: tuple[Factor, ...]
    constant: Any = 0

    def of(self, chosen: Sequence[int]) -> Any:
        """The exact sum for a choice of each decision."""
        parts = (f.table.item(*(chosen[d] for d in f.scope)) for f in self.factors)
        return sum(parts, self.constant)

    @cached_property
    def span(self) -> tuple[Any, Any]:
        """Bounds of the sum: those of its factors added up."""
        low, high = (sum((f.ends[i] for f in self.factors), self.constant) for i in (0, 1))
        return low, high

    @cached_property
    def step(self) -> Fraction | None:
        """The largest number of which all differences within the factors are multiples; None where there are none."""
        numbers = [e - f.ends[0] for f in self.factors for e in f.table.reshape(-1)]
        numbers = [n for n in numbers if n]
        if not numbers:
            return None
        bottom = math.lcm(*(n.denominator for n in numbers))
        return Fraction(math.gcd(*(int(n * bottom) for n in numbers)), bottom)


@dataclass(frozen=True, eq=False)
class Problem:
    """`sizes` says how many choices each decision has.

    Each objective is the largest of its totals; the first is minimized, then the next among what is best by those
    before. `limits` are totals and the most that they may be; `forbidden` are factors whose entries other than 0 are
    no possible choices together. `accepts` has the last word, where limits are but a little wider than what is meant.
    """

    sizes: tuple[int, ...]
    objectives: tuple[tuple[Total, ...], ...]
    limits: tuple[tuple[Total, int], ...] = ()
    forbidden: tuple[Factor, ...] = ()
    accepts: Callable[[Sequence[int]], bool] = lambda chosen: True

    def values(self, chosen: Sequence[int]) -> tuple[int, ...]:
        """The objectives of a choice."""
        return tuple(max(total.of(chosen) for total in totals) for totals in self.objectives)

    def allows(self, chosen: Sequence[int]) -> bool:
        """Whether a choice keeps all limits and holds nothing forbidden."""
        kept = all(total.of(chosen) <= most for total, most in self.limits)
        possible = not any(f.table[tuple(chosen[d] for d in f.scope)] for f in self.forbidden)
        return kept and possible and self.accepts(chosen)


@dataclass(frozen=True)
class Solution:
    """The choice of each decision, the objectives, and how far these may be from the best: 0, by the solver's proof."""

    chosen: tuple[int, ...]
    values: tuple[int, ...]
    gap: float


def solve(problem: Problem) -> Solution | None:
    """The best choice, or None where no choice is allowed.

    The same problem has the same answer: HiGHS is deterministic. Raises PassError where it gives up.
    """
    program = _Program(problem)
    limits = list(problem.limits)
    chosen: tuple[int, ...] | None = None
    gap = 0.0
    for totals in problem.objectives:
        found = program.minimize(totals, limits)
        if found is None:
            return None
        chosen, own = found
        gap = max(gap, own)
        best = max(total.of(chosen) for total in totals)
        limits += [(total, best) for total in totals]
    if chosen is None:
        raise PassError("a problem without an objective has no best choice")
    return Solution(chosen, problem.values(chosen), gap)


class _Program:
    """The variables: one for each choice of each decision, 0 or 1, and one for each joint choice of a scope.

    Joint ones add up to the single ones, so that they are 0 or 1 where those are; HiGHS is told so all the same, for
    with continuous variables it repairs solutions without end. A scope within another has no variables of its own.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.starts = np.concatenate([[0], np.cumsum(problem.sizes)]).astype(int)
        self.count = int(self.starts[-1])
        self.blocks: dict[tuple[int, ...], int] = {}
        totals = [t for o in problem.objectives for t in o] + [t for t, _ in problem.limits]
        factors = [f for t in totals for f in t.factors] + list(problem.forbidden)
        scopes = sorted({f.scope for f in factors if len(f.scope) > 1}, key=lambda s: (-len(s), s))
        for scope in scopes:
            if not any(set(scope) <= set(block) for block in self.blocks):
                self.blocks[scope] = self.count
                self.count += math.prod(self.shape(scope))
        self.homes = {s: next(b for b in self.blocks if set(s) <= set(b)) for s in scopes}
        self.cuts: list[tuple[int, ...]] = []

    def shape(self, scope: tuple[int, ...]) -> tuple[int, ...]:
        """The choices of the decisions of a scope."""
        return tuple(self.problem.sizes[d] for d in scope)

    def minimize(
        self, totals: Sequence[Total], limits: Sequence[tuple[Total, int]]
    ) -> tuple[tuple[int, ...], float] | None:
        """A choice whose largest total is least, and the relative gap.

        Exact in the limits: what keeps them within the solver's tolerance only, or is not accepted, is cut off.
        """
        for _ in range(_CUTS):
            found = self._solve(totals, limits)
            if found is None:
                return None
            chosen, bound = found
            if all(total.of(chosen) <= most for total, most in limits) and self.problem.accepts(chosen):
                return chosen, _gap(max(total.of(chosen) for total in totals), bound)
            self.cuts.append(chosen)
        raise PassError(
            f"none of {_CUTS:,} choices of the solver keeps all budgets exactly; round them, or choose from fewer"
        )

    def _solve(
        self, totals: Sequence[Total], limits: Sequence[tuple[Total, int]]
    ) -> tuple[tuple[int, ...], float] | None:
        """A choice within the solver's tolerance, and what it proves that no choice is below."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        largest = len(totals) > 1  # one more variable, the largest of the totals
        width = self.count + largest
        rows, lows, highs = self._structure()
        above = [(self._row(total), most - total.constant) for total, most in limits]
        if largest:
            above += [({**self._row(total), self.count: -1}, -total.constant) for total in totals]
        above += [({int(self.starts[d]) + c: 1 for d, c in enumerate(cut)}, len(cut) - 1) for cut in self.cuts]
        rows += [row for row, _ in above]
        highs += [high for _, high in above]
        lows += [-np.inf] * len(above)
        lower, upper, cost = np.zeros(width), np.ones(width), np.zeros(width)
        upper[list(self._forbidden())] = 0
        if largest:
            lower[-1], upper[-1], cost[-1] = -np.inf, np.inf, 1
        else:
            row = self._row(totals[0])
            cost[list(row)] = list(row.values())
        found = milp(
            cost,
            constraints=[LinearConstraint(_sparse(rows, width), lows, highs)],
            integrality=np.arange(width) < self.count,
            bounds=Bounds(lower, upper),
            options={"mip_rel_gap": 0},
        )
        if found.status == _INFEASIBLE:
            return None
        if found.status != 0 or found.x is None:
            raise PassError(f"HiGHS found no widths: {found.message}")
        parts = np.split(found.x[: self.starts[-1]], self.starts[1:-1])
        constant = 0 if largest else totals[0].constant
        return tuple(int(part.argmax()) for part in parts), float(found.mip_dual_bound) + constant

    def _structure(self) -> tuple[list[dict[int, int]], list[float], list[float]]:
        """One choice for each decision, and joint choices that add up to the single ones."""
        rows: list[dict[int, int]] = []
        lows: list[float] = []
        for d, size in enumerate(self.problem.sizes):
            rows.append({int(self.starts[d]) + c: 1 for c in range(size)})
            lows.append(1)
        for scope, start in self.blocks.items():
            places = start + np.arange(math.prod(self.shape(scope))).reshape(self.shape(scope))
            for axis, d in enumerate(scope):
                for c in range(self.problem.sizes[d]):
                    own = places.take(c, axis=axis).reshape(-1)
                    rows.append({**dict.fromkeys(own.tolist(), 1), int(self.starts[d]) + c: -1})
                    lows.append(0)
        return rows, lows, list(lows)

    def _places(self, scope: tuple[int, ...], shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], list[int]]]:
        """The variables of each joint choice of a scope."""
        if len(scope) == 1:
            yield from (((c,), [int(self.starts[scope[0]]) + c]) for c in range(shape[0]))
            return
        block = self.homes[scope]
        places = self.blocks[block] + np.arange(math.prod(self.shape(block))).reshape(self.shape(block))
        moved = np.moveaxis(places, [block.index(d) for d in scope], range(len(scope))).reshape(*shape, -1)
        yield from ((chosen, moved[chosen].tolist()) for chosen in np.ndindex(*shape))

    def _row(self, total: Total) -> dict[int, int]:
        """The coefficients of a total, without its constant."""
        row: dict[int, int] = {}
        for factor in total.factors:
            for chosen, places in self._places(factor.scope, factor.table.shape):
                entry = int(factor.table[chosen])
                for place in places if entry else ():
                    row[place] = row.get(place, 0) + entry
        return row

    def _forbidden(self) -> Iterator[int]:
        for factor in self.problem.forbidden:
            for chosen, places in self._places(factor.scope, factor.table.shape):
                if factor.table[chosen]:
                    yield from places


def _gap(value: int, bound: float) -> float:
    """How far an integer may be above the best, relative to it: not at all where no integer lies in between."""
    above = value - bound
    return above / max(abs(value), 1) if above >= 1 - _TOLERANCE else 0.0


def _sparse(rows: Sequence[dict[int, int]], width: int) -> Any:
    from scipy.sparse import csr_array

    data = np.fromiter((e for row in rows for e in row.values()), float)
    columns = np.fromiter((p for row in rows for p in row), int)
    ends = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return csr_array((data, columns, ends), shape=(len(rows), width))
