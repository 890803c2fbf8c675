"""The walk over layers: what each level reads is what the whole graph holds there, whether values are held or not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from branches import Feed, batches, typed

import qir
from qir.calibration import Calibration
from qir.errors import CalibrationError
from qir.interpreter import evaluate
from qir.ir import Graph, Stage
from qir.ops.float_nn import Conv
from qir.parser import parse
from qir.pass_manager import PassContext
from qir.passes import layer_walk
from qir.passes.layer_walk import LayerWalk, layers_of, with_own_parameters


def walked(graph: Graph, feeds: Any, **options: Any) -> LayerWalk:
    return LayerWalk(graph, qir.load_target("asic"), PassContext(calibration=feeds), "some-pass", **options)


def read(walk: LayerWalk) -> dict[str, tuple[Any, Any]]:
    """By name of each layer, its input over all samples, in floating point and rounded."""
    found: dict[str, list[tuple[Any, Any]]] = {}
    for number, level in enumerate(walk.levels):
        for part in walk.inputs(number):
            for layer in level:
                source = layer.operands[0]
                found.setdefault(layer.result.name, []).append((part.real[source], part.rounded[source]))
    sides = {name: zip(*pairs, strict=True) for name, pairs in found.items()}
    return {name: (np.concatenate(real), np.concatenate(rounded)) for name, (real, rounded) in sides.items()}


@pytest.mark.parametrize("held", [1 << 30, 20_000, 0])
def test_levels_read_what_the_graph_holds(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_walk, "_MOST_HELD", held)
    feeds = batches(3, 70, 5)
    graph = with_own_parameters(typed(feeds), qir.load_target("asic"))
    walk = walked(graph, feeds)
    assert walk.samples == 78
    assert [[layer.result.name for layer in level] for level in walk.levels] == [["a"], ["b"], ["y"]]
    found = read(walk)
    whole = {"x": np.concatenate([f["x"] for f in feeds])}
    real, rounded = (dict(evaluate(graph.with_changes(stage=stage), whole)) for stage in (Stage.FLOAT, Stage.TYPED))
    for layer in layers_of(graph):
        for side, expected in zip(found[layer.result.name], (real, rounded), strict=True):
            # No tie among these weights, whose rounding evaluate and legalize may not share.
            np.testing.assert_allclose(side, expected[layer.operands[0]], rtol=0, atol=1e-6)
    assert not np.array_equal(*found["y"])


def test_what_is_set_is_what_layers_behind_read() -> None:
    feeds = batches(8)
    graph = with_own_parameters(typed(feeds), qir.load_target("asic"))
    walk = walked(graph, feeds)
    (first,) = walk.levels[0]
    list(walk.inputs(0))
    walk.set_weight(first, np.zeros_like(walk.weight(first)))
    walk.set_bias(first, np.full(3, 0.5, np.float32))
    for part in walk.inputs(1):
        assert (part.rounded[first.result] == 0.5).all()
        assert part.real[first.result].std() > 0
    assert walk.bias(first).tolist() == [0, 0, 0]


def test_in_floating_point_alone_nothing_is_rounded() -> None:
    feeds = batches(8)
    graph = typed(feeds)
    found, expected = read(walked(graph, feeds, rounded=False)), read(walked(graph, feeds))
    for name, (real, rounded) in found.items():
        assert real is rounded or np.array_equal(real, rounded)
        assert np.array_equal(real, expected[name][0])


def test_shared_weights_are_parted() -> None:
    feeds = batches(8)
    before = typed(feeds)
    assert with_own_parameters(before, qir.load_target("asic"), bias=False) is before
    graph = parse(str(before).replace("%s = Add %a, %b", _second_conv(before) + "\n  %s = Add %a, %d"))
    after = with_own_parameters(graph, qir.load_target("asic"))
    parameters = [v for layer in layers_of(after) for v in layer.operands[1:]]
    assert len(parameters) == len(set(parameters)) == 8
    b, d = (op for op in after.ops if isinstance(op, Conv) and op.result.name in "bd")
    assert np.array_equal(after.constants[b.operands[1]].data, after.constants[d.operands[1]].data)


def _second_conv(graph: Graph) -> str:
    """A convolution by the weights and bias of %b."""
    line = next(line for line in str(graph).splitlines() if line.lstrip().startswith("%b = Conv"))
    return line.strip().replace("%b =", "%d =").replace("Conv %a", "Conv %b")


def walked_once(feeds: list[Feed]) -> Iterator[Feed]:
    yield from feeds


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        (None, "some-pass runs the graph on calibration data, and there are no feeds; pass calibration="),
        (Calibration(), "there are no feeds"),
        (walked_once(batches(1)), "an iterator is spent after one walk; pass a list"),
        ([], "calibration data is empty"),
        ([{"z": np.zeros(1)}], "calibration feed 0: .*missing"),
        (batches(1)[0], "calibration feed 0 is of type str"),
    ],
)
def test_feeds_that_do_not_serve_are_refused(feeds: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        walked(typed(batches(8)), feeds)
