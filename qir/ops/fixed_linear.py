"""Integer convolution, matrix product and sum. Layout NHWC; the results are accumulators, not yet requantized."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qir.affine import Form
from qir.errors import QirError
from qir.interval import Bounds, Interval, exact
from qir.ir import OpBounds
from qir.opdef import Window, broadcast_shapes, known_dim, normalize_axis, pad_spatial, window_view
from qir.ops.accumulate import Accumulating, Chains, Kernel, bits_of, centered, centre, term_bounds
from qir.types import BATCH, Dim, Shape, shape_text

Tensor = npt.NDArray[Any]

#: Weights with the zeros between groups that an affine form may take.
_MOST_DENSE_WEIGHTS: Final = 1 << 20


@dataclass(frozen=True, eq=False, kw_only=True)
class Conv2d(Accumulating):
    """2-d convolution: `sum((x - zx) * (w - zw)) + bias` over input NHWC and weights [O, kh, kw, C / groups].

    Padding stands for the real 0, so that it adds nothing. A depthwise convolution has as many groups as channels.
    """

    mnemonic = "conv2d"
    operand_names = ("input", "weight", "bias?")
    pads: tuple[int, ...]  # top, left, bottom, right
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    groups: int

    @property
    def window(self) -> Window:
        """The sliding window."""
        kernel = tuple(known_dim(d, "a kernel dimension") for d in self.operands[1].type.shape[1:3])
        return Window(kernel, self.strides, self.pads, self.dilations)

    def infer(self) -> tuple[Shape, ...]:
        """[N, Ho, Wo, O]. Raises QirError when shapes, groups or window do not fit."""
        x, w = self.operands[0].type.shape, self.operands[1].type.shape
        if len(x) != 4 or len(w) != 4:
            raise QirError("conv2d takes an NHWC input and weights [O, kh, kw, C / groups]")
        channels, outputs = known_dim(x[3], "the channel dimension"), known_dim(w[0], "the output channels")
        if self.groups < 1 or channels != known_dim(w[3], "the channels") * self.groups or outputs % self.groups:
            raise QirError(f"{self.groups} groups do not fit {channels} input channels and weights {w}")
        bias = self.optional_operand(2)
        if bias is not None and bias.type.shape != (outputs,):
            raise QirError(f"the bias must have one value for each of the {outputs} output channels")
        return ((x[0], *self.window.output(x[1:3]), outputs),)

    def macs(self) -> int:
        """Output elements times kernel elements."""
        w = self.operands[1].type
        return self.result.type.sample_size * (w.sample_size // max(int(w.shape[0]), 1))

    def intermediate_bits(self) -> int:
        """Bits of the longest exact sum."""
        x, w = (v.type for v in self.operands[:2])
        return self.sum_bits(bits_of(x) + bits_of(w), w.sample_size // max(int(w.shape[0]), 1))

    def eval_int(self, x: Tensor, w: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        """The definition of the op."""
        window, groups = self.window, self.groups
        outputs = window.output(x.shape[1:3])
        padded = pad_spatial(centre(x, self.operands[0].type), window, x.shape[1:3], outputs, 1, 0)
        view = window_view(padded, window, outputs, 1)  # [N, Ho, Wo, C, kh, kw]
        weights = centre(w, self.operands[1].type).reshape(groups, w.shape[0] // groups, *w.shape[1:])
        pixels = view.shape[:3]

        def products() -> Iterator[Tensor]:
            split = w.shape[3] if self.order.channels_outside and self.is_productwise else 1
            for part in np.array_split(np.arange(w.shape[3]), split) if split else ():
                for i, j in np.ndindex(*window.kernel):
                    tap = view[..., i, j].reshape(*pixels, groups, 1, w.shape[3])[..., part]
                    yield from self.contract(tap, weights[:, :, i, j, part], (*pixels, w.shape[0]))

        return (self.accumulate(products(), np.zeros((*pixels, w.shape[0]), x.dtype), bias),)

    def kernel(self, bounds: Sequence[Bounds]) -> Kernel | None:
        """The weights of each tap, of all groups side by side."""
        weights = centered(self.operands[1].type, bounds[1]).data
        if weights is None or weights.dtype == object or not weights.size:
            return None
        count, per_group = weights.shape[0], weights.shape[3]
        if weights.size * self.groups > _MOST_DENSE_WEIGHTS:
            return None
        window, (_, *spatial, _) = self.window, self.operands[0].type.shape
        grid = tuple(int(d) for d in self.result.type.shape[1:3])
        own = (np.arange(count) // (count // self.groups))[:, None] * per_group + np.arange(per_group)
        taps = {}
        for place in np.ndindex(*window.kernel):
            dense = np.zeros((count, self.groups * per_group), np.int64)
            np.put_along_axis(dense, own, weights[:, place[0], place[1]], axis=1)
            offset = (i * d - window.pad(a)[0] for a, (i, d) in enumerate(zip(place, self.dilations, strict=True)))
            taps[tuple(offset)] = dense
        inside = (window.taps(a, int(spatial[a]), grid[a]).all() for a in range(2))
        return Kernel(taps, self.strides, grid, is_padded=not all(inside))

    def bounds(self, operands: Sequence[Bounds]) -> OpBounds | None:
        """Per output channel, position by position where padding cuts taps off."""
        w = self.operands[1].type.shape
        count, per_group = known_dim(w[0], "the output channels"), known_dim(w[3], "the input channels")
        if not count:
            return OpBounds((Bounds.of(0, 0),), Interval(0, 0), Interval(0, 0))
        x = centered(self.operands[0].type, operands[0])
        if x.channels is not None:  # the channels that each output reads: [O, 1, 1, C / groups]
            own = np.repeat(np.arange(self.groups), count // self.groups)
            x = x.map(lambda e: e.reshape(self.groups, per_group)[own][:, None, None, :])
        terms = term_bounds(x, centered(self.operands[1].type, operands[1]))
        taps, kind = math.prod(self.window.kernel), self.operands[1].type
        terms = terms.map(lambda e: np.broadcast_to(e, kind.concrete(0)).reshape(count, taps, per_group))
        window, shape = self.window, self.operands[0].type.shape
        spatial = [known_dim(d, "a spatial dimension") for d in shape[1:3]]
        outputs = window.output(spatial)
        rows, columns = (np.unique(window.taps(a, spatial[a], outputs[a]), axis=0) for a in range(2))
        valid = (rows[:, None, :, None] & columns[None, :, None, :]).reshape(len(rows) * len(columns), -1)
        return self.chain_bounds(terms, valid, operands[2] if len(operands) > 2 else None)

    def chains(self, channel: int, operands: Sequence[Bounds]) -> Chains:
        """One for each pattern of taps that padding cuts off."""
        height, width, channels = size = self.operands[0].type.concrete(1)[1:]
        count, *kernel, per_group = self.operands[1].type.concrete(0)
        window, outputs = self.window, self.window.output(size[:2])
        first = [np.unique(window.taps(a, size[a], outputs[a]), axis=0, return_index=True)[1] for a in range(2)]
        starts = np.stack(np.meshgrid(*first, indexing="ij"), axis=-1).reshape(-1, 2, 1)
        taps = np.indices((*kernel, per_group))
        if self.order.channels_outside:
            taps = taps.transpose(0, 3, 1, 2)
        row, column, place = taps.reshape(3, -1)
        y = starts[:, 0] * self.strides[0] + row * self.dilations[0] - self.pads[0]
        x = starts[:, 1] * self.strides[1] + column * self.dilations[1] - self.pads[1]
        valid = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        left = (y * width + x) * channels + channel // (count // self.groups) * per_group + place
        right = ((channel * kernel[0] + row) * kernel[1] + column) * per_group + place
        positions = tuple((0, int(i), int(j), channel) for i, j in starts[..., 0])
        return Chains(positions, np.where(valid, left, 0), np.broadcast_to(right, left.shape), valid)


@dataclass(frozen=True, eq=False, kw_only=True)
class FixedMatMul(Accumulating):
    """Matrix product `sum((a - za) * (b - zb)) + bias` of a [..., M, K] and b [..., K, N]; the bias is [N].

    The leading dimensions broadcast. A fully connected layer is this op with constant b.
    """

    mnemonic = "matmul"
    operand_names = ("a", "b", "bias?")

    def infer(self) -> tuple[Shape, ...]:
        """[..., M, N]. Raises QirError when the shapes do not fit."""
        a, b = (v.type.shape for v in self.operands[:2])
        if len(a) < 2 or len(b) < 2 or a[-1] != b[-2]:
            raise QirError(f"shapes {shape_text(a)} and {shape_text(b)} do not multiply")
        known_dim(a[-1], "the summed dimension"), known_dim(b[-1], "the output dimension")
        bias = self.optional_operand(2)
        if bias is not None and bias.type.shape != (b[-1],):
            raise QirError(f"the bias must have one value for each of the {b[-1]} outputs")
        if len(a) == 2:
            return ((*b[:-2], a[0], b[-1]),) if len(b) > 2 else ((a[0], b[-1]),)
        return ((*broadcast_shapes([a[:-2], b[:-2]]), a[-2], b[-1]),)

    def macs(self) -> int:
        """Output elements times summed length."""
        return self.result.type.sample_size * int(self.operands[0].type.shape[-1])

    def intermediate_bits(self) -> int:
        """Bits of the longest exact sum."""
        a, b = (v.type for v in self.operands[:2])
        return self.sum_bits(bits_of(a) + bits_of(b), int(a.shape[-1]))

    def eval_int(self, a: Tensor, b: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        """The definition of the op."""
        left, right = centre(a, self.operands[0].type), centre(b, self.operands[1].type)
        shape = (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])

        def products() -> Iterator[Tensor]:
            if not self.is_productwise:
                yield self.entering(left @ right)
            else:
                for k in range(a.shape[-1]):
                    yield self.entering(left[..., :, k : k + 1] * right[..., k : k + 1, :])

        return (self.accumulate(products(), np.zeros(shape, a.dtype), bias),)

    def kernel(self, bounds: Sequence[Bounds]) -> Kernel | None:
        """The weights of the row that an output is made from."""
        weights = centered(self.operands[1].type, bounds[1]).data
        grid = tuple(int(d) for d in self.result.type.shape[1:-1])
        if weights is None or weights.dtype == object or weights.ndim != 2 or not weights.size:
            return None
        return Kernel({(0,) * len(grid): np.ascontiguousarray(weights.T)}, (1,) * len(grid), grid)

    def affine(self, operands: Sequence[Form | None], bounds: Sequence[Bounds]) -> Form | None:
        """The product, or a sum times a weight where rows are no channels but all weights are the same: a mean."""
        x, kernel = operands[0], self.kernel(bounds)
        if x is None or kernel is None or x.has_last_channels:
            return super().affine(operands, bounds)
        (weights,) = kernel.taps.values()
        if len(bounds) > 2 or weights.size != weights.shape[1] or np.ptp(weights):
            return None
        form = x.summed((self.operands[0].type.rank - 1,), keepdims=True)
        if form is None:
            return None
        weight = exact(np.full(form.channels, weights[0, 0]))
        product = form.times(weight, weight, weight * 0)
        return self.entered(product, weights.size)

    def bounds(self, operands: Sequence[Bounds]) -> OpBounds | None:
        """Per output: from the very elements of b where it is constant and shared by the batch."""
        length = int(self.operands[0].type.shape[-1])
        count = int(self.operands[1].type.shape[-1])
        if not count:
            return OpBounds((Bounds.of(0, 0),), Interval(0, 0), Interval(0, 0))
        a = centered(self.operands[0].type, operands[0])
        b = centered(self.operands[1].type, operands[1])
        if b.data is not None and b.data.ndim == 2:
            terms = term_bounds(a, Bounds(b.lo, b.hi, b.data.T))
        else:
            terms = term_bounds(a, b.map(lambda e: e[..., None]))
        terms = terms.map(lambda e: np.broadcast_to(e, (count, length)).reshape(count, 1, length))
        return self.chain_bounds(terms, np.ones((1, 1), bool), operands[2] if len(operands) > 2 else None)

    def chains(self, channel: int, operands: Sequence[Bounds]) -> Chains:
        """The first row, for all are alike; every row where constants make them differ."""
        (*lead, rows, _), length = self.result.type.concrete(1), int(self.operands[0].type.shape[-1])
        a, b = (np.arange(math.prod(s)).reshape(s) for s in (v.type.concrete(1) for v in self.operands[:2]))
        differ = operands[0].data is not None or (operands[1].data is not None and b.ndim > 2)
        positions = tuple((*at, channel) for at in np.ndindex(*lead, rows))
        left, right = (
            np.broadcast_to(e, (*lead, rows, length)).reshape(len(positions), length)[: None if differ else 1]
            for e in (a, b[..., None, :, channel])
        )
        return Chains(positions[: len(left)], left, right, np.ones(left.shape, bool))


@dataclass(frozen=True, eq=False, kw_only=True)
class ReduceSum(Accumulating):
    """The sum of `x - zx` over `axes`; the reduced dimensions stay as 1 where `keepdims`."""

    mnemonic = "reduce_sum"
    axes: tuple[int, ...]
    keepdims: bool

    def infer(self) -> tuple[Shape, ...]:
        """The reduced shape. Raises QirError when an axis is the batch, negative, too large or repeated."""
        shape = self.operands[0].type.shape
        if len(set(self.axes)) != len(self.axes) or min(self.axes, default=0) < 0:
            raise QirError(f"axes {list(self.axes)} are not different axes counted from the front")
        for axis in self.axes:
            known_dim(shape[normalize_axis(axis, len(shape))], "a reduced axis")
        kept: list[Dim] = [
            1 if i in self.axes else d for i, d in enumerate(shape) if self.keepdims or i not in self.axes
        ]
        return (tuple(kept),)

    @property
    def count(self) -> int:
        """Elements in each sum."""
        shape = self.operands[0].type.shape
        return math.prod(int(shape[a]) for a in self.axes)

    def intermediate_bits(self) -> int:
        """Bits of the longest exact sum."""
        return self.sum_bits(bits_of(self.operands[0].type), self.count)

    def eval_int(self, x: Tensor) -> tuple[Tensor, ...]:
        """The definition of the op."""
        values = np.moveaxis(centre(x, self.operands[0].type), self.axes, range(len(self.axes)))
        chain = values.reshape(self.count, *values.shape[len(self.axes) :])
        terms = (self.entering(term) for term in chain)
        summed = self.accumulate(terms, np.zeros(chain.shape[1:], x.dtype), None)
        shape = self.infer()[0]
        return (summed.reshape(tuple(len(x) if d == BATCH else int(d) for d in shape)),)

    def affine(self, operands: Sequence[Form | None], bounds: Sequence[Bounds]) -> Form | None:
        """The sum along the axes."""
        x = operands[0]
        if x is None or 0 in self.axes:
            return None
        return self.entered(x.summed(self.axes, self.keepdims), self.count)

    def bounds(self, operands: Sequence[Bounds]) -> OpBounds:
        """`count` times the bounds of an element."""
        x = centered(self.operands[0].type, operands[0])
        if self.operands[0].type.rank - 1 in self.axes:
            x = x.flat()
        if not x.lo.size:
            return OpBounds((Bounds.of(0, 0),), Interval(0, 0), Interval(0, 0))
        one = Bounds.of([1], 1)
        terms = term_bounds(x, Bounds(one.lo, one.hi, np.ones(1, np.int64)))
        shape = (np.size(terms.lo), self.count, 1)
        terms = terms.map(lambda e: np.broadcast_to(np.reshape(e, (-1, 1, 1)), shape))
        found = self.chain_bounds(terms, np.ones((1, self.count), bool), None)
        return found if x.channels is not None else replace(found, results=(found.results[0].flat(),))

    def chains(self, channel: int, operands: Sequence[Bounds]) -> Chains:
        """One, for all are alike."""
        shape = self.operands[0].type.concrete(1)
        places = np.moveaxis(np.arange(math.prod(shape)).reshape(shape), self.axes, range(len(self.axes)))
        kept = [channel if axis == len(shape) - 1 else 0 for axis in range(len(shape)) if axis not in self.axes]
        left = places[(slice(None),) * len(self.axes) + tuple(kept)].reshape(1, -1)
        position = list(kept)
        for axis in sorted(self.axes) if self.keepdims else ():
            position.insert(axis, 0)
        return Chains((tuple(position),), left, None, np.ones(left.shape, bool))
