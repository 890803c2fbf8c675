"""How much output quality each width costs: one decision at a time, all else in floating point."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from qir.errors import PassError, QirError
from qir.fixed_point import Rounding
from qir.ir import Graph, Op, Value
from qir.ops.float_nn import Conv, MatMul
from qir.pass_manager import Feeds, PassContext, Pipeline, Progress, no_progress
from qir.passes.calibrate import parts_of
from qir.passes.fuse_activation import clip_of, replace_chain
from qir.passes.layer_walk import nearest_reals, zero_bias
from qir.passes.select_q_formats import Search, SelectQFormats
from qir.passes.widths.decisions import Decision, Kind, with_storages, without_widths
from qir.passes.widths.jobs import Candidate, Job, Result, Tensor, finite, hash_of, run_jobs, samples_of
from qir.passes.widths.quality import Quality, rank_correlation
from qir.printer import print_graph
from qir.rewrite import Rewriter, rewrite
from qir.serialization import read_text
from qir.target import Granularity, Scheme, Target
from qir.types import F32, is_quantized

_MOST_HELD: Final = 256 << 20  # bytes of values of samples that are evaluated together


@dataclass(frozen=True)
class Way:
    """A way to give values formats: the passes from widths to types, and the contract that they follow."""

    target: Target
    passes: Pipeline


def ways_of(target: Target, passes: Pipeline) -> dict[Kind, dict[str, Way]]:
    """The contract's own way, under the empty name, and others that it allows.

    Of activations `range` and `percentile`, and `symmetric` where signed ones have zero points; of weights `per_tensor`
    where there is a scale for each channel.
    """
    own = Way(target, passes)
    found = {kind: {"": own} for kind in Kind}
    if "select-q-formats" in (p.name for p in passes):
        for search in (Search.RANGE, Search.PERCENTILE):
            other = passes.replace("select-q-formats", SelectQFormats(search))
            found[Kind.ACTIVATIONS][search] = replace(own, passes=other)
    if target.activations.scheme is Scheme.AFFINE and target.activations.signed:
        symmetric = replace(target, activations=replace(target.activations, scheme=Scheme.SYMMETRIC))
        found[Kind.ACTIVATIONS]["symmetric"] = replace(own, target=symmetric)
    if Granularity.PER_CHANNEL in (target.weights.conv, target.weights.matmul):
        weights = replace(target.weights, conv=Granularity.PER_TENSOR, matmul=Granularity.PER_TENSOR)
        found[Kind.WEIGHTS]["per_tensor"] = replace(own, target=replace(target, weights=weights))
    return found


@dataclass(frozen=True)
class Loss:
    """What one choice costs: `loss` by the measure of quality, and the `error` where it arises, of the power there.

    `way` is empty for the contract's own formats. `estimate` is the proxy of the loss: to second order it grows as the
    squared error where it arises, so that one measured choice of each decision says the rest.
    """

    decision: str
    kind: Kind
    choice: str
    way: str
    loss: float
    error: float
    estimate: float


@dataclass(frozen=True)
class Sensitivity:
    """The losses of a graph on a target, by which measure, and with formats by which passes.

    `key` stands for graph, calibration and contract.
    """

    graph: str
    target: str
    quality: str
    passes: str
    samples: int
    key: str
    losses: tuple[Loss, ...]

    def of(self, decision: Decision) -> dict[str, float]:
        """The loss of each choice, by the contract's own formats."""
        wanted = (decision.name, decision.kind, "")
        return {e.choice: e.loss for e in self.losses if (e.decision, e.kind, e.way) == wanted}

    def check(self, graph: Graph, target: Target, quality: Quality) -> None:
        """Raises PassError where the losses are of another graph, contract or measure."""
        if self.quality != quality.name:
            raise PassError(
                f"the sensitivity holds losses by {self.quality}, not by {quality.name}; measure again, or ask for that"
            )
        if self.key != sensitivity_key(graph, target):
            raise PassError(
                f"the sensitivity was measured on @{self.graph} and {self.target} as they were, with another graph, "
                "calibration or contract than this; measure again"
            )

    @property
    def is_estimated(self) -> bool:
        """Whether the proxy stands for losses that were not measured."""
        return all(e.loss == e.estimate for e in self.losses)

    @property
    def correlation(self) -> float:
        """Spearman's rank correlation of the losses with their estimates: 1 where they sort all choices alike.

        Not a number where all are the same; with the proxy, estimates are compared with themselves.
        """
        return rank_correlation([(e.loss, e.estimate) for e in self.losses])

    def to_json(self) -> str:
        """All of it as JSON, which `from_json` reads."""
        return json.dumps({**vars(self), "losses": [vars(e) for e in self.losses]}, indent=1) + "\n"

    @staticmethod
    def from_json(text: str, place: str) -> Sensitivity:
        """What `to_json` wrote. Raises QirError, which names the place, for any other text."""
        try:
            data = json.loads(text)
            losses = tuple(_loss(entry) for entry in data.pop("losses"))
            return Sensitivity(**data, losses=losses)
        except (ValueError, TypeError, KeyError, AttributeError) as fault:
            raise QirError(f"{place} holds no sensitivity as qir writes it: {fault}") from fault


