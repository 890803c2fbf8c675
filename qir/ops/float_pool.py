"""Float ops that reduce: pooling, mean, softmax and argmax."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from qir.errors import QirError
from qir.interval import Interval
from qir.opdef import known_dim, normalize_axis
from qir.ops.float_base import FloatOp, Ranges, Tensor, Windowed, outward, tap_views, taps_per_output
from qir.types import S64, ElementType, Shape


@dataclass(frozen=True, eq=False, kw_only=True)
class _Pool(Windowed):
    kernel: tuple[int, ...]
    ceil_mode: bool = False

    def kernel_shape(self) -> tuple[int, ...]:
        """The stated kernel."""
        return self.kernel

    def infer(self) -> tuple[Shape, ...]:
        """[N, C, outputs]. Raises QirError when the window does not fit or lies on padding alone somewhere."""
        shape = self.operands[0].type.shape
        outputs = self.spatial_output(self.ceil_mode)
        if 0 not in outputs and not taps_per_output(self.window, shape[2:], outputs, with_pads=False).all():
            raise QirError(f"pads {list(self.pads)} put some window of kernel {list(self.kernel)} on padding alone")
        return ((*shape[:2], *outputs),)


@dataclass(frozen=True, eq=False, kw_only=True)
class MaxPool(_Pool):
    """The greatest element under each window; padding never wins."""

    mnemonic = "MaxPool"

    def real_range(self, operands: Sequence[Interval]) -> Ranges:
        """That of the operand."""
        return (operands[0],)

    def compute(self, *arrays: Tensor) -> Tensor:
        """The maximum over the taps."""
        outputs = self.window.output(arrays[0].shape[2:], self.ceil_mode)
        result = np.full((*arrays[0].shape[:2], *outputs), -np.inf, np.float32)
        for view in tap_views(arrays[0], self.window, outputs, -np.inf):
            np.maximum(result, view, out=result)
        return result


@dataclass(frozen=True, eq=False, kw_only=True)
class AveragePool(_Pool):
    """The mean under each window; stated padding counts as zeros where `count_include_pad` says so."""

    mnemonic = "AveragePool"
    count_include_pad: bool = False

    def real_range(self, operands: Sequence[Interval]) -> Ranges | None:
        """That of the operand, with 0 where padding counts."""
        source = operands[0]
        if self.count_include_pad and any(self.pads):
            source = source.hull(Interval(0.0, 0.0))
        return outward(source.lo, source.hi, math.prod(self.kernel) + 1)

    def compute(self, *arrays: Tensor) -> Tensor:
        """The sum over the taps by their number; what ceil mode adds beyond the stated padding never counts."""
        spatial = arrays[0].shape[2:]
        outputs = self.window.output(spatial, self.ceil_mode)
        total = np.zeros((*arrays[0].shape[:2], *outputs), np.float32)
        for view in tap_views(arrays[0], self.window, outputs, 0.0):
            total += view
        counts = taps_per_output(self.window, spatial, outputs, self.count_include_pad)
        return total / counts.astype(np.float32)


@dataclass(frozen=True, eq=False, kw_only=True)
class ReduceMean(FloatOp):
    """The mean over `axes`, which are non-negative and not the batch."""

    mnemonic = "ReduceMean"
    has_tolerance = True
    axes: tuple[int, ...]
    keepdims: bool

    def infer(self) -> tuple[Shape, ...]:
        """The shape without the axes, or with 1 there. Raises QirError for a bad, empty or repeated axis."""
        shape = self.operands[0].type.shape
        _ = [_reducible(shape, axis) for axis in self.axes]
        if len(set(self.axes)) != len(self.axes):
            raise QirError(f"axes {list(self.axes)} repeat")
        kept = [(1 if axis in self.axes else d, axis) for axis, d in enumerate(shape)]
        return (tuple(d for d, axis in kept if self.keepdims or axis not in self.axes),)

    def real_range(self, operands: Sequence[Interval]) -> Ranges | None:
        """That of the operand."""
        return outward(operands[0].lo, operands[0].hi)

    def compute(self, *arrays: Tensor) -> Tensor:
        """NumPy's mean, summed in float64, so that it is as exact over a million elements as over two."""
        return np.asarray(np.mean(arrays[0], axis=self.axes, keepdims=self.keepdims, dtype=np.float64), np.float32)


def _reducible(shape: Shape, axis: int) -> int:
    """The size of an axis that may be reduced. Raises QirError for the batch and for an empty axis."""
    if axis < 0:
        raise QirError(f"axis {axis} is negative; count from the front")
    size = known_dim(shape[normalize_axis(axis, len(shape))], "a reduced axis")
    if size == 0:
        raise QirError(f"axis {axis} is empty and cannot be reduced")
    return size


@dataclass(frozen=True, eq=False, kw_only=True)
class Softmax(FloatOp):
    """`exp(x) / sum(exp(x))` along one axis that is not the batch."""

    mnemonic = "Softmax"
    has_tolerance = True
    axis: int

    def infer(self) -> tuple[Shape, ...]:
        """The shape of the input. Raises QirError for a bad axis."""
        shape = self.operands[0].type.shape
        _reducible(shape, self.axis)
        return (shape,)

    def real_range(self, operands: Sequence[Interval]) -> Ranges:
        """[0, 1]."""
        return (Interval(0.0, 1.0),)

    def compute(self, *arrays: Tensor) -> Tensor:
        """The formula, shifted by the maximum so that exp cannot overflow."""
        shifted = np.exp(arrays[0] - arrays[0].max(axis=self.axis, keepdims=True))
        return np.asarray(shifted / shifted.sum(axis=self.axis, keepdims=True))


@dataclass(frozen=True, eq=False, kw_only=True)
class ArgMax(FloatOp):
    """The index of the greatest element along one axis; among equals the first, or the last where asked."""

    mnemonic = "ArgMax"
    axis: int
    keepdims: bool
    select_last_index: bool = False

    def infer(self) -> tuple[Shape, ...]:
        """The shape without the axis, or with 1 there. Raises QirError for a bad axis."""
        shape = self.operands[0].type.shape
        _reducible(shape, self.axis)
        return ((*shape[: self.axis], *((1,) if self.keepdims else ()), *shape[self.axis + 1 :]),)

    def infer_elements(self) -> tuple[ElementType, ...]:
        """64-bit indices."""
        return (S64,)

    def check(self) -> Iterator[str]:
        """Indices are 64-bit integers."""
        yield from super().check()
        if self.result.type.element != S64:
            yield f"indices are {S64}, not {self.result.type.element}"

    def real_range(self, operands: Sequence[Interval]) -> Ranges:
        """The indices of the axis."""
        return (Interval(0.0, float(_reducible(self.operands[0].type.shape, self.axis) - 1)),)

    def compute(self, *arrays: Tensor) -> Tensor:
        """NumPy's argmax, from the other end where the last index is asked for."""
        x = arrays[0]
        if self.select_last_index:
            x = np.flip(x, self.axis)
        found = np.asarray(np.argmax(x, axis=self.axis, keepdims=self.keepdims), np.int64)
        return np.asarray(x.shape[self.axis] - 1 - found) if self.select_last_index else found
