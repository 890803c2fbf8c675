"""Inputs of one layer that drive its sums to the ends of what is proved: beyond an accumulator that is too narrow.

The signs of the centred weights say where each element of the operands has to stand. Behind the products that are asked
for, the others are 0 where the proved bounds allow it, so that the sum stays where it is and shows in the result.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from qir.arrays import Array
from qir.fixed_point import Overflow
from qir.idle import is_idle, is_product_idle, overflow_room
from qir.interval import Bounds, exact
from qir.ir import Graph, OpBounds, Stage, Value
from qir.ops.accumulate import STEPWISE, Accumulating, Chains, centre
from qir.proof import prove
from qir.rewrite import GraphBuilder, map_values
from qir.types import IntegerType, TensorType, storage_of, stored_in, zero_array

Tensor = npt.NDArray[Any]

#: Overflow modes by which a larger value can become a smaller one.
_NOT_MONOTONIC: Final = frozenset({Overflow.WRAP, Overflow.SATURATE_ZERO})


@dataclass(frozen=True, eq=False, kw_only=True)
class Reach:
    """An input of a layer, and what becomes of one of its sums.

    `feeds` are for `layer_graph`. `value` is what the sum at `position`, an index into the result, comes to behind the
    first `products` of its `length` products; where `products` is None, it is the result. `bound` is the end of what is
    proved of it. `exact` is the whole sum as if the accumulator were wide enough, and `result` what the op gives.
    """

    op: Accumulating
    feeds: Mapping[str, Tensor]
    position: tuple[int, ...]
    products: int | None
    length: int
    value: int
    bound: int
    exact: int
    result: int

    @property
    def is_attained(self) -> bool:
        """Whether the bound is attained."""
        return self.value == self.bound

    @property
    def overflows(self) -> bool:
        """Whether the value leaves what the accumulator keeps."""
        room = overflow_room(self.op)
        return room is not None and not room.lo <= self.value <= room.hi


def tightness(low: Reach, high: Reach) -> Fraction:
    """The share of a proved interval that lies between what its ends' inputs give; 1 where they attain both bounds."""
    width = high.bound - low.bound
    return Fraction(high.value - low.value, width) if width else Fraction(1)


def reach(
    op: Accumulating,
    operands: Sequence[Bounds],
    bounds: OpBounds,
    channel: int,
    *,
    high: bool,
    partial: bool = True,
) -> Reach | None:
    """The input that brings a sum of an output channel as near as is known to an end of its proved bounds.

    `operands` are the proved bounds of the operands, with `data` where they are constant. `bounds` are those of the op:
    of its partial sums or, without `partial`, of its result. Each element of the input lies within the bounds of its
    operand. Independent elements attain the bounds of sums, except where overflow is not monotonic: in results of sums
    that wrap, and in sums and products that become 0. None where there is no sum, or no rule for the op.
    """
    proved = bounds.channel_partials if partial else bounds.results[0]
    chains = op.chains(channel, operands) if 0 not in op.result.type.concrete(1) else None
    if proved is None or chains is None:
        return None
    search = _Search(op, operands, chains, channel, 1 if high else -1)
    at, column, arrays = search.best(partial)
    sums = search.given(at, arrays)
    return Reach(
        op=op,
        feeds={v.name: array for v, array in arrays.items()},
        position=chains.positions[at],
        products=int(chains.valid[at, : max(column - 1, 0)].sum()) if partial else None,
        length=int(chains.valid[at].sum()),
        value=int(sums.seen[0, column] if partial else sums.results[0]),
        bound=_of_channel(proved.hi if high else proved.lo, channel),
        exact=int(sums.exact[0]),
        result=int(sums.results[0]),
    )


def layer_graph(op: Accumulating, operands: Sequence[Bounds], target: str = "") -> Graph:
    """A graph of stage `fixed` that is this op alone, with its constants; its inputs have the names of the operands.

    They hold what is proved of the operands and no more. An overflow mode `none` that rests on more than that becomes
    one that has the same results.
    """
    builder = GraphBuilder(op.result.name, Stage.FIXED)
    made: dict[Value, Value] = {}
    for value, bounds in zip(op.operands, operands, strict=True):
        if value in made:
            continue
        if bounds.data is not None:
            made[value] = builder.constant(Array(bounds.data), value.type, value.name)
        else:
            made[value] = builder.input(value.name, _holding(value.type, bounds))
    alone = op.with_changes(
        operands=tuple(made[v] for v in op.operands),
        results=(Value(op.result.name, op.result.type),),
        partial=None,
        channel_bits=None,
    )
    builder.append(alone)
    graph = builder.finish(alone.results, [op.result.name], target=target)
    proof = prove(graph)
    step = proof.steps.get(alone)
    changes: dict[str, Any] = {"partial": step.partial if step is not None else None}
    if op.overflow is Overflow.NONE and not is_idle(alone, step):
        changes["overflow"] = _harmless(op.accumulator)
    if op.product is not None and op.product_overflow is Overflow.NONE and not is_product_idle(alone, step):
        changes["product_overflow"] = _harmless(op.product)
    return map_values(graph, lambda v: {"range": proof.interval(v)}, attributes=lambda o: changes if o is alone else {})


