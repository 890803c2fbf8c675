"""assign-bit-widths within budgets, and the front of the best: what is asked for is kept, on every target."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from models import PATHS, calibration_images, labelled_images

import qir
from qir.cli import main
from qir.cost import graph_cost
from qir.errors import PassError, QirError
from qir.ir import Graph
from qir.mixed_precision import Front, greedy_within, trace_front
from qir.ops.float_nn import Conv, MatMul
from qir.pass_manager import PassContext
from qir.passes.assign_bit_widths import AssignBitWidths
from qir.passes.learn_rounding import LearnRounding
from qir.passes.widths.budgets import BudgetText, parse_budget, parse_floor
from qir.passes.widths.costs import Metric, value_of
from qir.passes.widths.decisions import Kind, Widths, decisions
from qir.passes.widths.problem import Budget, InfeasibleError, WidthProblem
from qir.passes.widths.quality import KL, SQNR
from qir.rewrite import map_values
from qir.target import Target, WeightFormat

FEEDS: list[dict[str, npt.NDArray[Any]]] = [{"x": calibration_images()[:32]}]


def ranged(name: str = "fm_mlp") -> Graph:
    passes = qir.default_pipeline().before("assign-bit-widths")
    return passes.run(qir.import_onnx(PATHS[name]), PassContext(qir.load_target("fpga"), FEEDS))


@pytest.fixture(scope="module")
def mlp() -> Graph:
    return ranged()


def assign(graph: Graph, target: str | Target = "fpga", feeds: Any = FEEDS, **options: Any) -> tuple[Graph, str]:
    context = PassContext(qir.load_target(target) if isinstance(target, str) else target, feeds)
    return AssignBitWidths(**options).run(graph, context), "; ".join(context.notes)


def widths_of(graph: Graph, kind: Kind) -> list[int]:
    layers = [op for op in graph.ops if isinstance(op, Conv | MatMul)]
    values = [op.operands[1] if kind is Kind.WEIGHTS else op.result for op in layers]
    return [v.storage.stored_bits for v in values if v.storage is not None]


def has(graph: Graph, metric: Metric, target: str = "fpga") -> Fraction:
    contract = qir.load_target(target)
    return value_of(metric, graph, contract, graph_cost(graph, contract))


SMALL: dict[str, Any] = {"weights": ("8", "6", "4", "3"), "activations": (8, 6)}


# Budgets are kept


@pytest.mark.parametrize(
    ("budget", "limits"),
    [
        (("0.5",), {Metric.WEIGHTS: 0.5}),
        (("weights:0.5x", "energy:0.4x"), {Metric.WEIGHTS: 0.5, Metric.ENERGY: 0.4}),
        (("dsp:0.5x", "lut:0.6x"), {Metric.DSP: 0.5, Metric.LUT: 0.6}),
        (("constants:0.6x", "peak:0.5x", "moved:0.5x"), {Metric.CONSTANTS: 0.6, Metric.PEAK: 0.5, Metric.MOVED: 0.5}),
        (("bit_operations:0.25x", "bram:1x"), {Metric.BIT_OPERATIONS: 0.25, Metric.BRAM: 1}),
    ],
)
def test_every_budget_is_kept_and_used(mlp: Graph, budget: tuple[str, ...], limits: dict[Metric, float]) -> None:
    default, _ = assign(mlp)
    found, note = assign(mlp, budget=budget, **SMALL)
    for metric, share in limits.items():
        assert has(found, metric) <= Fraction(share) * has(default, metric)
    assert "gap 0;" in note
    widest, _ = assign(mlp, budget=("weights:9x",), **SMALL)
    assert set(widths_of(widest, Kind.WEIGHTS)) == {8}
    assert widths_of(found, Kind.WEIGHTS) != widths_of(widest, Kind.WEIGHTS) or has(found, Metric.PEAK) < has(
        widest, Metric.PEAK
    )


def test_absolute_budgets_of_slices_and_tables_hold_in_the_program() -> None:
    """LUTs and slices by `qir cost` of the compiled program, whose sums are as wide as they are proved to need."""
    pipeline = qir.default_pipeline().replace(
        "assign-bit-widths", AssignBitWidths(budget=("dsp:2000", "lut:80000"), **SMALL)
    )
    program = qir.compile(PATHS["fm_mlp"], "fpga", FEEDS, pipeline=pipeline)
    total = graph_cost(program.graph, qir.load_target("fpga")).total
    assert total.dsp is not None
    assert total.lut is not None
    assert 0 < total.dsp <= 2000
    assert 0 < total.lut <= 80_000
    free = qir.compile(PATHS["fm_mlp"], "fpga", FEEDS)
    most = graph_cost(free.graph, qir.load_target("fpga")).total
    assert most.dsp is not None
    assert most.dsp > 2000


def test_least_energy_within_a_floor_of_quality(mlp: Graph) -> None:
    wide: dict[str, Any] = {**SMALL, "activations": (16, 8)}  # fpga truncates: 8 bits alone keep less than 20 dB
    found = [
        has(assign(mlp, minimize="energy", floor=f"sqnr:{floor}", **wide)[0], Metric.ENERGY) for floor in (28, 20, 10)
    ]
    assert found == sorted(found, reverse=True)
    assert len(set(found)) > 1


@pytest.mark.parametrize("target", ["dsp16", "tensorrt", "arm-neon", "arm-neon-16x8", "cortex-m", "onnxruntime"])
def test_widths_that_a_chip_lacks_are_never_assigned(mlp: Graph, target: str) -> None:
    contract = qir.load_target(target)
    own = map_values(mlp, lambda v: {})
    found, _ = assign(own, target, budget=("weights:1x",))
    assert set(widths_of(found, Kind.WEIGHTS)) <= set(contract.weights.bits)
    assert set(widths_of(found, Kind.ACTIVATIONS)) <= set(contract.activations.bits)
    with pytest.raises(InfeasibleError, match=r"weights of at most .*: the least is "):
        assign(own, target, budget=("weights:0.01x",))


def test_formats_that_a_target_lacks_are_no_choices(mlp: Graph) -> None:
    for target in ("arm-neon", "fpga"):
        contract = qir.load_target(target)
        graph, _ = assign(mlp, target)
        names = {c for d in decisions(graph, contract, Widths()) for c in d.choices if d.kind is Kind.WEIGHTS}
        formats = {name.partition("/")[2] for name in names} - {""}
        assert formats == {str(f) for f in contract.weights.formats} - {WeightFormat.UNIFORM}


def test_an_overridden_format_keeps_its_name(mlp: Graph) -> None:
    graph, _ = assign(mlp, override=("*:w4/codebook",))
    weights = {op.operands[1] for op in graph.ops if isinstance(op, MatMul)}
    found = decisions(graph, qir.load_target("fpga"), Widths(), weights)
    assert {c for d in found if d.kind is Kind.WEIGHTS for c in d.choices} == {"4/codebook"}


def test_what_is_overridden_stays(mlp: Graph) -> None:
    names = [op.result.name for op in mlp.ops if isinstance(op, Conv | MatMul)]
    fixed = (f"{names[0]}:w3", f"{names[1]}:a6")
    found, _ = assign(mlp, budget=("weights:9x",), override=fixed, **SMALL)
    by_name = {op.result.name: op for op in found.ops if isinstance(op, Conv | MatMul)}
    storages = [by_name[names[0]].operands[1].storage, by_name[names[1]].result.storage]
    assert [s.bits for s in storages if s is not None] == [3, 6]
    assert widths_of(found, Kind.WEIGHTS)[1:] == [8] * (len(names) - 1)


# Faults


def test_budgets_that_cannot_be_kept_say_what_can(mlp: Graph) -> None:
    with pytest.raises(InfeasibleError) as alone:
        assign(mlp, budget=("weights:10", "dsp:500"), **SMALL)
    least, _ = assign(mlp, budget=("weights:9x",), weights=("3",), activations=(6,))
    assert f"weights of at most 10: the least is {float(has(least, Metric.WEIGHTS)):,.6g}" in str(alone.value)
    assert "dsp of at most 500: the least is " in str(alone.value)
    floor = {"minimize": "energy", "floor": "sqnr:300"}
    with pytest.raises(InfeasibleError, match="loss of at most 1e-30: the least is "):
        assign(mlp, **floor, **SMALL)


def test_budgets_that_cannot_be_kept_together_say_so() -> None:
    """Weights of few levels take fewer bytes and, for the table of levels, more LUTs than narrow ones."""
    graph, _ = assign(ranged())
    target = qir.load_target("fpga")
    found = decisions(graph, target, Widths(("4", "3/codebook"), (8,)))
    problem = WidthProblem(graph, target, found, [dict.fromkeys(d.choices, 0.0) for d in found])
    budgets = [Budget(m, problem.best((), m).costs[m]) for m in (Metric.WEIGHTS, Metric.LUT)]
    assert problem.best(budgets[:1]).costs[Metric.LUT] > budgets[1].most
    with pytest.raises(InfeasibleError, match=r"together, though each alone can be kept.* within the others"):
        problem.best(budgets)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": ("half",)}, "budget 'half' is not of the form metric:amount"),
        ({"budget": ("5KiB",)}, "budget '5KiB' names no metric; write weights:5KiB"),
        ({"budget": ("wights:0.5x",)}, "unknown metric 'wights'; there are: weights, constants"),
        ({"budget": ("latency:3MiB",)}, "latency has no unit 'MiB'; there are: x, s, ms, us, ns"),
        ({"quality": "psnr"}, "unknown quality 'psnr'"),
        ({"minimize": "energy"}, "minimize and floor go together"),
        ({"minimize": "energy", "floor": "sqnr:much"}, "floor 'sqnr:much' is not of the form measure:amount"),
        ({"minimize": "energy", "floor": "sqnr:20", "quality": "kl"}, "quality=kl and floor=sqnr:20 are two measures"),
        ({"weights": ("8",)}, "nothing to choose by; give a budget"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        AssignBitWidths(**options)


def test_metrics_that_a_target_does_not_state(mlp: Graph) -> None:
    with pytest.raises(PassError, match=r"asic states no costs of dsp; see \[costs\]"):
        assign(mlp, "asic", budget=("dsp:5",), **SMALL)


@pytest.mark.parametrize("feeds", [None, iter(FEEDS)])
def test_feeds_that_cannot_be_walked(mlp: Graph, feeds: Any) -> None:
    with pytest.raises(QirError, match=r"assign-bit-widths (runs|walks)"):
        assign(mlp, feeds=feeds, budget=("0.5",), **SMALL)


def test_texts_of_budgets_and_floors() -> None:
    assert parse_budget("0.5") == BudgetText(Metric.WEIGHTS, Fraction(1, 2), True)
    assert parse_budget("latency:120us") == BudgetText(Metric.LATENCY, Fraction(12, 10**5), False)
    assert parse_budget("peak:64KiB") == BudgetText(Metric.PEAK, Fraction(65536), False)
    assert parse_budget("energy:1.5uJ").amount == Fraction(15, 10**7)
    assert parse_budget("dsp:2x") == BudgetText(Metric.DSP, Fraction(2), True)
    assert parse_floor("sqnr:30") == (SQNR, Fraction(1e-3))
    assert parse_floor("kl:0.25") == (KL, Fraction(1, 4))


def test_the_pass_prints_and_parses_with_its_budgets() -> None:
    text = "assign-bit-widths{budget=weights:0.5x;latency:120us,quality=kl,weights=8;4/codebook,activations=8}"
    (parsed,) = qir.parse_pipeline(text)
    assert str(parsed) == text
    budget, weights = ("weights:0.5x", "latency:120us"), ("8", "4/codebook")
    assert parsed == AssignBitWidths(budget=budget, quality="kl", weights=weights, activations=(8,))


def test_losses_from_a_file_are_those_that_would_be_measured(mlp: Graph, tmp_path: Path) -> None:
    measured = qir.sensitivity(qir.import_onnx(PATHS["fm_mlp"]), "fpga", FEEDS, **SMALL)
    file = tmp_path / "losses.json"
    file.write_text(measured.to_json(), encoding="utf-8")
    options: dict[str, Any] = {"budget": ("0.5",), **SMALL}
    assert assign(mlp, feeds=None, sensitivity=str(file), **options)[0] == assign(mlp, **options)[0]
    with pytest.raises(PassError, match="losses by sqnr, not by kl"):
        assign(mlp, sensitivity=str(file), quality="kl", **options)
    with pytest.raises(PassError, match="another graph, calibration or contract"):
        assign(mlp, "asic", sensitivity=str(file), **options)
    with pytest.raises(PassError, match="no loss is known of 5 bits"):
        assign(mlp, sensitivity=str(file), budget=("0.5",), weights=("5",), activations=(8,))
    with pytest.raises(QirError, match=r"cannot read .*absent"):
        assign(mlp, sensitivity=str(tmp_path / "absent"), **options)


# The front


@pytest.fixture(scope="module")
def problem() -> WidthProblem:
    graph, _ = assign(ranged())
    target = qir.load_target("fpga")
    found = decisions(graph, target, Widths(("8", "5", "4", "3", "2"), (8,)))
    rng = np.random.default_rng(3)
    losses = [dict(zip(d.choices, np.sort(rng.integers(0, 999, len(d.choices))).tolist(), strict=True)) for d in found]
    return WidthProblem(graph, target, found, losses)


def test_a_front_is_the_lower_left_hull_of_all_choices(problem: WidthProblem) -> None:
    """Against every joint choice: no point is dominated, and each is the best within what it takes."""
    sizes = [len(d.choices) for d in problem.decisions]
    every = [(problem.exact(Metric.WEIGHTS, c), problem.loss.of(c)) for c in np.ndindex(*sizes)]
    front = trace_front(problem, Metric.WEIGHTS, 9)
    assert len(front) > 4
    for point in front:
        cost, loss = point.costs[Metric.WEIGHTS], Fraction(point.loss)
        assert loss == min(own for taken, own in every if taken <= cost)
        assert cost == min(taken for taken, own in every if own <= loss)


def test_a_front_is_nowhere_worse_than_greedy(problem: WidthProblem) -> None:
    front = trace_front(problem, Metric.WEIGHTS, 9)
    greedy = list(greedy_within(problem, Metric.WEIGHTS, [a.costs[Metric.WEIGHTS] for a in front]))
    assert len(greedy) == len(front)
    for best, other in zip(front, greedy, strict=True):
        assert other.costs[Metric.WEIGHTS] <= best.costs[Metric.WEIGHTS]
        assert best.loss <= other.loss


@pytest.fixture(scope="module")
def front() -> Front:
    images, labels = labelled_images()
    images, labels = images[:200], labels[:200]
    return qir.pareto(
        qir.import_onnx(PATHS["fm_mlp"]),
        "fpga",
        FEEDS,
        points=4,
        evaluation=[{"x": images[:150]}, {"x": images[150:]}],
        score=lambda outputs: float((outputs["logits"].argmax(axis=1) == labels).mean()),
        weights=("8", "4", "2"),
        activations=(8,),
    )


def test_points_of_a_front_are_measured_on_the_program_with_those_widths(front: Front) -> None:
    images, labels = labelled_images()
    assert front.samples == 200
    assert front.float_score is not None
    assert front.float_score > 0.8
    point = front.of("front")[1]
    override = tuple(f"{name}:w{choice}" for name, choice in point.widths[Kind.WEIGHTS].items())
    activations = tuple(f"*:a{choice}" for choice in set(point.widths[Kind.ACTIVATIONS].values()))
    pipeline = qir.default_pipeline().replace("assign-bit-widths", AssignBitWidths(override=activations + override))
    program = qir.compile(PATHS["fm_mlp"], "fpga", FEEDS, pipeline=pipeline)
    found = program.run({"x": images[:200]})["logits"].argmax(axis=1) == labels[:200]
    # The input of that program has the default width, that of the front another.
    assert point.score == pytest.approx(float(found.mean()), abs=0.02)


def test_a_front_holds_uniform_and_greedy_points_too(front: Front) -> None:
    assert [set(p.widths[Kind.WEIGHTS].values()) for p in front.of("uniform")] == [{"2"}, {"4"}, {"8"}]
    assert len(front.of("greedy")) == len(front.of("front")) >= 3
    assert all(p.gap == 0 for p in front.points)
    scores = [p.score for p in front.of("front") if p.score is not None]
    assert front.float_score is not None
    assert max(scores) > front.float_score - 0.02
    assert json.loads(front.to_json())["points"][0]["widths"]["weights"]


def test_fronts_that_make_no_sense_are_refused() -> None:
    graph = qir.import_onnx(PATHS["fm_mlp"])
    learned = qir.default_pipeline().insert_after("select-q-formats", LearnRounding())
    with pytest.raises(PassError, match="a front has 2 points or more, not 1"):
        qir.pareto(graph, "fpga", FEEDS, points=1)
    pipeline = qir.default_pipeline().replace("assign-bit-widths", AssignBitWidths(budget=("0.5",)))
    with pytest.raises(PassError, match=r"budget=0.5} chooses widths by itself; leave its options out"):
        qir.pareto(graph, "fpga", FEEDS, pipeline=pipeline)
    other = qir.sensitivity(graph, "fpga", FEEDS, pipeline=learned, quality="kl", **SMALL)
    with pytest.raises(PassError, match=r"with the formats of .*learn-rounding.*; measure again, by the same passes"):
        qir.pareto(graph, "fpga", FEEDS, measured=other, **SMALL)
    with pytest.raises(InfeasibleError, match="lut of at most 1: the least is"):
        qir.pareto(graph, "fpga", FEEDS, budgets=("lut:1",), **SMALL)
    with pytest.raises(PassError, match="arm-neon states no costs of lut; see"):
        qir.pareto(graph, "arm-neon", FEEDS, metric="lut")


def test_a_budget_beyond_all_floats_is_no_limit(mlp: Graph) -> None:
    assert assign(mlp, budget=("weights:1e400B",), **SMALL)[0] == assign(mlp, budget=("weights:9x",), **SMALL)[0]


# The commands


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    images, labels = labelled_images()
    np.savez("calibration.npz", x=FEEDS[0]["x"])
    np.savez("inputs.npz", x=images[:64])
    np.savez("labels.npz", y=labels[:64])
    np.savez("wrong.npz", y=np.arange(-1, 31))
    return tmp_path


COMMON = ("--target", "fpga", "--calibration", "calibration.npz", "--weights", "8,4", "--activations", "8")


def test_the_commands_print_write_and_draw(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(PATHS["fm_mlp"])
    losses = ("--quality", "kl", "-o", "losses.json", "--plot", "losses.svg", "--cache", "cache")
    assert main(["sensitivity", model, *COMMON, *losses]) == 0
    shown = capsys.readouterr()
    assert "rank correlation" in shown.out
    assert shown.err == ""
    front = ("--sensitivity", "losses.json", "--points", "2", "-o", "front.json", "--plot", "front.png")
    assert main(["pareto", model, *COMMON, *front, "--inputs", "inputs.npz", "--labels", "labels.npz"]) == 0
    shown = capsys.readouterr()
    assert "the relative gap is 0 at every point" in shown.out
    assert "64 samples" in shown.out
    assert Path("losses.svg").read_text(encoding="utf-8").startswith("<?xml")
    assert Path("front.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(Path("front.json").read_text(encoding="utf-8"))["metric"] == "weights"
    assert len(list(Path("cache").iterdir())) > 3
    passes = str(qir.default_pipeline()).replace(
        "assign-bit-widths", "assign-bit-widths{budget=0.6,quality=kl,sensitivity=losses.json,weights=8;4}"
    )
    command = ["compile", model, "--target", "fpga", "--calibration", "calibration.npz", "-o", "out"]
    assert main([*command, "--passes", passes.replace("weights=8;4", "weights=8;4,activations=8")]) == 0
    assert "gap 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sensitivity", "MODEL", "--target", "fpga"), "losses are measured on samples, and there are none"),
        (("pareto", "MODEL", *COMMON, "--labels", "inputs.npz"), "must hold one array, the classes"),
        (("pareto", "MODEL", *COMMON, "--labels", "labels.npz"), "holds 64 classes, and there are 32 samples"),
        (("pareto", "MODEL", *COMMON, "--labels", "wrong.npz"), "holds classes from -1 to 30, and graph @"),
        (("pareto", "MODEL", *COMMON, "--inputs", "labels.npz"), "missing ['x']"),
        (("pareto", "MODEL", *COMMON, "--labels", "labels.npz", "--inputs", "labels.npz"), "missing ['x']"),
        (("pareto", "MODEL", *COMMON, "--plot", "front.pdf"), "the name must end in .svg or .png"),
        (("pareto", "MODEL", *COMMON, "--budget", "dsp:0"), "dsp of at most 0: the least is"),
        (("sensitivity", "MODEL", *COMMON, "--workers", "-1"), "--workers takes 0 or more"),
    ],
)
def test_commands_say_what_does_not_fit(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert main([str(PATHS["fm_mlp"]) if a == "MODEL" else a for a in arguments]) == 2
    assert message in capsys.readouterr().err
