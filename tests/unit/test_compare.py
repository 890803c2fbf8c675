"""One model on several targets: what differs, by how much, and which op and rule are named for it."""

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from models import PATHS, images
from onnx_models import model, random

import qir
from qir.backend import load_target
from qir.cli import main
from qir.comparison.attribution import find_cause
from qir.comparison.replay import Side, carried, make_side, replay
from qir.comparison.result import LayerComparison, TargetComparison
from qir.comparison.swaps import Rule
from qir.ops.constant import Const
from qir.ops.fixed_rescale import Requantize
from qir.types import S8, U8, affine, zero_array

Array = npt.NDArray[Any]
Variant = Callable[[str, str], Path]

SMALL = """g (float[N, 4, 8, 8] x) => (float[N, 6] y) {
    h = Conv<pads=[1, 1, 1, 1]>(x, w, b) s = HardSwish(h) q = AveragePool<kernel_shape=[2, 2], strides=[2, 2]>(s)
    m = MaxPool<kernel_shape=[2, 2]>(q) f = Flatten(m) y = Gemm(f, v, c)
}"""
# Every way in which layouts, ranks and formats meet: maps, rows and 1-d signals, tables, concatenations and indices.
MANY = """g (float[N, 4, 8, 8] x) => (float[N, 6] y, int64[N, 5, 1] k, float[N, 7, 4] z) {
    h = Conv<pads=[1, 1, 1, 1]>(x, w, b) r = Relu(h) s = HardSwish(h) t = Add(r, s) l = LeakyRelu<alpha=0.2>(t)
    g0 = Sigmoid(l) u = Mul(l, g0) pr = PRelu(u, slope) d = Sub(pr, constant)
    q = AveragePool<kernel_shape=[2, 2], strides=[2, 2]>(d) pd = Pad(q, pads) sc = Slice(pd, starts, ends, axes)
    m = MaxPool<kernel_shape=[2, 2]>(q) tr = Transpose<perm=[0, 2, 3, 1]>(m) f = Flatten(tr) y = Gemm(f, v, c)
    cc = Concat<axis=1>(q, sc) ga = ReduceMean<axes=[2], keepdims=0>(cc) c1 = Conv(ga, w1) th = Tanh(c1)
    k = ArgMax<axis=2>(th) sm = Softmax<axis=2>(c1) z0 = Concat<axis=1>(th, sm) z = Gather<axis=1>(z0, indices)
}"""
WEIGHTS: dict[str, Any] = {
    "w": random(6, 4, 3, 3, seed=1),
    "b": random(6, seed=2),
    "v": random(54, 6, seed=3),
    "c": random(6, seed=4),
    "slope": np.abs(random(6, 1, 1, seed=5)),
    "constant": random(1, 6, 8, 8, seed=6),
    "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    "starts": np.array([1, 1]),
    "ends": np.array([5, 5]),
    "axes": np.array([2, 3]),
    "w1": random(5, 12, 1, seed=7),
    "indices": np.array([0, 3, 4, 6, 8, 9, 1]),
}
SAMPLES = random(16, 4, 8, 8)
FEEDS = [{"x": SAMPLES}]


def _graph(text: str, **more: Any) -> qir.Graph:
    body = text.split("{")[1]
    used = {n: a for n, a in {**WEIGHTS, **more}.items() if any(f"{o}{n}{e}" in body for o in "( " for e in ",)")}
    return qir.import_onnx(model(text, **used))


@cache
def _small() -> qir.Graph:
    return _graph(SMALL)


@pytest.fixture
def variant(tmp_path: Path) -> Variant:
    """Writes a contract, named `variant`, that differs from a target in these lines."""

    def write(parent: str, lines: str) -> Path:
        path = tmp_path / "variant.toml"
        path.write_text(f'name = "variant"\ndescription = "changed"\ninherits = "{parent}"\n{lines}\n')
        return path

    return write


def _pair(graph: qir.Graph, first: Any, second: Any, feeds: Any = FEEDS, inputs: Any = None) -> TargetComparison:
    (other,) = qir.compare(graph, [first, second], feeds, inputs).others
    return other


def _layer(pair: TargetComparison, name: str) -> LayerComparison:
    (found,) = [layer for layer in pair.layers if layer.layer == name]
    return found


def _named(pair: TargetComparison) -> dict[str, str]:
    return {layer.layer: str(layer.cause) for layer in pair.differing}


