"""Whatever a graph holds, its text gives it back; whatever a text says, it is read or refused with an error of ours."""

from __future__ import annotations

import enum
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qir.arrays import Array
from qir.errors import ParseError, QirError
from qir.interpreter import trace
from qir.interval import Interval
from qir.ir import Graph, Op, Stage, Value, attribute_kinds
from qir.ops import OPS
from qir.parser import parse, tokenize
from qir.printer import number_text, print_graph, resources
from qir.proof import prove
from qir.rewrite import GraphBuilder
from qir.serialization import read_graph, write_graph
from qir.types import (
    BATCH,
    F32,
    AffineType,
    ElementType,
    FixedPointType,
    IntegerType,
    Shape,
    TensorType,
    container_bounds,
    storage_of,
)
from qir.verifier import find_faults

GOLDEN = Path(__file__).parents[1] / "golden"
ODD_NAMES = ["", '"', "\\", '"}) // \n', "N", "Nx2", "inf", "return", "a b", "%x", "@", "ümläut", "\u2028", "\0", "-1"]
names = st.one_of(st.sampled_from([*ODD_NAMES, "__metadata__"]), st.text(max_size=8), st.from_regex(r"[a-z]\w{0,5}"))
words = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
floats = st.floats(width=32, allow_nan=False)
integers = st.integers(-(2**70), 2**70)

_NUMBERS: dict[str, st.SearchStrategy[Any]] = {
    "float32": st.floats(width=32),
    "float64": st.floats(),
    "bool": st.booleans(),
    **{
        f"{kind}{bits}": st.integers(*container_bounds(bits, kind == "int"))
        for kind in ("int", "uint")
        for bits in (8, 16, 32, 64)
    },
}


@st.composite
def arrays(draw: st.DrawFn, dtypes: tuple[str, ...] = tuple(_NUMBERS), ranks: tuple[int, ...] = (0, 1, 2)) -> Array:
    """Of every dtype, about as often in the text as in the sidecar; NaN is the usual one."""
    dtype = draw(st.sampled_from(dtypes))
    shape = tuple(draw(st.sampled_from([0, 1, 2, 3, 65])) for _ in range(draw(st.sampled_from(ranks))))
    few = draw(st.lists(_NUMBERS[dtype], min_size=1, max_size=5))
    data = np.resize(np.array(few, dtype), shape)
    return Array(np.where(np.isnan(data), np.nan, data).astype(dtype) if data.dtype.kind == "f" else data, draw(names))


@st.composite
def integer_types(draw: st.DrawFn) -> IntegerType:
    bits, signed = draw(st.integers(1, 64)), draw(st.booleans())
    lo, hi = container_bounds(bits, signed)
    if 2 <= bits <= 32 and draw(st.booleans()):
        levels = sorted(draw(st.sets(st.integers(lo, hi), min_size=2, max_size=min(64, hi - lo + 1))))
        return IntegerType(bits, signed, levels[0], levels[-1], tuple(levels))
    if draw(st.booleans()):
        lo, hi = sorted(draw(st.tuples(st.integers(lo, hi), st.integers(lo, hi))))
    return IntegerType(bits, signed, lo, hi)


@st.composite
def tensor_types(draw: st.DrawFn) -> TensorType:
    shape: Shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 65, 10**9]), max_size=3)))
    if draw(st.booleans()):
        shape = (BATCH, *shape)
    return TensorType(shape, draw(elements(shape)))


@st.composite
def elements(draw: st.DrawFn, shape: Shape) -> ElementType:
    kind = draw(st.sampled_from(["float", "integer", "affine", "fixed point"]))
    if kind == "float":
        return F32
    storage = draw(integer_types())
    if kind == "integer":
        return storage
    axes = [None, *(a for a, d in enumerate(shape) if isinstance(d, int) and d < 100)]
    axis = draw(st.sampled_from(axes))
    count = () if axis is None else (shape[axis],)

    def parameter(numbers: st.SearchStrategy[Any], dtype: type[np.generic]) -> Array:
        few = draw(st.lists(numbers, min_size=1, max_size=3))
        return Array(np.resize(np.array(few, dtype), typing.cast("tuple[int, ...]", count)), draw(names))

    if kind == "fixed point":
        return FixedPointType(storage, parameter(st.integers(-149, 127), np.int64), axis)
    low, high = container_bounds(storage.bits, storage.signed)
    zero = st.one_of(st.just(0), *([st.integers(low, min(high, 2**63 - 1))] if storage.levels is None else []))
    scale = st.floats(0, width=32, exclude_min=True, allow_infinity=False)
    return AffineType(storage, parameter(scale, np.float32), parameter(zero, np.int64), axis)


