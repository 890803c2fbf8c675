"""Graphs: what makes two equal, what is computed of them once, and what ops say of themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest

from qir.arrays import Array
from qir.errors import QirError, RewriteError
from qir.interval import Interval
from qir.ir import Graph, Op, Stage, Value, as_float32
from qir.ops import OPS
from qir.ops.constant import Const
from qir.ops.float_elementwise import Add, Clip, Relu
from qir.ops.float_nn import Conv, MatMul
from qir.ops.movement import Concat
from qir.printer import print_graph, resources
from qir.rewrite import GraphBuilder, map_values
from qir.types import BATCH, F32, S8, S16, TensorType, affine, integer

WEIGHT = np.arange(80, dtype=np.float32).reshape(4, 20)


def example() -> Graph:
    """One of everything that a graph can hold, built anew at each call."""
    builder = GraphBuilder("example")
    x = builder.input("x", TensorType((BATCH, 4)), Interval(-1.0, 1.0))
    w = builder.constant(Array(WEIGHT, "w"), TensorType((4, 20)))
    y = builder.emit(MatMul, [x, w], name="y", location="node")
    z = builder.emit(Clip, [y], name="z", minimum=0.0, maximum=6.0)
    graph = builder.finish([y, z], ["first", "second"], target="chip", attributes={"mode": "fast", "count": 3})
    facts = {"histogram": Array(np.arange(5)), "storage": S8}
    return map_values(graph, lambda v: facts if v is x else {})


def value_changed(old_name: str, **changes: Any) -> Callable[[Graph], Graph]:
    return lambda g: map_values(g, lambda v: changes if v.name == old_name else {})


def op_changed(place: int, **changes: Any) -> Callable[[Graph], Graph]:
    """The op at this place with other fields; it must be the last one where its results change."""

    def change(graph: Graph) -> Graph:
        return graph.with_changes(
            ops=tuple(o.with_changes(**changes) if o is graph.ops[place] else o for o in graph.ops)
        )

    return change


def last_op_is_relu(graph: Graph) -> Graph:
    last = graph.ops[-1]
    return graph.with_changes(ops=(*graph.ops[:-1], Relu(operands=last.operands, results=last.results)))


CHANGES: dict[str, Callable[[Graph], Graph]] = {
    "name": lambda g: g.with_changes(name="other"),
    "stage": lambda g: g.with_changes(stage=Stage.RANGED),
    "target": lambda g: g.with_changes(target=""),
    "attribute": lambda g: g.with_changes(attributes={"mode": "fast", "count": 4}),
    "fewer attributes": lambda g: g.with_changes(attributes={"mode": "fast"}),
    "output name": lambda g: g.with_changes(output_names=("first", "third")),
    "outputs swapped": lambda g: g.with_changes(outputs=g.outputs[::-1]),
    "fewer outputs": lambda g: g.with_changes(outputs=g.outputs[:1], output_names=g.output_names[:1]),
    "fewer ops": lambda g: g.with_changes(ops=g.ops[:-1], outputs=g.outputs[:1] * 2, output_names=("first", "second")),
    "kind of op": last_op_is_relu,
    "attribute of an op": op_changed(2, minimum=-1.0),
    "optional attribute": op_changed(1, clip=(0.0, 1.0)),
    "location": op_changed(1, location="other node"),
    "contents of a constant": op_changed(0, value=Array(WEIGHT + 1)),
    "value name": value_changed("y", name="other"),
    "input name": value_changed("x", name="other"),
    "shape": value_changed("y", type=TensorType((BATCH, 21))),
    "element type": value_changed("y", type=TensorType((BATCH, 20), affine(S8, 0.5))),
    "range": value_changed("x", range=Interval(-1.0, 2.0)),
    "no range": value_changed("x", range=None),
    "histogram": value_changed("x", histogram=Array(np.arange(6))),
    "storage": value_changed("x", storage=S16),
}


def test_graphs_built_alike_are_equal() -> None:
    one, other = example(), example()
    assert one == other
    assert print_graph(one) == print_graph(other)
    assert one != "a graph"
    assert len({one, other}) == 2  # they hash by identity: comparing contents is not cheap


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_any_difference_makes_graphs_unequal_and_shows(change: Callable[[Graph], Graph]) -> None:
    one, other = example(), change(example())
    assert one != other
    assert print_graph(one) != print_graph(other) or resources(one) != resources(other)


def test_operands_make_a_difference() -> None:
    def graph(first: int) -> Graph:
        builder = GraphBuilder("g")
        x = [builder.input(n, TensorType((2,))) for n in "xy"]
        return builder.finish([builder.emit(Add, [x[first], x[1]])], ["y"])

    assert graph(0) == graph(0)
    assert graph(0) != graph(1)


def test_the_name_of_an_array_makes_no_difference() -> None:
    assert op_changed(0, value=Array(WEIGHT, "renamed"))(example()) == example()


def test_views_of_a_graph() -> None:
    graph = example()
    x, w, y, z = graph.values()
    constant, product, clip = graph.ops
    assert graph.producers == {w: constant, y: product, z: clip}
    assert graph.users == {x: (product,), w: (product,), y: (clip,)}
    assert graph.constants == {w: Array(WEIGHT)}
    assert (graph.value("y"), graph.macs()) == (y, 80)
    with pytest.raises(QirError, match="graph @example has no value %nothing"):
        graph.value("nothing")
    with pytest.raises(FrozenInstanceError):
        graph.name = "other"  # type: ignore[misc]
    with pytest.raises(QirError, match="graph @example: 2 outputs but 1 output names"):
        graph.with_changes(output_names=("y",))


def test_an_op_that_reads_a_value_twice_is_one_user() -> None:
    builder = GraphBuilder("twice")
    x = builder.input("x", TensorType((2,)))
    graph = builder.finish([builder.emit(Add, [x, x])], ["y"])
    assert graph.users[x] == graph.ops


def test_the_attributes_of_a_graph_do_not_change_with_those_given() -> None:
    attributes: dict[str, Any] = {"a": 0.1, "b": (0.1, 2)}
    graph = example().with_changes(attributes=attributes)
    attributes["a"] = 5
    assert graph.attributes == {"a": as_float32(0.1), "b": (as_float32(0.1), 2)}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ((-0.1, 0.1), (np.float32(-0.1), np.float32(0.1))),
        ((-0.7, 0.7), (np.nextafter(np.float32(-0.7), np.float32(-1)), np.nextafter(np.float32(0.7), np.float32(1)))),
        ((0.1, 0.3), (np.nextafter(np.float32(0.1), np.float32(0)), np.float32(0.3))),
        ((0, 0.5), (0.0, 0.5)),
        ((-0.5, 2**70), (-0.5, 2.0**70)),
        ((-1e39, 1e39), (-math.inf, math.inf)),
        ((1e39, 1e39), (float(np.finfo(np.float32).max), math.inf)),
        ((np.float32(0.25), np.float64(0.5)), (0.25, 0.5)),
    ],
)
def test_real_ranges_are_rounded_outward_to_float32(given: tuple[Any, Any], kept: tuple[Any, Any]) -> None:
    found = Value("x", TensorType(()), Interval(*given)).range
    assert found is not None
    assert (found.lo, found.hi) == kept
    assert found.lo <= given[0] <= given[1] <= found.hi
    assert {type(found.lo), type(found.hi)} == {float}
    assert Value("x", TensorType(()), found).range == found


def test_integer_ranges_stay_exact() -> None:
    interval = Interval(-(2**70), 2**70 + 1)
    assert Value("x", TensorType((), integer(64)), interval).range is interval


def test_float_attributes_are_float32() -> None:
    op = Clip(minimum=0.1, maximum=1e39)
    assert (op.minimum, op.maximum) == (as_float32(0.1), math.inf)
    assert Add(clip=(-0.1, 0.1)).clip == (as_float32(-0.1), as_float32(0.1))
    assert Add(clip=None).clip is None


def test_ops_describe_themselves() -> None:
    y = Value("y", TensorType((2,)))
    assert Relu(results=(y,), location="node 7").describe() == 'Relu %y (from node "node 7")'
    assert Relu(results=(y, replace(y, name="z"))).describe() == "Relu %y, %z"
    with pytest.raises(RewriteError, match="Relu %y, %z has 2 results, not one"):
        _ = Relu(results=(y, replace(y, name="z"))).result
    assert Conv.attribute_names() == ("strides", "pads", "dilations", "clip", "unclipped", "groups")


@pytest.mark.parametrize(
    ("op_class", "limits", "message"),
    [
        (Relu, (1, 1), "takes 1 operands, not 4"),
        (Conv, (2, 3), "takes 2 to 3 operands, not 4"),
        (Const, (0, 0), "takes 0 operands, not 4"),
        (Concat, (1, None), None),
    ],
)
def test_operand_counts(op_class: Any, limits: tuple[int, int | None], message: str | None) -> None:
    assert op_class.operand_limits() == limits
    x = Value("x", TensorType((2,), F32))
    required = {n: Array(np.zeros(2)) if op_class is Const else (1,) for n in op_class.attribute_names()}
    op = op_class(operands=(x,) * 4, **required)
    if message is None:
        op.check_operand_count()
    else:
        with pytest.raises(QirError, match=message):
            op.check_operand_count()


def test_every_op_has_one_name_and_stands_somewhere() -> None:
    assert len({op.mnemonic for op in OPS}) == len(OPS)
    for op in OPS:
        assert op.mnemonic
        assert op.stages
        assert op.__doc__
        evaluated = {hasattr(op, "eval_float"), hasattr(op, "eval_int")}
        assert True in evaluated
        assert op.infer is not Op.infer