# Nothing differs


@pytest.mark.parametrize("target", ["arm-neon", "arm-neon-16x8", "onnxruntime", "x86-fbgemm", "tensorrt"])
def test_a_contract_under_another_name_does_not_differ(target: str, variant: Variant) -> None:
    pair = _pair(_graph(MANY), target, variant(target, ""))
    assert len(pair.layers) == 25
    assert [layer for layer in pair.layers if not layer.gap.is_none or not layer.accumulated.is_none] == []
    assert all(layer.cause is None and layer.gap.sqnr == math.inf for layer in pair.layers)


def test_cortex_m_gives_the_bits_of_arm_neon() -> None:
    with np.load(PATHS["fm_mobile"].with_name("fashion_mnist_demo.npz")) as data:
        calibration = images(data["calibration_images"])[:16]
    found = qir.compare(PATHS["fm_cnn"], ["arm-neon", "cortex-m"], [{"x": calibration}], samples=8)
    assert (found.samples, found.targets) == (8, ("arm-neon", "cortex-m"))
    assert len(found.others[0].layers) == 8
    assert found.others[0].differing == ()
    assert {layer.accumulated.differing for layer in found.others[0].layers} == {0}
    assert [o.same_choice for o in found.outputs] == [8, 8]
    assert "first that differs" not in str(found)


# How much differs, recomputed without what compare is made of


def _clamped(value: int, bits: int) -> int:
    return max(-(1 << (bits - 1)), min(value, (1 << (bits - 1)) - 1))


def _requantizer(graph: qir.Graph, name: str) -> Requantize:
    op = graph.producers[graph.value(name)]
    assert isinstance(op, Requantize)
    return op


def test_single_rounding_is_counted_as_it_is_defined() -> None:
    first, second = (qir.compile(_small(), name, FEEDS) for name in ("arm-neon", "arm-neon-single-round"))
    pair = _pair(_small(), "arm-neon", "arm-neon-single-round")
    traced, own = first.trace({"x": SAMPLES}), second.trace({"x": SAMPLES})
    for name in ("h", "y"):
        op = _requantizer(second.graph, name)
        zero = int(zero_array(op.result.type.element))
        multipliers, shifts = (np.broadcast_to(a.data, traced[name].shape[-1:]) for a in (op.multiplier, op.shift))
        expected = np.empty_like(traced[name])
        for place, acc in np.ndenumerate(traced[f"{name}.acc"]):
            total = 31 - int(shifts[place[-1]])
            rounded = (int(acc) * int(multipliers[place[-1]]) + (1 << (total - 1))) >> total
            expected[place] = _clamped(rounded + zero, 8)
        gap, layer = np.abs(expected.astype(int) - traced[name]), _layer(pair, name)
        assert layer.gap.elements == gap.size
        assert layer.gap.differing == np.count_nonzero(gap)
        assert layer.gap.largest == gap.max()
        assert layer.accumulated.largest == np.abs(own[name].astype(int) - traced[name]).max()
    cause = _layer(pair, "h").cause
    assert cause is not None
    assert (cause.op, cause.value, cause.rules, cause.proved) == ("requantize", "h", (Rule.ROUNDING,), True)
    assert set(_named(pair).values()) == {"requantize: rounding (double_round / single_round)"}


def test_guard_bits_are_counted_as_they_are_defined() -> None:
    graph = _graph("g (float[N, 24] x) => (float[N, 6] y) { y = Gemm(x, v, c) }", v=random(24, 6, seed=3))
    feeds, signs = [{"x": random(16, 24)}], np.sign(random(24, 6, seed=3)).T
    signs[:, 16:] *= -1  # sums leave 32 bits and come back
    loud = [{"x": signs * 100}]
    pair = _pair(graph, "dsp16", "dsp16-acc40", feeds, loud)
    first = qir.compile(graph, "dsp16", feeds)
    traced = first.trace(loud[0])
    op = _requantizer(first.graph, "y")
    shifts = np.broadcast_to(op.shift.data, (6,))
    weights, bias = traced["y.weight" if "y.weight" in traced else "v"], traced["c"]
    differing, largest = 0, 0
    for row, column in np.ndindex(6, 6):
        products = [2 * int(x) * int(w) for x, w in zip(traced["x"][row], weights[:, column], strict=True)]
        stepwise = once = int(bias[column])
        for product in products:
            stepwise = _clamped(stepwise + _clamped(product, 32), 32)
            once += product
        drop = -int(shifts[column])
        left, right = (_clamped((v + (1 << (drop - 1))) >> drop, 16) for v in (stepwise, _clamped(once, 32)))
        assert left == traced["y"][row, column]
        differing, largest = differing + (left != right), max(largest, abs(left - right))
    layer = _layer(pair, "y")
    assert differing > 0
    assert (layer.gap.differing, layer.gap.largest) == (differing, largest)
    assert str(layer.cause) == "matmul: accumulator (s32 / s40, saturate / wrap)"


