"""Inputs to try a fixed-stage graph on: every one where they are few, else extremes, worst cases of sums, and random.

A probe is one array an input, of its shape with a batch of 1 where that is open.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qir.interval import Interval, exact
from qir.ir import Graph, Op, Value
from qir.opdef import pad_spatial, window_view
from qir.ops.accumulate import centre
from qir.ops.fixed_linear import Conv2d, FixedMatMul
from qir.ops.fixed_rescale import Requantize
from qir.ops.movement import FixedReshape, FixedTranspose
from qir.types import storage_of, zero_array

Tensor = npt.NDArray[Any]
Probe = dict[str, Tensor]

#: What the arrays of one batch take while it is interpreted, roughly.
BATCH_BYTES: Final = 64 << 20
#: int64, with a few temporary copies of what the running op reads and makes.
_BYTES_PER_ELEMENT: Final = 32
#: The ends of a float input whose range is not stated.
_REAL_ENDS: Final = Interval(-65536.0, 65536.0)


def count_inputs(graph: Graph, most: int) -> int | None:
    """How many different inputs a sample can be; None where that is more than `most`, or some input is of reals."""
    total = 1
    for value in graph.inputs:
        storage, size = storage_of(value.type.element), value.type.sample_size
        if storage is None:
            return None
        values = storage.hi - storage.lo + 1
        if values > 1:
            total *= values ** min(size, most.bit_length())  # 2 to that power is above `most` already
        if total > most:
            return None
    return total


def every_input(graph: Graph, count: int) -> Iterator[Probe]:
    """All inputs of a graph, of which there are `count` (see `count_inputs`), in batches: elements count as digits."""
    step = batch_size(graph)
    for first in range(0, count, step):
        rest = np.arange(first, min(first + step, count))
        samples, batch = len(rest), dict[str, Tensor]()
        for value in graph.inputs:
            storage = storage_of(value.type.element)
            assert storage is not None
            digits = np.empty((samples, value.type.sample_size), storage.dtype)
            for place in range(digits.shape[1]):
                rest, digit = np.divmod(rest, storage.hi - storage.lo + 1)
                digits[:, place] = digit.astype(storage.dtype) + np.array([storage.lo], storage.dtype)
            batch[value.name] = digits.reshape(value.type.concrete(samples))
        yield batch


def some_inputs(graph: Graph, count: int, seed: int) -> Iterator[Probe]:
    """`count` inputs in batches: up to half of them chosen to bring values and sums to their ends, then random ones."""
    inputs = [_Ends.of(v) for v in graph.inputs]
    half = -(-count // 2)
    probes = islice(chain(islice(_chosen(graph, inputs, half), half), _random(inputs, seed)), count)
    while batch := list(islice(probes, batch_size(graph))):
        yield {n: np.concatenate([p[n] for p in batch]) for n in batch[0]} if len(batch) > 1 else batch[0]


def batch_size(graph: Graph) -> int:
    """Samples to interpret at a time, in about BATCH_BYTES; 1 where the batch of some input is not open."""
    if not graph.inputs or not all(v.type.is_batched for v in graph.inputs):
        return 1
    widest = max((sum(v.type.sample_size for v in (*op.operands, *op.results)) for op in graph.ops), default=1)
    return max(1, BATCH_BYTES // (_BYTES_PER_ELEMENT * max(widest, 1)))


@dataclass(frozen=True, eq=False)
class _Ends:
    """The least and the greatest number of an input, and the array [1, ...] that stands for the real 0."""

    value: Value
    low: Any
    high: Any
    zero: Tensor

    @staticmethod
    def of(value: Value) -> _Ends:
        """From the storage, or from the range where the input is of reals."""
        shape, storage = value.type.concrete(1), storage_of(value.type.element)
        if storage is None:
            ends = value.range or _REAL_ENDS
            return _Ends(value, np.float32(ends.lo), np.float32(ends.hi), np.zeros(shape, np.float32))
        zero, axis = zero_array(value.type.element), getattr(value.type.element, "axis", None)
        if axis is not None:
            zero = zero.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        inside = np.broadcast_to(np.clip(exact(zero), storage.lo, storage.hi), shape).astype(storage.dtype)
        return _Ends(value, storage.dtype.type(storage.lo), storage.dtype.type(storage.hi), inside)

    def where(self, is_high: npt.ArrayLike) -> Tensor:
        """The greatest number where the mask, which broadcasts, is true, else the least."""
        return np.asarray(np.where(np.broadcast_to(is_high, self.zero.shape), self.high, self.low))

    def alternating(self) -> Tensor:
        """Whether each element is an odd one."""
        return np.asarray(np.arange(self.zero.size).reshape(self.zero.shape) % 2 == 1)

    def channel(self, number: int) -> npt.ArrayLike:
        """Whether each element has this place along the first axis behind the batch."""
        shape = self.zero.shape
        return np.arange(shape[1]).reshape(-1, *[1] * (len(shape) - 2)) == number if len(shape) > 1 else number == 0

    def random(self, random: np.random.Generator, number: int) -> Tensor:
        """Any numbers, or, where `number` is odd, either end; reals are of all magnitudes."""
        if number % 2:
            return self.where(random.integers(0, 2, self.zero.shape, bool, endpoint=False))
        if self.zero.dtype.kind == "f":
            reals = random.normal(0, 1, self.zero.shape) * 2.0 ** random.integers(-16, 16)
            return np.clip(reals, self.low, self.high).astype(np.float32)
        return random.integers(self.low, self.high, self.zero.shape, self.zero.dtype, endpoint=True)


def _random(inputs: list[_Ends], seed: int) -> Iterator[Probe]:
    random, number = np.random.default_rng(seed), 0
    while True:
        yield {e.value.name: e.random(random, number) for e in inputs}
        number += 1


def _chosen(graph: Graph, inputs: list[_Ends], count: int) -> Iterator[Probe]:
    """About `count` probes; those that tell most come first."""
    odd = [e.alternating() for e in inputs]
    ends: list[list[npt.ArrayLike]] = [[False] * len(inputs), [True] * len(inputs), [*odd], [~o for o in odd]]
    if len(inputs) > 1:
        ends += [[i % 2 == side for i in range(len(inputs))] for side in (0, 1)]
    for masks in ends:
        yield {e.value.name: e.where(m) for e, m in zip(inputs, masks, strict=True)}
    yield {e.value.name: e.zero for e in inputs}
    sums = list(_first_sums(graph, inputs))
    for given, op, seen in sums:
        for worst in _worst_cases(graph, op, given, seen, max(1, count // (8 * len(sums)))):
            yield {e.value.name: worst if e is given else e.zero for e in inputs}
    for number in _spread(max((e.zero.shape[1] for e in inputs if e.zero.ndim > 1), default=0), count):
        for flip in (False, True):
            yield {e.value.name: e.where(np.not_equal(e.channel(number), flip)) for e in inputs}


def _spread(length: int, most: int) -> list[int]:
    """At most `most` places, evenly apart."""
    return sorted({int(i) for i in np.linspace(0, length - 1, min(length, most))}) if length else []


def _first_sums(graph: Graph, inputs: list[_Ends]) -> Iterator[tuple[_Ends, Op, Tensor]]:
    """Layers of constant weights that read an input, at most moved or requantized, and the places of what they read."""
    seen = {e.value: (e, np.arange(e.zero.size).reshape(e.zero.shape)) for e in inputs}
    for op in graph.ops:
        if not op.operands or op.operands[0] not in seen:
            continue
        given, places = seen[op.operands[0]]
        match op:
            case FixedReshape() | FixedTranspose():
                seen[op.result] = given, op.move(places)
            case Requantize():
                seen[op.result] = given, places
            case Conv2d() | FixedMatMul() if op.operands[1] in graph.constants and op.macs():
                yield given, op, places


def _worst_cases(graph: Graph, op: Op, given: _Ends, seen: Tensor, most: int) -> Iterator[Tensor]:
    """For `most` outputs of a layer: terms that all drive the sum up, all down, first half up and rest down, and back.

    Of a convolution, at the window in the middle.
    """
    weight = op.operands[1]
    weights = np.sign(centre(exact(graph.constants[weight].data), weight.type)).astype(np.int8)
    if isinstance(op, Conv2d):
        window, spatial = op.window, seen.shape[1:3]
        outputs = window.output(spatial)
        view = window_view(pad_spatial(seen[:1], window, spatial, outputs, 1, -1), window, outputs, 1)
        terms = view[0, outputs[0] // 2, outputs[1] // 2].reshape(op.groups, 1, -1, *window.kernel)  # [g, 1, C, kh, kw]
        signs = weights.transpose(0, 3, 1, 2)  # [O, C, kh, kw]
        if not op.order.channels_outside:
            terms, signs = terms.transpose(0, 1, 3, 4, 2), signs.transpose(0, 2, 3, 1)
        terms, signs = terms.reshape(op.groups, 1, -1), signs.reshape(len(signs), -1)
    elif weights.ndim == 2:
        terms, signs = seen.reshape(1, -1, seen.shape[-1]), weights.T
    else:
        return
    first = np.arange(signs.shape[1]) < signs.shape[1] // 2
    for output in _spread(len(signs), most):
        places, sign = terms[output * len(terms) // len(signs)], signs[output]
        counts = (places >= 0) & (sign != 0)
        for rises in (np.ones_like(first), np.zeros_like(first), first, ~first):
            probe = given.zero.reshape(-1).copy()
            driven = np.where((sign > 0) == rises, given.high, given.low)
            probe[places[counts]] = np.broadcast_to(driven, places.shape)[counts]
            yield probe.reshape(given.zero.shape)
