"""Which kernels run a graph, in which memory: ops bound in order, and an arena planned once from liveness."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from qir.backends.kernels.kernel import Facts, Kernel, Memory, dtype_of
from qir.backends.kernels.select import select, select_fused
from qir.ir import Graph, Op, Value
from qir.ops.constant import Const

#: Every buffer starts at a multiple of this many bytes.
ALIGNMENT: Final = 64


@dataclass(frozen=True)
class Step:
    """One call: the ops that it computes, its kernel, the values that it reads and the one that it writes."""

    ops: tuple[Op, ...]
    kernel: Kernel
    inputs: tuple[Value, ...]
    output: Value


@dataclass(frozen=True)
class Buffer:
    """Where a value or a kernel's scratch lives in the arena: offset and bytes, of one sample where `per_sample`.

    It is written at step `first` (-1: an input) and free after step `last`.
    """

    name: str
    bytes: int
    offset: int
    per_sample: bool
    first: int
    last: int


@dataclass(frozen=True)
class Layout:
    """Steps and the memory that they work in.

    `place` gives the buffer of every value that is stored; a view has the buffer of what it views. Batched buffers
    take `sample_bytes` a sample, all others `fixed_bytes` together.
    """

    steps: tuple[Step, ...]
    place: dict[Value, Buffer]
    scratch: tuple[tuple[Buffer, ...], ...]
    sample_bytes: int
    fixed_bytes: int

    @property
    def packed_bytes(self) -> int:
        """Bytes of the constants that kernels keep in layouts of their own."""
        return sum(step.kernel.packed_bytes for step in self.steps)


def lay_out(graph: Graph, facts: Facts, *, keep_all: bool, own: Mapping[Op, Kernel] | None = None) -> Layout:
    """Choose kernels and plan memory. With `keep_all` nothing is fused and every value has a place of its own.

    `own` are the kernels that a backend has of its own (`qir.backends.kernels.select.own_kernels`); they come first.
    """
    steps = tuple(_steps(graph, facts, own or {}, fuse=not keep_all))
    roots = _roots(steps)
    last_read: dict[Value, int] = {}
    for number, step in enumerate(steps):
        last_read.update((roots.get(v, v), number) for v in step.inputs)
    last_read.update((roots.get(v, v), len(steps)) for v in graph.outputs)
    place: dict[Value, Buffer] = {}
    scratch: list[tuple[Buffer, ...]] = []
    pools = _Pool(), _Pool()

    def reserve(name: str, memory: Memory, first: int, last: int) -> Buffer:
        last = len(steps) if keep_all else last
        offset = pools[memory.is_batched].take(memory.bytes, last)
        return Buffer(name, memory.bytes, offset, memory.is_batched, first, last)

    for value in graph.inputs:
        place[value] = reserve(value.name, memory_of(value), -1, last_read.get(value, -1))
    for number, step in enumerate(steps):
        for pool in pools:
            pool.release(number)
        output = step.output
        if step.kernel.is_view:
            root = roots[output]
            if root in place:
                place[output] = place[root]
        else:
            place[output] = reserve(output.name, memory_of(output), number, last_read.get(output, number))
        rooms = enumerate(step.kernel.scratch)
        scratch.append(tuple(reserve(f"{output.name} scratch {i}", m, number, number) for i, m in rooms))
    return Layout(steps, place, tuple(scratch), pools[True].size, pools[False].size)


def memory_of(value: Value) -> Memory:
    """What a value takes."""
    return Memory(value.type.shape, dtype_of(value.type))


def _steps(graph: Graph, facts: Facts, own: Mapping[Op, Kernel], *, fuse: bool) -> Iterator[Step]:
    """Ops with their kernels; what only the next op reads is computed together with it where a kernel does both."""
    outputs, absorbed = set(graph.outputs), set[Op]()
    for op in graph.ops:
        if isinstance(op, Const) or op in absorbed:
            continue
        if op in own:
            yield Step((op,), own[op], op.operands, op.result)
            continue
        readers = graph.users.get(op.results[0], ())
        if fuse and len(readers) == 1 and op.results[0] not in outputs and readers[0] not in own:
            kernel = select_fused(op, readers[0], facts)
            if kernel is not None:
                absorbed.add(readers[0])
                yield Step((op, readers[0]), kernel, op.operands, readers[0].result)
                continue
        yield Step((op,), select(op, facts), op.operands, op.result)


def _roots(steps: Sequence[Step]) -> dict[Value, Value]:
    """The value whose memory each view shares."""
    roots: dict[Value, Value] = {}
    for step in steps:
        if step.kernel.is_view:
            roots[step.output] = roots.get(step.inputs[0], step.inputs[0])
    return roots


class _Pool:
    """Offsets by best fit among the gaps that released buffers leave, in order of the steps."""

    def __init__(self) -> None:
        self.size = 0
        self._gaps: list[tuple[int, int]] = []  # start, end; sorted, never adjacent
        self._held: dict[int, list[tuple[int, int]]] = {}  # by the last step that needs them

    def take(self, count: int, last: int) -> int:
        """The offset of `count` bytes that are held up to and including step `last`."""
        room = -(-max(count, 1) // ALIGNMENT) * ALIGNMENT
        fitting = [(end - start, start, end) for start, end in self._gaps if end - start >= room]
        if fitting:
            _, start, end = min(fitting)
            index = self._gaps.index((start, end))
            self._gaps[index : index + 1] = [(start + room, end)] if start + room < end else []
        else:  # the gap at the end, if there is one, grows
            start = self._gaps.pop()[0] if self._gaps and self._gaps[-1][1] == self.size else self.size
            self.size = start + room
        self._held.setdefault(last, []).append((start, start + room))
        return start

    def release(self, step: int) -> None:
        """Give back what was needed up to the step before this one."""
        for start, end in self._held.pop(step - 1, ()):
            index = bisect.bisect(self._gaps, (start, end))
            if index < len(self._gaps) and self._gaps[index][0] == end:
                end = self._gaps.pop(index)[1]
            if index and self._gaps[index - 1][1] == start:
                start = self._gaps.pop(index - 1)[0]
                index -= 1
            self._gaps.insert(index, (start, end))