def test_other_widths_are_compared_as_reals() -> None:
    pair = _pair(_small(), "arm-neon", "arm-neon-16x8")
    assert set(_named(pair).values()) == {"quantize: width (s8 / s16)", "input: width (s8 / s16)"}
    assert {layer.gap.differing for layer in pair.layers} == {None}
    graphs = [qir.compile(_small(), name, FEEDS) for name in ("arm-neon", "arm-neon-16x8")]
    sides = []
    for program in graphs:
        kind = program.graph.inputs[0].type.element
        integers = program.trace({"x": SAMPLES})["x"].astype(np.float64) - zero_array(kind)
        assert isinstance(kind, qir.AffineType)
        sides.append(integers * float(kind.scale.data))
    ratios = [_decibels(*pair) for pair in (sides, (SAMPLES, sides[0]), (SAMPLES, sides[1]))]
    layer = _layer(pair, "x")
    assert layer.float_sqnr is not None
    assert np.allclose([layer.gap.sqnr, *layer.float_sqnr], ratios, rtol=1e-5)
    assert (layer.op, layer.types[1][:4]) == ("input", "s16<")


def _decibels(reference: Array, found: Array) -> float:
    wide = reference.astype(np.float64)
    return float(10 * np.log10(np.square(wide).sum() / np.square(found - wide).sum()))


def test_outputs_are_those_of_the_programs() -> None:
    graph = _graph(MANY)
    names = ("arm-neon", "onnxruntime")
    found = qir.compare(graph, names, FEEDS)
    first, second = (qir.compile(graph, name, FEEDS).run({"x": SAMPLES}) for name in names)
    real = qir.interpret(graph, {"x": SAMPLES})
    y, k, z = found.outputs[3:]
    assert [(o.target, o.output) for o in (y, k, z)] == [("onnxruntime", name) for name in "ykz"]
    assert (y.choices, k.choices, z.choices) == (16, 80, 0)
    assert y.same_choice == np.count_nonzero(first["y"].argmax(1) == second["y"].argmax(1))
    assert k.same_choice == np.count_nonzero(second["k"] == first["k"])
    assert k.same_choice_float == np.count_nonzero(second["k"] == real["k"])
    assert k.float_sqnr is None
    assert z.float_sqnr is not None
    assert math.isclose(z.float_sqnr, _decibels(real["z"], second["z"]), rel_tol=1e-5)


# Which op and which rule

SINGLE = '[requantization]\nform = "single_round"'
PLANTED: dict[str, tuple[str, str, str, str]] = {
    "border": ("arm-neon", '[input]\nrounding = "floor"', "x", "quantize: rounding (half_away / floor)"),
    "pooling": ("arm-neon", '[pooling]\nrounding = "floor"', "q", "average_pool2d: rounding (half_away / floor)"),
    "form of one kind": (
        "arm-neon",
        '[requantization.conv]\nform = "float32"',
        "h",
        "requantize: rounding (double_round / float32)",
    ),
    "two rules of one op": (
        "arm-neon",
        f'{SINGLE}\noverflow = "saturate_symmetric"',
        "h",
        "requantize: rounding and saturation (double_round / single_round, saturate / saturate_symmetric)",
    ),
    "island": (
        "arm-neon",
        '[pooling]\naverage = "float32"\nrounding = "none"',
        "q",
        "AveragePool: island (integers / float32)",
    ),
    "scales of weights": (
        "arm-neon",
        '[weights]\nmatmul = "per_channel"',
        "y",
        "matmul: format (weights: per tensor / per channel)",
    ),
    "activations": (
        "arm-neon",
        '[activations]\nscheme = "symmetric"',
        "x",
        "quantize: format (0.02807, zero 11 / 0.0307)",
    ),
    "unsigned, narrower": ("arm-neon", "[activations]\nreduce_range = true", "x", "quantize: width (s8 / s8[-64, 63])"),
}
LOUD: dict[str, tuple[str, str, str, str]] = {
    "overflow of sums": ("dsp16", '[accumulator]\noverflow = "wrap"', "y", "matmul: accumulator (saturate / wrap)"),
    "order of sums": (
        "dsp16",
        '[accumulator]\norder = "ckhw"',
        "y",
        "matmul: accumulator (order bias_khwc / ckhw)",
    ),
    "rounded sums": (
        "fpga",
        '[accumulator]\nbits = 24\nrounding = "floor"',
        "h",
        "conv2d: accumulator (s27 / s24, product shift 0 / -1 floor)",
    ),
    "overflow of results": (
        "fpga",
        '[requantization]\noverflow = "saturate_zero"',
        "h",
        "requantize: saturation (wrap / saturate_zero)",
    ),
    "ties": ("dsp16", '[requantization]\nrounding = "floor"', "h", "requantize: rounding (half_up / floor)"),
}


