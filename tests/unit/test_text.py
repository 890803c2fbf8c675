"""The text of graphs and their files: what is printed, what is refused and where, and that files come whole."""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from qir.arrays import Array
from qir.errors import ParseError, QirError, ResourceError
from qir.interval import Interval
from qir.ir import Graph, Stage, Value
from qir.ops.constant import Const
from qir.ops.float_elementwise import Add, Relu
from qir.parser import parse
from qir.printer import number_text, op_text, print_graph, resource_names, resources
from qir.rewrite import GraphBuilder
from qir.serialization import read_graph, sidecar_name, whole_folder, write_bytes, write_graph
from qir.types import BATCH, S8, TensorType, affine, fixed_point

LARGE = np.arange(70, dtype=np.int8)


def with_large_constant(data: np.ndarray[Any, Any] = LARGE, name: str = "w") -> Graph:
    builder = GraphBuilder("large", Stage.FIXED)
    return builder.finish([builder.constant(Array(data, name), TensorType(data.shape, S8))], ["y"])


# Printing


def test_the_text_of_everything_a_value_can_have() -> None:
    kind = TensorType((BATCH, 2), affine(S8.narrowed(-127, 127), [0.1, 1e-30], [0, 3], 1))
    value = Value("a b", kind, Interval(-1.5, 3.0), Array(np.array([1, 2])), S8)
    op = Add(operands=(value, value), results=(Value("2", TensorType(())),), clip=(0.0, np.inf), location='a "node"')
    graph = Graph("g", Stage.TYPED, (value,), (op,), op.results, ("y",), "chip", {"mode": "fast", "n": 3, "on": True})
    assert print_graph(graph) == (
        'graph @g stage=typed target="chip" {mode=fast, n=3, on=true} '
        '(%"a b": Nx2 x s8[-127, 127]<[0.1, 1e-30], zero=[0, 3], axis=1> in [-1.5, 3.0] hist s64 2 [1, 2] '
        "storage s8) {\n"
        '  %2 = Add %"a b", %"a b" {clip=[0.0, inf]} : f32 loc("a \\"node\\"")\n'
        '  return %2 as "y"\n'
        "}\n"
    )
    assert str(graph) == print_graph(graph)
    assert op_text(op).startswith("%2 = Add")


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.1, "0.1"),
        (np.float32(0.1), "0.1"),
        (np.float64(0.1), "0.1"),
        (np.float64(1 / 3), "0.3333333333333333"),
        (1 / 3, "0.33333334"),
        (1e20, "1e+20"),
        (1.0, "1.0"),
        (float("-inf"), "-inf"),
        (np.uint64(2**64 - 1), "18446744073709551615"),
        (np.bool_(True), "1"),
        (7.038530691851209e-26, "7.03853069e-26"),
    ],
)
def test_numbers_print_as_the_shortest_text(number: float, text: str) -> None:
    assert number_text(number) == text


def test_words_that_would_be_read_as_something_else_are_quoted() -> None:
    words = {f"a_{w}": w for w in ("true", "false", "inf", "nan", "half_even", "Upper")}
    graph = with_large_constant().with_changes(attributes=words)
    head = print_graph(graph).split("\n")[0]
    assert 'a_true="true", a_false="false", a_inf="inf", a_nan="nan", a_half_even=half_even, a_Upper="Upper"' in head
    assert parse(print_graph(graph), resources(graph)) == graph


def test_large_arrays_have_one_name_each() -> None:
    builder = GraphBuilder("names", Stage.FIXED)
    datas = [(LARGE, "w"), (LARGE + 1, "w"), (LARGE + 2, ""), (LARGE, "again"), (LARGE + 3, "__metadata__")]
    made = [builder.constant(Array(d, n), TensorType(d.shape, S8)) for d, n in datas]
    graph = builder.finish(made, list("abcde"))
    assert list(resources(graph)) == ["w", "w.1", "constant", "constant.1"]
    assert print_graph(graph).count("value=@w}") == 2


def test_what_has_no_text_says_so() -> None:
    with pytest.raises(QirError, match="arrays of float16 have no text form"):
        print_graph(with_large_constant(np.zeros(3, np.float16)))
    for name in ("two words", "", "inf", "1st"):
        with pytest.raises(QirError, match=f"the name of the attribute '{name}' is no word"):
            with_large_constant().with_changes(attributes={name: 1})
    complex_attribute: Any = {"number": 1j}
    with pytest.raises(QirError, match="an attribute of type complex has no text form"):
        print_graph(with_large_constant().with_changes(attributes=complex_attribute))


