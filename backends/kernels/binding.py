"""Which kernel runs an op on this host: chosen by attributes, types and stated ranges, never by a backend's name.

A bound kernel is a function `(inputs, output) -> None` on arrays of the stored dtypes, batch in front.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qir.arrays import Array
from qir.backends.kernels import elementwise, linear
from qir.backends.kernels.scalars import FORMS, ROUNDINGS
from qir.fixed_point import Overflow, RequantizeForm, Rounding
from qir.integer_functions import softmax_exponentials, softmax_reciprocal, softmax_terms
from qir.interpreter import evaluate_op
from qir.ir import Op, Value
from qir.opdef import Window
from qir.ops.accumulate import centre
from qir.ops.fixed_elementwise import Elementwise, FixedAdd, FixedArgMax, FixedDiv, FixedMul, FixedSub, Table
from qir.ops.fixed_linear import Conv2d, FixedMatMul, ReduceSum
from qir.ops.fixed_pool import FixedAveragePool, FixedMaxPool, FixedSoftmax
from qir.ops.fixed_rescale import Requantize
from qir.ops.movement import Movement
from qir.types import IntegerType, TensorType, storage_of, zero_array

Tensor = npt.NDArray[Any]
Run = Callable[[Sequence[Tensor], Tensor], None]


@dataclass(frozen=True)
class Kernel:
    """A kernel bound to an op, or to an op and the requantize behind it; `name` is what `qir plan` shows."""

    name: str
    run: Run


def bind(op: Op, constants: dict[Value, Array], following: Requantize | None = None) -> Kernel | None:
    """The kernel of an op with one result; with `following`, one that does both, or None where there is none."""
    if following is not None:
        return _fused(op, constants, following)
    for kinds, rule in _RULES:
        if isinstance(op, kinds):
            kernel = rule(op, constants)
            if kernel is not None:
                return kernel
    return _interpreted(op)


def _interpreted(op: Op) -> Kernel:
    def run(inputs: Sequence[Tensor], output: Tensor) -> None:
        output[...] = evaluate_op(op, inputs)[0]

    return Kernel("island" if op.is_float else "interpreter", run)


def _storage(kind: TensorType) -> IntegerType:
    storage = storage_of(kind.element)
    assert storage is not None
    return storage


# Convolutions and matrix products


def _accumulator_dtype(op: Conv2d | FixedMatMul) -> type[np.signedinteger[Any]] | None:
    """The dtype whose wrapping sums are the op's: None where every step counts and the ordered definition must run."""
    proved = op.overflow is Overflow.NONE
    if not proved and (op.overflow is not Overflow.WRAP or op.accumulator.bits != 32):
        return None
    operands_fit = all(_storage(v.type).bits <= 16 for v in op.operands[:2])
    if op.accumulator.bits <= 32 and operands_fit:
        return np.int32
    return np.int64 if proved and op.accumulator.bits <= 64 and op.accumulator.signed else None


class _Convolution:
    """Pads and centres one sample at a time into a buffer of its own, then runs the kernel on it."""

    def __init__(self, op: Conv2d, constants: dict[Value, Array], dtype: type[np.signedinteger[Any]]) -> None:
        self.op = op
        self.window: Window = op.window
        weights = centre(constants[op.operands[1]].data.astype(np.int64), op.operands[1].type)
        packed = np.ascontiguousarray(weights.transpose(1, 2, 3, 0)).astype(dtype)
        self.depthwise = op.groups > 1 and packed.shape[2] == 1 and packed.shape[3] == op.groups
        self.weights = np.ascontiguousarray(packed[:, :, 0, :]) if self.depthwise else packed
        bias = op.optional_operand(2)
        self.bias = np.zeros(packed.shape[3], dtype) if bias is None else constants[bias].data.astype(dtype)
        self.zero = int(zero_array(op.operands[0].type.element))
        height, width, channels = op.operands[0].type.concrete(1)[1:]
        top, left, bottom, right = op.pads
        self.padded = np.zeros((height + top + bottom, width + left + right, channels), dtype)
        self.inside = self.padded[top : top + height, left : left + width]
        self.dtype = dtype

    @property
    def name(self) -> str:
        """What `qir plan` shows."""
        return f"{'depthwise' if self.depthwise else 'conv2d'}_{np.dtype(self.dtype).name}"

    def sample(self, x: Tensor, out: Tensor) -> None:
        """Accumulators of one sample."""
        np.subtract(x, self.zero, out=self.inside, dtype=self.dtype, casting="unsafe")
        op = self.op
        if self.depthwise:
            linear.depthwise_pixels(self.padded, self.weights, self.bias, *op.strides, *op.dilations, out)
        else:
            linear.conv_pixels(self.padded, self.weights, self.bias, *op.strides, *op.dilations, op.groups, out)

    def run(self, inputs: Sequence[Tensor], output: Tensor) -> None:
        """Accumulators of a batch."""
        for x, out in zip(inputs[0], output, strict=True):
            self.sample(x, out)


