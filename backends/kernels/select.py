"""The table of kernels: which function chooses one for which op. Without one, the interpreter's function runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from qir.backends.kernels import elementwise, linear, movement, rescale
from qir.backends.kernels.kernel import Facts, Kernel, interpreted
from qir.ir import Op
from qir.ops.dequantize_blocks import DequantizeBlocks
from qir.ops.fixed_elementwise import FixedAdd, FixedArgMax, FixedDiv, FixedMul, FixedSub, Table
from qir.ops.fixed_linear import Conv2d, FixedMatMul, ReduceSum
from qir.ops.fixed_pool import FixedAveragePool, FixedMaxPool, FixedSoftmax
from qir.ops.fixed_rescale import Dequantize, Quantize, Requantize
from qir.ops.movement import FixedConcat, FixedGather, FixedPad, FixedReshape, FixedSlice, FixedTranspose

CHOICES: Final[Mapping[type[Op], Callable[[Op, Facts], Kernel | None]]] = MappingProxyType(
    {
        Conv2d: linear.linear,
        FixedMatMul: linear.linear,
        ReduceSum: linear.linear,
        Requantize: rescale.requantize,
        Quantize: rescale.quantize,
        Dequantize: rescale.dequantize,
        DequantizeBlocks: rescale.dequantize_blocks,
        FixedAdd: elementwise.arithmetic,
        FixedSub: elementwise.arithmetic,
        FixedMul: elementwise.arithmetic,
        FixedDiv: elementwise.arithmetic,
        Table: elementwise.table,
        FixedSoftmax: elementwise.softmax,
        FixedArgMax: elementwise.argmax,
        FixedMaxPool: elementwise.max_pool,
        FixedAveragePool: elementwise.average_pool,
        FixedReshape: movement.reshape,
        FixedTranspose: movement.transpose,
        FixedConcat: movement.concat,
        FixedSlice: movement.slice_,
        FixedGather: movement.gather,
        FixedPad: movement.pad,
    }
)


def select(op: Op, facts: Facts) -> Kernel:
    """The kernel of an op: by its attributes, its types and what is proved, never by a backend's name."""
    choose = CHOICES.get(type(op))
    return (choose(op, facts) if choose is not None else None) or interpreted(op)


def select_fused(op: Op, following: Op, facts: Facts) -> Kernel | None:
    """One kernel for an op and the only reader of its result, or None where they run one after the other."""
    return linear.fused(op, following, facts) if isinstance(following, Requantize) else None