def _loss(entry: Mapping[str, Any]) -> Loss:
    """An entry of the JSON. Raises TypeError, ValueError or KeyError for what `to_json` does not write."""
    found = Loss(**{**entry, "kind": Kind(entry["kind"])})
    if not all(isinstance(t, str) for t in (found.decision, found.choice, found.way)):
        raise TypeError(f"decision, choice and way are texts, and not all of {entry} are")
    return replace(found, loss=finite(found.loss), error=finite(found.error), estimate=finite(found.estimate))


def read_sensitivity(path: Path) -> Sensitivity:
    """The sensitivity in a file. Raises QirError where it cannot be read or holds none."""
    return Sensitivity.from_json(read_text(path), str(path))


class Analysis:
    """The sensitivity of the decisions on a graph, whose values have storages, over calibration feeds."""

    def __init__(
        self, graph: Graph, target: Target, decisions: Sequence[Decision], feeds: Iterable[Feeds], quality: Quality
    ) -> None:
        self.graph, self.target, self.decisions = graph, target, tuple(decisions)
        self.feeds = list(feeds)
        self.quality = quality
        self._bare = without_widths(graph)
        whole = [p for number, feed in enumerate(self.feeds) for p in parts_of(self._bare, feed, number)]
        if not whole:
            raise PassError("sensitivity is measured on calibration data, and there is none; give at least one feed")
        self._parts = tuple(part for p in whole for part in self._split(p))

    def _split(self, part: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """The samples in parts, all values of which are held at once."""
        sample = sum(4 * v.type.sample_size for v in self._bare.values() if v.type.is_batched)
        batched = {v.name for v in self._bare.inputs if v.type.is_batched}
        count = max((len(part[name]) for name in batched), default=1)
        chunk = max(_MOST_HELD // max(sample, 1), 1)
        for start in range(0, count, chunk):
            yield {n: a[start : start + chunk] if n in batched else a for n, a in part.items()}

    def run(
        self,
        passes: Pipeline,
        *,
        other_ways: bool = False,
        proxy: bool = False,
        executor: Executor | None = None,
        cache: Path | None = None,
        progress: Progress = no_progress,
    ) -> Sensitivity:
        """The loss of each choice of each decision, by formats that `passes` give; `other_ways` of the contract too.

        With `proxy` one choice of each decision is measured and the rest follows from the error where it arises. Jobs
        go to the `executor`, any of `concurrent.futures`, and their results, which do not depend on it, into the folder
        `cache`. Raises PassError for a measure that cannot be sent to other processes, QirError for a cache that
        cannot be read or written.
        """
        ways = {k: own if other_ways else {"": own[""]} for k, own in ways_of(self.target, passes).items()}
        jobs = self._jobs(ways, proxy, progress)
        found = run_jobs(jobs, len(self.decisions), executor, cache, progress)
        losses: list[Loss] = []
        for decision, results in zip(self.decisions, found, strict=True):
            size = len(decision.choices)
            for place, way in enumerate(ways[decision.kind]):
                losses += _losses(decision, way, results[place * size : (place + 1) * size])
        samples = sum(samples_of(self.graph, part) for part in self._parts)
        key = sensitivity_key(self.graph, self.target)
        return Sensitivity(
            self.graph.name, self.target.name, self.quality.name, str(passes), samples, key, tuple(losses)
        )

    def _jobs(self, ways: Mapping[Kind, Mapping[str, Way]], proxy: bool, progress: Progress) -> Iterator[Job]:
        """A job for each decision: each way all choices, of which with the `proxy` the middle one is measured."""
        wanted = [
            (kind, choice, name)
            for kind, own in ways.items()
            for name in own
            for choice in dict.fromkeys(c for d in self.decisions if d.kind is kind for c in d.choices)
        ]
        typed: dict[tuple[Kind, str, str], Mapping[str, Any]] = {}
        for number, (kind, choice, name) in enumerate(wanted):
            progress("formats", number, len(wanted))
            typed[kind, choice, name] = self._typed(kind, choice, ways[kind][name])
        weights = [found for (kind, _, _), found in typed.items() if kind is Kind.WEIGHTS]
        self._add_biases({layer for found in weights for layer, own in found.items() if len(own) > 1})
        for decision in self.decisions:
            names = [(name, choice) for name in ways[decision.kind] for choice in decision.choices]
            candidates = [self._candidate(decision, typed[decision.kind, choice, name]) for name, choice in names]
            middle = list(decision.choices)[_middle(decision)]
            measured = tuple(not proxy or choice == middle for _, choice in names)
            yield Job(self._bare, self._parts, self.quality, tuple(candidates), measured)

    def _typed(self, kind: Kind, choice: str, way: Way) -> dict[str, Any]:
        """Formats where all decisions of a kind that have it take this choice: layers and types by names of results."""
        chosen = [d for d in self.decisions if d.kind is kind and choice in d.choices]
        storages = {v: d.choices[choice] for d in chosen for v in d.values}
        graph = way.passes.run(with_storages(self.graph, storages), PassContext(way.target, self.feeds), [])
        if kind is Kind.ACTIVATIONS:
            return {v.name: v.type.element for v in graph.values()}
        return {
            op.result.name: tuple(
                (graph.constants[v].data, v.type.element) for v in op.operands[1:] if v in graph.constants
            )
            for op in graph.ops
            if isinstance(op, Conv | MatMul)
        }

    def _rounding(self, value: Value) -> Rounding:
        """How the chip rounds an activation: many small ones truncate, which shifts all values one way.

        Forms that are no shifts go to the nearest; which way ties go there makes no difference here.
        """
        if value in self.graph.inputs:
            return self.target.input.rounding
        return self.target.requantization.rounding or Rounding.HALF_EVEN

    def _add_biases(self, layers: Collection[str]) -> None:
        """Give those layers a bias of zeros that have none and get one where they are rounded."""

        def visit(rewriter: Rewriter, op: Op) -> bool:
            if not isinstance(op, Conv | MatMul) or len(op.operands) > 2 or op.result.name not in layers:
                return False
            replace_chain(rewriter, op, op, (*rewriter.operands(op), zero_bias(rewriter, op, F32)), clip_of(op))
            return True

        self._bare = rewrite(self._bare, visit)

    def _candidate(self, decision: Decision, typed: Mapping[str, Any]) -> Candidate:
        if decision.kind is Kind.ACTIVATIONS:
            types = {v: typed[v.name] for v in decision.values if is_quantized(typed[v.name])}
            return Candidate(grids={v.name: (element, self._rounding(v)) for v, element in types.items()})
        layer = next(op for op in self._bare.ops if op.results[0].name == decision.name)
        found: dict[str, Tensor] = {}
        operands = [v for v in layer.operands[1:] if v in self._bare.constants]
        for operand, (data, element) in zip(operands, typed[decision.name], strict=False):  # not all learn a bias
            found[operand.name] = nearest_reals(data, element)
        return Candidate(constants=found)


def _middle(decision: Decision) -> int:
    """The choice that the estimates of the others rest on."""
    return len(decision.choices) // 2


def _losses(decision: Decision, way: str, found: Result) -> Iterator[Loss]:
    """The losses of a decision by one way, with their estimates."""
    known, base = found[_middle(decision)]
    assert known is not None
    for choice, (loss, error) in zip(decision.choices, found, strict=True):
        estimate = known * (error / base if base else float(error > 0))
        yield Loss(decision.name, decision.kind, choice, way, estimate if loss is None else loss, error, estimate)


def sensitivity_key(graph: Graph, target: Target) -> str:
    """A hash of what losses belong to: the graph without histograms and widths, and the contract."""
    return hash_of([print_graph(without_widths(graph)), str(target)])
