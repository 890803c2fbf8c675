"""Ops that only move elements: each has a float class, named as in ONNX, and an integer class, named as in TOSA."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qir.affine import Form, stacked
from qir.arrays import Array
from qir.errors import QirError
from qir.interval import Bounds, Interval, hull_of
from qir.ir import FIXED_ONLY, FLOAT_STAGES, Op, OpBounds
from qir.opdef import known_dim, normalize_axis, reshape_shape
from qir.types import BATCH, AffineType, Dim, ElementType, FixedPointType, Shape, storage_of

Tensor = npt.NDArray[Any]


@dataclass(frozen=True, eq=False, kw_only=True)
class Movement(Op):
    """Base: what both classes of an op share."""

    def move(self, *arrays: Tensor) -> Tensor:
        """The result for arrays of any dtype."""
        raise NotImplementedError

    def infer_elements(self) -> tuple[ElementType, ...]:
        """The element type of the first operand; an operation that moves the quantized axis must state its own."""
        return (self.operands[0].type.element,)

    def check(self) -> Iterator[str]:
        """The real meaning of the integers must not change on the way."""
        result = self.result.type.element
        for operand in self.operands if self.stages == FIXED_ONLY else ():
            if (storage_of(operand.type.element) is None) != (storage_of(result) is None):
                yield f"%{operand.name} and the result are not both integers or both reals"
            elif _meaning(operand.type.element) != _meaning(result):
                yield f"%{operand.name} and the result differ in scale or zero point; requantize it first"

    def bounds(self, operands: Sequence[Bounds]) -> OpBounds:
        """The hull of the operands."""
        return OpBounds((hull_of(operands),))

    def asked(self, demand: Bounds, operands: Sequence[Bounds]) -> tuple[Bounds, ...]:
        """What is asked of any element of the result."""
        return (demand.flat(),) * len(self.operands)

    def real_range(self, operands: Sequence[Interval]) -> tuple[Interval, ...]:
        """The hull of the operands."""
        return (Interval(min(o.lo for o in operands), max(o.hi for o in operands)),)

    def intermediate_bits(self) -> int:
        """Nothing is computed."""
        storage = storage_of(self.result.type.element)
        return storage.bits + (not storage.signed) if storage else 32

    def eval_float(self, *arrays: Tensor) -> tuple[Tensor, ...]:
        """The moved elements."""
        return (self.move(*arrays),)

    def eval_int(self, *arrays: Tensor) -> tuple[Tensor, ...]:
        """The moved elements."""
        return (self.move(*arrays),)


def _meaning(element: ElementType) -> object:
    """Scale and zero point of a per-tensor type; per-axis types are compared by content without the axis."""
    if isinstance(element, AffineType):
        return element.scale, element.zero_point
    return element.exponent if isinstance(element, FixedPointType) else None


@dataclass(frozen=True, eq=False, kw_only=True)
class Reshape(Movement):
    """The same elements in row-major order under another shape; a leading N stays in front."""

    mnemonic = "Reshape"
    stages = FLOAT_STAGES
    shape: tuple[int, ...]  # the sizes behind the batch where the operand has one
    operand_names = ("input",)

    def infer(self) -> tuple[Shape, ...]:
        """The stated shape, behind N where the operand is batched."""
        source = self.operands[0].type
        target: tuple[Dim, ...] = (BATCH, *self.shape) if source.is_batched else self.shape
        return (reshape_shape(source.shape, target),)

    def bounds(self, operands: Sequence[Bounds]) -> OpBounds:
        """Channel bounds survive where the last axis is kept or is unrolled from whole pixels."""
        channels, last = operands[0].channels, (self.shape[-1] if self.shape else 1)
        if channels is None or channels == 0 or last % channels:
            return OpBounds((operands[0].flat(),))
        times = last // channels
        return OpBounds((operands[0].map(lambda e: np.tile(e, times)),))

    def affine(self, operands: Sequence[Form | None], bounds: Sequence[Bounds]) -> Form | None:
        """The same elements in other dimensions, where samples stay what they are."""
        form, source, shape = operands[0], self.operands[0].type.shape, self.result.type.shape
        if form is None or not source or not shape or source[0] != shape[0]:
            return None
        return form.reshaped([int(d) for d in shape[1:]])

    def move(self, *arrays: Tensor) -> Tensor:
        """NumPy's reshape."""
        lead = (arrays[0].shape[0],) if self.operands[0].type.is_batched else ()
        return arrays[0].reshape((*lead, *self.shape))


