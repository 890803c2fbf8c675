"""Lowering of the ops that only move elements, and of Shape and Size, which only read types."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from qir.arrays import Array
from qir.errors import QirError
from qir.frontend.onnx_batch import settle, shape_array, size_of, to_dims
from qir.frontend.onnx_context import Known, Node, sample_size
from qir.frontend.onnx_fold import slice_index
from qir.ir import Value
from qir.opdef import known_dim, normalize_axis
from qir.ops.movement import Concat, Gather, Pad, Slice, Transpose
from qir.types import BATCH, Dim, Shape, shape_text

_FAR: Final = 2**31 - 1  # exporters write this, or more, for "to the end"


def lower_shape(node: Node) -> Known:
    """Shape: data known at import, which may hold N."""
    dims = shape_array(node.scope.shape(node.proto.input[0]))
    start, end = node.attribute("start") or 0, node.attribute("end")
    return settle(dims[slice(start, end)])


def lower_size(node: Node) -> Known:
    """Size: data known at import, which may be a multiple of N."""
    return size_of(node.scope.shape(node.proto.input[0]))


def lower_identity(node: Node) -> Known:
    """Identity vanishes."""
    return node.given(0)


def lower_reshape(node: Node) -> Known:
    """Reshape with its 0 and -1 resolved."""
    value = node.value(0)
    target = list(to_dims(node.dims(1, "shape")))
    if not node.attribute("allowzero"):
        if any(d == 0 and i >= value.type.rank for i, d in enumerate(target)):
            raise QirError(f"its shape {target} copies a dimension that the input lacks")
        target = [value.type.shape[i] if d == 0 else d for i, d in enumerate(target)]
    return node.reshape(value, _resolved(value.type.shape, target))


def _resolved(source: Shape, target: list[Dim]) -> Shape:
    """The target shape with -1 replaced by what is left. Raises QirError when nothing fits."""
    if target.count(-1) > 1 or any(isinstance(d, int) and d < -1 for d in target):
        raise QirError(f"its shape {target} holds more than one -1, or a negative size")
    if -1 not in target:
        return tuple(target)
    place = target.index(-1)
    rest = [d for d in target if d != -1]
    left, size = sample_size(rest), sample_size(source)
    if BATCH in source and BATCH not in rest:
        # N itself is what is left, or would have to be mixed with other elements.
        if place == 0 and left == size:
            return (BATCH, *rest)
        raise QirError(
            f"its shape {target} takes the open batch N of {shape_text(source)} apart; fix the batch size with shapes"
        )
    if not left or size % left:
        raise QirError(f"cannot reshape {shape_text(source)} to {target}: the element counts differ")
    return tuple(size // left if d == -1 else d for d in target)


def lower_flatten(node: Node) -> Known:
    """Flatten as a reshape to a matrix."""
    value = node.value(0)
    shape, axis = value.type.shape, node.number("axis")
    if not -len(shape) <= axis <= len(shape):
        raise QirError(f"its axis {axis} is outside a tensor of rank {len(shape)}")
    axis = axis + len(shape) if axis < 0 else axis
    rows: Dim = sample_size(shape[:axis])
    if BATCH in shape[:axis] and rows == 1:
        rows = BATCH
    elif BATCH in shape:
        raise QirError(
            f"with axis {axis} it mixes the open batch N with other dimensions; fix the batch size with shapes"
        )
    return node.reshape(value, (rows, sample_size(shape[axis:])))


def lower_squeeze(node: Node) -> Known:
    """Squeeze as a reshape."""
    value = node.value(0)
    shape = value.type.shape
    stated = node.whole(1, "axes") if node.opset >= 13 and node.has(1) else node.integers("axes", ())
    axes = [normalize_axis(a, len(shape)) for a in stated] or [i for i, d in enumerate(shape) if d == 1]
    if any(shape[a] != 1 for a in axes):
        raise QirError(f"its axes {axes} of {shape_text(shape)} are not all of size 1")
    return node.reshape(value, [d for i, d in enumerate(shape) if i not in axes])


def lower_unsqueeze(node: Node) -> Known:
    """Unsqueeze as a reshape."""
    value = node.value(0)
    stated = node.whole(1, "axes") if node.opset >= 13 else node.integers("axes", ())
    rank = value.type.rank + len(stated)
    axes = {normalize_axis(a, rank) for a in stated}
    if len(axes) != len(stated):
        raise QirError(f"its axes {list(stated)} repeat")
    dims = iter(value.type.shape)
    return node.reshape(value, [1 if i in axes else next(dims) for i in range(rank)])


def lower_transpose(node: Node) -> Known:
    """Transpose; one that moves nothing vanishes."""
    value = node.value(0)
    perm = node.integers("perm", range(value.type.rank)[::-1])
    if perm == tuple(range(value.type.rank)):
        return value
    return node.emit(Transpose, [value], perm=perm)


def lower_concat(node: Node) -> Known:
    """Concat; of a single input it vanishes."""
    values = [node.value(i) for i in range(len(node.proto.input))]
    if len(values) == 1:
        return values[0]
    return node.emit(Concat, values, axis=normalize_axis(node.number("axis"), values[0].type.rank))


def lower_split(node: Node) -> tuple[Known | None, ...]:
    """Split as one Slice for each output that is read."""
    value = node.value(0)
    axis = normalize_axis(node.number("axis"), value.type.rank)
    size = known_dim(value.type.shape[axis], "the axis of a split")
    count = node.attribute("num_outputs") or len(node.proto.output)
    if node.opset >= 13 and node.has(1):
        sizes = node.whole(1, "split")
    elif node.opset < 13 and node.attribute("split") is not None:
        sizes = node.integers("split", ())
    else:
        part = -(-size // count)
        if size % count and node.opset < 18:
            raise QirError(f"cannot split {size} elements into {count} equal parts")
        sizes = (*[part] * (count - 1), size - part * (count - 1))
    if len(sizes) != len(node.proto.output) or sum(sizes) != size or min(sizes) < 0:
        raise QirError(f"its parts {list(sizes)} do not make up {size} elements in {len(node.proto.output)} outputs")
    results: list[Known | None] = []
    start = 0
    for name, length in zip(node.proto.output, sizes, strict=True):
        span = {"starts": (start,), "ends": (start + length,), "axes": (axis,), "steps": (1,)}
        results.append(node.emit(Slice, [value], name=name, **span) if name else None)
        start += length
    return tuple(results)


def lower_slice(node: Node) -> Known:
    """Slice with its bounds counted from the front; axes that are kept whole vanish."""
    value = node.value(0)
    # The open batch is as long as can be: only a slice that keeps all of it passes.
    sizes = tuple(np.iinfo(np.int64).max if d == BATCH else d for d in value.type.shape)
    index = slice_index(node, tuple(int(s) for s in sizes))
    spans: list[tuple[int, int, int, int]] = []
    for axis, (part, size) in enumerate(zip(index, sizes, strict=True)):
        start, end, step = part.indices(int(size))
        if value.type.shape[axis] == BATCH and (start, step) == (0, 1) and (part.stop is None or part.stop >= _FAR):
            continue
        if (start, end, step) == (0, size, 1):
            continue
        spans.append((start, end, axis, step) if len(range(start, end, step)) else (0, 0, axis, 1))
    if not spans:
        return value
    starts, ends, axes, steps = zip(*spans, strict=True)
    return node.emit(Slice, [value], starts=starts, ends=ends, axes=axes, steps=steps)


def lower_gather(node: Node) -> Known:
    """Gather by indices known at import, counted from the front."""
    value, indices = node.value(0), node.data(1, "indices")
    axis = normalize_axis(node.number("axis"), value.type.rank)
    size = known_dim(value.type.shape[axis], "the axis of a gather")
    if indices.dtype == object:
        raise QirError("its indices depend on the open batch N; fix the batch size with shapes")
    counted = np.where(indices < 0, indices.astype(np.int64) + size, indices.astype(np.int64))
    return node.emit(Gather, [value], indices=Array(counted, f"{node.output}.indices"), axis=axis)


def lower_pad(node: Node) -> Known:
    """Pad: negative pads as a Slice, constant ones as Pad, the other modes as a Gather along each padded axis."""
    value = node.value(0)
    rank, mode = value.type.rank, node.number("mode")
    begins, ends = _pads(node, rank)
    value = _cropped(node, value, begins, ends)
    begins, ends = [max(b, 0) for b in begins], [max(e, 0) for e in ends]
    if mode == "constant":
        return _pad_constant(node, value, begins, ends)
    if mode not in ("reflect", "edge", "wrap"):
        raise QirError(f"its mode {mode!r} is none of constant, reflect, edge and wrap")
    padded = [axis for axis in range(rank) if begins[axis] or ends[axis]]
    for axis in padded:
        size = known_dim(value.type.shape[axis], "a padded axis")
        if not size:
            raise QirError(f"cannot pad the empty axis {axis} by {mode}")
        indices = Array(np.pad(np.arange(size), (begins[axis], ends[axis]), mode=mode), f"{node.output}.indices")
        name = node.output if axis == padded[-1] else f"{node.output}.axis{axis}"
        value = node.emit(Gather, [value], name=name, indices=indices, axis=axis)
    return value


def _pads(node: Node, rank: int) -> tuple[list[int], list[int]]:
    stated = node.whole(1, "pads") if node.opset >= 11 else node.integers("pads", ())
    axes = node.whole(3, "axes") if node.opset >= 18 and node.has(3) else tuple(range(rank))
    if len(stated) != 2 * len(axes):
        raise QirError(f"it has {len(stated)} pads for {len(axes)} axes; it takes two each")
    begins, ends = [0] * rank, [0] * rank
    for place, axis in enumerate(axes):
        begins[normalize_axis(axis, rank)] = stated[place]
        ends[normalize_axis(axis, rank)] = stated[place + len(axes)]
    return begins, ends


def _cropped(node: Node, value: Value, begins: list[int], ends: list[int]) -> Value:
    """`value` without what negative pads take away."""
    axes = tuple(i for i in range(len(begins)) if begins[i] < 0 or ends[i] < 0)
    if not axes:
        return value
    sizes = [known_dim(value.type.shape[a], "a cropped axis") for a in axes]
    starts = tuple(max(-begins[a], 0) for a in axes)
    stops = tuple(n - max(-ends[a], 0) for a, n in zip(axes, sizes, strict=True))
    if any(start > stop for start, stop in zip(starts, stops, strict=True)):
        raise QirError(f"its negative pads take more than axes {list(axes)} hold")
    return node.step("cropped", Slice, [value], starts=starts, ends=stops, axes=axes, steps=(1,) * len(axes))


def _pad_constant(node: Node, value: Value, begins: list[int], ends: list[int]) -> Value:
    fill = node.scalar(2, "constant_value") if node.opset >= 11 and node.has(2) else node.attribute("value") or 0.0
    if not math.isfinite(fill):
        raise QirError(f"it pads with {fill}; only finite numbers can be quantized")
    if not any(begins) and not any(ends):
        return value
    return node.emit(Pad, [value], pads=(*begins, *ends), value=fill)
