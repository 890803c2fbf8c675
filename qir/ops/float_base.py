"""What the float op classes share: checks, fused clipping, interval helpers and the taps of sliding windows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qir.errors import QirError
from qir.interval import Interval
from qir.ir import FLOAT_STAGES, Op
from qir.opdef import Window, pad_spatial
from qir.types import Dim, IntegerType

Tensor = npt.NDArray[Any]
Ranges = tuple[Interval, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class FloatOp(Op):
    """Base: an op on reals, computed in float32 with ONNX's layout (N, C, spatial) and semantics."""

    stages = FLOAT_STAGES

    def check(self) -> Iterator[str]:
        """Operands stand for reals."""
        for operand in self.operands:
            if isinstance(operand.type.element, IntegerType):
                yield f"%{operand.name} holds plain integers ({operand.type.element}); cast it to f32 first"

    def eval_float(self, *arrays: Tensor) -> tuple[Tensor, ...]:
        """The result for float32 operands; a scalar too is an array."""
        return (np.asarray(self.compute(*arrays)),)

    def compute(self, *arrays: Tensor) -> Tensor:
        """The only result for float32 operands."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False, kw_only=True)
class Clipped(FloatOp):
    """Base: an op with one result that a fused activation may clip to `clip` = [lo, hi]; bounds may be infinite."""

    clip: tuple[float, ...] | None = None

    def check(self) -> Iterator[str]:
        """The clip bounds are a pair in order."""
        yield from super().check()
        if self.clip is not None and (len(self.clip) != 2 or not self.clip[0] <= self.clip[1]):
            yield f"clip takes [lo, hi] with lo <= hi, not {list(self.clip)}"

    def clipped(self, result: Tensor) -> Tensor:
        """The result after the fused activation; `result` is fresh and may be overwritten."""
        if self.clip is None:
            return result
        lo, hi = self.clip
        return clip_array(result, lo, hi, out=result if isinstance(result, np.ndarray) else None)

    def clipped_range(self, lo: float, hi: float) -> Ranges | None:
        """The outward-rounded interval after the fused activation."""
        if self.clip is None:
            return outward(lo, hi)
        found = outward(lo, hi) or (Interval(-math.inf, math.inf),)
        low, high = (min(max(bound, self.clip[0]), self.clip[1]) for bound in (found[0].lo, found[0].hi))
        return (Interval(low, high),) if math.isfinite(low) and math.isfinite(high) else None


def clip_array(x: Tensor, lo: float, hi: float, out: Tensor | None = None) -> Tensor:
    """`min(max(x, lo), hi)` in float32; an infinite bound costs nothing."""
    if lo > -math.inf:
        x = np.maximum(x, np.float32(lo), out=out)
    if hi < math.inf:
        x = np.minimum(x, np.float32(hi), out=out)
    return x


def outward(lo: float, hi: float, roundings: int = 1) -> Ranges | None:
    """The interval that float32 results lie in when the exact ones lie in [lo, hi]; None where it would be infinite.

    The computation rounds `roundings` times and is monotone, so each end is off by that many half units in the last
    place at most, relative to itself: 0 stays 0.
    """
    low, high = (_nudged(lo, -math.inf, roundings), _nudged(hi, math.inf, roundings))
    return (Interval(low, high),) if math.isfinite(low) and math.isfinite(high) else None


def _nudged(end: float, direction: float, roundings: int) -> float:
    if end == 0 or not math.isfinite(end):
        return end
    stretched = end + math.copysign(abs(end) * (roundings - 1) * 2.0**-24, direction)
    with np.errstate(over="ignore"):
        return float(np.nextafter(np.float32(stretched), np.float32(direction)))


def products(a: Interval, b: Interval) -> list[float]:
    """The four corner products, which hold the extremes of x * y."""
    return [float(x) * float(y) for x in (a.lo, a.hi) for y in (b.lo, b.hi)]


@dataclass(frozen=True, eq=False, kw_only=True)
class Windowed(FloatOp):
    """Base: an op that slides a window over 1 or 2 spatial dimensions; pads are ONNX's: all begins, then all ends."""

    strides: tuple[int, ...]
    pads: tuple[int, ...]
    dilations: tuple[int, ...]

    def kernel_shape(self) -> tuple[int, ...]:
        """The spatial size of the window."""
        raise NotImplementedError

    @property
    def window(self) -> Window:
        """The sliding window."""
        return Window(self.kernel_shape(), self.strides, self.pads, self.dilations)

    def spatial_output(self, ceil_mode: bool = False) -> tuple[int, ...]:
        """The spatial output shape. Raises QirError unless the operand is [N, C, W] or [N, C, H, W] and fits."""
        shape = self.operands[0].type.shape
        if len(shape) not in (3, 4):
            raise QirError(f"takes [N, C, W] or [N, C, H, W], not an operand of rank {len(shape)}")
        return self.window.output(shape[2:], ceil_mode)


def tap_views(x: Tensor, window: Window, outputs: Sequence[int], fill: float) -> Iterator[Tensor]:
    """For each tap of the window, row by row, the elements it meets: views [n, c, *outputs] of x [n, c, *spatial]."""
    if any(window.pads) or _overhangs(x, window, outputs):
        x = pad_spatial(x, window, x.shape[2:], outputs, 2, fill)
    for tap in itertools.product(*map(range, window.kernel)):
        index = [slice(None), slice(None)]
        for axis, place in enumerate(tap):
            start, step = place * window.dilations[axis], window.strides[axis]
            index.append(slice(start, start + (outputs[axis] - 1) * step + 1, step))
        yield x[tuple(index)]


def _overhangs(x: Tensor, window: Window, outputs: Sequence[int]) -> bool:
    """Whether ceil mode lets the last window reach beyond the stated padding."""
    return any(
        (outputs[axis] - 1) * window.strides[axis] + window.extent(axis) > x.shape[2 + axis]
        for axis in range(len(window.kernel))
    )


def taps_per_output(window: Window, spatial: Sequence[Dim], outputs: Sequence[int], with_pads: bool) -> Tensor:
    """How many taps of each output position lie on elements, or, `with_pads`, also on stated padding: [*outputs]."""
    total = np.ones((), np.int64)
    for axis, size in enumerate(spatial):
        assert isinstance(size, int)
        begin, end = window.pad(axis) if with_pads else (0, 0)
        starts = np.arange(outputs[axis])[:, None] * window.strides[axis] - window.pad(axis)[0]
        places = starts + np.arange(window.kernel[axis])[None, :] * window.dilations[axis]
        total = total[..., None] * ((places >= -begin) & (places < size + end)).sum(axis=1)
    return total