def _is_constant(op: Conv2d | FixedMatMul, constants: dict[Value, Array]) -> bool:
    return all(v in constants for v in op.operands[1:])


def _conv(op: Op, constants: dict[Value, Array]) -> Kernel | None:
    assert isinstance(op, Conv2d)
    dtype = _accumulator_dtype(op)
    if dtype is None or not _is_constant(op, constants) or _storage(op.result.type).dtype != dtype:
        return None
    bound = _Convolution(op, constants, dtype)
    return Kernel(bound.name, bound.run)


class _Product:
    """A matrix product with constant right operand [K, N]: a 1x1 convolution whose pixels are the rows."""

    def __init__(self, op: FixedMatMul, constants: dict[Value, Array], dtype: type[np.signedinteger[Any]]) -> None:
        weights = centre(constants[op.operands[1]].data.astype(np.int64), op.operands[1].type)
        self.weights = np.ascontiguousarray(weights.astype(dtype))[None, None]
        bias = op.optional_operand(2)
        self.bias = np.zeros(weights.shape[1], dtype) if bias is None else constants[bias].data.astype(dtype)
        self.zero = int(zero_array(op.operands[0].type.element))
        self.dtype = dtype
        self.rows = np.empty((1, 0, weights.shape[0]), dtype)

    @property
    def name(self) -> str:
        """What `qir plan` shows."""
        return f"matmul_{np.dtype(self.dtype).name}"

    def run(self, inputs: Sequence[Tensor], output: Tensor) -> None:
        """Accumulators of a batch."""
        x = inputs[0].reshape(-1, inputs[0].shape[-1])
        if self.rows.shape[1] != len(x):
            self.rows = np.empty((1, *x.shape), self.dtype)
        np.subtract(x, self.zero, out=self.rows[0], dtype=self.dtype, casting="unsafe")
        linear.conv_pixels(
            self.rows, self.weights, self.bias, 1, 1, 1, 1, 1, output.reshape(1, len(x), output.shape[-1])
        )


def _matmul(op: Op, constants: dict[Value, Array]) -> Kernel | None:
    assert isinstance(op, FixedMatMul)
    dtype = _accumulator_dtype(op)
    if dtype is None or _storage(op.result.type).dtype != dtype:
        return None
    if _is_constant(op, constants) and op.operands[1].type.rank == 2:
        product = _Product(op, constants, dtype)
        return Kernel(product.name, product.run)
    if any(v.type.rank != op.result.type.rank for v in op.operands[:2]) or len(op.operands) > 2:
        return None

    def run(inputs: Sequence[Tensor], output: Tensor) -> None:
        a, b = (centre(x.astype(dtype), v.type) for x, v in zip(inputs, op.operands, strict=True))
        shape = output.shape[:-2]
        left = np.ascontiguousarray(np.broadcast_to(a, (*shape, *a.shape[-2:]))).reshape(-1, 1, *a.shape[-2:])
        right = np.ascontiguousarray(np.broadcast_to(b, (*shape, *b.shape[-2:]))).reshape(-1, 1, 1, *b.shape[-2:])
        bias = np.zeros(output.shape[-1], dtype)
        for x, w, out in zip(left, right, output.reshape(-1, 1, *output.shape[-2:]), strict=True):
            linear.conv_pixels(x, w.astype(dtype), bias, 1, 1, 1, 1, 1, out)

    return Kernel(f"matmul_batched_{np.dtype(dtype).name}", run)


# Requantization


class _Rescale:
    """A saturating requantize over rows [P, C]; `overflow=none` saturates idly."""

    def __init__(self, op: Requantize) -> None:
        storage = op.storage
        count = op.result.type.concrete(1)[-1] if op.result.type.shape else 1
        self.multiplier = np.ascontiguousarray(np.broadcast_to(op.multiplier.data, (count,)), np.int64)
        self.shift = np.ascontiguousarray(np.broadcast_to(op.shift.data, (count,)), np.int64)
        zero, new_zero = (int(zero_array(v.type.element)) for v in (op.operands[0], op.result))
        self.count = count
        self.limits = (new_zero, storage.lo, storage.hi)
        self.zero = zero
        self.plain = op.form is RequantizeForm.DOUBLE_ROUND and op.input_shift == 0
        self.codes = (op.input_shift, FORMS[op.form], ROUNDINGS[op.rounding or Rounding.FLOOR])

    def rows(self, acc: Tensor, out: Tensor) -> None:
        """Requantize arrays of equal shape with channels last."""
        rows, target = acc.reshape(-1, self.count), out.reshape(-1, self.count)
        if self.plain:
            linear.rescale_double(rows, self.zero, self.multiplier, self.shift, *self.limits, target)
        else:
            linear.rescale_any(rows, self.zero, self.multiplier, self.shift, *self.codes, *self.limits, target)


