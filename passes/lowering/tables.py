"""Functions of one operand as tables of their results: TensorFlow Lite's integer algorithms, or the real function.

HardSigmoid has no rule in TensorFlow Lite: its entries are those of the real function there too.
"""

from __future__ import annotations

import numpy as np

from qir.arrays import Array
from qir.fixed_point import RequantizeForm
from qir.integer_functions import (
    Multiplier,
    hard_swish,
    leaky_relu,
    logistic,
    prelu,
    prepare_hard_swish,
    prepare_leaky_relu,
    prepare_sigmoid,
    product_multiplier,
    rescale_multiplier,
    tanh,
)
from qir.integer_functions_16 import logistic_16, tanh_16
from qir.ir import Op, Value
from qir.ops.fixed_elementwise import Table
from qir.ops.fixed_rescale import quantize_reals
from qir.ops.float_elementwise import HardSigmoid, HardSwish, LeakyRelu, PRelu, Sigmoid, Tanh
from qir.passes.lowering.context import IntArray, Lowering, NoIntegerForm, scale_of
from qir.passes.select_q_formats import FIXED_FORMATS
from qir.target import FunctionRule
from qir.types import FixedPointType, QuantizedType, TensorType, affine, container_bounds, fixed_point, integer

_FORMS = (RequantizeForm.DOUBLE_ROUND, RequantizeForm.SINGLE_ROUND, RequantizeForm.NEON)
_OF_16_BITS = (LeakyRelu, Sigmoid, Tanh)


def lower_function(b: Lowering, op: Op) -> None:
    """A table with an entry for every value of the operand, or of an index that it is rounded to where it is wider."""
    rule, slopes = b.target.functions.rule, _slopes(b, op) if isinstance(op, PRelu) else None
    last = (slopes is not None and op.operands[0].type.rank > 2) or b.has(op.operands[0], True)
    value = b.read(op.operands[0], last)
    final = b.format_of(op.result)
    if rule is FunctionRule.TENSORFLOW_LITE and not isinstance(op, HardSigmoid):
        made, rows = _native(b, op, slopes)
    else:
        if rule is FunctionRule.REAL:
            value = _index(b, op, value)
        made, rows = final, _real(b, op, value, slopes)
    entries = np.clip(rows, made.storage.lo, made.storage.hi).astype(made.storage.dtype)
    array = Array(entries[0] if len(entries) == 1 else entries, f"{op.result.name}.table")
    table = b.constant(array, TensorType(array.shape, made.storage), name=f"{op.result.name}.table")
    name = b.claim(op.result) if made == final else f"{op.result.name}.native"
    result = b.emit(Table, [value, table], elements=[made], name=name, location=op.location)
    b.result_of(op, b.converted(result, final, name=b.claim(op.result), location=op.location), last)


def _slopes(b: Lowering, op: PRelu) -> Value:
    """The slope, checked to be one value or one a channel."""
    x, slope = op.operands
    if slope not in b.graph.constants:
        raise NoIntegerForm("its slope is not constant")
    if op.result.type.shape != x.type.shape:
        raise NoIntegerForm("its slope broadcasts the operand")
    channels = x.type.shape[1] if x.type.rank > 1 else 1
    shape = (1,) * (x.type.rank - slope.type.rank) + slope.type.shape
    if any(d != 1 for i, d in enumerate(shape) if i != 1):
        raise NoIntegerForm("its slope is not one value a channel")
    if slope.type.sample_size not in (1, channels):
        raise NoIntegerForm("its slope has not one value a channel")
    return slope


