"""Learned rounding: outputs come nearer than by rounding to nearest, and legalize finds the integers chosen."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from branches import TARGETS, Feed, batches, legalized, typed
from models import PATHS, calibration_images, labelled_images

import qir
from qir.cost_tables import CostRule, Costs
from qir.errors import PassError
from qir.interpreter import evaluate, interpret
from qir.ir import Graph, Stage
from qir.ops.constant import Const
from qir.ops.fixed_rescale import dequantize_array
from qir.ops.float_nn import Conv, MatMul
from qir.parser import parse
from qir.pass_manager import PassContext
from qir.passes.correct_bias import CorrectBias
from qir.passes.layer_walk import integers_of, layers_of, quantized_element
from qir.passes.learn_rounding import LearnRounding
from qir.passes.pipelines import default_pipeline, parse_pipeline
from qir.passes.search_weight_ranges import SearchWeightRanges
from qir.printer import print_graph, resources
from qir.target import Scheme, Target
from qir.types import QuantizedType, affine, fixed_point, integer, scale_array, zero_array
from qir.verifier import verify

Vector = npt.NDArray[np.float64]


def learned(graph: Graph, feeds: Any, target: str | Target = "asic", damping: float = 0.03) -> Graph:
    loaded = qir.load_target(target) if isinstance(target, str) else target
    after = LearnRounding(damping).run(graph, PassContext(loaded, feeds))
    verify(after)
    assert parse(print_graph(after), resources(after)) == after
    return after


def sums(graph: Graph, feeds: list[Feed]) -> dict[str, Vector]:
    """What every layer gives before its activation, by name, for all samples at once."""
    arrays = {v.name: a for v, a in evaluate(graph, {"x": np.concatenate([f["x"] for f in feeds])})}
    bare = (op.with_changes(clip=None, unclipped=None) for op in graph.ops if isinstance(op, Conv | MatMul))
    return {op.result.name: op.compute(*(arrays[v.name] for v in op.operands)).astype(np.float64) for op in bare}


def test_each_layer_behind_others_comes_nearer_than_by_nearest_and_bias() -> None:
    feeds = batches(30, 34)
    before = typed(feeds)
    wanted = sums(before.with_changes(stage=Stage.FLOAT), feeds)
    corrected = CorrectBias().run(before, PassContext(qir.load_target("asic"), feeds))
    found = {"nearest": before, "bias": corrected, "learned": learned(before, feeds)}
    errors = {
        name: [float(((s - wanted[k]) ** 2).mean()) for k, s in sums(graph, feeds).items()]
        for name, graph in found.items()
    }
    assert len(errors["learned"]) == 3
    assert all(x < y for x, y in zip(errors["learned"], errors["nearest"], strict=True))
    assert all(x <= y for x, y in zip(errors["learned"], errors["bias"], strict=True))
    assert errors["learned"][-1] < 0.8 * errors["bias"][-1]


def one_layer(weights: npt.NDArray[np.float32], x: npt.NDArray[np.float32]) -> tuple[Graph, list[Feed]]:
    """A matrix product typed with 2-bit weights."""
    rows, columns = weights.shape
    text = ", ".join(map(str, weights.ravel().tolist()))
    graph = parse(f"""
        graph @one stage=float (%x: Nx{rows} x f32) {{
          %w = const {{value=f32 {rows}x{columns} [{text}]}} : {rows}x{columns} x f32
          %y = MatMul %x, %w : Nx{columns} x f32
          return %y
        }}
    """)
    feeds = [{"x": x}]
    return typed(feeds, graph=graph), feeds


@pytest.mark.parametrize("seed", range(6))
def test_a_small_layer_is_as_good_as_the_best_of_all_roundings(seed: int) -> None:
    random = np.random.default_rng(seed)
    x = (random.normal(size=(200, 3)) @ random.normal(size=(3, 3)) + 1).astype(np.float32)
    graph, feeds = one_layer(random.uniform(-1, 1, (3, 2)).astype(np.float32), x)
    (layer,) = layers_of(graph)
    element = quantized_element(layer.operands[1])
    weights = graph.constants[layer.operands[1]].data.astype(np.float64)
    rounded = next(a for v, a in evaluate(graph, feeds[0]) if v.name == "x").astype(np.float64)
    damping = 0.03 * rounded.var(axis=0).mean()

    def objective(v: Vector) -> Vector:
        found = (x @ weights - rounded @ v).var(axis=0) + damping * ((v - weights) ** 2).sum(axis=0)
        return np.asarray(found)

    every = itertools.product(range(element.storage.lo, element.storage.hi + 1), repeat=3)
    best = np.min([objective(dequantize_array(np.array([q, q]).T, element).astype(np.float64)) for q in every], axis=0)
    nearest = objective(dequantize_array(integers_of(weights, element), element).astype(np.float64))
    after = learned(graph, feeds)
    found = objective(after.constants[layers_of(after)[0].operands[1]].data.astype(np.float64))
    assert (found <= nearest + 1e-9).all()
    assert (found >= best - 1e-9).all()
    assert np.isclose(found, best).any()
    mean = interpret(after, feeds[0])["y"].mean(axis=0)
    assert np.abs(mean - (x @ weights).mean(axis=0)).max() < 0.1  # a step of the output


@pytest.mark.parametrize("value", [0.0, 1.0, 1000.0])
def test_inputs_that_do_not_vary_leave_weights_at_the_nearest(value: float) -> None:
    weights = np.random.default_rng(0).uniform(-1, 1, (20, 3)).astype(np.float32)
    graph, feeds = one_layer(weights, np.full((50, 20), value, np.float32))
    after = learned(graph, feeds)
    (layer,) = layers_of(after)
    element = quantized_element(layer.operands[1])
    assert np.array_equal(integers_of(after.constants[layer.operands[1]].data, element), integers_of(weights, element))
    rounded = interpret(after, feeds[0])["y"]
    step = scale_array(quantized_element(layer.result)).max()
    assert np.abs(rounded - feeds[0]["x"] @ weights).max() <= step


def test_the_same_feeds_give_the_same_bits() -> None:
    feeds = batches(20)
    graph = typed(feeds)
    assert learned(graph, feeds) == learned(graph, feeds)


def fixed_weights(graph: Graph) -> dict[str, npt.NDArray[Any]]:
    """The integers of every constant, sorted: legalize moves axes."""
    return {op.result.name: np.sort(op.value.data, axis=None) for op in graph.ops if isinstance(op, Const)}


@pytest.mark.parametrize(("name", "override"), [t for t in TARGETS if t[0] != "tensorrt"])
def test_legalize_finds_the_integers_that_were_chosen(name: str, override: str) -> None:
    feeds = batches(16)
    graph = learned(typed(feeds, name, override), feeds, name)
    found = fixed_weights(legalized(graph, name))
    for layer in layers_of(graph):
        weight = layer.operands[1]
        element, data = quantized_element(weight), graph.constants[weight].data
        integers = integers_of(data, element)
        assert np.array_equal(dequantize_array(integers, element), data)  # on the grid already
        assert np.array_equal(found[weight.name], np.sort(integers, axis=None))


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_reals_of_integers_round_to_these_at_any_scale(bits: int) -> None:
    random = np.random.default_rng(bits)
    storage = integer(bits)
    scales = np.exp2(random.uniform(-126, 100, 4096)).astype(np.float32)
    zeros = random.integers(storage.lo, storage.hi + 1, 4096)
    kinds: list[QuantizedType] = [
        affine(storage, scales, np.zeros_like(zeros), 0),
        affine(storage, scales, zeros, 0),
        fixed_point(storage, np.arange(-126, 100), 0),
    ]
    for element in kinds:
        channels = element.parameters.size
        integers = random.integers(storage.lo, storage.hi + 1, (channels, 40))
        integers[:, :2] = storage.lo, storage.hi
        assert np.array_equal(integers_of(dequantize_array(integers, element), element), integers)


def test_bounds_of_a_narrow_storage_hold() -> None:
    feeds = batches(16)
    graph = learned(typed(feeds, "arm-neon", "*:8"), feeds, "arm-neon")
    for layer in layers_of(graph):
        element = quantized_element(layer.operands[1])
        assert (element.storage.lo, element.storage.hi) == (-127, 127)
        assert np.abs(integers_of(graph.constants[layer.operands[1]].data, element)).max() <= 127


def test_affine_weights_are_learned() -> None:
    arm = qir.load_target("arm-neon")
    coarse = replace(arm.weights, bits=(2,), default=None, scheme=Scheme.AFFINE, narrow_range=False)
    target = replace(arm, weights=coarse, costs=Costs(CostRule.BIT_OPERATIONS))
    feeds = batches(64)
    before = typed(feeds, target)
    wanted = sums(before.with_changes(stage=Stage.FLOAT), feeds)["y"]
    after = learned(before, feeds, target)
    assert any(zero_array(layer.operands[1].type.element).any() for layer in layers_of(after))
    corrected = CorrectBias().run(before, PassContext(target, feeds))
    errors = [((sums(graph, feeds)["y"] - wanted) ** 2).mean() for graph in (after, corrected, before)]
    assert errors[0] < errors[1] < errors[2]


def test_weights_alone_and_batches_of_matrices_stay() -> None:
    feeds = batches(8)
    before = typed(feeds, "tensorrt", "*:w4")
    context = PassContext(qir.load_target("tensorrt"), feeds)
    assert LearnRounding().run(before, context) is before
    assert context.notes == ["no weights to learn"]


def test_it_says_what_it_changed_and_how_far_it_is() -> None:
    shown: list[tuple[str, int, int]] = []
    feeds = batches(8, 8)
    context = PassContext(qir.load_target("asic"), feeds, progress=lambda *done: shown.append(done))
    LearnRounding().run(typed(feeds), context)
    (note,) = context.notes
    assert " of 15 weights moved from the nearest integer; what rounding costs outputs is " in note
    assert shown == [("learn-rounding", done, 6) for done in range(1, 7)]


@pytest.mark.parametrize("damping", ["0", "-1", "9e-7", "2e6", "nan", "inf"])
def test_a_damping_that_does_not_serve_is_refused(damping: str) -> None:
    with pytest.raises(PassError, match=rf"pass learn-rounding: damping={float(damping)} must be from 1e-6 to 1e6"):
        parse_pipeline(f"learn-rounding{{damping={damping}}}")


def test_options_are_read_and_printed() -> None:
    assert str(parse_pipeline("learn-rounding{damping=0.5},learn-rounding")) == (
        "learn-rounding{damping=0.5},learn-rounding"
    )


@pytest.mark.parametrize(("model", "bits", "lost"), [("fm_cnn", 3, 0.01), ("fm_mobile", 4, 0.01)])
def test_models_keep_their_accuracy(model: str, bits: int, lost: float) -> None:
    images, labels = (a[:2000] for a in labelled_images())
    graph, feeds = qir.import_onnx(PATHS[model]), [{"x": calibration_images()}]
    pipeline = default_pipeline().insert_after("select-q-formats", LearnRounding())
    pipeline = pipeline.insert_after("select-q-formats", SearchWeightRanges())
    program = qir.compile(graph, "asic", feeds, pipeline=pipeline, overrides={"*": f"w{bits}"})
    found, real = (
        run["logits"].argmax(axis=1) for run in (program.run({"x": images}), interpret(graph, {"x": images}))
    )
    assert np.mean(found == labels) > np.mean(real == labels) - lost
