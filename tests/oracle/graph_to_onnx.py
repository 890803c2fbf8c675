"""Writes an integer program whose requantize is of the form `float32` as an ONNX model, op pattern by op pattern.

As with .tflite files, only what the runtime is told goes into the model: shapes, scales, zero points, weights, windows.
ONNX Runtime derives the multipliers and tables on its own. What is written where:

- conv2d, requantize: QLinearConv;
- matmul, requantize: QLinearMatMul, or QGemm of ONNX Runtime where there is a bias;
- mul, requantize: QLinearMul of ONNX Runtime, which is told the zero point 0: another one it adds before it rounds;
- reduce_sum, requantize: QLinearGlobalAveragePool of ONNX Runtime over the reduced axes, moved to the end. Through
  DequantizeLinear, ReduceMean and QuantizeLinear the runtime would add reals in float32 and round ties otherwise;
- a requantize of its own: QLinearMatMul by the integer 1 of scale 1, which multiplies by the quotient of the scales;
- average_pool2d, whose rule sees integers and no scale: AveragePool of the integers as reals, Round;
- dequantize, quantize, and ops on reals between them: DequantizeLinear, QuantizeLinear, and the op itself;
- dequantize_blocks: DequantizeLinear of 4-bit integers with a block size;
- a table: the function that the typed graph names, between DequantizeLinear and QuantizeLinear;
- storage bounds narrower than the container, which fused activations are: Clip on integers.

Windows slide over channels first there; a value is transposed when an op asks for the other layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from qir.fixed_point import RequantizeForm, Rounding
from qir.ir import Graph, Op, Value
from qir.ops.accumulate import Accumulating
from qir.ops.constant import Const
from qir.ops.dequantize_blocks import DequantizeBlocks, Packing
from qir.ops.fixed_elementwise import FixedArgMax, FixedMul, Table
from qir.ops.fixed_linear import Conv2d, FixedMatMul, ReduceSum
from qir.ops.fixed_pool import FixedAveragePool, FixedMaxPool, Pool2d
from qir.ops.fixed_rescale import Dequantize, Quantize, QuantizeRule, Requantize
from qir.ops.float_base import Clipped
from qir.ops.float_elementwise import (
    Activation,
    Add,
    Div,
    HardSigmoid,
    HardSwish,
    LeakyRelu,
    Mul,
    PRelu,
    Sigmoid,
    Sub,
    Tanh,
)
from qir.ops.float_nn import Conv, MatMul
from qir.ops.float_pool import AveragePool, MaxPool
from qir.ops.movement import Concat, FixedPad, Gather, Pad, Reshape, Slice, Transpose
from qir.types import AffineType, ElementType, FixedPointType, IntegerType, scale_array, storage_of, zero_array

Array = npt.NDArray[Any]

OPSET = 21
_MICROSOFT = "com.microsoft"
_TO_FIRST, _TO_LAST = (0, 3, 1, 2), (0, 2, 3, 1)
_PAST_THE_FIRST = -(2**31)  # the end of a slice that runs backwards through element 0


class NotOnnx(Exception):
    """The graph holds something that this writer cannot say in an ONNX model."""


def graph_to_onnx(fixed: Graph, typed: Graph | None = None, *, in_reals: bool = False) -> onnx.ModelProto:
    """A model that takes and gives the raw integers of `fixed`, under the same names.

    A table does not say which function it holds: `typed` is the graph before legalize, where the op that makes the
    value of the same name does. With `in_reals` matrix products and means are ops on reals, between DequantizeLinear
    and QuantizeLinear, as in the QDQ models that quantizers write; near ties these round otherwise than the integers.
    Raises NotOnnx, which names the op, for whatever has no counterpart.
    """
    return _Writer(fixed, typed, in_reals).write()


class OnnxRuntime:
    """A model on one thread of ONNX Runtime's CPU, no graph optimized."""

    def __init__(self, model: onnx.ModelProto) -> None:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs by name."""
        names = [o.name for o in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, dict(feeds)), strict=True))


class _Writer:
    def __init__(self, graph: Graph, typed: Graph | None, in_reals: bool) -> None:
        self.graph = graph
        self.typed = typed
        self.in_reals = in_reals
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.plain: dict[Value, str] = {}
        self.first: dict[Value, str] = {}  # of [N, H, W, C] those that are there as [N, C, H, W]
        self.count = 0

    def write(self) -> onnx.ModelProto:
        """Every op in order: written, or part of the pattern that its reader ends."""
        for value in self.graph.inputs:
            self.plain[value] = value.name
        for op in self.graph.ops:
            if isinstance(op, Const) or self.is_inner(op):
                continue
            rule = next((_RULES[c] for c in type(op).__mro__ if c in _RULES), None)
            if rule is None:
                raise NotOnnx(f"{op.describe()} has no counterpart")
            rule(self, op)
        for value, name in zip(self.graph.outputs, self.graph.output_names, strict=True):
            self.node("Identity", [self.read(value)], outputs=[name])
        graph = helper.make_graph(
            self.nodes,
            "graph",
            [self.border(v, v.name) for v in self.graph.inputs],
            [self.border(v, n) for v, n in zip(self.graph.outputs, self.graph.output_names, strict=True)],
            self.initializers,
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(_MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def is_inner(self, op: Op) -> bool:
        """Whether the op makes an accumulator, which the model holds nowhere; `producer` finds it again."""
        return isinstance(op, Accumulating | FixedMul) and isinstance(op.result.type.element, IntegerType)

    # Names

    def border(self, value: Value, name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, self.onnx_type(value.type.element), list(value.type.shape))

    def onnx_type(self, element: ElementType) -> int:
        storage = storage_of(element)
        return int(helper.np_dtype_to_tensor_dtype(np.dtype(np.float32) if storage is None else storage.dtype))

    def fresh(self) -> str:
        self.count += 1
        return f"|{self.count}"  # of no value: those have names of the model

    def node(
        self, kind: str, operands: Sequence[str], *, outputs: Sequence[str] = (), domain: str = "", **attributes: Any
    ) -> str:
        """A node; the name of its one output."""
        outputs = list(outputs) or [self.fresh()]
        self.nodes.append(helper.make_node(kind, list(operands), outputs, domain=domain, **attributes))
        return outputs[0]

    def constant(self, data: npt.ArrayLike, dtype: Any = None) -> str:
        """An initializer."""
        array, name = np.asarray(data, dtype), self.fresh()
        self.initializers.append(numpy_helper.from_array(array.copy(order="C"), name))
        return name

    # Values

    def read(self, value: Value) -> str:
        """A value in its own layout."""
        if value not in self.plain:
            if value in self.first:
                self.plain[value] = self.node("Transpose", [self.first[value]], perm=_TO_LAST)
            elif value in self.graph.constants:
                self.plain[value] = self.constant(self.data(value))
            else:
                raise NotOnnx(f"%{value.name} is an accumulator that is read outside of any known pattern")
        return self.plain[value]

    def read_first(self, value: Value) -> str:
        """A map [N, H, W, C] as [N, C, H, W]."""
        if value not in self.first:
            self.first[value] = self.node("Transpose", [self.read(value)], perm=_TO_FIRST)
        return self.first[value]

    def data(self, value: Value) -> Array:
        """The data of a constant, in the dtype of its container."""
        if value not in self.graph.constants:
            raise NotOnnx(f"%{value.name} is not constant")
        storage = storage_of(value.type.element)
        return self.graph.constants[value].data.astype(np.float32 if storage is None else storage.dtype)

    def scales(self, value: Value) -> Array:
        """The scale or the scales of a quantized value, float32."""
        element = value.type.element
        if isinstance(element, AffineType | FixedPointType):
            return scale_array(element).astype(np.float32)
        raise NotOnnx(f"%{value.name} has no scale: {value.type}")

    def quantization(self, value: Value, scales: Array | None = None) -> list[str]:
        """Initializers of scale and zero point; other scales than those of the value where stated."""
        scales, storage = self.scales(value) if scales is None else scales, storage_of(value.type.element)
        assert storage is not None
        zeros = np.broadcast_to(zero_array(value.type.element), scales.shape)
        return [self.constant(scales, np.float32), self.constant(zeros, storage.dtype)]

    def quantized(self, value: Value) -> list[str]:
        """The operands by which an op takes a quantized value: integers, scale, zero point."""
        return [self.read(value), *self.quantization(value)]

    def narrowed(self, value: Value, name: str) -> str:
        """Integers of a container clipped to the storage bounds of `value`."""
        storage = storage_of(value.type.element)
        assert storage is not None
        least, most = np.iinfo(storage.dtype).min, np.iinfo(storage.dtype).max
        if (storage.lo, storage.hi) == (least, most):
            return name
        return self.node("Clip", [name, *(self.constant(b, storage.dtype) for b in (storage.lo, storage.hi))])

    def reshaped(self, name: str, shape: Sequence[int]) -> str:
        return self.node("Reshape", [name, self.constant(shape, np.int64)])

    def shaped_as(self, name: str, value: Value) -> str:
        """Elements in the shape of a value, whose batch may be open."""
        return self.reshaped(name, [d if isinstance(d, int) else -1 for d in value.type.shape])

    # Requantize ends most patterns; what made its operand says which

    def requantize(self, op: Op) -> None:
        assert isinstance(op, Requantize)
        if op.form is not RequantizeForm.FLOAT32 or op.input_shift:
            raise NotOnnx(f"{op.describe()} is not of the form float32")
        source = self.graph.producers.get(op.operands[0])
        if source is None or not self.is_inner(source):
            self.rescale(op)
            return
        rule = _ACCUMULATORS.get(type(source))
        if rule is None:
            raise NotOnnx(f"{source.describe()} has no counterpart")
        rule(self, source, op)

    def rescale(self, op: Op) -> None:
        """A product with the integer 1, whose scale is 1."""
        one = [self.constant([[1]], np.int8), self.constant(1, np.float32), self.constant(0, np.int8)]
        source, *quantization = self.quantized(op.operands[0])
        operands = [self.reshaped(source, (-1, 1)), *quantization, *one, *self.quantization(op.result)]
        result = self.narrowed(op.result, self.node("QLinearMatMul", operands))
        self.plain[op.result] = self.shaped_as(result, op.result)

    def conv(self, source: Op, op: Op) -> None:
        assert isinstance(source, Conv2d)
        x, weight = source.operands[:2]
        weights = self.constant(self.data(weight).transpose(0, 3, 1, 2))
        operands = [self.read_first(x), *self.quantization(x), weights, *self.quantization(weight)]
        operands += [*self.quantization(op.result), *self.bias(source)]
        result = self.node(
            "QLinearConv",
            operands,
            pads=source.pads,
            strides=source.strides,
            dilations=source.dilations,
            group=source.groups,
        )
        self.first[op.result] = self.narrowed(op.result, result)

    def bias(self, source: Op) -> list[str]:
        bias = source.optional_operand(2)
        return [] if bias is None else [self.constant(self.data(bias), np.int32)]

    def matmul(self, source: Op, op: Op) -> None:
        """QGemm, which takes a bias, is of matrices."""
        assert isinstance(source, FixedMatMul)
        a, b = source.operands[:2]
        if self.in_reals:
            self.matmul_in_reals(source, op)
            return
        left, *quantization = self.quantized(a)
        right, bias = self.quantized(b), self.bias(source)
        if not bias:
            result = self.node("QLinearMatMul", [left, *quantization, *right, *self.quantization(op.result)])
            self.plain[op.result] = self.narrowed(op.result, result)
            return
        if b.type.rank != 2:
            raise NotOnnx(f"{source.describe()}: a product of batches has no bias")
        rows = self.reshaped(left, (-1, int(a.type.shape[-1])))
        operands = [rows, *quantization, *right, *bias, *self.quantization(op.result)]
        result = self.node("QGemm", operands, domain=_MICROSOFT)
        self.plain[op.result] = self.shaped_as(self.narrowed(op.result, result), op.result)

    def matmul_in_reals(self, source: Op, op: Op) -> None:
        """MatMul and Add; the bias is dequantized at the product of the scales."""
        a, b = source.operands[:2]
        left, right = (self.node("DequantizeLinear", self.quantized(v), **self.along(v)) for v in (a, b))
        found = self.node("MatMul", [left, right])
        for bias in self.bias(source):
            steps = np.asarray(self.scales(a) * self.scales(b), np.float32)
            axis: dict[str, Any] = {"axis": 0} if steps.ndim else {}
            real = self.node("DequantizeLinear", [bias, self.constant(steps)], **axis)
            found = self.node("Add", [found, real])
        found = self.node("QuantizeLinear", [found, *self.quantization(op.result)])
        self.plain[op.result] = self.narrowed(op.result, found)

    def mul(self, source: Op, op: Op) -> None:
        if zero_array(op.result.type.element).any():
            raise NotOnnx(f"{op.describe()}: QLinearMul adds the zero point before it rounds")
        operands = [name for v in source.operands for name in self.quantized(v)] + self.quantization(op.result)
        self.plain[op.result] = self.narrowed(op.result, self.node("QLinearMul", operands, domain=_MICROSOFT))

    def mean(self, source: Op, op: Op) -> None:
        assert isinstance(source, ReduceSum)
        x = source.operands[0]
        if self.in_reals:
            real = self.node("DequantizeLinear", self.quantized(x))
            axes = self.constant(source.axes, np.int64)
            mean = self.node("ReduceMean", [real, axes], keepdims=int(source.keepdims))
            found = self.node("QuantizeLinear", [mean, *self.quantization(op.result)])
            self.plain[op.result] = self.narrowed(op.result, found)
            return
        kept = [axis for axis in range(x.type.rank) if axis not in source.axes]
        moved = self.node("Transpose", [self.read(x)], perm=[*kept, *source.axes])
        others = [int(x.type.shape[axis]) for axis in kept[1:]]
        maps = self.reshaped(moved, (-1, int(np.prod(others, dtype=np.int64)), source.count, 1))
        operands = [maps, *self.quantization(x), *self.quantization(op.result)]
        result = self.node("QLinearGlobalAveragePool", operands, domain=_MICROSOFT, channels_last=0)
        self.plain[op.result] = self.shaped_as(self.narrowed(op.result, result), op.result)

    # Pooling of integers

    def pool(self, op: Op) -> None:
        assert isinstance(op, Pool2d)
        source = self.read_first(op.operands[0])
        if isinstance(op, FixedMaxPool):
            self.first[op.result] = self.node("MaxPool", [source], **_window(op))
            return
        if not isinstance(op, FixedAveragePool) or op.rounding is not Rounding.HALF_EVEN:
            raise NotOnnx(f"{op.describe()} has no counterpart")
        reals = self.node("Cast", [source], to=onnx.TensorProto.FLOAT)
        means = self.node("Round", [self.node("AveragePool", [reals], **_window(op))])
        self.first[op.result] = self.node("Cast", [means], to=self.onnx_type(op.result.type.element))

    # The border to reals, and reals

    def dequantize(self, op: Op) -> None:
        x = op.operands[0]
        self.plain[op.result] = self.node("DequantizeLinear", self.quantized(x), **self.along(x))

    def quantize(self, op: Op) -> None:
        """Where the rule is to multiply by the reciprocal of the scale, the product is divided by 1."""
        assert isinstance(op, Quantize)
        if op.rounding is not Rounding.HALF_EVEN:
            raise NotOnnx(f"{op.describe()} rounds {op.rounding}")
        source, scales = self.read(op.operands[0]), self.scales(op.result)
        if op.rule is QuantizeRule.RECIPROCAL:
            if scales.ndim:
                raise NotOnnx(f"{op.describe()} multiplies by the reciprocals of several scales")
            source = self.node("Mul", [source, self.constant(np.float32(1) / scales)])
            scales = np.ones_like(scales)
        result = self.node("QuantizeLinear", [source, *self.quantization(op.result, scales)], **self.along(op.result))
        self.plain[op.result] = self.narrowed(op.result, result)

    def along(self, value: Value) -> dict[str, Any]:
        """The axis of the scales as an attribute."""
        axis = getattr(value.type.element, "axis", None)
        return {} if axis is None else {"axis": axis}

    def dequantize_blocks(self, op: Op) -> None:
        """Bytes of two 4-bit integers, the first in the low half."""
        assert isinstance(op, DequantizeBlocks)
        data = self.data(op.operands[0])
        if op.packing is Packing.HIGH_FIRST:
            data = data << 4 | data >> 4
        weights = helper.make_tensor(self.fresh(), onnx.TensorProto.INT4, op.shape, data.tobytes(), raw=True)
        self.initializers.append(weights)
        operands = [weights.name, self.read(op.operands[1])]
        self.plain[op.result] = self.node("DequantizeLinear", operands, axis=op.axis, block_size=op.block)

    def real(self, op: Op) -> None:
        """An op on reals, and its fused activation.

        IEEE 754 and the order of sums determine every bit of it, but for Conv, MatMul and transcendental functions.
        """
        self.plain[op.result] = self.function(op, [self.read(v) for v in op.operands])

    def function(self, op: Op, operands: list[str]) -> str:
        bounds: tuple[float, ...]
        if isinstance(op, Activation):
            result, bounds = operands[0], op.activation
        else:
            added = [operands.pop()] if isinstance(op, MatMul) and len(operands) > 2 else []
            result = self.node(op.mnemonic, operands, **_attributes(op))
            result = self.node("Add", [result, *added]) if added else result
            bounds = (op.clip if isinstance(op, Clipped) else None) or (-np.inf, np.inf)
        if np.isfinite(bounds).any():
            result = self.node("Clip", [result, *(self.constant(b, np.float32) for b in bounds)])
        return result

    def table(self, op: Op) -> None:
        """The op of the typed graph that made the value of this name, on the reals of the operand."""
        if self.typed is None:
            raise NotOnnx(f"{op.describe()}: a table needs the typed graph to say what it holds")
        x, made = op.operands[0], self.typed.producers[self.typed.value(op.result.name)]
        operands = [self.node("DequantizeLinear", self.quantized(x))]
        if isinstance(made, PRelu):
            operands.append(self.constant(self.typed.constants[made.operands[1]].data.reshape(-1), np.float32))
        real = self.function(made, operands)
        result = self.node("QuantizeLinear", [real, *self.quantization(op.result)])
        self.plain[op.result] = self.narrowed(op.result, result)

    def argmax(self, op: Op) -> None:
        assert isinstance(op, FixedArgMax)
        last = int(op.select_last_index)
        operands = [self.read(op.operands[0])]
        found = self.node("ArgMax", operands, axis=op.axis, keepdims=int(op.keepdims), select_last_index=last)
        self.plain[op.result] = self.node("Cast", [found], to=self.onnx_type(op.result.type.element))

    # Ops that move integers or reals

    def move(self, kind: str, op: Op, *constants: npt.ArrayLike, **attributes: Any) -> None:
        """An op whose further operands are constant indices."""
        operands = [*(self.read(v) for v in op.operands), *(self.constant(c, np.int64) for c in constants)]
        self.plain[op.result] = self.node(kind, operands, **attributes)

    def reshape(self, op: Op) -> None:
        self.plain[op.result] = self.shaped_as(self.read(op.operands[0]), op.result)

    def transpose(self, op: Op) -> None:
        """Between the two layouts of maps it only says which one is there."""
        assert isinstance(op, Transpose)
        x = op.operands[0]
        if op.perm == _TO_FIRST:
            self.plain[op.result] = self.read_first(x)
        elif op.perm == _TO_LAST:
            self.first[op.result] = self.read(x)
        else:
            self.move("Transpose", op, perm=op.perm)

    def concat(self, op: Op) -> None:
        assert isinstance(op, Concat)
        self.move("Concat", op, axis=op.axis)

    def gather(self, op: Op) -> None:
        assert isinstance(op, Gather)
        self.move("Gather", op, op.indices.data, axis=op.axis)

    def slice(self, op: Op) -> None:
        assert isinstance(op, Slice)
        ends = [_PAST_THE_FIRST if end < 0 else end for end in op.ends]
        self.move("Slice", op, op.starts, ends, op.axes, op.steps)

    def pad(self, op: Op) -> None:
        assert isinstance(op, Pad | FixedPad)
        storage = storage_of(op.result.type.element)
        value = self.constant(op.value, np.float32 if storage is None else storage.dtype)
        operands = [self.read(op.operands[0]), self.constant(op.pads, np.int64), value]
        self.plain[op.result] = self.node("Pad", operands)


def _window(op: Pool2d | AveragePool | MaxPool) -> dict[str, Any]:
    return {"kernel_shape": op.kernel, "strides": op.strides, "pads": op.pads, "dilations": op.dilations}


def _attributes(op: Op) -> dict[str, Any]:
    """The attributes of an op on reals by their names in ONNX."""
    match op:
        case LeakyRelu():
            return {"alpha": op.alpha}
        case HardSigmoid():
            return {"alpha": op.alpha, "beta": op.beta}
        case Conv():
            return {"strides": op.strides, "pads": op.pads, "dilations": op.dilations, "group": op.groups}
        case MaxPool():
            return {**_window(op), "ceil_mode": int(op.ceil_mode)}
        case AveragePool():
            counted = int(op.count_include_pad)
            return {**_window(op), "ceil_mode": int(op.ceil_mode), "count_include_pad": counted}
    return {}


_REALS: tuple[type[Op], ...] = (
    Activation,
    Add,
    AveragePool,
    Conv,
    Div,
    HardSigmoid,
    HardSwish,
    LeakyRelu,
    MatMul,
    MaxPool,
    Mul,
    PRelu,
    Sigmoid,
    Sub,
    Tanh,
)

#: By class, or by a base that the integer and the float class share.
_RULES: Mapping[type[Op], Callable[[_Writer, Op], None]] = {
    Concat: _Writer.concat,
    FixedArgMax: _Writer.argmax,
    Dequantize: _Writer.dequantize,
    DequantizeBlocks: _Writer.dequantize_blocks,
    Gather: _Writer.gather,
    Pool2d: _Writer.pool,
    Quantize: _Writer.quantize,
    Requantize: _Writer.requantize,
    Reshape: _Writer.reshape,
    Slice: _Writer.slice,
    Table: _Writer.table,
    Transpose: _Writer.transpose,
    **dict.fromkeys((FixedPad, Pad), _Writer.pad),
    **dict.fromkeys(_REALS, _Writer.real),
}

#: What makes the accumulator that a requantize reads.
_ACCUMULATORS: Mapping[type[Op], Callable[[_Writer, Op, Op], None]] = {
    Conv2d: _Writer.conv,
    FixedMul: _Writer.mul,
    FixedMatMul: _Writer.matmul,
    ReduceSum: _Writer.mean,
}
