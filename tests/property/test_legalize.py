"""Legalize keeps what a graph computes, wherever layouts, operands and formats meet."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from property.exact_graphs import exact_graphs

from qir.backend import load_target
from qir.interpreter import interpret
from qir.ir import Graph
from qir.ops.fixed_rescale import dequantize_array
from qir.ops.movement import Movement
from qir.pass_manager import PassContext, integer_feeds
from qir.passes.legalize import Legalize
from qir.types import is_quantized
from qir.verifier import verify

TARGET = load_target("arm-neon")


@settings(max_examples=400)
@given(case=exact_graphs())
def test_a_graph_that_rounds_nothing_is_kept_exactly(case: tuple[Graph, npt.NDArray[np.float32]]) -> None:
    typed, x = case
    verify(typed)
    fixed = Legalize().run(typed, PassContext(TARGET))
    verify(fixed)
    expected, found = interpret(typed, {"x": x}), interpret(fixed, integer_feeds(fixed, {"x": x}))
    for name, value in zip(fixed.output_names, fixed.outputs, strict=True):
        real = dequantize_array(found[name], value.type.element) if is_quantized(value.type.element) else found[name]
        np.testing.assert_array_equal(real, expected[name], err_msg=name)


@settings(max_examples=100)
@given(case=exact_graphs())
def test_results_keep_their_names(case: tuple[Graph, npt.NDArray[np.float32]]) -> None:
    typed, _ = case
    fixed = Legalize().run(typed, PassContext(TARGET))
    live = {v.name for v in fixed.values()}
    read = set(typed.outputs)
    for op in reversed(typed.ops):
        if op.results[0] in read:
            read.update(op.operands)
            if not isinstance(op, Movement) and op.mnemonic != "const":
                assert op.result.name in live
