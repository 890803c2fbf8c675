"""A small graph with a residual sum for the passes that round weights, typed on feeds made at random."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

import qir
from qir.ir import Graph
from qir.parser import parse
from qir.pass_manager import PassContext
from qir.passes.assign_bit_widths import AssignBitWidths
from qir.passes.pipelines import default_pipeline
from qir.target import Target

Feed = dict[str, npt.NDArray[Any]]

#: A convolution without a bias, a branch, and a matrix product; 2-bit weights are far from the real ones.
BRANCHES = """
graph @branches stage=float (%x: Nx2x4x4 x f32) {
  %w = const {value=f32 3x2x1x1 [0.9, -0.4, 0.3, 0.8, -0.6, 0.2]} : 3x2x1x1 x f32
  %a = Conv %x, %w {strides=[1, 1], pads=[1, 1, 1, 1], dilations=[1, 1], groups=1, clip=[0.0, inf]} : Nx3x6x6 x f32
  %v = const {value=f32 3x1x1x1 [0.7, -0.3, 0.5]} : 3x1x1x1 x f32
  %k = const {value=f32 3 [0.1, 0.2, -0.3]} : 3 x f32
  %b = Conv %a, %v, %k {strides=[1, 1], pads=[0, 0, 0, 0], dilations=[1, 1], groups=3} : Nx3x6x6 x f32
  %s = Add %a, %b : Nx3x6x6 x f32
  %m = ReduceMean %s {axes=[2, 3], keepdims=false} : Nx3 x f32
  %u = const {value=f32 3x2 [0.4, 0.9, -0.5, 0.3, 0.2, 0.7]} : 3x2 x f32
  %c = const {value=f32 2 [0.5, -0.5]} : 2 x f32
  %y = MatMul %m, %u, %c : Nx2 x f32
  return %y
}
"""

#: Targets on which it compiles, each with widths of its own.
TARGETS = (
    ("asic", "*:w3"),
    ("arm-neon", "*:8"),
    ("x86-fbgemm", "*:w8"),
    ("dsp16", "*:16"),
    ("tensorrt", "*:w4"),
)


def batches(*sizes: int) -> list[Feed]:
    """Feeds of so many samples each."""
    random = np.random.default_rng(0)
    return [{"x": random.uniform(-1, 2, (n, 2, 4, 4)).astype(np.float32)} for n in sizes]


def typed(
    feeds: list[Feed], target: str | Target = "asic", override: str = "*:w2", graph: Graph | None = None
) -> Graph:
    """The graph, this one if none is given, with a type for every value."""
    loaded = qir.load_target(target) if isinstance(target, str) else target
    pipeline = default_pipeline().replace("assign-bit-widths", AssignBitWidths(override=(override,)))
    return pipeline.before("legalize").run(graph or parse(BRANCHES), PassContext(loaded, feeds))


def legalized(graph: Graph, target: str | Target) -> Graph:
    """The integer graph."""
    loaded = qir.load_target(target) if isinstance(target, str) else target
    return default_pipeline().after("assign-bit-widths")[1:].run(graph, PassContext(loaded))
