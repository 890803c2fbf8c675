"""Affine forms where elements are easily taken for others: zero points along other axes, axes of size 1, ranks.

Each is sound by either method, and the checker refuses what would follow of the mistake.
"""

from __future__ import annotations

import pytest
from certified import certificate, faults_of
from property.recorder import Unsound, check_soundness

from qir.interval import Bounds, Interval
from qir.ir import Graph
from qir.parser import parse
from qir.probes import some_inputs
from qir.proof import Method, Proof, prove
from qir.verifier import verify

SUM = "accumulator=s32, overflow=wrap, order=khwc"
SHIFT = "multiplier=s64 [1], form=shift, input_shift=0, rounding=floor, overflow=saturate"
FLOAT = "shift=s64 [0], form=float32, input_shift=0, overflow=saturate"
ZEROS = "u8<[0.5, 0.5], zero=[0, 100], axis="
#: Graphs of an input %x and a result %y.
GRAPHS = {
    "zero points that a transpose takes to another axis": f"""
      graph @g stage=fixed (%x: Nx2x2 x u8[0, 10]<[0.5, 0.5], zero=[0, 0], axis=2>) {{
        %q = requantize %x {{{SHIFT}, shift=s64 [0]}} : Nx2x2 x {ZEROS}2>
        %y = transpose %q {{perm=[0, 2, 1]}} : Nx2x2 x {ZEROS}1>
        return %y
      }}""",
    "zero points that a reshape leaves behind": f"""
      graph @g stage=fixed (%x: Nx2x2 x u8[0, 10]<[0.5, 0.5], zero=[0, 0], axis=2>) {{
        %q = requantize %x {{{SHIFT}, shift=s64 [0]}} : Nx2x2 x {ZEROS}2>
        %r = reshape %q {{shape=[2, 2]}} : Nx2x2 x {ZEROS}1>
        %y = add %r, %r {{overflow=saturate}} : Nx2x2 x s16
        return %y
      }}""",
    "zero points of a sum along another axis": """
      graph @g stage=fixed (%x: Nx2x2 x s8) {
        %t = add %x, %x {overflow=saturate} : Nx2x2 x s16<[0.5, 0.5], zero=[0, 1000], axis=1>
        %y = add %t, %x {overflow=saturate} : Nx2x2 x s16
        return %y
      }""",
    "two dimensions that would show one axis": f"""
      graph @g stage=fixed (%x: Nx1x3 x u8[1, 2], %z: Nx4x1 x u8[1, 10]) {{
        %b = reduce_sum %x {{{SUM}, axes=[2], keepdims=true}} : Nx1x1 x s32
        %a = reshape %z {{shape=[1, 4]}} : Nx1x4 x u8[1, 10]
        %c = add %a, %b {{overflow=saturate}} : Nx1x4 x s16
        %y = reduce_sum %c {{{SUM}, axes=[1], keepdims=true}} : Nx1x4 x s32
        return %y
      }}""",
    "reals that are clipped": f"""
      graph @g stage=fixed (%x: Nx2x2 x s8[-2, 10]) {{
        %f = requantize %x {{{FLOAT}, multiplier=f32 [1e+18]}} : Nx2x2 x s64
        %d = requantize %f {{{SHIFT}, shift=s64 [-56]}} : Nx2x2 x s16
        %w = const {{value=s8 2x2 [14, 0, 0, 14]}} : 2x2 x s8
        %m = matmul %x, %w {{{SUM}}} : Nx2x2 x s32
        %y = sub %d, %m {{overflow=saturate}} : Nx2x2 x s16
        return %y
      }}""",
    "nothing but reals that are clipped": f"""
      graph @g stage=fixed (%x: Nx2 x u8[1, 10]) {{
        %y = requantize %x {{{FLOAT}, multiplier=f32 [1e+30]}} : Nx2 x s64
        return %y
      }}""",
    "a clamp far beyond 64 bits": f"""
      graph @g stage=fixed (%x: Nx2x3 x s16) {{
        %r = transpose %x {{perm=[0, 2, 1]}} : Nx3x2 x s16
        %q = requantize %r {{{SHIFT}, shift=s64 [62]}} : Nx3x2 x s64
        %y = requantize %q {{{SHIFT}, shift=s64 [62]}} : Nx3x2 x s16
        return %y
      }}""",
    "partial sums of one channel": f"""
      graph @g stage=fixed (%x: Nx1 x u16[0, 16384]) {{
        %v = const {{value=s8 1x3 [-2, -2, 0]}} : 1x3 x s8
        %b = const {{value=s32 3 [-908, -740, 617]}} : 3 x s32
        %a = matmul %x, %v, %b {{{SUM}}} : Nx3 x s32
        %w = const {{value=s8 3x3 [-8, -8, 7, 7, -8, 7, 7, -8, 7]}} : 3x3 x s8
        %y = matmul %a, %w {{accumulator=s16, overflow=wrap, order=khwc}} : Nx3 x s16
        return %y
      }}""",
    "a zero point for a channel that all share": """
      graph @g stage=fixed (%x: 1x2x2x2 x s16, %z: 1 x u3<[0.5], zero=[7], axis=0>) {
        %d = sub %x, %z {overflow=saturate} : 1x2x2x2 x s4
        %w = const {value=s8 1x1x1x2 [3, -1]} : 1x1x1x2 x s8
        %y = conv2d %d, %w {accumulator=s16, overflow=wrap, order=khwc, pads=[0, 0, 0, 0], strides=[1, 1],
          dilations=[1, 1], groups=1} : 1x2x2x1 x s16
        return %y
      }""",
    "padding around nothing": """
      graph @g stage=fixed (%x: Nx2x0 x u8) {
        %q = requantize %x {multiplier=s64 0 [], shift=s64 0 [], form=neon, input_shift=0,
          overflow=saturate} : Nx2x0 x s8[-90, -2]
        %y = pad %q {pads=[0, 0, 1, 0, 0, 1], value=-90} : Nx2x2 x s8[-90, -2]
        return %y
      }""",
    "a row as a column": """
      graph @g stage=fixed (%x: 1x2x2 x s8) {
        %g = gather %x {indices=s64 [0], axis=2} : 1x2 x s8
        %y = sub %x, %g {overflow=saturate} : 1x2x2 x s16
        return %y
      }""",
    "an operand of which but the bounds are used": """
      graph @g stage=fixed (%x: 1x2x2 x s8) {
        %g = gather %x {indices=s64 [0], axis=2} : 1x2 x s8
        %h = requantize %g {multiplier=s64 [1140850688], shift=s64 [1], form=double_round,
          input_shift=0, overflow=saturate} : 1x2 x s8
        %d = sub %x, %h {overflow=saturate} : 1x2x2 x s16
        %y = sub %d, %x {overflow=saturate} : 1x2x2 x s16
        return %y
      }""",
    "samples as channels": """
      graph @g stage=fixed (%x: 2x2 x s8) {
        %g = gather %x {indices=s64 [0], axis=1} : 2 x s8
        %y = sub %x, %g {overflow=saturate} : 2x2 x s16
        return %y
      }""",
}
#: What is not true of %y there, but would be if elements were those that they are easily taken for.
FALSE_CLAIMS = {
    "zero points that a transpose takes to another axis": ([0, 100], [10, 110]),
    "zero points that a reshape leaves behind": ([0, 0], [20, 20]),
    "zero points of a sum along another axis": ([-384, -1384], [381, -619]),
    "reals that are clipped": ([-10, -10], [10, 10]),
    "a row as a column": ([0, -255], [0, 255]),
    "samples as channels": ([0, -255], [0, 255]),
}


