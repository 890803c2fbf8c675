"""Inputs that reach what is proved of a layer's sums: by hand, of dependent operands, and where there are none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import qir.check
from qir.arrays import Array
from qir.check import LayerCheck, check_graph, overflow_text
from qir.counterexample import Reach, layer_graph, reach
from qir.errors import ConformanceError
from qir.fixed_point import Overflow
from qir.interpreter import interpret
from qir.interval import Bounds, Interval
from qir.ir import Graph, Stage, Value
from qir.ops.accumulate import Accumulating, Order
from qir.ops.fixed_linear import Conv2d, FixedMatMul
from qir.program import Program
from qir.proof import prove
from qir.rewrite import GraphBuilder
from qir.types import BATCH, S8, S16, S32, IntegerType, TensorType, integer, storage_of

WINDOW: dict[str, Any] = {"pads": (0, 0, 0, 0), "strides": (1, 1), "dilations": (1, 1), "groups": 1}


def constant(builder: GraphBuilder, data: npt.NDArray[Any]) -> Value:
    return builder.constant(Array(data), TensorType(data.shape, S8), "k")


def sums(weights: list[int], storage: IntegerType = S8, accumulator: IntegerType = S16, **attributes: Any) -> Graph:
    """A 1x1 convolution with one output channel."""
    builder = GraphBuilder("g", Stage.FIXED)
    x = builder.input("x", TensorType((BATCH, 1, 2, len(weights)), storage))
    w = builder.constant(
        Array(np.array(weights, np.int8).reshape(1, 1, 1, -1)), TensorType((1, 1, 1, len(weights)), S8)
    )
    given = {"accumulator": accumulator, "overflow": Overflow.WRAP, "order": Order.KHWC, **WINDOW, **attributes}
    return builder.finish([builder.emit(Conv2d, [x, w], name="sum", **given)], ["y"])


def only_layer(graph: Graph) -> LayerCheck:
    (layer,) = check_graph(graph).layers
    return layer


def shown(graph: Graph) -> str:
    found = only_layer(graph).counterexample
    assert found is not None
    return overflow_text(found)


def ends(graph: Graph, channel: int = 0) -> tuple[Reach, Reach]:
    """Of the partial sums of the last op; what its result is stands on the kernels and the interpreter too."""
    op, proof = graph.ops[-1], prove(graph)
    assert isinstance(op, Accumulating)
    operands = [proof.bounds[v] for v in op.operands]
    alone, found = layer_graph(op, operands), []
    for high in (False, True):
        end = reach(op, operands, proof.steps[op], channel, high=high)
        assert end is not None
        for outputs in (Program(alone).run_integer(end.feeds), interpret(alone, end.feeds, unbounded=True)):
            assert outputs[op.result.name][end.position] == end.result
        found.append(end)
    return found[0], found[1]


# By hand


def test_whole_sum_wraps() -> None:
    assert shown(sums([100, 100, 100])) == "exact sum -38400 wraps to 27136 in s16 at [0, 0, 0, 0]"
    low, high = ends(sums([100, 100, 100]))
    assert low.feeds["x"][0, 0, 0].tolist() == [-128, -128, -128]
    assert low.feeds["x"][0, 0, 1].tolist() == [0, 0, 0]  # of no importance here
    assert (low.value, low.bound, low.products, low.length) == (-38400, -38400, 3, 3)
    assert (high.value, high.exact, high.result, high.overflows) == (38100, 38100, 38100 - 65536, True)


def test_products_behind_the_furthest_sum_are_zero() -> None:
    _, high = ends(sums([100, -100, 100], S8.narrowed(0, 127)))
    assert high.feeds["x"][0, 0, 0].tolist() == [127, 0, 127]
    _, high = ends(sums([100, 100, -100]))
    assert (high.feeds["x"][0, 0, 0].tolist(), high.products) == ([127, 127, -128], 3)
    _, high = ends(sums([100, 100, -100], S8.narrowed(0, 127)))
    assert (high.feeds["x"][0, 0, 0].tolist(), high.value) == ([127, 127, 0], 25400)


@pytest.mark.parametrize(
    ("overflow", "rest"),
    [
        (Overflow.WRAP, "wraps in s16 at [0, 0, 0, 0]; the result is 10287 all the same"),
        (Overflow.SATURATE, "saturates in s16 at [0, 0, 0, 0]; the result is -5333 instead of 10287"),
        (Overflow.SATURATE_ZERO, "falls in s16 at [0, 0, 0, 0]; the result is 0 instead of 10287"),
    ],
)
def test_sum_that_leaves_and_comes_back(overflow: Overflow, rest: str) -> None:
    graph = sums([127, 127, 127, -127, -127, -127], S8.narrowed(100, 127), overflow=overflow)
    assert only_layer(graph).saturates_stepwise == (overflow is not Overflow.WRAP)
    assert shown(graph).startswith("sum 48387 behind 3 of 6 products ")
    assert shown(graph).endswith(rest)


def test_whole_sum_saturates_and_falls() -> None:
    assert shown(sums([100, 100, 100], overflow=Overflow.SATURATE)).startswith("exact sum -38400 saturates to -32768 ")
    assert shown(sums([100, 100, 100], overflow=Overflow.SATURATE_ZERO)).startswith("exact sum -38400 falls to 0 ")


def test_bits_slack_and_tightness_of_a_layer_with_room() -> None:
    layer = only_layer(sums([100, 100, 100], accumulator=S32))
    assert (layer.is_proved, layer.bits, layer.counterexample) == (True, 17, None)
    assert layer.tightness == 1
    unsigned = only_layer(sums([1, 1, 1], integer(8, signed=False), integer(10, signed=False)))
    assert (unsigned.is_proved, unsigned.bits) == (True, 10)


def test_products_that_may_saturate_are_named() -> None:
    graph = sums([100], accumulator=S32, product=integer(13), product_overflow=Overflow.SATURATE)
    layer = only_layer(graph)
    assert (layer.verdict, [*layer.remarks()]) == ("proved", ["products may leave s13: saturate"])
    low, high = ends(graph)
    assert (low.value, high.value) == (-4096, 4095)


# Operands that depend on each other, or are constant


def matmul(left: Value | None, right: Value | None, builder: GraphBuilder, **data: npt.NDArray[Any]) -> Graph:
    made = [constant(builder, data[name]) if value is None else value for name, value in (("a", left), ("b", right))]
    attributes: dict[str, Any] = {"accumulator": S32, "overflow": Overflow.WRAP, "order": Order.KHWC}
    return builder.finish([builder.emit(FixedMatMul, made, **attributes)], ["y"])


def test_matrix_times_itself_shares_elements() -> None:
    builder = GraphBuilder("g", Stage.FIXED)
    x = builder.input("x", TensorType((3, 3), S8))
    for channel in range(3):
        low, high = ends(matmul(x, x, builder), channel)
        assert low.bound <= low.value < 0 < high.value <= high.bound
        assert set(high.feeds) == {"x"}


def test_best_row_of_a_constant_is_taken() -> None:
    builder = GraphBuilder("g", Stage.FIXED)
    x = builder.input("x", TensorType((2, 4), S8))
    a = np.array([[1, 2], [50, -60], [3, 4]], np.int8)
    low, high = ends(matmul(None, x, builder, a=a), 2)
    assert (low.position, low.value) == ((1, 2), -50 * 128 - 60 * 127)
    assert (high.position, high.value) == ((1, 2), 50 * 127 + 60 * 128)


def test_best_matrix_of_a_batch_of_constants_is_taken() -> None:
    builder = GraphBuilder("g", Stage.FIXED)
    x = builder.input("x", TensorType((1, 3, 2), S8))
    b = np.array([[[1], [2]], [[9], [9]], [[3], [4]]], np.int8)
    low, high = ends(matmul(x, None, builder, b=b))
    assert (low.position, low.value) == ((1, 0, 0), -18 * 128)
    assert (high.position, high.value) == ((1, 0, 0), 18 * 127)


def test_proof_by_what_cancels_is_not_held_to_independent_inputs() -> None:
    """Of 2 x - x: the proof of the whole graph knows that both elements are the same, and the layer alone does not."""
    graph = sums([2, -1], accumulator=integer(9), overflow=Overflow.NONE)
    op, proof = graph.ops[-1], prove(graph)
    assert isinstance(op, Conv2d)
    operands, whole = [proof.bounds[v] for v in op.operands], Interval(-256, 254)
    tight = replace(
        proof.steps[op],
        partial=whole,
        unsaturated=whole,
        channel_partials=Bounds.of([whole.lo], [whole.hi]),
        sources=("x",),
    )
    low, high = (reach(op, operands, tight, 0, high=high) for high in (False, True))
    layer = LayerCheck(op, tight, low, high)
    assert (layer.is_proved, layer.tightness, layer.counterexample) == (True, None, None)
    assert layer.verdict == "proved"
    assert [*layer.remarks()] == ["bounded by what cancels between elements of its operands"]
    assert high is not None
    assert (high.value, high.bound) == (382, 254)
    (alone,) = (o for o in layer_graph(op, operands).ops if isinstance(o, Conv2d))
    assert alone.overflow is Overflow.WRAP


# A layer alone


def test_layer_alone_holds_what_is_proved_of_its_operands() -> None:
    graph = sums([100, 100, 100])
    op = graph.ops[-1]
    assert isinstance(op, Conv2d)
    bounds = Bounds.of([-5, 0, 7], [5, 0, 19], [2, 1, 3])
    operands = [bounds, prove(graph).bounds[op.operands[1]]]
    (x,) = layer_graph(op, operands, "arm-neon").inputs
    storage = storage_of(x.type.element)
    assert (x.name, x.type.shape, storage) == ("x", (BATCH, 1, 2, 3), S8.narrowed(-5, 19))
    step = op.bounds(operands)
    assert step is not None
    end = reach(op, operands, step, 0, high=True)
    assert end is not None
    assert end.feeds["x"][0, 0].tolist() == [[5, 0, 19], [-1, 0, 7]]
    assert (end.value, end.bound) == (2400, 2400)


@pytest.mark.parametrize("shape", [(0, 1, 2, 3), (BATCH, 1, 2, 0)])
def test_sums_of_nothing(shape: tuple[Any, ...]) -> None:
    builder = GraphBuilder("g", Stage.FIXED)
    x = builder.input("x", TensorType(shape, S8))
    w = constant(builder, np.ones((1, 1, 1, int(shape[3])), np.int8))
    attributes: dict[str, Any] = {"accumulator": S16, "overflow": Overflow.WRAP, "order": Order.KHWC, **WINDOW}
    layer = only_layer(builder.finish([builder.emit(Conv2d, [x, w], **attributes)], ["y"]))
    assert layer.is_proved
    assert layer.tightness == (None if shape[0] == 0 else 1)


def test_kernels_that_give_another_sum_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Program):
        def run_integer(self, *given: Any, **options: Any) -> dict[str, npt.NDArray[Any]]:
            return {n: a ^ 1 for n, a in super().run_integer(*given, **options).items()}

    monkeypatch.setattr(qir.check, "Program", Wrong)
    with pytest.raises(ConformanceError, match=r"conv2d %sum: the kernels give 27137 at .* give 27136;"):
        check_graph(sums([100, 100, 100]))
