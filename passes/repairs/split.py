"""Split: cut a reduction into parts that fit the accumulator, and add the parts in a type that holds the sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from qir.fixed_point import Overflow, Rounding
from qir.interval import bits_of_interval
from qir.ir import Op, Value
from qir.ops.accumulate import Accumulating
from qir.ops.fixed_elementwise import FixedAdd
from qir.ops.fixed_linear import Conv2d, FixedMatMul, ReduceSum
from qir.ops.movement import FixedSlice
from qir.passes.repairs.replacement import Replacement, Site, constant, has_zero, prove_ops
from qir.types import IntegerType, TensorType, integer, zero_array

#: Roundings that give the same for a sum whose whole part has been taken off: steps round alike from any start.
_FROM_ANY_START: Final = frozenset({Rounding.FLOOR, Rounding.HALF_UP, Rounding.HALF_DOWN})
#: A layer in more parts than this is better given a wider accumulator, or fewer bits.
_MOST_PARTS: Final = 64
_WIDTHS: Final = (16, 32, 64)

#: Where a part of a reduction starts and stops along each of its axes, outermost first.
Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Reduction:
    """The axes along which an op sums, as sizes, and the ops that sum one box of them; the last is the sum."""

    sizes: tuple[int, ...]
    part: Callable[[Box, bool, str], list[Op]]


def split(site: Site) -> Replacement | None:
    """As few parts as fit one after another, summed exactly; None where a single product does not fit, say.

    The bias goes with the first part, or is added at the end, whichever takes fewer additions.
    """
    op = site.op
    reduction = _reduction(site)
    if reduction is None or (op.dropped_bits and op.rounding not in _FROM_ANY_START):
        return None
    bias = op.optional_operand(2)
    ways = [True] if bias is None or zero_array(bias.type.element).any() else [True, False]
    cutters = [cutter for way in ways if (cutter := _Cutter(site, reduction, way)).cut() and cutter.parts]
    if not cutters:
        return None
    best = min(cutters, key=lambda c: len(c.parts) - c.with_bias)
    terms = [ops[-1].result for ops in best.parts]
    if bias is not None and not best.with_bias:
        terms.append(bias)
    ops = [op for part in best.parts for op in part]
    sums = _added(site, ops, terms)
    if not sums:
        return None
    macs = sum(o.macs() for o in ops) - op.macs()
    plural = "s" if len(sums) > 1 else ""
    kind = sums[-1].result.type.element
    cost = f"{len(sums)} addition{plural} in {kind} and {macs:,} more multiply-accumulates"
    return Replacement((*ops, *sums), f"its sum was cut into {len(best.parts)}, at {cost}")


class _Cutter:
    """Cuts a reduction greedily; the first part takes the bias where so asked."""

    def __init__(self, site: Site, reduction: _Reduction, with_bias: bool) -> None:
        self.site = site
        self.reduction = reduction
        self.with_bias = with_bias
        self.known = dict(zip(site.op.operands, site.bounds, strict=True))
        self.parts: list[list[Op]] = []

    def cut(self, outer: Box = ()) -> bool:
        """Cut the axes behind these ranges; False where some product does not fit, or there are too many parts."""
        size = self.reduction.sizes[len(outer)]
        start = 0
        while start < size:
            stop = self._furthest(outer, start, size)
            if stop > start:
                self.parts.append(self._part(outer, start, stop))
            elif len(outer) + 1 == len(self.reduction.sizes) or not self.cut((*outer, (start, start + 1))):
                return False
            if len(self.parts) > _MOST_PARTS:
                return False
            start = max(stop, start + 1)
        return True

    def _part(self, outer: Box, start: int, stop: int) -> list[Op]:
        behind = tuple((0, size) for size in self.reduction.sizes[len(outer) + 1 :])
        name = f"{self.site.op.result.name}.part{len(self.parts)}"
        return self.reduction.part((*outer, (start, stop), *behind), self.with_bias and not self.parts, name)

    def _fits(self, outer: Box, start: int, stop: int) -> bool:
        *before, total = self._part(outer, start, stop)
        # Partial sums that all fit are those of any mode, and a sum that wraps is the cheapest to bound.
        trial = total.with_changes(overflow=Overflow.WRAP)
        _, steps = prove_ops([*before, trial], self.known)
        partial = steps[trial].unsaturated
        return partial is not None and self.site.room.contains(partial)

    def _furthest(self, outer: Box, start: int, size: int) -> int:
        """The furthest end found, by doubling and then bisection, that fits; `start` where not even one unit does."""
        best, step, limit = start, 1, size + 1
        while best < size and limit > size:
            end = min(best + step, size)
            if self._fits(outer, start, end):
                best, step = end, 2 * step
            else:
                limit = end
        while limit - best > 1 and best < size:
            middle = (best + limit) // 2
            if self._fits(outer, start, middle):
                best = middle
            else:
                limit = middle
        return best


def _added(site: Site, ops: Sequence[Op], terms: Sequence[Value]) -> list[Op] | None:
    """Additions of the terms, one after another, in the narrowest of the chip's registers that holds them all."""
    known, _ = prove_ops(ops, dict(zip(site.op.operands, site.bounds, strict=True)))
    sums = _chain(site, terms, integer(_WIDTHS[-1]))
    _, steps = prove_ops(sums, known)
    needed = max((bits_of_interval(s.unsaturated) for s in steps.values() if s.unsaturated is not None), default=0)
    widths = sorted({site.op.accumulator.bits, *site.target.accumulator.wider, *_WIDTHS})
    bits = next((b for b in widths if needed <= b), None)
    return None if bits is None else _chain(site, terms, integer(bits))


