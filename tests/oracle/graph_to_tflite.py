"""A fixed-stage graph of qir as a .tflite model, by recognizing what each runtime op was decomposed into.

Scales and zero points come from the types alone, so that the runtime derives its own multipliers. Padding is explicit
(PAD, then VALID). A fused activation is the one whose bounds, computed as the runtime does, are the result's storage.
Anything that is not recognized is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from oracle.tflite_writer import ModelWriter

from qir.integer_functions import quantized_bound
from qir.ir import Graph, Op, Value
from qir.ops.constant import Const
from qir.ops.fixed_elementwise import FixedAdd, FixedArgMax, FixedMul, FixedSub, Table
from qir.ops.fixed_linear import Conv2d, FixedMatMul, ReduceSum
from qir.ops.fixed_pool import FixedAveragePool, FixedMaxPool, FixedSoftmax
from qir.ops.fixed_rescale import Requantize
from qir.ops.float_elementwise import HardSwish, LeakyRelu, PRelu, Sigmoid, Tanh
from qir.ops.movement import FixedConcat, FixedPad, FixedReshape, FixedTranspose
from qir.types import S8, AffineType, IntegerType, TensorType

ACTIVATIONS: dict[str, tuple[float | None, float | None]] = {
    "NONE": (None, None),
    "RELU": (0.0, None),
    "RELU6": (0.0, 6.0),
    "RELU_N1_TO_1": (-1.0, 1.0),
}
#: What a table stands for is not in the table: it is the op of this name in the typed graph.
TABLES: dict[type[Op], str] = {Sigmoid: "LOGISTIC", Tanh: "TANH", HardSwish: "HARD_SWISH"}


def to_tflite(fixed: Graph, typed: Graph) -> bytes:
    """The bytes of the model, for a batch of one. `typed` is the graph before legalize, for the names of functions."""
    return _Converter(fixed, typed).convert()


class _Converter:
    def __init__(self, fixed: Graph, typed: Graph) -> None:
        self.graph = fixed
        self.functions = {op.result.name: op for op in typed.ops if len(op.results) == 1}
        self.typed = typed
        self.writer = ModelWriter()
        self.tensors: dict[Value, int] = {}
        self.rules: dict[type[Op], Callable[[Any], None]] = {
            Requantize: self.requantize,
            Table: self.table,
            FixedSoftmax: self.softmax,
            FixedMaxPool: self.pool,
            FixedAveragePool: self.pool,
            FixedReshape: self.reshape,
            FixedTranspose: self.transpose,
            FixedConcat: self.concat,
            FixedPad: self.pad,
            FixedArgMax: self.argmax,
        }

    def convert(self) -> bytes:
        inputs = [self.of(v) for v in self.graph.inputs]
        inner = {Const, Conv2d, FixedMatMul, ReduceSum, FixedAdd, FixedSub, FixedMul}
        for op in self.graph.ops:
            if type(op) in inner or self._is_addend(op):
                continue
            if type(op) not in self.rules:
                raise ValueError(f"{op.describe()} has no TensorFlow Lite form here")
            self.rules[type(op)](op)
        return self.writer.finish(inputs, [self.of(v) for v in self.graph.outputs])

    def _is_addend(self, op: Op) -> bool:
        users = self.graph.users.get(op.results[0], ())
        return isinstance(op, Requantize) and bool(users) and all(isinstance(u, FixedAdd | FixedSub) for u in users)

    # Tensors

    def of(self, value: Value) -> int:
        """The tensor of a value; constants are written as they are."""
        if value not in self.tensors:
            data = self.graph.constants.get(value)
            self.tensors[value] = self.new(value.type, value.name, None if data is None else data.data)
        return self.tensors[value]

    def new(self, kind: TensorType, name: str, data: npt.NDArray[Any] | None = None) -> int:
        """A tensor of a qir type."""
        if isinstance(kind.element, IntegerType):
            dtype = np.int32 if kind.element.bits == 64 else kind.element.dtype
            return self.writer.tensor(name, kind.concrete(1), dtype, data=data)
        assert isinstance(kind.element, AffineType)
        scale, zero = kind.element.scale.data, kind.element.zero_point.data
        axis = kind.element.axis or 0
        return self.writer.tensor(name, kind.concrete(1), kind.element.storage.dtype, scale, zero, axis, data)

    def numbers(self, name: str, data: Any) -> int:
        """A constant int32 tensor, such as a shape."""
        array = np.asarray(data, np.int32)
        return self.writer.tensor(name, array.shape, np.int32, data=array)

    def activation(self, value: Value) -> str:
        """The fused activation whose bounds are the storage of `value`."""
        element = value.type.element
        assert isinstance(element, AffineType)
        scale, zero = np.float32(element.scale.data), int(element.zero_point.data)
        for name, (low, high) in ACTIVATIONS.items():
            lo = S8.lo if low is None else max(S8.lo, quantized_bound(low, scale, zero))
            hi = S8.hi if high is None else min(S8.hi, quantized_bound(high, scale, zero))
            if (lo, hi) == (element.storage.lo, element.storage.hi):
                return name
        raise ValueError(f"no activation of the runtime has the bounds of %{value.name}: {element.storage}")

    # Ops

    def requantize(self, op: Requantize) -> None:
        source = self.graph.producers.get(op.operands[0])
        result = self.of(op.result)
        if isinstance(source, Conv2d):
            self.convolution(source, op)
        elif isinstance(source, FixedMatMul):
            self.matmul(source, op)
        elif isinstance(source, ReduceSum):
            axes = self.numbers(f"{op.result.name}.axes", list(source.axes))
            self.writer.operator("MEAN", [self.of(source.operands[0]), axes], [result], keep_dims=source.keepdims)
        elif isinstance(source, FixedAdd | FixedSub):
            addends = [self.graph.producers[v].operands[0] for v in source.operands]
            kind = "ADD" if isinstance(source, FixedAdd) else "SUB"
            self.writer.operator(kind, [self.of(v) for v in addends], [result], activation=self.activation(op.result))
        elif isinstance(source, FixedMul):
            operands = [self.of(v) for v in source.operands]
            self.writer.operator("MUL", operands, [result], activation=self.activation(op.result))
        else:
            kind = {"NONE": "QUANTIZE", "RELU": "RELU", "RELU6": "RELU6"}[self.activation(op.result)]
            self.writer.operator(kind, [self.of(op.operands[0])], [result])

    def padded(self, x: Value, pads: tuple[int, ...], name: str) -> int:
        """The operand of a VALID window: behind a PAD with the zero point where pads are not zero."""
        if not any(pads):
            return self.of(x)
        n, height, width, channels = x.type.concrete(1)
        top, left, bottom, right = pads
        kind = TensorType((n, height + top + bottom, width + left + right, channels), x.type.element)
        padded = self.new(kind, f"{name}.padded")
        widths = self.numbers(f"{name}.pads", [[0, 0], [top, bottom], [left, right], [0, 0]])
        self.writer.operator("PAD", [self.of(x), widths], [padded])
        return padded

    def convolution(self, conv: Conv2d, op: Requantize) -> None:
        x, weight = conv.operands[0], conv.operands[1]
        data = self.graph.constants[weight].data
        assert isinstance(weight.type.element, AffineType)
        scales = np.broadcast_to(weight.type.element.scale.data, data.shape[:1])
        depthwise = conv.groups > 1
        if depthwise:
            if conv.groups != x.type.shape[3]:
                raise ValueError(f"{conv.describe()}: the runtime has no grouped convolutions but depthwise ones")
            data = data.transpose(3, 1, 2, 0)
        w = self.writer.tensor(weight.name, data.shape, np.int8, scales, 0, 3 if depthwise else 0, data)
        bias_data = np.zeros(len(scales), np.int32)
        if len(conv.operands) > 2:
            bias_data = self.graph.constants[conv.operands[2]].data
        assert isinstance(x.type.element, AffineType)
        product = scales * x.type.element.scale.data
        bias = self.writer.tensor(f"{op.result.name}.bias", bias_data.shape, np.int32, product, 0, 0, bias_data)
        options: dict[str, Any] = {
            "padding": "VALID",
            "stride_h": conv.strides[0],
            "stride_w": conv.strides[1],
            "dilation_h_factor": conv.dilations[0],
            "dilation_w_factor": conv.dilations[1],
            "activation": self.activation(op.result),
        }
        if depthwise:
            options["depth_multiplier"] = data.shape[3] // conv.groups
        operands = [self.padded(x, conv.pads, op.result.name), w, bias]
        kind = "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D"
        self.writer.operator(kind, operands, [self.of(op.result)], **options)

    def matmul(self, product: FixedMatMul, op: Requantize) -> None:
        left, right = product.operands[0], product.operands[1]
        if right not in self.graph.constants:
            self.writer.operator("BATCH_MATMUL", [self.of(left), self.of(right)], [self.of(op.result)])
            return
        assert isinstance(right.type.element, AffineType)
        assert isinstance(left.type.element, AffineType)
        scale = right.type.element.scale.data
        w = self.writer.tensor(
            right.name,
            self.graph.constants[right].shape[::-1],
            np.int8,
            scale,
            0,
            0,
            self.graph.constants[right].data.T,
        )
        bias = -1
        if len(product.operands) > 2:
            data = self.graph.constants[product.operands[2]].data
            bias = self.writer.tensor(
                f"{op.result.name}.bias", data.shape, np.int32, scale * left.type.element.scale.data, 0, 0, data
            )
        self.writer.operator(
            "FULLY_CONNECTED",
            [self.of(left), w, bias],
            [self.of(op.result)],
            activation=self.activation(op.result),
            keep_num_dims=True,
        )

    def table(self, op: Table) -> None:
        function = self.functions.get(op.result.name.removesuffix(".table"))
        x, result = self.of(op.operands[0]), self.of(op.result)
        if isinstance(function, LeakyRelu):
            self.writer.operator("LEAKY_RELU", [x], [result], alpha=function.alpha)
        elif isinstance(function, PRelu):
            slope = function.operands[1]
            assert isinstance(slope.type.element, AffineType)
            scale, zero = float(slope.type.element.scale.data), int(slope.type.element.zero_point.data)
            real = self.typed.constants[slope].data.reshape(-1)
            data = np.clip(np.floor(np.abs(real / scale) + 0.5) * np.sign(real) + zero, -128, 127).astype(np.int8)
            shape = (1,) * (op.result.type.rank - 2) + (data.size,)
            alpha = self.writer.tensor(f"{op.result.name}.alpha", shape, np.int8, scale, zero, data=data.reshape(shape))
            self.writer.operator("PRELU", [x, alpha], [result])
        elif function is not None and type(function) in TABLES:
            self.writer.operator(TABLES[type(function)], [x], [result])
        else:
            raise ValueError(f"{op.describe()} is made by no function that the runtime has")

    def softmax(self, op: FixedSoftmax) -> None:
        self.writer.operator("SOFTMAX", [self.of(op.operands[0])], [self.of(op.result)], beta=1.0)

    def pool(self, op: FixedMaxPool | FixedAveragePool) -> None:
        if any(op.pads) or set(op.dilations) != {1}:
            raise ValueError(f"{op.describe()}: the runtime pools without explicit pads and dilations")
        kind = "MAX_POOL_2D" if isinstance(op, FixedMaxPool) else "AVERAGE_POOL_2D"
        self.writer.operator(
            kind,
            [self.of(op.operands[0])],
            [self.of(op.result)],
            padding="VALID",
            stride_h=op.strides[0],
            stride_w=op.strides[1],
            filter_height=op.kernel[0],
            filter_width=op.kernel[1],
        )

    def reshape(self, op: FixedReshape) -> None:
        shape = self.numbers(f"{op.result.name}.shape", op.result.type.concrete(1))
        self.writer.operator("RESHAPE", [self.of(op.operands[0]), shape], [self.of(op.result)])

    def transpose(self, op: FixedTranspose) -> None:
        perm = self.numbers(f"{op.result.name}.perm", op.perm)
        self.writer.operator("TRANSPOSE", [self.of(op.operands[0]), perm], [self.of(op.result)])

    def concat(self, op: FixedConcat) -> None:
        self.writer.operator("CONCATENATION", [self.of(v) for v in op.operands], [self.of(op.result)], axis=op.axis)

    def pad(self, op: FixedPad) -> None:
        rank = op.result.type.rank
        widths = self.numbers(f"{op.result.name}.pads", [[op.pads[i], op.pads[rank + i]] for i in range(rank)])
        data = np.full(1, op.value, np.int8)
        element = op.result.type.element
        assert isinstance(element, AffineType)
        fill = self.writer.tensor(
            f"{op.result.name}.fill", (1,), np.int8, element.scale.data, element.zero_point.data, data=data
        )
        self.writer.operator("PADV2", [self.of(op.operands[0]), widths, fill], [self.of(op.result)])

    def argmax(self, op: FixedArgMax) -> None:
        axis = self.numbers(f"{op.result.name}.axis", op.axis)
        self.writer.operator("ARG_MAX", [self.of(op.operands[0]), axis], [self.of(op.result)])
