"""The float op classes of the language, in one tuple."""

from __future__ import annotations

from typing import Final

from qir.ops.float_elementwise import (
    Add,
    Cast,
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
from qir.ops.float_nn import BatchNormalization, Conv, MatMul
from qir.ops.float_pool import ArgMax, AveragePool, MaxPool, ReduceMean, Softmax

FLOAT_OPS: Final = (
    Conv,
    MatMul,
    BatchNormalization,
    Add,
    Sub,
    Mul,
    Div,
    Relu,
    Clip,
    LeakyRelu,
    PRelu,
    HardSwish,
    HardSigmoid,
    Sigmoid,
    Tanh,
    MaxPool,
    AveragePool,
    ReduceMean,
    Softmax,
    ArgMax,
    Cast,
)