def intervals(numbers: st.SearchStrategy[Any]) -> st.SearchStrategy[Interval]:
    return st.tuples(numbers, numbers).map(lambda ends: Interval(min(ends), max(ends)))


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), strategy)


@st.composite
def values(draw: st.DrawFn, name: str) -> Value:
    return Value(
        name,
        draw(tensor_types()),
        draw(
            maybe(st.one_of(intervals(floats), intervals(integers), intervals(st.one_of(floats, st.integers(-9, 9)))))
        ),
        draw(maybe(arrays(("int64", "float32")))),
        draw(maybe(integer_types())),
    )


def attributes(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of a declared kind."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return maybe(attributes(next(k for k in typing.get_args(kind) if k is not type(None))))
    if typing.get_origin(kind) is tuple:
        return st.lists(attributes(typing.get_args(kind)[0]), max_size=4).map(tuple)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return st.sampled_from(kind)
    known: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: integers,
        float: floats,
        str: st.one_of(names, words),
        Array: arrays(),
        IntegerType: integer_types(),
        Interval: intervals(integers),
    }
    return known[kind]


@st.composite
def ops(draw: st.DrawFn, known: list[Value], fresh: Callable[[], str]) -> Op:
    """Any op with any attributes, operands and results: the text does not ask whether they fit."""
    op_class = draw(st.sampled_from(OPS))
    given_attributes = {}
    for field in fields(op_class):
        kind = attribute_kinds(op_class).get(field.name)
        if kind is not None and (field.default is MISSING or draw(st.booleans())):
            given_attributes[field.name] = draw(attributes(kind))
            if given_attributes[field.name] is None and field.default is not None:
                del given_attributes[field.name]
    operands = tuple(draw(st.lists(st.sampled_from(known), max_size=3))) if known else ()
    results = tuple(draw(values(fresh())) for _ in range(draw(st.sampled_from([1, 1, 1, 2]))))
    return op_class(operands=operands, results=results, location=draw(names), **given_attributes)


@st.composite
def any_graphs(draw: st.DrawFn) -> Graph:
    """Not legal, but printable: nothing here depends on what ops mean."""
    builder = GraphBuilder("")  # for its fresh names

    def fresh() -> str:
        return builder.fresh(draw(names))

    inputs = tuple(draw(values(fresh())) for _ in range(draw(st.integers(0, 2))))
    known, made = list(inputs), []
    for _ in range(draw(st.integers(0, 4))):
        made.append(draw(ops(known, fresh)))
        known += made[-1].results
    outputs = tuple(draw(st.lists(st.sampled_from(known), max_size=2))) if known else ()
    choices = st.one_of(
        st.booleans(), integers, floats, names, words, st.lists(integers).map(tuple), st.lists(floats).map(tuple)
    )
    return Graph(
        draw(names),
        draw(st.sampled_from(Stage)),
        inputs,
        tuple(made),
        outputs,
        tuple(draw(names) for _ in outputs),
        draw(names),
        draw(st.dictionaries(words, choices, max_size=3)),
    )


@settings(max_examples=max(400, settings().max_examples))
@given(graph=any_graphs(), sidecar=names)
def test_text_gives_the_graph_back(graph: Graph, sidecar: str) -> None:
    text = print_graph(graph, sidecar)
    again = parse(text, resources(graph))
    assert again == graph
    assert print_graph(again, sidecar) == text
    assert resources(again) == resources(graph)
    assert list(resources(again)) == list(resources(graph))


