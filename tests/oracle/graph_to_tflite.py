"""Writes an integer program of the TensorFlow Lite family as a .tflite file, op pattern by op pattern.

Only what the runtime is told goes into the file: shapes, scales, zero points, weights, windows. The multipliers, tables
and accumulators of the program stay out of it, so that the runtime derives its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from oracle.tflite_writer import ModelWriter

from qir.fixed_point import Rounding
from qir.integer_functions import quantized_bound
from qir.ir import Graph, Op, Value
from qir.opdef import Window
from qir.ops.accumulate import Accumulating
from qir.ops.constant import Const
from qir.ops.fixed_elementwise import Elementwise, FixedAdd, FixedArgMax, FixedMul, FixedSub, Table
from qir.ops.fixed_linear import Conv2d, FixedMatMul, ReduceSum
from qir.ops.fixed_pool import FixedAveragePool, FixedMaxPool, FixedSoftmax, Pool2d
from qir.ops.fixed_rescale import QuantizeRule, Requantize, quantize_array
from qir.ops.float_elementwise import HardSwish, LeakyRelu, PRelu, Sigmoid, Tanh
from qir.ops.movement import FixedConcat, FixedGather, FixedPad, FixedReshape, FixedSlice, FixedTranspose
from qir.types import AffineType, IntegerType, container_bounds, storage_of

Array = npt.NDArray[Any]

_FUSED: dict[str, tuple[float | None, float | None]] = {
    "NONE": (None, None),
    "RELU": (0.0, None),
    "RELU6": (0.0, 6.0),
    "RELU_N1_TO_1": (-1.0, 1.0),
}
_LEAST = -128  # of int8; a maximum never takes it from padding


class NotTflite(Exception):
    """The graph holds something that this writer cannot say in a .tflite file."""


def graph_to_tflite(fixed: Graph, typed: Graph | None = None, batch: int = 1) -> bytes:
    """The bytes of a .tflite file that takes and gives the raw integers of `fixed`, with `batch` for its N.

    A table does not say which function it holds: `typed` is the graph before legalize, where the op that makes the
    value of the same name does. Raises NotTflite, which names the op, for whatever has no counterpart.
    """
    return _Writer(fixed, typed, batch).write()


class _Writer:
    def __init__(self, fixed: Graph, typed: Graph | None, batch: int) -> None:
        self.graph = fixed
        self.typed = typed
        self.batch = batch
        self.model = ModelWriter()
        self.tensors: dict[Value, int] = {}

    def write(self) -> bytes:
        """Every op in order: written, or part of the pattern that its reader ends."""
        for value in self.graph.inputs:
            self.result(value)
        for op in self.graph.ops:
            if isinstance(op, Const) or self.is_inner(op):
                continue
            rule = _RULES.get(type(op))
            if rule is None:
                raise NotTflite(f"{op.describe()} has no counterpart")
            rule(self, op)
        inputs = [self.tensors[v] for v in self.graph.inputs]
        return self.model.finish(inputs, [self.read(v) for v in self.graph.outputs])

    def is_inner(self, op: Op) -> bool:
        """Whether the op makes an accumulator, which no tensor of the file holds; `producer` finds it again."""
        return isinstance(op, Accumulating | Elementwise | Requantize) and isinstance(
            op.result.type.element, IntegerType
        )

    # Tensors

    def shape(self, value: Value) -> tuple[int, ...]:
        return value.type.concrete(self.batch)

    def read(self, value: Value) -> int:
        """The tensor of a value; that of a constant is made on first use."""
        if value not in self.tensors:
            data = self.graph.constants.get(value)
            if data is None:
                raise NotTflite(f"%{value.name} is an accumulator that is read outside of any known pattern")
            self.tensors[value] = self.tensor(value.name, data.shape, value, data.data)
        return self.tensors[value]

    def result(self, value: Value) -> int:
        """A new tensor for a value."""
        self.tensors[value] = self.tensor(value.name, self.shape(value), value)
        return self.tensors[value]

    def tensor(self, name: str, shape: Sequence[int], like: Value, data: Array | None = None) -> int:
        """A tensor in the per-tensor format of `like`, int8 or int16, or of int32 where that holds indices."""
        element = like.type.element
        if isinstance(element, IntegerType):
            return self.model.tensor(name, shape, np.int32, data=data)
        (scale, zero), storage = self.format(like), storage_of(element)
        assert storage is not None
        return self.model.tensor(name, shape, storage.dtype, scale, zero, data=data)

    def format(self, value: Value) -> tuple[float, int]:
        """Scale and zero point of an int8 or int16 value."""
        element = value.type.element
        storage = storage_of(element)
        if not isinstance(element, AffineType) or element.axis is not None or storage is None:
            raise NotTflite(f"%{value.name} is not quantized with one scale: {value.type}")
        if storage.dtype not in ("i1", "i2"):
            raise NotTflite(f"%{value.name} is neither int8 nor int16: {value.type}")
        return float(element.scale.data), int(element.zero_point.data)

    def integers(self, name: str, data: npt.ArrayLike) -> int:
        """A constant int32 tensor."""
        array = np.asarray(data, np.int32)
        return self.model.tensor(name, array.shape, np.int32, data=array)

    def activation(self, value: Value) -> str:
        """The fused activation whose bounds are the storage bounds of a value."""
        scale, zero = self.format(value)
        storage = storage_of(value.type.element)
        assert storage is not None
        for name, (lo, hi) in _FUSED.items():
            least, greatest = container_bounds(storage.bits, storage.signed)
            low = least if lo is None else max(least, quantized_bound(lo, scale, zero))
            high = greatest if hi is None else min(greatest, quantized_bound(hi, scale, zero))
            if (low, high) == (storage.lo, storage.hi):
                return name
        raise NotTflite(f"%{value.name} is clamped to [{storage.lo}, {storage.hi}], which no fused activation does")

    def plain(self, op: Op) -> int:
        """The result of an op that has no fused activation."""
        if self.activation(op.result) != "NONE":
            raise NotTflite(f"{op.describe()} would need a fused activation, which its counterpart has not")
        return self.result(op.result)

    def constant(self, value: Value) -> Array:
        """The data of a constant."""
        if value not in self.graph.constants:
            raise NotTflite(f"%{value.name} is not constant")
        return self.graph.constants[value].data

    def padded(self, value: Value, pads: Sequence[Sequence[int]], fill: int) -> int:
        """A tensor padded by its zero point, or by another integer."""
        if not np.any(pads):
            return self.read(value)
        shape = [size + before + after for size, (before, after) in zip(self.shape(value), pads, strict=True)]
        result = self.tensor(f"{value.name}.padded", shape, value)
        operands = [self.read(value), self.integers(f"{value.name}.pads", pads)]
        if fill == self.format(value)[1]:
            self.model.operator("PAD", operands, [result])
        else:
            constant = self.tensor(f"{value.name}.fill", (1,), value, np.array([fill], np.int8))
            self.model.operator("PADV2", [*operands, constant], [result])
        return result

    # Requantize ends most patterns; what made its operand says which

    def requantize(self, op: Op) -> None:
        source = self.graph.producers.get(op.operands[0])
        if source is None or not self.is_inner(source):
            self.rescale(op)
            return
        rule = _ACCUMULATORS.get(type(source))
        if rule is None:
            raise NotTflite(f"{source.describe()} has no counterpart")
        rule(self, source, op)

    def rescale(self, op: Op) -> None:
        """QUANTIZE, RELU, or RELU6, which keeps the format and so may need a QUANTIZE before it."""
        x, activation = op.operands[0], self.activation(op.result)
        if activation not in ("NONE", "RELU", "RELU6"):
            raise NotTflite(f"{op.describe()}: {activation} does not stand alone")
        source = self.read(x)
        if activation == "RELU6" and self.format(x) != self.format(op.result):
            rescaled = self.tensor(f"{op.result.name}.unclipped", self.shape(op.result), op.result)
            self.model.operator("QUANTIZE", [source], [rescaled])
            source = rescaled
        kind = "QUANTIZE" if activation == "NONE" else activation
        self.model.operator(kind, [source], [self.result(op.result)])

    def conv(self, source: Op, op: Op) -> None:
        assert isinstance(source, Conv2d)
        x, weight = source.operands[:2]
        data, channels = self.constant(weight), int(x.type.shape[3])
        depthwise = source.groups == channels and source.groups > 1
        if source.groups > 1 and not depthwise:
            raise NotTflite(f"{source.describe()} has {source.groups} groups of several channels")
        kind, axis, options = "CONV_2D", 0, {}
        if depthwise:
            data = data[:, :, :, 0].transpose(1, 2, 0)[None]
            kind, axis, options = "DEPTHWISE_CONV_2D", 3, {"depth_multiplier": data.shape[3] // channels}
        top, left, bottom, right = source.pads
        padded = self.padded(x, [(0, 0), (top, bottom), (left, right), (0, 0)], self.format(x)[1])
        operands = [padded, *self.parameters(source, op, data, axis)]
        window = {
            "stride_h": source.strides[0],
            "stride_w": source.strides[1],
            "dilation_h_factor": source.dilations[0],
            "dilation_w_factor": source.dilations[1],
        }
        activation = self.activation(op.result)
        result = self.result(op.result)
        self.model.operator(kind, operands, [result], padding="VALID", activation=activation, **window, **options)

    def parameters(self, source: Op, op: Op, data: Array, axis: int) -> list[int]:
        """Weights, quantized along `axis` where they have several scales, and the bias."""
        x, weight = source.operands[:2]
        element = weight.type.element
        if not isinstance(element, AffineType) or element.has_zero_point or data.dtype != np.int8:
            raise NotTflite(f"%{weight.name} is not int8 with zero point 0")
        scales = element.scale.data
        tensors = [self.model.tensor(weight.name, data.shape, np.int8, scales, 0, axis, data)]
        bias = source.optional_operand(2)
        if bias is None:
            return tensors  # an input of -1, as the schema has it, crashes the runtime in DEPTHWISE_CONV_2D
        products = (np.float64(self.format(x)[0]) * scales.astype(np.float64)).astype(np.float32)
        storage = storage_of(x.type.element)
        assert storage is not None
        wide = (
            np.int32 if storage.bits == 8 else np.int64
        )  # with 16-bit operands the sum is of 64 bits, and the bias too
        integers = self.constant(bias).astype(wide)
        return [*tensors, self.model.tensor(bias.name, integers.shape, wide, products, 0, 0, integers)]

    def matmul(self, source: Op, op: Op) -> None:
        assert isinstance(source, FixedMatMul)
        a, b = source.operands[:2]
        if b in self.graph.constants:
            data = self.constant(b)
            if data.ndim != 2:
                raise NotTflite(f"{source.describe()}: constant weights of rank {data.ndim}")
            operands = [self.read(a), *self.parameters(source, op, data.T, 0)]
            activation = self.activation(op.result)
            result = self.result(op.result)
            self.model.operator("FULLY_CONNECTED", operands, [result], activation=activation, keep_num_dims=True)
            return
        if len(source.operands) > 2:
            raise NotTflite(f"{source.describe()}: a product of two activations has no bias")
        self.model.operator("BATCH_MATMUL", [self.read(a), self.read(b)], [self.plain(op)])

    def mean(self, source: Op, op: Op) -> None:
        assert isinstance(source, ReduceSum)
        axes = self.integers(f"{op.result.name}.axes", source.axes)
        operands = [self.read(source.operands[0]), axes]
        self.model.operator("MEAN", operands, [self.plain(op)], keep_dims=source.keepdims)

    def arithmetic(self, source: Op, op: Op) -> None:
        """ADD and SUB read what stands before the requantize of each operand to the common scale, or its multiplier."""
        operands = list(source.operands)
        if not isinstance(source, FixedMul):
            makers = [self.graph.producers.get(v) for v in operands]
            scaled = all(isinstance(m, FixedMul) and m.operands[1].type.rank == 0 for m in makers)
            if not scaled and not all(isinstance(m, Requantize) and m.input_shift for m in makers):
                raise NotTflite(f"{source.describe()} does not add on a common scale")
            operands = [m.operands[0] for m in makers if m is not None]
        kind = "MUL" if isinstance(source, FixedMul) else "ADD" if isinstance(source, FixedAdd) else "SUB"
        tensors = [self.read(v) for v in operands]
        activation = self.activation(op.result)
        self.model.operator(kind, tensors, [self.result(op.result)], activation=activation)

    # Ops that stand alone

    def pool(self, op: Op) -> None:
        """Padding of a maximum is written out with the least integer; of an average it must be what SAME does."""
        assert isinstance(op, Pool2d)
        if op.dilations != (1, 1):
            raise NotTflite(f"{op.describe()} is dilated")
        x, window = op.operands[0], op.window
        source, kind, padding = self.read(x), "AVERAGE_POOL_2D", "VALID"
        if isinstance(op, FixedMaxPool):
            top, left, bottom, right = op.pads
            source = self.padded(x, [(0, 0), (top, bottom), (left, right), (0, 0)], _LEAST)
            kind = "MAX_POOL_2D"
        elif not isinstance(op, FixedAveragePool) or op.rounding is not Rounding.HALF_AWAY:
            raise NotTflite(f"{op.describe()} has no counterpart")
        elif any(op.pads):
            if op.pads != _same_pads(window, self.shape(x)[1:3]):
                raise NotTflite(f"{op.describe()} has pads {list(op.pads)}, which SAME does not give")
            padding = "SAME"
        options = {
            "filter_height": op.kernel[0],
            "filter_width": op.kernel[1],
            "stride_h": op.strides[0],
            "stride_w": op.strides[1],
        }
        self.model.operator(kind, [source], [self.result(op.result)], padding=padding, **options)

    def softmax(self, op: Op) -> None:
        self.check_native("SOFTMAX", op)
        self.model.operator("SOFTMAX", [self.read(op.operands[0])], [self.plain(op)], beta=1.0)

    def check_native(self, kind: str, op: Op) -> None:
        """Some ops have one output format, and the runtime does not look whether the file states it."""
        storage = storage_of(op.result.type.element)
        assert storage is not None
        if self.format(op.result) != _NATIVE.get((kind, storage.bits), self.format(op.result)):
            raise NotTflite(f"{op.describe()} is not in the only format that {kind} has")

    def table(self, op: Op) -> None:
        """The op of the typed graph that made the value of this name."""
        name = op.result.name.removesuffix(".native")
        if self.typed is None:
            raise NotTflite(f"{op.describe()}: a table needs the typed graph to say what it holds")
        made = self.typed.producers[self.typed.value(name)]
        operands, options = [self.read(op.operands[0])], {}
        if isinstance(made, LeakyRelu):
            options["alpha"] = made.alpha
        elif isinstance(made, PRelu):
            operands.append(self.slope(op.operands[0], made.operands[1]))
        kind = _TABLES.get(type(made))
        if kind is None:
            raise NotTflite(f"{op.describe()} holds {made.describe()}")
        self.check_native(kind, op)
        self.model.operator(kind, operands, [self.plain(op)], **options)

    def slope(self, x: Value, slope: Value) -> int:
        """The slope of PRELU, along the last axis."""
        assert self.typed is not None
        element, data = slope.type.element, self.typed.constants[slope].data
        integers = quantize_array(data, element, QuantizeRule.DIVIDE, Rounding.HALF_AWAY).astype(np.int8).reshape(-1)
        shape = (*(1,) * (x.type.rank - 2), integers.size) if x.type.rank > 2 else (integers.size,)
        return self.tensor(slope.name, shape, slope, integers.reshape(shape))

    def move(self, kind: str, op: Op, *constants: npt.ArrayLike, **options: Any) -> None:
        """An op that copies integers; its further operands are constant int32 tensors."""
        names = (f"{op.result.name}.{i}" for i in range(len(constants)))
        tensors = [self.integers(n, c) for n, c in zip(names, constants, strict=True)]
        operands = [*(self.read(v) for v in op.operands), *tensors]
        self.model.operator(kind, operands, [self.result(op.result)], **options)

    def reshape(self, op: Op) -> None:
        self.move("RESHAPE", op, self.shape(op.result))

    def transpose(self, op: Op) -> None:
        assert isinstance(op, FixedTranspose)
        self.format(op.result)  # the runtime moves int8 and no indices
        self.move("TRANSPOSE", op, op.perm)

    def concat(self, op: Op) -> None:
        assert isinstance(op, FixedConcat)
        self.move("CONCATENATION", op, axis=op.axis)

    def gather(self, op: Op) -> None:
        assert isinstance(op, FixedGather)
        self.move("GATHER", op, op.indices.data, axis=op.axis)

    def slice(self, op: Op) -> None:
        """STRIDED_SLICE, whose end before the first element is said by a mask."""
        assert isinstance(op, FixedSlice)
        shape = self.shape(op.operands[0])
        begin, end, step, mask = [0] * len(shape), list(shape), [1] * len(shape), 0
        for start, stop, axis, stride in zip(op.starts, op.ends, op.axes, op.steps, strict=True):
            begin[axis], end[axis], step[axis] = min(start, shape[axis] - 1) if stride < 0 else start, stop, stride
            mask |= (stop < 0) << axis
        self.move("STRIDED_SLICE", op, begin, [max(e, 0) for e in end], step, end_mask=mask)

    def pad(self, op: Op) -> None:
        assert isinstance(op, FixedPad)
        rank = op.result.type.rank
        pads = [(op.pads[i], op.pads[rank + i]) for i in range(rank)]
        self.tensors[op.result] = self.padded(op.operands[0], pads, op.value)

    def argmax(self, op: Op) -> None:
        """ARG_MAX gives int32 and never keeps the axis."""
        assert isinstance(op, FixedArgMax)
        if op.select_last_index:
            raise NotTflite(f"{op.describe()} takes the last of equal elements")
        operands = [self.read(op.operands[0]), self.integers(f"{op.result.name}.axis", op.axis)]
        if not op.keepdims:
            self.model.operator("ARG_MAX", operands, [self.result(op.result)])
            return
        shape = self.shape(op.result)
        flat = self.tensor(f"{op.result.name}.flat", shape[: op.axis] + shape[op.axis + 1 :], op.result)
        self.model.operator("ARG_MAX", operands, [flat])
        target = self.integers(f"{op.result.name}.shape", shape)
        self.model.operator("RESHAPE", [flat, target], [self.result(op.result)])


def _same_pads(window: Window, spatial: Sequence[int]) -> tuple[int, ...]:
    """The pads that SAME gives: as many outputs as strides fit, the smaller half before."""
    totals = []
    for axis, size in enumerate(spatial):
        stride = window.strides[axis]
        totals.append(max((-(-size // stride) - 1) * stride + window.extent(axis) - size, 0))
    return (*(t // 2 for t in totals), *(t - t // 2 for t in totals))


_RULES: Mapping[type[Op], Callable[[_Writer, Op], None]] = {
    FixedArgMax: _Writer.argmax,
    FixedAveragePool: _Writer.pool,
    FixedConcat: _Writer.concat,
    FixedGather: _Writer.gather,
    FixedMaxPool: _Writer.pool,
    FixedPad: _Writer.pad,
    FixedReshape: _Writer.reshape,
    FixedSlice: _Writer.slice,
    FixedSoftmax: _Writer.softmax,
    FixedTranspose: _Writer.transpose,
    Requantize: _Writer.requantize,
    Table: _Writer.table,
}

#: What makes the accumulator that a requantize reads.
_ACCUMULATORS: Mapping[type[Op], Callable[[_Writer, Op, Op], None]] = {
    Conv2d: _Writer.conv,
    FixedMatMul: _Writer.matmul,
    ReduceSum: _Writer.mean,
    **dict.fromkeys((FixedAdd, FixedMul, FixedSub), _Writer.arithmetic),
}

_TABLES: Mapping[type[Op], str] = {
    HardSwish: "HARD_SWISH",
    LeakyRelu: "LEAKY_RELU",
    PRelu: "PRELU",
    Sigmoid: "LOGISTIC",
    Tanh: "TANH",
}

_NATIVE = {
    ("LOGISTIC", 8): (1 / 256, -128),
    ("SOFTMAX", 8): (1 / 256, -128),
    ("TANH", 8): (1 / 128, 0),
    ("LOGISTIC", 16): (2.0**-15, 0),
    ("TANH", 16): (2.0**-15, 0),
}
