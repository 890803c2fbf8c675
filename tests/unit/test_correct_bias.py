"""Bias correction: the mean error of each layer goes, in order, from calibration feeds alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from branches import TARGETS, Feed, batches, legalized, typed
from models import PATHS, calibration_images, labelled_images

import qir
from qir.errors import PassError
from qir.interpreter import evaluate
from qir.ir import Graph, Stage
from qir.ops.float_nn import Conv, MatMul
from qir.parser import parse
from qir.pass_manager import PassContext
from qir.passes.correct_bias import CorrectBias
from qir.passes.pipelines import default_pipeline
from qir.printer import print_graph, resources
from qir.types import scale_array
from qir.verifier import verify


def corrected(graph: Graph, feeds: Any, target: str = "asic", **options: Any) -> tuple[Graph, PassContext]:
    context = PassContext(qir.load_target(target), feeds, **options)
    after = CorrectBias().run(graph, context)
    verify(after)
    return after, context


def mean_sums(graph: Graph, feeds: list[Feed]) -> dict[str, npt.NDArray[np.float64]]:
    """The mean of every layer's sums, before its activation, per channel: by name, one batch of all samples."""
    ops = tuple(op.with_changes(clip=None, unclipped=None) if isinstance(op, Conv | MatMul) else op for op in graph.ops)
    whole = {"x": np.concatenate([f["x"] for f in feeds])}
    found: dict[str, npt.NDArray[np.float64]] = {}
    arrays = {v.name: a for v, a in evaluate(graph, whole)}
    for bare in ops:
        if isinstance(bare, Conv | MatMul):
            sums = bare.compute(*(arrays[v.name] for v in bare.operands)).astype(np.float64)
            found[bare.result.name] = sums.mean(axis=tuple(i for i in range(sums.ndim) if i != 1))
    return found


def test_sums_have_the_mean_of_the_float_graph() -> None:
    feeds = batches(5, 40, 3)
    before = typed(feeds)
    after, context = corrected(before, feeds)
    wanted = mean_sums(before.with_changes(stage=Stage.FLOAT), feeds)
    off, left = (
        {name: np.abs(sums - wanted[name]).max() for name, sums in mean_sums(graph, feeds).items()}
        for graph in (before, after)
    )
    assert set(left) == {"a", "b", "y"}
    for layer in (op for op in after.ops if isinstance(op, Conv | MatMul)):
        step = scale_array(layer.operands[2].type.element).max()  # type: ignore[arg-type]
        assert off[layer.result.name] > 4 * step
        assert left[layer.result.name] < step / 2 + 1e-5
    (note,) = context.notes
    assert note.startswith("3 biases corrected; outputs were off by ")


def test_a_layer_without_a_bias_gets_one_that_is_lowered() -> None:
    feeds = batches(8)
    for target, override in TARGETS:
        after, _ = corrected(typed(feeds, target, override), feeds, target)
        assert "a.bias" in {v.name for v in after.constants}
        assert parse(print_graph(after), resources(after)) == after
        assert legalized(after, target).stage is Stage.FIXED


def test_feeds_are_all_that_counts_not_how_they_are_cut() -> None:
    whole, parts = batches(64), []
    for start, end in ((0, 1), (1, 30), (30, 64)):
        parts.append({"x": whole[0]["x"][start:end]})
    graph = typed(whole)
    a, b = (corrected(graph, feeds)[0].constants for feeds in (whole, parts))
    for (name, one), (_, other) in zip(a.items(), b.items(), strict=True):
        np.testing.assert_allclose(one.data, other.data, rtol=0, atol=1e-6, err_msg=name.name)


def test_it_shows_how_far_it_is() -> None:
    shown: list[tuple[str, int, int]] = []
    feeds = batches(2, 2)
    corrected(typed(feeds), feeds, progress=lambda *done: shown.append(done))
    # Once for each of three layers in a row, two feeds each.
    assert shown == [("correct-bias", done, 6) for done in range(1, 7)]


def test_it_needs_a_target() -> None:
    with pytest.raises(PassError, match="correct-bias needs a target"):
        CorrectBias().run(typed(batches(8)), PassContext(calibration=batches(8)))


def test_without_layers_nothing_changes() -> None:
    graph = Graph("empty", Stage.TYPED, (), (), (), ())
    context = PassContext(qir.load_target("asic"), batches(1))
    assert CorrectBias().run(graph, context) is graph
    assert context.notes == ["no layers to correct"]


def test_few_bits_lose_less() -> None:
    images, labels = (a[:2000] for a in labelled_images())
    graph, feeds = qir.import_onnx(PATHS["fm_cnn"]), [{"x": calibration_images()[:128]}]
    found = []
    for pipeline in (default_pipeline(), default_pipeline().insert_after("select-q-formats", CorrectBias())):
        program = qir.compile(graph, "asic", feeds, pipeline=pipeline, overrides={"*": "w3"})
        found.append(float(np.mean(program.run({"x": images})["logits"].argmax(axis=1) == labels)))
    assert found[1] > found[0] + 0.2
