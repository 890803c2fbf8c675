"""What the lowering of one node sees: its inputs, its attributes with their defaults, and the graph being built."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx

from qir.arrays import Array
from qir.errors import QirError, RewriteError
from qir.frontend.onnx_batch import BatchMultiple
from qir.frontend.onnx_model import tensor_array
from qir.ir import Op, Value
from qir.ops.movement import Reshape
from qir.rewrite import GraphBuilder
from qir.types import BATCH, F32, Dim, ElementType, Shape, TensorType, integer, shape_text

Tensor = npt.NDArray[Any]
#: What an ONNX name stands for: a value computed at run time, or data known at import (dtype object: holds N).
Known = Value | Tensor

_INTEGER_TYPES: Final = (
    onnx.TensorProto.INT8,
    onnx.TensorProto.INT16,
    onnx.TensorProto.INT32,
    onnx.TensorProto.INT64,
    onnx.TensorProto.UINT8,
    onnx.TensorProto.UINT16,
    onnx.TensorProto.UINT32,
    onnx.TensorProto.UINT64,
)


def element_type(data_type: int) -> ElementType:
    """The element type for one of ONNX. Raises QirError for those that programs do not compute with."""
    if data_type == onnx.TensorProto.FLOAT:
        return F32
    if data_type in _INTEGER_TYPES:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(data_type)
        return integer(8 * dtype.itemsize, dtype.kind == "i")
    known = {number: name for name, number in onnx.TensorProto.DataType.items()}
    raise QirError(
        f"elements of type {known.get(data_type, data_type)} are not supported, float32 and integers of 8 to 64 bits "
        f"are; export the model in float32"
    )


class Scope:
    """The graph being built and what each ONNX name stands for so far."""

    def __init__(self, builder: GraphBuilder, opset: int, folder: Path | None) -> None:
        self.builder = builder
        self.opset = opset
        self.folder = folder
        self.known: dict[str, Known] = {}
        self.read: frozenset[str] = frozenset()  # the names that nodes and graph outputs read
        self._constants: dict[str, Value] = {}

    def value(self, name: str) -> Value:
        """The runtime value of a name; data become a `const` on first use. Raises QirError for unusable data."""
        known = self.known[name]
        if isinstance(known, Value):
            return known
        if name not in self._constants:
            self._constants[name] = self.constant(known, name)
        return self._constants[name]

    def constant(self, data: Tensor, name: str) -> Value:
        """Emit data as a `const`. Raises QirError, which names the tensor, for NaN, infinity and unusable types."""
        if data.dtype == object:
            raise QirError(f'"{name}" depends on the open batch N; fix the batch size with shapes')
        try:
            element = element_type(onnx.helper.np_dtype_to_tensor_dtype(data.dtype))
        except QirError as fault:
            raise QirError(f'tensor "{name}": {fault}') from fault
        if data.dtype.kind == "f" and not np.isfinite(data).all():
            bad = int(np.count_nonzero(~np.isfinite(data)))
            raise QirError(f'tensor "{name}" holds NaN or infinity ({bad} of {data.size} elements); repair the model')
        return self.builder.constant(Array(data, name), TensorType(data.shape, element), name)

    def shape(self, name: str) -> Shape:
        """The shape of what a name stands for."""
        known = self.known[name]
        return known.type.shape if isinstance(known, Value) else known.shape


class Node:
    """One ONNX node while it is lowered."""

    def __init__(self, proto: onnx.NodeProto, scope: Scope) -> None:
        self.proto = proto
        self.scope = scope
        self.opset = scope.opset
        self.location = proto.name or next((o for o in proto.output if o), proto.op_type)
        self._attributes = {a.name: a for a in proto.attribute}

    # Attributes

    def attribute(self, name: str) -> Any:
        """The attribute, else the default of the operator set, else None; texts as str, lists as tuples."""
        proto = self._attributes.get(name)
        if proto is None:
            schema = onnx.defs.get_schema(self.proto.op_type, self.opset, "").attributes.get(name)
            proto = schema.default_value if schema is not None and schema.default_value.name else None
        if proto is None:
            return None
        value = onnx.helper.get_attribute_value(proto)
        if isinstance(value, bytes):
            return value.decode("utf-8", "replace")
        return value if isinstance(value, int | float | onnx.TensorProto | onnx.SparseTensorProto) else tuple(value)

    def number(self, name: str) -> Any:
        """A scalar attribute that the operator set gives a default. Raises QirError when it has no value."""
        value = self.attribute(name)
        if value is None:
            raise QirError(f"its attribute {name} is missing")
        return value

    def integers(self, name: str, default: Sequence[int]) -> tuple[int, ...]:
        """A list of integers."""
        value = self.attribute(name)
        return tuple(default) if value is None else tuple(int(v) for v in value)

    def array(self, tensor: onnx.TensorProto) -> Tensor:
        """The data of a tensor attribute."""
        return tensor_array(tensor, self.scope.folder)

    # Inputs

    def has(self, index: int) -> bool:
        """Whether the input is given."""
        return index < len(self.proto.input) and bool(self.proto.input[index])

    def given(self, index: int) -> Known:
        """What the input stands for. Raises QirError when it is missing."""
        if not self.has(index):
            raise QirError(f"its input {index} is missing")
        return self.scope.known[self.proto.input[index]]

    def value(self, index: int) -> Value:
        """The input as a runtime value. Raises QirError when it is missing or its data are unusable."""
        self.given(index)
        return self.scope.value(self.proto.input[index])

    def data(self, index: int, what: str) -> Tensor:
        """The input as data known at import. Raises QirError when it is computed at run time."""
        known = self.given(index)
        if isinstance(known, Value):
            raise QirError(f'its {what} "{self.proto.input[index]}" is computed at run time; it must be a constant')
        return known

    def dims(self, index: int, what: str) -> tuple[int | BatchMultiple, ...]:
        """A 1-d input of integers known at import, some of which may be multiples of the batch."""
        return tuple(self.data(index, what).reshape(-1).tolist())

    def whole(self, index: int, what: str) -> tuple[int, ...]:
        """A 1-d input of integers known at import. Raises QirError when one depends on the batch."""
        return tuple(plain(d, what) for d in self.dims(index, what))

    def scalar(self, index: int, what: str) -> float:
        """A scalar known at import. Raises QirError when the data are no scalar."""
        data = self.data(index, what)
        if data.size != 1 or data.dtype.kind not in "fiub":
            raise QirError(f'its {what} "{self.proto.input[index]}" is no number, but {data.dtype}{list(data.shape)}')
        return float(data.reshape(()))

    # Results

    @property
    def output(self) -> str:
        """The name of the first result."""
        return next((o for o in self.proto.output if o), "")

    def is_read(self, index: int) -> bool:
        """Whether anything reads the output."""
        return index < len(self.proto.output) and self.proto.output[index] in self.scope.read

    def emit(
        self, op_class: type[Op], operands: Iterable[Value], *, name: str | None = None, **attributes: Any
    ) -> Value:
        """Append an op whose result is named like the first output. Raises RewriteError, which names the node."""
        hint = self.output if name is None else name
        value = self.scope.builder.emit(op_class, tuple(operands), name=hint, location=self.location, **attributes)
        fault = next(self.scope.builder.ops[-1].check(), None)
        if fault:
            raise RewriteError(f'node "{self.location}": {op_class.mnemonic}: {fault}')
        return value

    def step(self, what: str, op_class: type[Op], operands: Iterable[Value], **attributes: Any) -> Value:
        """Append an op on the way to the result, named `output.what`."""
        return self.emit(op_class, operands, name=f"{self.output}.{what}", **attributes)

    def constant(self, data: Tensor, what: str) -> Value:
        """Emit data made from an input, named `output.what`."""
        return self.scope.constant(data, f"{self.output}.{what}")

    def reshape(self, value: Value, target: Sequence[Dim], *, name: str | None = None) -> Value:
        """`value` under another shape; itself when nothing changes. Raises QirError when N would not stay in front."""
        shape = tuple(target)
        if shape == value.type.shape:
            return value
        if value.type.is_batched and shape[:1] != (BATCH,):
            raise QirError(
                f"a reshape from {shape_text(value.type.shape)} to {shape_text(shape)} does not keep the open batch N "
                f"in front; fix the batch size with shapes"
            )
        sizes = tuple(d for d in shape if isinstance(d, int))
        return self.emit(Reshape, [value], name=name, shape=sizes)


def plain(dim: int | BatchMultiple, what: str) -> int:
    """An integer. Raises QirError when it depends on the batch."""
    if isinstance(dim, BatchMultiple):
        raise QirError(f"its {what} depends on the open batch N; fix the batch size with shapes")
    return int(dim)


def sample_size(shape: Sequence[Dim]) -> int:
    """The product of the known dimensions."""
    return math.prod(d for d in shape if isinstance(d, int))
