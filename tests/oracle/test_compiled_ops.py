"""Every op kind of the contract, lowered by legalize and run by the kernels, against TensorFlow Lite Micro.

Scales are powers of two and outputs `sx * sw * {2, 6, 10, 14}`, so that exact ties abound; each case compares at least
10,000 outputs, and every bit must agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from oracle.graph_to_tflite import graph_to_tflite as to_tflite
from oracle.tflite_writer import run_tflite_micro

from qir.arrays import Array
from qir.backend import load_target
from qir.interpreter import interpret
from qir.interval import Interval
from qir.ir import Op, Stage, Value
from qir.ops.float_elementwise import (
    Add,
    Clip,
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
from qir.ops.movement import Concat, Pad, Reshape, Transpose
from qir.pass_manager import PassContext
from qir.passes.pipelines import parse_pipeline
from qir.program import Program
from qir.rewrite import GraphBuilder, map_values
from qir.types import S8, S32, S64, AffineType, ElementType, TensorType, affine

LEAST_OUTPUTS = 10_000
WEIGHTS = S8.narrowed(-127, 127)

Ints = npt.NDArray[np.int8]


@dataclass
class Case:
    """One float op on typed operands: inputs as (shape in ONNX's layout, type), constants as (data, type)."""

    op: type[Op]
    inputs: list[tuple[tuple[int, ...], AffineType]]
    result: ElementType
    attributes: dict[str, Any] = field(default_factory=dict)
    constants: list[tuple[npt.NDArray[np.float32], AffineType]] = field(default_factory=list)
    span: int = 128  # inputs are drawn from the zero point +- span


def check(case: Case, seed: int = 0) -> None:
    """Lower the case, run it on both, and compare every bit."""
    builder = GraphBuilder("case", Stage.TYPED)
    operands: list[Value] = [builder.input(f"x{i}", TensorType(s, t)) for i, (s, t) in enumerate(case.inputs)]
    for number, (data, element) in enumerate(case.constants):
        operands.append(builder.constant(Array(data, f"c{number}"), TensorType(data.shape, element)))
    result = builder.emit(case.op, operands, elements=[case.result], name="y", **case.attributes)
    typed = map_values(builder.finish([result], ["y"]), lambda v: {"range": Interval(-1.0, 1.0)})
    context = PassContext(load_target("arm-neon"))
    fixed = parse_pipeline("legalize,range-analysis,insert-saturation").run(typed, context)
    model = to_tflite(fixed, typed)
    program, rng, outputs = Program(fixed), np.random.default_rng(seed), 0
    while outputs < LEAST_OUTPUTS:
        feeds = {f"x{i}": _draw(s, t, case.span, rng) for i, (s, t) in enumerate(case.inputs)}
        theirs = run_tflite_micro(model, *feeds.values())[0]
        ours = program.run_integer(feeds)["y"]
        assert ours.shape == theirs.shape
        assert int((ours != theirs).sum()) == 0
        np.testing.assert_array_equal(interpret(fixed, feeds)["y"], ours)
        outputs += ours.size


def _draw(shape: Sequence[int], element: AffineType, span: int, rng: np.random.Generator) -> Ints:
    zero = int(element.zero_point.data)
    return rng.integers(max(zero - span, -128), min(zero + span, 127), shape, endpoint=True).astype(np.int8)


def act(scale: float, zero: int = 0) -> AffineType:
    return affine(S8, scale, zero)


def linear_constants(
    shape: tuple[int, ...], axis: int | None, input_scale: float, seed: int
) -> tuple[list[tuple[npt.NDArray[np.float32], AffineType]], float]:
    """Small weights on power-of-two scales, and biases that drive the accumulators; the largest weight scale."""
    rng = np.random.default_rng(seed)
    outputs = shape[axis] if axis is not None else shape[-1]
    exponents = rng.integers(-3, 1, outputs) if axis is not None else np.asarray(-2)
    scales = np.ldexp(1.0, exponents).astype(np.float32)
    along = [1] * len(shape)
    if axis is not None:
        along[axis] = -1
    weights = rng.integers(-2, 3, shape) * scales.reshape(along)
    products = (scales * np.float32(input_scale)).astype(np.float32)
    bias = rng.integers(-900, 900, outputs) * products
    bias_type = affine(S32, products, 0, 0 if axis is not None else None)
    weight_type = affine(WEIGHTS, scales, 0, axis)
    return [(weights.astype(np.float32), weight_type), (bias.astype(np.float32), bias_type)], float(scales.max())


CONVOLUTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "3x3": ((1, 3, 20, 21), (30, 3, 3, 3), {}),
    "1x1": ((1, 5, 24, 20), (25, 5, 1, 1), {}),
    "strided": ((1, 3, 41, 40), (27, 3, 3, 3), {"strides": (2, 2), "pads": (1, 1, 1, 1)}),
    "asymmetric pads": ((1, 2, 19, 20), (28, 2, 3, 2), {"pads": (2, 0, 1, 1)}),
    "dilated": ((1, 3, 24, 24), (26, 3, 3, 3), {"dilations": (2, 2), "pads": (2, 2, 2, 2)}),
    "depthwise": ((1, 33, 20, 19), (33, 1, 3, 3), {"groups": 33, "pads": (1, 1, 1, 1)}),
    "depthwise strided": ((1, 31, 40, 37), (31, 1, 5, 3), {"groups": 31, "strides": (2, 2), "pads": (2, 1, 2, 1)}),
    "1-d": ((1, 7, 400), (27, 7, 3), {"strides": (1,), "pads": (1, 1), "dilations": (1,)}),
}


