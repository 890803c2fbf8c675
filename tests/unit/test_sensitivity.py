"""Sensitivity: losses by hand, the same wherever they are measured, a cache that keeps to its content."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from distributed import Client, LocalCluster
from models import PATHS, calibration_images

import qir
from qir.backend import shipped_backends
from qir.errors import PassError, QirError
from qir.fixed_point import Rounding
from qir.interpreter import interpret
from qir.pass_manager import PassContext
from qir.passes.assign_bit_widths import AssignBitWidths
from qir.passes.widths.decisions import Kind
from qir.passes.widths.quality import KL, SQNR, Outputs, Quality, divergence, noise_to_signal
from qir.passes.widths.sensitivity import Sensitivity
from qir.target import Granularity, Scheme

GRAPH = """
graph @small stage=float (%x: Nx2x3x3 x f32) {
  %w = const {value=f32 2x2x1x1 [0.9, -0.4, 0.3, 0.8]} : 2x2x1x1 x f32
  %a = Conv %x, %w {strides=[1, 1], pads=[0, 0, 0, 0], dilations=[1, 1], groups=1, clip=[0.0, inf]} : Nx2x3x3 x f32
  %s = Add %a, %x : Nx2x3x3 x f32
  %m = ReduceMean %s {axes=[2, 3], keepdims=false} : Nx2 x f32
  %u = const {value=f32 2x3 [0.4, 0.9, -0.5, 0.3, 0.2, 0.7]} : 2x3 x f32
  %c = const {value=f32 3 [0.5, -0.5, 0.25]} : 3 x f32
  %y = MatMul %m, %u, %c : Nx3 x f32
  return %y
}
"""
WEIGHTS, ACTIVATIONS = ("8", "4", "2"), (8, 4)
WAYS = ("", "range", "percentile")


def feeds(*sizes: int) -> list[dict[str, npt.NDArray[Any]]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.uniform(-1, 2, (n, 2, 3, 3)).astype(np.float32)} for n in sizes]


def fixed(batch: int) -> str:
    """The graph for so many samples at a time."""
    return GRAPH.replace("Nx", f"{batch}x")


def measured(**options: Any) -> Sensitivity:
    settings = {"weights": WEIGHTS, "activations": ACTIVATIONS, **options}
    return qir.sensitivity(qir.parse(GRAPH), "asic", feeds(40, 3), **settings)


@pytest.fixture(scope="module")
def serial() -> Sensitivity:
    return measured(other_ways=True)


# What is measured


def test_every_choice_of_every_decision_has_a_loss(serial: Sensitivity) -> None:
    found = {(e.kind, e.decision, e.choice, e.way) for e in serial.losses}
    weights = {(Kind.WEIGHTS, name, c, way) for name in "ay" for c in WEIGHTS for way in ("", "per_tensor")}
    values = {(Kind.ACTIVATIONS, n, str(c), way) for n in "xasmy" for c in ACTIVATIONS for way in WAYS}
    assert found == weights | values
    assert len(serial.losses) == len(found)
    assert serial.samples == 43


@pytest.mark.parametrize(("name", "override"), [("a", "a:w2"), ("y", "y:w4")])
def test_a_loss_is_that_of_the_graph_with_these_weights_alone_rounded(
    serial: Sensitivity, name: str, override: str
) -> None:
    """Against the graph whose weights legalize rounds, its values in floating point."""
    pipeline = qir.default_pipeline().replace("assign-bit-widths", AssignBitWidths(override=(override,)))
    context = PassContext(qir.load_target("asic"), feeds(40, 3))
    ranged = qir.default_pipeline().before("assign-bit-widths").run(qir.parse(GRAPH), context)
    typed = pipeline.before("legalize").run(qir.parse(GRAPH), context)
    fixed = pipeline.run(qir.parse(GRAPH), context)
    layer = next(op for op in typed.ops if op.results[0].name == name)
    element = layer.operands[1].type.element
    integers = next(data for value, data in fixed.constants.items() if value.name == layer.operands[1].name).data
    if integers.ndim == 4:
        integers = integers.transpose(0, 3, 1, 2)
    scales = np.ldexp(1.0, element.exponent.data)  # type: ignore[union-attr]
    shape = [-1 if axis == element.axis else 1 for axis in range(integers.ndim)]  # type: ignore[union-attr]
    real = (integers * scales.reshape(shape)).astype(np.float32)
    text = GRAPH.replace(*_constant(layer.operands[1].name, real))
    x = np.concatenate([f["x"] for f in feeds(40, 3)])
    wanted, found = (interpret(g, {"x": x}) for g in (ranged, qir.parse(text)))
    loss = next(
        e.loss for e in serial.losses if (e.decision, e.kind, e.choice, e.way) == (name, Kind.WEIGHTS, override[-1], "")
    )
    # The bias is rounded to 20 bits besides, and float32 sums differ in their last digits.
    assert loss == pytest.approx(noise_to_signal(wanted, found), rel=1e-3)


def _constant(name: str, data: npt.NDArray[Any]) -> tuple[str, str]:
    """The line of a constant in the text of the graph, and the same with other data."""
    line = next(line for line in GRAPH.splitlines() if f"%{name} = const" in line)
    numbers = ", ".join(map(str, data.reshape(-1).tolist()))
    return line, f"{line[: line.index('[')]}[{numbers}]{line[line.index(']') + 1 :]}"


@pytest.mark.parametrize("batch", [1, 2])
def test_a_fixed_batch_counts_every_sample_of_every_feed(batch: int) -> None:
    options: dict[str, Any] = {"weights": WEIGHTS, "activations": ACTIVATIONS}
    (whole,) = feeds(6)
    parts = [{"x": whole["x"][start : start + batch]} for start in range(0, 6, batch)]
    apart = qir.sensitivity(qir.parse(fixed(batch)), "asic", parts, **options)
    together = qir.sensitivity(qir.parse(GRAPH), "asic", [whole], **options)
    assert apart.samples == together.samples == 6
    wanted, found = ([e.loss for e in s.losses] for s in (together, apart))
    assert found == pytest.approx(wanted, rel=1e-3)


def test_a_bias_that_rounding_learns_counts_where_the_layer_has_none() -> None:
    passes = str(qir.default_pipeline()).replace("legalize", "learn-rounding,legalize")
    zeros = GRAPH.replace("[0.5, -0.5, 0.25]", "[0.0, 0.0, 0.0]")
    none = "\n".join(line for line in zeros.splitlines() if "%c = const" not in line).replace("%u, %c", "%u")
    found = []
    for text in (zeros, none):
        whole = qir.sensitivity(qir.parse(text), "asic", feeds(40), pipeline=passes, weights=("2",), activations=(8,))
        found.append([e.loss for e in whole.losses if (e.decision, e.kind) == ("y", Kind.WEIGHTS)])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_a_bias_that_is_no_constant_stays_as_it_is() -> None:
    text = GRAPH.replace("(%x: Nx2x3x3 x f32)", "(%x: Nx2x3x3 x f32, %c: 3 x f32)")
    graph = qir.parse("\n".join(line for line in text.splitlines() if "%c = const" not in line))
    data = [{**feed, "c": np.ones(3, np.float32)} for feed in feeds(8)]
    found = qir.sensitivity(graph, "asic", data, weights=("4",), activations=(8,))
    assert {e.decision for e in found.losses if e.kind is Kind.WEIGHTS} == {"a", "y"}


def test_activations_are_rounded_as_the_chip_does() -> None:
    """`fpga` truncates: that shifts means, and loses more than rounding to the nearest does."""
    fpga = qir.load_target("fpga")
    nearest = replace(fpga, requantization=replace(fpga.requantization, rounding=Rounding.HALF_EVEN))
    truncated, rounded = (
        qir.sensitivity(qir.parse(GRAPH), target, feeds(40, 3), weights=("8",), activations=(6,))
        for target in (fpga, nearest)
    )
    for one, other in zip(truncated.losses, rounded.losses, strict=True):
        if one.kind is Kind.WEIGHTS or one.decision == "x":  # the input is rounded by a rule of its own
            assert one == other
        else:
            assert one.error > 2 * other.error


def test_wider_is_never_worse_by_much_and_the_proxy_sorts_alike(serial: Sensitivity) -> None:
    for name in ("a", "y"):
        own = [e.loss for e in serial.losses if (e.decision, e.kind, e.way) == (name, Kind.WEIGHTS, "")]
        assert own == sorted(own)
        assert own[-1] > 10 * own[0]
    assert serial.correlation > 0.9


def test_the_middle_choice_is_measured_in_the_proxy_too(serial: Sensitivity) -> None:
    proxy = measured(proxy=True, other_ways=True)
    for full, cheap in zip(serial.losses, proxy.losses, strict=True):
        assert (full.error, full.estimate) == (cheap.error, cheap.estimate)
        assert cheap.loss == cheap.estimate
    assert proxy.is_estimated
    assert not serial.is_estimated
    for full, cheap in zip(serial.losses, proxy.losses, strict=True):
        if full.choice == "4":  # the middle of three, and of two the second
            assert cheap.loss == pytest.approx(full.loss, rel=1e-12)


@pytest.mark.parametrize("target", sorted(shipped_backends()))
def test_every_target_is_measured_in_all_its_ways(target: str) -> None:
    contract = qir.load_target(target)
    found = qir.sensitivity(qir.parse(GRAPH), target, feeds(8), other_ways=True, proxy=True)
    ways = {kind: {e.way for e in found.losses if e.kind is kind} for kind in Kind}
    signed = contract.activations.signed and contract.activations.scheme is Scheme.AFFINE
    assert ways[Kind.ACTIVATIONS] == {*WAYS, *(["symmetric"] if signed else [])}
    channels = Granularity.PER_CHANNEL in (contract.weights.conv, contract.weights.matmul)
    assert ways[Kind.WEIGHTS] == {"", *(["per_tensor"] if channels else [])}
    assert all(np.isfinite(e.loss) and e.loss >= 0 for e in found.losses)


# The same wherever it is measured


def process_pool() -> Executor:
    return ProcessPoolExecutor(2, get_context("spawn"))


@pytest.mark.parametrize("pool", [process_pool, partial(ThreadPoolExecutor, 3)], ids=["processes", "threads"])
def test_other_executors_give_the_bits_of_the_serial_run(serial: Sensitivity, pool: Any) -> None:
    with pool() as executor:
        assert measured(other_ways=True, executor=executor) == serial


@pytest.fixture
def cluster() -> Iterator[Client]:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as local,
        Client(local) as client,
    ):
        yield client


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Sending large graph")
def test_a_dask_cluster_gives_the_bits_of_the_serial_run(serial: Sensitivity, cluster: Client) -> None:
    assert measured(other_ways=True, executor=cluster.get_executor()) == serial


def test_a_real_model_over_two_processes_gives_the_bits_of_the_serial_run() -> None:
    graph, data = qir.import_onnx(PATHS["fm_cnn"]), [{"x": calibration_images()[:48]}]
    options: dict[str, Any] = {"weights": ("8", "3"), "activations": (8,), "quality": KL}
    alone = qir.sensitivity(graph, "asic", data, **options)
    with process_pool() as executor:
        assert qir.sensitivity(graph, "asic", data, executor=executor, **options) == alone


# The cache


def counting(calls: list[int], reference: Outputs, outputs: Outputs) -> float:
    calls.append(1)
    return noise_to_signal(reference, outputs)


def test_the_cache_knows_what_was_measured_by_content(tmp_path: Path, serial: Sensitivity) -> None:
    calls: list[int] = []
    quality = Quality("mine", partial(counting, calls))
    first = measured(quality=quality, cache=tmp_path)
    assert len(calls) == len(first.losses)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 7  # a file for each decision
    assert measured(quality=quality, cache=tmp_path) == first
    assert len(calls) == len(first.losses)
    again = measured(quality=quality, cache=tmp_path, weights=("8", "4"))
    assert len(calls) == len(first.losses) + 4  # other choices of the two layers' weights are other jobs
    assert {e.choice for e in again.losses if e.kind is Kind.WEIGHTS} == {"8", "4"}


def test_other_data_or_another_graph_are_not_in_the_cache(tmp_path: Path) -> None:
    measured(cache=tmp_path)
    count = len(list(tmp_path.iterdir()))
    settings: dict[str, Any] = {"weights": WEIGHTS, "activations": ACTIVATIONS, "cache": tmp_path}
    qir.sensitivity(qir.parse(GRAPH), "asic", feeds(39, 3), **settings)
    assert len(list(tmp_path.iterdir())) == 2 * count
    qir.sensitivity(qir.parse(GRAPH.replace("0.25]", "0.125]")), "asic", feeds(40, 3), **settings)
    assert len(list(tmp_path.iterdir())) == 3 * count


def test_a_broken_file_of_the_cache_is_named(tmp_path: Path) -> None:
    measured(cache=tmp_path)
    file = min(tmp_path.iterdir())
    for text in ("[[1.0", "[]", "{}", "3", "[[null, 1.0], [null, 1.0]]", "[[NaN, 1.0], [NaN, 1.0], [NaN, 1.0]]"):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(QirError, match=rf"cannot read .*{file.name}.*remove the file"):
            measured(cache=tmp_path)


# Measures of loss


def test_noise_to_signal_by_hand() -> None:
    assert noise_to_signal({"y": np.array([3.0, 4.0])}, {"y": np.array([3.0, 4.5])}) == 0.01
    assert noise_to_signal({"y": np.zeros(2)}, {"y": np.zeros(2)}) == 0
    assert noise_to_signal({"y": np.zeros(2)}, {"y": np.ones(2)}) == 1


def test_divergence_by_hand_of_logits_and_of_probabilities() -> None:
    p, q = np.array([[0.5, 0.5]]), np.array([[0.25, 0.75]])
    expected = 0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75)
    assert divergence({"y": p}, {"y": q}) == pytest.approx(expected, rel=1e-12)
    assert divergence({"y": np.log(p) + 7}, {"y": np.log(q) - 2}) == pytest.approx(expected, rel=1e-12)
    assert divergence({"y": p}, {"y": p}) == 0
    for alone in (np.array(1.0), np.ones((4, 1))):  # of one class there is nothing to tell
        with pytest.raises(PassError, match="use sqnr"):
            divergence({"y": alone}, {"y": alone})


@pytest.mark.parametrize("gives", [float("nan"), float("inf"), "much", np.zeros(2)])
def test_a_loss_that_is_no_finite_number_is_named(gives: Any) -> None:
    with pytest.raises(PassError, match=r"the measure 'mine' gives .*; a loss is a finite number"):
        measured(quality=Quality("mine", lambda reference, outputs: gives))


def test_a_loss_may_be_any_number(tmp_path: Path) -> None:
    half: Any = np.float32(0.5)
    found = measured(quality=Quality("mine", lambda reference, outputs: half), cache=tmp_path)
    assert Sensitivity.from_json(found.to_json(), "x") == found


# What does not fit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quality": "psnr"}, "unknown quality 'psnr'; there are: sqnr, kl"),
        ({"weights": ("8", "5/codeboook")}, "asic has weights of .* bits, not 5/codeboook; choose from these"),
        ({"activations": (32,)}, "asic has activations of .* bits, not 32"),
        ({"pipeline": "calibrate,legalize"}, "no pass 'assign-bit-widths'"),
        ({"weights": "16"}, "weights='16' is one text; give a list"),
    ],
)
def test_what_does_not_fit_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        measured(**options)


def test_no_samples_and_a_measure_that_cannot_travel_are_said() -> None:
    without: list[Any] = [[], None, qir.observe(qir.parse(GRAPH), feeds(4))]
    for none in without:
        with pytest.raises(QirError, match="calibration data"):
            qir.sensitivity(qir.parse(GRAPH), "asic", none)
    with (
        process_pool() as executor,
        pytest.raises(PassError, match=r"'local' cannot be sent .* at the top of a module"),
    ):
        measured(quality=Quality("local", lambda reference, outputs: 0.0), executor=executor)


def killed(reference: Outputs, outputs: Outputs) -> float:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0.0


def test_a_worker_that_is_killed_is_said() -> None:
    with process_pool() as executor:
        for _ in range(2):  # the second finds no workers at all
            with pytest.raises(PassError, match="a worker process ended before its work was done"):
                measured(quality=Quality("killed", killed), executor=executor)


def test_json_gives_all_of_it_back(serial: Sensitivity) -> None:
    assert Sensitivity.from_json(serial.to_json(), "x") == serial
    for text in ("[]", "{}", "nonsense", json.dumps({"losses": [{"kind": "neither"}]})):
        with pytest.raises(QirError, match=r"here\.json holds no sensitivity as qir writes it"):
            Sensitivity.from_json(text, "here.json")
    assert SQNR.name == serial.quality
    for change in ({"loss": None}, {"loss": float("nan")}, {"loss": "much"}, {"choice": 8}):
        data = json.loads(serial.to_json())
        data["losses"][0].update(change)
        with pytest.raises(QirError, match=r"here\.json holds no sensitivity as qir writes it"):
            Sensitivity.from_json(json.dumps(data), "here.json")
