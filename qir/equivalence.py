"""Whether a pass keeps the bits of an integer graph: shown from its text, by every input, or tested on hard ones."""

from __future__ import annotations

import enum
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qir.errors import PassError
from qir.idle import is_idle, is_product_idle
from qir.interpreter import interpret
from qir.interval import exact
from qir.ir import Graph, Op, Stage, Value
from qir.ops.accumulate import Accumulating
from qir.pass_manager import Pass, PassContext, PassRecord
from qir.probes import Probe, count_inputs, every_input, some_inputs
from qir.proof import prove
from qir.table import columns
from qir.types import S64, AffineType, FixedPointType, shape_text, storage_of

Tensor = npt.NDArray[Any]

#: Elements of an input that a message shows.
_SHOWN: Final = 16


class Method(enum.StrEnum):
    """How two graphs were held to the same bits."""

    IDENTICAL = "identical"  # they differ in nothing that is computed
    EXHAUSTIVE = "exhaustive"  # on every input
    TESTED = "tested"  # on extremes, worst cases of the first sums, and random inputs
    NOT_CLAIMED = "not claimed"  # the pass means to change bits; run all the same


@dataclass(frozen=True)
class Equivalent:
    """What was found of one pass.

    `inputs` is how many inputs ran through both graphs, `differing` how many output elements changed, and `seconds` the
    wall time that it took.
    """

    pass_name: str
    method: Method
    inputs: int
    differing: int
    seconds: float


@dataclass
class Equivalence:
    """Holds every pass from stage `fixed` to stage `fixed` to the same output bits, and records how.

    Nothing runs where graphs differ only in facts and in overflow modes that are proved idle. Where a sample can be at
    most `exhaustive` different inputs, each of them runs through both graphs; else `samples` do: up to half of them are
    chosen to bring values and sums to their ends, the others are random, from `seed`. Printed, it is a table.

    Raises PassError when bits differ, unless the pass says by `preserves_bits` that it may change them, and when inputs
    or outputs are not the same any more. Takes the interpreter's time: for a large graph, choose few samples.
    """

    exhaustive: int = 1 << 16
    samples: int = 256
    seed: int = 0
    records: list[Equivalent] = field(default_factory=list)

    def after_pass(self, index: int, ran: Pass, record: PassRecord, context: PassContext) -> None:
        before, after = record.before, record.after
        if before.stage is not Stage.FIXED or after.stage is not Stage.FIXED:
            return
        start = time.perf_counter()
        _check_border(record.name, before, after)
        method, inputs, differing = Method.IDENTICAL, 0, 0
        if not differ_in_facts_only(before, after):
            count = count_inputs(before, self.exhaustive)
            method = Method.TESTED if count is None else Method.EXHAUSTIVE
            for feeds in self._inputs(before, count):
                for fault in _changes(before, after, feeds):
                    if ran.preserves_bits:
                        raise PassError(f"pass {record.name} {fault.describe(before, feeds, inputs)}")
                    differing += int(fault.differs.sum())
                inputs += _samples(before, feeds)
            if not ran.preserves_bits:
                method = Method.NOT_CLAIMED
        self.records.append(Equivalent(record.name, method, inputs, differing, time.perf_counter() - start))

    def _inputs(self, graph: Graph, count: int | None) -> Iterator[Probe]:
        return some_inputs(graph, self.samples, self.seed) if count is None else every_input(graph, count)

    def __str__(self) -> str:
        rows = [("pass", "method", "inputs", "differing", "seconds")]
        rows += [
            (r.pass_name, str(r.method), f"{r.inputs:,}", f"{r.differing:,}", f"{r.seconds:.2f}") for r in self.records
        ]
        return "\n".join(columns(rows, (2, 3, 4)))


def differ_in_facts_only(before: Graph, after: Graph) -> bool:
    """Whether two graphs compute the same by their text alone.

    That is so where op for op they are the same but for names, facts, and overflow modes that the proof of each graph
    shows idle: such an op gives its exact value in both.
    """
    pairs = dict(zip(before.inputs, after.inputs, strict=True))
    if len(before.ops) != len(after.ops) or any(a.type != b.type for a, b in pairs.items()):
        return False
    for a, b in zip(before.ops, after.ops, strict=True):
        if type(a) is not type(b) or [pairs[v] for v in a.operands] != list(b.operands):
            return False
        if [v.type for v in a.results] != [v.type for v in b.results]:
            return False
        for name in a.attribute_names():
            if name == "partial" and isinstance(a, Accumulating):
                continue
            if not _same(getattr(a, name), getattr(b, name)) and not (_idle(before, a, name) and _idle(after, b, name)):
                return False
        pairs.update(zip(a.results, b.results, strict=True))
    return [pairs[v] for v in before.outputs] == list(after.outputs)


