"""What narrow widths cost a model, and the best that can be had: sensitivity, and the front of optimal widths."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Final

from qir.backend import target_of
from qir.errors import PassError
from qir.interpreter import interpret
from qir.ir import Graph
from qir.pass_manager import Feeds, PassContext, Pipeline, Progress, Verifier, no_progress
from qir.passes.assign_bit_widths import AssignBitWidths
from qir.passes.calibrate import parts_of
from qir.passes.pipelines import pipeline_of
from qir.passes.widths.budgets import metric_of, parse_budget
from qir.passes.widths.costs import Metric
from qir.passes.widths.decisions import Kind, Widths, decisions, without_widths
from qir.passes.widths.jobs import joined, samples_of
from qir.passes.widths.problem import Assignment, Budget, WidthProblem
from qir.passes.widths.quality import KL, SQNR, Outputs, Quality, quality_of, rank_correlation
from qir.passes.widths.sensitivity import Analysis, Sensitivity
from qir.program import Program
from qir.target import Target
from qir.verifier import verify

#: A number that is the better the larger it is, such as accuracy, from outputs by name.
Score = Callable[[Outputs], float]


def sensitivity(
    graph: Graph,
    target: Target | str | os.PathLike[str],
    calibration: Iterable[Feeds],
    *,
    pipeline: Pipeline | str | None = None,
    quality: Quality | str = SQNR,
    weights: Sequence[str] = (),
    activations: Sequence[int] = (),
    other_ways: bool = False,
    proxy: bool = False,
    executor: Executor | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress = no_progress,
) -> Sensitivity:
    """What each width of each layer's weights, and of each group of activations, costs of the quality of the outputs.

    Each is measured alone, all else in floating point, on the calibration feeds: `quality` is `sqnr`, `kl`, or a
    `Quality` with a function of your own. `weights`, by names such as `8` or `4/codebook`, and `activations` are the
    widths to measure, all of the target's without. Formats are those that the passes of `pipeline` between
    assign-bit-widths and legalize give, `other_ways` measures further ones that the contract allows: ranges for
    activations, no zero points, one scale for a tensor of weights. `proxy` measures one width of each and estimates
    the rest. Work goes to `executor`, any of `concurrent.futures` or the like of Dask's, with results that do not
    depend on it; `cache` is a folder for results, which are found again by the hash of all that they follow from.

    Raises PassError, or another QirError, for what does not fit.
    """
    setting = _Setting(graph, target, calibration, pipeline, weights, activations, progress)
    return setting.analysis(quality if isinstance(quality, Quality) else quality_of(quality)).run(
        setting.typing,
        other_ways=other_ways,
        proxy=proxy,
        executor=executor,
        cache=None if cache is None else Path(cache),
        progress=progress,
    )


@dataclass(frozen=True)
class Point:
    """Widths, what they are estimated to lose, what they cost by metric, and what was measured of the integer program.

    `origin` is `front`, `greedy` or `uniform`. `loss` is estimated, `measured` is the loss of the integer program;
    `score` is None without a function for it. `widths` has the choice of each decision by kind and name.
    """

    origin: str
    widths: Mapping[str, Mapping[str, str]]
    loss: float
    costs: Mapping[str, float]
    gap: float
    measured: float
    score: float | None


@dataclass(frozen=True)
class Front:
    """Points of least loss for what they take of `metric`, with greedy and uniform ones beside them, each in order.

    `samples` were evaluated; `float_score` is that of the float graph.
    """

    graph: str
    target: str
    metric: str
    quality: str
    samples: int
    points: tuple[Point, ...]
    float_score: float | None

    @property
    def correlation(self) -> float:
        """Spearman's rank correlation of the estimated losses with those of the integer programs."""
        return rank_correlation([(p.loss, p.measured) for p in self.points])

    def of(self, origin: str) -> tuple[Point, ...]:
        """The points of an origin, from the one that takes least."""
        found = [p for p in self.points if p.origin == origin]
        return tuple(sorted(found, key=lambda p: p.costs[self.metric]))

    def to_json(self) -> str:
        """All of it as JSON."""
        return json.dumps({**vars(self), "points": [vars(p) for p in self.points]}, indent=1) + "\n"


ORIGINS: Final = ("front", "greedy", "uniform")


