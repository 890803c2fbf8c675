"""Elementwise ops, softmax and argmax, each by the rule that the contract has for its kind.

Div has none in any runtime: its rule is qir's own, said in its docstring.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qir.fixed_point import Overflow, Rounding, floor_log2, quantize_multiplier
from qir.integer_functions import SOFTMAX_ROW_LIMIT, prepare_add, prepare_softmax
from qir.ir import Op, Value
from qir.ops.fixed_elementwise import FixedAdd, FixedArgMax, FixedDiv, FixedMul, FixedSub
from qir.ops.fixed_pool import FixedSoftmax
from qir.ops.float_base import Clipped
from qir.ops.float_elementwise import Activation, Add, Div, Sub
from qir.ops.float_pool import ArgMax, Softmax
from qir.passes.lowering.context import Lowering, NoIntegerForm, last_axis
from qir.passes.lowering.factors import Factor
from qir.passes.select_q_formats import FIXED_FORMATS
from qir.target import FORMS_OF_32_BITS, FunctionRule, ProductRule, SumRule
from qir.types import S8, S32, IntegerType, affine, integer

#: The operand scales, in units of the result's, between which XNNPACK adds.
_RATIOS = (2.0**-10, 2.0**8)


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
    """Add and Sub, by the contract's rule for sums."""
    assert isinstance(op, Add | Sub)
    for value in (*op.operands, op.result):
        b.format_of(value)
    match b.target.addition.rule:
        case SumRule.FLOAT32:
            b.island(op)
        case SumRule.COMMON_SCALE:
            _add_on_common_scale(b, op)
        case SumRule.BINARY_POINT:
            _add_on_binary_point(b, op)
        case SumRule.MULTIPLIERS:
            _add_with_multipliers(b, op)


def _add_on_common_scale(b: Lowering, op: Add | Sub) -> None:
    """Both operands at twice the larger scale and a left shift, their sum requantized: TensorFlow Lite."""
    left_shift = b.target.addition.left_shift
    if any(b.format_of(v).storage.bits + left_shift > 31 for v in op.operands):
        raise NoIntegerForm(f"operands at a left shift of {left_shift} must fit 32 bits")
    scales = [b.scale(v) for v in op.operands]
    parameters = prepare_add(scales[0], scales[1], b.scale(op.result), left_shift)
    operands, last = both_operands(b, op)
    common = [
        b.requantize(
            value,
            Factor.of(factor),
            S32,
            kind="add",
            name=f"{op.result.name}.{side}",
            location=op.location,
            input_shift=left_shift,
        )
        for value, factor, side in zip(operands, parameters[:2], ("a", "b"), strict=True)
    ]
    _finish(b, op, _sum(b, op, common, S32), Factor.of(parameters.output), last, kind="add")


def _add_on_binary_point(b: Lowering, op: Add | Sub) -> None:
    """Both operands at the finer binary point, their exact sum rescaled: Q formats.

    In 32 bits, or in 64 where the target's own width is free. Where points lie so far apart that the coarser operand
    would leave them, the finer one is rounded.
    """
    exponents = [int(floor_log2(b.scale(v))) for v in op.operands]
    widest = max(b.format_of(v).storage.bits for v in op.operands) + 1  # a bit is for the sum
    fits = widest + max(exponents) - min(exponents) <= S32.bits
    kind = S32 if fits or isinstance(b.target.accumulator.bits, int) else integer(64)
    room = kind.bits - widest
    point = max(min(exponents), max(exponents) - room)
    operands, last = both_operands(b, op)
    aligned = [
        b.shifted(value, exponent - point, kind, name=f"{op.result.name}.{side}", location=op.location)
        for value, exponent, side in zip(operands, exponents, ("a", "b"), strict=True)
    ]
    factor = b.factor("add", [np.ldexp(np.float32(1), point)], b.format_of(op.result))
    _finish(b, op, _sum(b, op, aligned, kind), factor, last, kind="add")