def _holding(kind: TensorType, bounds: Bounds) -> TensorType:
    """The type, whose storage bounds are those of the values."""
    storage, hull = storage_of(kind.element), bounds.hull
    if storage is None or not kind.sample_size:
        return kind
    return kind.with_element(stored_in(kind.element, storage.narrowed(int(hull.lo), int(hull.hi))))


def _harmless(storage: IntegerType) -> Overflow:
    """A mode that changes nothing where there is no overflow."""
    return Overflow.SATURATE if storage.is_narrowed else Overflow.WRAP


class _Sums(NamedTuple):
    """Sums along chains, one a position, and what comes of them.

    `seen` [positions, products + 3] are 0, what the sum starts from, the sum behind each product and that with the
    bias, before steps narrow them; `exact` is the last of them where no step narrows.
    """

    seen: Tensor
    exact: Tensor
    results: Tensor


@dataclass(frozen=True, eq=False)
class _Factor:
    """One factor of each product [positions, products]: which element it is, what that can be, and its zero point."""

    places: Tensor | None
    lo: Tensor
    hi: Tensor
    step: Tensor
    zero: Tensor

    @property
    def ends(self) -> list[Tensor]:
        """The values of which one makes a product extreme."""
        return [self.lo] if np.array_equal(self.lo, self.hi) else [self.lo, self.hi]

    def completing(self, product: int, other: Tensor, aside: int) -> Tensor:
        """The values that it can have nearest below those that make a product with the other centred factor."""
        wanted = product // np.where(other == 0, 1, other) + self.zero + aside
        return _on_steps(wanted, self.lo, self.hi, self.step)