def _same(left: object, right: object) -> bool:
    """Whether attributes are equal to the bit: 0.0 is not -0.0."""
    return left == right and (not isinstance(left, float | tuple) or repr(left) == repr(right))


def _idle(graph: Graph, op: Op, attribute: str) -> bool:
    """Whether the attribute is an overflow mode of which the proof of its graph shows that it never acts."""
    match attribute:
        case "overflow":
            return is_idle(op, prove(graph).steps.get(op))
        case "product_overflow":
            return is_product_idle(op, prove(graph).steps.get(op))
    return False


def _check_border(name: str, before: Graph, after: Graph) -> None:
    """Raises PassError where inputs, outputs or attributes of the whole graph changed. Storages of outputs may."""
    for what, left, right in zip(("inputs", "outputs", "attributes"), _border(before), _border(after), strict=True):
        if left != right:
            raise PassError(f"pass {name} changed the {what} of the graph, {left}, to {right}; keep them as they are")


def _border(graph: Graph) -> tuple[Mapping[str, object], ...]:
    """What the inputs are, what the bits of the outputs mean, and by which rules reals enter."""
    outputs = {}
    for name, value in zip(graph.output_names, graph.outputs, strict=True):
        element = value.type.element
        meaning = element.with_storage(S64) if isinstance(element, AffineType | FixedPointType) else None
        outputs[name] = (shape_text(value.type.shape), storage_of(element) is None, meaning)
    return {v.name: v.type for v in graph.inputs}, outputs, dict(graph.attributes)


def _samples(graph: Graph, feeds: Probe) -> int:
    """How many samples a batch holds."""
    return next((len(feeds[v.name]) for v in graph.inputs if v.type.is_batched), 1)


@dataclass(frozen=True)
class _Change:
    """An output before and after, and where it differs."""

    output: str
    is_batched: bool
    before: Tensor
    after: Tensor
    differs: Tensor

    def describe(self, graph: Graph, feeds: Probe, done: int) -> str:
        """Where it differs first, on which input, of which `done` ran in the batches before."""
        place = tuple(int(i) for i in np.argwhere(self.differs)[0])
        sample, inside = (place[0], place[1:]) if self.is_batched else (0, place)
        shown = [_text(v, feeds[v.name][sample if v.type.is_batched else ...]) for v in graph.inputs]
        return (
            f"changed output {self.output!r} at {list(inside)} from {self.before[place]} to {self.after[place]} "
            f"on input number {done + sample + 1}, {', '.join(shown)}; "
            "a pass that means to change bits says so by preserves_bits"
        )


def _text(value: Value, sample: Tensor) -> str:
    """The numbers of an input, or how many there are and their ends."""
    if sample.size <= _SHOWN:
        return f"{value.name}={sample.tolist()}"
    shape = "x".join(map(str, sample.shape))
    return f"{value.name}={shape} numbers in [{sample.min()}, {sample.max()}]"


def _changes(before: Graph, after: Graph, feeds: Probe) -> Iterator[_Change]:
    """The outputs that differ, in order."""
    left, right = interpret(before, feeds), interpret(after, feeds)
    for name, value in zip(before.output_names, before.outputs, strict=True):
        bits = [_bits(side[name], left[name].dtype != right[name].dtype) for side in (left, right)]
        differs = np.asarray(bits[0] != bits[1], bool)
        if differs.any():
            yield _Change(name, value.type.is_batched, left[name], right[name], differs)


def _bits(array: Tensor, as_objects: bool) -> Tensor:
    """What to compare: the bits of reals, so that NaN is NaN and -0.0 is not 0.0, and integers of any two dtypes."""
    if array.dtype.kind == "f":
        return array.view(np.uint32)
    return exact(array) if as_objects else array