def _add_with_multipliers(b: Lowering, op: Add | Sub) -> None:
    """Both operands times integer multipliers of a common shift, their sum shifted right, ties up: XNNPACK."""
    ratios = [float(b.scale(v)) / float(b.scale(op.result)) for v in op.operands]
    if not all(_RATIOS[0] <= ratio < _RATIOS[1] for ratio in ratios):
        raise NoIntegerForm("its operands' scales must be 2^-10 to 2^8 times the result's")
    if any(_centred_bits(b, v) > 9 for v in op.operands):
        raise NoIntegerForm("times multipliers of 21 bits, operands of more than 8 do not fit 32")
    multipliers, shift = sum_multipliers([b.scale(v) for v in op.operands], b.scale(op.result))
    operands, last = both_operands(b, op)
    terms = []
    for value, multiplier, side in zip(operands, multipliers, ("a", "b"), strict=True):
        name = f"{op.result.name}.{side}"
        constant = b.number(multiplier, S32, name=f"{name}.multiplier")
        terms.append(
            b.emit(
                FixedMul,
                [value, constant],
                elements=[S32],
                overflow=Overflow.WRAP,
                name=name,
                location=op.location,
            )
        )
    total = _sum(b, op, terms, S32, Overflow.WRAP)
    element = b.clipped(op.result, op.clip)
    result = b.shifted(total, -shift, element, name=b.claim(op.result), location=op.location, rounding=Rounding.HALF_UP)
    b.result_of(op, result, last)


def sum_multipliers(scales: Sequence[np.float32], output: np.float32) -> tuple[list[int], int]:
    """XNNPACK's multipliers of at most 21 bits and their shift, from the float32 ratios of scales to the output's."""
    ratios = [np.float32(s / output) for s in scales]
    shift = 20 - int(floor_log2(max(ratios)))
    return [int(np.rint(np.ldexp(np.float64(r), shift))) for r in ratios], shift


def _sum(
    b: Lowering, op: Add | Sub, terms: list[Value], kind: IntegerType, overflow: Overflow = Overflow.SATURATE
) -> Value:
    return b.emit(
        FixedAdd if isinstance(op, Add) else FixedSub,
        terms,
        elements=[kind],
        overflow=overflow,
        name=f"{op.result.name}.acc",
        location=op.location,
    )


def lower_mul(b: Lowering, op: Op) -> None:
    """The product of the centred operands, requantized, or a product in float32."""
    if b.target.multiplication.rule is ProductRule.FLOAT32:
        b.island(op)
        return
    scales = [b.scale(v) for v in op.operands]
    bits = sum(_centred_bits(b, v) for v in op.operands)
    form = b.target.requantization.of("mul").form
    if bits > S32.bits and form in FORMS_OF_32_BITS:
        raise NoIntegerForm(f"its products take {bits} bits, and {form} takes 32")
    operands, last = both_operands(b, op)
    total = b.emit(
        FixedMul,
        operands,
        elements=[S32 if bits <= S32.bits else integer(64)],
        overflow=Overflow.SATURATE,
        name=f"{op.result.name}.acc",
        location=op.location,
    )
    _finish(b, op, total, b.factor("mul", scales, b.format_of(op.result)), last, kind="mul")


def _centred_bits(b: Lowering, value: Value) -> int:
    """Bits that hold the integers of a value less its zero point."""
    storage, zero = b.format_of(value).storage, b.zero(value)
    return max(~(storage.lo - zero), storage.hi - zero).bit_length() + 1


def _finish(b: Lowering, op: Op, total: Value, factor: Factor, last: bool, *, kind: str) -> None:
    element = b.clipped(op.result, op.clip if isinstance(op, Clipped) else None)
    name = b.claim(op.result)
    b.result_of(op, b.requantize(total, factor, element, kind=kind, name=name, location=op.location), last)


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
    factor, name = b.factor("rescale", [b.scale(x)], element), b.claim(op.result)
    result = b.requantize(b.read(x, last), factor, element, kind="rescale", name=name, location=op.location)
    b.result_of(op, result, last)


def lower_softmax(b: Lowering, op: Op) -> None:
    """TensorFlow Lite's integer softmax over the last axis; another axis is brought there and back."""
    assert isinstance(op, Softmax)
    x = op.operands[0]
    rank, axis = x.type.rank, op.axis % x.type.rank
    if b.target.functions.rule is not FunctionRule.TENSORFLOW_LITE:
        raise NoIntegerForm("the target has no integer softmax")
    parameters = prepare_softmax(b.scale(x))
    if b.format_of(x).storage != S8:
        raise NoIntegerForm("integer softmax is defined for 8 signed bits")
    if int(x.type.shape[axis]) >= SOFTMAX_ROW_LIMIT:
        raise NoIntegerForm(f"integer softmax takes rows of fewer than {SOFTMAX_ROW_LIMIT} elements")
    made, final = affine(S8, *FIXED_FORMATS[Softmax, S8.bits]), b.format_of(op.result)
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