@pytest.mark.parametrize("name", [*PLANTED, *LOUD])
def test_a_planted_difference_is_named(name: str, variant: Variant) -> None:
    parent, lines, layer, named = {**PLANTED, **LOUD}[name]
    pair = _pair(_small(), parent, variant(parent, lines), FEEDS, [{"x": SAMPLES * 100}] if name in LOUD else None)
    found = _named(pair)
    assert found.get(layer) == named, found
    cause = _layer(pair, layer).cause
    assert cause is not None
    assert cause.proved


def test_a_table_is_named_by_its_entries(variant: Variant) -> None:
    graph = _graph("g (float[N, 4, 8, 8] x) => (float[N, 4, 8, 8] y) { y = LeakyRelu<alpha=0.3>(x) }")
    real = variant("arm-neon", '[functions]\nrule = "real"')
    tables = [
        next(op.value.data for op in qir.compile(graph, target, FEEDS).graph.ops if isinstance(op, Const))
        for target in ("arm-neon", real)
    ]
    changed = np.count_nonzero(tables[0] != tables[1])
    assert changed
    assert _named(_pair(graph, "arm-neon", real)) == {"y": f"table: table (%y.table: {changed} of 256 entries)"}


GEMM = "g (float[N, 24] x) => (float[N, 6] y) { y = Gemm(x, v, c) }"
RELU = "g (float[N, 24] x) => (float[N, 6] y) { h = Gemm(x, v, c) y = Relu(h) }"
ROW_FEEDS = [{"x": random(16, 24)}]
OVERFLOWING = np.sign(random(24, 6, seed=3)).T * np.repeat([100, -100], [16, 8])  # sums leave 32 bits and come back


@pytest.mark.parametrize(
    ("text", "first", "second", "named"),
    [
        (GEMM, "dsp16", "dsp16-acc40", "matmul: accumulator (s32 / s40, saturate / wrap)"),
        (GEMM, "dsp16-acc40", "dsp16", "matmul: accumulator (s40 / s32, wrap / saturate)"),
        (RELU, "fpga", '[requantization]\noverflow="saturate_zero"', "requantize: saturation (wrap / saturate_zero)"),
        (RELU, "dsp16", '[requantization]\noverflow="saturate_symmetric"', None),
    ],
)
def test_ops_that_one_side_has_alone_are_seen_through(
    text: str, first: str, second: str, named: str | None, variant: Variant
) -> None:
    graph = _graph(text, v=random(24, 6, seed=3))
    other = variant(first, second) if "[" in second else second
    layer = _layer(_pair(graph, first, other, ROW_FEEDS, [{"x": OVERFLOWING}]), "y")
    assert named == (layer.cause and str(layer.cause))
    assert layer.cause is None or layer.cause.proved


def test_sums_in_other_units_are_compared_in_the_finer_one(variant: Variant) -> None:
    graph = _graph("g (float[N, 24] x) => (float[N, 6] y) { y = MatMul(x, v) }", v=random(24, 6, seed=3))
    for rounding, named in (("floor", None), ("half_even", "requantize: rounding (floor / half_even)")):
        other = variant("fpga", f'[product]\nshift = 3\n[requantization]\nrounding = "{rounding}"')
        layer = _layer(_pair(graph, "fpga", other, ROW_FEEDS), "y")
        assert named == (layer.cause and str(layer.cause))
        assert layer.cause is None or layer.cause.proved


