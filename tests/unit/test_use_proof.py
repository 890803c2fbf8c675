"""Kernels chosen by proof give the bits of kernels chosen without: real models on digital signal processors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from models import compiled, labelled_images

from qir.backend import load_target
from qir.errors import VerifyError
from qir.fixed_point import Overflow
from qir.interpreter import trace
from qir.ir import Graph
from qir.ops.accumulate import Accumulating
from qir.parser import parse
from qir.pass_manager import PassContext, Timing, integer_feeds
from qir.passes.insert_saturation import InsertSaturation
from qir.passes.pipelines import default_pipeline
from qir.passes.range_analysis import RangeAnalysis
from qir.probes import some_inputs
from qir.program import Program

Tensor = npt.NDArray[Any]

MODELS = ("fm_cnn", "fm_mobile")
_SAMPLES = 48


@cache
def graphs(name: str, target: str) -> tuple[Graph, Graph]:
    """A model before insert-saturation, where every overflow mode of the contract stands, and behind it."""
    timing, model = Timing(), compiled(name)
    context = PassContext(load_target(target), [{"x": labelled_images()[0][:64]}])
    default_pipeline().run(model.imported, context, [timing])
    (record,) = (r for r in timing.records if r.name == InsertSaturation.name)
    return record.before, record.after


def kernels(program: Program) -> Mapping[str, str]:
    """The kernel of every sum, by the name of the value that it writes, alone or with the requantize behind it."""
    sums = {op.describe(): op.result.name for op in program.graph.ops if isinstance(op, Accumulating)}
    return {sums[s.ops[0]]: s.kernel for s in program.plan().steps if s.ops[0] in sums}


def is_ordered(kernel: str) -> bool:
    return "_ordered_" in kernel or "_stepwise_" in kernel


def hard_images(graph: Graph) -> dict[str, Tensor]:
    """Real images, images of extremes, and those that drive the first sums to their ends."""
    real = integer_feeds(graph, {"x": labelled_images()[0][:_SAMPLES]})["x"]
    chosen = np.concatenate([feeds["x"] for feeds in some_inputs(graph, _SAMPLES, 0)])
    return {"x": np.concatenate([chosen, real])}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("target", ["dsp16", "dsp16-acc40"])
def test_every_value_is_the_same_without_proof(name: str, target: str) -> None:
    before, after = graphs(name, target)
    proved, plain = Program(after), Program(before, use_proof=False)
    feeds = hard_images(before)
    expected, found = plain.trace(feeds), proved.trace(feeds)
    assert expected.keys() == found.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array, key, strict=True)
    few = {"x": feeds["x"][:: _SAMPLES // 2]}
    for key, array in trace(before, few).items():
        np.testing.assert_array_equal(plain.trace(few)[key], array, key, strict=True)
    outputs = [p.run_integer(feeds)["logits"] for p in (proved, plain)]
    np.testing.assert_array_equal(outputs[0], outputs[1], strict=True)


@pytest.mark.parametrize("name", MODELS)
def test_saturating_sums_are_ordered_but_where_proved(name: str) -> None:
    before, after = graphs(name, "dsp16")
    modes = {op.result.name: op.overflow for op in after.ops if isinstance(op, Accumulating)}
    assert {op.overflow for op in before.ops if isinstance(op, Accumulating)} == {Overflow.SATURATE}
    plain, proved = kernels(Program(before, use_proof=False)), kernels(Program(after))
    assert plain.keys() == proved.keys() == modes.keys()
    assert all(is_ordered(k) for k in plain.values())
    assert {n for n, k in proved.items() if not is_ordered(k)} == {n for n, m in modes.items() if m is Overflow.NONE}
    assert 0 < sum(m is Overflow.NONE for m in modes.values()) < len(modes)


@pytest.mark.parametrize("name", MODELS)
def test_wrapping_sums_are_cut_to_their_bits_but_where_proved(name: str) -> None:
    """Their order never counts: what the proof saves is the narrowing to 40 bits."""
    before, after = graphs(name, "dsp16-acc40")
    assert {op.overflow for op in before.ops if isinstance(op, Accumulating)} == {Overflow.WRAP}
    assert {op.overflow for op in after.ops if isinstance(op, Accumulating)} == {Overflow.NONE}
    plain, proved = kernels(Program(before, use_proof=False)), kernels(Program(after))
    assert all(k.endswith("s64+wrap_s40") for k in plain.values())
    assert not any("wrap" in k or is_ordered(k) for k in proved.values())


SUMS = """
graph @sums stage=fixed (%x: Nx4 x s8) {
  %w = const {value=s8 4x2 [127, 127, 127, 127, -127, -127, -128, 127]} : 4x2 x s8
  %y = matmul %x, %w {accumulator=KIND, order=khwc, overflow=MODE} : Nx2 x KIND
  return %y
}"""


@pytest.mark.parametrize(
    ("kind", "mode", "proof", "plain"),
    [
        ("s40", "saturate", "matmul_s8s8s32+s40", "matmul_ordered_s8s8s64"),
        ("s40", "wrap", "matmul_s8s64s64", "matmul_s8s64s64+wrap_s40"),
        ("s40", "none", "matmul_s8s8s32+s40", "matmul_s8s64s64"),
        ("s24", "saturate_zero", "matmul_s8s8s32", "matmul_stepwise_s8s8s32"),
        ("s40", "saturate, product=s13, product_overflow=saturate", "matmul_ordered_s8s8s64", "matmul_ordered_s8s8s64"),
        ("s40", "saturate, product=s16, product_overflow=saturate", "matmul_s8s8s32+s40", "matmul_ordered_s8s8s64"),
        ("s24", "none", "matmul_s8s8s32", "matmul_s8s8s32"),
        ("s16", "saturate", "matmul_ordered_s8s8s32+s16", "matmul_ordered_s8s8s32+s16"),
    ],
)
def test_what_a_choice_rests_on(kind: str, mode: str, proof: str, plain: str) -> None:
    graph = RangeAnalysis().run(parse(SUMS.replace("KIND", kind).replace("MODE", mode)), PassContext())
    x = {"x": np.array([[-128] * 4, [127] * 4, [127, 127, -128, 127], [0, 1, -1, 3]], np.int8)}
    expected = trace(graph, x)["y"]
    for use_proof, kernel in ((True, proof), (False, plain)):
        program = Program(graph, use_proof=use_proof)
        assert [s.kernel for s in program.plan().steps] == [kernel]
        np.testing.assert_array_equal(program.run_integer(x)["y"], expected, strict=True)


def test_a_claim_is_believed_only_where_it_holds() -> None:
    """What says `overflow=none` is verified with or without use of the proof."""
    graph = RangeAnalysis().run(parse(SUMS.replace("KIND", "s16").replace("MODE", "none")), PassContext())
    with pytest.raises(VerifyError, match="claims overflow=none, which is not proved"):
        Program(graph, use_proof=False)
