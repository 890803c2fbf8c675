"""Convolution, matrix product and mean: a sum in the target's accumulator, then its requantization."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from qir.arrays import Array
from qir.fixed_point import RequantizeForm, Rounding, floor_log2
from qir.interval import Interval
from qir.ir import Op, Value
from qir.ops.fixed_linear import Conv2d, FixedMatMul, ReduceSum
from qir.ops.fixed_rescale import QuantizeRule, quantize_array
from qir.ops.float_nn import Conv, MatMul
from qir.ops.float_pool import ReduceMean
from qir.passes.accumulation import excess_bits, least_weight_scale, sum_scale
from qir.passes.lowering.context import Lowering, NoIntegerForm, last_axis, spatial_rank_4
from qir.passes.lowering.factors import Factor
from qir.passes.lowering.weight_only import lower_weight_only, uses_weights_alone
from qir.scale_search import power_of_two_from_range
from qir.target import Product
from qir.types import (
    AffineType,
    FixedPointType,
    QuantizedType,
    TensorType,
    fixed_point,
    scale_array,
    scaled_by,
    zero_array,
)

Scales = npt.NDArray[Any]


def lower_conv(b: Lowering, op: Op) -> None:
    """conv2d into the accumulator, then requantize per output channel. A 1-d convolution has height 1."""
    assert isinstance(op, Conv)
    x, weight = op.operands[0], op.operands[1]
    if weight not in b.graph.constants:
        raise NoIntegerForm("its weights are not constant")
    b.format_of(x)
    if uses_weights_alone(b.target, weight):
        lower_weight_only(b, op)
        return
    one_d = x.type.rank == 3
    lead = (1,) if one_d else ()
    pads = (0, op.pads[0], 0, op.pads[1]) if one_d else op.pads
    value = b.read(x, last=True)
    value = b.reshape(value, spatial_rank_4(value.type.shape))
    scales = _weight_scales(weight, 0)
    sums = sum_scale(b.target, float(b.scale(x)), scales, op.sum_range)
    operands = [value, _conv_weight(b, weight), *_bias(b, op, sums.step)]
    total = b.sum_of(
        Conv2d,
        operands,
        sums.shift,
        pads=pads,
        strides=(*lead, *op.strides),
        dilations=(*lead, *op.dilations),
        groups=op.groups,
        name=f"{op.result.name}.acc",
        location=op.location,
    )
    per_channel = np.broadcast_to(scales, (int(weight.type.shape[0]),))
    element = b.clipped(op.result, op.clip)
    factor = b.factor("conv", [_entering(b.scale(x), sums.shift), per_channel], element)
    name = b.claim(op.result)
    result = b.requantize(total, factor, element, kind="conv", name=name, location=op.location)
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


def _entering(scale: np.float32, shift: int) -> np.float32:
    """The scale of an input whose products enter the sum shifted: the unit of the sum is smaller by as much."""
    return np.float32(np.ldexp(scale, -shift))


def _weight_scales(weight: Value, axis: int) -> Scales:
    """The scales of weights: one, or one for each index of `axis`. Raises NoIntegerForm for any other type."""
    element = weight.type.element
    if not isinstance(element, AffineType | FixedPointType) or element.axis not in (None, axis % weight.type.rank):
        raise NoIntegerForm(f"%{weight.name} is not quantized per tensor or along axis {axis % weight.type.rank}")
    return scale_array(element).astype(np.float32)


def _bias(b: Lowering, op: Op, steps: Scales) -> list[Value]:
    """The bias as plain integers of its storage. Raises NoIntegerForm unless it is at the sums' scale, `steps`."""
    bias = op.optional_operand(2)
    if bias is None:
        return []
    if bias not in b.graph.constants:
        raise NoIntegerForm("its bias is not constant")
    element = bias.type.element
    if (
        not isinstance(element, AffineType | FixedPointType)
        or zero_array(element).any()
        or np.any(scale_array(element).astype(np.float32) != steps.astype(np.float32))
    ):
        raise NoIntegerForm(f"%{bias.name} is not at the scale of the input times that of the weights")
    storage = element.storage
    array = Array(b.integers(bias).astype(storage.dtype), b.graph.constants[bias].name)
    return [b.constant(array, TensorType(array.shape, storage), name=b.claim(bias))]


def lower_matmul(b: Lowering, op: Op) -> None:
    """Matmul into the accumulator, then requantize. Constant right operands are weights.

    Where the right one is no weight, whose scale leaves room for the sums, it is rescaled first to as few bits as do.
    """
    assert isinstance(op, MatMul)
    left, right = op.operands[0], op.operands[1]
    b.format_of(left)
    if uses_weights_alone(b.target, right):
        lower_weight_only(b, op)
        return
    scales = _weight_scales(right, -1)
    if right in b.graph.constants:
        array = Array(np.ascontiguousarray(b.integers(right)), b.graph.constants[right].name)
        second = b.constant(array, right.type, name=b.claim(right))
    else:
        second = b.read(right)
        extra = excess_bits(b.target, float(b.scale(left)) * float(b.scale(right)), op.sum_range)
        if extra:
            kind = scaled_by(b.format_of(right), extra)
            scales = scale_array(kind).astype(np.float32)
            found = b.factor("rescale", [b.scale(right)], kind)
            second = b.rescaled(second, found, kind, name=f"{op.result.name}.b", location=op.location)
    sums = sum_scale(b.target, float(b.scale(left)), scales, op.sum_range)
    operands = [b.read(left), second, *_bias(b, op, sums.step)]
    total = b.sum_of(FixedMatMul, operands, sums.shift, name=f"{op.result.name}.acc", location=op.location)
    element = b.clipped(op.result, op.clip)
    factor = b.factor("matmul", [_entering(b.scale(left), sums.shift), scales], element)
    name = b.claim(op.result)
    b.result_of(op, b.requantize(total, factor, element, kind="matmul", name=name, location=op.location))


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
    rule = b.target.requantization.of("mean")
    if rule.form is RequantizeForm.SHIFT:
        _mean_by_products(b, op, value, tuple(sorted(axes)), count, last=last and op.keepdims)
        return
    total = b.sum_of(
        ReduceSum,
        [value],
        0,
        product=Product(),  # there is none: the elements themselves are summed
        axes=tuple(sorted(axes)),
        keepdims=op.keepdims,
        name=f"{op.result.name}.acc",
        location=op.location,
    )
    element = b.format_of(op.result)
    factor = b.factor("mean", [b.scale(x)], element, count)
    result = b.requantize(total, factor, element, kind="mean", name=b.claim(op.result), location=op.location)
    b.result_of(op, result, last=last and op.keepdims)


