"""What range-analysis and insert-saturation leave out of a run is left out rightly: the bits are the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from property.fixed_graphs import MAKERS, FixedMaker

from qir.equivalence import Equivalence
from qir.interpreter import interpret
from qir.ir import Graph
from qir.pass_manager import PassContext, Pipeline, Verifier
from qir.passes.insert_saturation import InsertSaturation
from qir.passes.range_analysis import RangeAnalysis
from qir.probes import count_inputs, every_input, some_inputs

_EXAMPLES = settings().max_examples // 5  # of each kind, in the profile that runs
_EVERY, _SOME = 512, 24


@st.composite
def unproved(draw: st.DrawFn, kind: str) -> Graph:
    """A graph as legalize leaves it: no range is stated, and every overflow mode stands."""
    maker = FixedMaker(draw)
    MAKERS[kind](maker)
    return maker.builder.finish([maker.emitted[-1]], ["y"])


@pytest.mark.parametrize("kind", MAKERS)
@given(data=st.data())
@settings(max_examples=_EXAMPLES)
def test_proofs_keep_every_bit(kind: str, data: st.DataObject) -> None:
    before, found = data.draw(unproved(kind)), Equivalence()
    after = Pipeline([RangeAnalysis(), InsertSaturation()]).run(before, PassContext(), [Verifier(), found])
    assert [r.method for r in found.records] == ["identical", "identical"]
    count = count_inputs(before, _EVERY)
    seed = data.draw(st.integers(0, 2**32 - 1))
    for feeds in some_inputs(before, _SOME, seed) if count is None else every_input(before, count):
        left, right = interpret(before, feeds), interpret(after, feeds)
        np.testing.assert_array_equal(left["y"], right["y"], strict=True)
