"""Elementwise ops, activations, softmax and argmax, as TensorFlow Lite computes them where it has a rule.

HardSigmoid and Div have none there: theirs are qir's own, said in their docstrings. A function of one 8-bit operand is
a table of its 256 results, whatever algorithm makes the entries.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qir.arrays import Array
from qir.fixed_point import Overflow, quantize_multiplier, round_half_away
from qir.integer_functions import (
    ADD_LEFT_SHIFT,
    SOFTMAX_ROW_LIMIT,
    Multiplier,
    hard_swish,
    leaky_relu,
    logistic,
    prelu,
    prepare_add,
    prepare_hard_swish,
    prepare_leaky_relu,
    prepare_sigmoid,
    prepare_softmax,
    product_multiplier,
    rescale_multiplier,
    tanh,
)
from qir.ir import Op, Value
from qir.ops.fixed_elementwise import FixedAdd, FixedArgMax, FixedDiv, FixedMul, FixedSub, Table
from qir.ops.fixed_pool import FixedSoftmax
from qir.ops.float_base import Clipped
from qir.ops.float_elementwise import Activation, Add, Div, HardSigmoid, LeakyRelu, PRelu, Sub
from qir.ops.float_pool import ArgMax, Softmax
from qir.passes.lowering.context import IntArray, Lowering, NoIntegerForm, last_axis
from qir.types import S8, AffineType, TensorType, affine, integer

Entries = Callable[[IntArray], IntArray]


def both_operands(b: Lowering, op: Op) -> tuple[list[Value], bool]:
    """The operands of an elementwise op in one layout, with leading 1s where a rank is lower; whether channels last."""
    rank = op.result.type.rank
    full = [v for v in op.operands if v.type.rank == rank and v not in b.graph.constants]
    last = rank > 2 and any(b.has(v, True) for v in full)
    operands = []
    for old in op.operands:
        if old in b.graph.constants:
            operands.append(b.constant_operand(old, last=last, rank=rank))
        elif old.type.rank == rank:
            operands.append(b.read(old, last=last))
        else:
            value = b.reshape(b.read(old), (1,) * (rank - old.type.rank) + old.type.shape)
            operands.append(b.channels_last(value) if last else value)
    return operands, last


def lower_add(b: Lowering, op: Op) -> None:
    """Add and Sub: both operands to a common scale at left shift 20, their sum requantized."""
    assert isinstance(op, Add | Sub)
    if any(b.affine_of(v).storage.bits > 8 for v in op.operands):
        raise NoIntegerForm("the sum on a common scale is defined for operands of at most 8 bits")
    scales = [b.scale(v) for v in op.operands]
    parameters = prepare_add(scales[0], scales[1], b.scale(op.result))
    operands, last = both_operands(b, op)
    name = op.result.name
    common = [
        b.requantize(
            value, factor, integer(32), name=f"{name}.{side}", location=op.location, input_shift=ADD_LEFT_SHIFT
        )
        for value, factor, side in zip(operands, parameters[:2], ("a", "b"), strict=True)
    ]
    total = b.emit(
        FixedAdd if isinstance(op, Add) else FixedSub,
        common,
        elements=[integer(32)],
        overflow=Overflow.SATURATE,
        name=f"{name}.acc",
        location=op.location,
    )
    _finish(b, op, total, parameters.output, last)


def lower_mul(b: Lowering, op: Op) -> None:
    """The product of the centred operands, requantized."""
    scales = [b.scale(v) for v in op.operands]
    operands, last = both_operands(b, op)
    total = b.emit(
        FixedMul,
        operands,
        elements=[integer(32)],
        overflow=Overflow.SATURATE,
        name=f"{op.result.name}.acc",
        location=op.location,
    )
    _finish(b, op, total, product_multiplier(scales[0], scales[1], b.scale(op.result)), last)


def _finish(b: Lowering, op: Op, total: Value, factor: Multiplier, last: bool) -> None:
    clip = op.clip if isinstance(op, Clipped) else None
    element = b.clipped(op.result, clip)
    b.result_of(op, b.requantize(total, factor, element, name=b.claim(op.result), location=op.location), last)


def lower_div(b: Lowering, op: Op) -> None:
    """Qir's own rule (see `div`): one rounding, ties away from zero, of the quotient times `sa / (sb * so)`."""
    assert isinstance(op, Div)
    first, second, output = (float(b.scale(v)) for v in (*op.operands, op.result))
    multiplier, shift = quantize_multiplier(first / (second * output))
    operands, last = both_operands(b, op)
    result = b.emit(
        FixedDiv,
        operands,
        elements=[b.clipped(op.result, op.clip)],
        overflow=Overflow.SATURATE,
        multiplier=multiplier,
        shift=shift,
        name=b.claim(op.result),
        location=op.location,
    )
    b.result_of(op, result, last)


