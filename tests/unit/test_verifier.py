"""The verifier where texts do not reach: names and order. Findings on texts are `tests/golden/verifier/`."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qir.errors import Diagnostic, VerifyError
from qir.interval import Interval
from qir.ir import Graph, Stage, Value
from qir.ops.float_elementwise import Add, Relu
from qir.parser import parse
from qir.proof import prove
from qir.rewrite import map_values
from qir.types import S8, TensorType
from qir.verifier import find_faults, verify

PLAIN = TensorType((2,))


def graph_of(*ops: Relu | Add, inputs: tuple[Value, ...] = (), outputs: tuple[Value, ...] = ()) -> Graph:
    return Graph("g", Stage.FLOAT, inputs, ops, outputs, tuple(f"out{i}" for i in range(len(outputs))))


def found(graph: Graph) -> list[str]:
    return [str(f) for f in find_faults(graph)]


def test_a_legal_graph_has_no_faults() -> None:
    x, y = Value("x", PLAIN), Value("y", PLAIN)
    graph = graph_of(Relu(operands=(x,), results=(y,)), inputs=(x,), outputs=(y, x))
    assert find_faults(graph) == ()
    verify(graph)


def test_operands_are_defined_before_they_are_used() -> None:
    x, y, z = (Value(n, PLAIN) for n in "xyz")
    early = Relu(operands=(z,), results=(y,), location="n1")
    late = Relu(operands=(x,), results=(z,))
    assert found(graph_of(early, late, inputs=(x,), outputs=(y,))) == [
        'error: Relu %y (from node "n1"): reads %z, which is not defined before it'
    ]
    stranger = Relu(operands=(Value("x", PLAIN),), results=(y,))  # a namesake is not the value itself
    assert found(graph_of(stranger, inputs=(x,), outputs=(y,))) == [
        "error: Relu %y: reads %x, which is not defined before it"
    ]


def test_outputs_are_defined() -> None:
    x = Value("x", PLAIN)
    assert found(graph_of(inputs=(x,), outputs=(Value("y", PLAIN),))) == ["error: output 'out0': %y is not defined"]


def test_names_are_unique() -> None:
    x, y = Value("x", PLAIN), Value("y", PLAIN)
    twice = graph_of(Relu(operands=(x,), results=(replace(x),)), inputs=(x, replace(y)), outputs=(x,))
    assert found(twice) == ["error: Relu %x: the name %x is defined twice"]
    assert found(graph_of(inputs=(y, replace(y)), outputs=(y,))) == ["error: inputs: the name %y is defined twice"]
    again = graph_of(Relu(operands=(x,), results=(y,)), Add(operands=(x, y), results=(y,)), inputs=(x,), outputs=(y,))
    assert found(again) == ["error: Add %y: the name %y is defined twice"]


def test_every_fault_is_collected_in_graph_order() -> None:
    x = Value("x", TensorType((2,), S8))
    ops = [Relu(operands=(x,), results=(Value(f"y{i}", TensorType((3,))),), location=f"n{i}") for i in range(30)]
    graph = graph_of(*ops, inputs=(x,), outputs=(x,))
    with pytest.raises(VerifyError) as caught:
        verify(graph)
    assert [d.place for d in caught.value.diagnostics] == [f'Relu %y{i} (from node "n{i}")' for i in range(30)]
    lines = str(caught.value).split("\n")
    assert lines[0] == "graph @g is not legal, 30 finding(s):"
    assert lines[1] == '  error: Relu %y0 (from node "n0"): %y0 has shape 3, the op makes 2'
    assert (len(lines), lines[-1]) == (22, "  ... and 10 more")


def test_a_proof_can_be_given() -> None:
    text = "graph @g stage=fixed (%x: s8) {\n  %y = add %x, %x {overflow=none} : s16 in [-256, 254]\n  return %y\n}\n"
    graph = parse(text)
    verify(graph, prove(graph))
    narrow = map_values(graph, lambda v: {"range": Interval(0, 0)} if v.name == "y" else {})
    assert [f.message for f in find_faults(narrow, prove(narrow))] == [
        "states the range [0, 0], but [-256, 254] is what is proved; re-run range-analysis"
    ]


def test_the_proof_is_not_tried_on_a_graph_with_other_faults() -> None:
    text = "graph @g stage=fixed (%x: 2 x s8) {\n  %y = add %x, %x {overflow=none} : 3 x s8\n  return %y\n}\n"
    assert [f.message for f in find_faults(parse(text))] == ["%y has shape 3, the op makes 2"]


def test_diagnostics_read_as_sentences() -> None:
    assert str(Diagnostic("%x", "is odd")) == "error: %x: is odd"
    assert str(Diagnostic("%x", "is odd", "warning")) == "warning: %x: is odd"
