"""The interpreter: feeds and their errors, stages, tracing, and dropping what is no longer read."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest

from qir.errors import QirError, RunError
from qir.interpreter import evaluate, evaluate_op, interpret, trace
from qir.ir import Graph
from qir.parser import parse
from qir.proof import prove

FLOAT = """graph @float stage=float (%x: Nx2 x f32, %y: 2 x f32) {
  %s = Add %x, %y : Nx2 x f32
  %i = ArgMax %s {axis=1, keepdims=false} : N x s64
  return %s as "sum", %i as "index", %x as "same"
}
"""
FIXED = """graph @fixed stage=fixed {input_rule=divide, input_rounding=half_even}
    (%x: Nx2 x s8<0.5, zero=-1>, %n: N x u4) {
  %s = add %x, %x {overflow=saturate} : Nx2 x s8
  return %s, %n
}
"""
REALS = np.array([[1, 2], [3, 4], [9, 5]], np.float32)
OFFSET = np.array([10, 20], np.float32)


def float_feeds(**changes: Any) -> dict[str, Any]:
    return {"x": REALS, "y": OFFSET, **changes}


def fixed_feeds(**changes: Any) -> dict[str, Any]:
    return {"x": np.array([[1, 2], [-128, 127]], np.int8), "n": np.array([3, 15]), **changes}


def test_outputs_by_name() -> None:
    found = interpret(parse(FLOAT), float_feeds())
    assert list(found) == ["sum", "index", "same"]
    assert found["sum"].tolist() == [[11, 22], [13, 24], [19, 25]]
    assert (found["index"].tolist(), found["index"].dtype.name) == ([1, 1, 1], "int64")
    assert found["same"].tolist() == REALS.tolist()


def test_lists_integers_and_float64_become_float32() -> None:
    feeds: dict[str, Any] = {"x": [[1, 2]], "y": np.array([0.1, 1e-60])}
    found = interpret(parse(FLOAT), feeds)["sum"]
    assert found.dtype == np.float32
    assert found.tolist() == [[np.float32(1) + np.float32(0.1), 2.0]]


def test_integers_of_any_dtype_are_stored_in_the_smallest() -> None:
    found = interpret(parse(FIXED), fixed_feeds())
    assert found["s"].tolist() == [[4, 6], [-128, 127]]
    assert (found["s"].dtype.name, found["n"].dtype.name) == ("int8", "uint8")
    assert interpret(parse(FIXED), fixed_feeds(), unbounded=True)["s"].tolist() == found["s"].tolist()


def test_reals_for_a_quantized_input_are_quantized_as_the_graph_says() -> None:
    graph = parse(FIXED)
    reals = np.array([[0.25, 0.75], [-1000, 1000]], np.float32)  # 0.5 and 1.5 steps: to even 0 and 2, then -1
    assert trace(graph, fixed_feeds(x=reals))["x"].tolist() == [[-1, 1], [-128, 127]]
    with pytest.raises(QirError, match="graph @fixed must state input_rule"):
        interpret(graph.with_changes(attributes={}), fixed_feeds(x=reals))


@pytest.mark.parametrize(
    ("text", "feeds", "message"),
    [
        (FLOAT, {"x": REALS}, r"the inputs are \['x', 'y'\]; missing \['y'\], unknown \[\]"),
        (FLOAT, float_feeds(z=1), r"missing \[\], unknown \['z'\]"),
        (FLOAT, float_feeds(x=OFFSET), "input 'x' has shape 2, expected Nx2"),
        (FLOAT, float_feeds(x=1.0), r"input 'x' has shape \(\), expected Nx2"),
        (FLOAT, float_feeds(y=np.zeros(3)), "input 'y' has shape 3, expected 2"),
        (FLOAT, float_feeds(x=[[1, 2], [3]]), "input 'x' is no array"),
        (FLOAT, float_feeds(x=[["a", "b"]]), "input 'x' is of <U1, expected float32"),
        (FLOAT, float_feeds(x=REALS.astype(np.complex64)), "input 'x' is of complex64, expected float32"),
        (FLOAT, float_feeds(x=REALS.astype(bool)), "input 'x' is of bool, expected float32"),
        (FLOAT, float_feeds(x=REALS.astype(object)), "input 'x' is of object, expected float32"),
        (FLOAT, float_feeds(y=[np.nan, 0]), "input 'y' holds NaN or infinity"),
        (FLOAT, float_feeds(y=[np.inf, 0]), "input 'y' holds NaN or infinity"),
        (FLOAT, float_feeds(y=[1e39, 0]), "input 'y' holds NaN or infinity"),
        (FIXED, fixed_feeds(n=[1, 2, 3]), "input 'n' has a batch of 3, another input one of 2"),
        (FIXED, fixed_feeds(n=[1, 16]), r"input 'n' spans \[1, 16\], beyond its type's \[0, 15\]"),
        (FIXED, fixed_feeds(n=[-1, 0]), r"input 'n' spans \[-1, 0\], beyond its type's \[0, 15\]"),
        (FIXED, fixed_feeds(n=[0.5, 1]), "input 'n' is of float64, expected integers of u4"),
        (FIXED, fixed_feeds(n=["1", "2"]), "input 'n' is of <U1, expected integers of u4"),
        (FIXED, fixed_feeds(x=[[128, 0], [0, 0]]), r"input 'x' spans \[0, 128\], beyond its type's \[-128, 127\]"),
    ],
)
def test_feeds_that_do_not_fit(text: str, feeds: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        interpret(parse(text), feeds)


def test_an_empty_batch() -> None:
    found = interpret(parse(FIXED), {"x": np.zeros((0, 2), np.int8), "n": np.zeros(0, np.int64)})
    assert (found["s"].shape, found["n"].shape) == ((0, 2), (0,))


def test_at_typed_every_result_is_on_its_grid() -> None:
    graph = parse(
        "graph @typed stage=typed (%x: N x s8<0.5> in [-64.0, 63.5], %z: N x f32 in [0.0, 1.0]) {\n"
        "  %w = const {value=f32 [0.3]} : s8<0.25> in [0.3, 0.3]\n"
        "  %y = Mul %x, %w : N x s8[-2, 2]<2^-2>\n"
        "  return %y, %w, %x, %z\n}\n"
    )
    found = interpret(graph, {"x": [0.75, 1.3, 1000.0, 0.0], "z": [0.1, 0.2, 0.3, 0.4]})
    assert found["x"].tolist() == [1.0, 1.5, 63.5, 0.0]  # 1.5 steps to even is 2
    assert found["w"].tolist() == 0.25
    assert found["y"].tolist() == [0.25, 0.5, 0.5, 0.0]  # 0.375 is 1.5 steps, and 2 is the most
    assert found["z"].tolist() == np.array([0.1, 0.2, 0.3, 0.4], np.float32).tolist()
    assert all(array.dtype == np.float32 for array in found.values())
    integers = interpret(graph, {"x": np.array([2, 3, 127, 0], np.int8), "z": [0.1, 0.2, 0.3, 0.4]})
    assert {n: a.tolist() for n, a in integers.items()} == {n: a.tolist() for n, a in found.items()}


def test_trace_has_every_value() -> None:
    graph = parse(FLOAT)
    assert list(trace(graph, float_feeds())) == [v.name for v in graph.values()]


def test_arrays_are_dropped_after_their_last_use() -> None:
    lines = [f"  %{i + 1} = Relu %{i} : N x f32" for i in range(20)]
    graph = parse("graph @chain stage=float (%0: N x f32) {\n" + "\n".join(lines) + "\n  return %20\n}\n")
    alive: list[weakref.ref[Any]] = []
    for _, array in evaluate(graph, {"0": np.ones(1000, np.float32)}):
        alive.append(weakref.ref(array))
        del array
        assert sum(ref() is not None for ref in alive) <= 3


def test_infinite_intermediate_values_are_no_warning() -> None:
    graph = parse(
        "graph @g stage=float (%x: N x f32) {\n"
        "  %y = Mul %x, %x : N x f32\n"
        "  %z = Div %x, %x : N x f32\n"
        "  return %y, %z\n}\n"
    )
    found = interpret(graph, {"x": [3e38, 0.0]})
    assert found["y"].tolist() == [np.inf, 0.0]
    assert found["z"][0] == 1
    assert np.isnan(found["z"][1])


def test_wide_integers_are_exact_by_themselves() -> None:
    """Where 64 bits do not hold an intermediate value, Python ints do without being asked for."""
    graph = parse(
        "graph @g stage=fixed (%a: N x s64, %b: N x u64) {\n"
        "  %p = mul %a, %a {overflow=saturate} : N x s64\n"
        "  %q = mul %b, %b {overflow=wrap} : N x u64\n"
        "  %r = requantize %a {multiplier=s64 [1073741824], shift=s64 [1], form=single_round, "
        "overflow=saturate} : N x s64\n"
        "  return %p, %q, %r\n}\n"
    )
    found = interpret(graph, {"a": [-(2**63), 2**62 + 1], "b": np.array([2**64 - 1, 2**63 + 1], np.uint64)})
    assert found["p"].tolist() == [2**63 - 1, 2**63 - 1]
    assert found["q"].tolist() == [(2**64 - 1) ** 2 % 2**64, (2**63 + 1) ** 2 % 2**64]
    assert found["r"].tolist() == [-(2**63), 2**62 + 1]


def test_one_op_alone() -> None:
    graph: Graph = parse(FIXED)
    (found,) = evaluate_op(graph.ops[0], [np.array([[5, 6]], np.int8), np.array([[7, 100]], np.int8)])
    assert (found.tolist(), found.dtype.name) == ([[14, 108]], "int8")


SCALARS = {
    "div": ("div %x, %x {overflow=saturate, multiplier=1073741824, shift=-31}", "s64"),
    "requantize": (
        "requantize %x {multiplier=s64 [1073741824], shift=s64 [-3], form=double_round, input_shift=0, overflow=wrap}",
        "u64",
    ),
    "a large shift": (
        "requantize %x {multiplier=s64 [1], shift=s64 [62], form=shift, input_shift=31, rounding=floor, "
        "overflow=saturate}",
        "s64",
    ),
    "transpose": ("transpose %x {perm=[PERM]}", "s8"),
    "slice": ("slice %x {starts=[], ends=[], axes=[], steps=[]}", "s8"),
    "pad": ("pad %x {pads=[PADS], value=0}", "s8"),
}


@pytest.mark.parametrize("name", SCALARS)
def test_a_scalar_is_computed_as_a_row_of_one(name: str) -> None:
    """However wide: of 0-d arrays of Python ints NumPy makes ints."""
    op, kind = SCALARS[name]
    text = f"graph @g stage=fixed (%x: SHAPE s8) {{\n %y = {op} : SHAPE {kind}\n return %y\n}}"
    scalar, row = (
        parse(text.replace("SHAPE", s).replace("PADS", p).replace("PERM", p[:1]))
        for s, p in (("", ""), ("1 x", "0, 0"))
    )
    for number in (-128, -5, 0, 127):
        expected = interpret(row, {"x": np.array([number], np.int8)})["y"]
        found = interpret(scalar, {"x": np.array(number, np.int8)})["y"]
        assert (found.shape, found.dtype) == ((), expected.dtype)
        assert found.tolist() == expected[0]
        assert prove(scalar, "affine").interval(scalar.value("y")) == prove(row).interval(row.value("y"))
