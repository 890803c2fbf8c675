"""Packed integers: each width bit by bit, what comes back from files, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from property.test_text import integer_types
from safetensors.numpy import load_file, save_file

from qir.arrays import Array
from qir.errors import QirError, ResourceError
from qir.ir import Graph, Stage
from qir.levels import power_of_two_levels
from qir.ops.constant import Const
from qir.packing import pack_integers, packable, packed_bytes, unpack_integers
from qir.parser import parse
from qir.printer import print_graph, resources
from qir.rewrite import GraphBuilder
from qir.serialization import read_graph, write_graph
from qir.types import BINARY, S8, IntegerType, TensorType, affine, integer, of_levels

CODES = of_levels((-90, -3, 1, 17, 60))
NARROW = [integer(bits, signed) for bits in (1, 2, 3, 4, 5, 6, 7, 11, 20, 33, 63) for signed in (True, False)]
STORAGES = [*NARROW, BINARY, *map(power_of_two_levels, range(2, 6)), CODES]


def values(storage: IntegerType) -> st.SearchStrategy[int]:
    some = st.integers(storage.lo, storage.hi) if storage.levels is None else st.sampled_from(storage.levels)
    return st.one_of(some, st.sampled_from([storage.lo, storage.hi]))


def by_definition(data: list[int], storage: IntegerType) -> bytes:
    """Fields behind each other in one large integer, whose bytes are little-endian."""
    width, whole = storage.stored_bits, 0
    for place, value in enumerate(data):
        field = value if storage.levels is None else storage.levels.index(value)
        whole |= (field & ((1 << width) - 1)) << (place * width)
    return whole.to_bytes(-(-len(data) * width // 8), "little")


@given(storage=st.one_of(integer_types(), st.sampled_from(STORAGES)), data=st.data())
def test_integers_of_every_width_come_back(storage: IntegerType, data: st.DataObject) -> None:
    few = data.draw(st.lists(values(storage), max_size=20))
    array = np.array(few, storage.dtype).reshape(data.draw(st.sampled_from([(-1,), (-1, 1), (1, -1)])))
    assert packable(array, storage) == (storage.stored_bits not in (8, 16, 32, 64) or storage.levels is not None)
    packed = pack_integers(array, storage)
    assert packed.tobytes() == by_definition(few, storage)
    assert packed.size == packed_bytes(len(few), storage)
    np.testing.assert_array_equal(unpack_integers(packed, array.shape, storage), array, strict=True)


@pytest.mark.parametrize(
    ("packed", "storage", "message"),
    [
        (np.zeros(3, np.uint8), integer(3), "9 elements of 3 bits take 4 bytes, and it is uint8 3"),
        (np.zeros(5, np.uint8), integer(3), "9 elements of 3 bits take 4 bytes, and it is uint8 5"),
        (np.zeros(4, np.int8), integer(3), "9 elements of 3 bits take 4 bytes, and it is int8 4"),
        (np.zeros((2, 2), np.uint8), integer(3), "9 elements of 3 bits take 4 bytes, and it is uint8 2x2"),
        (np.array([0, 0, 0, 8], np.uint8), integer(3), "the bits behind its last element are not 0"),
        (np.array([5, 0, 0, 0], np.uint8), CODES, "it holds the index 5 and has 5 levels"),
    ],
)
def test_bytes_that_are_not_packed_so(packed: Any, storage: IntegerType, message: str) -> None:
    with pytest.raises(QirError, match=message):
        unpack_integers(packed, (3, 3), storage)


def graph_of(*constants: tuple[np.ndarray[Any, Any], IntegerType]) -> Graph:
    builder = GraphBuilder("packed", Stage.FIXED)
    made = [builder.constant(Array(data, "w"), TensorType(data.shape, kind), "w") for data, kind in constants]
    return builder.finish(made, [f"y{i}" for i in range(len(made))])


def spread(storage: IntegerType, count: int = 70) -> np.ndarray[Any, Any]:
    """All levels of a storage, or its ends and what lies around 0."""
    around = {storage.lo, storage.hi, *(v for v in (-2, -1, 0, 1) if storage.lo <= v <= storage.hi)}
    some = storage.levels or sorted(around)
    return np.resize(np.array(some, storage.dtype), count)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_files_hold_packed_integers_and_the_text_says_of_what_type(storage: IntegerType, tmp_path: Path) -> None:
    graph = graph_of((spread(storage), storage))
    write_graph(graph, tmp_path / "graph.qir", "w.safetensors")
    text = (tmp_path / "graph.qir").read_text()
    packing = "s2" if storage == power_of_two_levels(2) else storage
    assert f"\n  @w : {packing} 70 sha256=" in text
    (stored,) = load_file(tmp_path / "w.safetensors").values()
    assert stored.tobytes() == by_definition(spread(storage).tolist(), storage)
    assert read_graph(tmp_path / "graph.qir") == graph
    assert parse(text, resources(graph)) == graph  # arrays in memory are not packed
    assert parse(text, {"w": Array(stored)}) == graph


@pytest.mark.parametrize(
    ("kind", "packing"),
    [
        (integer(4).narrowed(-7, 7), "s4"),
        (affine(integer(4).narrowed(-7, 7), 0.5, 3), "s4"),
        (affine(BINARY, 0.5), "s2{-1, 1}"),
        (S8.narrowed(-1, 1), "s8"),
    ],
)
def test_bounds_and_scales_make_no_difference_to_what_is_stored(kind: Any, packing: str) -> None:
    data = np.resize(np.array([-1, 1], np.int8), 80)
    builder = GraphBuilder("packed", Stage.FIXED)
    graph = builder.finish([builder.constant(Array(data, "w"), TensorType((80,), kind))], ["y"])
    assert f"@w : {packing} 80 sha256=" in print_graph(graph)
    (op,) = (op for op in graph.ops if isinstance(op, Const))
    assert op.stored_bytes == {"s4": 40, "s2{-1, 1}": 10, "s8": 80}[packing]


def test_an_array_of_constants_of_several_types_is_stored_as_it_is(tmp_path: Path) -> None:
    data = spread(BINARY)
    for kinds in ([BINARY, integer(4)], [integer(4), S8], [S8, integer(4)], [integer(3), integer(4), integer(3)]):
        graph = graph_of(*((data, kind) for kind in kinds))
        write_graph(graph, tmp_path / "graph.qir", "w.safetensors")
        assert "@w : s8 70 sha256=" in (tmp_path / "graph.qir").read_text()
        assert read_graph(tmp_path / "graph.qir") == graph
    both = graph_of((data, integer(4)), (data, integer(4).narrowed(-7, 7)))
    assert "@w : s4 70 sha256=" in print_graph(both)


def test_data_that_do_not_fit_their_type_are_stored_as_they_are() -> None:
    for data, kind in ((np.arange(70, dtype=np.int8), integer(4)), (np.zeros(70, np.int8), BINARY)):
        graph = graph_of((data, kind))  # not legal, and yet it has a text
        assert "@w : s8 70 sha256=" in print_graph(graph)
        assert parse(print_graph(graph), resources(graph)) == graph
    wide = graph_of((np.zeros(70, np.int64), integer(4)))
    assert "@w : s64 70 sha256=" in print_graph(wide)


def test_files_of_equal_data_in_other_types_have_other_names(tmp_path: Path) -> None:
    graphs = [graph_of((spread(BINARY), kind)) for kind in (BINARY, integer(2), integer(4), S8)]
    for place, graph in enumerate(graphs):
        write_graph(graph, tmp_path / f"{place}.qir")
    assert len(list(tmp_path.glob("constants-*.safetensors"))) == 4
    assert [read_graph(tmp_path / f"{place}.qir") for place in range(4)] == graphs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w[:-1],
            "resource @w: the sidecar does not hold it as s3: 70 elements of 3 bits take 27 bytes, and it is uint8 26",
        ),
        (
            lambda w: w.view(np.int8),
            "the sidecar does not hold it as s3: 70 elements of 3 bits take 27 bytes, and it is int8 27",
        ),
        (
            lambda w: w | np.uint8(0x80),
            "the sidecar does not hold it as s3: the bits behind its last element are not 0",
        ),
        (lambda w: w ^ np.uint8(1), "resource @w: the sidecar's array has hash .*, the text states "),
        (lambda w: np.zeros(70, np.int8), "resource @w: the sidecar's array has hash .*, the text states "),
    ],
)
def test_a_changed_sidecar_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    write_graph(graph_of((spread(integer(3)), integer(3))), tmp_path / "graph.qir", "w.safetensors")
    save_file(
        {"w": np.ascontiguousarray(change(load_file(tmp_path / "w.safetensors")["w"]))}, tmp_path / "w.safetensors"
    )
    with pytest.raises(ResourceError, match=message):
        read_graph(tmp_path / "graph.qir")