def _can_rescale(op: Requantize) -> bool:
    """Whether 64-bit registers hold every intermediate and the result saturates."""
    source = _storage(op.operands[0].type)
    integer_form = op.form not in (RequantizeForm.FLOAT32, RequantizeForm.DOUBLE_AWAY)
    idle = op.overflow in (Overflow.SATURATE, Overflow.NONE)
    per_tensor_zero = all(zero_array(v.type.element).ndim == 0 for v in (op.operands[0], op.result))
    shifts = op.shift.data
    small = bool((shifts >= -31).all() and (shifts <= 31).all()) and source.bits + op.input_shift <= 32
    if op.form is RequantizeForm.SHIFT:
        small = small and bool((shifts <= 0).all())
    return integer_form and idle and per_tensor_zero and small and source.bits <= 32 and op.result.type.sample_size > 0


def _requantize(op: Op, constants: dict[Value, Array]) -> Kernel | None:
    assert isinstance(op, Requantize)
    if not _can_rescale(op):
        return None
    rescale = _Rescale(op)
    return Kernel(f"requantize_{op.form}", lambda inputs, output: rescale.rows(inputs[0], output))


def _fused(op: Op, constants: dict[Value, Array], following: Requantize) -> Kernel | None:
    """A convolution or constant matrix product with its requantize: accumulators of one sample stay in the cache."""
    if not isinstance(op, Conv2d | FixedMatMul) or not _can_rescale(following):
        return None
    single = bind(op, constants)
    if single is None or single.name == "interpreter":
        return None
    rescale = _Rescale(following)
    dtype = _accumulator_dtype(op)
    assert dtype is not None
    if isinstance(op, FixedMatMul):
        return _fused_matmul(op, single, rescale, dtype)
    convolution = _Convolution(op, constants, dtype)
    acc = np.empty(op.result.type.concrete(1)[1:], dtype)

    def run(inputs: Sequence[Tensor], output: Tensor) -> None:
        for x, out in zip(inputs[0], output, strict=True):
            convolution.sample(x, acc)
            rescale.rows(acc, out)

    return Kernel(f"{convolution.name}+requantize_{following.form}", run)


def _fused_matmul(op: FixedMatMul, single: Kernel, rescale: _Rescale, dtype: type[np.signedinteger[Any]]) -> Kernel:
    """The accumulators of a batch stay in one buffer, made anew when the batch changes."""
    buffer = np.empty(0, dtype)

    def run(inputs: Sequence[Tensor], output: Tensor) -> None:
        nonlocal buffer
        if buffer.shape != output.shape:
            buffer = np.empty(output.shape, dtype)
        single.run(inputs, buffer)
        rescale.rows(buffer, output)

    return Kernel(f"{single.name}+requantize", run)


# Everything else

_UFUNCS = {FixedAdd: elementwise.add, FixedSub: elementwise.subtract, FixedMul: elementwise.multiply}


def _elementwise(op: Op, constants: dict[Value, Array]) -> Kernel | None:
    assert isinstance(op, Elementwise)
    function = _UFUNCS.get(type(op))
    zeros = [zero_array(v.type.element) for v in op.operands]
    idle = op.overflow in (Overflow.SATURATE, Overflow.NONE)
    if function is None or not idle or op.intermediate_bits() > 62 or any(z.ndim for z in zeros):
        return None
    numbers = (int(zeros[0]), int(zeros[1]), op.storage.lo, op.storage.hi)

    def run(inputs: Sequence[Tensor], output: Tensor) -> None:
        function(inputs[0], inputs[1], *numbers, out=output, casting="unsafe")

    return Kernel(op.mnemonic, run)


def _divide(op: Op, constants: dict[Value, Array]) -> Kernel | None:
    assert isinstance(op, FixedDiv)
    zeros = [zero_array(v.type.element) for v in (*op.operands, op.result)]
    idle = op.overflow in (Overflow.SATURATE, Overflow.NONE)
    widest = max(_storage(v.type).bits for v in op.operands) + 1
    if not idle or any(z.ndim for z in zeros) or op.shift > 31 or widest + max(31, 31 - op.shift) > 62:
        return None
    numbers = (int(zeros[0]), int(zeros[1]), op.multiplier, 31 - op.shift, int(zeros[2]))

    def run(inputs: Sequence[Tensor], output: Tensor) -> None:
        elementwise.divide(*inputs, *numbers, op.storage.lo, op.storage.hi, out=output, casting="unsafe")

    return Kernel("div", run)