@pytest.mark.parametrize("clip", [None, (0.0, np.inf), (0.0, 6.0)], ids=["linear", "relu", "relu6"])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_conv(kind: str, clip: tuple[float, float] | None) -> None:
    shape, weight_shape, options = CONVOLUTIONS[kind]
    constants, scale = linear_constants(weight_shape, 0, 0.5, 3)
    for multiple, zero in ((2, -5), (6, 0), (10, 127), (14, -128)):
        rank = len(weight_shape) - 2
        attributes = {"strides": (1,) * rank, "pads": (0,) * 2 * rank, "dilations": (1,) * rank, "groups": 1}
        attributes |= options | {"clip": clip}
        result = act(0.5 * scale * multiple, zero)
        check(Case(Conv, [(shape, act(0.5, zero // 3))], result, attributes, constants, span=24), multiple)


@pytest.mark.parametrize("clip", [None, (0.0, np.inf), (0.0, 6.0)], ids=["linear", "relu", "relu6"])
@pytest.mark.parametrize("multiple", [2, 6, 10, 14])
def test_matmul_with_constant_weights(multiple: int, clip: tuple[float, float] | None) -> None:
    constants, scale = linear_constants((37, 101), None, 0.25, multiple)
    result = act(0.25 * scale * multiple, -multiple)
    check(Case(MatMul, [((100, 37), act(0.25, 3))], result, {"clip": clip}, constants, span=20))


@pytest.mark.parametrize("multiple", [2, 6, 10, 14])
def test_matmul_of_two_activations(multiple: int) -> None:
    inputs = [((2, 3, 41, 7), act(0.5, -3)), ((2, 3, 7, 43), act(0.25, 5))]
    check(Case(MatMul, inputs, act(0.125 * multiple, 9), span=9))


@pytest.mark.parametrize(
    ("op", "clip"), [(Add, None), (Add, (0.0, 6.0)), (Sub, None), (Mul, None), (Mul, (0.0, np.inf))]
)
def test_arithmetic(op: type[Op], clip: tuple[float, float] | None) -> None:
    for left, right, out in ((0.5, 0.25, 0.75), (0.125, 0.125, 0.25), (0.1, 0.037, 0.11), (0.5, 0.5, 3.5)):
        result = act(out * (16 if op is Mul else 1), -7)
        inputs = [((1, 8, 36, 36), act(left, -3)), ((1, 8, 36, 36), act(right, 11))]
        check(Case(op, inputs, result, {"clip": clip}))


def test_arithmetic_with_broadcast_constants() -> None:
    data = (np.arange(8, dtype=np.float32) - 3).reshape(8, 1, 1) * np.float32(0.25)
    for op in (Add, Mul):
        check(Case(op, [((1, 8, 36, 36), act(0.5, -3))], act(1.5, 4), constants=[(data, act(0.25, 2))]))


@pytest.mark.parametrize(("scale", "out"), [(0.5, 0.5), (0.25, 0.75), (0.1, 0.0731), (0.5, 0.25)])
@pytest.mark.parametrize("op", [Relu, Clip, LeakyRelu, PRelu, HardSwish])
def test_activations(op: type[Op], scale: float, out: float) -> None:
    attributes: dict[str, Any] = {Clip: {"minimum": 0.0, "maximum": 6.0}, LeakyRelu: {"alpha": 0.3}}.get(op, {})
    constants = []
    if op is PRelu:
        slope = np.linspace(-1, 1, 8, dtype=np.float32).reshape(8, 1, 1)
        constants = [(slope, act(0.01, 3))]
    # The runtime's own RELU6 keeps the scale; a Clip between scales is a fused requantize that it does not have alone.
    result = act(scale, -11) if op is Clip else act(out, -20)
    check(Case(op, [((1, 8, 36, 36), act(scale, -11))], result, attributes, constants))


@pytest.mark.parametrize("scale", [2.0**-9, 0.03125, 0.047, 0.125, 1.0])
@pytest.mark.parametrize("op", [Sigmoid, Tanh])
def test_sigmoid_and_tanh(op: type[Op], scale: float) -> None:
    result = act(1 / 256, -128) if op is Sigmoid else act(1 / 128)
    check(Case(op, [((1, 8, 36, 36), act(scale, 5))], result))


@pytest.mark.parametrize("scale", [2.0**-6, 0.05, 0.125, 0.5])
def test_softmax(scale: float) -> None:
    check(Case(Softmax, [((1000, 11), act(scale, -4))], act(1 / 256, -128), {"axis": 1}))


@pytest.mark.parametrize("keepdims", [True, False])
@pytest.mark.parametrize(("height", "width"), [(7, 7), (4, 4), (1, 1), (3, 5)])
def test_mean(height: int, width: int, keepdims: bool) -> None:
    for scale, out in ((0.5, 0.5), (0.25, 0.125), (0.1, 0.037)):
        attributes = {"axes": (2, 3), "keepdims": keepdims}
        check(Case(ReduceMean, [((1, 2500, height, width), act(scale, -17))], act(out, 6), attributes))


@pytest.mark.parametrize("op", [MaxPool, AveragePool])
@pytest.mark.parametrize("kernel", [(2, 2), (3, 2), (3, 3)])
def test_pools(op: type[Op], kernel: tuple[int, int]) -> None:
    attributes = {"kernel": kernel, "strides": (2, 1), "pads": (0, 0, 0, 0), "dilations": (1, 1)}
    check(Case(op, [((1, 9, 41, 40), act(0.5, -3))], act(0.5, -3), attributes))


def test_data_movement_and_requantize() -> None:
    same, shape = act(0.5, -3), (1, 8, 36, 36)
    check(Case(Reshape, [(shape, same)], same, {"shape": (8, 1296)}))
    check(Case(Transpose, [(shape, same)], same, {"perm": (0, 2, 3, 1)}))
    check(Case(Pad, [(shape, same)], same, {"pads": (0, 0, 1, 2, 0, 1, 0, 3), "value": 1.5}))
    check(Case(Concat, [(shape, same), (shape, same)], same, {"axis": 1}))
    # Operands of other formats are requantized first: a QUANTIZE of the runtime.
    for out in (0.25, 0.75, 0.5, 3.0):
        check(Case(Concat, [(shape, act(0.5, 7)), (shape, act(0.1, -9))], act(out, 5), {"axis": 1}))


@pytest.mark.parametrize("axis", [0, 1])
def test_argmax(axis: int) -> None:
    check(Case(ArgMax, [((100, 101), act(0.5))], S64, {"axis": axis, "keepdims": False}, span=4))
