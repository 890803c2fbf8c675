"""Integer graphs of one op that requantize in the form `float32`, and accumulators on which wrong rounding shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qir.arrays import Array
from qir.fixed_point import Overflow, RequantizeForm, Rounding
from qir.interpreter import interpret
from qir.ir import Graph, Op, Stage, Value
from qir.ops.accumulate import Order
from qir.ops.fixed_elementwise import FixedMul
from qir.ops.fixed_linear import Conv2d, FixedMatMul, ReduceSum
from qir.ops.fixed_rescale import Dequantize, Quantize, QuantizeRule, Requantize
from qir.pass_manager import PassContext
from qir.passes.range_analysis import RangeAnalysis
from qir.program import Program
from qir.rewrite import GraphBuilder, map_values
from qir.types import BATCH, S8, S32, AffineType, ElementType, IntegerType, Shape, TensorType, affine

F32 = np.float32
WEIGHTS = S8.narrowed(-127, 127)
Ints = npt.NDArray[Any]
Scales = npt.NDArray[np.float32]
Inputs = Sequence[tuple[Shape, ElementType]]


def proved(inputs: Inputs, make: Callable[..., Value]) -> Graph:
    """The graph of `make(builder, *inputs)`, whose inputs are x0, x1, ... and whose output is y, with proved ranges."""
    builder = GraphBuilder("case", Stage.FIXED)
    values = [builder.input(f"x{i}", TensorType(shape, element)) for i, (shape, element) in enumerate(inputs)]
    return RangeAnalysis().run(builder.finish([make(builder, *values)], ["y"]), PassContext())


def single(op_class: type[Op], inputs: Inputs, **options: Any) -> Graph:
    """One op on inputs; options are those of `GraphBuilder.emit`."""
    return proved(inputs, lambda builder, *operands: builder.emit(op_class, operands, **options))


def scale_of(element: ElementType) -> Scales:
    """The scale or scales of an affine type."""
    assert isinstance(element, AffineType)
    return element.scale.data


def product_multiplier(x: ElementType, weight: ElementType, result: ElementType) -> Scales:
    """`float32(float32(sx * sw) / so)`, as ONNX Runtime and FBGEMM round it."""
    return np.asarray(scale_of(x) * scale_of(weight) / scale_of(result), F32)


def reciprocal_multiplier(x: ElementType, weight: ElementType, result: ElementType) -> Scales:
    """`float32(float32(sx * sw) * float32(1 / so))`, as QNNPACK rounds it."""
    return np.asarray(scale_of(x) * scale_of(weight) * (F32(1) / scale_of(result)), F32)


def mean_multiplier(x: ElementType, count: int, result: ElementType) -> Scales:
    """`float32(sx / float32(so * count))`, as ONNX Runtime rounds it."""
    return np.asarray(scale_of(x) / (scale_of(result) * F32(count)), F32)


def accumulation() -> dict[str, Any]:
    """Attributes of an op that sums in 32 bits."""
    return {"accumulator": S32, "overflow": Overflow.WRAP, "order": Order.KHWC}


def requantized(builder: GraphBuilder, acc: Value, multiplier: Scales, result: ElementType) -> Value:
    """`acc` in the type `result`."""
    return builder.emit(
        Requantize,
        [acc],
        elements=[result],
        multiplier=Array(multiplier),
        shift=Array(np.zeros(multiplier.shape, np.int64)),
        form=RequantizeForm.FLOAT32,
        overflow=Overflow.SATURATE,
    )


def constant(builder: GraphBuilder, data: Ints, element: ElementType) -> Value:
    return builder.constant(Array(data), TensorType(data.shape, element), "k")


def linear(
    x: tuple[Shape, ElementType],
    weight: tuple[Ints, ElementType],
    bias: Ints | None,
    result: ElementType,
    window: Mapping[str, Any] | None = None,
    multiplier: Callable[..., Scales] = product_multiplier,
) -> Graph:
    """A convolution where there is a window (weights [O, kh, kw, C / groups]), else a matrix product."""

    def make(builder: GraphBuilder, value: Value) -> Value:
        operands = [value, constant(builder, *weight)]
        if bias is not None:
            operands.append(constant(builder, bias.astype(np.int32), S32))
        op_class: type[Op] = FixedMatMul if window is None else Conv2d
        acc = builder.emit(op_class, operands, **(window or {}), **accumulation())
        return requantized(builder, acc, multiplier(x[1], weight[1], result), result)

    return proved([x], make)


def sums(
    x: tuple[Ints, ElementType], weight: tuple[Ints, ElementType], bias: Ints, window: Mapping[str, Any] | None = None
) -> Ints:
    """The accumulators of `linear`."""
    operands = [x, weight, (bias.astype(np.int32), S32)]
    op_class: type[Op] = FixedMatMul if window is None else Conv2d
    inputs = [(data.shape, element) for data, element in operands]
    graph = single(op_class, inputs, **(window or {}), **accumulation())
    return interpret(graph, {f"x{i}": data for i, (data, _) in enumerate(operands)})["y"]


def matmul(a: tuple[Shape, ElementType], b: tuple[Shape, ElementType], result: ElementType) -> Graph:
    """The product of two activations."""

    def make(builder: GraphBuilder, *operands: Value) -> Value:
        acc = builder.emit(FixedMatMul, operands, **accumulation())
        return requantized(builder, acc, product_multiplier(a[1], b[1], result), result)

    return proved([a, b], make)


def mean(x: tuple[Shape, ElementType], axes: tuple[int, ...], keepdims: bool, result: ElementType) -> Graph:
    """The mean over some axes."""
    count = int(np.prod([int(x[0][axis]) for axis in axes]))

    def make(builder: GraphBuilder, value: Value) -> Value:
        acc = builder.emit(ReduceSum, [value], axes=axes, keepdims=keepdims, **accumulation())
        return requantized(builder, acc, mean_multiplier(x[1], count, result), result)

    return proved([x], make)


def product(
    a: tuple[Shape, ElementType],
    b: tuple[Shape, ElementType],
    result: ElementType,
    multiplier: Callable[..., Scales] = product_multiplier,
) -> Graph:
    """The product of two activations, element by element."""

    def make(builder: GraphBuilder, *operands: Value) -> Value:
        acc = builder.emit(FixedMul, operands, elements=[S32], overflow=Overflow.SATURATE)
        return requantized(builder, acc, multiplier(a[1], b[1], result), result)

    return proved([a, b], make)


def island(
    inputs: Inputs,
    op_class: type[Op],
    result: ElementType,
    rule: QuantizeRule = QuantizeRule.DIVIDE,
    **attributes: Any,
) -> Graph:
    """A float op between dequantize and quantize."""

    def make(builder: GraphBuilder, *operands: Value) -> Value:
        reals = [builder.emit(Dequantize, [v]) for v in operands]
        real = builder.emit(op_class, reals, **attributes)
        return builder.emit(Quantize, [real], elements=[result], rule=rule, rounding=Rounding.HALF_EVEN)

    return proved(inputs, make)


def both(graph: Graph, feeds: Mapping[str, Ints]) -> Ints:
    """The output y by the kernels, which must be that of the interpreter."""
    found = Program(graph).run_integer(feeds)["y"]
    np.testing.assert_array_equal(found, interpret(graph, feeds)["y"])
    return found


def random_integers(rng: np.random.Generator, storage: IntegerType, shape: tuple[int, ...]) -> Ints:
    """Over the whole storage."""
    return rng.integers(storage.lo, storage.hi, shape, storage.dtype, endpoint=True)


def rounded_otherwise(graph: Graph) -> list[Graph]:
    """The graph with ties away from zero, and with each multiplier one unit in the last place down and up."""

    def changed(change: Callable[[Requantize], Mapping[str, Any]]) -> Graph:
        return map_values(graph, lambda v: {}, None, lambda op: change(op) if isinstance(op, Requantize) else {})

    def nudged(toward: float) -> Graph:
        return changed(lambda op: {"multiplier": Array(np.nextafter(op.multiplier.data, F32(toward)))})

    return [changed(lambda op: {"form": RequantizeForm.DOUBLE_AWAY}), nudged(0.0), nudged(np.inf)]


def near_ties(acc: Ints, input_scale: np.float32, out_scale: np.float32, rng: np.random.Generator) -> Scales:
    """A weight scale for each accumulator that puts the output within a float32 rounding error of a tie."""
    ties = rng.integers(0, 110, acc.shape) + 0.5
    return (ties * float(out_scale) / (float(input_scale) * np.maximum(np.abs(acc), 1))).astype(F32)


def odd_multiples(unit: int) -> Ints:
    """Accumulators that are all ties where `unit` becomes one half; the outputs go from -127.5 to 127.5."""
    return unit * np.arange(-255, 256, 2)


def summing_to(rng: np.random.Generator, totals: Ints, count: int, zero: int) -> Ints:
    """int8 [*totals, count], each row of which, the zero point subtracted, sums to its total."""
    base, rest = np.divmod(totals[..., None], count)
    rows = rng.permuted(zero + base + (np.arange(count) < rest), axis=-1)
    assert np.abs(rows).max() < 128
    return rows.astype(np.int8)


def around(rng: np.random.Generator, storage: IntegerType, zero: int, span: int, shape: Sequence[int]) -> Ints:
    """Integers at most `span` from the zero point."""
    low, high = max(zero - span, storage.lo), min(zero + span, storage.hi)
    return rng.integers(low, high, tuple(shape), storage.dtype, endpoint=True)


def small_weights(
    rng: np.random.Generator, shape: tuple[int, ...], axis: int, per_channel: bool
) -> tuple[tuple[Ints, Any], Ints, float]:
    """Small weights on power-of-two scales, biases that drive the accumulators, the largest scale."""
    outputs = shape[axis]
    scales = np.ldexp(1.0, rng.integers(-3, 1, outputs) if per_channel else np.asarray(-2))
    weight = affine(WEIGHTS, scales, 0, axis if per_channel else None)
    return (rng.integers(-2, 3, shape, np.int8), weight), rng.integers(-900, 900, outputs), float(scales.max())


def mostly_of_one_sign(rng: np.random.Generator, storage: IntegerType, shape: tuple[int, ...], axis: int) -> Ints:
    """The ends of a storage; along the axis of outputs, one or the other for nine of ten."""
    favoured = np.expand_dims(rng.integers(0, 2, shape[axis]), [i for i in range(len(shape)) if i != axis])
    high = np.where(rng.random(shape) < 0.9, favoured, 1 - favoured)
    return np.where(high, storage.hi, storage.lo).astype(storage.dtype)


# Layout NHWC, weights [O, kh, kw, C / groups]


def window(**changes: Any) -> dict[str, Any]:
    return {"pads": (0, 0, 0, 0), "strides": (1, 1), "dilations": (1, 1), "groups": 1, **changes}


CONVOLUTIONS: dict[str, tuple[Shape, tuple[int, ...], dict[str, Any]]] = {
    "3x3": ((1, 20, 21, 3), (30, 3, 3, 3), window()),
    "1x1": ((1, 24, 20, 64), (25, 1, 1, 64), window()),
    "strided": ((1, 41, 40, 3), (27, 3, 3, 3), window(strides=(2, 2), pads=(1, 1, 1, 1))),
    "strides that differ": ((1, 40, 41, 2), (26, 3, 2, 2), window(strides=(3, 1), pads=(0, 1, 2, 0))),
    "asymmetric pads": ((1, 19, 20, 2), (28, 3, 2, 2), window(pads=(2, 0, 1, 1))),
    "dilated": ((1, 24, 24, 3), (26, 3, 3, 3), window(dilations=(2, 2), pads=(2, 2, 2, 2))),
    "dilations that differ": ((1, 24, 24, 2), (26, 2, 3, 2), window(dilations=(3, 1), pads=(2, 0, 1, 2))),
    "grouped": ((1, 20, 21, 12), (32, 3, 3, 3), window(groups=4, pads=(1, 1, 1, 1))),
    "depthwise": ((1, 20, 19, 33), (33, 3, 3, 1), window(groups=33, pads=(1, 1, 1, 1))),
    "depthwise strided": ((1, 40, 37, 31), (31, 5, 3, 1), window(groups=31, strides=(2, 2), pads=(2, 1, 2, 1))),
    "depthwise dilated": ((1, 20, 20, 32), (32, 3, 3, 1), window(groups=32, dilations=(2, 2), pads=(2, 2, 2, 2))),
    "depthwise multiplied": ((1, 20, 20, 12), (36, 3, 3, 1), window(groups=12, pads=(0, 1, 2, 1))),
    "batched": ((BATCH, 14, 15, 3), (19, 3, 3, 3), window(pads=(1, 1, 1, 1))),
}

POOLS: dict[str, tuple[tuple[int, int], tuple[int, int], tuple[int, int, int, int]]] = {
    "2x2": ((2, 2), (2, 2), (0, 0, 0, 0)),
    "3x3": ((3, 3), (2, 2), (1, 1, 1, 1)),
    "overlapping": ((3, 2), (1, 1), (1, 0, 2, 1)),
    "strides that differ": ((2, 3), (3, 1), (0, 1, 1, 2)),
    "4x4": ((4, 4), (1, 2), (0, 0, 0, 0)),
}


def slides(kind: str) -> dict[str, Any]:
    kernel, strides, pads = POOLS[kind]
    return {"kernel": kernel, "strides": strides, "pads": pads, "dilations": (1, 1)}