def _mean_by_products(
    b: Lowering, op: ReduceMean, value: Value, axes: tuple[int, ...], count: int, *, last: bool
) -> None:
    """A mean on a chip that rescales by shifts alone: a matrix product with weights of 1 / count.

    Where room for the sum would take bits of that weight, the elements are summed first, and the sum, in as many bits
    as an element has, is multiplied.
    """
    x, name = op.operands[0], op.result.name
    shape = value.type.shape
    kept = tuple(i for i in range(len(shape)) if i not in axes)
    rows = b.transpose(value, (*kept, *axes)) if axes != tuple(range(len(kept), len(shape))) else value
    outer = tuple(shape[i] for i in kept)
    rows = b.reshape(rows, (*(outer if len(outer) > 1 else (*outer, 1)), count))
    element, scale = b.format_of(op.result), b.scale(x)
    exponent, finest = _mean_exponent(b, x, scale, count)
    loses_bits = exponent > finest and not math.ldexp(1.0 / count, -exponent).is_integer()
    if loses_bits and _holds_sum(b, x, count):
        up = (count - 1).bit_length()
        scale = np.float32(np.ldexp(scale, up))
        kind = fixed_point(b.target.activations.storage(b.format_of(x).storage.bits), int(floor_log2(scale)))
        total, factor = _times(b, op, rows, b.scale(x), 1.0, 0, kind)
        rows = b.requantize(total, factor, kind, kind="mean", name=f"{name}.sum", location=op.location)
        exponent, _ = _mean_exponent(b, x, scale, count)
    total, factor = _times(b, op, rows, scale, 1.0 / count, exponent, element)
    mean = b.requantize(total, factor, element, kind="mean", name=f"{name}.mean", location=op.location)
    final = tuple(1 if i in axes else d for i, d in enumerate(shape)) if op.keepdims else outer
    b.result_of(op, b.reshape(mean, final, name=b.claim(op.result)), last=last)


def _mean_exponent(b: Lowering, x: Value, scale: np.float32, count: int) -> tuple[int, int]:
    """The binary point of a weight of 1 / count: the one that leaves room for sums, and the finest that holds it."""
    storage = b.target.weights.storage(max(b.target.weights.bits))
    finest = power_of_two_from_range(0.0, 1.0 / count, storage.hi.bit_length() + storage.signed, storage.signed)
    if b.target.accumulator.rounding is not None:
        return finest, finest  # sums keep fewer fraction bits instead
    least = float(least_weight_scale(b.target, float(scale), _largest(b, x)))
    return max(finest, math.ceil(math.log2(least))), finest


def _largest(b: Lowering, x: Value) -> float:
    """The largest magnitude of a value: no mean is larger, nor a part of its sum, which must fit too."""
    storage = b.format_of(x).storage
    return float(b.scale(x)) * max(-storage.lo, storage.hi)


def _holds_sum(b: Lowering, x: Value, count: int) -> bool:
    """Whether the accumulator holds the sum of so many elements, whatever they are."""
    storage, bits = b.format_of(x).storage, b.target.accumulator.bits
    return isinstance(bits, int) and count * max(-storage.lo, storage.hi) << b.target.product.shift < 1 << (bits - 1)


def _times(
    b: Lowering, op: ReduceMean, rows: Value, scale: np.float32, real: float, exponent: int, output: QuantizedType
) -> tuple[Value, Factor]:
    """The sum of rows times one weight, and the factor from there to an output; `scale` is that of the rows."""
    storage, name = b.target.weights.storage(max(b.target.weights.bits)), op.result.name
    kind = fixed_point(storage, exponent)
    weights = np.full((int(rows.type.shape[-1]), 1), real, np.float32)
    integers = quantize_array(weights, kind, QuantizeRule.DIVIDE, Rounding.FLOOR)  # no mean may leave its elements
    if not integers.any():
        b.vanished[f"{name}.weight"] = kind
    array = Array(integers.astype(storage.dtype), f"{name}.weight")
    second = b.constant(array, TensorType(array.shape, kind), name=f"{name}.weight")
    step = np.float32(np.ldexp(1.0, exponent))
    largest = _largest(b, op.operands[0])
    sums = sum_scale(b.target, float(scale), np.asarray(step), Interval(-largest, largest))
    total = b.sum_of(FixedMatMul, [rows, second], sums.shift, name=f"{name}.acc", location=op.location)
    return total, b.factor("mean", [_entering(scale, sums.shift), step], output)
