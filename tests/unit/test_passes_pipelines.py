"""The registry of passes, plugins among them, the default pipeline and its strings."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import ClassVar

import numpy as np
import pytest

from qir.arrays import Array
from qir.backend import load_target
from qir.errors import PassError
from qir.ir import Graph, Stage
from qir.ops.float_elementwise import Add, Div, Relu
from qir.ops.float_nn import BatchNormalization, Conv
from qir.ops.movement import Transpose
from qir.pass_manager import Pass, PassContext, Pipeline, Verifier
from qir.passes import pipelines
from qir.passes.pipelines import PASSES, default_pipeline, parse_pipeline, pass_registry
from qir.passes.range_analysis import RangeAnalysis
from qir.rewrite import GraphBuilder
from qir.types import BATCH, F32, TensorType


@dataclass(frozen=True)
class Shout(Pass):
    """A plugin's pass."""

    times: int = 1
    name: ClassVar[str] = "shout"

    def run(self, graph: Graph, context: PassContext) -> Graph:
        """The graph under a louder name."""
        context.note("louder")
        return graph.with_changes(name=graph.name.upper() + "!" * self.times)


@dataclass(frozen=True)
class Impostor(Pass):
    """A plugin's pass under a name that is taken."""

    name: ClassVar[str] = "calibrate"


NO_PASS = "no pass"


def install(monkeypatch: pytest.MonkeyPatch, *values: str) -> None:
    """Let these entry points be installed."""
    points = [EntryPoint(f"point{i}", value, pipelines.GROUP) for i, value in enumerate(values)]
    monkeypatch.setattr(pipelines, "entry_points", lambda group: points if group == "qir.passes" else [])


def test_the_default_pipeline() -> None:
    assert str(default_pipeline()) == (
        "fold-constants,canonicalize,fuse-batch-norm,fuse-activation,eliminate-dead-code,calibrate,range-analysis,"
        "assign-bit-widths,select-q-formats,legalize,range-analysis,insert-saturation"
    )
    assert parse_pipeline(str(default_pipeline())) == default_pipeline()


def test_every_pass_has_a_name_of_its_own() -> None:
    assert len({p.name for p in PASSES}) == len(PASSES)
    optional = {p.name for p in PASSES} - {p.name for p in default_pipeline()}
    assert optional == {
        "equalize-cross-layer",
        "search-weight-ranges",
        "learn-rounding",
        "correct-bias",
        "minimize-accumulators",
    }
    assert {name: kind for name, kind in pass_registry().items() if kind in PASSES} == {p.name: p for p in PASSES}


def test_a_plugin_joins_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, f"{__name__}:Shout")
    (item,) = parse_pipeline("shout{times=2}")
    graph = Graph("quiet", Stage.FLOAT, (), (), (), ())
    assert item.run(graph, PassContext()).name == "QUIET!!"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_module:Pass", r"pass plugin 'point0' \(no_such_module:Pass\) failed to load: No module"),
        (f"{__name__}:NoSuch", r"pass plugin 'point0' .* failed to load: "),
        (f"{__name__}:NO_PASS", r"pass plugin 'point0' .* is no named subclass of qir.Pass"),
        ("qir.pass_manager:Pass", r"pass plugin 'point0' .* is no named subclass of qir.Pass"),
        (f"{__name__}:Impostor", r"pass plugin 'point0' .* claims the name 'calibrate', which is taken"),
    ],
)
def test_a_bad_plugin_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch, value: str, message: str) -> None:
    install(monkeypatch, value)
    with pytest.raises(PassError, match=message):
        pass_registry()


def test_two_plugins_cannot_share_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, f"{__name__}:Shout", f"{__name__}:Shout")
    with pytest.raises(PassError, match=r"pass plugin 'point1' .* claims the name 'shout', which is taken"):
        pass_registry()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("calibrat", "unknown pass 'calibrat'; there are: .*calibrate"),
        ("calibrate{observer=minmax}", "pass calibrate has no option 'observer'; its options: none"),
        ("calibrate,,legalize", "expected"),
    ],
)
def test_a_bad_string_is_refused(text: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        parse_pipeline(text)


def test_a_pass_at_the_wrong_stage_is_named_with_those_done() -> None:
    graph = Graph("empty", Stage.FLOAT, (), (), (), ())
    with pytest.raises(
        PassError, match=r"pass insert-saturation failed: takes stage fixed, .*\n\(passes done: shout\)"
    ):
        Pipeline([Shout(), default_pipeline()[-1]]).run(graph, PassContext(), [])


def layers(count: int) -> Graph:
    """`count` small ops in a row, and about as many constants."""
    builder = GraphBuilder("deep")
    random = np.random.default_rng(0)
    first = value = builder.input("x", TensorType((BATCH, 2, 2, 2)))

    def constant(*shape: int, low: float = 0.2) -> tuple[Array, TensorType]:
        data = random.uniform(low, low + 0.3, shape).astype(np.float32)  # so that no layer makes numbers grow
        return Array(data), TensorType(shape, F32)

    for step in range(count):
        kind = step % 6
        if kind == 0:
            weight = builder.constant(*constant(2, 2, 1, 1), "w")
            value = builder.emit(Conv, [value, weight], strides=(1, 1), pads=(0,) * 4, dilations=(1, 1), groups=1)
        elif kind == 1:
            parameters = [builder.constant(*constant(2), "p") for _ in range(4)]
            value = builder.emit(BatchNormalization, [value, *parameters], epsilon=1e-5)
        elif kind == 2:
            value = builder.emit(Relu, [value])
        elif kind == 3:
            value = builder.emit(Div, [value, builder.constant(*constant(low=1.0), "d")])
        elif kind == 4:
            value = builder.emit(Transpose, [value], perm=(0, 1, 3, 2))
        else:
            value = builder.emit(Add, [value, first])
    return builder.finish([value], ["y"])


def test_ten_thousand_ops_go_through_every_pass() -> None:
    graph = layers(5_000)
    assert len(graph.ops) > 10_000
    feeds = [{"x": np.random.default_rng(1).uniform(-1, 1, (1, 2, 2, 2)).astype(np.float32)}]
    context = PassContext(target=load_target("arm-neon"), calibration=feeds)
    after = default_pipeline().run(graph, context, [Verifier()])
    assert after.stage is Stage.FIXED
    assert len(after.ops) > 10_000
    assert RangeAnalysis().run(after, context) is after
