"""How much output quality each width costs: one decision at a time, all else in floating point.

The graph is evaluated once; for each candidate only what depends on it is evaluated again. Each decision is a job of
its own, which may run in another process, and whose results may be kept on disk under a hash of all that they follow
from.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qir.arrays import Array
from qir.errors import PassError, QirError
from qir.fixed_point import Rounding
from qir.interpreter import evaluate, evaluate_op
from qir.interval import Interval
from qir.ir import Graph, Op, Value
from qir.ops.constant import Const
from qir.ops.fixed_rescale import QuantizeRule, dequantize_array, quantize_array
from qir.ops.float_nn import Conv, MatMul
from qir.pass_manager import Feeds, PassContext, Pipeline, Progress, no_progress
from qir.passes.calibrate import parts_of
from qir.passes.fuse_activation import clip_of, replace_chain
from qir.passes.select_q_formats import Search, SelectQFormats
from qir.passes.widths.decisions import Decision, Kind, with_storages
from qir.passes.widths.quality import Quality
from qir.printer import print_graph
from qir.rewrite import Rewriter, map_values, rewrite
from qir.serialization import write_bytes
from qir.target import Granularity, Scheme, Target
from qir.types import ElementType, TensorType, is_quantized, scale_array, storage_of, zero_array

Tensor = npt.NDArray[Any]

_MOST_HELD: Final = 256 << 20  # bytes of values of samples that are evaluated together
_CACHE_FORMAT: Final = 1  # counts up when the same job gives other numbers


@dataclass(frozen=True)
class Way:
    """A way to give values formats: the passes from widths to types, and the contract that they follow."""

    target: Target
    passes: Pipeline = field(default_factory=lambda: Pipeline([SelectQFormats()]))


def ways_of(target: Target, passes: Pipeline) -> dict[Kind, dict[str, Way]]:
    """The contract's own way, under the empty name, and others that it allows: `range`, `symmetric`, `per_tensor`."""
    own = Way(target, passes)
    found = {kind: {"": own} for kind in Kind}
    if "select-q-formats" in (p.name for p in passes):
        by_range = passes.replace("select-q-formats", SelectQFormats(Search.RANGE))
        found[Kind.ACTIVATIONS]["range"] = replace(own, passes=by_range)
    if target.activations.scheme is Scheme.AFFINE:
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
    """The losses of a graph on a target, and by which measure. `key` stands for graph and target."""

    graph: str
    target: str
    quality: str
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
    def correlation(self) -> float:
        """Spearman's rank correlation of the losses with their estimates: 1 where they sort all choices alike.

        Not a number where all are the same, or none was measured but what the estimates rest on.
        """
        from scipy.stats import spearmanr

        pairs = np.array([(e.loss, e.estimate) for e in self.losses])
        if len(pairs) < 3 or any(np.ptp(column) == 0 for column in pairs.T):
            return float("nan")
        return float(spearmanr(*pairs.T).statistic)

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
    return replace(found, loss=_finite(found.loss), error=_finite(found.error), estimate=_finite(found.estimate))


def _finite(number: Any) -> float:
    found = float(number)
    if not math.isfinite(found):
        raise ValueError(f"{found} is no finite number")
    return found


def read_sensitivity(path: Path) -> Sensitivity:
    """The sensitivity in a file. Raises QirError where it cannot be read or holds none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise QirError(f"cannot read {path}: {getattr(fault, 'strerror', None) or fault}") from fault
    return Sensitivity.from_json(text, str(path))


@dataclass(frozen=True)
class Candidate:
    """Constants by name that take the place of those of the graph, and types whose grid values are rounded to."""

    constants: Mapping[str, Tensor] = field(default_factory=dict)
    grids: Mapping[str, ElementType] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A decision: its candidates, and which of them are evaluated to the outputs; the others where they arise only."""

    graph: Graph
    parts: tuple[Mapping[str, Tensor], ...]
    quality: Quality
    candidates: tuple[Candidate, ...]
    measured: tuple[bool, ...]


