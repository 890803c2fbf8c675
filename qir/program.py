"""A compiled graph bound to kernels: run, trace, plan, save and load."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qir.backend import Backend, plugin_for
from qir.backends.kernels.executor import Executor
from qir.backends.kernels.kernel import Facts, dtype_of
from qir.backends.kernels.plan import Buffer, Layout, lay_out
from qir.backends.kernels.select import own_kernels
from qir.certificate import write_certificate
from qir.errors import Diagnostic, QirError, VerifyError
from qir.interpreter import check_feeds
from qir.ir import Graph, Stage, Value
from qir.ops.accumulate import Accumulating
from qir.ops.constant import Const
from qir.ops.fixed_rescale import dequantize_array, quantize_input
from qir.proof import prove_claims
from qir.serialization import read_graph, whole_folder, write_graph
from qir.table import columns
from qir.types import is_quantized, storage_of
from qir.verifier import verify

Tensor = npt.NDArray[Any]
Feeds = Mapping[str, npt.ArrayLike]
Progress = Callable[[int, int], None]

GRAPH_FILE = "graph.qir"
WEIGHTS_FILE = "weights.safetensors"
_NUMBERS = (0, 2, 3, 4)  # columns of the plan that hold numbers


@dataclass(frozen=True)
class PlanStep:
    """One kernel call: the ops that it computes, the kernel, the values read, the value written and where that lives.

    The buffer is None for a view of a constant.
    """

    ops: tuple[str, ...]
    kernel: str
    inputs: tuple[str, ...]
    output: str
    buffer: Buffer | None
    scratch: tuple[Buffer, ...]


@dataclass(frozen=True)
class Plan:
    """What runs on this host: kernels in order and sizes in bytes.

    The arena takes `fixed_bytes` and `sample_bytes` for each sample of a chunk, of which there are at most `chunk`.
    `weight_bytes` is what the program stores, `packed_bytes` what the kernels keep of it in layouts of their own.
    """

    steps: tuple[PlanStep, ...]
    sample_bytes: int
    fixed_bytes: int
    chunk: int
    weight_bytes: int
    packed_bytes: int

    def __str__(self) -> str:
        rows = [("step", "kernel", "bytes", "at", "scratch", "value")]
        for number, step in enumerate(self.steps):
            size, offset = (f"{step.buffer.bytes:,}", f"{step.buffer.offset:,}") if step.buffer else ("-", "-")
            scratch = sum(b.bytes for b in step.scratch)
            rows.append((str(number), step.kernel, size, offset, f"{scratch:,}" if scratch else "", f"%{step.output}"))
        lines = [
            f"{len(self.steps)} steps; arena {self.sample_bytes:,} bytes a sample and {self.fixed_bytes:,} fixed; "
            f"up to {self.chunk:,} samples at a time",
            f"weights {self.weight_bytes:,} bytes, packed for this host {self.packed_bytes:,}",
            "",
        ]
        return "\n".join([*lines, *columns(rows, _NUMBERS)])


class Program:
    """An integer program of stage `fixed`, verified and proved again before a kernel is bound.

    A batch of any size runs in chunks whose buffers take at most 2 MiB, but of one sample at least, in memory that is
    kept from call to call. Threads may share a program; they take turns.

    The kernels of `backend`, where it has some for an op, come before those of qir; by default it is the installed
    plugin that the graph names as its target, if there is one. The bits are the same.

    Without `use_proof` kernels are chosen by types and attributes alone: sums that saturate are taken step by step, in
    their order, even where none can overflow. That is slow, and shows that the proof changes no bit.

    Raises VerifyError when what the graph states is not so or ranges are not stated, QirError at another stage, and
    TargetError for a plugin that fails.
    """

    def __init__(self, graph: Graph, backend: Backend | None = None, *, use_proof: bool = True) -> None:
        if graph.stage is not Stage.FIXED:
            raise QirError(f"graph @{graph.name} is at stage {graph.stage}; a program runs stage fixed: run legalize")
        proof = prove_claims(graph)
        verify(graph, proof)
        missing = _unstated(graph)
        if missing:
            raise VerifyError(missing, graph.name)
        self.graph = graph
        self._facts = Facts(graph.constants, proof) if use_proof else Facts.of_types(graph)
        self._own = own_kernels(graph, self._facts, plugin_for(graph.target) if backend is None else backend)
        self._executor = Executor(lay_out(graph, self._facts, keep_all=False, own=self._own), self._facts)
        self._tracer: Executor | None = None

    def run(self, feeds: Feeds, progress: Progress | None = None) -> dict[str, Tensor]:
        """Reals in and out as float32, any batch size; what is of plain integers, such as indices, stays so.

        Reals for a quantized input are quantized as the graph's attributes say, integers are taken as they are.
        `progress` is called with the samples done and in all. Raises RunError when feeds do not fit.
        """
        return self._run(self._executor, feeds, self._outputs(), as_reals=True, progress=progress)

    def run_integer(self, feeds: Feeds, progress: Progress | None = None) -> dict[str, Tensor]:
        """The raw integers of the outputs; feeds and errors as of `run`."""
        return self._run(self._executor, feeds, self._outputs(), as_reals=False, progress=progress)

    def trace(self, feeds: Feeds) -> dict[str, Tensor]:
        """Every value by name as the kernels compute it, unfused, constants included; feeds and errors as of `run`."""
        if self._tracer is None:
            layout = lay_out(self.graph, self._facts, keep_all=True, own=self._own)
            self._tracer = Executor(layout, self._facts)
        return self._run(self._tracer, feeds, {v.name: v for v in self.graph.values()}, as_reals=False)

    def _outputs(self) -> dict[str, Value]:
        return dict(zip(self.graph.output_names, self.graph.outputs, strict=True))

    def _run(
        self,
        executor: Executor,
        feeds: Feeds,
        wanted: Mapping[str, Value],
        *,
        as_reals: bool,
        progress: Progress | None = None,
    ) -> dict[str, Tensor]:
        """The wanted values of the whole batch, quantized and put together chunk by chunk."""
        arrays = check_feeds(self.graph.inputs, feeds)
        batch = next((len(a) for v, a in arrays.items() if v.type.is_batched), 1)
        reals = {n for n, v in wanted.items() if as_reals and is_quantized(v.type.element)}
        found: dict[str, Tensor] = {
            n: np.empty(v.type.concrete(batch), np.float32 if n in reals else dtype_of(v.type))
            for n, v in wanted.items()
        }

        def collect(part: slice, values: Mapping[Value, Tensor]) -> None:
            for name, value in wanted.items():
                array = values[value]
                if name in reals:
                    array = dequantize_array(array, value.type.element)
                found[name][part if value.type.is_batched else ...] = array
            if progress is not None:
                progress(part.stop, batch)

        executor.run(arrays, lambda value, array: quantize_input(self.graph, value, array), collect)
        return found

    def plan(self) -> Plan:
        """Kernels, buffers and sizes on this host."""
        layout = self._executor.layout
        return Plan(
            tuple(_plan_steps(layout)),
            layout.sample_bytes,
            layout.fixed_bytes,
            self._executor.chunk,
            self.weight_bytes(),
            layout.packed_bytes,
        )

    def macs(self) -> int:
        """Multiply-accumulates per sample."""
        return self.graph.macs()

    def weight_bytes(self) -> int:
        """Bytes of all constants as the program stores them, packed where they take fewer bits than their dtype."""
        return sum(op.stored_bytes for op in self.graph.ops if isinstance(op, Const))

    def save(self, folder: str | Path) -> None:
        """Write `graph.qir`, `weights.safetensors` and `certificate.json` into a folder, whole or not at all.

        Raises QirError when the folder cannot be written or holds something else.
        """
        with whole_folder(Path(folder)) as place:
            write_graph(self.graph, place / GRAPH_FILE, WEIGHTS_FILE)
            write_certificate(self.graph, prove_claims(self.graph), place / GRAPH_FILE)


def load(folder: str | Path) -> Program:
    """The program that `save` wrote. Raises QirError when it is missing, changed or not supported by its proof."""
    return Program(read_graph(Path(folder) / GRAPH_FILE))


def _unstated(graph: Graph) -> list[Diagnostic]:
    """Every integer value without a range and every sum without bounds of its partial sums."""
    mend = "run range-analysis"
    missing = [
        Diagnostic(f"%{v.name}", f"states no range; {mend}")
        for v in graph.values()
        if v.range is None and storage_of(v.type.element) is not None
    ]
    missing += [
        Diagnostic(op.describe(), f"states no bounds of its partial sums; {mend}")
        for op in graph.ops
        if isinstance(op, Accumulating) and op.partial is None
    ]
    return missing


def _plan_steps(layout: Layout) -> Iterator[PlanStep]:
    for step, scratch in zip(layout.steps, layout.scratch, strict=True):
        yield PlanStep(
            tuple(op.describe() for op in step.ops),
            step.kernel.name,
            tuple(v.name for v in step.inputs),
            step.output.name,
            layout.place.get(step.output),
            scratch,
        )
