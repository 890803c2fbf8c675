"""Running a layout: kernels tied to arrays in one arena, chunk by chunk of the batch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

import numpy as np

from qir.backends.kernels.kernel import Call, Facts, Memory, Tensor, dtype_of
from qir.backends.kernels.plan import Buffer, Layout, memory_of
from qir.ir import Value

#: Batches are cut into chunks whose buffers take at most this many bytes together, but of one sample at least.
CHUNK_BYTES: Final = 2 << 20
_ALIGNMENT: Final = 64

Progress = Callable[[int, int], None]


class Executor:
    """Runs a layout. Arrays are made for a batch size when it first comes, and kept until another one does.

    One call runs at a time; others wait.
    """

    def __init__(self, layout: Layout, facts: Facts) -> None:
        self.layout = layout
        self.chunk = max(1, CHUNK_BYTES // layout.sample_bytes) if layout.sample_bytes else 1
        self._constants = {v: np.asarray(a.data, dtype_of(v.type)) for v, a in facts.constants.items()}
        self._arena = np.empty(0, np.uint8)
        self._capacity = -1
        self._bound: dict[int, _Bound] = {}
        self._lock = threading.Lock()

    def run(
        self, feeds: Mapping[Value, Tensor], wanted: Sequence[Value], progress: Progress | None = None
    ) -> dict[Value, Tensor]:
        """The wanted values for feeds of the inputs' dtypes; `progress(done, total)` counts samples."""
        batch = next((len(a) for v, a in feeds.items() if v.type.is_batched), None)
        total = 1 if batch is None else batch
        found = {v: np.empty(v.type.concrete(total), dtype_of(v.type)) for v in wanted}
        step = min(self.chunk, total) if batch is not None else 1
        with self._lock:
            for start in range(0, max(total, 1), max(step, 1)):
                stop = min(start + step, total)
                self._run_chunk(feeds, found, start, stop, {step, total % step if step else 0})
                if progress is not None:
                    progress(stop, total)
        return found

    def _run_chunk(
        self, feeds: Mapping[Value, Tensor], found: Mapping[Value, Tensor], start: int, stop: int, sizes: set[int]
    ) -> None:
        bound = self._bind(stop - start, sizes)
        for value, array in feeds.items():
            bound.arrays[value][...] = array[start:stop] if value.type.is_batched else array
        for call in bound.calls:
            call()
        for value, array in found.items():
            if value.type.is_batched:
                array[start:stop] = bound.arrays[value]
            else:
                array[...] = bound.arrays[value]

    def _bind(self, batch: int, sizes: Iterable[int]) -> _Bound:
        """The calls for a chunk of this size; those of other sizes than `sizes` are dropped."""
        if batch not in self._bound:
            if batch > self._capacity:
                self._capacity = batch
                size = self.layout.fixed_bytes + self.layout.sample_bytes * batch
                self._bound.clear()
                raw = np.empty(size + _ALIGNMENT, np.uint8)
                self._arena = raw[-raw.ctypes.data % _ALIGNMENT :]
            self._bound = {n: b for n, b in self._bound.items() if n in sizes}
            self._bound[batch] = _Bound(self, batch)
        return self._bound[batch]

    def array(self, buffer: Buffer, memory: Memory, batch: int) -> Tensor:
        """The part of the arena that a buffer takes for a batch, as `memory` sees it."""
        shape = tuple(d if isinstance(d, int) else batch for d in memory.shape)
        size = memory.bytes * (batch if memory.is_batched else 1)
        start = self.layout.fixed_bytes + buffer.offset * self._capacity if memory.is_batched else buffer.offset
        return self._arena[start : start + size].view(memory.dtype).reshape(shape)

    @property
    def constants(self) -> Mapping[Value, Tensor]:
        """The data of all constants."""
        return self._constants


class _Bound:
    """The arrays of all values and the calls in order, for one chunk size."""

    def __init__(self, executor: Executor, batch: int) -> None:
        layout = executor.layout
        self.arrays: dict[Value, Tensor] = dict(executor.constants)
        self.calls: list[Call] = []
        for value, buffer in layout.place.items():
            self.arrays[value] = executor.array(buffer, memory_of(value), batch)
        for step, rooms in zip(layout.steps, layout.scratch, strict=True):
            if step.kernel.is_view and step.output not in self.arrays:
                self.arrays[step.output] = self.arrays[step.inputs[0]].reshape(step.output.type.concrete(batch))
            scratch = [executor.array(b, m, batch) for b, m in zip(rooms, step.kernel.scratch, strict=True)]
            call = step.kernel.bind([self.arrays[v] for v in step.inputs], self.arrays[step.output], scratch)
            if not step.kernel.is_view:
                self.calls.append(call)
