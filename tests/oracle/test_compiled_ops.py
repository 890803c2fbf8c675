"""Every op kind of the contract, lowered by legalize and run by kernels and interpreter, against TensorFlow Lite Micro.

Scales are powers of two and outputs `sx * sw * {2, 6, 10, 14}`, so that ties abound and wrong rounding shows, which the
`sharp` cases assert. Each case compares at least 10,000 outputs, and every bit must agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from oracle.graph_to_tflite import NotTflite, graph_to_tflite
from oracle.tflite_writer import MicroRuntime

from qir.arrays import Array
from qir.backend import load_target
from qir.fixed_point import RequantizeForm
from qir.interpreter import interpret
from qir.interval import Interval
from qir.ir import Graph, Op, Stage, Value
from qir.ops.fixed_rescale import Requantize, dequantize_array
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
from qir.pass_manager import PassContext
from qir.passes.pipelines import parse_pipeline
from qir.program import Program
from qir.rewrite import GraphBuilder, map_values
from qir.types import BATCH, S8, S32, S64, AffineType, ElementType, Shape, TensorType, affine

LEAST_OUTPUTS = 10_000
WEIGHTS = S8.narrowed(-127, 127)
MAP = (1, 8, 36, 36)
SAMPLES = 3  # where the batch is N

Ints = npt.NDArray[Any]
Reals = npt.NDArray[np.float32]
Bounds = tuple[float, float] | None

CLIPS: dict[str, Bounds] = {
    "none": None,
    "relu": (0.0, np.inf),
    "relu6": (0.0, 6.0),
    "relu n1 to 1": (-1.0, 1.0),
    "relu of exporters": (0.0, float(np.finfo(np.float32).max)),
}


@dataclass
class Case:
    """One float op on typed operands: inputs as (shape in ONNX's layout, type), constants as (data, type)."""

    op: type[Op]
    inputs: Sequence[tuple[Shape, AffineType]]
    result: ElementType
    attributes: dict[str, Any] = field(default_factory=dict)
    constants: Sequence[tuple[Reals, AffineType]] = ()
    span: int = 255  # inputs are drawn from the zero point +- span
    constants_first: bool = False
    sharp: bool = False  # other roundings must show

    def typed(self) -> Graph:
        builder = GraphBuilder("case", Stage.TYPED)
        inputs = [builder.input(f"x{i}", TensorType(s, t)) for i, (s, t) in enumerate(self.inputs)]
        constants = [
            builder.constant(Array(data, f"c{i}"), TensorType(data.shape, element))
            for i, (data, element) in enumerate(self.constants)
        ]
        operands: list[Value] = [*constants, *inputs] if self.constants_first else [*inputs, *constants]
        result = builder.emit(self.op, operands, elements=[self.result], name="y", **self.attributes)
        return map_values(builder.finish([result], ["y"]), lambda v: {"range": Interval(-1.0, 1.0)})


def check(case: Case, seed: int = 0, target: str = "arm-neon", steps: float = 2) -> None:
    """Lower the case, run it on both, and compare every bit. Reals are met to so many steps of the result."""
    typed = case.typed()
    context = PassContext(load_target(target))
    fixed = parse_pipeline("legalize,range-analysis,insert-saturation").run(typed, context)
    runtime = MicroRuntime(graph_to_tflite(fixed, typed, SAMPLES))
    program, rng, outputs = Program(fixed), np.random.default_rng(seed), 0
    blurred = {_rounded_otherwise(fixed, form): 0 for form in (RequantizeForm.SINGLE_ROUND, RequantizeForm.NEON)}
    while outputs < LEAST_OUTPUTS:
        feeds = {f"x{i}": _draw(s, t, case.span, rng) for i, (s, t) in enumerate(case.inputs)}
        theirs = runtime.run(*feeds.values())[0]
        np.testing.assert_array_equal(program.run_integer(feeds)["y"], theirs)
        np.testing.assert_array_equal(interpret(fixed, feeds)["y"], theirs)
        _assert_meant(typed, feeds, theirs, steps)
        for wrong in blurred if case.sharp else ():
            blurred[wrong] += int((interpret(wrong, feeds)["y"] != theirs).sum())
        outputs += theirs.size
    assert not case.sharp or min(blurred.values()) > 0, "the scales do not tell the roundings apart"


def _assert_meant(typed: Graph, feeds: Mapping[str, Ints], found: npt.NDArray[Any], steps: float) -> None:
    """The runtime was told the right op: its reals are those of the typed graph, but for a few steps of rounding."""
    expected = interpret(typed, {v.name: dequantize_array(feeds[v.name], v.type.element) for v in typed.inputs})["y"]
    element = typed.outputs[0].type.element
    if not isinstance(element, AffineType):
        np.testing.assert_array_equal(found, expected)
        return
    gap = np.abs(dequantize_array(found, element).astype(np.float64) - expected)
    assert gap.max() <= steps * float(element.scale.data)


def _draw(shape: Shape, element: AffineType, span: int, rng: np.random.Generator) -> Ints:
    zero, storage = int(element.zero_point.data), element.storage
    concrete = TensorType(shape).concrete(SAMPLES)
    ends = max(zero - span, storage.lo), min(zero + span, storage.hi)
    return rng.integers(*ends, concrete, endpoint=True).astype(storage.dtype)


def _rounded_otherwise(graph: Graph, form: RequantizeForm) -> Graph:
    return map_values(graph, lambda v: {}, None, lambda op: {"form": form} if isinstance(op, Requantize) else {})


def act(scale: float, zero: int = 0) -> AffineType:
    return affine(S8, scale, zero)


def linear_constants(
    shape: tuple[int, ...], axis: int | None, input_scale: float, seed: int
) -> tuple[list[tuple[Reals, AffineType]], float]:
    """Small weights on power-of-two scales, and biases that drive the accumulators; the largest weight scale."""
    rng = np.random.default_rng(seed)
    outputs = shape[axis] if axis is not None else shape[-1]
    scales = np.ldexp(1.0, rng.integers(-3, 1, outputs) if axis is not None else np.asarray(-2)).astype(np.float32)
    along = [1] * len(shape)
    if axis is not None:
        along[axis] = -1
    weights = rng.integers(-2, 3, shape) * scales.reshape(along)
    products = (scales * np.float32(input_scale)).astype(np.float32)
    bias = rng.integers(-900, 900, outputs) * products
    bias_type = affine(S32, products, 0, 0 if axis is not None else None)
    weight_type = affine(WEIGHTS, scales, 0, axis)
    return [(weights.astype(np.float32), weight_type), (bias.astype(np.float32), bias_type)], float(scales.max())


CONVOLUTIONS: dict[str, tuple[Shape, tuple[int, ...], dict[str, Any]]] = {
    "3x3": ((1, 3, 20, 21), (30, 3, 3, 3), {}),
    "1x1": ((1, 5, 24, 20), (25, 5, 1, 1), {}),
    "strided": ((1, 3, 41, 40), (27, 3, 3, 3), {"strides": (2, 2), "pads": (1, 1, 1, 1)}),
    "strides that differ": ((1, 2, 40, 41), (26, 2, 3, 2), {"strides": (3, 1), "pads": (0, 1, 2, 0)}),
    "asymmetric pads": ((1, 2, 19, 20), (28, 2, 3, 2), {"pads": (2, 0, 1, 1)}),
    "dilated": ((1, 3, 24, 24), (26, 3, 3, 3), {"dilations": (2, 2), "pads": (2, 2, 2, 2)}),
    "dilations that differ": ((1, 2, 24, 24), (26, 2, 2, 3), {"dilations": (3, 1), "pads": (2, 0, 1, 2)}),
    "depthwise": ((1, 33, 20, 19), (33, 1, 3, 3), {"groups": 33, "pads": (1, 1, 1, 1)}),
    "depthwise strided": ((1, 31, 40, 37), (31, 1, 5, 3), {"groups": 31, "strides": (2, 2), "pads": (2, 1, 2, 1)}),
    "depthwise dilated": ((1, 32, 20, 20), (32, 1, 3, 3), {"groups": 32, "dilations": (2, 2), "pads": (2, 2, 2, 2)}),
    "depthwise multiplied": ((1, 12, 20, 20), (36, 1, 3, 3), {"groups": 12, "pads": (0, 1, 2, 1)}),
    "batched": ((BATCH, 3, 14, 15), (19, 3, 3, 3), {"pads": (1, 1, 1, 1)}),
    "1-d": ((1, 7, 400), (27, 7, 3), {"strides": (1,), "pads": (1, 1), "dilations": (1,)}),
    "1-d strided and dilated": ((2, 5, 500), (26, 5, 3), {"strides": (2,), "pads": (3, 0), "dilations": (3,)}),
    "1-d depthwise": ((1, 30, 380), (30, 1, 4), {"strides": (1,), "pads": (0, 2), "dilations": (1,), "groups": 30}),
}


def convolution(kind: str, multiple: int, zero: int, clip: Bounds, count: int = 2) -> Case:
    """A case whose result has `multiple` times the largest product of scales; `count` of weights and bias."""
    shape, weight_shape, options = CONVOLUTIONS[kind]
    constants, scale = linear_constants(weight_shape, 0, 0.5, multiple)
    rank = len(weight_shape) - 2
    attributes = {"strides": (1,) * rank, "pads": (0,) * 2 * rank, "dilations": (1,) * rank, "groups": 1}
    attributes |= options | {"clip": clip}
    result = act(0.5 * scale * multiple, zero)
    return Case(Conv, [(shape, act(0.5, zero // 3))], result, attributes, constants[:count], span=24)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_conv(kind: str) -> None:
    for multiple, zero in ((2, -5), (6, 0), (10, 127), (14, -128)):
        case = convolution(kind, multiple, zero, None)
        case.sharp = zero in (-5, 0)
        check(case, multiple)


@pytest.mark.parametrize("clip", [k for k in CLIPS if k != "none"])
@pytest.mark.parametrize("kind", ["strided", "depthwise", "1-d"])
def test_conv_with_a_fused_activation(kind: str, clip: str) -> None:
    for multiple, zero in ((0.25, -5), (2, 0), (4, 9), (4.8, 0), (6, -128)):  # scales 2 and 2.4 put a bound on a tie
        constants = convolution(kind, 2, zero, CLIPS[clip])
        constants.result = act(0.5 * multiple, zero)
        check(constants)


@pytest.mark.parametrize("kind", ["3x3", "depthwise multiplied", "1-d"])
def test_conv_without_bias(kind: str) -> None:
    check(convolution(kind, 6, 3, None, count=1))


@pytest.mark.parametrize("shape", [(100, 37), (2, 50, 37), (2, 5, 10, 37), (BATCH, 34, 37)], ids=str)
@pytest.mark.parametrize("axis", [None, 1], ids=["per tensor", "per channel"])
def test_matmul_with_constant_weights(shape: Shape, axis: int | None) -> None:
    clips = ("none", "relu", "relu6", "relu of exporters", "none")
    for multiple, clip in zip((2, 6, 10, 14, 8), clips, strict=True):
        constants, scale = linear_constants((37, 101), axis, 0.25, multiple)
        result = act(0.25 * scale * multiple, -multiple)
        attributes = {"clip": CLIPS[clip]}
        check(Case(MatMul, [(shape, act(0.25, 3))], result, attributes, constants, span=20, sharp=multiple == 8))
        check(Case(MatMul, [(shape, act(0.25, -9))], result, attributes, constants[:1], span=20))


@pytest.mark.parametrize("shape", [(41, 7), (6, 41, 7), (2, 3, 41, 7)], ids=str)
def test_matmul_of_two_activations(shape: tuple[int, ...]) -> None:
    other = (*shape[:-2], 7, 43)
    for multiple in (2, 6, 10, 14, 8):
        inputs = [(shape, act(0.5, -3)), (other, act(0.25, 5))]
        check(Case(MatMul, inputs, act(0.125 * multiple, 9), {"clip": None}, span=9, sharp=multiple == 8))


OPERANDS: dict[str, tuple[Shape, Shape]] = {
    "same": (MAP, MAP),
    "row": (MAP, (36,)),
    "row of a batch": (MAP, (1, 36)),
    "channels": (MAP, (8, 1, 1)),
    "scalar": (MAP, ()),
    "column from the left": ((36, 1), MAP),
    "to each other": ((1, 8, 1, 36), (1, 1, 36, 1)),
    "samples": ((BATCH, 4, 30, 30), (BATCH, 4, 30, 30)),
    "rank 2": ((100, 101), (100, 101)),
    "rank 3": ((5, 40, 51), (40, 51)),
}


@pytest.mark.parametrize("kind", OPERANDS)
@pytest.mark.parametrize("op", [Add, Sub, Mul])
def test_arithmetic(op: type[Op], kind: str) -> None:
    left, right = OPERANDS[kind]
    for first, second, out in ((0.5, 0.25, 0.75), (0.125, 0.125, 0.25), (0.1, 0.037, 0.11), (0.5, 0.5, 3.5)):
        result = act(out * (16 if op is Mul else 1), -7)
        inputs = [(left, act(first, -3)), (right, act(second, 11))]
        check(Case(op, inputs, result, {"clip": None}, sharp=kind == "same" and out == 0.25))


@pytest.mark.parametrize("clip", [k for k in CLIPS if k != "none"])
@pytest.mark.parametrize("op", [Add, Sub, Mul])
def test_arithmetic_with_a_fused_activation(op: type[Op], clip: str) -> None:
    for out, zero in ((0.0625, -100), (1.5, 3), (2.0, 9), (2.4, 0)):
        inputs = [(MAP, act(0.125, -3)), (MAP, act(0.0625, 11))]
        check(Case(op, inputs, act(out, zero), {"clip": CLIPS[clip]}))


@pytest.mark.parametrize("constants_first", [False, True])
@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 36, 36), (36,), ()], ids=str)
@pytest.mark.parametrize("op", [Add, Sub, Mul])
def test_arithmetic_with_constants(op: type[Op], shape: tuple[int, ...], constants_first: bool) -> None:
    data = np.random.default_rng(1).integers(-100, 100, shape).astype(np.float32) * np.float32(0.25)
    constants = [(data, act(0.25, 2))]
    check(Case(op, [(MAP, act(0.5, -3))], act(1.5, 4), {"clip": None}, constants, constants_first=constants_first))


ACTIVATIONS: dict[str, tuple[type[Op], dict[str, Any], Any]] = {
    "relu": (Relu, {}, None),
    "clip 0 6": (Clip, {"minimum": 0.0, "maximum": 6.0}, None),
    "clip from 0": (Clip, {"minimum": 0.0, "maximum": float(np.finfo(np.float32).max)}, None),
    "leaky relu": (LeakyRelu, {"alpha": 0.3}, None),
    "leaky relu, negative": (LeakyRelu, {"alpha": -0.25}, None),
    "leaky relu, above 1": (LeakyRelu, {"alpha": 1.7}, None),
    "prelu": (PRelu, {}, np.linspace(-1, 1, 8, dtype=np.float32).reshape(8, 1, 1)),
    "prelu, one slope": (PRelu, {}, np.full((1,), 0.25, np.float32)),
    "hard swish": (HardSwish, {}, None),
}


@pytest.mark.parametrize(("scale", "out"), [(0.5, 0.5), (0.25, 0.75), (0.1, 0.0731), (0.5, 0.25)])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations(kind: str, scale: float, out: float) -> None:
    op, attributes, slope = ACTIVATIONS[kind]
    constants = [] if slope is None else [(slope, act(0.0078125, 3))]
    for zero, out_zero in ((-11, -20), (0, -128), (127, 40)):
        check(Case(op, [(MAP, act(scale, zero))], act(out, out_zero), attributes, constants))


def test_activations_of_matrices_and_sequences() -> None:
    for shape in ((100, 101), (2, 51, 101), (BATCH, 40, 90)):
        slope = np.linspace(-1, 1, int(shape[1]), dtype=np.float32).reshape(-1, *(1,) * (len(shape) - 2))
        check(Case(PRelu, [(shape, act(0.25, 7))], act(0.75, 5), {}, [(slope, act(0.0078125, 3))]))
        check(Case(Relu, [(shape, act(0.25, 7))], act(0.75, 5)))
        check(Case(HardSwish, [(shape, act(0.1, 7))], act(0.05, 5)))


@pytest.mark.parametrize("scale", [2.0**-9, 0.03125, 0.047, 0.125, 1.0])
@pytest.mark.parametrize("op", [Sigmoid, Tanh])
def test_sigmoid_and_tanh(op: type[Op], scale: float) -> None:
    native = act(1 / 256, -128) if op is Sigmoid else act(1 / 128)
    for zero in (5, -128, 127):
        check(Case(op, [(MAP, act(scale, zero))], native))
        check(Case(op, [(MAP, act(scale, zero))], act(0.0117, 3)))  # by a QUANTIZE


SOFTMAXES: dict[str, tuple[Shape, int]] = {
    "matrix": ((1000, 11), 1),
    "channels": ((1, 11, 31, 32), 1),
    "rows": ((1, 4, 50, 51), 3),
    "columns": ((1, 4, 50, 51), 2),
    "sequences": ((BATCH, 34, 100), 2),
    "channels of sequences": ((BATCH, 34, 100), 1),
}


@pytest.mark.parametrize("kind", SOFTMAXES)
def test_softmax(kind: str) -> None:
    shape, axis = SOFTMAXES[kind]
    for scale in (2.0**-6, 0.05, 0.125, 0.5):
        check(Case(Softmax, [(shape, act(scale, -4))], act(1 / 256, -128), {"axis": axis}))
    check(Case(Softmax, [(shape, act(0.05, -4))], act(0.0051, -120), {"axis": axis}))  # by a QUANTIZE


MEANS: dict[str, tuple[Shape, tuple[int, ...]]] = {
    "7x7": ((1, 2500, 7, 7), (2, 3)),
    "4x4": ((1, 2500, 4, 4), (2, 3)),
    "1x1": ((1, 2500, 1, 1), (2, 3)),
    "3x5": ((1, 2500, 3, 5), (2, 3)),
    "batched": ((BATCH, 1000, 5, 6), (2, 3)),
    "channels": ((1, 6, 50, 52), (1,)),
    "height": ((1, 30, 12, 90), (2,)),
    "width": ((1, 30, 90, 13), (3,)),
    "channels and width": ((100, 5, 27, 6), (1, 3)),
    "all": ((2500, 3, 2, 5), (1, 2, 3)),
    "sequence": ((2, 1250, 9), (2,)),
    "matrix": ((2600, 10), (1,)),
}


@pytest.mark.parametrize("keepdims", [True, False])
@pytest.mark.parametrize("kind", MEANS)
def test_mean(kind: str, keepdims: bool) -> None:
    shape, axes = MEANS[kind]
    for scale, out in ((0.5, 0.5), (0.25, 0.125), (0.1, 0.037), (0.5, 1.75)):
        attributes = {"axes": axes, "keepdims": keepdims}
        sharp = kind == "4x4" and (scale, out) == (0.25, 0.125)
        check(Case(ReduceMean, [(shape, act(scale, -17))], act(out, 6), attributes, sharp=sharp))


POOLS: dict[str, tuple[Shape, dict[str, Any]]] = {
    "2x2": ((1, 9, 41, 40), {"kernel": (2, 2), "strides": (2, 1)}),
    "3x2": ((1, 9, 41, 40), {"kernel": (3, 2), "strides": (2, 1)}),
    "3x3": ((1, 9, 41, 40), {"kernel": (3, 3), "strides": (2, 1)}),
    "as SAME": ((1, 9, 41, 40), {"kernel": (3, 2), "strides": (2, 1), "pads": (1, 0, 1, 1)}),
    "ceil mode": ((1, 26, 41, 39), {"kernel": (2, 2), "strides": (2, 2), "ceil_mode": True}),
    "1-d": ((1, 27, 400), {"kernel": (3,), "strides": (1,)}),
    "whole map": ((2, 5200, 5, 4), {"kernel": (5, 4), "strides": (1, 1)}),
}


@pytest.mark.parametrize("op", [MaxPool, AveragePool])
@pytest.mark.parametrize("kind", POOLS)
def test_pools(op: type[Op], kind: str) -> None:
    shape, options = POOLS[kind]
    rank = len(options["kernel"])
    attributes = {"pads": (0,) * 2 * rank, "dilations": (1,) * rank} | options
    check(Case(op, [(shape, act(0.5, -3))], act(0.5, -3), attributes))
    check(Case(op, [(shape, act(0.5, -3))], act(0.75, 9), attributes))  # by a QUANTIZE of the operand


def test_pools_with_padding_written_out() -> None:
    window = {"kernel": (3, 2), "strides": (1, 1), "pads": (2, 0, 1, 1), "dilations": (1, 1)}
    for zero in (-128, 4, 127):
        operand = [((1, 9, 41, 40), act(0.5, zero))]
        check(Case(MaxPool, operand, act(0.5, zero), window))
        check(Case(AveragePool, operand, act(0.5, zero), window | {"count_include_pad": True}))


MOVEMENTS: dict[str, tuple[type[Op], Shape, dict[str, Any]]] = {
    "reshape": (Reshape, MAP, {"shape": (8, 1296)}),
    "flatten samples": (Reshape, (BATCH, 8, 20, 30), {"shape": (4800,)}),
    "transpose to channels last": (Transpose, MAP, {"perm": (0, 2, 3, 1)}),
    "transpose": (Transpose, MAP, {"perm": (0, 3, 1, 2)}),
    "transpose of samples": (Transpose, (BATCH, 30, 120), {"perm": (0, 2, 1)}),
    "pad with a value": (Pad, MAP, {"pads": (0, 0, 1, 2, 0, 1, 0, 3), "value": 1.5}),
    "pad with zeros": (Pad, MAP, {"pads": (0, 1, 1, 0, 0, 0, 2, 3), "value": 0.0}),
    "pad beyond the type": (Pad, MAP, {"pads": (0, 1, 1, 0, 0, 0, 2, 3), "value": -1e9}),
    "slice": (Slice, MAP, {"starts": (1, 3), "ends": (7, 36), "axes": (1, 3), "steps": (2, 2)}),
    "slice backwards": (Slice, MAP, {"starts": (35,), "ends": (-1,), "axes": (2,), "steps": (-1,)}),
    "slice backwards in steps": (Slice, MAP, {"starts": (34,), "ends": (2,), "axes": (3,), "steps": (-3,)}),
    "gather": (Gather, MAP, {"indices": Array(np.array([7, 0, 0, 3])), "axis": 1}),
    "gather more": (Gather, MAP, {"indices": Array(np.array([[5, 0], [9, 35]])), "axis": 3}),
}


@pytest.mark.parametrize("kind", MOVEMENTS)
def test_data_movement(kind: str) -> None:
    op, shape, attributes = MOVEMENTS[kind]
    check(Case(op, [(shape, act(0.5, -3))], act(0.5, -3), attributes))
    for out in (0.25, 0.75, 3.0, 0.0731):  # a QUANTIZE, then the movement
        check(Case(op, [(shape, act(0.5, -3))], act(out, 5), attributes))


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_concat(axis: int) -> None:
    same = act(0.5, -3)
    check(Case(Concat, [(MAP, same)] * 3, same, {"axis": axis}))
    for out in (0.25, 0.75, 0.5, 3.0):
        check(Case(Concat, [(MAP, act(0.5, 7)), (MAP, act(0.1, -9))], act(out, 5), {"axis": axis}))
    data = np.arange(8 * 36 * 36, dtype=np.float32).reshape(MAP) % 100 * np.float32(0.25)
    check(Case(Concat, [(MAP, act(0.5, 7))], act(0.75, 5), {"axis": axis}, [(data, act(0.25, -100))]))


REQUANTIZED: Sequence[tuple[float, float]] = [
    *((0.5, 0.5 * n / m) for n in (1, 2, 3, 4, 5, 6, 7, 8, 10, 14) for m in (1, 4)),
    (0.1, 0.0371),
    (0.0371, 0.1),
]


@pytest.mark.parametrize(("scale", "out"), REQUANTIZED)
def test_requantize_between_formats(scale: float, out: float) -> None:
    for zero, out_zero in ((-128, -128), (0, 3), (5, -9), (127, 0)):
        sharp = out in (4 * scale, 8 * scale) and zero >= 0
        check(Case(Reshape, [(MAP, act(scale, zero))], act(out, out_zero), {"shape": (10368,)}, sharp=sharp))


@pytest.mark.parametrize("keepdims", [True, False])
@pytest.mark.parametrize(("shape", "axis"), [((101, 100, 101), 1), ((101, 100, 101), 2), ((10_000, 12), 1)], ids=str)
def test_argmax(shape: Shape, axis: int, keepdims: bool) -> None:
    check(Case(ArgMax, [(shape, act(0.5))], S64, {"axis": axis, "keepdims": keepdims}, span=4))


WINDOW: dict[str, Any] = {"strides": (1, 1), "pads": (0, 0, 0, 0), "dilations": (1, 1)}
REFUSED: dict[str, Case] = {
    "groups of several channels": Case(
        Conv, [(MAP, act(0.5))], act(1.0), WINDOW | {"groups": 2}, linear_constants((6, 4, 3, 3), 0, 0.5, 0)[0]
    ),
    "no counterpart": Case(Div, [(MAP, act(0.5)), (MAP, act(0.5))], act(1.0)),
    "holds HardSigmoid": Case(HardSigmoid, [(MAP, act(0.5))], act(0.01), {"alpha": 0.2, "beta": 0.5}),
    "which no fused activation does": Case(Mul, [(MAP, act(0.5))] * 2, act(1.0), {"clip": (-2.0, 7.0)}),
    "RELU_N1_TO_1 does not stand alone": Case(Clip, [(MAP, act(0.5))], act(0.5), {"minimum": -1.0, "maximum": 1.0}),
    "would need a fused activation": Case(MatMul, [(MAP, act(0.5))] * 2, act(9.0), {"clip": (0.0, 6.0)}),
    "which SAME does not give": Case(
        AveragePool, [(MAP, act(0.5))], act(0.5), WINDOW | {"kernel": (2, 2), "pads": (1, 1, 0, 0)}
    ),
    "is dilated": Case(MaxPool, [(MAP, act(0.5))], act(0.5), WINDOW | {"kernel": (2, 2), "dilations": (2, 1)}),
    "the last of equal elements": Case(
        ArgMax, [(MAP, act(0.5))], S64, {"axis": 1, "keepdims": False, "select_last_index": True}
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_the_file_cannot_say_is_refused(reason: str) -> None:
    typed = REFUSED[reason].typed()
    fixed = parse_pipeline("legalize").run(typed, PassContext(load_target("arm-neon")))
    with pytest.raises(NotTflite, match=reason):
        graph_to_tflite(fixed, typed)


def test_a_table_alone_does_not_say_its_function() -> None:
    typed = Case(Tanh, [(MAP, act(0.5))], act(1 / 128)).typed()
    fixed = parse_pipeline("legalize").run(typed, PassContext(load_target("arm-neon")))
    with pytest.raises(NotTflite, match="needs the typed graph"):
        graph_to_tflite(fixed)