# Reading

LEGAL = """graph @g stage=fixed (%x: Nx2 x s8<0.5>) {
  %a = requantize %x {multiplier=s64 [1], shift=s64 [0], form=neon, overflow=saturate} : Nx2 x s8
  %w = const {value=s8 2x1 [1, 2]} : 2x1 x s8
  %b = matmul %a, %w {accumulator=s32, overflow=wrap, order=khwc} : Nx1 x s32 in [-5, 5] partial in [-5, 5] loc("m")
  return %b as "y"
}
"""


def test_layout_and_comments_do_not_matter() -> None:
    graph = parse(LEGAL)
    assert parse(LEGAL.replace("\n", " \r\n\t // comment\n").replace(" ", "   ")) == graph
    joined = " ".join(LEGAL.split())
    assert parse(joined) == graph


# The text in place of another, a § where the error points, and what it says.
MALFORMED = [
    ("graph @g", "§grph @g", "expected 'graph', found 'grph'"),
    ("graph @g", "graph §%g", "expected a graph name such as @digits, found '%g'"),
    ("stage=fixed", "stage=§final", "unknown stage 'final'; the stages are float, ranged, typed, fixed"),
    ("stage=fixed", "stage=fixed target=§chip", "expected a target name in quotes, found 'chip'"),
    ("stage=fixed", "stage=fixed {a=1, §a=2}", "'a' is given twice"),
    ("stage=fixed", "stage=fixed {a=§}", "expected an attribute value, found '}'"),
    ("(%x:", "(§x:", "expected an input such as %x, found 'x'"),
    ("(%x: Nx2 x s8<0.5>", "(%x: s8, §%x: Nx2 x s8<0.5>", "%x is defined twice"),
    ("%a = req", "§%x = req", "%x is defined twice"),
    ("%a = req", "§a = req", "expected a result such as %0, or return, found 'a'"),
    ("%a = req", "%a §req", "expected '=', found 'requantize'"),
    ("requantize %x", "§requantise %x", "unknown op 'requantise'"),
    ("requantize %x", "requantize §%z", "%z is used before it is defined"),
    ("requantize %x", "requantize %x, §x", "expected a value such as %x, found 'x'"),
    ("form=neon", "§from=neon", "requantize has no attribute 'from'; it has: multiplier, shift, form"),
    ("form=neon", "form=§nein", "'nein' is not one of double_round, single_round, neon"),
    ("{multiplier=s64 [1], ", "§{", "requantize lacks its attribute 'multiplier'"),
    ("form=neon", "form=neon, §form=neon", "'form' is given twice"),
    ("form=neon", "form=neon, input_shift=§1.5", "expected an integer, found '1.5'"),
    ("form=neon", "form=neon §form=neon", "expected ',', found 'form'"),
    ("order=khwc", "order=khwc, §partial=[0, 1]", "matmul has no attribute 'partial'"),
    ("s64 [1], ", "s64 [1, §", "expected a number, found 'shift'"),
    ("s64 [1]", "s64 §[1.5]", "bad array: 1.5 is no s64"),
    ("s64 [1]", "s8 §[128]", "bad array: 128 is no s8"),
    ("s64 [1]", "u64 §[-1]", "bad array: -1 is no u64"),
    ("s64 [1]", "bool §[2]", "bad array: 2 is no bool"),
    ("s64 [1]", "f32 §[1e39]", "bad array: 1e+39 is no f32"),
    ("s64 [1]", "§s7 [1]", "unknown element type 's7' of an array"),
    ("s64 [1]", "§[1]", "expected an array such as s8 2 [1, 2] or @name, found '['"),
    ("s64 [1]", "§@big", "@big is not listed under resources"),
    ("s8 2x1 [1, 2]", "s8 2x2 §[1, 2]", "bad array: 2 numbers do not fit the shape [2, 2]"),
    ("s8 2x1 [1, 2]", "s8 §1e5 [1, 2]", "bad shape '1e5'"),
    (": 2x1 x s8", ": 2x1 §s8", "expected 'x', found 's8'"),
    (": 2x1 x s8", ": 2x1 x §s65", "an integer type has 1 to 64 bits, not 65"),
    (": 2x1 x s8", ": 2x1 x §s0", "an integer type has 1 to 64 bits, not 0"),
    (": 2x1 x s8", ": 2x1 x §f64", "expected an element type such as f32, s8 or u4, found 'f64'"),
    (": 2x1 x s8", ": 2x1 x §s8[0, 128]", "storage bounds [0, 128] do not fit s8"),
    (": 2x1 x s8", ": 2x1 x §s8<0.0>", "every scale must be positive and finite"),
    (": 2x1 x s8", ": 2x1 x s8<0.5, zero=§1.5>", "bad array: 1.5 is no s64"),
    (": 2x1 x s8", ": 2x1 x §s8<0.5, zero=128>", "every zero point must lie in s8"),
    (": 2x1 x s8", ": §2x1 x s8<[0.5], axis=0>", "1 scales do not fit axis 0 of shape 2x1"),
    (": 2x1 x s8", ": 2x1 x §s8<2^200>", "every exponent must lie in [-149, 127]"),
    (": 2x1 x s8", ": 2x1 x s8<0.5§; zero=1>", "unexpected character ';'"),
    (": 2x1 x s8", ": §2xN x s8", "unexpected character '2'"),
    ("in [-5, 5]", "in §[5, -5]", "empty interval [5, -5]"),
    ("in [-5, 5]", "in [-5, §1e39]", "'1e39' is beyond float32"),
    ("in [-5, 5]", "in [-5, §1e400]", "'1e400' is beyond float64"),
    ("in [-5, 5]", f"in [-5, §{'9' * 5000}]", "a number takes at most 60 characters, not 5000"),
    ('loc("m")', "loc(§m)", "expected a location in quotes, found 'm'"),
    ('loc("m")', 'loc(§"\\q")', "bad string: Invalid \\escape"),
    ('loc("m")', 'loc(§"m)', "unexpected character '\"'"),
    ("return %b", "return §%c", "%c is used before it is defined"),
    ('as "y"', "as §y", "expected an output name in quotes, found 'y'"),
    ("\n}\n", "\n§", "expected ',', found 'end of text'"),
    ("\n}\n", "\n} §}\n", "expected the end of the text, found '}'"),
    ("\n}\n", "\n}\nresources {@w : s8 2 §[1]}", "expected 'sha256', found '['"),
    ("\n}\n", "\n}\nresources {@w : §t9}", "expected an element type such as f32, s8 or u4, found 't9'"),
    ("\n}\n", "\n}\nresources {@w : s9 §Nx3}", "a resource has no open dimension, found 'Nx3'"),
    ("\n}\n", "\n}\nresources {@w : §s9{1}}", "an integer type has 2 to 64 levels, not 1"),
    (": 2x1 x s8", ": 2x1 x §s8{}", "an integer type has 2 to 64 levels, not 0"),
    (": 2x1 x s8", ": 2x1 x §s8{2, 1}", "levels ascend, and [2, 1] do not"),
    (": 2x1 x s8", ": 2x1 x §s4{-9, 1}", "storage bounds [-9, 1] do not fit s4, which holds [-8, 7]"),
    (": 2x1 x s8", ": 2x1 x s8{1, §a}", "expected an integer, found 'a'"),
    (": 2x1 x s8", ": 2x1 x s8{1 §2}", "expected ',', found '2'"),
    (": 2x1 x s8", ": 2x1 x §s8{1, 2}<0.5, zero=1>", "levels have no zero point but 0"),
    (": 2x1 x s8", ": 2x1 x s8{1, 2}§[1, 2]", "expected a result such as %0, or return, found '['"),
    ("\n}\n", '\n}\nresources {@w : s8 sha256="" §@w : s8 sha256=""}', "@w is listed twice"),
    ("\n}\n", "\n}\nresources {} §}", "expected the end of the text, found '}'"),
]


