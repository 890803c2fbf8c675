"""The legalization table: which rule lowers which float op. An op that is not here is an island, or an error."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from qir.ir import Op
from qir.ops.float_elementwise import (
    Add,
    Clip,
    Div,
    HardSigmoid,
    HardSwish,
    LeakyRelu,
    Mul,
    PRelu,
    Relu,
    Sigmoid,
    Sub,
    Tanh,
)
from qir.ops.float_nn import Conv, MatMul
from qir.ops.float_pool import ArgMax, AveragePool, MaxPool, ReduceMean, Softmax
from qir.ops.movement import Concat, Gather, Pad, Reshape, Slice, Transpose
from qir.passes.lowering import elementwise, linear, movement, tables
from qir.passes.lowering.context import Rule

RULES: Final[Mapping[type[Op], Rule]] = MappingProxyType(
    {
        Conv: linear.lower_conv,
        MatMul: linear.lower_matmul,
        ReduceMean: linear.lower_mean,
        Add: elementwise.lower_add,
        Sub: elementwise.lower_add,
        Mul: elementwise.lower_mul,
        Div: elementwise.lower_div,
        Relu: elementwise.lower_activation,
        Clip: elementwise.lower_activation,
        Sigmoid: tables.lower_function,
        Tanh: tables.lower_function,
        HardSwish: tables.lower_function,
        HardSigmoid: tables.lower_function,
        LeakyRelu: tables.lower_function,
        PRelu: tables.lower_function,
        Softmax: elementwise.lower_softmax,
        ArgMax: elementwise.lower_argmax,
        MaxPool: movement.lower_pool,
        AveragePool: movement.lower_pool,
        Reshape: movement.lower_reshape,
        Transpose: movement.lower_transpose,
        Concat: movement.lower_concat,
        Slice: movement.lower_slice,
        Gather: movement.lower_gather,
        Pad: movement.lower_pad,
    }
)
