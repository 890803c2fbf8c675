"""What the op classes share: broadcasting, axes, reshaping and sliding windows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qir.errors import QirError
from qir.types import BATCH, Dim, Shape, shape_text


def broadcast_shapes(shapes: Sequence[Shape]) -> Shape:
    """The shape of elementwise results by NumPy's rule; the batch N meets only N, 1 or nothing.

    Raises QirError when the shapes do not broadcast.
    """
    rank = max(len(s) for s in shapes)
    result: list[Dim] = []
    for place in range(rank):
        dims = {s[place - rank + len(s)] for s in shapes if place - rank + len(s) >= 0} - {1}
        if len(dims) > 1:
            shown = " and ".join(shape_text(s) or "a scalar" for s in shapes)
            raise QirError(f"shapes {shown} do not broadcast")
        result.append(next(iter(dims), 1))
    return tuple(result)


def normalize_axis(axis: int, rank: int) -> int:
    """A non-negative axis. Raises QirError when it is outside the rank."""
    if not -rank <= axis < rank:
        raise QirError(f"axis {axis} is outside a tensor of rank {rank}")
    return axis % rank


def known_dim(dim: Dim, what: str) -> int:
    """A dimension that must not be the batch. Raises QirError when it is."""
    if dim == BATCH:
        raise QirError(f"{what} cannot be the open batch N")
    assert isinstance(dim, int)
    return dim


@dataclass(frozen=True, slots=True)
class Window:
    """A sliding window over the spatial dimensions; pads are ONNX's: all begins, then all ends."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    dilations: tuple[int, ...]

    def problems(self) -> Iterator[str]:
        """What is wrong with the numbers, one sentence each."""
        rank = len(self.kernel)
        if not len(self.strides) == len(self.dilations) == rank or len(self.pads) != 2 * rank:
            yield f"a {rank}-d window takes {rank} strides, {rank} dilations and {2 * rank} pads"
        if any(v < 1 for v in (*self.kernel, *self.strides, *self.dilations)) or any(p < 0 for p in self.pads):
            yield "kernel, strides and dilations must be at least 1 and pads at least 0"

    def pad(self, axis: int) -> tuple[int, int]:
        """Elements added before and after a spatial axis."""
        return self.pads[axis], self.pads[len(self.kernel) + axis]

    def extent(self, axis: int) -> int:
        """Input elements that the dilated kernel spans along a spatial axis."""
        return (self.kernel[axis] - 1) * self.dilations[axis] + 1

    def output(self, spatial: Sequence[Dim], ceil_mode: bool = False) -> tuple[int, ...]:
        """The spatial output shape. Raises QirError when the window does not fit.

        With `ceil_mode`, a last window that would start in the end padding is dropped, as ONNX and PyTorch do.
        """
        fault = next(self.problems(), None)
        if fault:
            raise QirError(fault)
        if len(spatial) != len(self.kernel):
            raise QirError(f"a {len(self.kernel)}-d window does not slide over {len(spatial)} spatial dimensions")
        result = []
        for axis, dim in enumerate(spatial):
            size = known_dim(dim, "a spatial dimension")
            begin, end = self.pad(axis)
            room = size + begin + end - self.extent(axis)
            if room < 0:
                raise QirError(f"a window of extent {self.extent(axis)} exceeds the padded size {size + begin + end}")
            steps = -(-room // self.strides[axis]) if ceil_mode else room // self.strides[axis]
            if ceil_mode and steps * self.strides[axis] >= size + begin:
                steps -= 1
            result.append(steps + 1)
        return tuple(result)

    def taps(self, axis: int, size: int, outputs: int) -> npt.NDArray[np.bool_]:
        """Which taps of each output position lie on real elements, not on padding: bool [outputs, kernel]."""
        starts = np.arange(outputs)[:, None] * self.strides[axis] - self.pad(axis)[0]
        places = starts + np.arange(self.kernel[axis])[None, :] * self.dilations[axis]
        return (places >= 0) & (places < size)


def reshape_shape(source: Shape, target: Sequence[Dim]) -> Shape:
    """The shape after a reshape to `target`. Raises QirError when element counts differ or the batch would move."""
    result = tuple(target)
    if (BATCH in source) != (BATCH in result) or (BATCH in result and result[0] != BATCH):
        raise QirError(
            f"a reshape from {shape_text(source)} to {shape_text(result)} does not keep the batch N in front"
        )
    sizes = [math.prod(d for d in s if isinstance(d, int)) for s in (source, result)]
    if sizes[0] != sizes[1]:
        raise QirError(f"cannot reshape {shape_text(source)} to {shape_text(result)}: the element counts differ")
    return result


def window_view(x: npt.NDArray[Any], window: Window, outputs: Sequence[int], first_axis: int) -> npt.NDArray[Any]:
    """A read-only view of the padded `x` with, for each spatial axis, outputs in place and taps appended at the end.

    `first_axis` is the first spatial axis; x [..., H, W, ...] -> [..., Ho, Wo, ..., kh, kw].
    """
    rank = len(window.kernel)
    shape, strides = list(x.shape), list(x.strides)
    for axis in range(rank):
        step = strides[first_axis + axis]
        shape[first_axis + axis] = outputs[axis]
        strides[first_axis + axis] = step * window.strides[axis]
        shape.append(window.kernel[axis])
        strides.append(step * window.dilations[axis])
    return np.lib.stride_tricks.as_strided(x, shape, strides, writeable=False)


def pad_spatial(
    x: npt.NDArray[np.generic],
    window: Window,
    spatial: Sequence[int],
    outputs: Sequence[int],
    first_axis: int,
    fill: float,
) -> npt.NDArray[np.generic]:
    """`x` padded with `fill` as far as the window reaches, which with ceil mode may be beyond the stated pads."""
    widths = [(0, 0)] * x.ndim
    for axis, size in enumerate(spatial):
        begin, end = window.pad(axis)
        reach = (outputs[axis] - 1) * window.strides[axis] + window.extent(axis)
        widths[first_axis + axis] = (begin, max(end, reach - size - begin))
    # Not np.pad, which fills an object array with int64 instead of Python ints.
    padded = np.full([begin + size + end for size, (begin, end) in zip(x.shape, widths, strict=True)], fill, x.dtype)
    padded[tuple(slice(begin, begin + size) for size, (begin, _) in zip(x.shape, widths, strict=True))] = x
    return padded