class FixedReshape(Reshape):
    """`Reshape` on integers."""

    mnemonic = "reshape"
    stages = FIXED_ONLY


@dataclass(frozen=True, eq=False, kw_only=True)
class Transpose(Movement):
    """Axes in another order; the batch stays in front."""

    mnemonic = "Transpose"
    stages = FLOAT_STAGES
    perm: tuple[int, ...]

    def infer(self) -> tuple[Shape, ...]:
        """The permuted shape. Raises QirError for a bad permutation or one that moves N."""
        source = self.operands[0].type.shape
        if sorted(self.perm) != list(range(len(source))):
            raise QirError(f"perm {list(self.perm)} is no permutation of {len(source)} axes")
        result = tuple(source[p] for p in self.perm)
        if BATCH in result[1:]:
            raise QirError(f"perm {list(self.perm)} moves the open batch N; fix the batch size at import")
        return (result,)

    def bounds(self, operands: Sequence[Bounds]) -> OpBounds:
        """Channel bounds survive where the last axis stays last."""
        kept = bool(self.perm) and self.perm[-1] == len(self.perm) - 1
        return OpBounds((operands[0] if kept else operands[0].flat(),))

    def affine(self, operands: Sequence[Form | None], bounds: Sequence[Bounds]) -> Form | None:
        """The same elements with dimensions in another order."""
        return operands[0] and operands[0].transposed(self.perm)

    def move(self, *arrays: Tensor) -> Tensor:
        """NumPy's transpose."""
        return np.asarray(arrays[0].transpose(self.perm), order="C")


class FixedTranspose(Transpose):
    """`Transpose` on integers."""

    mnemonic = "transpose"
    stages = FIXED_ONLY


@dataclass(frozen=True, eq=False, kw_only=True)
class Concat(Movement):
    """Tensors side by side along an axis other than the batch."""

    mnemonic = "Concat"
    stages = FLOAT_STAGES
    operand_names = ("inputs*",)
    axis: int

    def infer(self) -> tuple[Shape, ...]:
        """Shapes agree but for the axis. Raises QirError otherwise."""
        shapes = [v.type.shape for v in self.operands]
        axis = normalize_axis(self.axis, len(shapes[0]))
        around = {(len(s), s[:axis], s[axis + 1 :]) for s in shapes}
        if len(around) > 1:
            raise QirError(f"shapes differ outside of axis {axis}")
        total = sum(known_dim(s[axis], "the axis of a concatenation") for s in shapes)
        return ((*shapes[0][:axis], total, *shapes[0][axis + 1 :]),)

    def bounds(self, operands: Sequence[Bounds]) -> OpBounds:
        """Along the last axis, the channel bounds side by side."""
        rank = self.operands[0].type.rank
        if normalize_axis(self.axis, rank) != rank - 1:
            return OpBounds((hull_of(operands),))
        widths = [known_dim(v.type.shape[-1], "a channel axis") for v in self.operands]
        ends = [
            [np.broadcast_to(e, (w,)) for e in (b.lo, b.hi, b.steps)] for b, w in zip(operands, widths, strict=True)
        ]
        lo, hi, step = (np.concatenate(parts) for parts in zip(*ends, strict=True))
        return OpBounds((Bounds(lo, hi, None, step),))

    def affine(self, operands: Sequence[Form | None], bounds: Sequence[Bounds]) -> Form | None:
        """Channels side by side."""
        forms, rank = [f for f in operands if f is not None], self.operands[0].type.rank
        is_last = rank > 1 and normalize_axis(self.axis, rank) == rank - 1
        return stacked(forms) if is_last and len(forms) == len(operands) else None

    def move(self, *arrays: Tensor) -> Tensor:
        """NumPy's concatenate."""
        return np.concatenate(arrays, axis=self.axis)


