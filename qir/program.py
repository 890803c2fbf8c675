"""A compiled graph bound to kernels: run, trace, plan, save and load."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qir.arrays import Array
from qir.backends.kernels.binding import Kernel, bind
from qir.errors import QirError
from qir.interpreter import check_feeds
from qir.ir import Graph, Op, Stage, Value
from qir.ops.constant import Const
from qir.ops.fixed_linear import Conv2d, FixedMatMul
from qir.ops.fixed_rescale import Requantize, dequantize_array, quantize_input
from qir.serialization import read_graph, whole_folder, write_graph
from qir.types import TensorType, is_quantized, storage_of
from qir.verifier import verify

Tensor = npt.NDArray[Any]
Feeds = Mapping[str, npt.ArrayLike]

GRAPH_FILE = "graph.qir"
WEIGHTS_FILE = "weights.safetensors"
#: Batches are cut into chunks whose intermediate values take at most this many bytes (but one sample at least).
CHUNK_BYTES = 32 << 20
_ALIGNMENT = 64


@dataclass(frozen=True)
class Step:
    """One kernel call: the ops it computes, the values it reads, and the value it writes."""

    ops: tuple[Op, ...]
    kernel: Kernel
    inputs: tuple[Value, ...]
    output: Value


@dataclass(frozen=True)
class Buffer:
    """Where a value lives: bytes for each sample of the batch, and the offset of the first in the arena."""

    value: str
    bytes: int
    offset: int


@dataclass(frozen=True)
class Plan:
    """What runs on this host: kernels in order, buffers, and sizes in bytes."""

    steps: tuple[Step, ...]
    buffers: tuple[Buffer, ...]
    arena_bytes: int
    weight_bytes: int

    def __str__(self) -> str:
        places = {b.value: b for b in self.buffers}
        lines = [f"{len(self.steps)} steps, arena {self.arena_bytes:,} bytes a sample, constants {self.weight_bytes:,}"]
        for number, step in enumerate(self.steps):
            buffer = places.get(step.output.name)
            where = f"{buffer.bytes:>9,} B at {buffer.offset:>9,}" if buffer else "output".rjust(24)
            lines.append(f"{number:4d}  {step.kernel.name:36s} {where}  %{step.output.name}")
        return "\n".join(lines)


class Program:
    """An integer program of stage `fixed`, verified and re-proved before a kernel is bound.

    Raises VerifyError when the graph's facts do not hold, and QirError when it is at another stage or states no ranges.
    """

    def __init__(self, graph: Graph) -> None:
        if graph.stage is not Stage.FIXED:
            raise QirError(f"graph @{graph.name} is at stage {graph.stage}; a program runs stage fixed: run legalize")
        verify(graph)
        unproved = next((v for v in graph.values() if v.range is None and storage_of(v.type.element)), None)
        if unproved is not None:
            raise QirError(f"graph @{graph.name}: %{unproved.name} states no range; run range-analysis")
        self.graph = graph
        self._constants = dict(graph.constants)
        self._fused = _Executable(graph, self._constants, fuse=True)
        self._single: _Executable | None = None

    def run(self, feeds: Feeds, progress: Callable[[int, int], None] | None = None) -> dict[str, Tensor]:
        """float32 in, float32 out, any batch size; outputs of plain integers, such as indices, stay integers.

        Raises RunError when feeds do not fit.
        """
        real = check_feeds(self.graph.inputs, feeds)
        integers = {v.name: quantize_input(self.graph, v, a) for v, a in real.items()}
        found = self.run_integer(integers, progress)
        for name, value in zip(self.graph.output_names, self.graph.outputs, strict=True):
            if is_quantized(value.type.element):
                found[name] = dequantize_array(found[name], value.type.element)
        return found

    def run_integer(self, feeds: Feeds, progress: Callable[[int, int], None] | None = None) -> dict[str, Tensor]:
        """Raw integers in and out. `progress` is called with samples done and in all. Raises RunError."""
        return self._fused.outputs(self._integer_feeds(feeds), progress)

    def trace(self, feeds: Feeds) -> dict[str, Tensor]:
        """Every value by name as the kernels compute it, constants included; raw integers in. Nothing is fused."""
        if self._single is None:
            self._single = _Executable(self.graph, self._constants, fuse=False)
        return self._single.trace(self._integer_feeds(feeds))

    def _integer_feeds(self, feeds: Feeds) -> dict[Value, Tensor]:
        arrays = check_feeds(self.graph.inputs, feeds)
        return {v: np.asarray(quantize_input(self.graph, v, a)) for v, a in arrays.items()}

    def plan(self) -> Plan:
        """Kernels, buffers and sizes on this host."""
        return self._fused.plan(self.weight_bytes())

    def macs(self) -> int:
        """Multiply-accumulates per sample."""
        return self.graph.macs()

    def weight_bytes(self) -> int:
        """Bytes of all constants as stored."""
        return sum(a.data.nbytes for a in self._constants.values())

    def save(self, folder: str | Path) -> None:
        """Write `graph.qir` and `weights.safetensors` into a folder, whole or not at all."""
        with whole_folder(Path(folder)) as place:
            write_graph(self.graph, place / GRAPH_FILE, WEIGHTS_FILE)


def load(folder: str | Path) -> Program:
    """The program that `save` wrote. Raises QirError when it is missing, changed or not supported by its proof."""
    return Program(read_graph(Path(folder) / GRAPH_FILE))


class _Executable:
    """Steps over one arena, planned once from liveness; arrays are laid out anew when the chunk size changes."""

    def __init__(self, graph: Graph, constants: dict[Value, Array], *, fuse: bool) -> None:
        self.graph = graph
        self.constants = constants
        self.steps = tuple(_steps(graph, constants, fuse))
        self.buffers, self.arena_bytes = _plan_arena(graph, self.steps, keep_all=not fuse)
        self._batch = -1
        self._arrays: dict[Value, Tensor] = {}

    def chunk(self) -> int:
        """Samples run at a time."""
        return max(1, CHUNK_BYTES // max(self.arena_bytes, 1)) if _is_batched(self.graph) else 1

    def arrays(self, batch: int) -> dict[Value, Tensor]:
        """Views of the arena for a batch of this size."""
        if batch != self._batch:
            arena = np.zeros(self.arena_bytes * max(batch, 1), np.uint8)
            views: dict[Value, Tensor] = {v: a.data for v, a in self.constants.items()}
            for value, buffer in self.buffers.items():
                shape, dtype = value.type.concrete(batch), _dtype(value.type)
                size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
                start = buffer.offset * max(batch, 1)
                views[value] = arena[start : start + size].view(dtype).reshape(shape)
            self._batch, self._arrays = batch, views
        return self._arrays

    def execute(self, feeds: Mapping[Value, Tensor], batch: int) -> dict[Value, Tensor]:
        """Run every step on one chunk."""
        arrays = self.arrays(batch)
        for value, array in feeds.items():
            arrays[value] = np.ascontiguousarray(array)
        for step in self.steps:
            step.kernel.run([arrays[v] for v in step.inputs], arrays[step.output])
        return arrays

    def outputs(
        self, feeds: Mapping[Value, Tensor], progress: Callable[[int, int], None] | None = None
    ) -> dict[str, Tensor]:
        """The outputs by name, chunk after chunk."""
        names = self.graph.output_names
        batch = next((len(a) for v, a in feeds.items() if v.type.is_batched), None)
        if batch is None:
            arrays = self.execute(feeds, 1)
            return {n: arrays[v].copy() for n, v in zip(names, self.graph.outputs, strict=True)}
        found = {
            n: np.empty(v.type.concrete(batch), _dtype(v.type)) for n, v in zip(names, self.graph.outputs, strict=True)
        }
        for start in range(0, batch, self.chunk()):
            stop = min(start + self.chunk(), batch)
            part = {v: a[start:stop] if v.type.is_batched else a for v, a in feeds.items()}
            arrays = self.execute(part, stop - start)
            for name, value in zip(names, self.graph.outputs, strict=True):
                if value.type.is_batched:
                    found[name][start:stop] = arrays[value]
                else:
                    found[name][...] = arrays[value]
            if progress is not None:
                progress(stop, batch)
        return found

    def trace(self, feeds: Mapping[Value, Tensor]) -> dict[str, Tensor]:
        """Every value of the whole batch, run as one chunk."""
        batch = next((len(a) for v, a in feeds.items() if v.type.is_batched), 1)
        return {v.name: a.copy() for v, a in self.execute(feeds, batch).items()}

    def plan(self, weight_bytes: int) -> Plan:
        """The plan to show."""
        return Plan(self.steps, tuple(self.buffers.values()), self.arena_bytes, weight_bytes)


def _is_batched(graph: Graph) -> bool:
    return any(v.type.is_batched for v in graph.inputs)


def _dtype(kind: TensorType) -> np.dtype[Any]:
    storage = storage_of(kind.element)
    return np.dtype(np.float32) if storage is None else storage.dtype


def _steps(graph: Graph, constants: dict[Value, Array], fuse: bool) -> Sequence[Step]:
    """Ops bound to kernels; with `fuse`, an accumulator that only one requantize reads is never stored."""
    steps: list[Step] = []
    outputs, absorbed = set(graph.outputs), set[Op]()
    for op in graph.ops:
        if isinstance(op, Const) or op in absorbed:
            continue
        users = graph.users.get(op.results[0], ())
        follower = users[0] if len(users) == 1 and op.results[0] not in outputs else None
        if fuse and isinstance(op, Conv2d | FixedMatMul) and isinstance(follower, Requantize):
            kernel = bind(op, constants, follower)
            if kernel is not None:
                absorbed.add(follower)
                steps.append(Step((op, follower), kernel, op.operands, follower.result))
                continue
        kernel = bind(op, constants)
        assert kernel is not None
        steps.append(Step((op,), kernel, op.operands, op.result))
    return steps


def _plan_arena(graph: Graph, steps: Sequence[Step], *, keep_all: bool) -> tuple[dict[Value, Buffer], int]:
    """First fit by offset over live ranges, in bytes a sample; values without batch take their whole size a sample."""
    last_read: dict[Value, int] = {}
    for number, step in enumerate(steps):
        last_read.update(dict.fromkeys(step.inputs, number))
    forever = len(steps)
    last_read.update(dict.fromkeys(graph.outputs, forever))
    live: list[tuple[int, int, int]] = []  # offset, end, last step that reads
    buffers: dict[Value, Buffer] = {}
    total = 0
    for number, step in enumerate(steps):
        live = [entry for entry in live if entry[2] >= number]
        size = step.output.type.sample_size * _dtype(step.output.type).itemsize
        room = -(-max(size, 1) // _ALIGNMENT) * _ALIGNMENT
        offset = 0
        for start, end, _ in sorted(live):
            if start - offset >= room:
                break
            offset = max(offset, end)
        until = forever if keep_all else last_read.get(step.output, number)
        live.append((offset, offset + room, until))
        buffers[step.output] = Buffer(step.output.name, size, offset)
        total = max(total, offset + room)
    return buffers, total