@pytest.mark.parametrize(("old", "new", "message"), MALFORMED, ids=[new[:40] for _, new, _ in MALFORMED])
def test_a_malformed_text_is_refused_with_its_place(old: str, new: str, message: str) -> None:
    marked = LEGAL.replace(old, new, 1)
    before = marked[: marked.index("§")]
    line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
    with pytest.raises(ParseError) as caught:
        parse(marked.replace("§", ""), source="file.qir")
    assert str(caught.value).startswith(f"file.qir:{line}:{column}: ")
    assert message in str(caught.value)
    assert (caught.value.line, caught.value.column) == (line, column)


@pytest.mark.parametrize("size", range(0, len(LEGAL) - 2, 7))
def test_a_truncated_text_is_refused(size: int) -> None:
    with pytest.raises(ParseError):
        parse(LEGAL[:size])


def test_attribute_kinds_of_graphs() -> None:
    text = 'graph @g stage=float {a=true, b=-3, c=0.1, d="x y", e=word, f=[1, 2.5], g=[]} () {\n  return\n}\n'
    graph = parse(text)
    single = float(np.float32(0.1))
    assert dict(graph.attributes) == {"a": True, "b": -3, "c": single, "d": "x y", "e": "word", "f": (1, 2.5), "g": ()}
    assert print_graph(graph) == text


