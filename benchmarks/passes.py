"""Time of each pass, and of verifier, printer and parser, on graphs of 10 to 10,000 small ops.

Each figure is the least of several runs. What grows faster than the graph shows in the last column: time per op at the
largest size over time per op at the one before it, 1 where time is proportional to the number of ops.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from support import large_graphs

import qir
from qir.pass_manager import PassContext, Progress
from qir.report import progress_bar

Result = TypeVar("Result")

_SAMPLES = 4


class Stopwatch:
    """The least time of each step, in the order in which they first ran."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def run(self, step: str, work: Callable[[], Result]) -> Result:
        """What `work` gives; its time counts for `step`."""
        start = time.perf_counter()
        result = work()
        self.seconds[step] = min(time.perf_counter() - start, self.seconds.get(step, math.inf))
        return result


def compile_once(nodes: int, watch: Stopwatch, progress: Progress) -> None:
    """Everything that a graph goes through, once."""
    pipeline = qir.default_pipeline()
    graph = large_graphs.large_graph(nodes)
    context = PassContext(qir.load_target("arm-neon"), list(large_graphs.samples(_SAMPLES)))
    _text(graph, watch)
    for number, item in enumerate(pipeline):
        progress(f"{nodes:,} ops: {item.name}", number, len(pipeline))
        graph = watch.run(_step(item.name, graph.stage), functools.partial(item.run, graph, context))
    _text(graph, watch)
    watch.run("bind kernels", lambda: qir.Program(graph))


def _step(name: str, stage: qir.Stage) -> str:
    return f"{name}, {stage}" if name == "range-analysis" else name


def _text(graph: qir.Graph, watch: Stopwatch) -> None:
    watch.run(f"verify, {graph.stage}", lambda: qir.verify(graph))
    text = watch.run(f"print, {graph.stage}", lambda: str(graph))
    arrays = qir.resources(graph)
    watch.run(f"parse, {graph.stage}", lambda: qir.parse(text, arrays))


def measure(nodes: int, progress: Progress) -> dict[str, float]:
    """Seconds of each step; several runs where they are short."""
    watch = Stopwatch()
    for _ in range(max(1, min(20, 1000 // nodes))):
        compile_once(nodes, watch, progress)
    return watch.seconds


def print_table(sizes: Sequence[int], columns: Sequence[dict[str, float]]) -> None:
    """Milliseconds, one row a step."""
    print(f"{'milliseconds':24}" + "".join(f"{f'{size:,} ops':>13}" for size in sizes) + f"{'growth':>9}")
    for step in columns[-1]:
        print(_row(step, sizes, [column[step] for column in columns]))
    print(_row("all", sizes, [sum(column.values()) for column in columns]))


def _row(title: str, sizes: Sequence[int], seconds: Sequence[float]) -> str:
    growth = seconds[-1] / sizes[-1] / (seconds[-2] / sizes[-2]) if len(sizes) > 1 else 1.0
    return f"{title:24}" + "".join(f"{1000 * s:13,.1f}" for s in seconds) + f"{growth:9.2f}"


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", type=int, default=[10, 100, 1000, 10000], metavar="OPS")
    sizes = parser.parse_args().sizes
    with progress_bar() as progress:
        columns = [measure(size, progress) for size in sizes]
    print_table(sizes, columns)
    return 0


if __name__ == "__main__":
    sys.exit(main())
