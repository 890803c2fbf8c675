"""What legalize writes for single ops, what it leaves in floating point, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qir.arrays import Array
from qir.backend import load_target
from qir.errors import PassError
from qir.interpreter import interpret
from qir.interval import Interval
from qir.ir import Graph, Op, Stage, Value
from qir.ops.fixed_rescale import dequantize_array
from qir.ops.float_elementwise import Add, Clip, HardSwish, Mul, Relu
from qir.ops.float_nn import BatchNormalization, Conv, MatMul
from qir.ops.float_pool import AveragePool, MaxPool, ReduceMean, Softmax
from qir.ops.movement import Concat, Reshape, Transpose
from qir.pass_manager import PassContext
from qir.passes.legalize import Legalize
from qir.rewrite import GraphBuilder, map_values
from qir.types import BATCH, S8, S16, S32, AffineType, Shape, TensorType, affine, storage_of
from qir.verifier import verify

TARGET = load_target("arm-neon")
WINDOW: dict[str, Any] = {"strides": (1, 1), "pads": (1, 1, 1, 1), "dilations": (1, 1)}


def act(scale: float = 0.5, zero: int = 0) -> AffineType:
    return affine(S8, scale, zero)


class Typed(GraphBuilder):
    """A typed graph in the making."""

    def __init__(self) -> None:
        super().__init__("typed", Stage.TYPED)

    def source(self, shape: Shape, element: AffineType | None = None) -> Value:
        return self.input(f"x{len(self.inputs)}", TensorType(shape, element or act()))

    def add(self, op: type[Op], *operands: Value, element: AffineType | None = None, **attributes: Any) -> Value:
        name = f"{op.mnemonic.lower()}{len(self.ops)}"
        return self.emit(op, operands, elements=[element or act()], name=name, location=f"node {name}", **attributes)

    def number(self, data: npt.ArrayLike, element: AffineType) -> Value:
        array = Array(np.asarray(data, np.float32))
        return self.constant(array, TensorType(array.shape, element), "k")

    def graph(self, *outputs: Value) -> Graph:
        made = self.finish(outputs, [v.name for v in outputs])
        return map_values(made, lambda v: {"range": Interval(-1.0, 1.0)})


def legalized(graph: Graph) -> tuple[Graph, Sequence[str]]:
    """The fixed graph, verified, and what the pass says of it."""
    context = PassContext(TARGET)
    verify(graph)
    fixed = Legalize().run(graph, context)
    verify(fixed)
    return fixed, context.notes


def kinds(graph: Graph) -> list[str]:
    """The ops in order, constants left out."""
    return [op.mnemonic for op in graph.ops if op.mnemonic != "const"]


def convolution(b: Typed, x: Value, bias: AffineType | None = None, **attributes: Any) -> Value:
    channels = int(x.type.shape[1])
    weight = b.number(np.ones((channels, channels, 3, 3)), affine(S8.narrowed(-127, 127), np.ones(channels), 0, 0))
    operands = [x, weight, *([b.number(np.zeros(channels), bias)] if bias else [])]
    return b.add(Conv, *operands, groups=1, **(WINDOW | attributes))


def test_maps_stay_channels_last_from_op_to_op() -> None:
    b = Typed()
    x = b.source((BATCH, 3, 8, 8))
    first = convolution(b, x)
    second = b.add(Relu, convolution(b, b.add(Add, first, b.number(np.ones((3, 1, 1)), act()))))
    pooled = b.add(MaxPool, second, kernel=(2, 2), **WINDOW)
    mean = b.add(ReduceMean, b.add(Concat, first, b.add(HardSwish, first), axis=1), axes=(2, 3), keepdims=False)
    index = b.add(Softmax, second, element=act(1 / 256, -128), axis=1)
    fixed, _ = legalized(b.graph(pooled, mean, b.add(ReduceMean, index, axes=(2, 3), keepdims=False)))
    assert kinds(fixed).count("transpose") == 2  # of the input and of the output that is a map


def test_a_transpose_to_channels_last_of_a_map_that_stands_so_is_nothing() -> None:
    b = Typed()
    x = b.source((BATCH, 3, 8, 8))
    fixed, _ = legalized(b.graph(b.add(Transpose, convolution(b, x), perm=(0, 2, 3, 1))))
    assert kinds(fixed) == ["transpose", "conv2d", "requantize"]


def test_1d_convolutions_in_a_row_share_the_height_of_1() -> None:
    b = Typed()
    x = b.source((BATCH, 1, 9))
    window: dict[str, Any] = {"strides": (1,), "pads": (1, 1), "dilations": (1,), "groups": 1}
    for _ in range(2):
        x = b.add(Conv, x, b.number(np.ones((1, 1, 3)), affine(S8, np.ones(1), 0, 0)), **window)
    fixed, _ = legalized(b.graph(x))
    assert kinds(fixed) == ["reshape", "conv2d", "requantize", "conv2d", "requantize", "reshape"]


@pytest.mark.parametrize(
    ("clip", "bounds"),
    [
        (None, (-128, 127)),
        ((0.0, np.inf), (-10, 127)),
        ((0.0, 6.0), (-10, 2)),
        ((0.0, float(np.finfo(np.float32).max)), (-10, 127)),
        ((-np.inf, -100.0), (-128, -128)),
        ((1e30, 1e31), (127, 127)),
        ((-1.25, 1.25), (-13, -7)),  # ties, away from the zero point
    ],
)
def test_a_fused_activation_narrows_the_storage(clip: tuple[float, float] | None, bounds: tuple[int, int]) -> None:
    b = Typed()
    x = b.source((BATCH, 4))
    fixed, _ = legalized(b.graph(b.add(Mul, x, x, element=act(0.5, -10), clip=clip)))
    storage = storage_of(fixed.outputs[0].type.element)
    assert storage is not None
    assert (storage.lo, storage.hi) == bounds


def test_padding_that_counts_may_lie_outside_of_a_fused_activation() -> None:
    b = Typed()
    x = b.source((BATCH, 1, 4, 4))
    clipped = b.add(Mul, x, x, clip=(2.0, 6.0))
    fixed, _ = legalized(b.graph(b.add(AveragePool, clipped, kernel=(2, 2), count_include_pad=True, **WINDOW)))
    got = interpret(fixed, {"x0": np.full((1, 1, 4, 4), 2, np.int8)})["averagepool1"]
    assert got[0, 0, 0].tolist() == [1, 2, 2, 2, 1]  # one or two of four are 4, the rest 0


def test_softmax_takes_a_clipped_operand() -> None:
    b = Typed()
    x = b.source((BATCH, 5))
    fixed, notes = legalized(b.graph(b.add(Softmax, b.add(Relu, x), element=act(1 / 256, -128), axis=1)))
    assert kinds(fixed) == ["requantize", "softmax"]
    assert "0 float islands" in notes[0]


def test_a_constant_read_twice_is_written_once() -> None:
    b = Typed()
    x = b.source((BATCH, 4))
    k = b.number(np.ones((1, 4)), act())
    left, right = b.add(Concat, x, x, axis=1), b.add(Reshape, k, shape=(4,))
    fixed, _ = legalized(b.graph(left, right, b.add(Relu, k), b.add(Reshape, k, shape=(2, 2))))
    assert len(fixed.constants) == 1


def test_formats_that_differ_in_width_are_converted() -> None:
    b = Typed()
    x = b.source((BATCH, 4), affine(S16, 0.5))
    fixed, _ = legalized(b.graph(b.add(Concat, x, x, axis=1)))
    got = interpret(fixed, {"x0": np.array([[-1000, -3, 5, 1000]], np.int16)})["concat0"]
    assert got.tolist() == [[-128, -3, 5, 127] * 2]


def one_op(name: str) -> Graph:
    """A graph of one op that has no integer form."""
    b = Typed()
    x = b.source((BATCH, 3, 4, 4))
    products = affine(S32, np.full(3, 0.5), 0, 0)
    if name == "normalization":
        ones = b.number(np.ones(3), act())
        return b.graph(b.add(BatchNormalization, x, ones, ones, ones, ones, epsilon=0.0))
    if name == "weights":
        return b.graph(b.add(Conv, x, b.source((3, 3, 3, 3)), groups=1, **WINDOW))
    if name == "bias":
        return b.graph(convolution(b, x, affine(S32, np.full(3, 0.25), 0, 0)))
    if name == "bias that is read":
        weight = b.number(np.ones((3, 3, 3, 3)), affine(S8, np.ones(3), 0, 0))
        return b.graph(b.add(Conv, x, weight, b.source((3,)), groups=1, **WINDOW))
    if name == "axis of the weights":
        weight = b.number(np.ones((4, 2)), affine(S8, np.ones(4), 0, 0))
        return b.graph(b.add(MatMul, x, weight))
    if name == "row":
        long = b.source((BATCH, 4096))
        return b.graph(b.add(Softmax, long, axis=1))
    if name == "hard swish":
        return b.graph(b.add(HardSwish, b.source((BATCH, 3), act(1.0)), element=act(2.0**-8)))
    if name == "width":
        wide = b.source((BATCH, 3), affine(S16, 0.5))
        return b.graph(b.add(Add, wide, wide))
    assert name == "legal", name
    return b.graph(convolution(b, x, products))


REASONS = {
    "normalization": "no lowering rule",
    "weights": "weights are not constant",
    "bias": "not at the scale of the input times that of the weights",
    "bias that is read": "bias is not constant",
    "axis of the weights": "not quantized per tensor or along axis 1",
    "row": "fewer than 4096",
    "hard swish": "2\\^-9 to 128 times",
    "width": "must fit 32 bits",
}


@pytest.mark.parametrize("name", REASONS)
def test_what_has_no_integer_form_is_an_island(name: str) -> None:
    graph = one_op(name)
    fixed, notes = legalized(graph)
    assert "1 float islands" in notes[0]
    op = graph.producers[graph.outputs[0]]
    assert [o.mnemonic for o in fixed.ops if o.is_float and o.mnemonic != "const"] == [op.mnemonic]
    assert op.location in notes[1]
    assert fixed.outputs[0].name == op.result.name
    rng = np.random.default_rng(0)
    feeds = {v.name: rng.integers(-3, 4, v.type.concrete(2)) for v in graph.inputs}
    reals = {v.name: dequantize_array(feeds[v.name], v.type.element) for v in graph.inputs}
    got = dequantize_array(interpret(fixed, feeds)[op.result.name], op.result.type.element)
    assert isinstance(op.result.type.element, AffineType)
    step = float(op.result.type.element.scale.data)  # the grid of the typed graph rounds ties otherwise
    np.testing.assert_allclose(got, interpret(graph, reals)[op.result.name], rtol=0, atol=step)


@pytest.mark.parametrize("name", REASONS)
def test_a_target_without_floating_point_refuses_it(name: str) -> None:
    graph = one_op(name)
    target = replace(TARGET, floating_point=False)
    with pytest.raises(PassError, match=REASONS[name]) as caught:
        Legalize().run(graph, PassContext(target))
    assert graph.producers[graph.outputs[0]].location in str(caught.value)
    assert "replace the op" in str(caught.value)


def test_the_legal_neighbour_of_those_graphs_is_no_island() -> None:
    assert "0 float islands" in legalized(one_op("legal"))[1][0]


def test_a_clip_whose_bounds_cross_gives_its_maximum() -> None:
    b = Typed()
    fixed, _ = legalized(b.graph(b.add(Clip, b.source((BATCH, 2)), minimum=3.0, maximum=1.0)))
    assert interpret(fixed, {"x0": np.array([[-9, 9]], np.int8)})["clip0"].tolist() == [[2, 2]]


@pytest.mark.parametrize(("weight", "warns"), [(0.004, True), (0.006, False), (0.0, False)])
def test_weights_of_which_nothing_but_zeros_is_left_are_warned_of(weight: float, warns: bool) -> None:
    """Half of a scale of 0.01 is the least that does not round to 0; weights that are 0 lose nothing."""
    builder = Typed()
    x = builder.source((BATCH, 2))
    k = builder.number(np.full((2, 3), weight), affine(S8.narrowed(-127, 127), 0.01, 0))
    context = PassContext(TARGET)
    Legalize().run(builder.graph(builder.add(MatMul, x, k, clip=None)), context)
    expected = [
        "warning: %k: nothing but zeros is left of it in s8[-127, 127]; give it more bits, or sums a wider accumulator"
    ]
    assert [str(d) for d in context.diagnostics] == expected * warns