def lower_activation(b: Lowering, op: Op) -> None:
    """Relu and Clip that stand alone: a requantize to narrower storage bounds."""
    assert isinstance(op, Activation)
    x = op.operands[0]
    last = b.has(x, True)
    element = b.clipped(op.result, op.activation)
    factor = rescale_multiplier(b.scale(x), b.scale(op.result))
    result = b.requantize(b.read(x, last), factor, element, name=b.claim(op.result), location=op.location)
    b.result_of(op, result, last)


def _table(b: Lowering, op: Op, entries: Entries, element: AffineType | None = None) -> None:
    """A table whose entries are a function of every operand value, saturated to the result's storage."""
    x = op.operands[0]
    storage, made = b.affine_of(x).storage, element or b.affine_of(op.result)
    if storage.bits != 8:
        raise NoIntegerForm(
            f"its operand has {storage.bits} bits, and tables of 8-bit operands are what the target has"
        )
    lo = -128 if storage.signed else 0
    values = np.clip(entries(np.arange(lo, lo + 256, dtype=np.int64)), made.storage.lo, made.storage.hi)
    array = Array(values.astype(made.storage.dtype), f"{op.result.name}.table")
    table = b.constant(array, TensorType(array.shape, made.storage), name=f"{op.result.name}.table")
    last = b.has(x, True)
    final = b.affine_of(op.result)
    name = b.claim(op.result) if made == final else f"{op.result.name}.native"
    result = b.emit(Table, [b.read(x, last), table], elements=[made], name=name, location=op.location)
    result = b.converted(result, final, name=b.claim(op.result), location=op.location)
    b.result_of(op, result, last)


def lower_sigmoid(b: Lowering, op: Op) -> None:
    """TensorFlow Lite's integer logistic, at scale 1/256 and zero point -128."""
    x = op.operands[0]
    parameters = prepare_sigmoid(b.scale(x))
    _table(b, op, lambda q: logistic(q, b.zero(x), parameters), affine(S8, 1 / 256, -128))


def lower_tanh(b: Lowering, op: Op) -> None:
    """TensorFlow Lite's integer tanh, at scale 1/128 and zero point 0."""
    x = op.operands[0]
    parameters = prepare_sigmoid(b.scale(x))
    _table(b, op, lambda q: tanh(q, b.zero(x), parameters), affine(S8, 1 / 128, 0))


def lower_hard_swish(b: Lowering, op: Op) -> None:
    """TensorFlow Lite's 16-bit hard swish."""
    x = op.operands[0]
    parameters = prepare_hard_swish(b.scale(x), b.scale(op.result))
    _table(b, op, lambda q: hard_swish(q, b.zero(x), parameters, b.zero(op.result)))


def lower_leaky_relu(b: Lowering, op: Op) -> None:
    """TensorFlow Lite's two factors."""
    assert isinstance(op, LeakyRelu)
    x = op.operands[0]
    above, below = prepare_leaky_relu(b.scale(x), op.alpha, b.scale(op.result))
    _table(b, op, lambda q: leaky_relu(q, b.zero(x), above, below, b.zero(op.result)))


def lower_hard_sigmoid(b: Lowering, op: Op) -> None:
    """Qir's own rule: each entry is the function in float64 divided by the output scale, ties away from zero."""
    assert isinstance(op, HardSigmoid)
    x = op.operands[0]
    scale, output = float(b.scale(x)), float(b.scale(op.result))

    def entries(q: IntArray) -> IntArray:
        real = np.clip(op.alpha * ((q - b.zero(x)) * scale) + op.beta, 0.0, 1.0)
        return np.asarray(round_half_away(real / output) + b.zero(op.result))

    _table(b, op, entries)