class FixedConcat(Concat):
    """`Concat` on integers of one scale and zero point."""

    mnemonic = "concat"
    stages = FIXED_ONLY


@dataclass(frozen=True, eq=False, kw_only=True)
class Slice(Movement):
    """`starts[i] : ends[i] : steps[i]` along `axes[i]`; non-negative starts, ends exclusive (-1: past the first)."""

    mnemonic = "Slice"
    stages = FLOAT_STAGES
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    axes: tuple[int, ...]
    steps: tuple[int, ...]

    def infer(self) -> tuple[Shape, ...]:
        """The sliced shape. Raises QirError when the axes do not fit, are negative or repeat, or one is the batch."""
        shape = list(self.operands[0].type.shape)
        if len(set(self.axes)) != len(self.axes) or min(self.axes, default=0) < 0:
            raise QirError(f"axes {list(self.axes)} are not different axes counted from the front")
        if not len(self.starts) == len(self.ends) == len(self.axes) == len(self.steps) or 0 in self.steps:
            raise QirError("starts, ends, axes and steps are equally long and no step is 0")
        for start, end, axis, step in zip(self.starts, self.ends, self.axes, self.steps, strict=True):
            size = known_dim(shape[normalize_axis(axis, len(shape))], "the axis of a slice")
            taken = range(start, end, step)
            if start < 0 or end < (0 if step > 0 else -1) or (taken and max(taken[0], taken[-1]) >= size):
                raise QirError(f"[{start}:{end}:{step}] is outside axis {axis} of size {size}")
            shape[axis] = len(taken)
        return (tuple(shape),)

    def bounds(self, operands: Sequence[Bounds]) -> OpBounds:
        """Channel bounds are sliced with the last axis."""
        bounds, rank = operands[0], self.operands[0].type.rank
        for start, end, axis, step in zip(self.starts, self.ends, self.axes, self.steps, strict=True):
            if axis == rank - 1 and bounds.channels is not None:
                keep = list(range(start, end, step))
                bounds = bounds.map(operator.itemgetter(keep))
        return OpBounds((bounds,))

    def affine(self, operands: Sequence[Form | None], bounds: Sequence[Bounds]) -> Form | None:
        """Some of the channels."""
        form, last = operands[0], self.operands[0].type.rank - 1
        if form is None or not form.has_last_channels or self.axes != (last,):
            return None
        return form.rows(range(self.starts[0], self.ends[0], self.steps[0]))

    def move(self, *arrays: Tensor) -> Tensor:
        """NumPy's basic slicing."""
        index: list[slice] = [slice(None)] * arrays[0].ndim
        for start, end, axis, step in zip(self.starts, self.ends, self.axes, self.steps, strict=True):
            index[axis] = slice(start, None if end < 0 else end, step)
        return np.asarray(arrays[0][tuple(index)], order="C")


class FixedSlice(Slice):
    """`Slice` on integers."""

    mnemonic = "slice"
    stages = FIXED_ONLY