def _chain(site: Site, terms: Sequence[Value], kind: IntegerType) -> list[Op]:
    ops: list[Op] = []
    total = terms[0]
    for place, term in enumerate(terms[1:]):
        result = Value(f"{site.op.result.name}.sum{place}", site.op.result.type.with_element(kind))
        ops.append(FixedAdd(operands=(total, term), results=(result,), overflow=Overflow.SATURATE))
        total = result
    return ops


def _reduction(site: Site) -> _Reduction | None:
    """How the op's sum can be cut; None for operands that no slice or mask can follow."""
    op = site.op
    if isinstance(op, Conv2d):
        return _of_conv(site, op)
    if isinstance(op, FixedMatMul):
        return _of_matmul(site, op)
    return _of_sum(site, op) if isinstance(op, ReduceSum) else None


def _of_conv(site: Site, op: Conv2d) -> _Reduction | None:
    """Input channels, by slices where every output reads them all, then taps; weights outside of a part become 0."""
    x, weight, *bias = op.operands
    array = site.constant(1)
    if array is None or not has_zero(weight):
        return None
    _, rows, columns, channels = array.shape
    slices = op.groups == 1 and _axis(x) != 3 and _axis(weight) != 3
    zeros = zero_array(weight.type.element).astype(array.data.dtype)
    zeros = zeros.reshape([-1 if i == _axis(weight) else 1 for i in range(4)])

    def part(box: Box, with_bias: bool, name: str) -> list[Op]:
        (first, last), (start, stop) = box
        inside = np.zeros((rows * columns, channels), bool)
        inside[start:stop, first:last] = True
        data = np.where(inside.reshape(rows, columns, channels), array.data, zeros)
        before = []
        if slices:
            data = data[..., first:last]
            before = _sliced(x, {3: (first, last)}, f"{name}.input")
        kernel = constant(data, weight, f"{name}.weight")
        source = before[-1].result if before else x
        return [*before, kernel, _sum_of(op, [source, kernel.result, *bias[:with_bias]], name)]

    return _Reduction((channels, rows * columns), part)


def _of_matmul(site: Site, op: FixedMatMul) -> _Reduction | None:
    """The summed axis, by slices of both operands."""
    left, right, *bias = op.operands
    axes = left.type.rank - 1, right.type.rank - 2
    if _axis(left) == axes[0] or _axis(right) == axes[1]:
        return None
    array = site.constant(1)

    def part(box: Box, with_bias: bool, name: str) -> list[Op]:
        ops: list[Op] = []
        operands = [left, right]
        for place, axis in enumerate(axes):
            hint = f"{name}.{op.operand_names[place]}"
            if place and array is not None:
                cut: list[Op] = [constant(array.data[..., slice(*box[0]), :], right, hint)]
            else:
                cut = _sliced(operands[place], {axis: box[0]}, hint)
            if cut:
                operands[place] = cut[-1].result
            ops += cut
        return [*ops, _sum_of(op, [*operands, *bias[:with_bias]], name)]

    return _Reduction((int(left.type.shape[-1]),), part)


def _of_sum(site: Site, op: ReduceSum) -> _Reduction | None:
    """The reduced axes in their order, by slices."""
    (x,) = op.operands
    if _axis(x) in op.axes:
        return None

    def part(box: Box, with_bias: bool, name: str) -> list[Op]:
        before = _sliced(x, dict(zip(op.axes, box, strict=True)), f"{name}.input")
        return [*before, _sum_of(op, [before[-1].result if before else x], name)]

    return _Reduction(tuple(int(x.type.shape[a]) for a in op.axes), part)


def _sum_of(op: Accumulating, operands: Sequence[Value], name: str) -> Op:
    """The op on other operands."""
    result = Value(name, op.result.type)
    return op.with_changes(operands=tuple(operands), results=(result,), partial=None, channel_bits=None)


def _sliced(value: Value, ranges: Mapping[int, tuple[int, int]], name: str) -> list[Op]:
    """The slice of a value along axes; none where it is the whole."""
    cut = {a: r for a, r in ranges.items() if r != (0, value.type.shape[a])}
    if not cut:
        return []
    shape = [cut[i][1] - cut[i][0] if i in cut else d for i, d in enumerate(value.type.shape)]
    result = Value(name, TensorType(tuple(shape), value.type.element))
    starts, ends = (tuple(r[end] for r in cut.values()) for end in (0, 1))
    return [
        FixedSlice(
            operands=(value,), results=(result,), starts=starts, ends=ends, axes=tuple(cut), steps=(1,) * len(cut)
        )
    ]


def _axis(value: Value) -> int | None:
    """The axis along which the scale of a value runs."""
    axis: int | None = getattr(value.type.element, "axis", None)
    return axis
