"""Convolution, matrix product and mean, as TensorFlow Lite computes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qir.arrays import Array
from qir.integer_functions import mean_multiplier, product_multiplier
from qir.ir import Op, Value
from qir.ops.fixed_linear import Conv2d, FixedMatMul, ReduceSum
from qir.ops.float_nn import Conv, MatMul
from qir.ops.float_pool import ReduceMean
from qir.passes.lowering.context import Lowering, NoIntegerForm, last_axis, spatial_rank_4
from qir.types import AffineType, TensorType

Scales = npt.NDArray[Any]


def lower_conv(b: Lowering, op: Op) -> None:
    """conv2d into the accumulator, then requantize per output channel. A 1-d convolution has height 1."""
    assert isinstance(op, Conv)
    x, weight = op.operands[0], op.operands[1]
    if weight not in b.graph.constants:
        raise NoIntegerForm("its weights are not constant")
    b.affine_of(x)
    one_d = x.type.rank == 3
    lead = (1,) if one_d else ()
    pads = (0, op.pads[0], 0, op.pads[1]) if one_d else op.pads
    value = b.read(x, last=True)
    value = b.reshape(value, spatial_rank_4(value.type.shape))
    scales = _weight_scales(weight, 0)
    operands = [value, _conv_weight(b, weight), *_bias(b, op, scales)]
    total = b.emit(
        Conv2d,
        operands,
        pads=pads,
        strides=(*lead, *op.strides),
        dilations=(*lead, *op.dilations),
        groups=op.groups,
        name=f"{op.result.name}.acc",
        location=op.location,
        **b.accumulation,
    )
    per_channel = np.broadcast_to(scales, (int(weight.type.shape[0]),))
    factors = [product_multiplier(b.scale(x), s, b.scale(op.result)) for s in per_channel]
    result = b.requantize(total, factors, b.clipped(op.result, op.clip), name=b.claim(op.result), location=op.location)
    if one_d:
        shape = result.type.shape
        result = b.reshape(result, (shape[0], *shape[2:]))
    b.result_of(op, result, last=True)


def _conv_weight(b: Lowering, weight: Value) -> Value:
    """Weights [O, C / groups, kh, kw] as integers [O, kh, kw, C / groups]."""
    integers = b.integers(weight)
    if integers.ndim == 3:
        integers = integers[:, :, None, :]
    array = Array(np.ascontiguousarray(integers.transpose(0, 2, 3, 1)), b.graph.constants[weight].name)
    return b.constant(array, TensorType(array.shape, weight.type.element), name=b.claim(weight))


def _weight_scales(weight: Value, axis: int) -> Scales:
    """The scales of weights: one, or one for each index of `axis`. Raises NoIntegerForm for any other type."""
    element = weight.type.element
    if not isinstance(element, AffineType) or element.axis not in (None, axis % weight.type.rank):
        raise NoIntegerForm(f"%{weight.name} is not quantized per tensor or along axis {axis % weight.type.rank}")
    return element.scale.data


def _bias(b: Lowering, op: Op, scales: Scales) -> list[Value]:
    """The bias in the accumulator's plain integers. Raises NoIntegerForm unless it is at the products' scale."""
    bias = op.optional_operand(2)
    if bias is None:
        return []
    if bias not in b.graph.constants:
        raise NoIntegerForm("its bias is not constant")
    element = bias.type.element
    products = (np.float64(b.scale(op.operands[0])) * scales.astype(np.float64)).astype(np.float32)
    if not isinstance(element, AffineType) or element.has_zero_point or np.any(element.scale.data != products):
        raise NoIntegerForm(f"%{bias.name} is not at the scale of the input times that of the weights")
    array = Array(b.integers(bias).astype(b.accumulator.dtype), b.graph.constants[bias].name)
    return [b.constant(array, TensorType(array.shape, b.accumulator), name=b.claim(bias))]


def lower_matmul(b: Lowering, op: Op) -> None:
    """Matmul into the accumulator, then requantize. Constant right operands are weights."""
    assert isinstance(op, MatMul)
    left, right = op.operands[0], op.operands[1]
    b.affine_of(left)
    scales = _weight_scales(right, -1)
    if right in b.graph.constants:
        array = Array(np.ascontiguousarray(b.integers(right)), b.graph.constants[right].name)
        second = b.constant(array, right.type, name=b.claim(right))
    else:
        second = b.read(right)
    total = b.emit(
        FixedMatMul,
        [b.read(left), second, *_bias(b, op, scales)],
        name=f"{op.result.name}.acc",
        location=op.location,
        **b.accumulation,
    )
    pairs = [product_multiplier(b.scale(left), s, b.scale(op.result)) for s in np.atleast_1d(scales)]
    factors = pairs if scales.ndim else pairs[0]
    result = b.requantize(total, factors, b.clipped(op.result, op.clip), name=b.claim(op.result), location=op.location)
    b.result_of(op, result)


def lower_mean(b: Lowering, op: Op) -> None:
    """reduce_sum, then a requantize whose multiplier is divided by the count."""
    assert isinstance(op, ReduceMean)
    x = op.operands[0]
    rank = x.type.rank
    last = op.keepdims and rank > 2 and b.has(x, True)
    axes = tuple(a % rank for a in op.axes)
    if not last and rank > 2 and b.has(x, True) and not op.keepdims and set(axes) == set(range(2, rank)):
        last = True  # spatial mean of channels-last data gives (N, C) in either layout
    value = b.read(x, last=last)
    if last:
        axes = tuple(last_axis(a, rank) for a in axes)
    count = int(np.prod([int(value.type.shape[a]) for a in axes], dtype=np.int64))
    if count == 0:
        raise NoIntegerForm("the mean of no elements is not defined")
    total = b.emit(
        ReduceSum,
        [value],
        axes=tuple(sorted(axes)),
        keepdims=op.keepdims,
        name=f"{op.result.name}.acc",
        location=op.location,
        **b.accumulation,
    )
    factor = mean_multiplier(b.scale(x), b.scale(op.result), count)
    result = b.requantize(total, factor, b.affine_of(op.result), name=b.claim(op.result), location=op.location)
    b.result_of(op, result, last=last and op.keepdims)
