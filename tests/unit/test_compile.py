"""`qir.compile`: what it takes, what it hands on, and what it refuses."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx_models import model, random

import qir
from qir.passes.assign_bit_widths import AssignBitWidths

Tensor = npt.NDArray[Any]
SAMPLES = random(16, 4)
FEEDS = [{"x": SAMPLES[:8]}, {"x": SAMPLES[8:]}]


@pytest.fixture
def graph() -> qir.Graph:
    """Two layers, four inputs, three outputs."""
    text = "g (float[N, 4] x) => (float[N, 3] y) { h = Gemm(x, w, b) r = Relu(h) y = Gemm(r, v, b) }"
    return qir.import_onnx(model(text, w=random(4, 3, seed=1), b=random(3, seed=2), v=random(3, 3, seed=3)))


def test_program_computes_nearly_what_the_model_does(graph: qir.Graph) -> None:
    program = qir.compile(graph, "arm-neon", FEEDS)
    found, expected = program.run({"x": SAMPLES})["y"], qir.interpret(graph, {"x": SAMPLES})["y"]
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    assert program.graph.stage is qir.Stage.FIXED
    assert program.graph.target == "arm-neon"
    assert program.macs() == 21


def test_every_form_of_the_arguments_gives_the_same_program(graph: qir.Graph, tmp_path: Path) -> None:
    text = "g (float[N, 4] x) => (float[N, 3] y) { h = Gemm(x, w, b) r = Relu(h) y = Gemm(r, v, b) }"
    path = tmp_path / "model.onnx"
    onnx.save(model(text, w=random(4, 3, seed=1), b=random(3, seed=2), v=random(3, 3, seed=3)), path)
    (tmp_path / "mine.toml").write_text(str(qir.load_target("arm-neon")))
    expected = qir.compile(graph, "arm-neon", FEEDS).graph

    def generated() -> Iterator[dict[str, Tensor]]:
        yield from FEEDS

    forms: list[tuple[Any, Any, Any, Any]] = [
        (path, "arm-neon", FEEDS, None),
        (str(path), qir.load_target("arm-neon"), FEEDS, None),
        (graph, tmp_path / "mine.toml", FEEDS, None),
        (graph, str(tmp_path / "mine.toml"), FEEDS, None),
        (graph, "arm-neon", generated(), None),
        (graph, "arm-neon", [{"x": SAMPLES}], None),
        (graph, "arm-neon", FEEDS, qir.default_pipeline()),
        (graph, "arm-neon", FEEDS, str(qir.default_pipeline())),
    ]
    for source, target, calibration, pipeline in forms:
        assert qir.compile(source, target, calibration, pipeline=pipeline).graph == expected


def test_calibration_may_be_observed_apart_and_merged(graph: qir.Graph) -> None:
    ready = qir.default_pipeline().before("calibrate").run(graph, qir.PassContext())
    shards = [qir.observe(ready, [feed]) for feed in FEEDS]
    for merged in (shards[0].merge(shards[1]), shards[1].merge(shards[0])):
        assert qir.compile(graph, "arm-neon", merged).graph == qir.compile(graph, "arm-neon", FEEDS).graph


def test_instruments_and_progress_see_every_pass(graph: qir.Graph, tmp_path: Path) -> None:
    timing, seen = qir.Timing(), []
    program = qir.compile(
        graph,
        "arm-neon",
        FEEDS,
        instruments=[timing, qir.Dump(tmp_path)],
        progress=lambda task, done, total: seen.append((task, done, total)),
    )
    names = [p.name for p in qir.default_pipeline()]
    assert [r.name for r in timing.records] == names
    assert timing.records[0].before is graph
    assert timing.records[-1].after is program.graph
    assert sorted(p.name for p in tmp_path.glob("*.qir")) == [f"{i:02d}_{n}.qir" for i, n in enumerate(names, 1)]
    assert {("calibrate", 1, 2), ("calibrate", 2, 2)} <= set(seen)
    assert [task for task, done, total in seen if total == len(names)] == names


def test_nothing_passed_in_is_changed(graph: qir.Graph) -> None:
    before = str(graph)
    qir.compile(graph, "arm-neon", FEEDS)
    assert str(graph) == before


def test_overrides_reach_the_bit_widths(graph: qir.Graph) -> None:
    target = qir.load_target("arm-neon")
    wide = replace(
        target,
        activations=replace(target.activations, bits=(8, 16)),
        weights=replace(target.weights, bits=(4, 8, 16)),
        costs=replace(target.costs, mac={f"{w}x{a}": float(w * a) for w in (4, 8, 16) for a in (8, 16)}),
    )
    timing = qir.Timing()
    qir.compile(graph, wide, FEEDS, overrides={"*": 8, "r": 16}, instruments=[timing])
    assigned = next(r.after for r in timing.records if r.name == "assign-bit-widths")
    found = {v.name: v.storage.bits for v in assigned.values() if v.storage is not None}
    assert found == {"x": 8, "w": 16, "b": 32, "r": 16, "v": 8, "b.1": 32, "y": 8}


def test_overrides_need_their_pass(graph: qir.Graph) -> None:
    pipeline = qir.default_pipeline().replace("assign-bit-widths")
    with pytest.raises(qir.PassError, match="overrides are for assign-bit-widths, which the pipeline lacks"):
        qir.compile(graph, "arm-neon", FEEDS, overrides={"h": 8}, pipeline=pipeline)


def test_overrides_come_after_those_of_the_pipeline(graph: qir.Graph) -> None:
    pipeline = qir.default_pipeline().replace("assign-bit-widths", AssignBitWidths(override=("h:16",)))
    with pytest.raises(qir.PassError, match="override 'h:16': arm-neon has activations of 8 bits, not 16"):
        qir.compile(graph, "arm-neon", FEEDS, overrides={"y": 8}, pipeline=pipeline)


@dataclass(frozen=True)
class Wreck(qir.Pass):
    """Returns a graph that is not legal."""

    name: ClassVar[str] = "wreck"

    def run(self, graph: qir.Graph, context: qir.PassContext) -> qir.Graph:
        """The same graph, whose first op is gone."""
        return graph.with_changes(ops=graph.ops[1:])


def test_each_pass_is_verified_and_the_last_good_graph_kept(graph: qir.Graph) -> None:
    pipeline = qir.default_pipeline().insert_after("canonicalize", Wreck())
    with pytest.raises(qir.PassError, match="pass wreck failed: graph @g is not legal") as caught:
        qir.compile(graph, "arm-neon", FEEDS, pipeline=pipeline)
    assert caught.value.passes_done == ("fold-constants", "canonicalize")
    assert isinstance(caught.value.last_good, qir.Graph)
    qir.verify(caught.value.last_good)


def test_illegal_graph_is_refused_before_any_pass(graph: qir.Graph) -> None:
    timing = qir.Timing()
    with pytest.raises(qir.VerifyError, match="is not defined before it"):
        qir.compile(graph.with_changes(ops=graph.ops[1:]), "arm-neon", FEEDS, instruments=[timing])
    assert timing.records == []


def test_pipeline_must_end_at_fixed(graph: qir.Graph) -> None:
    with pytest.raises(qir.PassError, match="ended at stage ranged, a program needs stage fixed") as caught:
        qir.compile(graph, "arm-neon", FEEDS, pipeline=qir.default_pipeline().before("select-q-formats"))
    assert caught.value.passes_done[-1] == "assign-bit-widths"


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        (None, "there is no calibration data"),
        ([], "calibration data is empty"),
        ({"x": SAMPLES}, "an iterable of feeds, such as .*, not one feed"),
        ([SAMPLES], "calibration feed 0 is of type ndarray; a feed maps input names to arrays"),
        ([{"x": SAMPLES}, {"y": SAMPLES}], "calibration feed 1: the inputs are .*unknown .'y'"),
        ([{"x": SAMPLES[:, :3]}], "calibration feed 0: input 'x' has shape 16x3, expected Nx4"),
        ([{"x": SAMPLES[:0]}], "calibration feed 0 holds no samples"),
        ([{"x": np.full((2, 4), np.nan)}], "calibration feed 0: input 'x' holds NaN or infinity"),
        ([{"x": np.full((2, 4), "a")}], "calibration feed 0: input 'x' is of <U1, expected float32"),
    ],
)
def test_calibration_that_does_not_fit(calibration: Any, words: str, graph: qir.Graph) -> None:
    with pytest.raises(qir.PassError, match=f"pass calibrate failed: .*{words}") as caught:
        qir.compile(graph, "arm-neon", calibration)
    assert isinstance(caught.value.__cause__, qir.CalibrationError)
