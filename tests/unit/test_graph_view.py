"""A graph as networkx and Graphviz see it."""

from __future__ import annotations

import networkx

from qir.ir import Graph
from qir.ops.float_elementwise import Add, Relu
from qir.ops.movement import Slice
from qir.rewrite import GraphBuilder
from qir.types import TensorType


def diamond() -> Graph:
    builder = GraphBuilder('a "name"')
    x = builder.input("x", TensorType(("N", 4)))
    relu = builder.emit(Relu, [x], name="relu\n1", location="node/relu")
    part = builder.emit(Slice, [x], starts=(0,), ends=(4,), axes=(1,), steps=(1,), name="part")
    total = builder.emit(Add, [relu, part], name="total")
    twice = builder.emit(Add, [total, total], name="twice")
    return builder.finish([twice, x], ["y", "same"])


def test_nodes_edges_and_order() -> None:
    view = diamond().to_networkx()
    assert list(view.nodes) == ["%x", "%relu\n1", "%part", "%total", "%twice", "return y", "return same"]
    assert [data["kind"] for _, data in view.nodes(data=True)] == [
        "input",
        "Relu",
        "Slice",
        "Add",
        "Add",
        "output",
        "output",
    ]
    assert view.nodes["%relu\n1"]["location"] == "node/relu"
    edges = [(a, b, data["value"]) for a, b, data in view.edges(data=True)]
    assert sorted(edges) == sorted(
        [
            ("%x", "%relu\n1", "x"),
            ("%x", "%part", "x"),
            ("%relu\n1", "%total", "relu\n1"),
            ("%part", "%total", "part"),
            ("%total", "%twice", "total"),
            ("%total", "%twice", "total"),
            ("%twice", "return y", "twice"),
            ("%x", "return same", "x"),
        ]
    )
    assert {data["type"] for _, _, data in view.edges(data=True)} == {"Nx4 x f32"}


def test_the_view_serves_algorithms() -> None:
    view = diamond().to_networkx()
    assert networkx.is_directed_acyclic_graph(view)
    order = list(networkx.topological_sort(view))
    assert order.index("%part") < order.index("%total") < order.index("%twice") < order.index("return y")
    assert networkx.ancestors(view, "return same") == {"%x"}


def test_dot_names_every_node_once_and_escapes() -> None:
    text = diamond().to_dot()
    lines = text.splitlines()
    assert lines[0] == 'digraph "a \\"name\\"" {'
    assert lines[-1] == "}"
    assert '  "%relu\\n1" [label="Relu"];' in lines
    assert '  "%relu\\n1" -> "%total" [label="Nx4 x f32"];' in lines
    assert sum(line.endswith("];") and " -> " not in line for line in lines) == 7 + 1  # and the shape of all nodes
    assert sum(" -> " in line for line in lines) == 8