def measure(job: Job) -> list[tuple[float | None, float]]:
    """For each candidate its loss, None where it is not measured, and the error where it arises."""
    with one_thread():
        return _measure(job)


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrix products by one thread: by several, which share the sums, their last bits depend on how many there are."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"):
        yield


def _measure(job: Job) -> list[tuple[float | None, float]]:
    outputs: list[list[dict[str, Tensor]]] = [[] for _ in job.candidates]
    reference: list[dict[str, Tensor]] = []
    powers = np.zeros((len(job.candidates), 2))
    for part in job.parts:
        base = dict(evaluate(job.graph, part))
        reference.append({n: base[v] for n, v in zip(job.graph.output_names, job.graph.outputs, strict=True)})
        for place, candidate in enumerate(job.candidates):
            now, power = _changed(job.graph, base, candidate, job.measured[place])
            powers[place] += power
            if job.measured[place]:
                named = zip(job.graph.output_names, job.graph.outputs, strict=True)
                outputs[place].append({n: now.get(v, base[v]) for n, v in named})
    whole = joined(job.graph, reference)
    losses = [job.quality.of(whole, joined(job.graph, o)) if o else None for o in outputs]
    return [(loss, float(e / s if s else e > 0)) for loss, (e, s) in zip(losses, powers, strict=True)]