# Sidecars


def test_resources_are_checked() -> None:
    graph = with_large_constant()
    text = print_graph(graph, "side.safetensors")
    assert '\nresources "side.safetensors" {\n  @w : s8 70 sha256="' in text
    assert parse(text, {"w": Array(LARGE, "other name")}) == graph
    with pytest.raises(ResourceError, match=r"t\.qir:6: resource @w is not in the sidecar"):
        parse(text, {}, "t.qir")
    for other in (LARGE + 1, LARGE.astype(np.int16), LARGE.reshape(7, 10)):
        with pytest.raises(ResourceError, match=r"resource @w: the sidecar's array has hash .*, the text states "):
            parse(text, {"w": Array(other)})
    with pytest.raises(ParseError, match="positive and finite"):  # of integers
        parse(text.replace(" 70 x s8", " 70 x s8<@w, axis=0>"), resources(graph))


def test_quantization_parameters_over_64_elements_are_resources() -> None:
    scales, zeros = np.linspace(0.1, 1, 70), np.arange(70)
    builder = GraphBuilder("large", Stage.TYPED)
    builder.input("x", TensorType((BATCH, 70), affine(S8, scales, zeros, 1, name="x")))
    builder.input("z", TensorType((70,), fixed_point(S8, zeros, 0)))
    graph = builder.finish(builder.inputs, ["x", "z"])
    assert "%x: Nx70 x s8<@x.scale, zero=@x.zero, axis=1>, %z: 70 x s8<2^@x.zero, axis=0>" in print_graph(graph)
    assert parse(print_graph(graph), resources(graph)) == graph


def test_files(tmp_path: Path) -> None:
    graph = with_large_constant()
    write_graph(graph, tmp_path / "a.qir")
    write_graph(graph.with_changes(name="b"), tmp_path / "b.qir")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.qir", "b.qir", sidecar_name(resource_names(graph))]
    assert read_graph(tmp_path / "a.qir") == graph
    assert (tmp_path / "a.qir").stat().st_mode & 0o777 == 0o666 & ~_umask()
    write_graph(with_large_constant(LARGE + 1), tmp_path / "c.qir", 'odd "name"')
    assert read_graph(tmp_path / "c.qir") == with_large_constant(LARGE + 1)
    write_graph(with_large_constant(LARGE + 2), tmp_path / "c.qir", 'odd "name"')
    assert read_graph(tmp_path / "c.qir") == with_large_constant(LARGE + 2)
    small = with_large_constant(LARGE[:3])
    write_graph(small, str(tmp_path / "d.qir"))
    assert len(list(tmp_path.iterdir())) == 6
    assert read_graph(str(tmp_path / "d.qir")) == small


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_names_beyond_utf_8_are_written(tmp_path: Path) -> None:
    graph = with_large_constant(LARGE[:3]).with_changes(name="broken \ud800 name")
    write_graph(graph, tmp_path / "a.qir")
    assert read_graph(tmp_path / "a.qir") == graph


@pytest.mark.parametrize(
    ("sidecar", "message"),
    [
        ("none.safetensors", "its sidecar .* is missing; keep the two files together"),
        ("../outside.safetensors", "must lie beside the text, under a plain file name"),
        ("/etc/passwd", "must lie beside the text"),
        ("..", "is missing"),
        (".", "must lie beside the text"),
        ("", "is missing"),
        ("folder", "is missing"),
        ("truncated", "not a readable safetensors file"),
        ("brain", "not a readable safetensors file"),
        ("eight", "not a readable safetensors file"),
        ("other", "the sidecar was changed or belongs to another text"),
        ("empty", "resource @w is not in the sidecar"),
    ],
)
def test_a_bad_sidecar_is_refused(tmp_path: Path, sidecar: str, message: str) -> None:
    folder = tmp_path / "inner"
    (folder / "folder").mkdir(parents=True)
    save_file({"w": LARGE}, tmp_path / "outside.safetensors")
    save_file({"w": LARGE + 1}, folder / "other")
    save_file({}, folder / "empty")
    (folder / "truncated").write_bytes((folder / "other").read_bytes()[:-1])
    for name, dtype, size in (("brain", "BF16", 2), ("eight", "F8_E4M3", 1)):
        head = json.dumps({"w": {"dtype": dtype, "shape": [1], "data_offsets": [0, size]}}).encode()
        (folder / name).write_bytes(struct.pack("<Q", len(head)) + head + bytes(size))
    (folder / "graph.qir").write_text(print_graph(with_large_constant(), "x").replace('"x"', json.dumps(sidecar)))
    with pytest.raises(ResourceError, match=message):
        read_graph(folder / "graph.qir")