@dataclass(frozen=True, eq=False, kw_only=True)
class Gather(Movement):
    """Elements along an axis at constant, non-negative indices, whose shape takes the place of the axis."""

    mnemonic = "Gather"
    stages = FLOAT_STAGES
    indices: Array
    axis: int

    def infer(self) -> tuple[Shape, ...]:
        """The gathered shape. Raises QirError for an index outside the axis or a bad axis."""
        shape = self.operands[0].type.shape
        if self.axis < 0 or self.indices.data.dtype.kind not in "iu":
            raise QirError("the axis counts from the front and indices are integers")
        size = known_dim(shape[normalize_axis(self.axis, len(shape))], "the axis of a gather")
        data = self.indices.data
        if data.size and not 0 <= int(data.min()) <= int(data.max()) < size:
            raise QirError(f"indices span [{data.min()}, {data.max()}], the axis has {size} elements")
        return ((*shape[: self.axis], *self.indices.shape, *shape[self.axis + 1 :]),)

    def bounds(self, operands: Sequence[Bounds]) -> OpBounds:
        """Channel bounds survive behind the axis and are gathered on it."""
        bounds, last = operands[0], self.operands[0].type.rank - 1
        if bounds.channels is None or self.axis < last:
            return OpBounds((bounds,))
        if self.indices.data.ndim != 1:
            return OpBounds((bounds.flat(),))
        return OpBounds((bounds.map(operator.itemgetter(self.indices.data)),))

    def affine(self, operands: Sequence[Form | None], bounds: Sequence[Bounds]) -> Form | None:
        """Some of the channels."""
        form, last = operands[0], self.operands[0].type.rank - 1
        if form is None or not form.has_last_channels or self.axis != last or self.indices.data.ndim != 1:
            return None
        return form.rows(self.indices.data)

    def move(self, *arrays: Tensor) -> Tensor:
        """NumPy's take."""
        return np.take(arrays[0], self.indices.data, axis=self.axis)


class FixedGather(Gather):
    """`Gather` on integers."""

    mnemonic = "gather"
    stages = FIXED_ONLY


@dataclass(frozen=True, eq=False, kw_only=True)
class _Padding(Movement):
    pads: tuple[int, ...]  # ONNX order: all begins, then all ends

    def infer(self) -> tuple[Shape, ...]:
        """The padded shape. Raises QirError when the pads do not fit, are negative or touch the batch."""
        shape = self.operands[0].type.shape
        rank = len(shape)
        if len(self.pads) != 2 * rank or any(p < 0 for p in self.pads):
            raise QirError(f"a tensor of rank {rank} takes {2 * rank} pads of at least 0")
        if rank and shape[0] == BATCH and (self.pads[0] or self.pads[rank]):
            raise QirError("the open batch N cannot be padded")
        return (
            tuple(d if isinstance(d, str) else d + self.pads[i] + self.pads[rank + i] for i, d in enumerate(shape)),
        )

    def _pad(self, array: Tensor, fill: Any) -> Tensor:
        rank = array.ndim
        widths = [(self.pads[i], self.pads[rank + i]) for i in range(rank)]
        return np.pad(array, widths, constant_values=fill) if rank else array


@dataclass(frozen=True, eq=False, kw_only=True)
class Pad(_Padding):
    """Constant padding with a real value."""

    mnemonic = "Pad"
    stages = FLOAT_STAGES
    value: float = 0.0

    def real_range(self, operands: Sequence[Interval]) -> tuple[Interval, ...]:
        """The operand and the value."""
        return (operands[0].hull(Interval(self.value, self.value)),)

    def move(self, *arrays: Tensor) -> Tensor:
        """NumPy's pad."""
        return self._pad(arrays[0], self.value)


@dataclass(frozen=True, eq=False, kw_only=True)
class FixedPad(_Padding):
    """Constant padding with an integer; the zero point stands for the real 0."""

    mnemonic = "pad"
    stages = FIXED_ONLY
    value: int

    def check(self) -> Iterator[str]:
        """The value lies in the storage bounds."""
        yield from super().check()
        storage = storage_of(self.result.type.element)
        if storage is None or not storage.lo <= self.value <= storage.hi:
            yield f"the pad value {self.value} is outside the result's storage bounds"

    def bounds(self, operands: Sequence[Bounds]) -> OpBounds:
        """The operand and the value."""
        if not any(self.pads):
            return OpBounds((operands[0],))
        rank = self.operands[0].type.rank
        if self.pads[rank - 1] or self.pads[2 * rank - 1]:
            return OpBounds((hull_of([operands[0], Bounds.of(self.value, self.value)]),))
        return OpBounds((operands[0].union(Bounds.of(self.value, self.value)),))

    def move(self, *arrays: Tensor) -> Tensor:
        """NumPy's pad."""
        return self._pad(arrays[0], self.value)
