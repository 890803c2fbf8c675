"""Every op kind that TensorFlow Lite Micro has for 16-bit activations, as `arm-neon-16x8` lowers it: every bit.

As test_compiled_ops does for 8 bits; the formulas alone are in test_tflm_16x8.
"""

from __future__ import annotations

from typing import Any

import pytest
from oracle.test_compiled_ops import (
    CLIPS,
    CONVOLUTIONS,
    MAP,
    MEANS,
    POOLS,
    Case,
    check,
    linear_constants,
)

from qir.ir import Op
from qir.ops.float_elementwise import Add, LeakyRelu, Mul, Relu, Sigmoid, Sub, Tanh
from qir.ops.float_nn import Conv, MatMul
from qir.ops.float_pool import AveragePool, MaxPool, ReduceMean
from qir.ops.movement import Concat, Pad
from qir.types import S16, S64, AffineType, affine

TARGET = "arm-neon-16x8"
SPAN = 1 << 16


def act(scale: float) -> AffineType:
    return affine(S16, scale)


def wide_bias(constants: list[Any]) -> list[Any]:
    """The bias in 64 bits, as the sums are."""
    weight, (data, kind) = constants
    return [weight, (data, affine(S64, kind.scale.data, 0, kind.axis))]


@pytest.mark.parametrize(
    "kind", ["3x3", "1x1", "strided", "asymmetric pads", "depthwise", "depthwise multiplied", "1-d"]
)
@pytest.mark.parametrize("clip", ["none", "relu", "relu6"])
def test_conv(kind: str, clip: str) -> None:
    shape, weight_shape, options = CONVOLUTIONS[kind]
    rank = len(weight_shape) - 2
    attributes = {"strides": (1,) * rank, "pads": (0,) * 2 * rank, "dilations": (1,) * rank, "groups": 1}
    attributes |= options | {"clip": CLIPS[clip]}
    for multiple in (2, 6, 10, 14):
        constants, scale = linear_constants(weight_shape, 0, 2.0**-9, multiple)
        result = act(2.0**-9 * scale * multiple)
        for span in (24, SPAN):
            check(Case(Conv, [(shape, act(2.0**-9))], result, attributes, wide_bias(constants), span), multiple, TARGET)
    check(Case(Conv, [(shape, act(2.0**-9))], result, attributes, constants[:1], 999), 0, TARGET)


@pytest.mark.parametrize("axis", [None, 1], ids=["per tensor", "per channel"])
def test_matmul(axis: int | None) -> None:
    for multiple in (2, 6, 10, 14):
        constants, scale = linear_constants((37, 101), axis, 2.0**-8, multiple)
        result, attributes = act(2.0**-8 * scale * multiple), {"clip": None}
        for span in (20, SPAN):
            case = Case(MatMul, [((100, 37), act(2.0**-8))], result, attributes, wide_bias(constants), span)
            check(case, multiple, TARGET)
    inputs = [((6, 41, 7), act(2.0**-8)), ((6, 7, 43), act(2.0**-7))]
    check(Case(MatMul, inputs, act(2.0**-3), {"clip": None}, span=900), 0, TARGET)


@pytest.mark.parametrize("clip", ["none", "relu", "relu6"])
@pytest.mark.parametrize("op", [Add, Sub, Mul])
def test_arithmetic(op: type[Op], clip: str) -> None:
    for first, second, out in ((2.0**-9, 2.0**-10, 0.003), (2.0**-9, 2.0**-9, 2.0**-8), (0.0013, 0.0007, 0.0021)):
        inputs = [(MAP, act(first)), (MAP, act(second))]
        case = Case(op, inputs, act(out * (16 if op is Mul else 1)), {"clip": CLIPS[clip]}, span=SPAN)
        check(case, 0, TARGET)


@pytest.mark.parametrize("kind", MEANS)
def test_mean(kind: str) -> None:
    shape, axes = MEANS[kind]
    for scale, out in ((2.0**-9, 2.0**-9), (0.001, 0.00037), (2.0**-9, 0.0071)):
        check(Case(ReduceMean, [(shape, act(scale))], act(out), {"axes": axes, "keepdims": True}, span=SPAN), 0, TARGET)


@pytest.mark.parametrize("op", [MaxPool, AveragePool])
@pytest.mark.parametrize("kind", ["2x2", "3x2", "3x3", "1-d"])
def test_pools(op: type[Op], kind: str) -> None:
    shape, given = POOLS[kind]
    rank = len(shape) - 2
    attributes = {"pads": (0,) * 2 * rank, "dilations": (1,) * rank, "ceil_mode": False} | given
    attributes |= {"count_include_pad": False} if op is AveragePool else {}
    check(Case(op, [(shape, act(0.001))], act(0.001), attributes, span=SPAN), 0, TARGET)


@pytest.mark.parametrize("op", [Relu, LeakyRelu])
def test_activations(op: type[Op]) -> None:
    for scale, out in ((2.0**-9, 2.0**-9), (0.001, 0.0017), (0.001, 0.00037)):
        attributes = {"alpha": 0.3} if op is LeakyRelu else {}
        check(Case(op, [(MAP, act(scale))], act(out), attributes, span=SPAN), 0, TARGET)


@pytest.mark.parametrize("op", [Sigmoid, Tanh])
def test_sigmoid_and_tanh(op: type[Op]) -> None:
    """The runtime interpolates: it is near the function to a few steps of 2^-15, or one of a coarser format."""
    for scale in (2.0**-12, 2.0**-11, 2.0**-9, 0.00031, 0.0017):
        check(Case(op, [(MAP, act(scale))], act(2.0**-15), span=SPAN), 0, TARGET, steps=24)
        check(Case(op, [(MAP, act(scale))], act(0.00117), span=SPAN), 0, TARGET)  # by a QUANTIZE


def test_movement() -> None:
    attributes = {"pads": (0, 0, 1, 2, 0, 0, 2, 1), "value": 0.0}
    check(Case(Pad, [(MAP, act(0.001))], act(0.001), attributes, span=SPAN), 0, TARGET)
    check(Case(Concat, [(MAP, act(0.001)), (MAP, act(0.001))], act(0.001), {"axis": 1}, span=SPAN), 0, TARGET)
    check(Case(Concat, [(MAP, act(0.001)), (MAP, act(0.002))], act(0.002), {"axis": 1}, span=SPAN), 0, TARGET)