@dataclass(frozen=True, eq=False)
class _Search:
    """The sums of one output channel, pushed up (`sign` 1) or down (-1)."""

    op: Accumulating
    operands: Sequence[Bounds]
    chains: Chains
    channel: int
    sign: int

    @property
    def bias(self) -> int:
        """What the bias adds at its best."""
        if len(self.op.operands) < 3:
            return 0
        return _of_channel(self.operands[2].hi if self.sign > 0 else self.operands[2].lo, self.channel)

    def best(self, partial: bool) -> tuple[int, int, dict[Value, Tensor]]:
        """Where sums are furthest, a position and a column of `_Sums.seen`, and the free operands that do it."""
        left, right = factors = self._factors(slice(None))
        pairs = list(self._candidates(left, right))
        entering = np.stack([self._entering(a - left.zero, b - right.zero, slice(None)) for a, b in pairs])
        picked = np.argmax(self.sign * entering, axis=0)[None]
        sums = self._sums(np.take_along_axis(entering, picked, axis=0)[0])
        at, column = _furthest(self.sign * (sums.seen if partial else sums.results[:, None]))
        length = picked.shape[2]
        column = column if partial else length + 2
        used = self.chains.valid[at] & (np.arange(length) < column - 1)
        arrays = {v: _neutral(v, b) for v, b in zip(self.op.operands, self.operands, strict=True) if b.data is None}
        for i, factor in enumerate(factors):
            if factor.places is not None and self.op.operands[i] in arrays:
                values = np.take_along_axis(np.stack([pair[i] for pair in pairs]), picked, axis=0)[0, at]
                arrays[self.op.operands[i]].reshape(-1)[factor.places[at, used]] = values[used]
        if len(self.op.operands) > 2 and self.op.operands[2] in arrays:
            arrays[self.op.operands[2]][self.channel] = self.bias
        return at, column, arrays

    def given(self, at: int, arrays: Mapping[Value, Tensor]) -> _Sums:
        """The sums at one position for these operands."""
        here = slice(at, at + 1)
        left, right = self._factors(here, arrays)
        return self._sums(self._entering(left.lo - left.zero, right.lo - right.zero, here))

    def _factors(self, where: slice, arrays: Mapping[Value, Tensor] | None = None) -> tuple[_Factor, _Factor]:
        """The factors of all products at some positions: as they can be, or as the arrays have them."""
        left = self._factor(0, self.chains.left[where], arrays)
        if self.chains.right is not None:
            return left, self._factor(1, self.chains.right[where], arrays)
        one = np.ones_like(left.lo)
        return left, _Factor(None, one, one, one, one * 0)

    def _factor(self, index: int, places: Tensor, arrays: Mapping[Value, Tensor] | None) -> _Factor:
        value, bounds = self.op.operands[index], self.operands[index]
        shape, element = value.type.concrete(1), value.type.element
        data = bounds.data if arrays is None else arrays.get(value, bounds.data)

        def along(axis: int, numbers: Tensor) -> Tensor:
            if numbers.size == 1:
                return np.broadcast_to(exact(numbers.reshape(())), places.shape)
            return exact(numbers[np.unravel_index(places, shape)[axis]])

        zero = along(getattr(element, "axis", None) or 0, zero_array(element))
        if data is not None:
            values = exact(data.reshape(-1)[places])
            return _Factor(places, values, values, np.ones_like(values), zero)
        lo, hi, step = (along(-1, e) for e in (bounds.lo, bounds.hi, _divisors(bounds)))
        return _Factor(places, lo, hi, step, zero)

    def _candidates(self, left: _Factor, right: _Factor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of factors of which one makes extreme what enters, or nearly so where narrowing is not monotonic."""
        yield from itertools.product(left.ends, right.ends)
        product, shift = self.op.product, self.op.shift
        if product is None or self.op.product_overflow not in _NOT_MONOTONIC:
            return
        for end, aside in itertools.product((product.lo, product.hi), (-1, 0, 1)):  # products that just fit
            whole = end >> shift if shift >= 0 else end << -shift
            yield from ((left.completing(whole, b - right.zero, aside), b) for b in right.ends)
            yield from ((a, right.completing(whole, a - left.zero, aside)) for a in left.ends)

    def _entering(self, left: Tensor, right: Tensor, where: slice) -> Tensor:
        """What the products of centred factors add [positions, products]; those on padding nothing."""
        return exact(np.where(self.chains.valid[where], self.op.entering(left * right), 0))

    def _sums(self, terms: Tensor) -> _Sums:
        """The sums of what enters."""
        room = overflow_room(self.op)
        assert room is not None
        free = kept = self._walk(terms, narrows=False)
        if self.op.is_stepwise and bool(np.any((free < room.lo) | (free > room.hi))):
            kept = self._walk(terms, narrows=True)
        return _Sums(kept if self.op.overflow in STEPWISE else free, free[:, -1], self.op.close(kept[:, -1]))

    def _walk(self, terms: Tensor, *, narrows: bool) -> Tensor:
        """The columns of `_Sums.seen`, each step narrowed or none."""
        first, last = (self.bias, 0) if self.op.order.bias_first else (0, self.bias)
        total = np.full(len(terms), first, object)
        columns = [total * 0, total]
        if narrows or self.op.dropped_bits:
            alone = self.op.with_changes(overflow=Overflow.NONE)
            for term in terms.T:
                total = alone.accumulate(iter((term,)), total, None)
                columns.append(total)
                total = self.op.close(total) if narrows else total
        else:
            columns += list(np.cumsum(terms, axis=1).T + total)
        return np.stack([*columns, (total if narrows else columns[-1]) + last], axis=1)


def _of_channel(ends: Tensor, channel: int) -> int:
    """The bound of a channel, where there is one for each."""
    return int(ends.reshape(-1)[channel if ends.size > 1 else 0])


def _furthest(scores: Tensor) -> tuple[int, int]:
    """The row and the column of a largest score; of several the one with the most products."""
    rows, columns = np.nonzero(scores == scores.max())
    last = int(np.argmax(columns))
    return int(rows[last]), int(columns[last])


def _neutral(value: Value, bounds: Bounds) -> Tensor:
    """An operand of one sample of which every element is the real 0, or of its values the one next to it."""
    kind, storage = value.type, storage_of(value.type.element)
    assert storage is not None
    zero = -centre(np.zeros((1,) * kind.rank, object), kind)
    near = _on_steps(zero, bounds.lo, bounds.hi, _divisors(bounds))
    return np.full(kind.concrete(1), near, storage.dtype)


def _divisors(bounds: Bounds) -> Tensor:
    """The steps, 1 where there is but one value."""
    return np.asarray(np.maximum(bounds.steps, 1), object)


def _on_steps(wanted: Tensor, lo: Tensor, hi: Tensor, step: Tensor) -> Tensor:
    """The greatest values of [lo, hi] on its steps that are not above the wanted ones; `lo` where there are none."""
    return np.asarray(lo + (np.clip(wanted, lo, hi) - lo) // step * step)
