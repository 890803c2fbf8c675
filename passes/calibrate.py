"""calibrate: runs the float graph on sample data and attaches to each value the histogram of what it held."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from qir.arrays import Array
from qir.calibration import Calibration, Histogram
from qir.errors import CalibrationError, RunError
from qir.interpreter import check_feeds, evaluate
from qir.ir import Graph, Op, Stage, Value
from qir.ops.constant import Const
from qir.ops.float_elementwise import Clip
from qir.ops.float_nn import Summing
from qir.pass_manager import Feeds, Pass, PassContext, Progress, no_progress
from qir.rewrite import map_values
from qir.types import FloatType

#: Samples run at a time: enough for fast matrix products, few enough for the memory of large models.
CHUNK: Final = 32


@dataclass(frozen=True)
class Calibrate(Pass):
    """Observes every real value that is not constant over the feeds, or the `Calibration`, in the context.

    Raises CalibrationError, which names sample and input or value, for data that are missing or do not fit.
    """

    name: ClassVar[str] = "calibrate"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.FLOAT})
    ensures: ClassVar[Stage] = Stage.FLOAT

    def run(self, graph: Graph, context: PassContext) -> Graph:
        """The graph with a histogram on each observed value."""
        given = context.calibration
        if given is None:
            raise CalibrationError(
                "there is no calibration data; pass calibration=[{input name: array}, ...], or --calibration on the "
                "command line"
            )
        calibration = given if isinstance(given, Calibration) else observe(graph, given, context.progress)
        counts = [calibration[v.name].total for v in _observed(graph) if v.name in calibration]
        context.note(f"{len(counts)} values observed, {sum(counts):,} numbers")
        return apply(graph, calibration)


def observe(graph: Graph, feeds: Iterable[Feeds], progress: Progress = no_progress) -> Calibration:
    """What the values of a float graph hold over `feeds`: float32 reals by input name, any number of samples each.

    Feeds may be observed apart, in any order and on other machines of one kind, and merged
    (`qir.calibration.Calibration.merge`): the histograms are the same. Raises CalibrationError, which names the feed
    and the input or value, for no data, wrong names, shapes or types, and for values that are not finite.
    """
    if isinstance(feeds, Mapping):
        raise CalibrationError("calibration data is an iterable of feeds, such as [{input name: array}], not one feed")
    keys = {v: v.name for v in _observed(graph)}
    graph, sums = _apart(graph)
    total = len(feeds) if isinstance(feeds, Sized) else 0
    found: dict[str, Histogram] = {}
    for number, feed in enumerate(feeds):
        for part in parts_of(graph, feed, number):
            with np.errstate(all="ignore"):  # what comes out not finite is reported with its name
                for value, array in evaluate(graph, part):
                    if key := keys.get(value):
                        found[key] = _observe(value, array, found.get(key), number)
                    elif key := sums.get(value):
                        ends = np.array([array.min(), array.max()])
                        found[key] = _observe(value, ends, found.get(key), number)
        progress("calibrate", number + 1, total)
    if not found:
        raise CalibrationError("calibration data is empty: give at least one feed with one sample")
    return Calibration(found)


def apply(graph: Graph, calibration: Calibration) -> Graph:
    """The float graph with the histograms of `calibration` on its values.

    Raises CalibrationError, which names the value, where one was not observed.
    """
    wanted = frozenset(_observed(graph))
    missing = next((v.name for v in graph.values() if v in wanted and v.name not in calibration), None)
    if missing is not None:
        raise CalibrationError(
            f"the calibration holds nothing for %{missing}; observe graph @{graph.name} as it is here"
        )

    def facts(value: Value) -> dict[str, Any]:
        if value not in wanted:
            return {}
        return {"histogram": Array(calibration[value.name].to_array(), f"{value.name}.histogram")}

    def ends(op: Op) -> dict[str, Any]:
        seen = calibration.get(_before(op.result)) if isinstance(op, Summing) and op.clip is not None else None
        return {} if seen is None else {"unclipped": (seen.minimum, seen.maximum)}

    return map_values(graph, facts, attributes=ends)


def _before(value: Value) -> str:
    """The name under which a calibration holds the ends of what a fused activation makes a value of."""
    return f"{value.name} unclipped"


def _apart(graph: Graph) -> tuple[Graph, dict[Value, str]]:
    """The graph with activations of sums as ops of their own, and the names for what stands before them."""
    ops, sums = list[Op](), dict[Value, str]()
    for op in graph.ops:
        if isinstance(op, Summing) and op.clip is not None:
            before = Value(_before(op.result), op.result.type)
            sums[before] = before.name
            low, high = op.clip
            ops.append(op.with_changes(results=(before,), clip=None, unclipped=None))
            ops.append(Clip(operands=(before,), results=op.results, location=op.location, minimum=low, maximum=high))
        else:
            ops.append(op)
    return graph.with_changes(ops=tuple(ops)), sums


def _observed(graph: Graph) -> Iterator[Value]:
    """The real values that are not constant."""
    yield from (v for v in graph.inputs if isinstance(v.type.element, FloatType))
    for op in graph.ops:
        if not isinstance(op, Const):
            yield from (v for v in op.results if isinstance(v.type.element, FloatType))


def parts_of(graph: Graph, feed: Feeds, number: int) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """The feed of this number in chunks of the batch. Raises CalibrationError where it does not fit the inputs."""
    if not isinstance(feed, Mapping):
        raise CalibrationError(
            f"calibration feed {number} is of type {type(feed).__name__}; a feed maps input names to arrays"
        )
    try:
        arrays = check_feeds(graph.inputs, feed)
    except RunError as fault:
        raise CalibrationError(f"calibration feed {number}: {fault}") from fault
    samples = next((len(a) for v, a in arrays.items() if v.type.is_batched), 1)
    if samples == 0 or any(a.size == 0 for a in arrays.values()):
        raise CalibrationError(f"calibration feed {number} holds no samples; leave it out or fill it")
    for start in range(0, samples, CHUNK):
        yield {v.name: a[start : start + CHUNK] if v.type.is_batched else a for v, a in arrays.items()}


def _observe(value: Value, array: npt.NDArray[Any], known: Histogram | None, number: int) -> Histogram:
    try:
        return Histogram.of(array) if known is None else known.observe(array)
    except CalibrationError as fault:
        raise CalibrationError(f"calibration feed {number}: value %{value.name}: {fault}") from fault