def test_unreadable_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(QirError, match=r"cannot read .*none\.qir: No such file"):
        read_graph(tmp_path / "none.qir")
    with pytest.raises(QirError, match=r"cannot read .*: Is a directory"):
        read_graph(tmp_path)
    (tmp_path / "binary.qir").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(QirError, match=r"cannot read .*binary\.qir: it is not UTF-8 text"):
        read_graph(tmp_path / "binary.qir")
    (tmp_path / "bad.qir").write_text("graph")
    with pytest.raises(ParseError, match=r"bad\.qir:1:6: expected a graph name"):
        read_graph(tmp_path / "bad.qir")


# Whole or not at all


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def fail(source: str, target: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(QirError, match=r"cannot write .*file: No space left on device; choose a place"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_unwritable_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file" / "graph.qir", tmp_path / "none" / "graph.qir", tmp_path):
        with pytest.raises(QirError, match=r"cannot write .*; choose a place that can be written"):
            write_graph(with_large_constant(LARGE[:3]), place)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_nothing_is_written_for_a_graph_without_text(tmp_path: Path) -> None:
    with pytest.raises(QirError, match="no text form"):
        write_graph(with_large_constant(np.zeros(70, np.float16)), tmp_path / "graph.qir")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "some" / "build"
    with whole_folder(target) as place:
        (place / "graph.qir").write_text("one")
        assert not target.exists()
    assert [p.name for p in target.iterdir()] == ["graph.qir"]
    with whole_folder(target) as place:
        (place / "other.qir").write_text("two")
    assert [p.name for p in target.iterdir()] == ["other.qir"]

    def interrupted() -> None:
        with whole_folder(target) as place:
            (place / "half.qir").write_text("three")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [p.name for p in target.iterdir()] == ["other.qir"]
    assert [p.name for p in target.parent.iterdir()] == ["build"]


def test_a_folder_with_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("in the way")
    for target, message in (
        (tmp_path, "exists and holds"),
        (tmp_path / "file", "exists and holds"),
        (tmp_path / "file" / "build", "cannot write"),
    ):
        with pytest.raises(QirError, match=message), whole_folder(target):
            pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "thesis.txt"]


def test_an_old_folder_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "build"
    with whole_folder(target) as place:
        (place / "graph.qir").write_text("old")
    replace, calls = os.replace, []

    def fail_once(source: Path, destination: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError(18, "Invalid cross-device link")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises(QirError, match=r"cannot replace .*build: Invalid cross-device link"), whole_folder(target):
        pass
    assert (target / "graph.qir").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["build"]


def test_ops_print_without_a_graph() -> None:
    x = Value("x", TensorType((2,)))
    assert op_text(Relu(operands=(x,), results=(Value("y", x.type),))) == "%y = Relu %x : 2 x f32"
    const = Const(results=(Value("w", TensorType((70,), S8)),), value=Array(LARGE, "w"))
    assert op_text(const) == "%w = const {value=@w} : 70 x s8"


def test_an_island_is_marked_at_stage_fixed_and_only_there() -> None:
    text = (
        "graph @g stage=fixed (%x: Nx2 x f32) {\n"
        "  %a = Add %x, %x : Nx2 x f32 island\n"
        '  %t = Tanh %a : Nx2 x f32 island tolerance loc("t")\n'
        "  return %t\n}\n"
    )
    assert print_graph(parse(text)) == text
    early = text.replace("stage=fixed", "stage=float").replace(" island tolerance", "").replace(" island", "")
    assert print_graph(parse(early)) == early
    for wrong, message in (
        (text.replace(" island tolerance", " island"), "<text>:3:28: Tanh must be marked 'island tolerance' here"),
        (text.replace(" island\n", "\n"), "Add must be marked 'island' here"),
        (text.replace("fixed", "float"), "<text>:2:31: this op is no island"),
    ):
        with pytest.raises(ParseError, match=re.escape(message)):
            parse(wrong)