def pareto(
    graph: Graph,
    target: Target | str | os.PathLike[str],
    calibration: Iterable[Feeds],
    *,
    metric: str = Metric.WEIGHTS,
    points: int = 12,
    budgets: Sequence[str] = (),
    evaluation: Iterable[Feeds] | None = None,
    score: Score | None = None,
    pipeline: Pipeline | str | None = None,
    quality: Quality | str = KL,
    weights: Sequence[str] = (),
    activations: Sequence[int] = (),
    measured: Sensitivity | None = None,
    executor: Executor | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress = no_progress,
) -> Front:
    """The exact front of widths: of all that take so much of `metric`, those of least loss, within `budgets` too.

    Up to `points` of it, at even steps between the least that can be had and what the least loss takes, and one for
    what each uniform width takes; beside them what a greedy search finds within the same limits, where there are no
    further budgets, and the same width for all weights. Each is compiled by
    `pipeline` and run on the integer kernels over the feeds of `evaluation`, those of the calibration without:
    `score`, such as an accuracy, is of the outputs of the whole evaluation. Losses are those of `sensitivity`, whose
    options the others are; `measured` takes its place.

    Raises InfeasibleError for budgets that no widths keep, PassError or another QirError for what does not fit.
    """
    if points < 2:
        raise PassError(f"a front has 2 points or more, not {points}")
    measure = quality if isinstance(quality, Quality) else quality_of(quality)
    setting = _Setting(graph, target, calibration, pipeline, weights, activations, progress)
    if measured is not None:
        measured.check(setting.assigned, setting.target, measure)
        if measured.passes != str(setting.typing):
            raise PassError(
                f"the sensitivity was measured with the formats of {measured.passes}, and the pipeline has "
                f"{setting.typing}; measure again, by the same passes"
            )
    else:
        folder = None if cache is None else Path(cache)
        analysis = setting.analysis(measure)
        measured = analysis.run(setting.typing, executor=executor, cache=folder, progress=progress)
    problem = WidthProblem(
        setting.assigned, setting.target, setting.decisions, [measured.of(d) for d in setting.decisions]
    )
    own, limits = metric_of(metric), [problem.budget(parse_budget(text)) for text in budgets]
    problem.need(own)
    same = list(uniform(problem))
    front = trace_front(problem, own, points, limits, [a.costs[own] for a in same])
    greedy = greedy_within(problem, own, [a.costs[own] for a in front]) if not limits else ()
    chosen = [(o, a) for o, found in zip(ORIGINS, (front, greedy, same), strict=True) for a in found]
    trial = _Trial(setting, list(setting.feeds if evaluation is None else evaluation), measure, score)
    found = []
    progress("pareto", 0, len(chosen))
    for number, (origin, assignment) in enumerate(chosen):
        found.append(trial.point(origin, assignment))
        progress("pareto", number + 1, len(chosen))
    return Front(
        setting.assigned.name,
        setting.target.name,
        own,
        measure.name,
        trial.samples,
        tuple(found),
        None if score is None else float(score(trial.reference)),
    )


def trace_front(
    problem: WidthProblem,
    metric: Metric,
    points: int,
    budgets: Sequence[Budget] = (),
    also: Sequence[Fraction] = (),
) -> list[Assignment]:
    """Points of the exact front of loss and `metric`, within budgets, from the one that takes least.

    They are at even steps, and the best within each of what `also` lists.
    """
    # The metric as a budget without an end: among equals of loss the one that takes least.
    free = Budget(metric, problem.most(metric))
    ends = [problem.best(budgets, metric), problem.best([free, *budgets])]
    low, high = (a.costs[metric] for a in ends)
    found = {a.costs[metric]: a for a in ends}
    steps = [low + (high - low) * step / (points - 1) for step in range(1, points - 1)]
    for most in [*steps, *(cost for cost in also if low < cost < high)]:
        assignment = problem.best([Budget(metric, most), *budgets])
        found[assignment.costs[metric]] = assignment
    return [found[cost] for cost in sorted(found)]


def greedy_within(problem: WidthProblem, metric: Metric, most: Sequence[Fraction]) -> Iterator[Assignment]:
    """For each limit of `metric`, ascending or not, where a greedy search first keeps it.

    It starts with the widest choice everywhere and always takes the next narrower one of the decision that loses least
    for what it saves.
    """
    sizes = [len(d.choices) for d in problem.decisions]
    chosen = [0] * len(sizes)
    loss, cost = problem.loss.of(chosen), problem.exact(metric, chosen)
    path = [(cost, tuple(chosen))]
    while True:
        best: tuple[float, int, Fraction, Fraction] | None = None
        for place, size in enumerate(sizes):
            if chosen[place] + 1 == size:
                continue
            chosen[place] += 1
            lost, saved = problem.loss.of(chosen) - loss, cost - problem.exact(metric, chosen)
            chosen[place] -= 1
            ratio = float(lost / saved) if saved > 0 else float("inf")
            if best is None or (ratio, place) < best[:2]:
                best = ratio, place, lost, saved
        if best is None:
            break
        _, place, lost, saved = best
        chosen[place] += 1
        loss, cost = loss + lost, cost - saved
        path.append((cost, tuple(chosen)))
    for limit in most:
        found = next((c for cost, c in path if cost <= limit), None)
        if found is not None:
            yield problem.assignment(found)


