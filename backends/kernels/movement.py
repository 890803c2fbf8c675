"""Ops that only move elements: NumPy copies into the planned output; a reshape copies nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qir.backends.kernels.kernel import Call, Facts, Kernel, Tensor, dtype_of
from qir.ir import Op
from qir.ops.movement import FixedConcat, FixedGather, FixedPad, FixedReshape, FixedSlice, FixedTranspose


def reshape(op: Op, facts: Facts) -> Kernel | None:
    """The same memory under another shape."""
    assert isinstance(op, FixedReshape)
    if dtype_of(op.operands[0].type) != dtype_of(op.result.type):
        return None
    return Kernel("view", lambda inputs, output, scratch: lambda: None, is_view=True)


def transpose(op: Op, facts: Facts) -> Kernel | None:
    """A strided copy."""
    assert isinstance(op, FixedTranspose)
    perm = op.perm

    def bind(inputs: Sequence[Tensor], output: Tensor, scratch: Sequence[Tensor]) -> Call:
        source = inputs[0].transpose(perm)
        return lambda: np.copyto(output, source, casting="unsafe")

    return Kernel("transpose", bind)


def concat(op: Op, facts: Facts) -> Kernel | None:
    """Each operand copied to its place."""
    assert isinstance(op, FixedConcat)
    axis = op.axis % op.result.type.rank

    def bind(inputs: Sequence[Tensor], output: Tensor, scratch: Sequence[Tensor]) -> Call:
        ends = np.cumsum([x.shape[axis] for x in inputs])
        parts = [
            (output[(slice(None),) * axis + (slice(end - x.shape[axis], end),)], x)
            for x, end in zip(inputs, ends.tolist(), strict=True)
        ]

        def call() -> None:
            for part, x in parts:
                np.copyto(part, x, casting="unsafe")

        return call

    return Kernel("concat", bind)


def slice_(op: Op, facts: Facts) -> Kernel | None:
    """A strided copy."""
    assert isinstance(op, FixedSlice)
    index = [slice(None)] * op.operands[0].type.rank
    for start, end, axis, step in zip(op.starts, op.ends, op.axes, op.steps, strict=True):
        index[axis] = slice(start, None if end < 0 else end, step)
    place = tuple(index)

    def bind(inputs: Sequence[Tensor], output: Tensor, scratch: Sequence[Tensor]) -> Call:
        source = inputs[0][place]
        return lambda: np.copyto(output, source, casting="unsafe")

    return Kernel("slice", bind)


def gather(op: Op, facts: Facts) -> Kernel | None:
    """NumPy's take; the indices were verified, so that none is clipped."""
    assert isinstance(op, FixedGather)
    indices, axis = op.indices.data, op.axis
    if dtype_of(op.operands[0].type) != dtype_of(op.result.type):
        return None

    def bind(inputs: Sequence[Tensor], output: Tensor, scratch: Sequence[Tensor]) -> Call:
        x = inputs[0]

        def call() -> None:
            np.take(x, indices, axis=axis, out=output, mode="clip")

        return call

    return Kernel("gather", bind)


def pad(op: Op, facts: Facts) -> Kernel | None:
    """The value everywhere, then the operand in its place."""
    assert isinstance(op, FixedPad)
    rank, value = op.result.type.rank, op.value

    def bind(inputs: Sequence[Tensor], output: Tensor, scratch: Sequence[Tensor]) -> Call:
        x = inputs[0]
        inside = output[tuple(slice(op.pads[i], op.pads[i] + x.shape[i]) for i in range(rank))]

        def call() -> None:
            output.fill(value)
            np.copyto(inside, x, casting="unsafe")

        return call

    return Kernel("pad", bind)
