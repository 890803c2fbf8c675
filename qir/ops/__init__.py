"""The ops of the language: one class each, listed here and nowhere else."""

from __future__ import annotations

from typing import Final

from qir.ir import Op
from qir.ops.constant import Const
from qir.ops.dequantize_blocks import DequantizeBlocks
from qir.ops.fixed_elementwise import FixedAdd, FixedArgMax, FixedDiv, FixedMul, FixedSub, Table
from qir.ops.fixed_linear import Conv2d, FixedMatMul, ReduceSum
from qir.ops.fixed_pool import FixedAveragePool, FixedMaxPool, FixedSoftmax
from qir.ops.fixed_rescale import Dequantize, Quantize, Requantize
from qir.ops.float_ops import FLOAT_OPS
from qir.ops.movement import (
    Concat,
    FixedConcat,
    FixedGather,
    FixedPad,
    FixedReshape,
    FixedSlice,
    FixedTranspose,
    Gather,
    Pad,
    Reshape,
    Slice,
    Transpose,
)

FIXED_OPS: Final[tuple[type[Op], ...]] = (
    Conv2d,
    FixedMatMul,
    ReduceSum,
    Requantize,
    Quantize,
    Dequantize,
    DequantizeBlocks,
    FixedAdd,
    FixedSub,
    FixedMul,
    FixedDiv,
    Table,
    FixedSoftmax,
    FixedArgMax,
    FixedMaxPool,
    FixedAveragePool,
    FixedReshape,
    FixedTranspose,
    FixedConcat,
    FixedSlice,
    FixedGather,
    FixedPad,
)

OPS: Final[tuple[type[Op], ...]] = (
    Const,
    Reshape,
    Transpose,
    Concat,
    Slice,
    Gather,
    Pad,
    *FLOAT_OPS,
    *FIXED_OPS,
)