def test_rules_without_a_part_are_not_named(variant: Variant) -> None:
    lines = '[accumulator]\nbits = 24\nrounding = "floor"\norder = "khwc"'
    pair = _pair(_small(), "fpga", variant("fpga", lines), FEEDS, [{"x": SAMPLES * 100}])
    assert _named(pair)["h"] == LOUD["rounded sums"][-1]


def test_a_layer_that_became_nothing_differs_by_nothing(variant: Variant) -> None:
    text = "g (float[N, 1, 1, 24] x) => (float[N, 1, 1, 6] y) { h = MatMul(x, v) y = Transpose<perm=[0, 2, 1, 3]>(h) }"
    graph = _graph(text, v=random(24, 6, seed=3))
    other = variant("arm-neon", '[weights]\nmatmul = "per_channel"')
    pair = _pair(graph, "arm-neon", other, [{"x": random(16, 1, 1, 24)}])
    assert list(_named(pair)) == ["h"]
    assert _layer(pair, "y").accumulated.differing == _layer(pair, "h").gap.differing


def test_integers_are_carried_within_the_bounds_of_their_new_type() -> None:
    data = np.array([-128, -70, 5, 127], np.int8)
    wide, narrow, unsigned = affine(S8, 0.5, 2), affine(S8.narrowed(-64, 63), 0.5, 1), affine(U8, 0.5, 130)
    rule = load_target("arm-neon").input
    assert carried(data, wide, narrow, rule).tolist() == [-64, -64, 4, 63]
    assert carried(data, wide, unsigned, rule).tolist() == [0, 58, 133, 255]
    assert carried(data, wide, affine(S8, 1.0, 0), rule).tolist() == [-65, -36, 2, 63]


def test_other_operations_are_an_algorithm() -> None:
    graph = _graph("g (float[N, 9] x, float[N, 9] z) => (float[N, 9] y) { y = Add(x, z) }")
    x = random(64, 9)
    pair = _pair(graph, "arm-neon", "arm-neon-xnnpack", [{"x": x, "z": x}], [{"x": x, "z": np.roll(x, 1, 0)}])
    cause = _layer(pair, "y").cause
    assert cause is not None
    assert (str(cause), cause.proved) == ("mul: algorithm (requantize / mul)", False)


def test_a_difference_without_effect_is_passed_over(variant: Variant) -> None:
    """Sums that saturate far below zero differ, but the activation hides it: what shows is the rounding behind it."""
    graph = _graph("g (float[N, 24] x) => (float[N, 6] y) { h = Gemm(x, v, c) y = Relu(h) }", v=random(24, 6, seed=3))
    feeds, loud = [{"x": random(16, 24)}], [{"x": random(16, 24) * 1000}]
    sums = variant("dsp16", '[accumulator]\noverflow = "saturate_symmetric"')
    traces = [qir.compile(graph, t, feeds).trace(loud[0])["y.acc"] for t in ("dsp16", sums)]
    assert not np.array_equal(traces[0], traces[1])
    assert _named(_pair(graph, "dsp16", sums, feeds, loud)) == {}
    both = variant("dsp16", '[accumulator]\noverflow = "saturate_symmetric"\n[requantization]\nrounding = "floor"')
    assert _named(_pair(graph, "dsp16", both, feeds, loud)) == {"y": "requantize: rounding (half_up / floor)"}


def test_all_samples_count_and_the_first_op_of_any_is_named(variant: Variant) -> None:
    graph = _graph("g (float[N, 24] x) => (float[N, 6] y) { y = Gemm(x, v, c) }", v=random(24, 6, seed=3))
    other = variant("dsp16", '[accumulator]\noverflow = "wrap"\n[requantization]\nrounding = "floor"')
    quiet, loud = random(40, 24), np.sign(random(24, 6, seed=3)).T * 100
    alone = [_layer(_pair(graph, "dsp16", other, [{"x": quiet}], [{"x": x}]), "y") for x in (quiet, loud)]
    whole = _layer(_pair(graph, "dsp16", other, [{"x": quiet}], [{"x": quiet}, {"x": loud}]), "y")
    counts = [layer.gap.differing for layer in (*alone, whole)]
    assert None not in counts
    assert counts[2] == counts[0] + counts[1]  # type: ignore[operator]
    named = [str(layer.cause) for layer in (*alone, whole)]
    assert named[0] == "requantize: rounding (half_up / floor)"
    assert named[1] == named[2] == "matmul: accumulator (saturate / wrap)"


