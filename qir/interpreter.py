"""The definition of what a graph computes: a loop over its ops. Slow, exact, and the oracle of every kernel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qir.errors import RunError
from qir.fixed_point import Rounding
from qir.interval import exact
from qir.ir import Graph, Op, Stage, Value
from qir.ops.fixed_rescale import dequantize_array, quantize_input, round_to_grid
from qir.types import BATCH, FloatType, TensorType, is_quantized, shape_text, storage_of

Tensor = npt.NDArray[Any]


def interpret(graph: Graph, feeds: Mapping[str, npt.ArrayLike], *, unbounded: bool = False) -> dict[str, Tensor]:
    """The outputs by name.

    Feeds are float32 reals for float inputs and raw integers for integer inputs; the same holds for the outputs. Reals
    for an integer input are quantized as the graph states.
    At stage `typed` every result is rounded to its type's grid (simulated quantization). `unbounded` computes integers
    as Python ints throughout. Raises RunError when feeds do not fit.
    """
    wanted = dict.fromkeys(graph.outputs)
    found = {v: a for v, a in evaluate(graph, feeds, unbounded=unbounded) if v in wanted}
    return {name: found[value] for name, value in zip(graph.output_names, graph.outputs, strict=True)}


def trace(graph: Graph, feeds: Mapping[str, npt.ArrayLike], *, unbounded: bool = False) -> dict[str, Tensor]:
    """Every value by name: inputs, constants and all results."""
    return {value.name: array for value, array in evaluate(graph, feeds, unbounded=unbounded)}


def evaluate(
    graph: Graph, feeds: Mapping[str, npt.ArrayLike], *, unbounded: bool = False
) -> Iterator[tuple[Value, Tensor]]:
    """Yield each value with its array as it is made; an array is dropped after its last use."""
    last_use = {value: op for op in graph.ops for value in op.operands}
    live = entering(graph, feeds)
    yield from tuple(live.items())
    for op in graph.ops:
        results = evaluate_at(graph.stage, op, [live[v] for v in op.operands], unbounded=unbounded)
        for value, array in zip(op.results, results, strict=True):
            live[value] = array
            yield value, array
        for value in op.operands:
            if last_use[value] is op:
                live.pop(value, None)
        for value in op.results:
            if value not in last_use:
                live.pop(value, None)


def entering(graph: Graph, feeds: Mapping[str, npt.ArrayLike]) -> dict[Value, Tensor]:
    """The inputs as the ops of the graph read them. Raises RunError when feeds do not fit."""
    return {value: _entering(graph, value, array) for value, array in check_feeds(graph.inputs, feeds).items()}


def _entering(graph: Graph, value: Value, array: Tensor) -> Tensor:
    if graph.stage is Stage.FIXED:
        return _stored(quantize_input(graph, value, array), value.type)
    if graph.stage is Stage.TYPED and is_quantized(value.type.element):
        return on_grid(array, value) if array.dtype.kind == "f" else dequantize_array(array, value.type.element)
    return array


def evaluate_at(stage: Stage, op: Op, operands: Sequence[Tensor], *, unbounded: bool = False) -> tuple[Tensor, ...]:
    """The results of one op in a graph at this stage: at `typed`, rounded to the grids of their types."""
    results = evaluate_op(op, operands, unbounded=unbounded)
    if stage is not Stage.TYPED:
        return results
    return tuple(on_grid(array, value) for value, array in zip(op.results, results, strict=True))


def evaluate_op(op: Op, operands: Sequence[Tensor], *, unbounded: bool = False) -> tuple[Tensor, ...]:
    """The results of one op: float32 for reals; integers in the smallest dtype that holds their type."""
    found: tuple[Tensor, ...]
    if op.is_float:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # IEEE 754 says what comes of these
            found = op.eval_float(*operands)  # type: ignore[attr-defined]
    else:
        as_objects = unbounded or op.intermediate_bits() > 63 or any(_leaves_int64(v) for v in op.results)
        found = op.eval_int(*(_widened(a, as_objects) for a in operands))  # type: ignore[attr-defined]
    return tuple(_stored(a, v.type) for a, v in zip(found, op.results, strict=True))


def _leaves_int64(value: Value) -> bool:
    storage = storage_of(value.type.element)
    return storage is not None and storage.bits == 64 and not storage.signed


def _widened(array: Tensor, as_objects: bool) -> Tensor:
    if array.dtype.kind == "f":
        return array
    return exact(array) if as_objects else array.astype(np.int64)


def _stored(array: Tensor, kind: TensorType) -> Tensor:
    storage, array = storage_of(kind.element), np.asarray(array)  # Python ints in 0-d arrays compute to a bare int
    dtype = np.float32 if storage is None or array.dtype.kind == "f" else storage.dtype
    return array.astype(dtype, copy=False)


def on_grid(array: Tensor, value: Value) -> Tensor:
    """Reals rounded to the grid of a value's type, ties to even; as they are where it has none."""
    if not is_quantized(value.type.element) or array.dtype.kind != "f":
        return array
    return round_to_grid(array, value.type.element, Rounding.HALF_EVEN)


def check_feeds(inputs: Sequence[Value], feeds: Mapping[str, npt.ArrayLike]) -> dict[Value, Tensor]:
    """The feeds as arrays of the inputs' dtypes, in input order.

    Raises RunError that names the input when one is missing, unknown, misshapen, of a wrong type, out of its storage
    bounds or not finite, or when batches differ.
    """
    names = [v.name for v in inputs]
    missing, unknown = [n for n in names if n not in feeds], [n for n in feeds if n not in names]
    if missing or unknown:
        raise RunError(f"the inputs are {names}; missing {missing}, unknown {unknown}")
    arrays: dict[Value, Tensor] = {}
    batch: int | None = None
    for value in inputs:
        array = _check_feed(value, _as_array(value, feeds[value.name]))
        if value.type.is_batched:
            if batch not in (None, array.shape[0]):
                raise RunError(f"input {value.name!r} has a batch of {array.shape[0]}, another input one of {batch}")
            batch = array.shape[0]
        arrays[value] = array
    return arrays


def _as_array(value: Value, feed: npt.ArrayLike) -> Tensor:
    try:
        return np.asarray(feed)
    except ValueError as fault:
        raise RunError(f"input {value.name!r} is no array: {fault}") from fault


def _check_feed(value: Value, array: Tensor) -> Tensor:
    shape = value.type.shape
    fits = array.ndim == len(shape) and all(d in (BATCH, s) for d, s in zip(shape, array.shape, strict=True))
    if not fits:
        found, wanted = (shape_text(s) or "()" for s in (array.shape, shape))
        raise RunError(f"input {value.name!r} has shape {found}, expected {wanted}")
    storage = storage_of(value.type.element)
    if isinstance(value.type.element, FloatType) or array.dtype.kind == "f":
        if array.dtype.kind not in "fiu":
            raise RunError(f"input {value.name!r} is of {array.dtype}, expected float32")
        if array.dtype.kind == "f" and storage is not None and not is_quantized(value.type.element):
            raise RunError(f"input {value.name!r} is of {array.dtype}, expected integers of {storage}")
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise RunError(f"input {value.name!r} holds NaN or infinity")
        return array
    if array.dtype.kind not in "iub" or storage is None:
        raise RunError(f"input {value.name!r} is of {array.dtype}, expected integers of {storage}")
    if array.size and not storage.lo <= int(array.min()) <= int(array.max()) <= storage.hi:
        raise RunError(
            f"input {value.name!r} spans [{array.min()}, {array.max()}], beyond its type's [{storage.lo}, {storage.hi}]"
        )
    return array.astype(storage.dtype)
