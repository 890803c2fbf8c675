"""Lowering of elementwise ops, activations, softmax, argmax and casts."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx

from qir.errors import QirError
from qir.frontend.onnx_context import Known, Node, element_type, sample_size
from qir.ir import Op
from qir.opdef import normalize_axis
from qir.ops.float_elementwise import Add, Cast, Clip, HardSigmoid, LeakyRelu, PRelu
from qir.ops.float_pool import ArgMax, Softmax
from qir.types import BATCH, IntegerType, shape_text


def plain_op(op_class: type[Op], operands: int) -> Callable[[Node], Known]:
    """The lowering of an op that has the same operands here and no attributes."""

    def lower(node: Node) -> Known:
        return node.emit(op_class, [node.value(i) for i in range(operands)])

    return lower


def lower_sum(node: Node) -> Known:
    """Sum as a chain of Adds, from the left."""
    total = node.value(0)
    last = len(node.proto.input) - 1
    for index in range(1, last + 1):
        step = node.value(index)
        total = node.emit(Add, [total, step]) if index == last else node.step("partial", Add, [total, step])
    return total


def lower_clip(node: Node) -> Known:
    """Clip with constant bounds; a missing bound is infinite."""
    if node.opset < 11:
        low, high = node.attribute("min"), node.attribute("max")
    else:
        low = node.scalar(1, "min") if node.has(1) else None
        high = node.scalar(2, "max") if node.has(2) else None
    # Before opset 11 the defaults are the extremes of float32, which clip as little as infinity does.
    minimum = -math.inf if low is None else float(low)
    maximum = math.inf if high is None else float(high)
    return node.emit(Clip, [node.value(0)], minimum=minimum, maximum=maximum)


def lower_leaky_relu(node: Node) -> Known:
    """LeakyRelu."""
    return node.emit(LeakyRelu, [node.value(0)], alpha=node.number("alpha"))


def lower_prelu(node: Node) -> Known:
    """PRelu; the slope broadcasts to the input, never the other way."""
    value, slope = node.value(0), node.value(1)
    result = node.emit(PRelu, [value, slope])
    if result.type.shape != value.type.shape:
        raise QirError(
            f"its slope of shape {shape_text(slope.type.shape)} does not broadcast to the input's "
            f"{shape_text(value.type.shape) or 'scalar'}"
        )
    return result


def lower_hard_sigmoid(node: Node) -> Known:
    """HardSigmoid."""
    return node.emit(HardSigmoid, [node.value(0)], alpha=node.number("alpha"), beta=node.number("beta"))


def lower_softmax(node: Node) -> Known:
    """Softmax along one axis; before opset 13, along all axes from `axis` on, taken as one."""
    value = node.value(0)
    shape = value.type.shape
    axis = normalize_axis(node.number("axis"), len(shape))
    if node.opset >= 13 or axis == len(shape) - 1:
        return node.emit(Softmax, [value], axis=axis)
    if BATCH in shape[axis:]:
        raise QirError("its axes take in the open batch N; fix the batch size with shapes")
    flat = node.reshape(value, (*shape[:axis], sample_size(shape[axis:])), name=f"{node.output}.flat")
    return node.reshape(node.step("softmax", Softmax, [flat], axis=axis), shape)


def lower_arg_max(node: Node) -> Known:
    """ArgMax."""
    value = node.value(0)
    axis = normalize_axis(node.number("axis"), value.type.rank)
    last = bool(node.attribute("select_last_index"))
    return node.emit(ArgMax, [value], axis=axis, keepdims=bool(node.number("keepdims")), select_last_index=last)


def lower_cast(node: Node) -> Known:
    """Cast between float32 and integers; one that changes nothing vanishes."""
    value = node.value(0)
    target = element_type(node.number("to"))
    if target == value.type.element:
        return value
    return node.emit(Cast, [value], to=target if isinstance(target, IntegerType) else None)


def lower_dropout(node: Node) -> Known:
    """Dropout does nothing at inference."""
    if node.is_read(1):
        raise QirError("its second output, the mask, is not supported; remove what reads it")
    if node.opset >= 12 and node.has(2) and node.scalar(2, "training_mode"):
        raise QirError("drops elements at random (training mode); export the model for inference")
    return node.given(0)


def lower_constant(node: Node) -> Known:
    """Constant, from whichever attribute holds it."""
    for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        value = node.attribute(name)
        if isinstance(value, onnx.TensorProto):
            return node.array(value)
        if value is not None:
            return np.asarray(value, np.float32 if "float" in name else np.int64)
    raise QirError("holds neither numbers nor a dense tensor; texts and sparse tensors are not supported")
