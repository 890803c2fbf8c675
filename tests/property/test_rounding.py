"""Passes for better rounding: equalization keeps what a graph computes; bias correction takes the mean error away."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st
from property.float_graphs import STEPS, GraphMaker, graphs

from qir.interpreter import interpret, trace
from qir.ir import Graph
from qir.parser import parse
from qir.pass_manager import PassContext
from qir.passes.equalize_cross_layer import EqualizeCrossLayer
from qir.passes.pipelines import default_pipeline
from qir.printer import print_graph, resources
from qir.verifier import verify

Case = tuple[Graph, npt.NDArray[np.float32]]

#: Steps that channels pass through; clip is one that stops them.
LINKS = ("conv", "conv with bias", "depthwise", "shared conv", "relu", "pool", "residual", "clip")


@st.composite
def layered(draw: st.DrawFn) -> Case:
    """A graph of many layers in a row, and a batch for its input."""
    maker = GraphMaker(draw(st.integers(0, 2**32 - 1)))
    for step in draw(st.lists(st.sampled_from(LINKS), min_size=4, max_size=12)):
        STEPS[step](maker)
    if draw(st.booleans()):
        maker.head()
    x = maker.random.uniform(-2, 2, (2, 2, 6, 5)).astype(np.float32)
    return maker.finish(draw(st.integers(0, 40))), x


def assert_keeps_the_function(case: Case) -> None:
    graph = default_pipeline().before("calibrate").run(case[0], PassContext())
    feeds = {"x": case[1]}
    expected = interpret(graph, feeds)
    after = EqualizeCrossLayer().run(graph, PassContext())
    verify(after)
    assert parse(print_graph(after), resources(after)) == after
    assert EqualizeCrossLayer().run(after, PassContext()) is after
    found = interpret(after, feeds)
    # The error of a product or sum is relative to what is computed, which may be larger than the outputs.
    largest = max(float(np.abs(a).max(initial=1.0)) for a in trace(graph, feeds).values())
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=2.0**-14 * largest)
    exact = EqualizeCrossLayer(power_of_two=True).run(graph, PassContext())
    verify(exact)
    for name, array in interpret(exact, feeds).items():
        np.testing.assert_array_equal(array, expected[name])


@settings(max_examples=150)
@given(case=graphs())
def test_equalization_keeps_what_a_graph_computes(case: Case) -> None:
    assert_keeps_the_function(case)


@settings(max_examples=150)
@given(case=layered())
def test_equalization_keeps_what_layers_in_a_row_compute(case: Case) -> None:
    assert_keeps_the_function(case)