def _side(graph: qir.Graph, change: Callable[[Array], Array]) -> Side:
    """A graph with types for arm-neon, with the biases changed, lowered."""
    pipeline = qir.default_pipeline().before("legalize")
    typed = pipeline.run(graph, qir.PassContext(load_target("arm-neon"), FEEDS))
    ops = []
    for op in typed.ops:
        if isinstance(op, Const) and op.result.name == "b":
            op = op.with_changes(value=qir.Array(change(op.value.data), op.value.name))
        ops.append(op)
    return make_side(typed.with_changes(ops=tuple(ops)), load_target("arm-neon"))


def test_a_bias_is_named_by_its_entries() -> None:
    first = _side(_small(), lambda bias: bias)
    other = _side(_small(), lambda bias: np.where(np.arange(6) < 2, bias + np.float32(1), bias))
    traced = first.trace({"x": SAMPLES})
    cause = find_cause(first, traced, other, replay(first, traced, other)["h"], "h")
    assert (str(cause), cause.proved) == ("conv2d: constant (bias: 2 of 6 entries)", True)


# What is taken, and what is refused


def test_samples_come_from_the_inputs_or_the_calibration() -> None:
    x = random(70, 4, 8, 8, seed=9)
    assert qir.compare(_small(), ["arm-neon", "dsp16"], [{"x": x}]).samples == 64
    assert qir.compare(_small(), ["arm-neon", "dsp16"], FEEDS, [{"x": x}], samples=70).samples == 70
    observed = qir.observe(_small(), FEEDS)
    again = qir.compare(_small(), ["arm-neon", "dsp16"], observed, FEEDS)
    assert again == qir.compare(_small(), ["arm-neon", "dsp16"], iter(FEEDS))


def test_a_fixed_batch_is_taken_whole() -> None:
    source = model(SMALL.replace("N, 4", "8, 4").replace("N, 6", "8, 6"), **{n: WEIGHTS[n] for n in "wbvc"})
    graph = qir.import_onnx(source)
    feeds = [{"x": SAMPLES[:8]}, {"x": SAMPLES[8:]}]
    found = [qir.compare(graph, ["arm-neon", "onnxruntime"], feeds, samples=n) for n in (1, 9)]
    assert [c.samples for c in found] == [8, 16]
    assert found[1].others == qir.compare(_small(), ["arm-neon", "onnxruntime"], FEEDS).others


SOFTMAX = "g (float[N, 4] x) => (float[N, 4] y) { y = Softmax<axis=1>(x) }"
NOTHING = "g (float[N, 4] x) => (float[N, 4] y) { y = Identity(x) }"
ROWS = [{"x": random(8, 4)}]


@pytest.mark.parametrize(
    ("text", "targets", "calibration", "more", "words"),
    [
        (SOFTMAX, ["arm-neon"], ROWS, {}, "compare takes at least two targets"),
        (SOFTMAX, "arm-neon,dsp16", ROWS, {}, "compare takes at least two targets"),
        (SOFTMAX, ["arm-neon", "cortex-m", "arm-neon"], ROWS, {}, "two of the targets are named 'arm-neon'"),
        (SOFTMAX, ["arm-neon", "arm-nean"], ROWS, {}, "unknown target 'arm-nean'; there are: arm-neon"),
        (SOFTMAX, ["arm-neon", "dsp16"], ROWS, {}, "^dsp16 cannot take the model: Softmax %y .* no integer form"),
        (SOFTMAX, ["arm-neon", "onnxruntime"], None, {}, "there is no calibration data"),
        (SOFTMAX, ["arm-neon", "onnxruntime"], ROWS[0], {}, "an iterable of feeds"),
        (SOFTMAX, ["arm-neon", "onnxruntime"], [], {}, "there are no samples to compare on"),
        (SOFTMAX, ["arm-neon", "onnxruntime"], ROWS, {"samples": 0}, "at least 1, not 0"),
        (SOFTMAX, ["arm-neon", "onnxruntime"], qir.Calibration(), {}, "a Calibration holds no samples"),
        (SOFTMAX, ["arm-neon", "onnxruntime"], ROWS, {"inputs": [{"z": 1}]}, "compare on, feed 0: .* unknown .'z'"),
        (NOTHING, ["arm-neon", "onnxruntime"], ROWS, {}, "graph @g has no op left to compare"),
    ],
)
def test_what_does_not_fit_is_refused(text: str, targets: Any, calibration: Any, more: Any, words: str) -> None:
    with pytest.raises(qir.QirError, match=words):
        qir.compare(_graph(text), targets, calibration, **more)


