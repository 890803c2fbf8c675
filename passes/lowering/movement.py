"""Pooling and data movement: integers keep their format, so operands are brought to the result's where it differs."""

from __future__ import annotations

import numpy as np

from qir.ir import Op, Value
from qir.ops.fixed_pool import FixedAveragePool, FixedMaxPool
from qir.ops.fixed_rescale import QuantizeRule, quantize_array
from qir.ops.float_pool import AveragePool, MaxPool
from qir.ops.movement import (
    Concat,
    FixedConcat,
    FixedGather,
    FixedPad,
    FixedSlice,
    Gather,
    Pad,
    Reshape,
    Slice,
    Transpose,
)
from qir.passes.lowering.context import (
    Lowering,
    NoIntegerForm,
    channels_first,
    channels_last,
    last_axis,
    spatial_rank_4,
)
from qir.target import AverageRule
from qir.types import IntegerType, is_quantized


def in_format(b: Lowering, op: Op, value: Value) -> Value:
    """`value` in the format of the op's result, with its own storage bounds; plain integers as they are."""
    if isinstance(op.result.type.element, IntegerType):
        return value
    element = value.type.element
    if not is_quantized(element) or not is_quantized(op.result.type.element):
        raise NoIntegerForm("its operand is not quantized")
    final = b.format_of(op.result)
    return b.converted(value, final, name=f"{op.result.name}.in", location=op.location)


def lower_pool(b: Lowering, op: Op) -> None:
    """Max and average pooling over channels-last maps; 1-d pooling has height 1."""
    assert isinstance(op, MaxPool | AveragePool)
    x = op.operands[0]
    if isinstance(op, AveragePool) and b.target.pooling.average is AverageRule.FLOAT32:
        b.island(op)
        return
    one_d = x.type.rank == 3
    if x.type.rank not in (3, 4):
        raise NoIntegerForm("pooling over more than two dimensions has no integer form")
    value = in_format(b, op, b.read(x, last=True))
    value = b.reshape(value, spatial_rank_4(value.type.shape))
    lead = (1,) if one_d else ()
    kernel, strides, dilations = ((*lead, *v) for v in (op.kernel, op.strides, op.dilations))
    pads = (0, op.pads[0], 0, op.pads[1]) if one_d else op.pads
    reach = _reach(op, pads, kernel, strides, dilations, value)
    if isinstance(op, MaxPool):
        result = b.emit(
            FixedMaxPool,
            [value],
            kernel=kernel,
            strides=strides,
            pads=reach,
            dilations=dilations,
            name=b.claim(op.result),
            location=op.location,
        )
    else:
        if op.count_include_pad and any(pads):
            if any(r > p for r, p in zip(reach, pads, strict=True)):
                raise NoIntegerForm("a window that ceil_mode lets reach beyond padding that counts has no integer form")
            value = b.emit(
                FixedPad,
                [value],
                elements=[b.format_of(op.result)],
                pads=(0, *reach[:2], 0, 0, *reach[2:], 0),
                value=b.zero(op.result),
                name=f"{op.result.name}.pad",
                location=op.location,
            )
            reach = (0, 0, 0, 0)
        result = b.emit(
            FixedAveragePool,
            [value],
            kernel=kernel,
            strides=strides,
            pads=reach,
            dilations=dilations,
            rounding=b.target.pooling.rounding,
            name=b.claim(op.result),
            location=op.location,
        )
    if one_d:
        result = b.reshape(result, (result.type.shape[0], *result.type.shape[2:]))
    b.result_of(op, result, last=True)


