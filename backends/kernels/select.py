"""The table of kernels: which function chooses one for which op. Without one, the interpreter's function runs.

A backend's own kernels come first, for the ops that it has some for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from qir.backend import Backend
from qir.backends.kernels import elementwise, linear, movement, rescale
from qir.backends.kernels.kernel import Facts, Kernel, interpreted
from qir.errors import TargetError
from qir.ir import Graph, Op
from qir.ops.constant import Const
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


def own_kernels(graph: Graph, facts: Facts, backend: Backend | None) -> Mapping[Op, Kernel]:
    """The kernels that a backend has of its own for integer ops of the graph.

    Raises TargetError, which names the backend and the op, when its choice fails or is no kernel.
    """
    found: dict[Op, Kernel] = {}
    if backend is None or backend.kernels is None:
        return found
    for op in graph.ops:
        if isinstance(op, Const) or op.is_float:
            continue
        try:
            kernel = backend.kernels(op, facts)
        except Exception as fault:
            raise TargetError(f"backend {backend.name!r} failed to choose a kernel for {op.describe()}: {fault}") from (
                fault
            )
        if isinstance(kernel, Kernel):
            found[op] = kernel
        elif kernel is not None:
            raise TargetError(f"backend {backend.name!r} gave {kernel!r} for {op.describe()}, which is no Kernel")
    return found


def select(op: Op, facts: Facts) -> Kernel:
    """The kernel of an op: by its attributes, its types and what is proved, never by a backend's name."""
    choose = CHOICES.get(type(op))
    return (choose(op, facts) if choose is not None else None) or interpreted(op)


def select_fused(op: Op, following: Op, facts: Facts) -> Kernel | None:
    """One kernel for an op and the only reader of its result, or None where they run one after the other."""
    return linear.fused(op, following, facts) if isinstance(following, Requantize) else None
