"""What each op of a typed graph became on a target, and that alone run on integers which another target has there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qir.interpreter import evaluate_op
from qir.ir import Graph, Op, Value
from qir.ops.constant import Const
from qir.ops.fixed_rescale import dequantize_array, quantize_array
from qir.pass_manager import Feeds, PassContext
from qir.passes.legalize import lower
from qir.passes.lowering.context import channels_first, channels_last
from qir.passes.pipelines import default_pipeline
from qir.program import Program
from qir.rewrite import GraphBuilder, live_ops
from qir.target import InputQuantization, Target
from qir.types import (
    AffineType,
    ElementType,
    FixedPointType,
    is_quantized,
    scale_array,
    storage_of,
    zero_array,
)

Tensor = npt.NDArray[Any]
Values = dict[Value, Tensor]


class Place(NamedTuple):
    """Where a value of the typed graph stands in the fixed one, and whether channels are last there."""

    value: Value
    last: bool


@dataclass(frozen=True, eq=False)
class Segment:
    """What one float op became: fixed ops in order, constants included, from what enters them to the result.

    `entering` says of each value that the ops read from outside which typed value it stands for, by name, and whether
    with channels last.
    """

    layer: Op
    ops: tuple[Op, ...]
    result: Place
    entering: Mapping[Value, tuple[str, bool]]


@dataclass(frozen=True, eq=False)
class Side:
    """A graph on one target: with types, and lowered. `places` and `segments` are by the names of typed values.

    `program` computes the whole fixed graph. `alone` computes every segment on inputs of its own, and `names` says for
    each segment what its values are called there.
    """

    target: Target
    typed: Graph
    fixed: Graph
    places: Mapping[str, Place]
    segments: Mapping[str, Segment]
    program: Program
    alone: Program
    names: Mapping[str, Mapping[Value, str]]

    def trace(self, feeds: Feeds) -> Values:
        """Every value of the fixed graph; reals are quantized at its border. Raises RunError when feeds do not fit."""
        found = self.program.trace(feeds)
        return {value: found[value.name] for value in self.fixed.values()}


def make_side(typed: Graph, target: Target) -> Side:
    """Lower a typed graph for its target and bind it to kernels.

    Raises PassError for an op that the target has no form for, and VerifyError as Program does.
    """
    lowered = lower(typed, target)
    owners: dict[Value, list[tuple[str, bool]]] = {}
    places: dict[str, Place] = {}
    for (old, last), new in lowered.layouts.items():
        if old not in typed.constants:
            owners.setdefault(new, []).append((old.name, last))
            places.setdefault(old.name, Place(new, last))
    ends = (*lowered.graph.outputs, *(place.value for place in places.values()))
    fixed = lowered.graph.with_changes(outputs=ends, output_names=tuple(map(str, range(len(ends)))))
    fixed = fixed.with_changes(ops=tuple(live_ops(fixed)))
    order = {op: number for number, op in enumerate(fixed.ops)}
    layers = [op for op in typed.ops if not isinstance(op, Const)]
    segments = {op.result.name: _segment(fixed, op, places[op.result.name], owners, order) for op in layers}
    alone, names = _cut(fixed, segments)
    return Side(target, typed, fixed, places, segments, _bound(fixed), _bound(alone), names)


def _bound(fixed: Graph) -> Program:
    pipeline = default_pipeline()
    return Program(pipeline.after("legalize").run(fixed, PassContext()))


def _cut(fixed: Graph, segments: Mapping[str, Segment]) -> tuple[Graph, dict[str, dict[Value, str]]]:
    """The segments side by side, each reading inputs of its own; what the values of each are called."""
    builder = GraphBuilder(fixed.name, fixed.stage)
    names: dict[str, dict[Value, str]] = {}
    ends: list[Value] = []
    for layer, segment in segments.items():
        new: dict[Value, Value] = {}
        for value in segment.entering:
            new[value] = Value(builder.fresh(f"{layer}.{value.name}"), value.type)
            builder.inputs.append(new[value])
        for op in segment.ops:
            results = builder.append(op.with_changes(operands=tuple(new[v] for v in op.operands)))
            new.update(zip(op.results, results, strict=True))
        names[layer] = {old: value.name for old, value in new.items()}
        ends.append(new[segment.result.value])
    numbers = list(map(str, range(len(ends))))
    return builder.finish(ends, numbers, target=fixed.target, attributes=fixed.attributes), names


def _segment(
    fixed: Graph,
    layer: Op,
    result: Place,
    owners: Mapping[Value, Sequence[tuple[str, bool]]],
    order: Mapping[Op, int],
) -> Segment:
    operands = {v.name for v in layer.operands}
    found: set[Op] = set()
    entering: dict[Value, tuple[str, bool]] = {}
    waiting = [result.value]
    while waiting:
        value = waiting.pop()
        own = [owner for owner in owners.get(value, ()) if owner[0] in operands]
        if own or (value in owners and value is not result.value):
            entering[value] = (own or owners[value])[0]
        elif fixed.producers[value] not in found:
            found.add(fixed.producers[value])
            waiting += fixed.producers[value].operands
    return Segment(layer, tuple(sorted(found, key=order.__getitem__)), result, entering)


def replay(first: Side, traced: Mapping[Value, Tensor], other: Side) -> dict[str, Values]:
    """Every value of every layer on the other target, for the integers that enter the layer on the first one.

    They are the same integers where both have one scale, else the reals that they stand for, quantized by the rule of
    the other target's border.
    """
    feeds: dict[str, Tensor] = {}
    for layer, segment in other.segments.items():
        for value, (name, last) in segment.entering.items():
            place = first.places[name]
            array = onnx_layout(traced[place.value], place.last)
            moved = carried(array, place.value.type.element, value.type.element, other.target.input)
            moved = moved.transpose(channels_last(moved.ndim)) if last and moved.ndim > 2 else moved
            feeds[other.names[layer][value]] = moved
    found = other.alone.trace(feeds)
    return {layer: {value: found[n] for value, n in names.items()} for layer, names in other.names.items()}


def run_ops(ops: Iterable[Op], values: Values) -> None:
    """Evaluate ops in order and add their results to `values`, which holds what they read."""
    for op in ops:
        results = evaluate_op(op, [values[v] for v in op.operands])
        values.update(zip(op.results, results, strict=True))


def onnx_layout(array: Tensor, last: bool) -> Tensor:
    """A view with the channels in second place, of data that has them last where so stated."""
    return array.transpose(channels_first(array.ndim)) if last and array.ndim > 2 else array


def carried(array: Tensor, source: ElementType, goal: ElementType, rule: InputQuantization) -> Tensor:
    """Data of one type as data of another; integers that stand for no reals, and reals, as they are."""
    storage = storage_of(goal)
    if not is_quantized(source) or not is_quantized(goal) or storage is None:
        return array
    if same_step(source, goal):
        moved = array.astype(np.int64) - zero_array(source) + zero_array(goal)
        return np.asarray(np.clip(moved, storage.lo, storage.hi), storage.dtype)
    return quantize_array(dequantize_array(array, source), goal, rule.rule, rule.rounding).astype(storage.dtype)


def same_step(left: ElementType, right: ElementType) -> bool:
    """Whether a step of both types is the same real, so that their integers, less the zero points, compare."""
    if isinstance(left, AffineType | FixedPointType) and isinstance(right, AffineType | FixedPointType):
        return left.axis == right.axis and np.array_equal(scale_array(left), scale_array(right))
    return not is_quantized(left) and not is_quantized(right)


def steps(array: Tensor, element: ElementType) -> Tensor:
    """What data of a per-tensor type hold in steps of its scale: integers less the zero point, reals as they are."""
    return array if array.dtype.kind == "f" else array.astype(np.int64) - int(zero_array(element))


def reals(array: Tensor, element: ElementType) -> npt.NDArray[np.float64]:
    """The reals that data stand for, as float64; plain integers as they are."""
    return (dequantize_array(array, element) if is_quantized(element) else array).astype(np.float64)
