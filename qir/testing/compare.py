"""Kernels against the interpreter on a case: every value fused and unfused, and with unbounded integers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qir.backend import Backend
from qir.backends.kernels.kernel import Facts, Kernel
from qir.backends.kernels.select import own_kernels, select
from qir.errors import ConformanceError
from qir.interpreter import interpret, trace
from qir.ir import Graph, Op
from qir.ops.constant import Const
from qir.printer import op_text
from qir.program import Program
from qir.proof import prove
from qir.testing.maker import Case, Feeds

Tensor = npt.NDArray[Any]

#: Unbounded integers are slow: only as many samples as take about so many element operations.
_UNBOUNDED: Final = 40_000
_SHOWN: Final = 12


@dataclass(frozen=True)
class Compared:
    """How many outputs were compared, the kernels that made them, those of them that are the backend's own, islands."""

    outputs: int
    kernels: frozenset[str]
    own: frozenset[str]
    islands: frozenset[str] = frozenset()


def compare(case: Case, backend: Backend) -> Compared:
    """Run a case every way there is. Raises ConformanceError with the first place where two ways differ."""
    graph = case.graph
    program = Program(graph, backend)
    judge = _Judge(graph, backend)
    for place, feeds in enumerate(case.feeds):
        expected = trace(graph, feeds)
        wanted = {n: expected[v.name] for n, v in zip(graph.output_names, graph.outputs, strict=True)}
        judge.values(expected, program.trace(feeds))
        judge.outputs(wanted, program.run_integer(feeds), program)
        if not place and not judge.islands:  # the last bits of reals may depend on what else is in the batch
            backwards = {k: np.ascontiguousarray(v[::-1]) for k, v in feeds.items()}
            found = {k: v[::-1] for k, v in program.run_integer(backwards).items()}
            judge.outputs(wanted, found, program, "with the samples in reverse order")
    feeds = case.feeds[0]
    some = _some_samples(graph, feeds)
    unbounded = interpret(graph, some, unbounded=True)
    judge.outputs(unbounded, program.run_integer(some), program, "against unbounded integers")
    return Compared(judge.count, kernel_names(program), own_names(graph, backend), judge.islands)


def kernel_names(program: Program) -> frozenset[str]:
    """The kernels that a program runs."""
    return frozenset(step.kernel for step in program.plan().steps)


def own_names(graph: Graph, backend: Backend | None) -> frozenset[str]:
    """The kernels that a backend has of its own for a graph."""
    return frozenset(k.name for k in own_kernels(graph, Facts(graph.constants, prove(graph)), backend).values())


def _some_samples(graph: Graph, feeds: Feeds) -> Feeds:
    """Samples evenly apart, as many as unbounded integers are quick for."""
    elements = sum(r.type.sample_size for op in graph.ops if not isinstance(op, Const) for r in op.results)
    batch = max((len(f) for f in feeds.values()), default=1)
    count = max(1, min(batch, _UNBOUNDED // max(1, graph.macs() + 4 * elements)))
    chosen = np.unique(np.linspace(0, batch - 1, count).astype(np.int64)) if batch else np.zeros(0, np.int64)
    return {k: v[chosen] for k, v in feeds.items()}


class _Judge:
    """Compares arrays of a graph, counts them, and words what differs."""

    def __init__(self, graph: Graph, backend: Backend) -> None:
        self.graph = graph
        self.count = 0
        self._facts = Facts(graph.constants, prove(graph))
        self._own = own_kernels(graph, self._facts, backend)

    @property
    def islands(self) -> frozenset[str]:
        """The kinds of ops that compute on reals."""
        return frozenset(op.mnemonic for op in self.graph.ops if op.is_float and not isinstance(op, Const))

    def values(self, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
        """Every result, in program order, so that the first one that differs is where it went wrong."""
        for op in self.graph.ops:
            if isinstance(op, Const):
                continue
            name = op.result.name
            self.count += expected[name].size
            fault = difference(expected[name], found[name])
            if fault is not None:
                kernel = self._kernel(op).name
                raise ConformanceError(f"{op_text(op)}\n  kernel {kernel}: {fault}\n{_inputs(op, expected, fault)}")

    def outputs(
        self, expected: Mapping[str, Tensor], found: Mapping[str, Tensor], program: Program, how: str = ""
    ) -> None:
        """The outputs of the program as it runs, where a kernel may compute two ops at once."""
        for name, value in zip(self.graph.output_names, self.graph.outputs, strict=True):
            self.count += expected[name].size
            fault = difference(expected[name], found[name])
            if fault is not None:
                op = self.graph.producers.get(value)
                step = next((s for s in program.plan().steps if s.output == value.name), None)
                text = op_text(op) if op is not None else f"%{value.name}"
                kernel = step.kernel if step is not None else "none"
                raise ConformanceError(f"{text}\n  kernel {kernel}{f', {how}' if how else ''}: {fault}")

    def _kernel(self, op: Op) -> Kernel:
        return self._own.get(op) or select(op, self._facts)


@dataclass(frozen=True)
class Difference:
    """The first place where two arrays differ; none where their types or shapes do."""

    text: str
    place: tuple[int, ...] | None

    def __str__(self) -> str:
        return self.text


def difference(expected: Tensor, found: Tensor) -> Difference | None:
    """How two arrays differ, or None. Reals are compared bit by bit, but for the kind of NaN."""
    if (expected.dtype, expected.shape) != (found.dtype, found.shape):
        kinds = [f"{a.dtype}{list(a.shape)}" for a in (expected, found)]
        return Difference(f"expected {kinds[0]}, found {kinds[1]}", None)
    differs = expected != found
    if expected.dtype.kind == "f":
        differs = np.where(
            np.isnan(expected) & np.isnan(found), False, differs | (np.signbit(expected) != np.signbit(found))
        )
    if not differs.any():
        return None
    place = tuple(int(i) for i in np.argwhere(differs)[0])
    text = f"expected {expected[place]}, found {found[place]} at {list(place)}"
    return Difference(f"{text}; {int(differs.sum()):,} of {expected.size:,} differ", place)


def _inputs(op: Op, values: Mapping[str, Tensor], fault: Difference) -> str:
    """What the op read there: the operand's value where shapes agree, else its sample."""
    return "\n".join(_input_lines(op, values, fault))


def _input_lines(op: Op, values: Mapping[str, Tensor], fault: Difference) -> Iterator[str]:
    for operand in op.operands:
        array, place = values[operand.name], fault.place
        if place is None:
            continue
        if operand.type.shape == op.result.type.shape:
            yield f"  for %{operand.name}{list(place)} = {array[place]}"
        elif operand.type.is_batched:
            sample = array[place[0]].reshape(-1).tolist()
            more = f", ... {len(sample)} in all" if len(sample) > _SHOWN else ""
            yield f"  for %{operand.name}[{place[0]}] = [{', '.join(map(str, sample[:_SHOWN]))}{more}]"
