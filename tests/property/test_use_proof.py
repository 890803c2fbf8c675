"""Random graphs: kernels chosen with the proof and without it, and the interpreter, give the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from property.fixed_graphs import BATCHES, MAKERS, FixedMaker

from qir.interpreter import interpret, trace
from qir.ir import Graph
from qir.ops.accumulate import STEPWISE, Accumulating
from qir.pass_manager import PassContext
from qir.passes.insert_saturation import InsertSaturation
from qir.passes.range_analysis import RangeAnalysis
from qir.program import Program
from qir.types import storage_of

Tensor = npt.NDArray[Any]

_EXAMPLES = settings().max_examples // 2  # of each kind, in the profile that runs


@st.composite
def cases(draw: st.DrawFn, kind: str) -> tuple[Graph, dict[str, Tensor]]:
    """A graph with ranges in which every overflow mode stands, and feeds for it."""
    maker = FixedMaker(draw)
    MAKERS[kind](maker)
    graph = RangeAnalysis().run(maker.builder.finish([maker.emitted[-1]], ["y"]), PassContext())
    batch, feeds = draw(st.sampled_from(BATCHES)), dict[str, Tensor]()
    for value in graph.inputs:
        storage = storage_of(value.type.element)
        assert storage is not None
        feeds[value.name] = maker.numbers(storage, value.type.concrete(batch))
    return graph, feeds


@pytest.mark.parametrize("kind", MAKERS)
@given(data=st.data())
@settings(max_examples=_EXAMPLES)
def test_the_proof_changes_no_bit(kind: str, data: st.DataObject) -> None:
    standing, feeds = data.draw(cases(kind))
    expected, outputs = trace(standing, feeds), interpret(standing, feeds)
    for graph in (standing, InsertSaturation().run(standing, PassContext())):
        for use_proof in (True, False):
            program = Program(graph, use_proof=use_proof)
            found = program.trace(feeds)
            for name, array in expected.items():
                np.testing.assert_array_equal(found[name], array, name, strict=True)
            np.testing.assert_array_equal(program.run_integer(feeds)["y"], outputs["y"], strict=True)
    steps = {s.ops[0]: s.kernel for s in Program(standing, use_proof=False).plan().steps}
    for op in standing.ops:
        if isinstance(op, Accumulating) and op.overflow in STEPWISE:
            kernel = steps[op.describe()]
            assert "_ordered_" in kernel or "_stepwise_" in kernel or kernel == "interpreter"