def _softmax(op: Op, constants: dict[Value, Array]) -> Kernel:
    assert isinstance(op, FixedSoftmax)
    distances = -np.arange(256, dtype=np.int64)
    exponentials = softmax_exponentials(distances, op.parameters)
    terms = softmax_terms(exponentials)

    def run(inputs: Sequence[Tensor], output: Tensor) -> None:
        x = inputs[0].reshape(-1, output.shape[-1])
        greatest, totals = np.empty(len(x), np.int64), np.empty(len(x), np.int64)
        if x.size == 0:
            return
        elementwise.softmax_sums(x, terms, greatest, totals)
        reciprocals, shifts = softmax_reciprocal(totals)
        elementwise.softmax_rows(x, exponentials, greatest, reciprocals, shifts, output.reshape(x.shape))

    return Kernel("softmax", run)


def _reduce_sum(op: Op, constants: dict[Value, Array]) -> Kernel | None:
    assert isinstance(op, ReduceSum)
    wraps = op.overflow is Overflow.WRAP and op.accumulator.bits == op.accumulator.dtype.itemsize * 8
    if not (wraps or op.overflow is Overflow.NONE) or zero_array(op.operands[0].type.element).ndim:
        return None
    offset = int(zero_array(op.operands[0].type.element)) * op.count
    whole = op.accumulator.dtype

    def run(inputs: Sequence[Tensor], output: Tensor) -> None:
        np.sum(inputs[0], axis=op.axes, dtype=whole, keepdims=op.keepdims, out=output)
        np.subtract(output, np.int64(offset), out=output, casting="unsafe")

    return Kernel("reduce_sum", run)


def _argmax(op: Op, constants: dict[Value, Array]) -> Kernel | None:
    assert isinstance(op, FixedArgMax)

    def run(inputs: Sequence[Tensor], output: Tensor) -> None:
        shape = inputs[0].shape
        outer, inner = (int(np.prod(s, dtype=np.int64)) for s in (shape[: op.axis], shape[op.axis + 1 :]))
        rows = inputs[0].reshape(outer, shape[op.axis], inner)
        elementwise.arg_max(rows, op.select_last_index, output.reshape(outer, inner))

    return Kernel("argmax", run) if op.operands[0].type.shape[op.axis] != 0 else None


def _table(op: Op, constants: dict[Value, Array]) -> Kernel | None:
    assert isinstance(op, Table)
    if op.operands[1] not in constants:
        return None
    table = np.atleast_2d(constants[op.operands[1]].data)

    def run(inputs: Sequence[Tensor], output: Tensor) -> None:
        columns = table.shape[0] if table.shape[0] > 1 else max(output.size, 1)
        elementwise.look_up(inputs[0].reshape(-1, columns), table, op.first, output.reshape(-1, columns))

    return Kernel("table", run)


def _pool(op: Op, constants: dict[Value, Array]) -> Kernel | None:
    assert isinstance(op, FixedMaxPool | FixedAveragePool)
    geometry = tuple(np.array(v, np.int64) for v in (op.kernel, op.strides, op.pads, op.dilations))
    if isinstance(op, FixedMaxPool):
        return Kernel("max_pool2d", lambda inputs, output: elementwise.max_pool(inputs[0], *geometry, output))
    if op.rounding is not Rounding.HALF_AWAY or op.intermediate_bits() > 62:
        return None
    sums = np.empty(op.result.type.concrete(1)[-1], np.int64)
    return Kernel("average_pool2d", lambda inputs, output: elementwise.average_pool(inputs[0], *geometry, sums, output))


def _movement(op: Op, constants: dict[Value, Array]) -> Kernel:
    assert isinstance(op, Movement)

    def run(inputs: Sequence[Tensor], output: Tensor) -> None:
        output[...] = op.move(*inputs)

    return Kernel(op.mnemonic, run)


_RULES: tuple[tuple[Any, Callable[[Op, dict[Value, Array]], Kernel | None]], ...] = (
    (Conv2d, _conv),
    (FixedMatMul, _matmul),
    (Requantize, _requantize),
    (FixedDiv, _divide),
    (Elementwise, _elementwise),
    (FixedSoftmax, _softmax),
    (ReduceSum, _reduce_sum),
    (FixedArgMax, _argmax),
    (Table, _table),
    ((FixedMaxPool, FixedAveragePool), _pool),
    (Movement, _movement),
)
