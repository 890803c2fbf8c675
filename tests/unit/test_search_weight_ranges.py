"""Ranges of weights: clipped where that costs less, with room for sums, and with the types of biases behind them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from branches import TARGETS, batches, legalized, typed
from models import PATHS, calibration_images, labelled_images

import qir
from qir.cost_tables import CostRule, Costs
from qir.errors import CalibrationError, PassError
from qir.ir import Graph, Stage
from qir.ops.fixed_rescale import dequantize_array
from qir.parser import parse
from qir.pass_manager import PassContext
from qir.passes.correct_bias import CorrectBias
from qir.passes.layer_walk import integers_of, layers_of, quantized_element
from qir.passes.pipelines import default_pipeline, parse_pipeline
from qir.passes.search_weight_ranges import Method, SearchWeightRanges
from qir.printer import print_graph, resources
from qir.target import Granularity, Scheme, Target, WeightFormat
from qir.types import QuantizedType, integer, scale_array, zero_array
from qir.verifier import verify

ARM = qir.load_target("arm-neon")


def few_bits(bits: int, **weights: Any) -> Target:
    """arm-neon, real scales, with weights of so many bits."""
    changed = replace(ARM.weights, bits=(bits,), default=None, matmul=Granularity.PER_CHANNEL, **weights)
    return replace(ARM, weights=changed, costs=Costs(CostRule.BIT_OPERATIONS))


def searched(graph: Graph, target: Target, feeds: Any = None, **options: Any) -> Graph:
    after = SearchWeightRanges(**options).run(graph, PassContext(target, feeds))
    verify(after)
    assert parse(print_graph(after), resources(after)) == after
    return after


def one_layer(weights: npt.NDArray[np.float32], target: Target, form: str = "") -> Graph:
    """A matrix product with these weights [inputs, outputs], typed."""
    rows, columns = weights.shape
    text = ", ".join(map(str, weights.ravel().tolist()))
    graph = parse(f"""
        graph @one stage=float (%x: Nx{rows} x f32) {{
          %w = const {{value=f32 {rows}x{columns} [{text}]}} : {rows}x{columns} x f32
          %b = const {{value=f32 {columns} [{", ".join(["0.25"] * columns)}]}} : {columns} x f32
          %y = MatMul %x, %w, %b : Nx{columns} x f32
          return %y
        }}
    """)
    x = np.random.default_rng(5).normal(size=(64, rows)).astype(np.float32)
    return typed([{"x": x}], target, f"*:w{target.weights.bits[0]}{form}", graph)


def weight_type(graph: Graph) -> QuantizedType:
    return quantized_element(layers_of(graph)[0].operands[1])


def errors(graph: Graph) -> npt.NDArray[np.float64]:
    """The squared error of the weights of each column."""
    data = graph.constants[layers_of(graph)[0].operands[1]].data
    element = weight_type(graph)
    rounded = dequantize_array(integers_of(data, element), element)
    return np.asarray(((rounded - data.astype(np.float64)) ** 2).sum(axis=0))


def with_outliers(seed: int = 0) -> npt.NDArray[np.float32]:
    weights = np.random.default_rng(seed).normal(size=(40, 3))
    weights[0] = 5, -6, 4
    return weights.astype(np.float32)


@pytest.mark.parametrize("granularity", list(Granularity))
@pytest.mark.parametrize("kind", ["symmetric", "affine", "power_of_two"])
def test_no_range_that_is_tried_has_a_smaller_error(kind: str, granularity: Granularity) -> None:
    base = qir.load_target("asic") if kind == "power_of_two" else few_bits(3, scheme=Scheme(kind), narrow_range=False)
    target = replace(base, weights=replace(base.weights, bits=(3,), default=None, matmul=granularity))
    before = one_layer(with_outliers(), target)
    after = searched(before, target)
    costs = []
    for factor in 2.0 ** -(np.arange(33) / 8):
        if kind == "power_of_two" and not np.log2(factor).is_integer():
            continue
        element = weight_type(before)
        scale = (scale_array(element) * factor).astype(np.float32)
        data = before.constants[layers_of(before)[0].operands[1]].data.astype(np.float64)
        integers = np.clip(np.rint(data / scale) + zero_array(element), element.storage.lo, element.storage.hi)
        costs.append((((integers - zero_array(element)) * scale - data) ** 2).sum(axis=0))
    found, least = errors(after), np.array(costs)
    if granularity is Granularity.PER_TENSOR:
        found, least = found.sum(keepdims=True), least.sum(axis=1, keepdims=True)
    assert (found <= least.min(axis=0) + 1e-6).all()
    assert (found < least[0]).all()


def test_biases_stay_at_the_scale_of_the_sum() -> None:
    for name, override in TARGETS:
        target = qir.load_target(name)
        for method in Method:
            feeds = batches(8)
            graph = searched(typed(feeds, name, override), target, feeds, method=method)
            assert legalized(graph, name).stage is Stage.FIXED  # it refuses a bias at any other scale


def test_no_scale_leaves_less_room_than_the_sums_need() -> None:
    # Half of 12 bits is 2^10 units.
    target = few_bits(4, scheme=Scheme.SYMMETRIC)
    narrow = replace(target, accumulator=replace(target.accumulator, bits=12), bias_bits=12)
    weights = with_outliers()
    wide, tight = (searched(one_layer(weights, t), t) for t in (target, narrow))
    before = one_layer(weights, narrow)
    assert (scale_array(weight_type(tight)) > scale_array(weight_type(wide))).all()
    assert (scale_array(weight_type(tight)) <= scale_array(weight_type(before))).all()
    source = scale_array(quantized_element(layers_of(tight)[0].operands[0]))
    for layer in layers_of(tight):
        largest = max(abs(float(end)) for end in (layer.sum_range.lo, layer.sum_range.hi))  # type: ignore[union-attr]
        units = largest / (source * scale_array(weight_type(tight)))
        assert (units < 1.000001 * 2**10).all()


def test_both_ends_of_affine_weights_are_clipped_apart() -> None:
    target = few_bits(4, scheme=Scheme.AFFINE, narrow_range=False)
    weights = np.random.default_rng(1).uniform(0, 1, (2000, 2)).astype(np.float32)
    weights[0], weights[1] = (-3, 1), (1, 3)  # each column reaches far on one side
    element = weight_type(searched(one_layer(weights, target), target))
    storage, scale, zero = element.storage, scale_array(element), zero_array(element)
    low, high = (storage.lo - zero) * scale, (storage.hi - zero) * scale
    assert low[0] > -1.5
    assert high[0] > 0.9
    assert low[1] == 0
    assert high[1] < 2


def test_outputs_weigh_errors_by_what_they_multiply() -> None:
    target = few_bits(2)
    x = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32) * np.array([4.0, 0.1, 0.1, 0.1], np.float32)
    weights = np.array([[0.3], [1.0], [-1.0], [0.9]], np.float32)
    graph = one_layer(weights, target)
    scale = float(scale_array(weight_type(searched(graph, target, [{"x": x}], method=Method.OUTPUT)))[0])
    assert abs(integers_of(weights[:1], weight_type(graph))).max() == 0
    assert scale == pytest.approx(0.3, abs=0.03)  # one step: the first weight is all that counts
    assert float(scale_array(weight_type(searched(graph, target)))[0]) > 0.6


def test_a_percentile_keeps_so_many_weights() -> None:
    weights = np.arange(1, 201, dtype=np.float32).reshape(100, 2)
    weights[:, 1] *= -1
    target = few_bits(8)
    for percent, kept in ((100, (199.0, 200.0)), (99, (197.0, 198.0)), (50, (99.0, 100.0)), (None, (199.0, 200.0))):
        graph = searched(one_layer(weights, target), target, method=Method.PERCENTILE, percent=percent)
        np.testing.assert_allclose(scale_array(weight_type(graph)) * 127, kept, rtol=1e-6)
    affine = few_bits(8, scheme=Scheme.AFFINE, narrow_range=False)
    both = np.concatenate([weights[:, :1], -weights[:, :1]]).astype(np.float32)
    graph = searched(one_layer(both, affine), affine, method=Method.PERCENTILE, percent=99)  # one of 200 on either side
    np.testing.assert_allclose(scale_array(weight_type(graph)) * 255, 2 * 197, rtol=1e-6)


def test_a_percentile_leaves_fitted_scales_of_few_levels_alone() -> None:
    """Of -1 and 1 no share of the magnitudes is the mean magnitude, which is what costs least."""
    target = few_bits(1, narrow_range=False)
    before = one_layer(np.random.default_rng(1).normal(size=(40, 3)).astype(np.float32), target)
    after = searched(before, target, method=Method.PERCENTILE)
    assert (errors(after) <= errors(before)).all()


@pytest.mark.parametrize("scheme", list(Scheme))
def test_a_channel_of_mostly_zeros_keeps_its_range(scheme: Scheme) -> None:
    weights = np.zeros((100, 2), np.float32)
    weights[:, 0], weights[7, 1] = np.linspace(1, 2, 100), 1.5
    target = few_bits(8, scheme=scheme, narrow_range=False)
    before = one_layer(weights, target)
    after = searched(before, target, method=Method.PERCENTILE, percent=90)
    old, new = (scale_array(weight_type(graph)) for graph in (before, after))
    assert new[0] < old[0]
    assert new[1] == old[1]


def test_what_is_best_already_stays() -> None:
    target = few_bits(2)
    graph = one_layer(np.array([[1.0, -0.5], [-1.0, 0.5]], np.float32), target)
    context = PassContext(target)
    assert SearchWeightRanges().run(graph, context) is graph
    assert context.notes == ["0 of 1 weights have other scales by mse; squared error 100% of before on average"]


def test_weights_alone_stay_and_it_says_so() -> None:
    context = PassContext(qir.load_target("tensorrt"))
    graph = typed(batches(8), "tensorrt", "*:w4")
    assert SearchWeightRanges().run(graph, context) is graph
    assert context.notes == ["0 of 0 weights have other scales by mse"]


def test_a_shared_weight_gets_a_scale_for_each_reader() -> None:
    target = few_bits(3, narrow_range=False)
    single = one_layer(with_outliers(), target)
    text = str(single)
    line = next(line for line in text.splitlines() if "%y = MatMul" in line)
    text = text.replace(line, f"{line}\n{line.replace('%y =', '%z =')}").replace("return %y", "return %y, %z")
    graph = parse(text, resources(single))
    after = searched(graph, target)
    assert len({layer.operands[1] for layer in layers_of(after)}) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method=best", "option method=best"),
        ("percent=99", "percent=99.0 is for method=percentile, not for method=mse"),
        ("method=percentile,percent=0", "percent=0.0 must be over 0 and at most 100"),
        ("method=percentile,percent=100.5", "percent=100.5 must be over 0 and at most 100"),
        ("method=percentile,percent=nan", "percent=nan must be over 0 and at most 100"),
    ],
)
def test_options_that_do_not_fit_are_refused(text: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        parse_pipeline(f"search-weight-ranges{{{text}}}")


def test_options_are_read_and_printed() -> None:
    text = "search-weight-ranges{method=percentile,percent=99.5},search-weight-ranges"
    assert str(parse_pipeline(text)) == text


def test_outputs_need_feeds() -> None:
    with pytest.raises(CalibrationError, match="search-weight-ranges runs the graph on calibration data"):
        searched(typed(batches(8)), qir.load_target("asic"), method=Method.OUTPUT)


def test_few_bits_lose_less() -> None:
    images, labels = (a[:2000] for a in labelled_images())
    graph, feeds = qir.import_onnx(PATHS["fm_mobile"]), [{"x": calibration_images()}]
    corrected = default_pipeline().insert_after("select-q-formats", CorrectBias())
    found = []
    for pipeline in (corrected, corrected.insert_after("select-q-formats", SearchWeightRanges())):
        program = qir.compile(graph, "asic", feeds, pipeline=pipeline, overrides={"*": "w3"})
        found.append(float(np.mean(program.run({"x": images})["logits"].argmax(axis=1) == labels)))
    assert found[1] > found[0] + 0.05


@pytest.mark.parametrize("target", ["arm-neon", "asic"])
def test_activations_by_percentile(target: str) -> None:
    x = np.linspace(-1, 1, 20_001, dtype=np.float32)[:, None]
    x[0] = -64
    graph = parse("""
        graph @one stage=float (%x: Nx1 x f32) {
          %y = Relu %x : Nx1 x f32
          return %y
        }
    """)
    context = PassContext(qir.load_target(target), [{"x": x}])
    spans = []
    for search in ("percentile,percent=99.9", "percentile", "range"):
        pipeline = parse_pipeline(f"calibrate,range-analysis,assign-bit-widths,select-q-formats{{search={search}}}")
        (value,) = pipeline.run(graph, context).inputs
        spans.append(256 * float(scale_array(quantized_element(value))))
    assert spans[0] < 4.1  # 2, or a power of two for the upper end
    assert spans[0] <= spans[1] < spans[2]
    assert spans[2] > 64


def test_a_percentile_of_activations_that_does_not_fit_is_refused() -> None:
    assert str(parse_pipeline("select-q-formats{search=percentile,percent=99.5}")) == (
        "select-q-formats{search=percentile,percent=99.5}"
    )
    with pytest.raises(PassError, match=r"percent=99\.0 is for search=percentile, not for search=mse"):
        parse_pipeline("select-q-formats{percent=99}")
    with pytest.raises(PassError, match="must be over 0 and at most 100"):
        parse_pipeline("select-q-formats{search=percentile,percent=-1}")


def test_storage_of_weights_is_kept() -> None:
    graph = searched(one_layer(with_outliers(), few_bits(4)), few_bits(4))
    assert weight_type(graph).storage == integer(4).narrowed(-7, 7)


@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("method", list(Method))
def test_levels_of_negative_weights_reach_the_largest_magnitude(method: Method, has_zeros: bool) -> None:
    """A codebook of them ends with 0, or below it: its scale follows from the other end."""
    weights = -np.abs(np.random.default_rng(3).normal(size=(40, 3))).astype(np.float32) - np.float32(0.2)
    if has_zeros:
        weights[::2] = 0
    target = few_bits(4, formats=tuple(WeightFormat))
    feeds = [{"x": np.random.default_rng(5).normal(size=(64, 40)).astype(np.float32)}]
    percent = {"percent": 100.0} if method is Method.PERCENTILE else {}
    after = searched(one_layer(weights, target, "/codebook"), target, feeds, method=method, **percent)
    assert (errors(after) < 0.02 * np.square(weights, dtype=np.float64).sum(axis=0)).all()