def uniform(problem: WidthProblem) -> Iterator[Assignment]:
    """Each choice of weights for all layers, activations as they are by default."""
    names = dict.fromkeys(c for d in problem.decisions if d.kind is Kind.WEIGHTS for c in d.choices)
    default = [
        next((i for i, s in enumerate(d.choices.values()) if s == d.values[0].storage), 0) for d in problem.decisions
    ]
    for name in names:
        places = [
            list(d.choices).index(name) if d.kind is Kind.WEIGHTS and name in d.choices else own
            for d, own in zip(problem.decisions, default, strict=True)
        ]
        yield problem.assignment(places)


def _listed(feeds: Iterable[Feeds]) -> list[Feeds]:
    """The feeds, walked once. Raises CalibrationError for none and for what was observed of them alone."""
    return list(feeds if isinstance(feeds, Iterator) else PassContext(calibration=feeds).need_feeds("sensitivity"))


class _Setting:
    """A graph with default widths, the decisions on it, and the passes around assign-bit-widths."""

    def __init__(
        self,
        graph: Graph,
        target: Target | str | os.PathLike[str],
        calibration: Iterable[Feeds],
        pipeline: Pipeline | str | None,
        weights: Sequence[str],
        activations: Sequence[int],
        progress: Progress,
    ) -> None:
        self.target, passes = target_of(target), pipeline_of(pipeline)
        given = passes[passes.position(AssignBitWidths.name)]
        assert isinstance(given, AssignBitWidths)
        if given.optimizes:
            raise PassError(f"{given} chooses widths by itself; leave its options out, but for override")
        self.rest = passes.after(AssignBitWidths.name)
        self.typing = self.rest.before("legalize")
        self.feeds = _listed(calibration)
        verify(graph)
        ranged = passes.before(AssignBitWidths.name).run(graph, PassContext(self.target, self.feeds, progress))
        self.assigned, settled, _ = given.by_default(ranged, self.target)
        if isinstance(weights, str):
            raise PassError(f"weights={weights!r} is one text; give a list of names, such as ['8', '4/codebook']")
        widths = Widths(tuple(map(str, weights)), tuple(activations))
        self.decisions = decisions(self.assigned, self.target, widths, settled)

    def analysis(self, quality: Quality) -> Analysis:
        """The sensitivity of the decisions."""
        return Analysis(self.assigned, self.target, self.decisions, self.feeds, quality)


class _Trial:
    """Runs assignments on the integer kernels, beside the float graph."""

    def __init__(self, setting: _Setting, feeds: Sequence[Feeds], quality: Quality, score: Score | None) -> None:
        self._setting, self._quality, self._score = setting, quality, score
        bare = without_widths(setting.assigned)
        self._parts = [p for number, feed in enumerate(feeds) for p in parts_of(bare, feed, number)]
        if not self._parts:
            raise PassError("widths are measured on samples, and there are none; give at least one feed")
        self.samples = sum(samples_of(bare, part) for part in self._parts)
        self.reference = joined(bare, [interpret(bare, part) for part in self._parts])
        self._known: dict[tuple[str, ...], tuple[float, float | None]] = {}

    def point(self, origin: str, assignment: Assignment) -> Point:
        """What the program with these widths loses and scores; the same widths are run once."""
        names = tuple(choice for _, choice in assignment.choices)
        if names not in self._known:
            self._known[names] = self._run(assignment)
        widths: dict[str, dict[str, str]] = {kind: {} for kind in Kind}
        for decision, choice in assignment.choices:
            widths[decision.kind][decision.name] = choice
        costs = {str(m): float(v) for m, v in assignment.costs.items()}
        return Point(origin, widths, assignment.loss, costs, assignment.gap, *self._known[names])

    def _run(self, assignment: Assignment) -> tuple[float, float | None]:
        context = PassContext(self._setting.target, self._setting.feeds, no_progress)
        program = Program(self._setting.rest.run(assignment.graph, context, [Verifier()]))
        outputs = joined(self._setting.assigned, [program.run(part) for part in self._parts])
        score = None if self._score is None else float(self._score(outputs))
        return self._quality.of(self.reference, outputs), score
