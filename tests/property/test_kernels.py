"""Kernels against the interpreter, value by value, at the extremes of every type, on ties and where registers wrap."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from property.fixed_graphs import MAKERS, cases

from qir.interpreter import interpret, trace
from qir.ir import Graph
from qir.ops import FIXED_OPS
from qir.parser import parse
from qir.printer import print_graph, resources
from qir.program import Program
from qir.types import storage_of

Tensor = npt.NDArray[Any]
Feeds = dict[str, Tensor]


def assert_equal(graph: Graph, feeds: Feeds) -> None:
    """The kernels give every value that the interpreter gives, in its dtype, fused or not."""
    program = Program(graph)
    expected, found = trace(graph, feeds), program.trace(feeds)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, name, strict=True)
    outputs, fused = interpret(graph, feeds), program.run_integer(feeds)
    for name, array in outputs.items():
        np.testing.assert_array_equal(fused[name], array, name, strict=True)


def test_there_is_a_maker_for_every_fixed_op() -> None:
    assert {op.mnemonic for op in FIXED_OPS} | {"layer"} == MAKERS.keys()


@pytest.mark.parametrize("kind", MAKERS)
@given(data=st.data())
@settings(max_examples=60)
def test_kernels_equal_the_interpreter(kind: str, data: st.DataObject) -> None:
    graph, feeds = data.draw(cases(kind))
    assert_equal(graph, feeds)
    assert parse(print_graph(graph), resources(graph)) == graph
    held = trace(graph, feeds, unbounded=True)
    for value in graph.values():
        array = held[value.name]
        if storage_of(value.type.element) is not None and array.size:
            assert value.range is not None
            assert value.range.lo <= array.min(), value.name
            assert value.range.hi >= array.max(), value.name
