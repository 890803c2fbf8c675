"""Building and rewriting graphs: names, inference, errors, and that a pass sees one value for another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qir.arrays import Array
from qir.errors import RewriteError
from qir.interval import Interval
from qir.ir import Graph, Op, Stage
from qir.ops.fixed_elementwise import FixedAdd
from qir.ops.float_elementwise import Add, Mul, Relu
from qir.ops.float_nn import MatMul
from qir.ops.float_pool import ArgMax
from qir.ops.movement import Reshape, Transpose
from qir.printer import print_graph
from qir.rewrite import GraphBuilder, Rewriter, live_ops, map_values, rewrite
from qir.types import BATCH, F32, S8, S64, TensorType
from qir.verifier import verify

ROW = TensorType((BATCH, 4))


def chain() -> Graph:
    builder = GraphBuilder("chain")
    x = builder.input("x", ROW)
    w = builder.constant(Array(np.ones((4, 4), np.float32), "w"), TensorType((4, 4)))
    product = builder.emit(MatMul, [x, w], name="product", location="node 1")
    relu = builder.emit(Relu, [product], name="relu")
    builder.emit(Relu, [relu], name="dead")
    return builder.finish([relu, product], ["y", "z"], target="chip", attributes={"a": 1})


def test_a_builder_infers_and_names() -> None:
    builder = GraphBuilder("g")
    x = builder.input("x", ROW, Interval(-1.0, 1.0))
    values = [builder.emit(Relu, [x], name=n) for n in ("", "", "r", "r", "r.1", "", "1")]
    assert [v.name for v in values] == ["0", "1", "r", "r.1", "r.1.1", "2", "1.1"]
    assert {v.type for v in values} == {ROW}
    index = builder.emit(ArgMax, [x], axis=1, keepdims=False)
    assert index.type == TensorType((BATCH,), S64)
    total = builder.emit(FixedAdd, [index, index], elements=[S8], overflow="saturate")
    assert total.type == TensorType((BATCH,), S8)
    stated = builder.emit(Relu, [x], types=[TensorType((9,))])
    assert stated.type == TensorType((9,))
    assert builder.constant(Array(np.zeros(2, np.float32), "weight"), TensorType((2,))).name == "weight"
    graph = builder.finish([total], ["y"])
    assert (graph.stage, graph.target, dict(graph.attributes)) == (Stage.FLOAT, "", {})
    assert x.range == Interval(-1.0, 1.0)


def test_names_with_one_hint_are_found_at_once() -> None:
    builder = GraphBuilder("g")
    names = [builder.fresh("k") for _ in range(30_000)]  # trying from 1 at each would take minutes
    assert (names[0], names[1], names[-1]) == ("k", "k.1", "k.29999")


def test_a_builder_refuses_what_does_not_fit() -> None:
    builder = GraphBuilder("g")
    x = builder.input("x", ROW)
    with pytest.raises(RewriteError, match="graph @g: two inputs are named 'x'"):
        builder.input("x", ROW)
    with pytest.raises(RewriteError, match=r'node "flatten": Reshape: cannot reshape Nx4 to Nx3'):
        builder.emit(Reshape, [x], shape=(3,), location="flatten")
    with pytest.raises(RewriteError, match=r"op Transpose: Transpose: perm \[1, 0\] moves the open batch N"):
        builder.emit(Transpose, [x], perm=(1, 0))
    with pytest.raises(RewriteError, match="op Add: Add: takes 2 operands, not 1"):
        builder.emit(Add, [x])
    assert builder.ops == []


def test_finished_ops_are_appended_under_free_names() -> None:
    builder = GraphBuilder("g")
    x = builder.input("x", ROW)
    op = chain().ops[2].with_changes(operands=(x,))
    first, second = builder.append(op), builder.append(op)
    assert (first, [v.name for v in second]) == (op.results, ["relu.1"])
    assert builder.ops[0] is op


def test_keeping_everything_gives_the_same_ops() -> None:
    graph = chain()
    again = rewrite(graph, lambda rewriter, op: False)
    assert again == graph
    assert all(a is b for a, b in zip(again.ops, graph.ops, strict=True))
    assert rewrite(graph, lambda rewriter, op: False, Stage.RANGED, name="n").stage is Stage.RANGED


def test_replacing_an_op_keeps_its_name_and_place() -> None:
    def visit(rewriter: Rewriter, op: Op) -> bool:
        if not isinstance(op, Relu) or op.result.name == "dead":
            return False
        (x,) = rewriter.operands(op)
        zero = rewriter.constant(Array(np.float32(0)), TensorType(()), "zero")
        rewriter.replace(op, Mul, [x, zero], location="elsewhere")
        return True

    graph = rewrite(chain(), visit)
    verify(graph)
    assert print_graph(graph).split("\n")[1:-2] == [
        "  %w = const {value=f32 4x4 [" + ", ".join(["1.0"] * 16) + "]} : 4x4 x f32",
        '  %product = MatMul %x, %w : Nx4 x f32 loc("node 1")',
        "  %zero = const {value=f32 [0.0]} : f32",
        '  %relu = Mul %product, %zero : Nx4 x f32 loc("elsewhere")',
        "  %dead = Relu %relu : Nx4 x f32",
        '  return %relu as "y", %product as "z"',
    ]
    assert (graph.target, dict(graph.attributes)) == ("chip", {"a": 1})


def test_new_names_never_collide_with_old_ones_that_come_later() -> None:
    def visit(rewriter: Rewriter, op: Op) -> bool:
        if op.result.name == "product":
            rewriter.set(op.result, rewriter.emit(Relu, rewriter.operands(op)[:1], name="relu"))
            return True
        return False

    graph = rewrite(chain(), visit)
    verify(graph)
    assert [op.result.name for op in graph.ops] == ["w", "relu.1", "relu", "dead"]


def test_a_value_that_nothing_replaced_is_an_error() -> None:
    graph = chain()
    rewriter = Rewriter(graph)
    with pytest.raises(RewriteError, match="graph @chain: %x is read before anything replaced it"):
        rewriter.get(graph.inputs[0])
    with pytest.raises(RewriteError, match="%relu is read before anything replaced it"):
        rewriter.finish_graph()


def test_inputs_are_kept_with_changes() -> None:
    graph = chain()
    rewriter = Rewriter(graph)
    new = rewriter.keep_input(graph.inputs[0], type=TensorType((BATCH, 9)))
    assert rewriter.get(graph.inputs[0]) is new
    assert (new.name, new.type.shape) == ("x", (BATCH, 9))
    assert rewriter.fresh("x") == "x.1"


def test_kept_ops_take_new_attributes_and_results() -> None:
    def visit(rewriter: Rewriter, op: Op) -> bool:
        if isinstance(op, MatMul):
            rewriter.keep(op, clip=(0.0, 1.0))
        return isinstance(op, MatMul)

    graph = rewrite(chain(), visit)
    assert getattr(graph.ops[1], "clip") == (0.0, 1.0)  # noqa: B009
    assert graph.ops[2].operands == graph.ops[1].results


def test_live_ops() -> None:
    graph = chain()
    assert live_ops(graph) == list(graph.ops[:3])
    assert live_ops(graph.with_changes(outputs=graph.inputs, output_names=("x",))) == []


def test_map_values() -> None:
    ranges: dict[str, Any] = {"x": Interval(0.0, 1.0), "relu": Interval(0.0, 2.0)}
    graph = map_values(
        chain(),
        lambda v: {"range": ranges[v.name]} if v.name in ranges else {},
        Stage.RANGED,
        lambda op: {"location": "l"} if isinstance(op, Relu) else {},
    )
    assert {v.name: v.range for v in graph.values() if v.range} == ranges
    assert [op.location for op in graph.ops] == ["", "node 1", "l", "l"]
    assert (graph.stage, graph.outputs[0].range) == (Stage.RANGED, Interval(0.0, 2.0))
    assert chain().value("x").type.element == F32
