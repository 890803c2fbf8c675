"""Thousands of ops in one chain, deeper than Python's stack may get: passes, text and program stay right."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from large_graphs import large_graph, samples

from qir.backend import load_target
from qir.interpreter import interpret, trace
from qir.ir import Graph, Op, Stage
from qir.ops.constant import Const
from qir.parser import parse
from qir.pass_manager import Pass, PassContext, PassRecord, Verifier, integer_feeds
from qir.passes.pipelines import default_pipeline
from qir.printer import print_graph, resources
from qir.program import Program
from qir.types import AffineType

NODES = 2000  # ten thousand take the same path; `benchmarks/passes.py` runs them

#: Python frames that may stand above those of the test. Any recursion over the chain would take thousands.
FRAMES = 200


@pytest.fixture
def shallow_stack() -> Iterator[None]:
    depth, frame = 0, sys._getframe()
    while frame.f_back is not None:
        depth, frame = depth + 1, frame.f_back
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(depth + FRAMES)
    yield
    sys.setrecursionlimit(before)


@dataclass
class _RoundTrip:
    """Reads back the text of every graph, and keeps the graphs."""

    graphs: dict[str, Graph] = field(default_factory=dict)

    def after_pass(self, index: int, ran: Pass, record: PassRecord, context: PassContext) -> None:
        assert parse(print_graph(record.after), resources(record.after)) == record.after
        self.graphs[record.name] = record.after


def _depth(graph: Graph) -> int:
    """Ops on the longest path."""
    depths = dict.fromkeys(graph.inputs, 0)
    for op in graph.ops:
        depths.update(dict.fromkeys(op.results, 1 + max((depths[v] for v in op.operands), default=0)))
    return max(depths.values())


def _computing(graph: Graph) -> list[Op]:
    return [op for op in graph.ops if not isinstance(op, Const)]


@pytest.mark.usefixtures("shallow_stack")
def test_a_long_chain_goes_through_everything() -> None:
    graph = large_graph(NODES)
    feeds = next(samples(1))
    assert len(_computing(graph)) >= NODES
    assert _depth(graph) > 5 * FRAMES

    kept = _RoundTrip()
    context = PassContext(load_target("arm-neon"), list(samples(8)))
    fixed = default_pipeline().run(graph, context, [Verifier(), kept])
    assert (fixed.stage, len(_computing(fixed)) > NODES) == (Stage.FIXED, True)
    assert not any(op.is_float for op in _computing(fixed))
    assert len(graph.to_networkx()) == len(graph.ops) + len(graph.inputs) + len(graph.outputs)

    real, canonical = interpret(graph, feeds), interpret(kept.graphs["eliminate-dead-code"], feeds)
    integers = interpret(fixed, integer_feeds(fixed, feeds))
    for name, value in zip(fixed.output_names, fixed.outputs, strict=True):
        np.testing.assert_allclose(canonical[name], real[name], rtol=0, atol=1e-5)
        element = value.type.element
        assert isinstance(element, AffineType)
        step = float(element.scale.data)
        found = (integers[name].astype(np.float64) - int(element.zero_point.data)) * step
        # A block adds a few roundings, each of at most a step or so, and passes on a small part of what came in.
        np.testing.assert_allclose(found, real[name], rtol=0, atol=3 * step)


def test_a_long_program_computes_what_the_interpreter_does() -> None:
    context = PassContext(load_target("arm-neon"), list(samples(2)))
    fixed = default_pipeline().run(large_graph(NODES), context, [])
    assert _depth(fixed) > sys.getrecursionlimit()
    program, feeds = Program(fixed), integer_feeds(fixed, next(samples(1)))
    expected, found = trace(fixed, feeds), program.trace(feeds)
    assert expected.keys() == found.keys()
    for value in fixed.values():
        np.testing.assert_array_equal(found[value.name], expected[value.name], err_msg=value.name)
        assert value.range is not None
        assert value.range.lo <= int(found[value.name].min()) <= int(found[value.name].max()) <= value.range.hi
    outputs = program.run_integer(feeds)
    for name, value in zip(fixed.output_names, fixed.outputs, strict=True):
        np.testing.assert_array_equal(outputs[name], expected[value.name])
