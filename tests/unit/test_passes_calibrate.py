"""calibrate: what is observed, that shards of the data may be observed apart, and how bad data is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from property.float_graphs import graphs

from qir.arrays import Array
from qir.calibration import Calibration, Histogram
from qir.errors import CalibrationError
from qir.interpreter import evaluate, trace
from qir.interval import Interval
from qir.ir import Graph, Stage
from qir.ops.float_elementwise import Div
from qir.ops.float_nn import MatMul
from qir.ops.float_pool import ArgMax
from qir.parser import parse
from qir.pass_manager import Feeds, PassContext, Pipeline
from qir.passes.calibrate import CHUNK, Calibrate, apply, observe
from qir.passes.canonicalize import Canonicalize
from qir.printer import print_graph, resources
from qir.rewrite import GraphBuilder
from qir.types import BATCH, F32, TensorType
from qir.verifier import find_faults, verify


def ratio() -> Graph:
    """`x / z` of x [N, 3] and z [3], and where it is greatest."""
    builder = GraphBuilder("ratio")
    x, z = builder.input("x", TensorType((BATCH, 3))), builder.input("z", TensorType((3,)))
    y = builder.emit(Div, [x, z], name="y")
    return builder.finish([y, builder.emit(ArgMax, [y], axis=1, keepdims=False, name="top")], ["y", "top"])


def feeds(*batches: int) -> list[dict[str, npt.NDArray[np.float32]]]:
    """A feed of each batch size."""
    random = np.random.default_rng(sum(batches))
    return [
        {"x": random.normal(size=(n, 3)).astype(np.float32), "z": random.uniform(1, 2, 3).astype(np.float32)}
        for n in batches
    ]


@settings(max_examples=50)
@given(case=graphs())
def test_every_real_value_but_constants_gets_what_it_held(case: tuple[Graph, npt.NDArray[np.float32]]) -> None:
    graph, x = case
    held = trace(graph, {"x": x})
    after = Calibrate().run(graph, PassContext(calibration=[{"x": x[:1]}, {"x": x[1:]}]))
    verify(after)
    assert after.stage is Stage.FLOAT
    for value in after.values():
        if value in after.constants:
            assert value.histogram is None
            continue
        assert value.histogram is not None
        histogram, array = Histogram.from_array(value.histogram.data), held[value.name]
        assert histogram.total == array.size * (1 if value.type.is_batched else 2)  # once a feed
        # One sample at a time, a matrix product may add in another order than both at once.
        extremes = histogram.minimum, histogram.maximum
        np.testing.assert_allclose(extremes, (array.min(), array.max()), rtol=1e-3, atol=1e-3)
    assert parse(print_graph(after), resources(after)) == after


def test_integers_are_not_observed() -> None:
    assert set(observe(ratio(), feeds(2))) == {"x", "y", "z"}


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4), data=st.data())
def test_shards_in_any_order_give_the_same_once_merged(sizes: list[int], data: st.DataObject) -> None:
    graph, all_feeds = ratio(), feeds(*sizes)
    whole = observe(graph, all_feeds)
    merged = Calibration()
    for feed in data.draw(st.permutations(all_feeds)):
        merged = merged.merge(observe(graph, [feed]))
    assert dict(merged) == dict(whole)
    given_feeds = Calibrate().run(graph, PassContext(calibration=iter(all_feeds)))
    given_shards = Calibrate().run(graph, PassContext(calibration=merged))
    assert given_feeds == given_shards


def test_a_large_batch_is_observed_whole() -> None:
    (feed,) = feeds(2 * CHUNK + 3)
    calibration = observe(ratio(), [feed])
    assert calibration["y"] == Histogram.of(feed["x"] / feed["z"])
    assert calibration["x"].total == feed["x"].size
    assert calibration["z"].total == 9  # what has no batch is met by each of the three chunks


def test_progress_is_told() -> None:
    told: list[tuple[str, int, int]] = []
    observe(ratio(), feeds(1, 1), lambda *step: told.append(step))
    assert told == [("calibrate", 1, 2), ("calibrate", 2, 2)]
    told.clear()
    observe(ratio(), iter(feeds(1)), lambda *step: told.append(step))
    assert told == [("calibrate", 1, 0)]


GOOD = feeds(2)[0]


def endless() -> Iterator[Feeds]:
    """Good data, then bad: all that is before the bad feed has been run."""
    yield GOOD
    yield GOOD
    yield {"x": GOOD["x"]}


BAD: dict[str, tuple[Any, str]] = {
    "none": (None, r"there is no calibration data; pass calibration="),
    "empty": ([], r"calibration data is empty: give at least one feed"),
    "one feed": (GOOD, r"an iterable of feeds, such as \[\{input name: array\}\], not one feed"),
    "no mapping": ([GOOD["x"]], r"calibration feed 0 is of type ndarray; a feed maps input names to arrays"),
    "missing input": (endless(), r"calibration feed 2: the inputs are \['x', 'z'\]; missing \['z'\]"),
    "unknown input": ([GOOD, {**GOOD, "w": GOOD["z"]}], r"calibration feed 1: .* unknown \['w'\]"),
    "wrong shape": ([{**GOOD, "x": GOOD["x"].T}], r"calibration feed 0: input 'x' has shape 3x2, expected Nx3"),
    "wrong type": ([{**GOOD, "z": np.array(["a", "b", "c"])}], r"calibration feed 0: input 'z' is of <U1"),
    "NaN": ([{**GOOD, "z": np.array([1, np.nan, 1])}], r"calibration feed 0: input 'z' holds NaN or infinity"),
    "infinity": ([{**GOOD, "x": GOOD["x"] * np.inf}], r"calibration feed 0: input 'x' holds NaN or infinity"),
    "no samples": ([{**GOOD, "x": GOOD["x"][:0]}], r"calibration feed 0 holds no samples"),
    "NaN on the way": ([{"x": np.zeros((1, 3)), "z": np.zeros(3)}], r"calibration feed 0: value %y: .* NaN"),
    "another graph": (Calibration({"x": Histogram.of([1.0])}), r"the calibration holds nothing for %z"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_refused(case: str) -> None:
    data, message = BAD[case]
    with pytest.raises(CalibrationError, match=message):
        Calibrate().run(ratio(), PassContext(calibration=data))


def test_what_was_observed_before_a_pass_may_not_fit_behind_it() -> None:
    builder = GraphBuilder("late")
    x = builder.input("x", TensorType((BATCH, 1)))
    two = builder.constant(Array(np.float32(2)), TensorType((), F32), "two")
    scaled = builder.emit(Div, [builder.emit(Div, [x, two], name="half"), two], name="y")
    graph = builder.finish([scaled], ["y"])
    calibration = observe(graph, [{"x": np.ones((1, 1), np.float32)}])
    kept = apply(Pipeline([Canonicalize()]).run(graph, PassContext()), calibration)
    assert [v.name for v in kept.values() if v.histogram is not None] == ["x", "half", "y"]


FUSED = """graph @g stage=float (%x: Nx2 x f32) {
  %w = const {value=f32 2x1 [1.0, -1.0]} : 2x1 x f32
  %y = MatMul %x, %w {clip=[0.0, inf]} : Nx1 x f32
  %z = Add %y, %y {clip=[0.0, 1.0]} : Nx1 x f32
  return %z
}
"""


def test_of_sums_the_ends_before_a_fused_activation_are_kept() -> None:
    graph, data = parse(FUSED), {"x": np.array([[1, 3], [2, 1], [0, 0]], np.float32)}
    after = Calibrate().run(graph, PassContext(calibration=[data]))
    (product,) = (op for op in after.ops if isinstance(op, MatMul))
    assert (product.clip, product.unclipped) == ((0.0, np.inf), (-2.0, 1.0))
    assert product.sum_range == Interval(-2.0, 1.0)
    assert product.result.histogram is not None
    assert Histogram.from_array(product.result.histogram.data) == Histogram.of([0.0, 1.0, 0.0])
    assert parse(print_graph(after), resources(after)) == after
    assert [(v.name, a.tolist()) for v, a in evaluate(after, data)][-2:] == [
        ("y", [[0.0], [1.0], [0.0]]),
        ("z", [[0.0], [1.0], [0.0]]),
    ]


def test_ends_merge_and_may_be_missing() -> None:
    graph = parse(FUSED)
    shards = [observe(graph, [{"x": np.array([row], np.float32)}]) for row in ([1, 3], [5, 1])]
    for first, second in (shards, shards[::-1]):
        (_, product, _) = apply(graph, first.merge(second)).ops
        assert getattr(product, "unclipped", None) == (-2.0, 4.0)
    bare = Calibration({v.name: Histogram.of([0.0, 1.0]) for v in (*graph.inputs, graph.value("y"), graph.value("z"))})
    (_, product, _) = apply(graph, bare).ops
    assert isinstance(product, MatMul)
    assert product.unclipped is None
    assert product.sum_range is product.result.range


def test_an_activation_that_is_not_fused_has_no_ends_of_its_own() -> None:
    graph = parse(FUSED.replace(" {clip=[0.0, inf]}", ""))
    calibration = observe(graph, [{"x": np.ones((1, 2), np.float32)}])
    assert set(calibration) == {"x", "y", "z"}
    assert getattr(apply(graph, calibration).ops[1], "unclipped", None) is None


@pytest.mark.parametrize(
    "attributes", ["unclipped=[0.0, 1.0]", "clip=[0.0, 1.0], unclipped=[0.0]", "clip=[0.0, 1.0], unclipped=[1.0, 0.0]"]
)
def test_ends_that_are_none(attributes: str) -> None:
    faults = find_faults(parse(FUSED.replace("clip=[0.0, inf]", attributes)))
    assert [f.place for f in faults] == ["MatMul %y"]
    assert "unclipped takes [lo, hi] with lo <= hi, and belongs to clip" in faults[0].message
