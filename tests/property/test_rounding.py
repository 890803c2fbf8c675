"""Passes for better rounding: equalization keeps what a graph computes; legalize keeps integers that are learned."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from branches import legalized, typed
from hypothesis import given, settings
from hypothesis import strategies as st
from property.float_graphs import STEPS, GraphMaker, graphs

from qir.backend import load_target
from qir.interpreter import interpret, trace
from qir.ir import Graph
from qir.ops.fixed_rescale import dequantize_array
from qir.parser import parse
from qir.pass_manager import PassContext
from qir.passes.correct_bias import CorrectBias
from qir.passes.equalize_cross_layer import EqualizeCrossLayer
from qir.passes.layer_walk import integers_of, layers_of, quantized_element
from qir.passes.learn_rounding import LearnRounding
from qir.passes.pipelines import default_pipeline
from qir.passes.search_weight_ranges import Method, SearchWeightRanges
from qir.printer import print_graph, resources
from qir.verifier import verify

#: Targets, each with widths of its own.
TARGETS = (("asic", "*:w2"), ("asic", "*:w4"), ("fpga", "*:w3"), ("arm-neon", "*:8"), ("dsp16", "*:16"))

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


@settings(max_examples=60)
@given(
    case=layered(),
    target=st.sampled_from(
        [("asic", "*:w2"), ("asic", "*:w4"), ("fpga", "*:w3"), ("arm-neon", "*:8"), ("dsp16", "*:16")]
    ),
    method=st.sampled_from(list(Method)),
)
def test_weights_that_were_searched_and_learned_are_what_legalize_writes(
    case: Case, target: tuple[str, str], method: Method
) -> None:
    name, override = target
    feeds = [{"x": case[1]}]
    before = typed(feeds, name, override, case[0])
    context = PassContext(load_target(name), feeds)
    graph = before
    for item in (SearchWeightRanges(method), LearnRounding(), CorrectBias()):
        graph = item.run(graph, context)
        verify(graph)
        assert parse(print_graph(graph), resources(graph)) == graph
    fixed = legalized(graph, name)
    written = {v.name: np.sort(a.data, axis=None) for v, a in fixed.constants.items()}
    for layer in layers_of(graph):
        weight = layer.operands[1]
        data, element = graph.constants[weight].data, quantized_element(weight)
        integers = integers_of(data, element)
        assert np.array_equal(dequantize_array(integers, element), data)
        if weight.name in written:  # else nothing reads it
            assert np.array_equal(written[weight.name], np.sort(integers, axis=None))
    assert all(np.isfinite(array).all() for array in interpret(graph, feeds[0]).values())