@settings(max_examples=60)
@given(graph=any_graphs())
def test_files_give_the_graph_back(graph: Graph, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("graph")
    write_graph(graph, folder / "graph.qir")
    assert read_graph(folder / "graph.qir") == graph
    assert len(list(folder.iterdir())) == 1 + bool(resources(graph))


@settings(max_examples=max(1000, settings().max_examples))
@given(number=st.floats(width=32, allow_nan=False))
@example(number=7.038530691851209e-26)  # its shortest text, read by way of float64, is its neighbour
@example(number=-0.0)
@example(number=16777216.0)
def test_floats_give_themselves_back(number: float) -> None:
    text = number_text(np.float32(number))
    found = np.float32(float(text))
    assert found.tobytes() == np.float32(number).tobytes()
    assert len(text) <= len(f"{number:.9e}") + 1
    assert [t.kind for t in tokenize(text, "")] == ["number", "end"]


_TEXTS = [p.read_text(encoding="utf-8").split("// CHECK")[0] for p in sorted(GOLDEN.rglob("*.qir"))]
_SMALL = [*map(str, (0, 1, -1, 2, 3, 5, 7, 64, 65, 127, 128, 200, 255, -128, -129, 1.5, 0.5)), "inf", "-inf", "nan"]
_LARGE = [*map(str, (2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**30)), "1" * 5000, "1e39", "1e400", "1e-45"]
_SHAPES = ["N", "Nx1", "Nx2", "Nx0", "1x1x1x1", "Nx4x4x2", "2x3x3x1", "2x2", "Nx65", "N x", "x"]
_TYPES = [
    "f32",
    "s8",
    "s32",
    "u64",
    "s65",
    "s0",
    "u1",
    "s8<0.5>",
    "s8<0.5, zero=1>",
    "s8<2^1>",
    "s8[0, 1]",
    "s8[1, 0]",
    "s8{-1, 1}",
    "s8{-2, 0, 127}<0.5>",
    "s8{1, 0}",
]
_MODES = ["none", "wrap", "saturate", "saturate_symmetric", "bias_khwc", "float32", "shift", "neon", "floor", "true"]
_WORDS = [*_TYPES, *_MODES, *(op.mnemonic for op in OPS), "x", "in", "hist", "storage", "partial", "loc", "return"]


@st.composite
def broken_texts(draw: st.DrawFn) -> str:
    """A golden text with up to three lexemes replaced, dropped or doubled."""
    text = draw(st.sampled_from(_TEXTS))
    lexemes = [t for t in tokenize(text, "") if t.kind != "end"]
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    spans = [(starts[t.line - 1] + t.column - 1, t) for t in lexemes]
    for start, token in sorted(draw(st.lists(st.sampled_from(spans), min_size=1, max_size=3)), key=lambda s: -s[0]):
        new = draw(st.sampled_from(["", f"{token.text} {token.text}", *_replacements(token.kind, token.text)]))
        text = text[:start] + new + text[start + len(token.text) :]
    return text


def _replacements(kind: str, text: str) -> list[str]:
    if kind == "number":
        return _SMALL + (_LARGE if len(text) > 6 else [])
    if kind == "shape":
        return _SHAPES
    return _WORDS if kind == "word" else [*"{}[]()<>=,:^", "%x", "@x", '"x"']


def _read(text: str) -> Graph | QirError:
    try:
        return parse(text)
    except QirError as fault:
        return fault


@settings(max_examples=max(1500, settings().max_examples))
@given(text=broken_texts())
def test_a_broken_text_is_read_or_refused(text: str) -> None:
    """What is legal after all runs, alike on int64 and on unbounded integers, and stays within what is proved."""
    graph = _read(text)
    if isinstance(graph, ParseError):
        lines = text.split("\n")
        assert 1 <= graph.line <= len(lines)
        assert 1 <= graph.column <= len(lines[graph.line - 1]) + 1
    if isinstance(graph, QirError):
        return
    assert parse(print_graph(graph)) == graph
    if find_faults(graph):
        return
    feeds = {v.name: _greatest(v) for v in graph.inputs}
    found = trace(graph, feeds)
    if graph.stage is not Stage.FIXED:
        return
    unbounded, proof = trace(graph, feeds, unbounded=True), prove(graph)
    for value in graph.values():
        np.testing.assert_array_equal(found[value.name], unbounded[value.name])
        proved = proof.interval(value)
        if proved is not None and found[value.name].size:
            assert proved.lo <= int(found[value.name].min()) <= int(found[value.name].max()) <= proved.hi


def _greatest(value: Value) -> npt.NDArray[Any]:
    storage = storage_of(value.type.element)
    return np.full(value.type.concrete(1), storage.hi if storage else 1, storage.dtype if storage else np.float32)
