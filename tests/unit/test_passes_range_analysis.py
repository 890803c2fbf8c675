"""range-analysis and insert-saturation: calibrated ranges of reals, proved ones of integers, and what they allow."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from property.float_graphs import graphs

from qir.backend import load_target
from qir.calibration import Histogram
from qir.errors import CalibrationError, PassError, VerifyError
from qir.fixed_point import Overflow
from qir.idle import is_idle
from qir.interpreter import interpret, trace
from qir.interval import Interval
from qir.ir import Graph, Op, Stage
from qir.observers import MeanSquaredError, Percentile
from qir.ops.accumulate import Accumulating
from qir.ops.float_elementwise import Add, Relu
from qir.ops.float_pool import ReduceMean
from qir.parser import parse
from qir.pass_manager import PassContext
from qir.passes.calibrate import Calibrate
from qir.passes.insert_saturation import InsertSaturation
from qir.passes.pipelines import default_pipeline, parse_pipeline
from qir.passes.range_analysis import RangeAnalysis
from qir.printer import print_graph, resources
from qir.proof import prove
from qir.rewrite import GraphBuilder, map_values
from qir.types import BATCH, TensorType
from qir.verifier import verify


def calibrated(graph: Graph, **feeds: npt.NDArray[np.float32]) -> Graph:
    return Calibrate().run(graph, PassContext(calibration=[feeds]))


def double_and_rectify() -> Graph:
    """`y = relu(x + x)`."""
    builder = GraphBuilder("double")
    x = builder.input("x", TensorType((BATCH, 1)))
    return builder.finish([builder.emit(Relu, [builder.emit(Add, [x, x], name="s")], name="y")], ["y"])


@settings(max_examples=50)
@given(case=graphs())
def test_ranges_hold_what_was_observed(case: tuple[Graph, npt.NDArray[np.float32]]) -> None:
    graph, x = case
    after = RangeAnalysis().run(calibrated(graph, x=x), PassContext())
    verify(after)
    assert after.stage is Stage.RANGED
    held = trace(graph, {"x": x})
    for value in after.values():
        assert value.range is not None
        assert value.range.lo <= held[value.name].min()
        assert value.range.hi >= held[value.name].max()
    assert parse(print_graph(after), resources(after)) == after


def test_the_observer_is_an_option() -> None:
    x = np.append(np.linspace(-1, 1, 999), 100).astype(np.float32)[:, None]
    graph = calibrated(double_and_rectify(), x=x)
    ranges = {
        text: RangeAnalysis(observer=text).run(graph, PassContext()).value("x").range
        for text in ("minmax", "percentile:percent=99", "mse:levels=16:symmetric=True")
    }
    histogram = Histogram.of(x)
    assert ranges["minmax"] == Interval(-1.0, 100.0)
    assert ranges["percentile:percent=99"] == Interval(*Percentile(99.0).range(histogram))
    assert ranges["mse:levels=16:symmetric=True"] == Interval(*MeanSquaredError(16, True).range(histogram))


def test_ranges_are_cut_to_what_an_op_can_give() -> None:
    builder = GraphBuilder("mean")
    x = builder.input("x", TensorType((BATCH, 4)))
    graph = builder.finish([builder.emit(ReduceMean, [x], axes=(1,), keepdims=False, name="mean")], ["y"])
    data = np.zeros((250, 4), np.float32)
    data[:4, 0] = 100  # 0.4 % of the elements, and 1.6 % of the means
    context = PassContext()
    after = RangeAnalysis(observer="percentile:percent=99").run(calibrated(graph, x=data), context)
    assert after.value("x").range == Interval(0.0, 0.0625)  # one bin
    mean = after.value("mean").range
    assert mean is not None
    assert (mean.lo, 0.0625 <= mean.hi < 0.0626) == (0.0, True)  # that and the rounding of float32, not 25
    assert context.notes == ["2 values ranged by percentile{percent=99.0}, 1 cut to what their op can give"]


def test_options_print_and_parse() -> None:
    item = RangeAnalysis(observer="mse:levels=16:symmetric=True")
    assert str(item) == "range-analysis{observer=mse:levels=16:symmetric=True}"
    assert list(parse_pipeline(str(item))) == [item]
    assert str(RangeAnalysis()) == "range-analysis"


def test_an_output_that_no_input_changes_is_warned_of() -> None:
    graph = parse("""
        graph @g stage=fixed (%x: Nx2 x s8) {
          %w = const {value=s8 2x1 [0, 0]} : 2x1 x s8
          %b = const {value=s16 1 [7]} : 1 x s16
          %y = matmul %x, %w, %b {accumulator=s32, overflow=wrap, order=khwc} : Nx1 x s32
          return %x, %y
        }""")
    context = PassContext()
    RangeAnalysis().run(graph, context)
    (found,) = context.diagnostics
    assert str(found) == (
        "warning: output %y: is [7, 7] whatever the inputs are; give the values before it more bits, or finer scales"
    )


def test_a_method_that_is_not_there_is_refused() -> None:
    with pytest.raises(PassError, match="range-analysis has no method 'octagon'; there are: interval, affine"):
        parse_pipeline("range-analysis{method=octagon}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("average", "unknown observer 'average'"),
        ("percentile:percent=200", "percent must be over 0 and at most 100"),
        ("percentile:levels=8", "option 'levels' is unknown"),
    ],
)
def test_an_observer_that_is_not_there_is_refused(text: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        parse_pipeline(f"range-analysis{{observer={text}}}")


def test_a_value_without_histogram_is_an_error_that_names_it() -> None:
    graph = map_values(
        calibrated(double_and_rectify(), x=np.ones((1, 1), np.float32)),
        lambda v: {"histogram": None} if v.name == "s" else {},
    )
    with pytest.raises(CalibrationError, match="%s has no histogram; run calibrate before range-analysis"):
        RangeAnalysis().run(graph, PassContext())


def fixed(graph: Graph, x: npt.NDArray[np.float32]) -> tuple[Graph, Graph]:
    """The graph after legalize, and after the range-analysis behind it."""
    context = PassContext(target=load_target("arm-neon"), calibration=[{"x": x}])
    after = default_pipeline()[:-2].run(graph, context)
    return after, RangeAnalysis().run(after, context)


@settings(max_examples=25)
@given(case=graphs())
def test_proved_ranges_hold_whatever_comes_in(case: tuple[Graph, npt.NDArray[np.float32]]) -> None:
    graph, x = case
    _, proved = fixed(graph, x)
    verify(proved)
    assert RangeAnalysis().run(proved, PassContext()) is proved
    storm = np.random.default_rng(0).integers(-128, 128, x.shape).astype(np.int8)
    for feed in (storm, np.full_like(storm, 127), np.full_like(storm, -128)):
        held = trace(proved, {"x": feed})
        for value in proved.values():
            assert value.range is not None
            assert value.range.lo <= held[value.name].min()
            assert value.range.hi >= held[value.name].max()
    for op in proved.ops:
        if isinstance(op, Accumulating):
            assert op.partial is not None
            assert op.result.range is not None
            assert op.partial.contains(op.result.range)


@settings(max_examples=25)
@given(case=graphs())
def test_saturation_goes_exactly_where_it_is_idle(case: tuple[Graph, npt.NDArray[np.float32]]) -> None:
    graph, x = case
    _, proved = fixed(graph, x)
    context = PassContext()
    after = InsertSaturation().run(proved, context)
    verify(after)
    feeds = {"x": np.random.default_rng(1).integers(-128, 128, x.shape).astype(np.int8)}
    expected, found = interpret(proved, feeds), interpret(after, feeds)
    assert all(np.array_equal(expected[n], found[n]) for n in proved.output_names)
    steps = prove(after).steps
    handled = [op for op in after.ops if hasattr(op, "overflow")]
    for op in handled:
        assert (op.overflow is Overflow.NONE) == is_idle(op, steps.get(op))
    modes = [note for note in context.notes if "kept" in note]
    counts = sum(int(word) for note in modes for word in note.split() if word.isdigit())
    assert counts == len(handled)
    assert RangeAnalysis().run(after, PassContext()) is after
    assert InsertSaturation().run(after, PassContext()) is after


def test_an_overflow_turned_off_by_hand_is_refused() -> None:
    text = """
    graph @hand stage=fixed target="arm-neon" {input_rule=divide, input_rounding=half_away} (%x: Nx2 x s8<0.5>) {
      %y = add %x, %x {overflow=OVERFLOW} : Nx2 x s8<0.5> loc("sum")
      return %y
    }"""
    graph = RangeAnalysis().run(parse(text.replace("OVERFLOW", "saturate")), PassContext())
    context = PassContext()
    assert InsertSaturation().run(graph, context) is graph
    assert context.notes == ["saturate: 1 kept, 0 proved idle", "wrap: 0 kept, 0 proved idle"]
    with pytest.raises(VerifyError, match=r'add %y \(from node "sum"\): claims overflow=none, which is not proved'):
        verify(parse(text.replace("OVERFLOW", "none")))


def test_an_op_without_a_range_rule_gets_its_whole_type_and_a_diagnostic(monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
    graph @unknown stage=fixed (%x: Nx2 x s8<0.5>) {
      %y = add %x, %x {overflow=saturate} : Nx2 x s8[0, 100]<0.5> loc("sum")
      return %y
    }"""
    graph = parse(text)
    monkeypatch.setattr(type(graph.ops[0]), "bounds", Op.bounds)
    context = PassContext()
    after = RangeAnalysis().run(graph, context)
    assert after.value("y").range == Interval(0, 100)
    assert [d.place for d in context.diagnostics] == ['add %y (from node "sum")']
    assert InsertSaturation().run(after, context) is after


def test_ranges_that_the_text_claims_are_proved_anew() -> None:
    graph = double_and_rectify()
    _, proved = fixed(graph, np.linspace(-1, 1, 8, dtype=np.float32)[:, None])
    narrowed = map_values(proved, lambda v: {"range": Interval(0, 0)} if v in proved.inputs else {})
    with pytest.raises(VerifyError, match=r"states the range \[0, 0\], but \[-128, 127\] is what is proved"):
        verify(narrowed)
    assert RangeAnalysis().run(narrowed, PassContext()) == proved
