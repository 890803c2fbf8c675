"""Repairs of random sums: legal, proved, the exact sum where they say so, and the same on kernels and interpreter."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st
from property.contracts import contract
from property.fixed_graphs import FixedMaker
from property.test_contracts import check_kernels
from property.test_pipeline import Case, cases

from qir.backend import load_target
from qir.errors import PassError
from qir.fixed_point import Overflow
from qir.idle import is_idle
from qir.interpreter import interpret
from qir.interval import bits_of_interval
from qir.ir import Graph, Value
from qir.ops.accumulate import STEPWISE, Accumulating
from qir.pass_manager import PassContext, Pipeline
from qir.passes.insert_saturation import InsertSaturation
from qir.passes.pipelines import default_pipeline
from qir.passes.range_analysis import RangeAnalysis
from qir.passes.repairs.ladder import Repair
from qir.program import Program
from qir.proof import prove
from qir.rewrite import map_values
from qir.types import S64, integer, storage_of
from qir.verifier import verify

Tensor = npt.NDArray[Any]

RUNGS = (Repair.WIDEN, Repair.SPLIT, Repair.NARROW, Repair.SATURATE)
_ARM = load_target("arm-neon")
TARGET = replace(_ARM, accumulator=replace(_ARM.accumulator, bits=11, wider=(14, 18, 24, 32, 48, 64)), bias_bits=None)


class _Narrow(FixedMaker):
    """Sums in 64 bits, which are then given fewer than they need."""

    def accumulator(self) -> dict[str, Any]:
        attributes = super().accumulator()
        if attributes.get("product_overflow") is Overflow.NONE:
            attributes["product_overflow"] = Overflow.WRAP
        return attributes | {"accumulator": S64}

    def cut(self, total: Value) -> Value:
        """The same sum in an accumulator that lacks up to three bits, or none."""
        op = self.builder.ops[-1]
        assert isinstance(op, Accumulating)
        partial = prove(self.builder.finish([total], ["y"])).steps[op].partial
        assert partial is not None
        kind = integer(min(max(bits_of_interval(partial) - self.pick([0, 1, 1, 2, 3]), 2), 62))
        result = Value(total.name, total.type.with_element(kind))
        self.builder.ops[-1] = op.with_changes(accumulator=kind, results=(result,))
        return result


@st.composite
def sums(draw: st.DrawFn) -> tuple[Graph, dict[str, Tensor]]:
    """An accumulating op that a requantize reads, with its ranges, and inputs at their ends and anywhere."""
    maker = _Narrow(draw)
    kind = maker.pick(["conv", "conv", "matmul", "batched_matmul", "reduce_sum"])
    total = maker.cut(getattr(maker, kind)())
    result = maker.rescale(total) if total.type.rank > 1 else total
    graph = maker.builder.finish([result], ["y"])
    feeds = {}
    for value in graph.inputs:
        storage = storage_of(value.type.element)
        assert storage is not None
        shape = value.type.concrete(3)
        anything = maker.random.integers(storage.lo, storage.hi, shape, endpoint=True)
        ends = maker.random.choice([storage.lo, storage.hi], shape)
        feeds[value.name] = np.where(maker.random.random(shape) < 0.5, ends, anything).astype(storage.dtype)
    return RangeAnalysis().run(graph, PassContext()), feeds


def exact_sums(graph: Graph) -> Graph:
    """The graph with all sums in 64 bits."""
    totals = {op.result for op in graph.ops if isinstance(op, Accumulating)}
    wide = {"accumulator": S64, "overflow": Overflow.WRAP, "partial": None}
    return map_values(
        graph,
        lambda v: {"range": None, **({"type": v.type.with_element(S64)} if v in totals else {})},
        attributes=lambda op: wide if isinstance(op, Accumulating) else {},
    )


@settings(max_examples=max(400, settings().max_examples))
@given(case=sums(), rung=st.sampled_from(RUNGS))
def test_each_rung_alone(case: tuple[Graph, dict[str, Tensor]], rung: Repair) -> None:
    graph, feeds = case
    context = PassContext(TARGET)
    after = InsertSaturation(rung, RUNGS[: RUNGS.index(rung)]).run(graph, context)
    verify(after)
    found, ran = interpret(after, feeds)["y"], Program(after).run_integer(feeds)["y"]
    np.testing.assert_array_equal(ran, found, strict=True)
    layers = [op for op in after.ops if isinstance(op, Accumulating)]
    is_free = all(is_idle(op, prove(after).steps.get(op)) for op in layers)
    if is_free:
        np.testing.assert_array_equal(found, interpret(exact_sums(after), feeds)["y"])
        if rung in (Repair.WIDEN, Repair.SPLIT):
            np.testing.assert_array_equal(found, interpret(exact_sums(graph), feeds)["y"])
    elif rung is Repair.SATURATE:
        assert all(op.overflow in STEPWISE for op in layers)
    else:
        assert found.tobytes() == interpret(graph, feeds)["y"].tobytes()
    assert len(context.diagnostics) == (0 if is_free or rung is Repair.SATURATE else 1)


@settings(max_examples=max(200, settings().max_examples))
@given(case=sums())
def test_the_whole_ladder_leaves_nothing_unproved_but_saturation(case: tuple[Graph, dict[str, Tensor]]) -> None:
    graph, feeds = case
    context = PassContext(TARGET)
    after = InsertSaturation(Repair.SATURATE).run(graph, context)
    verify(after)
    assert not context.diagnostics
    np.testing.assert_array_equal(Program(after).run_integer(feeds)["y"], interpret(after, feeds)["y"], strict=True)


@settings(max_examples=max(100, settings().max_examples))
@given(case=sums())
def test_a_proof_alone_keeps_every_bit(case: tuple[Graph, dict[str, Tensor]]) -> None:
    graph, feeds = case
    after = InsertSaturation().run(graph, PassContext())
    verify(after)
    np.testing.assert_array_equal(interpret(after, feeds)["y"], interpret(graph, feeds)["y"], strict=True)


@settings(max_examples=max(100, settings().max_examples))
@given(case=cases(), seed=st.integers(0, 2**32 - 1), rung=st.sampled_from(Repair))
def test_every_contract_can_be_repaired(case: Case, seed: int, rung: Repair) -> None:
    context, fixed = PassContext(contract(seed), [{"x": case.calibration}]), None
    with contextlib.suppress(PassError):  # of ops without an integer form, which test_contracts tells apart
        fixed = default_pipeline().before("insert-saturation").run(case.graph, context)
    if fixed is None:
        return
    fixed = Pipeline([InsertSaturation(rung)]).run(fixed, context)
    check_kernels(fixed, case.x, seed)
    open_ones = [d for d in context.diagnostics if "its partial sums may reach" in d.message]
    steps = prove(fixed).steps
    layers = [op for op in fixed.ops if isinstance(op, Accumulating)]
    handled = [op for op in layers if op.overflow is not Overflow.NONE]
    assert handled == [op for op in layers if not is_idle(op, steps.get(op))]
    by_choice = [op for op in handled if rung is Repair.SATURATE and op.overflow in STEPWISE]
    assert len(open_ones) == len(handled) - len(by_choice)
    assert not (rung is Repair.SATURATE and open_ones)
