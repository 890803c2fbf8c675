"""The canonical passes compute what the model says, whatever the graph."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from property.float_graphs import graphs

from qir.interpreter import interpret, trace
from qir.ir import Graph
from qir.ops.float_elementwise import Div
from qir.ops.float_nn import BatchNormalization
from qir.parser import parse
from qir.pass_manager import Pass, PassContext
from qir.passes.canonicalize import Canonicalize
from qir.passes.dead_code import EliminateDeadCode
from qir.passes.fold_constants import FoldConstants
from qir.passes.fuse_activation import FuseActivation
from qir.passes.fuse_batch_norm import FuseBatchNorm
from qir.passes.pipelines import default_pipeline
from qir.printer import print_graph, resources
from qir.verifier import verify

CANONICAL: tuple[Pass, ...] = (
    FoldConstants(),
    Canonicalize(),
    FuseBatchNorm(),
    FuseActivation(),
    EliminateDeadCode(),
)

#: Of the largest number that occurs in the graph. The passes reassociate a few float32 operations for each op and the
#: sums of a convolution of at most 36 terms, each off by 2**-24; ten layers carry that on, and each widens it at most a
#: few times. A wrong rewrite is off by a good part of the numbers themselves.
TOLERANCE = 2.0**-14


def assert_equivalent(before: Graph, after: Graph, x: npt.NDArray[np.float32]) -> None:
    """Both graphs compute the same up to the order of float32 operations."""
    scale = max(float(np.abs(a).max(initial=1.0)) for a in trace(before, {"x": x}).values())
    expected, found = interpret(before, {"x": x}), interpret(after, {"x": x})
    for name in before.output_names:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=TOLERANCE * scale)


@pytest.mark.parametrize("item", CANONICAL, ids=lambda p: p.name)
@settings(max_examples=150)
@given(case=graphs())
def test_a_pass_keeps_what_a_graph_computes(item: Pass, case: tuple[Graph, npt.NDArray[np.float32]]) -> None:
    graph, x = case
    after = item.run(graph, PassContext())
    verify(after)
    assert_equivalent(graph, after, x)
    assert item.run(after, PassContext()) is after
    assert (after.inputs, after.output_names) == (graph.inputs, graph.output_names)
    assert parse(print_graph(after), resources(after)) == after


@settings(max_examples=200)
@given(case=graphs())
def test_the_canonical_passes_together(case: tuple[Graph, npt.NDArray[np.float32]]) -> None:
    graph, x = case
    after = default_pipeline().before("calibrate").run(graph, PassContext())
    assert_equivalent(graph, after, x)
    assert not any(isinstance(op, BatchNormalization | Div) for op in after.ops)
