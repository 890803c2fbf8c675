"""Writes .tflite models without TensorFlow, and runs them on TensorFlow Lite Micro."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flatbuffers
import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema
from tflite_micro.python.tflite_micro import runtime

Array = npt.NDArray[Any]

#: Operator name -> (version that has the int8 kernel, name of its options table).
OPERATORS: dict[str, tuple[int, str]] = {
    "ADD": (2, "AddOptions"),
    "ARG_MAX": (2, "ArgMaxOptions"),
    "AVERAGE_POOL_2D": (2, "Pool2DOptions"),
    "BATCH_MATMUL": (2, "BatchMatMulOptions"),
    "CONCATENATION": (2, "ConcatenationOptions"),
    "CONV_2D": (3, "Conv2DOptions"),
    "DEPTHWISE_CONV_2D": (3, "DepthwiseConv2DOptions"),
    "DEQUANTIZE": (2, "DequantizeOptions"),
    "FULLY_CONNECTED": (4, "FullyConnectedOptions"),
    "GATHER": (2, "GatherOptions"),
    "HARD_SWISH": (1, "HardSwishOptions"),
    "LEAKY_RELU": (2, "LeakyReluOptions"),
    "LOGISTIC": (2, "NONE"),
    "MAXIMUM": (2, "MaximumMinimumOptions"),
    "MAX_POOL_2D": (2, "Pool2DOptions"),
    "MEAN": (2, "ReducerOptions"),
    "MINIMUM": (2, "MaximumMinimumOptions"),
    "MUL": (2, "MulOptions"),
    "PAD": (2, "PadOptions"),
    "PADV2": (2, "PadV2Options"),
    "PRELU": (1, "NONE"),
    "QUANTIZE": (2, "QuantizeOptions"),
    "RELU": (2, "NONE"),
    "RELU6": (2, "NONE"),
    "RESHAPE": (1, "ReshapeOptions"),
    "SOFTMAX": (2, "SoftmaxOptions"),
    "STRIDED_SLICE": (2, "StridedSliceOptions"),
    "SUB": (2, "SubOptions"),
    "SUM": (2, "ReducerOptions"),
    "TANH": (2, "NONE"),
    "TRANSPOSE": (2, "TransposeOptions"),
}

#: Options that are enumerations of the schema; they are given by the name of the member.
_ENUMERATIONS = {
    "activation": ("fusedActivationFunction", schema.ActivationFunctionType),
    "padding": ("padding", schema.Padding),
}


class ModelWriter:
    """Builds a model of one subgraph; tensors are named by the index that `tensor` returns."""

    def __init__(self) -> None:
        self._tensors: list[Any] = []
        self._buffers: list[Any] = [schema.BufferT()]  # buffer 0 is empty and stands for every tensor without data
        self._operators: list[Any] = []
        self._codes: dict[str, int] = {}

    def tensor(
        self,
        name: str,
        shape: Sequence[int],
        dtype: npt.DTypeLike = np.int8,
        scale: npt.ArrayLike | None = None,
        zero_point: npt.ArrayLike = 0,
        axis: int = 0,
        data: Array | None = None,
    ) -> int:
        """Adds a tensor and returns its index; several scales quantize it along `axis`, data makes it constant."""
        tensor = schema.TensorT()
        tensor.name = name
        tensor.shape = [int(size) for size in shape]
        tensor.type = getattr(schema.TensorType, np.dtype(dtype).name.upper())
        if scale is not None:
            tensor.quantization = _quantization(scale, zero_point, axis)
        if data is not None:
            if tuple(data.shape) != tuple(shape):
                raise ValueError(f"tensor {name} is declared as {tuple(shape)} but its data is {data.shape}")
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(data, dtype).tobytes(), np.uint8)
            tensor.buffer = len(self._buffers)
            self._buffers.append(buffer)
        self._tensors.append(tensor)
        return len(self._tensors) - 1

    def operator(self, kind: str, inputs: Sequence[int], outputs: Sequence[int], **options: Any) -> None:
        """Adds an operator of OPERATORS; an input of -1 is left out.

        Options are the schema's fields in snake case (`stride_h=2`), and `activation="RELU6"`, `padding="SAME"`.
        """
        table = OPERATORS[kind][1]
        operator = schema.OperatorT()
        operator.opcodeIndex = self._codes.setdefault(kind, len(self._codes))
        operator.inputs, operator.outputs = list(inputs), list(outputs)
        operator.builtinOptionsType = getattr(schema.BuiltinOptions, table)
        if table != "NONE":
            operator.builtinOptions = getattr(schema, f"{table}T")()
        for name, value in options.items():
            field, member = _option(name, value)
            if not hasattr(operator.builtinOptions, field):
                raise ValueError(f"{kind} has no option {name!r}")
            setattr(operator.builtinOptions, field, member)
        self._operators.append(operator)

    def finish(self, inputs: Sequence[int], outputs: Sequence[int]) -> bytes:
        """The bytes of the .tflite file whose inputs and outputs are these tensors."""
        subgraph = schema.SubGraphT()
        subgraph.name = "main"
        subgraph.tensors, subgraph.operators = self._tensors, self._operators
        subgraph.inputs, subgraph.outputs = list(inputs), list(outputs)
        model = schema.ModelT()
        model.version = 3
        model.buffers, model.subgraphs = self._buffers, [subgraph]
        model.operatorCodes = [_operator_code(kind) for kind in self._codes]
        builder = flatbuffers.Builder(1 << 16)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())


class MicroRuntime:
    """A model loaded into TensorFlow Lite Micro. Raises RuntimeError when the runtime refuses it."""

    def __init__(self, model: bytes, arena_bytes: int = 1 << 25) -> None:
        self._interpreter = runtime.Interpreter.from_bytes(model, arena_size=arena_bytes)
        subgraph = schema.ModelT.InitFromObj(schema.Model.GetRootAs(model, 0)).subgraphs[0]
        self._outputs = len(subgraph.outputs)

    def run(self, *inputs: Array) -> list[Array]:
        """The outputs for one set of inputs, in the order of the model."""
        for index, value in enumerate(inputs):
            self._interpreter.set_input(value, index)
        self._interpreter.invoke()
        return [np.array(self._interpreter.get_output(index)) for index in range(self._outputs)]


def run_tflite_micro(model: bytes, *inputs: Array) -> list[Array]:
    """The outputs of TensorFlow Lite Micro for one set of inputs."""
    return MicroRuntime(model).run(*inputs)


def _quantization(scale: npt.ArrayLike, zero_point: npt.ArrayLike, axis: int) -> Any:
    parameters = schema.QuantizationParametersT()
    parameters.scale = np.atleast_1d(np.asarray(scale, np.float32))
    parameters.zeroPoint = np.broadcast_to(np.asarray(zero_point, np.int64), parameters.scale.shape).copy()
    parameters.quantizedDimension = axis
    return parameters


def _option(name: str, value: Any) -> tuple[str, Any]:
    if name in _ENUMERATIONS:
        field, enumeration = _ENUMERATIONS[name]
        return field, getattr(enumeration, value)
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest), value


def _operator_code(kind: str) -> Any:
    code = schema.OperatorCodeT()
    code.version = OPERATORS[kind][0]
    code.builtinCode = getattr(schema.BuiltinOperator, kind)
    code.deprecatedBuiltinCode = min(code.builtinCode, schema.BuiltinOperator.PLACEHOLDER_FOR_GREATER_OP_CODES)
    return code