# The command


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a model and samples."""
    monkeypatch.chdir(tmp_path)
    onnx.save(model(SMALL, **{n: WEIGHTS[n] for n in "wbvc"}), "model.onnx")
    np.savez("calib.npz", x=SAMPLES)
    np.savez("more.npz", x=random(40, 4, 8, 8, seed=9))
    return tmp_path


COMMAND = "compare model.onnx --calibration calib.npz --targets arm-neon,arm-neon-single-round"


def test_command_prints_tables_and_writes_all_numbers(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(f"{COMMAND},fpga --inputs more.npz --samples 33 -o found.json".split()) == 0
    out, err = capsys.readouterr()
    expected = qir.compare(
        "model.onnx",
        ["arm-neon", "arm-neon-single-round", "fpga"],
        FEEDS,
        [{"x": random(40, 4, 8, 8, seed=9)}],
        samples=33,
    )
    assert (out, err) == (f"{expected}\n", "")
    found = json.loads(Path("found.json").read_text())
    assert (found["targets"], found["samples"]) == (["arm-neon", "arm-neon-single-round", "fpga"], 33)
    layer = found["others"][0]["layers"][1]
    assert (layer["layer"], layer["op"], layer["cause"]["rules"]) == ("h", "Conv", ["rounding"])
    whole = _layer(expected.others[0], "h")
    assert layer["gap"] == {
        "elements": 33 * 6 * 64,
        "differing": whole.gap.differing,
        "largest": 1,
        "sqnr": whole.gap.sqnr,
    }
    assert found["others"][0]["layers"][0]["gap"] == {"elements": 33 * 256, "differing": 0, "largest": 0, "sqnr": None}


def test_tables_line_up(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(f"{COMMAND},fpga".split()) == 0
    intro, summary, *tables = capsys.readouterr().out.split("\n\n")
    assert intro.startswith("@g on 3 targets, 16 samples.")
    lines = summary.splitlines()
    column = lines[0].index("first that differs")
    assert [line.split()[0] for line in lines] == ["target", "arm-neon", "arm-neon-single-round", "fpga"]
    assert lines[2][column:].startswith("h, requantize: rounding (")
    assert len(tables) == 2
    for table in tables:
        title, head, *rows = table.splitlines()
        assert title.startswith("arm-neon and ")
        assert [row.split()[0] for row in rows] == ["%x", "h", "s", "q", "m", "f", "y"]
        place = head.index("op")
        assert [row[place:].split()[0] for row in rows[:3]] == ["input", "Conv", "HardSwish"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (("arm-neon,", ""), "compare takes at least two targets"),
        (("single-round", "single-round,arm-neon"), "two of the targets are named 'arm-neon'"),
        (("single-round", "singleround"), "unknown target 'arm-neon-singleround'"),
        (("single-round", "single-round,"), "unknown target ''"),
        (("-single-round", ",gone.toml"), "cannot read target gone.toml"),
        (("--calibration calib.npz", ""), "there is no calibration data; pass calibration="),
        (("model.onnx", "gone.onnx"), "gone.onnx: cannot be read"),
        (("calib.npz", "gone.npz"), "calibration data: cannot read gone.npz"),
        (("--targets", "--inputs gone.npz --targets"), "cannot read gone.npz"),
        (("--targets", "--inputs bad.npz --targets"), "samples to compare on, feed 0: the inputs are ['x']"),
        (("--targets", "--samples -3 --targets"), "at least 1, not -3"),
        (("--targets", "-o file/found.json --targets"), "cannot write file/found.json"),
    ],
)
def test_command_refuses_in_one_message(
    changed: tuple[str, str], words: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez("bad.npz", z=SAMPLES)
    Path("file").write_text("in the way\n")
    before = sorted(here.iterdir())
    command = COMMAND.replace(*changed)
    assert command != COMMAND
    assert main(command.split()) == 2
    out, err = capsys.readouterr()
    assert (out, err[:5]) == ("", "qir: ")
    assert words in err
    assert sorted(here.iterdir()) == before
