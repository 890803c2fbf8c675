"""Measuring candidates: a decision is a job, which may run in another process and whose result may be kept on disk.

The graph is evaluated once; for each candidate only what depends on it is evaluated again. Results do not depend on
where they are measured.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qir.arrays import Array
from qir.errors import PassError, QirError
from qir.fixed_point import Rounding
from qir.interpreter import evaluate, evaluate_op
from qir.ir import Graph, Value
from qir.ops.constant import Const
from qir.ops.fixed_rescale import round_to_grid
from qir.pass_manager import Feeds, Progress
from qir.passes.widths.quality import Quality
from qir.printer import print_graph
from qir.serialization import write_bytes
from qir.types import QuantizedType, scale_array, zero_array

Tensor = npt.NDArray[Any]
#: For each candidate its loss, None where it is not measured, and the error where it arises.
Result = list[tuple[float | None, float]]

_CACHE_FORMAT: Final = 2  # counts up when the same job gives other numbers


@dataclass(frozen=True)
class Candidate:
    """Constants by name that take the place of those of the graph; types to whose grids values are rounded, and how."""

    constants: Mapping[str, Tensor] = field(default_factory=dict)
    grids: Mapping[str, tuple[QuantizedType, Rounding]] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A decision: its candidates, and which of them are evaluated to the outputs; the others where they arise only."""

    graph: Graph
    parts: tuple[Mapping[str, Tensor], ...]
    quality: Quality
    candidates: tuple[Candidate, ...]
    measured: tuple[bool, ...]


def measure(job: Job) -> Result:
    """For each candidate its loss, None where it is not measured, and the error where it arises."""
    with one_thread():
        return _measure(job)


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrix products by one thread: by several, which share the sums, their last bits depend on how many there are."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"):
        yield


def _measure(job: Job) -> Result:
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


def samples_of(graph: Graph, feed: Feeds) -> int:
    """The samples in a feed: as many as its open batch has, or as the graph fixes."""
    batched = [v for v in graph.inputs if v.type.is_batched] or [v for v in graph.inputs if v.type.rank]
    return np.shape(feed[batched[0].name])[0] if batched else 1


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
            array = round_to_grid(array, *candidate.grids[value.name])
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


def run_jobs(
    jobs: Iterable[Job], count: int, executor: Executor | None, cache: Path | None, progress: Progress
) -> list[Result]:
    """The results of so many jobs in order, from the folder `cache` where it has them.

    Jobs are made as they are run; with an executor all of them wait there at once. Raises PassError for a measure that
    cannot be sent to other processes and for workers that die, QirError for a cache that cannot be read or written.
    """
    found: dict[int, Result] = {}
    files: dict[int, Path] = {}
    futures: dict[Future[Result], int] = {}
    progress("sensitivity", 0, count)

    def keep(place: int, result: Result, known: bool = False) -> None:
        found[place] = result
        if place in files and not known:
            _write(files[place], result)
        progress("sensitivity", len(found), count)

    keys = _Keys()
    try:
        with one_thread():  # around all jobs, because threads of this process share the limit
            for place, job in enumerate(jobs):
                if cache is not None:
                    files[place] = cache / f"{keys.of(job)}.json"
                if place in files and files[place].exists():
                    keep(place, _read(files[place], job.measured), known=True)
                elif executor is None:
                    keep(place, measure(job))
                else:
                    _check_sendable(job.quality, executor)
                    futures[executor.submit(measure, job)] = place
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
    return [found[place] for place in range(count)]


def _check_sendable(quality: Quality, executor: Executor) -> None:
    if isinstance(executor, ThreadPoolExecutor):
        return
    try:
        pickle.dumps(quality)
    except (pickle.PicklingError, AttributeError, TypeError) as fault:
        raise PassError(
            f"the measure {quality.name!r} cannot be sent to other processes ({fault}); define its function at the top "
            "of a module"
        ) from fault


class _Keys:
    """A hash for each job of all that its result follows from; graph and samples are read once."""

    def __init__(self) -> None:
        self._shared: list[str] = []

    def of(self, job: Job) -> str:
        """The hash; all jobs are of the same graph and samples."""
        if not self._shared:
            feeds = (f"{name} {Array(array).sha256}" for part in job.parts for name, array in part.items())
            self._shared = [str(_CACHE_FORMAT), job.quality.name, print_graph(job.graph), *feeds]
        texts = [str(job.measured)]
        for candidate in job.candidates:
            texts += [f"{name} {Array(data).sha256}" for name, data in candidate.constants.items()]
            texts += [f"{name} {_type_key(e)} {rounding}" for name, (e, rounding) in candidate.grids.items()]
        return hash_of([*self._shared, *texts])


def finite(number: Any) -> float:
    """The number. Raises ValueError or TypeError for what is no finite one."""
    found = float(number)
    if not math.isfinite(found):
        raise ValueError(f"{found} is no finite number")
    return found


def hash_of(texts: Iterable[str]) -> str:
    """A hash of texts, each with its length."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)}:{text}".encode())
    return digest.hexdigest()


def _type_key(element: QuantizedType) -> str:
    scales, zeros = Array(scale_array(element)), Array(zero_array(element))
    return f"{element.storage} {element.axis} {scales.sha256} {zeros.sha256}"


def _read(file: Path, measured: Sequence[bool]) -> Result:
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if len(kept) != len(measured):
            raise ValueError(f"it holds {len(kept)} results and should hold {len(measured)}")
        pairs = zip(kept, measured, strict=True)
        return [(finite(loss) if is_known else None, finite(error)) for (loss, error), is_known in pairs]
    except (OSError, ValueError, TypeError) as fault:
        raise QirError(f"cannot read {file} of the cache: {fault}; remove the file") from fault


def _write(file: Path, result: Result) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise QirError(f"cannot write the cache {file.parent}: {fault.strerror}; choose another folder") from fault
    write_bytes(file, json.dumps(result).encode())
