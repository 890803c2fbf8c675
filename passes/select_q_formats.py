"""select-q-formats: scale and zero point of every value, under the scheme that the target asks for.

Activations are searched on their histograms; weights get the scale of their largest magnitude; biases the product of
input and weight scale. Values that an op only passes on share one format, as do the operands of a concatenation.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from qir.calibration import Histogram
from qir.errors import PassError
from qir.ir import Graph, Op, Stage, Value
from qir.ops.float_elementwise import Sigmoid, Tanh
from qir.ops.float_nn import Conv, MatMul
from qir.ops.float_pool import AveragePool, MaxPool, Softmax
from qir.ops.movement import Movement
from qir.pass_manager import Pass, PassContext
from qir.rewrite import map_values
from qir.scale_search import affine_from_range, search_affine
from qir.target import Granularity, Scheme, Target
from qir.types import AffineType, IntegerType, TensorType, affine, integer

#: Output formats that the integer algorithms of the TensorFlow Lite family fix for 8 bits: scale and zero point.
FIXED_FORMATS: dict[type[Op], tuple[float, int]] = {
    Softmax: (1 / 256, -128),
    Sigmoid: (1 / 256, -128),
    Tanh: (1 / 128, 0),
}


class Search(enum.StrEnum):
    """How the scale of an activation follows from what was observed."""

    MSE = "mse"  # the least expected squared error over the histogram
    RANGE = "range"  # the range that range-analysis left


@dataclass(frozen=True)
class SelectQFormats(Pass):
    """Choose a quantized type for every value that has a storage. `search` is `mse` (default) or `range`."""

    name: ClassVar[str] = "select-q-formats"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.RANGED})
    ensures: ClassVar[Stage | None] = Stage.TYPED
    search: Search = Search.MSE

    def run(self, graph: Graph, context: PassContext) -> Graph:
        """The graph at stage `typed`; histograms and storages have served and are dropped."""
        target = context.need_target(self.name)
        missing = next((v for v in graph.values() if v.storage is None and _is_real(v)), None)
        if missing is not None:
            raise PassError(f"%{missing.name} has no storage; run assign-bit-widths first")
        groups = share_formats(graph)
        types: dict[Value, TensorType] = {}
        formats: dict[Value, AffineType] = {}
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
                types.update(_weight_types(graph, op, types, target))
        shared = sum(len(groups.members(leader)) > 1 for leader in formats)
        context.note(f"{len(types)} formats by {self.search}, {shared} groups share one")
        return map_values(
            graph,
            lambda v: {"type": types.get(v, v.type), "histogram": None, "storage": None},
            Stage.TYPED,
        )

    def _format(self, graph: Graph, members: list[Value], target: Target) -> AffineType:
        """The format of values that share one: a fixed one, else the search on all that was observed of them."""
        storage = _storage(members[0])
        makers = {type(graph.producers[v]) for v in members if v in graph.producers}
        fixed = {FIXED_FORMATS[maker] for maker in makers if maker in FIXED_FORMATS}
        if len(fixed) == 1 and storage == integer(8):
            scale, zero = fixed.pop()
            return affine(storage, scale, zero)
        symmetric = target.activations.scheme is Scheme.SYMMETRIC
        observed = [Histogram.from_array(v.histogram.data) for v in members if v.histogram is not None]
        ranges = [v.range for v in members if v.range is not None]
        if self.search is Search.MSE and observed:
            merged = observed[0]
            for histogram in observed[1:]:
                merged = merged.merge(histogram)
            scale_found, zero = search_affine(merged, storage.lo, storage.hi, symmetric)
        elif ranges:
            lo, hi = min(r.lo for r in ranges), max(r.hi for r in ranges)
            scale_found, zero = affine_from_range(lo, hi, storage.lo, storage.hi, symmetric)
        else:
            raise PassError(f"%{members[0].name} has neither histogram nor range; run calibrate and range-analysis")
        return affine(storage, scale_found, zero)


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


def _weight_types(
    graph: Graph, op: Op, types: dict[Value, TensorType], target: Target
) -> Iterator[tuple[Value, TensorType]]:
    """Types of constant weights and bias of a convolution or matrix product."""
    weight, bias = op.operands[1], op.optional_operand(2)
    data = graph.constants.get(weight)
    bias_data = graph.constants[bias].data if bias is not None and bias in graph.constants else None
    input_scale = _scale(types[op.operands[0]])
    if data is not None:
        axis = 0 if isinstance(op, Conv) else data.data.ndim - 1
        granularity = target.weights.conv if isinstance(op, Conv) else target.weights.matmul
        per_channel = granularity is Granularity.PER_CHANNEL and data.data.ndim in (2, 3, 4)
        scales = weight_scales(data.data, _storage(weight), axis if per_channel else None, bias_data, input_scale)
        element = affine(_storage(weight), scales, 0, axis if per_channel else None, data.name)
        yield weight, weight.type.with_element(element)
    else:
        scales = np.asarray(_scale(types[weight]), np.float32)
    if bias is not None and bias_data is not None:
        products = (np.float64(input_scale) * np.asarray(scales, np.float64)).astype(np.float32)
        axis_of_bias = 0 if products.ndim else None
        if bias.type.rank != 1:
            raise PassError(f"{op.describe()}: the bias must be a vector; run canonicalize first")
        yield (
            bias,
            bias.type.with_element(affine(_storage(bias), products, 0, axis_of_bias, graph.constants[bias].name)),
        )


def _scale(kind: TensorType) -> float:
    assert isinstance(kind.element, AffineType)
    return float(kind.element.scale.data)


def weight_scales(
    data: npt.NDArray[Any], storage: IntegerType, axis: int | None, bias: npt.NDArray[Any] | None, input_scale: float
) -> npt.NDArray[np.float32]:
    """Symmetric float32 scales: the largest magnitude over the largest integer, per channel or for the tensor.

    Raised where the bias, quantized at input scale times weight scale, would come near the ends of 32 bits; a channel
    of zeros takes the least scale of the others, for the precision of its bias.
    """
    magnitude = np.abs(data.astype(np.float64))
    if axis is None:
        largest = np.asarray(magnitude.max(initial=0.0))
    else:
        largest = magnitude.max(axis=tuple(i for i in range(data.ndim) if i != axis), initial=0.0)
    scales = largest / storage.hi
    if bias is not None:
        limits = np.abs(bias.astype(np.float64)) / (input_scale * 2.0**30)
        scales = np.maximum(scales, limits if axis is not None else limits.max(initial=0.0))
    positive = scales[scales > 0]
    filler = positive.min() if positive.size else 1.0
    tiny = float(np.finfo(np.float32).tiny)
    return np.maximum(np.where(scales > 0, scales, filler), tiny).astype(np.float32)