def _native(b: Lowering, op: Op, slope: Value | None) -> tuple[QuantizedType, IntArray]:
    """TensorFlow Lite's entries [rows, values], and the format that they are in."""
    x = op.operands[0]
    storage, zero, final = b.format_of(x).storage, b.zero(x), b.format_of(op.result)
    if storage.bits != 8 and not (storage.bits == 16 and isinstance(op, _OF_16_BITS)):
        raise NoIntegerForm(f"the target has no table for it of operands of {storage.bits} bits")
    lo, hi = container_bounds(storage.bits, storage.signed)
    q = np.arange(lo, hi + 1, dtype=np.int64)[None]
    rescale = b.target.requantization.of("rescale").form
    form = rescale if rescale in _FORMS else RequantizeForm.DOUBLE_ROUND
    input_scale, output_scale, output_zero = b.scale(x), b.scale(op.result), b.zero(op.result)
    if slope is not None:
        above = rescale_multiplier(input_scale, output_scale)
        below = product_multiplier(input_scale, b.scale(slope), output_scale)
        slopes = b.integers(slope).astype(np.int64).reshape(-1, 1)
        return final, prelu(q, zero, slopes, b.zero(slope), above, below, output_zero, form)
    match op:
        case Sigmoid() | Tanh() if storage.bits == 16:
            function = logistic_16 if isinstance(op, Sigmoid) else tanh_16
            return _fixed(op, 16), function(q - zero, input_scale)
        case Sigmoid():
            return _fixed(op, 8), logistic(q, zero, prepare_sigmoid(input_scale))
        case Tanh():
            return _fixed(op, 8), tanh(q, zero, prepare_sigmoid(input_scale))
        case HardSwish():
            return final, hard_swish(q, zero, prepare_hard_swish(input_scale, output_scale), output_zero)
        case LeakyRelu():
            factors: tuple[Multiplier, Multiplier] = prepare_leaky_relu(input_scale, op.alpha, output_scale)
            return final, leaky_relu(q, zero, *factors, output_zero, form)
        case _:
            raise NoIntegerForm("the target has no table for it")


def _fixed(op: Op, bits: int) -> QuantizedType:
    """The only format in which TensorFlow Lite's algorithm for an op gives its results."""
    return affine(integer(bits), *FIXED_FORMATS[type(op), bits])


def _index(b: Lowering, op: Op, value: Value) -> Value:
    """The operand itself, or rounded to as many bits as the table has an index of."""
    bits = b.target.functions.index_bits
    kind = b.format_of(op.operands[0])
    if kind.storage.bits <= bits:
        return value
    dropped, storage = kind.storage.bits - bits, integer(bits, kind.storage.signed)
    if isinstance(kind, FixedPointType):
        index: QuantizedType = fixed_point(storage, int(kind.exponent.data) + dropped)
    elif b.zero(op.operands[0]):
        raise NoIntegerForm(f"its operand has a zero point and more than the {bits} bits of a table's index")
    else:
        index = affine(storage, scale_of(kind) * np.float32(2.0**dropped))
    factor = b.factor("rescale", [scale_of(kind)], index)
    name = f"{op.result.name}.index"
    return b.rescaled(value, factor, index, name=name, location=op.location)


def _real(b: Lowering, op: Op, value: Value, slope: Value | None) -> IntArray:
    """The function of the reals that the operand's values stand for, in float32, rounded to the result's grid."""
    kind, functions = value.type.element, b.target.functions
    assert isinstance(kind, QuantizedType)
    lo, hi = container_bounds(kind.storage.bits, kind.storage.signed)
    zero = 0 if isinstance(kind, FixedPointType) else int(kind.zero_point.data)
    x = (np.arange(lo, hi + 1, dtype=np.int64)[None] - zero).astype(np.float32) * scale_of(kind)
    operands = [x]
    if slope is not None:
        operands.append(b.graph.constants[slope].data.astype(np.float32).reshape(-1, 1))
    with np.errstate(over="ignore"):
        found = op.eval_float(*operands)[0]  # type: ignore[attr-defined]
    rounded = quantize_reals(found.astype(np.float32) / b.scale(op.result), functions.rounding)
    return np.asarray(rounded + b.zero(op.result))