def joined(graph: Graph, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Outputs of all samples; beside an open batch, of what has none those of the last part."""
    is_open = any(v.type.is_batched for v in graph.inputs)
    found: dict[str, Tensor] = {}
    for name, value in zip(graph.output_names, graph.outputs, strict=True):
        arrays = [part[name] for part in parts]
        if is_open and not value.type.is_batched:
            found[name] = arrays[-1]
        else:
            found[name] = np.concatenate(arrays) if value.type.rank else np.stack(arrays)[:, None]
    return found


def _changed(
    graph: Graph, base: Mapping[Value, Tensor], candidate: Candidate, to_the_end: bool
) -> tuple[dict[Value, Tensor], Tensor]:
    """The values that differ, and squared error and square where the change arises; `to_the_end` or there alone."""
    now: dict[Value, Tensor] = {}
    power = np.zeros(2)

    def arises(value: Value, array: Tensor) -> None:
        real = base[value].astype(np.float64)
        power[:] += np.square(array - real).sum(), np.square(real).sum()

    def keep(value: Value, array: Tensor) -> None:
        if value.name in candidate.grids:
            array = _on_grid(array, candidate.grids[value.name])
            arises(value, array)
        now[value] = array

    for value in graph.inputs:
        if value.name in candidate.grids:
            keep(value, base[value])
    for op in graph.ops:
        if isinstance(op, Const) and op.result.name in candidate.constants:
            now[op.result] = candidate.constants[op.result.name]
            continue
        source = any(v.name in candidate.constants for v in op.operands)
        if source or (to_the_end and any(v in now for v in op.operands)):
            found = evaluate_op(op, [now.get(v, base[v]) for v in op.operands])
        elif any(r.name in candidate.grids for r in op.results):
            found = tuple(base[r] for r in op.results)
        else:
            continue
        for value, array in zip(op.results, found, strict=True):
            keep(value, array)
            if source:
                arises(value, array)
    return now, power


def _on_grid(array: Tensor, element: ElementType, rounding: Rounding = Rounding.HALF_EVEN) -> Tensor:
    return dequantize_array(quantize_array(array, element, QuantizeRule.DIVIDE, rounding), element)


class Analysis:
    """The sensitivity of the decisions on a graph, whose values have storages, over calibration feeds."""

    def __init__(
        self, graph: Graph, target: Target, decisions: Sequence[Decision], feeds: Iterable[Feeds], quality: Quality
    ) -> None:
        self.graph, self.target, self.decisions = graph, target, tuple(decisions)
        self.feeds = list(feeds)
        self.quality = quality
        self._bare = map_values(graph, lambda v: {"histogram": None})
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
        jobs = list(self._jobs(passes, other_ways, proxy))
        if executor is not None and not isinstance(executor, ThreadPoolExecutor):
            self._check_sendable()
        with one_thread():  # around all jobs, because threads of this process share the limit
            found = _run_jobs([job for _, job in jobs], executor, cache, progress)
        losses = [loss for (labels, _), result in zip(jobs, found, strict=True) for loss in _losses(labels, result)]
        samples = sum(samples_of(self.graph, part) for part in self._parts)
        key = sensitivity_key(self.graph, self.target)
        return Sensitivity(self.graph.name, self.target.name, self.quality.name, samples, key, tuple(losses))

    def _check_sendable(self) -> None:
        try:
            pickle.dumps(self.quality)
        except (pickle.PicklingError, AttributeError, TypeError) as fault:
            raise PassError(
                f"the measure {self.quality.name!r} cannot be sent to other processes ({fault}); define its function "
                "at the top of a module"
            ) from fault

    def _jobs(
        self, passes: Pipeline, other_ways: bool, proxy: bool
    ) -> Iterator[tuple[list[tuple[Decision, str, str]], Job]]:
        ways = ways_of(self.target, passes)
        typed: dict[tuple[Kind, str, str], dict[str, Any]] = {}
        for kind, own in ways.items():
            for name, way in own.items() if other_ways else [("", own[""])]:
                for choice in dict.fromkeys(c for d in self.decisions if d.kind is kind for c in d.choices):
                    typed[kind, choice, name] = self._typed(kind, choice, way)
        weights = [found for (kind, _, _), found in typed.items() if kind is Kind.WEIGHTS]
        self._add_biases({layer for found in weights for layer, own in found.items() if len(own) > 1})
        for decision in self.decisions:
            labels, candidates, measured = list[tuple[Decision, str, str]](), list[Candidate](), list[bool]()
            for name in ways[decision.kind] if other_ways else [""]:
                for number, choice in enumerate(decision.choices):
                    labels.append((decision, choice, name))
                    candidates.append(self._candidate(decision, typed[decision.kind, choice, name]))
                    measured.append(not proxy or number == len(decision.choices) // 2)
            yield labels, Job(self._bare, self._parts, self.quality, tuple(candidates), tuple(measured))

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

    def _add_biases(self, layers: Collection[str]) -> None:
        """Give those layers a bias of zeros that have none and get one where they are rounded."""

        def visit(rewriter: Rewriter, op: Op) -> bool:
            if not isinstance(op, Conv | MatMul) or len(op.operands) > 2 or op.result.name not in layers:
                return False
            kind = TensorType((op.result.type.shape[1 if isinstance(op, Conv) else -1],))
            bias = Value(rewriter.fresh(f"{op.result.name}.bias"), kind, Interval(0.0, 0.0))
            rewriter.ops.append(Const(value=Array(np.zeros(kind.concrete(1), np.float32)), results=(bias,)))
            replace_chain(rewriter, op, op, (*rewriter.operands(op), bias), clip_of(op))
            return True

        self._bare = rewrite(self._bare, visit)

    def _candidate(self, decision: Decision, typed: Mapping[str, Any]) -> Candidate:
        if decision.kind is Kind.ACTIVATIONS:
            return Candidate(grids={v.name: typed[v.name] for v in decision.values if is_quantized(typed[v.name])})
        layer = next(op for op in self._bare.ops if op.results[0].name == decision.name)
        found: dict[str, Tensor] = {}
        operands = [v for v in layer.operands[1:] if v in self._bare.constants]
        for operand, (data, element) in zip(operands, typed[decision.name], strict=False):  # not all learn a bias
            found[operand.name] = _on_grid(data.astype(np.float32), element, Rounding.HALF_AWAY)
        return Candidate(constants=found)


def samples_of(graph: Graph, feed: Feeds) -> int:
    """The samples in a feed: as many as its open batch has, or as the graph fixes."""
    batched = [v for v in graph.inputs if v.type.is_batched] or [v for v in graph.inputs if v.type.rank]
    return np.shape(feed[batched[0].name])[0] if batched else 1


def _losses(labels: Sequence[tuple[Decision, str, str]], found: Sequence[tuple[float | None, float]]) -> Iterator[Loss]:
    """The losses of a decision with their estimates, each way from the measured choice in its middle."""
    for place, ((decision, choice, way), (loss, error)) in enumerate(zip(labels, found, strict=True)):
        first = place - list(decision.choices).index(choice)
        known, base = found[first + len(decision.choices) // 2]
        assert known is not None
        estimate = known * (error / base if base else float(error > 0))
        yield Loss(decision.name, decision.kind, choice, way, estimate if loss is None else loss, error, estimate)


def sensitivity_key(graph: Graph, target: Target) -> str:
    """A hash of what losses belong to: the graph without histograms and widths, and the contract."""
    bare = map_values(graph, lambda v: {"histogram": None, "storage": None})
    return _hash([print_graph(bare), str(target)])


def _hash(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)}:{text}".encode())
    return digest.hexdigest()


def _run_jobs(
    jobs: Sequence[Job], executor: Executor | None, cache: Path | None, progress: Progress
) -> list[list[tuple[float | None, float]]]:
    """The results of the jobs in order, from the cache where it has them."""
    found: dict[int, list[tuple[float | None, float]]] = {}
    files: dict[int, Path] = {}
    if cache is not None:
        files = {place: cache / f"{key}.json" for place, key in enumerate(_job_keys(jobs))}
        found = {place: _read(file, jobs[place].measured) for place, file in files.items() if file.exists()}
    done = len(found)
    progress("sensitivity", done, len(jobs))

    def keep(place: int, result: list[tuple[float | None, float]]) -> None:
        nonlocal done
        found[place] = result
        if cache is not None:
            _write(files[place], result)
        done += 1
        progress("sensitivity", done, len(jobs))

    left = [place for place in range(len(jobs)) if place not in found]
    if executor is None:
        for place in left:
            keep(place, measure(jobs[place]))
    else:
        futures: dict[Future[list[tuple[float | None, float]]], int] = {}
        try:
            futures.update((executor.submit(measure, jobs[place]), place) for place in left)
            for future in as_completed(futures):
                keep(futures[future], future.result())
        except BrokenExecutor as fault:
            raise PassError(
                "a worker process ended before its work was done, as where memory is short; take fewer workers, and a "
                "cache to keep what is measured"
            ) from fault
        finally:
            for future in futures:
                future.cancel()
    return [found[place] for place in range(len(jobs))]


def _job_keys(jobs: Sequence[Job]) -> Iterator[str]:
    """A hash for each job of all that its result follows from."""
    if not jobs:
        return
    graph = print_graph(jobs[0].graph)
    feeds = [f"{name} {Array(array).sha256}" for part in jobs[0].parts for name, array in part.items()]
    for job in jobs:
        texts = [
            *(f"{name} {Array(data).sha256}" for c in job.candidates for name, data in c.constants.items()),
            *(f"{name} {_type_key(element)}" for c in job.candidates for name, element in c.grids.items()),
        ]
        yield _hash([str(_CACHE_FORMAT), job.quality.name, str(job.measured), graph, *feeds, *texts])


def _type_key(element: ElementType) -> str:
    scales, zeros = Array(scale_array(element)), Array(zero_array(element))  # type: ignore[arg-type]
    return f"{storage_of(element)} {getattr(element, 'axis', None)} {scales.sha256} {zeros.sha256}"


def _read(file: Path, measured: Sequence[bool]) -> list[tuple[float | None, float]]:
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if len(kept) != len(measured):
            raise ValueError(f"it holds {len(kept)} results and should hold {len(measured)}")
        pairs = zip(kept, measured, strict=True)
        return [(_finite(loss) if is_known else None, _finite(error)) for (loss, error), is_known in pairs]
    except (OSError, ValueError, TypeError) as fault:
        raise QirError(f"cannot read {file} of the cache: {fault}; remove the file") from fault


def _write(file: Path, result: Sequence[tuple[float | None, float]]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise QirError(f"cannot write the cache {file.parent}: {fault.strerror}; choose another folder") from fault
    write_bytes(file, json.dumps(result).encode())
