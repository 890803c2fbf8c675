"""select-q-formats: scale and zero point of every value, under the scheme that the target asks for.

Activations are searched on their histograms; weights get the scale of their largest magnitude, which
search-weight-ranges may clip, or, of few levels, one of little error; biases the product of input and weight scale.
Values that an op only passes on share one format, as do the operands of a concatenation.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qir.calibration import Histogram
from qir.errors import CalibrationError, PassError
from qir.fixed_point import Overflow
from qir.integer_functions_16 import OUTPUT_SCALE
from qir.ir import Graph, Op, Stage, Value
from qir.observers import Percentile
from qir.ops.float_elementwise import Sigmoid, Tanh
from qir.ops.float_nn import Conv, MatMul
from qir.ops.float_pool import AveragePool, MaxPool, Softmax
from qir.ops.movement import Movement
from qir.pass_manager import Pass, PassContext
from qir.passes.accumulation import excess_bits
from qir.passes.weight_formats import WeightForm, bias_type, check_percent, scale_of_type
from qir.rewrite import map_values
from qir.scale_search import affine_from_range, power_of_two_from_range, search_affine, search_power_of_two
from qir.target import FunctionRule, Scales, Scheme, Target
from qir.types import IntegerType, QuantizedType, TensorType, affine, fixed_point, scale_array

#: Output formats that the integer algorithms of the TensorFlow Lite family fix, by width: scale and zero point.
FIXED_FORMATS: dict[tuple[type[Op], int], tuple[float, int]] = {
    (Softmax, 8): (1 / 256, -128),
    (Sigmoid, 8): (1 / 256, -128),
    (Tanh, 8): (1 / 128, 0),
    (Sigmoid, 16): (OUTPUT_SCALE, 0),
    (Tanh, 16): (OUTPUT_SCALE, 0),
}


class Search(enum.StrEnum):
    """How the scale of an activation follows from what was observed."""

    MSE = "mse"  # the least expected squared error over the histogram
    RANGE = "range"  # the range that range-analysis left
    PERCENTILE = "percentile"  # the range of so many percent of what was observed


@dataclass(frozen=True)
class SelectQFormats(Pass):
    """Choose a quantized type for every value that has a storage. `search` is `mse` (default), `range` or `percentile`.

    `percent` is for `percentile` alone, which leaves out half of the rest on either side, 0.005 percent where it is not
    given. Where results wrap, nothing that was observed is left out.

    Raises PassError for a `percent` outside (0, 100] or with another search.
    """

    name: ClassVar[str] = "select-q-formats"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.RANGED})
    ensures: ClassVar[Stage | None] = Stage.TYPED
    search: Search = Search.MSE
    percent: float | None = None

    def __post_init__(self) -> None:
        check_percent(self.percent, "search", self.search)

    def run(self, graph: Graph, context: PassContext) -> Graph:
        """The graph at stage `typed`; histograms and storages have served and are dropped."""
        target = context.need_target(self.name)
        missing = next((v for v in graph.values() if v.storage is None and _is_real(v)), None)
        if missing is not None:
            raise PassError(f"%{missing.name} has no storage; run assign-bit-widths first")
        groups = share_formats(graph)
        types: dict[Value, TensorType] = {}
        formats: dict[Value, QuantizedType] = {}
        own = {v for op in graph.ops if isinstance(op, Conv | MatMul) for v in op.operands[1:]} & set(graph.constants)
        for value in graph.values():
            if not _is_real(value) or value in own:
                continue
            leader = groups[value]
            if leader not in formats:
                formats[leader] = self._format(graph, groups.members(leader), target)
            types[value] = value.type.with_element(formats[leader].with_storage(_storage(value)))
        for op in graph.ops:
            if isinstance(op, Conv | MatMul):
                types.update(_parameter_types(graph, op, types, target))
        shared = sum(len(groups.members(leader)) > 1 for leader in formats)
        context.note(f"{len(types)} formats by {self.search}, {shared} groups share one")
        return map_values(
            graph,
            lambda v: {"type": types.get(v, v.type), "histogram": None, "storage": None},
            Stage.TYPED,
        )

    def _format(self, graph: Graph, members: list[Value], target: Target) -> QuantizedType:
        """The format of values that share one: a fixed one, else the search on all that was observed of them."""
        storage = _storage(members[0])
        if target.functions.rule is FunctionRule.TENSORFLOW_LITE:
            makers = {type(graph.producers[v]) for v in members if v in graph.producers}
            fixed = {FIXED_FORMATS[maker, storage.bits] for maker in makers if (maker, storage.bits) in FIXED_FORMATS}
            if len(fixed) == 1 and storage.signed:
                scale, zero = fixed.pop()
                if not zero or target.activations.scheme is Scheme.AFFINE:
                    return affine(storage, scale, zero)
        observed = [Histogram.from_array(v.histogram.data) for v in members if v.histogram is not None]
        ranges = [v.range for v in members if v.range is not None]
        if not (observed if self.search != Search.RANGE and observed else ranges):
            raise PassError(f"%{members[0].name} has neither histogram nor range; run calibrate and range-analysis")
        merged = functools.reduce(Histogram.merge, observed) if self.search != Search.RANGE and observed else None
        lo, hi = (min(r.lo for r in ranges), max(r.hi for r in ranges)) if ranges else (0.0, 0.0)
        if merged is not None and self.search == Search.PERCENTILE and _clips(target):
            (lo, hi), merged = Percentile(self.percent or Percentile().percent).range(merged), None
        try:
            if target.activations.scales is Scales.POWER_OF_TWO:
                return fixed_point(storage, _exponent(storage, merged, (lo, hi), target))
            symmetric = target.activations.scheme is Scheme.SYMMETRIC
            if merged is not None and _clips(target):
                scale_found, zero = search_affine(merged, storage.lo, storage.hi, symmetric)
            else:
                lo, hi = (merged.minimum, merged.maximum) if merged is not None else (lo, hi)
                lo, hi = (lo, hi) if _clips(target) else _with_room(lo, hi, symmetric)
                scale_found, zero = affine_from_range(lo, hi, storage.lo, storage.hi, symmetric)
        except CalibrationError as fault:
            raise PassError(f"%{members[0].name}: {fault}") from fault
        return affine(storage, scale_found, zero)


def _clips(target: Target) -> bool:
    """Whether results that do not fit are cut off. Where they wrap, or become zero, twice the range has room."""
    return target.requantization.overflow in (Overflow.SATURATE, Overflow.SATURATE_SYMMETRIC)


def _with_room(lo: float, hi: float, symmetric: bool) -> tuple[float, float]:
    """Twice the range, 0 included; with a zero point as much below as above, where results just outside may fall."""
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    more = (-lo, hi) if symmetric else ((hi - lo) / 2, (hi - lo) / 2)
    return lo - more[0], hi + more[1]


def _exponent(storage: IntegerType, merged: Histogram | None, observed: tuple[float, float], target: Target) -> int:
    """The binary point of activations."""
    bits = storage.hi.bit_length() + storage.signed
    clips = _clips(target)
    if merged is not None and clips:
        return search_power_of_two(merged, bits, storage.signed)
    lo, hi = (merged.minimum, merged.maximum) if merged is not None else observed
    return power_of_two_from_range(lo, hi, bits, storage.signed) + (not clips)


class Groups:
    """A partition of values; the leader of a group is its first value."""

    def __init__(self) -> None:
        self._leader: dict[Value, Value] = {}
        self._members: dict[Value, list[Value]] = {}

    def add(self, value: Value) -> None:
        """A group of its own."""
        self._leader[value] = value
        self._members[value] = [value]

    def join(self, a: Value, b: Value) -> None:
        """One group of two; the smaller one is relabelled."""
        first, second = self._leader[a], self._leader[b]
        if first is second:
            return
        if len(self._members[first]) < len(self._members[second]):
            first, second = second, first
        for value in self._members.pop(second):
            self._leader[value] = first
            self._members[first].append(value)

    def members(self, leader: Value) -> list[Value]:
        """All values of a group."""
        return self._members[leader]

    def __getitem__(self, value: Value) -> Value:
        return self._leader[value]


def share_formats(graph: Graph) -> Groups:
    """Groups of real values that must or should have one format: data movement, pooling, concatenation.

    Formats that an algorithm fixes are not joined with others: legalize requantizes between them.
    """
    groups = Groups()
    for value in graph.values():
        if _is_real(value):
            groups.add(value)
    for op in graph.ops:
        if isinstance(op, Movement | MaxPool | AveragePool):
            for operand in op.operands:
                if _is_real(operand) and operand.storage == op.result.storage:
                    groups.join(operand, op.result)
    return groups


def _is_real(value: Value) -> bool:
    return not isinstance(value.type.element, IntegerType)


def _storage(value: Value) -> IntegerType:
    assert value.storage is not None
    return value.storage


def _parameter_types(
    graph: Graph, op: Conv | MatMul, types: dict[Value, TensorType], target: Target
) -> Iterator[tuple[Value, TensorType]]:
    """Types of constant weights and bias of a convolution or matrix product."""
    weight, bias = op.operands[1], op.optional_operand(2)
    data = graph.constants.get(weight)
    bias_data = graph.constants.get(bias) if bias is not None else None
    input_scale = scale_of_type(types[op.operands[0]])
    if data is not None:
        form = WeightForm.of(op, data, bias_data, input_scale, _storage(weight), target)
        element = form.whole()
        scales = scale_array(element)
        yield weight, weight.type.with_element(element)
    else:
        scale = scale_of_type(types[weight])
        scales = np.asarray(scale * 2.0 ** excess_bits(target, input_scale * scale, op.sum_range))
    if bias is not None and bias_data is not None:
        if bias.type.rank != 1:
            raise PassError(f"{op.describe()}: the bias must be a vector; run canonicalize first")
        yield bias, bias.type.with_element(bias_type(op, input_scale, scales, _storage(bias), target, bias_data.name))
