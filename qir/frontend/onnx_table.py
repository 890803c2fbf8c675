"""Which ONNX operator is lowered by which function; what is not listed is refused, unless it folds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from qir.frontend import onnx_lower_math as math_ops
from qir.frontend import onnx_lower_movement as movement
from qir.frontend import onnx_lower_nn as nn
from qir.frontend.onnx_context import Known, Node
from qir.ops.float_elementwise import Add, Div, HardSwish, Mul, Relu, Sigmoid, Sub, Tanh

Lowering = Callable[[Node], Known | tuple[Known | None, ...]]

LOWERINGS: Final[Mapping[str, Lowering]] = MappingProxyType(
    {
        "Add": math_ops.plain_op(Add, 2),
        "ArgMax": math_ops.lower_arg_max,
        "AveragePool": nn.lower_average_pool,
        "BatchNormalization": nn.lower_batch_normalization,
        "Cast": math_ops.lower_cast,
        "Clip": math_ops.lower_clip,
        "Concat": movement.lower_concat,
        "Constant": math_ops.lower_constant,
        "Conv": nn.lower_conv,
        "Div": math_ops.plain_op(Div, 2),
        "Dropout": math_ops.lower_dropout,
        "Flatten": movement.lower_flatten,
        "Gather": movement.lower_gather,
        "Gemm": nn.lower_gemm,
        "GlobalAveragePool": nn.lower_global_average_pool,
        "GlobalMaxPool": nn.lower_global_max_pool,
        "HardSigmoid": math_ops.lower_hard_sigmoid,
        "HardSwish": math_ops.plain_op(HardSwish, 1),
        "Identity": movement.lower_identity,
        "LeakyRelu": math_ops.lower_leaky_relu,
        "MatMul": nn.lower_matmul,
        "MaxPool": nn.lower_max_pool,
        "Mul": math_ops.plain_op(Mul, 2),
        "PRelu": math_ops.lower_prelu,
        "Pad": movement.lower_pad,
        "ReduceMean": nn.lower_reduce_mean,
        "Relu": math_ops.plain_op(Relu, 1),
        "Reshape": movement.lower_reshape,
        "Shape": movement.lower_shape,
        "Sigmoid": math_ops.plain_op(Sigmoid, 1),
        "Size": movement.lower_size,
        "Slice": movement.lower_slice,
        "Softmax": math_ops.lower_softmax,
        "Split": movement.lower_split,
        "Squeeze": movement.lower_squeeze,
        "Sub": math_ops.plain_op(Sub, 2),
        "Sum": math_ops.lower_sum,
        "Tanh": math_ops.plain_op(Tanh, 1),
        "Transpose": movement.lower_transpose,
        "Unsqueeze": movement.lower_unsqueeze,
    }
)