def lower_prelu(b: Lowering, op: Op) -> None:
    """TensorFlow Lite's PRelu with a quantized slope, as one table a channel."""
    assert isinstance(op, PRelu)
    x, slope = op.operands
    if slope not in b.graph.constants:
        raise NoIntegerForm("its slope is not constant")
    if op.result.type.shape != x.type.shape:
        raise NoIntegerForm("its slope broadcasts the operand")
    channels = x.type.shape[1] if x.type.rank > 1 else 1
    shape = (1,) * (x.type.rank - slope.type.rank) + slope.type.shape
    if any(d != 1 for i, d in enumerate(shape) if i != 1) or b.affine_of(x).storage.bits != 8:
        raise NoIntegerForm("its slope is not one value a channel of an 8-bit operand")
    above = rescale_multiplier(b.scale(x), b.scale(op.result))
    below = product_multiplier(b.scale(x), b.scale(slope), b.scale(op.result))
    element, storage = b.affine_of(op.result), b.affine_of(x).storage
    lo = -128 if storage.signed else 0
    rows = b.integers(slope).astype(np.int64).reshape(-1, 1)
    q = np.arange(lo, lo + 256, dtype=np.int64)[None, :]
    values = prelu(q, b.zero(x), rows, b.zero(slope), above, below, b.zero(op.result))
    values = np.clip(values, element.storage.lo, element.storage.hi).astype(element.storage.dtype)
    if rows.shape[0] == 1:
        values = values[0]
    elif rows.shape[0] != channels:
        raise NoIntegerForm("its slope has not one value a channel")
    array = Array(values, f"{op.result.name}.table")
    table = b.constant(array, TensorType(array.shape, element.storage), name=f"{op.result.name}.table")
    last = x.type.rank > 2
    result = b.emit(Table, [b.read(x, last), table], elements=[element], name=b.claim(op.result), location=op.location)
    b.result_of(op, result, last)


def lower_softmax(b: Lowering, op: Op) -> None:
    """TensorFlow Lite's integer softmax over the last axis; another axis is brought there and back."""
    assert isinstance(op, Softmax)
    x = op.operands[0]
    rank, axis = x.type.rank, op.axis % x.type.rank
    parameters = prepare_softmax(b.scale(x))
    if b.affine_of(x).storage != S8:
        raise NoIntegerForm("integer softmax is defined for 8 signed bits")
    if int(x.type.shape[axis]) >= SOFTMAX_ROW_LIMIT:
        raise NoIntegerForm(f"integer softmax takes rows of fewer than {SOFTMAX_ROW_LIMIT} elements")
    made, final = affine(S8, 1 / 256, -128), b.affine_of(op.result)
    last = rank > 2 and axis == 1  # the channels, which stand last of themselves
    moves = axis != rank - 1 and not last
    to_end = (*(i for i in range(rank) if i != axis), axis)
    value = b.read(x, last)
    value = b.emit(
        FixedSoftmax,
        [b.transpose(value, to_end) if moves else value],
        elements=[made],
        multiplier=parameters.multiplier,
        left_shift=parameters.left_shift,
        diff_min=parameters.diff_min,
        name=f"{op.result.name}.native" if moves or made != final else b.claim(op.result),
        location=op.location,
    )
    name = f"{op.result.name}.rows" if moves else b.claim(op.result)
    value = b.converted(value, final, name=name, location=op.location)
    if moves:
        value = b.transpose(value, tuple(to_end.index(i) for i in range(rank)), name=b.claim(op.result))
    b.result_of(op, value, last)


def lower_argmax(b: Lowering, op: Op) -> None:
    """The index of the greatest integer: the same as that of the greatest real."""
    assert isinstance(op, ArgMax)
    x = op.operands[0]
    rank, axis = x.type.rank, op.axis % x.type.rank
    last = b.has(x, True)
    result = b.emit(
        FixedArgMax,
        [b.read(x, last)],
        elements=[op.result.type.element],
        axis=last_axis(axis, rank) if last else axis,
        keepdims=op.keepdims,
        select_last_index=op.select_last_index,
        name=b.claim(op.result),
        location=op.location,
    )
    b.result_of(op, result, last and (op.keepdims or axis != 1))  # without its channels, a map is in ONNX's layout
