"""equalize-cross-layer: scales of channels move between layers until those that write and read a channel match.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, section 4.1; extended from
pairs of layers to all that write or read the same channels, such as those of a residual sum. A bias counts as a weight
that reads 1: a channel that is little but its bias is then not blown up for the sake of its weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt

from qir.arrays import Array
from qir.errors import PassError
from qir.ir import Graph, Op, Stage, Value
from qir.ops.constant import Const
from qir.ops.float_elementwise import Activation, Add, LeakyRelu
from qir.ops.float_nn import Conv, MatMul
from qir.ops.float_pool import AveragePool, MaxPool, ReduceMean
from qir.ops.movement import Reshape
from qir.pass_manager import Pass, PassContext
from qir.passes.fuse_activation import clip_of, replace_chain, sole_readers
from qir.passes.select_q_formats import Groups
from qir.rewrite import Rewriter, rewrite
from qir.types import F32, TensorType

Vector = npt.NDArray[np.float64]

_TOLERANCE: Final = 2.0**-7  # binary orders of magnitude: closer than that, ranges are equal
_MOST_SWEEPS: Final = 1000
_MOST: Final = 2.0**24  # no scale is larger, nor its inverse


@dataclass(frozen=True)
class EqualizeCrossLayer(Pass):
    """Divides the output channels of Conv and MatMul by scales, and multiplies the weights that read them by the same.

    The scales make the largest weight or bias that writes a channel as large as the largest weight that reads it.
    Weights and biases are constants; between the layers stands only what commutes with a positive factor of each
    channel: nothing, Relu, LeakyRelu, pooling, means, Add, and Reshape of what follows channels into them. A channel
    that anything else reads or writes keeps its scale: Clip with a bound other than 0 (Relu6 too), an output of the
    graph. The function stays, up to the rounding of weights to float32; with `power_of_two`, which takes the nearest
    such scales, to the bit.

    Raises PassError for a calibrated graph, whose histograms would be wrong, and for weights that powers of two drive
    out of float32; real scales never exceed what was largest before.
    """

    name: ClassVar[str] = "equalize-cross-layer"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.FLOAT})
    ensures: ClassVar[Stage | None] = Stage.FLOAT
    power_of_two: bool = False

    def run(self, graph: Graph, context: PassContext) -> Graph:
        """The graph with other weights and biases; the same object where all match already."""
        observed = next((v for v in graph.values() if v.histogram is not None), None)
        if observed is not None:
            raise PassError(f"%{observed.name} is calibrated, and its scale would change; run {self.name} before")
        layers, groups = _connect(graph)
        before = _shares(layers)
        sweeps = _balance(groups)
        for group in groups:
            if self.power_of_two:
                group.scales = np.exp2(np.rint(np.log2(group.scales)))
        changed = sum(int(g.changed.sum()) for g in groups)
        if not changed:
            context.note("no channels to rescale")
            return graph
        context.note(
            f"{changed} channels rescaled in {sweeps} sweeps; largest weight of a channel to that of its layer "
            f"{before:.2f} on average, now {_shares(layers):.2f}"
        )
        return _rewritten(graph, layers)


@dataclass(eq=False)
class _Group:
    """Channels of values that share their scales: the layers that write and read them, and the scales so far."""

    scales: Vector
    writers: list[_Layer] = field(default_factory=list)
    readers: list[_Layer] = field(default_factory=list)

    @property
    def changed(self) -> npt.NDArray[np.bool_]:
        """Which channels have another scale than they had, beyond what counts as equal."""
        return np.abs(np.log2(self.scales)) > _TOLERANCE

    def balance(self) -> float:
        """Rescale so that largest weights that write and read match; returns by how many binary orders at most."""
        written = np.max([w.written() for w in self.writers], axis=0)
        read = np.max([r.of_inputs() for r in self.readers], axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            wanted = self.scales * np.sqrt(written / read)
        wanted = np.where((written > 0) & (read > 0), np.clip(wanted, 1 / _MOST, _MOST), self.scales)
        moved = float(np.abs(np.log2(wanted / self.scales)).max(initial=0.0))
        self.scales = wanted
        return moved


@dataclass(eq=False)
class _Layer:
    """A Conv or MatMul and its largest magnitudes, as float64: `weights` of each output and input channel
    [groups, outputs / groups, inputs / groups], `bias` [outputs].

    A channel that `source` has a scale for is `repeat` input channels in a row.
    """

    op: Conv | MatMul
    weights: Vector
    bias: Vector
    repeat: int = 1
    source: _Group | None = None
    result: _Group | None = None

    def input_scales(self) -> Vector:
        """The factor of each input channel: [inputs]."""
        count = self.weights.shape[0] * self.weights.shape[2]
        return np.ones(count) if self.source is None else np.repeat(self.source.scales, self.repeat)

    def output_scales(self) -> Vector:
        """The divisor of each output channel: [outputs]."""
        return np.ones(len(self.bias)) if self.result is None else self.result.scales

    def scaled(self) -> Vector:
        """`weights` under the scales so far."""
        groups, outputs, inputs = self.weights.shape
        scaled = self.weights * self.input_scales().reshape(groups, 1, inputs)
        scaled /= self.output_scales().reshape(groups, outputs, 1)
        return scaled

    def of_outputs(self) -> Vector:
        """The largest weight that writes each channel."""
        largest: Vector = self.scaled().max(axis=2, initial=0.0)
        return largest.reshape(-1)

    def written(self) -> Vector:
        """The largest weight or bias that writes each channel."""
        return np.maximum(self.of_outputs(), self.bias / self.output_scales())

    def of_inputs(self) -> Vector:
        """The largest weight that reads each channel of the source."""
        largest: Vector = self.scaled().max(axis=1, initial=0.0).reshape(-1, self.repeat).max(axis=1)
        return largest

    def parameters(self, data: Mapping[Value, Array]) -> tuple[npt.NDArray[np.float32], ...]:
        """Weight and, where there is one, bias with the scales in them. Raises PassError where they leave float32."""
        weight, bias = self.op.operands[1], self.op.optional_operand(2)
        groups, outputs, inputs = self.weights.shape
        factor = self.input_scales().reshape(groups, 1, inputs) / self.output_scales().reshape(groups, outputs, 1)
        factor = factor.reshape(groups * outputs, inputs)
        if isinstance(self.op, Conv):
            factor = factor.reshape(*factor.shape, *[1] * (weight.type.rank - 2))
        else:
            factor = factor.T
        with np.errstate(over="ignore"):
            arrays = [(data[weight].data * factor).astype(np.float32)]
            if bias is not None:
                arrays.append((data[bias].data / self.output_scales()).astype(np.float32))
        if not all(np.isfinite(a).all() for a in arrays):
            raise PassError(
                f"{self.op.describe()}: weights or bias rescaled by powers of two leave float32; leave power-of-two "
                "out, for the scales between are smaller"
            )
        return tuple(arrays)


def _balance(groups: list[_Group]) -> int:
    """Balance groups in turn until none moves; returns how often. Each turn averages what its neighbours ask for."""
    for sweep in range(1, _MOST_SWEEPS + 1):
        if max((g.balance() for g in groups), default=0.0) <= _TOLERANCE:
            return sweep
    return _MOST_SWEEPS


def _shares(layers: list[_Layer]) -> float:
    """The mean, over input and output channels that may be rescaled, of their largest weight to that of the layer."""
    shares = [
        ranges / ranges.max()
        for layer in layers
        for group, ranges in ((layer.result, layer.of_outputs()), (layer.source, layer.of_inputs()))
        if group is not None and ranges.max(initial=0.0) > 0
    ]
    return float(np.concatenate(shares).mean()) if shares else 1.0


def _rewritten(graph: Graph, layers: list[_Layer]) -> Graph:
    parameters = {layer.op: layer.parameters(graph.constants) for layer in layers if _moves(layer)}
    readers = sole_readers(graph)
    in_place = {v: a for op, arrays in parameters.items() for v, a in zip(op.operands[1:], arrays, strict=True)}
    in_place = {v: a for v, a in in_place.items() if v in readers}

    def visit(rewriter: Rewriter, op: Op) -> bool:
        if isinstance(op, Const) and op.result in in_place:
            rewriter.keep(op, value=Array(in_place[op.result], op.value.name))
        elif isinstance(op, Conv | MatMul) and op in parameters:
            operands = [rewriter.get(op.operands[0])]
            for old, array in zip(op.operands[1:], parameters[op], strict=True):
                if old in in_place:
                    operands.append(rewriter.get(old))
                else:
                    kind = TensorType(array.shape, F32)
                    operands.append(rewriter.constant(Array(array, old.name), kind, old.name))
            replace_chain(rewriter, op, op, tuple(operands), clip_of(op))
        else:
            return False
        return True

    return rewrite(graph, visit)


def _moves(layer: _Layer) -> bool:
    return any(g is not None and bool((g.scales != 1).any()) for g in (layer.source, layer.result))


def _connect(graph: Graph) -> tuple[list[_Layer], list[_Group]]:
    """The layers with constant parameters, and the groups of channels between them that may be rescaled."""
    finder = _Finder(graph)
    groups: dict[Value, _Group] = {}
    layers = [_layer(op, graph.constants) for op in finder.layers]
    for layer in layers:
        source, result = layer.op.operands[0], layer.op.result
        if finder.is_free(result):
            layer.result = groups.setdefault(finder.groups[result], _Group(np.ones(len(layer.bias))))
            layer.result.writers.append(layer)
        if source in finder.channels and finder.is_free(source):
            layer.source, layer.repeat = groups[finder.groups[source]], finder.channels[source].repeat
            layer.source.readers.append(layer)
    return layers, [g for g in groups.values() if g.readers]


def _layer(op: Conv | MatMul, data: Mapping[Value, Array]) -> _Layer:
    weight, bias = np.abs(data[op.operands[1]].data.astype(np.float64)), op.optional_operand(2)
    if isinstance(op, MatMul):
        weights = np.ascontiguousarray(weight.T)[None]
    else:
        flat = weight.reshape(*weight.shape[:2], -1).max(axis=2, initial=0.0)
        weights = flat.reshape(op.groups, -1, flat.shape[1])
    outputs = weights.shape[0] * weights.shape[1]
    return _Layer(op, weights, np.zeros(outputs) if bias is None else np.abs(data[bias].data.astype(np.float64)))


@dataclass(frozen=True)
class _Channels:
    """Where the channels of a value lie: an axis, and how many of its elements in a row are one channel."""

    axis: int
    repeat: int = 1


class _Finder:
    """Follows channels from the layers that write them through what commutes with positive factors."""

    def __init__(self, graph: Graph) -> None:
        self.constants = graph.constants
        self.layers: list[Conv | MatMul] = []
        self.channels: dict[Value, _Channels] = {}
        self.groups = Groups()
        self._fixed: set[Value] = set()
        for op in graph.ops:
            self._visit(op)
        self._fixed.update(v for v in graph.outputs if v in self.channels)
        self._fixed = {self.groups[v] for v in self._fixed}

    def is_free(self, value: Value) -> bool:
        """Whether channels of the value may be rescaled."""
        return self.groups[value] not in self._fixed

    def _visit(self, op: Op) -> None:
        if isinstance(op, Conv | MatMul) and self._has_parameters(op):
            self._layer(op)
            return
        sources = [v for v in op.operands if v in self.channels]
        follows = len(sources) == len(op.operands) and len(op.results) == 1
        found = {_behind(op, v, self.channels[v]) for v in sources} if follows else set()
        behind = found.pop() if len(found) == 1 else None
        if behind is None:
            self._fixed.update(sources)
            return
        self._track(op.result, behind)
        for value in sources:
            self.groups.join(value, op.result)

    def _has_parameters(self, op: Conv | MatMul) -> bool:
        weight = op.operands[1]
        return all(v in self.constants for v in op.operands[1:]) and (isinstance(op, Conv) or weight.type.rank == 2)

    def _layer(self, op: Conv | MatMul) -> None:
        axis = 1 if isinstance(op, Conv) else op.result.type.rank - 1
        source = op.operands[0]
        self.layers.append(op)
        if source in self.channels and self.channels[source].axis != axis:
            self._fixed.add(source)
        self._track(op.result, _Channels(axis))
        if not _is_homogeneous(*clip_of(op)):
            self._fixed.add(op.result)

    def _track(self, value: Value, channels: _Channels) -> None:
        self.channels[value] = channels
        self.groups.add(value)


def _is_homogeneous(low: float, high: float) -> bool:
    """Whether a clip commutes with positive factors."""
    return all(end == 0 or math.isinf(end) for end in (low, high))


def _behind(op: Op, source: Value, channels: _Channels) -> _Channels | None:
    """Where the channels of a source are in the result of an op; None where it does not commute with their factors."""
    result, axis = op.result.type, channels.axis
    if isinstance(op, Activation):
        return channels if _is_homogeneous(*op.activation) else None
    if isinstance(op, Add):
        return channels if _is_homogeneous(*clip_of(op)) and source.type == result else None
    if isinstance(op, LeakyRelu):
        return channels
    if isinstance(op, MaxPool | AveragePool):
        return channels if axis == 1 else None
    if isinstance(op, ReduceMean):
        gone = 0 if op.keepdims else sum(a < axis for a in op.axes)
        return None if axis in op.axes else _Channels(axis - gone, channels.repeat)
    if isinstance(op, Reshape):
        old, new = source.type.shape, result.shape
        if axis != 1 or len(new) < 2 or old[0] != new[0]:
            return None
        size, wanted = old[1], new[1]
        assert isinstance(size, int)
        assert isinstance(wanted, int)
        return _Channels(1, channels.repeat * (wanted // size)) if size and wanted % size == 0 else None
    return None