def run(graph: Graph, proof: Proof) -> None:
    """Hold the numbers of many inputs to a proof."""
    for feeds in some_inputs(graph, 400, 0):
        check_soundness(graph, feeds, proof)


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("method", Method)
def test_every_number_is_within_what_is_proved(name: str, method: Method) -> None:
    graph = parse(GRAPHS[name])
    verify(graph)
    proof = prove(graph, method)
    run(graph, proof)
    assert faults_of(graph, certificate(graph, proof)) == []


@pytest.mark.parametrize("name", FALSE_CLAIMS)
def test_the_checker_does_not_take_elements_for_others(name: str) -> None:
    graph = parse(GRAPHS[name])
    y, proof = graph.value("y"), prove(graph)
    claimed = Bounds.of(*FALSE_CLAIMS[name])
    with pytest.raises(Unsound, match="%y spans"):
        run(graph, Proof({y: claimed}, proof.steps, ()))
    stated = certificate(graph)
    affine = {"rule": "affine", "inputs": ["x"]}
    stated["values"]["y"] = affine | {
        "lo": claimed.lo.tolist(),
        "hi": claimed.hi.tolist(),
        "step": claimed.steps.tolist(),
    }
    if "y:unsaturated" in stated["lanes"]:
        whole: Interval = claimed.hull
        stated["lanes"]["y:unsaturated"] = affine | {"lo": whole.lo, "hi": whole.hi, "step": 1}
    assert any(fault.startswith("values 'y'") for fault in faults_of(graph, stated))
