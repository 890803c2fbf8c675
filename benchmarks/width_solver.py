"""Seconds to the best widths of deep graphs, proved, for several sets of budgets: tables, then integer program.

A chain of matrix products with a residual sum every second layer, on `fpga`, with weights of 8, 4 and 2 bits and
activations of 16, 8 and 4; losses are drawn at random over six orders of magnitude. The exit status is 1 where a gap is
not 0, or 200 layers take 5 seconds or more.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from fractions import Fraction
from typing import Final

import numpy as np

import qir
from qir.arrays import Array
from qir.ops.float_elementwise import Add
from qir.ops.float_nn import MatMul
from qir.pass_manager import PassContext
from qir.passes.widths.costs import Metric
from qir.passes.widths.decisions import Widths, decisions
from qir.passes.widths.problem import Budget, WidthProblem
from qir.rewrite import GraphBuilder
from qir.types import BATCH, TensorType

_BUDGETS: Final = (
    (Metric.WEIGHTS,),
    (Metric.WEIGHTS, Metric.ENERGY),
    (Metric.ENERGY, Metric.LUT, Metric.DSP),
    (Metric.CONSTANTS, Metric.PEAK, Metric.MOVED),
)
_SHARE: Final = Fraction(6, 10)  # of what the widest choices take
_HELD_TO: Final = (200, 5.0)  # layers and seconds


def problem_of(layers: int) -> WidthProblem:
    """The chain with default widths, and losses for every choice."""
    builder, rng = GraphBuilder("chain"), np.random.default_rng(0)
    before = value = builder.input("x", TensorType((BATCH, 3, 8)))
    for number in range(layers):
        data = Array(rng.normal(0, 0.3, (8, 8)).astype(np.float32), f"w{number}")
        value = builder.emit(MatMul, [value, builder.constant(data, TensorType(data.shape))])
        if number % 2:
            before = value = builder.emit(Add, [value, before])
    fpga = qir.load_target("fpga")
    target = replace(fpga, activations=replace(fpga.activations, bits=(4, 8, 16), default=8))
    context = PassContext(target, [{"x": rng.normal(size=(8, 3, 8)).astype(np.float32)}])
    graph = qir.default_pipeline().before("select-q-formats").run(builder.finish([value], ["y"]), context)
    found = decisions(graph, target, Widths(("8", "4", "2")))
    losses = [dict(zip(d.choices, np.sort(10.0 ** rng.uniform(-6, 0, 3)).tolist(), strict=True)) for d in found]
    return WidthProblem(graph, target, found, losses)


def main() -> int:
    """Print a table, and what misses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", type=int, default=[50, 100, 200, 400])
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    print("| layers | decisions | budgets | seconds: least, median, most | gap |\n|---|---|---|---|---|")
    missed = False
    for layers in arguments.layers:
        for metrics in _BUDGETS:
            seconds, gap, count = [], 0.0, 0
            for _ in range(arguments.runs):
                problem = problem_of(layers)  # anew, so that its tables are made anew
                budgets = [Budget(m, problem.most(m) * _SHARE) for m in metrics]
                start = time.perf_counter()
                gap, count = problem.best(budgets).gap, len(problem.decisions)
                seconds.append(time.perf_counter() - start)
            times = ", ".join(f"{f(seconds):.2f}" for f in (min, np.median, max))
            print(f"| {layers} | {count} | {', '.join(metrics)} | {times} | {gap:g} |", flush=True)
            missed |= gap != 0 or (layers <= _HELD_TO[0] and float(np.median(seconds)) >= _HELD_TO[1])
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
