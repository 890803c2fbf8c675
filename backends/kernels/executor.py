"""Running a layout: kernels tied to arrays in one arena, chunk by chunk of the batch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from qir.backends.kernels.kernel import Call, Facts, Memory, Tensor, dtype_of
from qir.backends.kernels.plan import ALIGNMENT, Buffer, Layout, memory_of
from qir.ir import Value

#: Batches are cut into chunks whose buffers take at most this many bytes together, but of one sample at least: a chunk
#: that fits the second-level cache is as fast as any.
CHUNK_BYTES: Final = 2 << 20

Prepare = Callable[[Value, Tensor], Tensor]
Collect = Callable[[slice, Mapping[Value, Tensor]], None]


class Executor:
    """Runs a layout. Arrays are made for a chunk size when it first comes, and kept as long as batches need it.

    One thread runs at a time; others wait.
    """

    def __init__(self, layout: Layout, facts: Facts) -> None:
        self.layout = layout
        self.chunk = max(1, CHUNK_BYTES // layout.sample_bytes) if layout.sample_bytes else 1
        self._constants = {v: np.asarray(a.data, dtype_of(v.type)) for v, a in facts.constants.items()}
        self._arena = np.empty(0, np.uint8)
        self._capacity = -1
        self._bound: dict[int, _Bound] = {}
        self._lock = threading.RLock()  # `collect` may come back with another batch

    def run(self, feeds: Mapping[Value, Tensor], prepare: Prepare, collect: Collect) -> None:
        """Run every step on each chunk of the feeds.

        `prepare` turns the part of a feed that belongs to a chunk into the input's integers or float32 reals. `collect`
        gets the samples of the chunk and the arrays of all stored values, which the next chunk overwrites.
        """
        batch = next((len(a) for v, a in feeds.items() if v.type.is_batched), 1)
        step = max(1, min(self.chunk, batch))
        sizes = {min(step, batch), batch % step}
        with self._lock:
            self._bound = {size: bound for size, bound in self._bound.items() if size in sizes}
            for start in range(0, max(batch, 1), step):
                part = slice(start, min(start + step, batch))
                bound = self._bind(part.stop - start)
                for value, array in feeds.items():
                    bound.arrays[value][...] = prepare(value, array[part] if value.type.is_batched else array)
                for call in bound.calls:
                    call()
                collect(part, bound.arrays)

    def _bind(self, batch: int) -> _Bound:
        """The calls for a chunk of this size."""
        if batch > self._capacity:
            size = self.layout.fixed_bytes + self.layout.sample_bytes * batch
            room = np.empty(size + ALIGNMENT, np.uint8)
            self._arena = room[-room.ctypes.data % ALIGNMENT :]
            self._capacity = batch
            self._bound.clear()
        if batch not in self._bound:
            self._bound[batch] = _Bound(self.layout, self._constants, lambda b, m: self._array(b, m, batch), batch)
        return self._bound[batch]

    def _array(self, buffer: Buffer, memory: Memory, batch: int) -> Tensor:
        """The part of the arena that a buffer takes for a batch, as `memory` sees it."""
        shape = tuple(d if isinstance(d, int) else batch for d in memory.shape)
        size = memory.bytes * (batch if memory.is_batched else 1)
        start = self.layout.fixed_bytes + buffer.offset * self._capacity if memory.is_batched else buffer.offset
        return self._arena[start : start + size].view(memory.dtype).reshape(shape)


class _Bound:
    """The arrays of all values and the calls in order, for one chunk size."""

    def __init__(
        self,
        layout: Layout,
        constants: Mapping[Value, Tensor],
        array: Callable[[Buffer, Memory], Tensor],
        batch: int,
    ) -> None:
        self.arrays = {**constants, **{v: array(b, memory_of(v)) for v, b in layout.place.items()}}
        self.calls: list[Call] = []
        for step, rooms in zip(layout.steps, layout.scratch, strict=True):
            if step.kernel.is_view:
                if step.output not in self.arrays:  # a view of a constant
                    shape = step.output.type.concrete(batch)
                    self.arrays[step.output] = self.arrays[step.inputs[0]].reshape(shape)
                continue
            inputs = [self.arrays[v] for v in step.inputs]
            scratch = [array(b, m) for b, m in zip(rooms, step.kernel.scratch, strict=True)]
            self.calls.append(step.kernel.bind(inputs, self.arrays[step.output], scratch))
