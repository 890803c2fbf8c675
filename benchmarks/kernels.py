"""Sums whose every step saturates: the compiled loops beside NumPy, in multiply-accumulates a second.

NumPy adds one product after the other to whole arrays and clips, which is how the interpreter defines the op. Both take
turns in one process on one thread; a ratio is formed within a round and shown as median (least to greatest): above 1
qir is faster.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from qir.arrays import Array
from qir.fixed_point import Overflow
from qir.interpreter import interpret
from qir.ir import Graph, Stage
from qir.ops.accumulate import Order
from qir.ops.fixed_linear import Conv2d
from qir.pass_manager import PassContext
from qir.passes.range_analysis import RangeAnalysis
from qir.program import Program
from qir.rewrite import GraphBuilder
from qir.types import BATCH, S16, S32, TensorType, integer

_ROUNDS = 7
_LEAST_SECONDS = 0.05

CASES: dict[str, dict[str, Any]] = {
    "saturate": {"overflow": Overflow.SATURATE},
    "L_mac (products too)": {
        "overflow": Overflow.SATURATE,
        "product_shift": 1,
        "product": S32,
        "product_overflow": Overflow.SATURATE,
    },
    "24 bits, saturate": {"overflow": Overflow.SATURATE, "accumulator": integer(24)},
    "saturate to zero": {"overflow": Overflow.SATURATE_ZERO},
}


def layer(attributes: dict[str, Any]) -> Graph:
    """A 3x3 convolution of 32 to 32 channels over 28x28, 16-bit data, with a sum that does overflow."""
    random = np.random.default_rng(0)
    builder = GraphBuilder("layer", Stage.FIXED)
    x = builder.input("x", TensorType((BATCH, 28, 28, 32), S16))
    data = random.integers(-32768, 32768, (32, 3, 3, 32)).astype(np.int16)
    weight = builder.constant(Array(data), TensorType(data.shape, S16))
    window: dict[str, Any] = {"pads": (1, 1, 1, 1), "strides": (1, 1), "dilations": (1, 1), "groups": 1}
    choice = {"accumulator": S32, "order": Order.BIAS_KHWC, **attributes}
    y = builder.emit(Conv2d, [x, weight], **window, **choice)
    return RangeAnalysis().run(builder.finish([y], ["y"]), PassContext())


def seconds(run: Callable[[], object]) -> float:
    """Seconds a call."""
    count, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < _LEAST_SECONDS:
        run()
        count += 1
    return passed / count


def main() -> int:
    """Print one row a way of summing."""
    print(f"{'every step':22}{'kernel':34}{'GMAC/s':>8}  {'NumPy / qir'}")
    for name, attributes in CASES.items():
        graph = layer(attributes)
        program = Program(graph)
        feeds = {"x": np.random.default_rng(1).integers(-32768, 32768, (1, 28, 28, 32)).astype(np.int16)}
        assert np.array_equal(program.run_integer(feeds)["y"], interpret(graph, feeds)["y"])
        ours, ratios = [], []
        for _ in range(_ROUNDS):
            ours.append(seconds(lambda p=program, f=feeds: p.run_integer(f)))  # type: ignore[misc]
            ratios.append(seconds(lambda g=graph, f=feeds: interpret(g, f)) / ours[-1])  # type: ignore[misc]
        speed = program.macs() / statistics.median(ours) / 1e9
        spread = f"{statistics.median(ratios):6.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
        print(f"{name:22}{program.plan().steps[0].kernel:34}{speed:8.2f}  {spread}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