def _reach(
    op: MaxPool | AveragePool,
    pads: tuple[int, ...],
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    value: Value,
) -> tuple[int, ...]:
    """The pads; with ceil_mode the end is where the last window ends, be it within the stated pads or beyond."""
    if not op.ceil_mode:
        return pads
    spatial = (1, *op.result.type.shape[2:]) if op.result.type.rank == 3 else op.result.type.shape[2:]
    ends = []
    for axis in range(2):
        size, outputs = value.type.shape[1 + axis], spatial[axis]
        assert isinstance(size, int)
        assert isinstance(outputs, int)
        reach = (outputs - 1) * strides[axis] + (kernel[axis] - 1) * dilations[axis] + 1
        ends.append(max(0, reach - size - pads[axis]))
    return (*pads[:2], *ends)


def lower_reshape(b: Lowering, op: Op) -> None:
    """A reshape in ONNX's layout."""
    assert isinstance(op, Reshape)
    value = in_format(b, op, b.read(op.operands[0]))
    b.result_of(op, b.reshape(value, op.result.type.shape, name=b.claim(op.result)))


def lower_transpose(b: Lowering, op: Op) -> None:
    """A transpose, taken from channels last at once where only that is there."""
    assert isinstance(op, Transpose)
    x = op.operands[0]
    last = b.has(x, True) and not b.has(x, False)
    first = channels_first(x.type.rank) if last else tuple(range(x.type.rank))
    value = in_format(b, op, b.read(x, last))
    b.result_of(op, b.transpose(value, tuple(first[p] for p in op.perm), name=b.claim(op.result)))


def lower_concat(b: Lowering, op: Op) -> None:
    """Operands in the result's format, side by side; channels last where some operand is."""
    assert isinstance(op, Concat)
    rank = op.result.type.rank
    last = rank > 2 and any(b.has(v, True) for v in op.operands)
    axis = op.axis % rank
    operands = [in_format(b, op, b.read(v, last)) for v in op.operands]
    result = b.emit(
        FixedConcat,
        operands,
        elements=[op.result.type.element],
        axis=last_axis(axis, rank) if last else axis,
        name=b.claim(op.result),
        location=op.location,
    )
    b.result_of(op, result, last)


def lower_slice(b: Lowering, op: Op) -> None:
    """A slice in whichever layout is there."""
    assert isinstance(op, Slice)
    x, rank = op.operands[0], op.result.type.rank
    last = b.has(x, True)
    axes = tuple(last_axis(a % rank, rank) if last else a % rank for a in op.axes)
    result = b.emit(
        FixedSlice,
        [in_format(b, op, b.read(x, last))],
        starts=op.starts,
        ends=op.ends,
        axes=axes,
        steps=op.steps,
        name=b.claim(op.result),
        location=op.location,
    )
    b.result_of(op, result, last)


def lower_gather(b: Lowering, op: Op) -> None:
    """A gather; channels last only where the rank is kept."""
    assert isinstance(op, Gather)
    x, rank = op.operands[0], op.operands[0].type.rank
    last = b.has(x, True) and op.result.type.rank == rank
    axis = last_axis(op.axis % rank, rank) if last else op.axis % rank
    result = b.emit(
        FixedGather,
        [in_format(b, op, b.read(x, last))],
        indices=op.indices,
        axis=axis,
        name=b.claim(op.result),
        location=op.location,
    )
    b.result_of(op, result, last)


def lower_pad(b: Lowering, op: Op) -> None:
    """Padding with the integer that stands for the value, saturated."""
    assert isinstance(op, Pad)
    x, rank = op.operands[0], op.result.type.rank
    last = b.has(x, True)
    element = b.format_of(op.result)
    value = int(quantize_array(np.asarray(op.value, np.float32), element, QuantizeRule.DIVIDE, b.target.input.rounding))
    order = channels_last(rank) if last else tuple(range(rank))
    pads = (*(op.pads[i] for i in order), *(op.pads[rank + i] for i in order))
    result = b.emit(
        FixedPad,
        [in_format(b, op, b.read(x, last))],
        elements=[element],
        pads=pads,
        value=value,
        name=b.claim(op.result),
        location=op.location,
    )
    b.result_of(op, result, last)
