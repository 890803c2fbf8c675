"""The rule `affine` of the checker: an element as a linear function of elements of other values, followed backward.

A functional is a weight for every element of one sample; weights are exact integers in units of 2**-scale. Backward
through an op that is linear but for rounding and clamps, weights of its result become weights of its operands and
errors, until values remain that the certificate names as inputs of the rule, or that are not linear in others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from qir.checker.arithmetic import kept_ends
from qir.checker.claims import Image, Span, between, hull
from qir.checker.functionals import Functionals, Known, TooMany, cuts_of, factor_order, is_clipped, zero_ends
from qir.checker.sums import constant_weights
from qir.ir import Op
from qir.types import storage_of, zero_array

#: Weights that may be made for one claim, and that count at least each time.
_MOST_WORK, _LEAST_WORK = 1 << 31, 1 << 15
#: Elements whose functionals are followed at a time.
_MOST_PLACES = 512


def tightened(known: Known, op: Any, plain: Image, stops: Collection[str]) -> Image:
    """What follows of an op by its own rule, cut down to what linear functions of the stops allow."""
    (result, lanes), value = plain, op.results[0]
    if result is None or not value.type.sample_size or not value.type.shape:
        return plain
    known.lanes[value] = lanes
    if "partial" in lanes:
        if constant_weights(known.graph, op) is not None and _keeps_products(op, lanes):
            partial = _met(lanes["partial"], _partials(known, op, stops))
            lanes = known.lanes[value] = lanes | {"partial": partial}
        return _met(result, _elements(known, op, stops) if _is_linear(known, op) else None), lanes
    if op.mnemonic in ("requantize", "add", "sub", "mul") and "unsaturated" in lanes:
        storage = storage_of(value.type.element)
        known.free[value] = free = _met(lanes["unsaturated"], _elements(known, op, stops))
        cuts = cuts_of(known, op)
        if cuts is not None:
            least, most = kept_ends(storage, op.overflow)
            result = _met(result, [(min(max(r[0], least), most), min(max(r[-1], least), most)) for r in free])
        return result, lanes | {"unsaturated": free}
    return _met(result, _elements(known, op, stops) if _is_linear(known, op) else None), lanes


def _met(span: Span, ends: Sequence[tuple[int, int]] | None) -> Span:
    """The part of each channel's range that lies between two ends."""
    found = []
    for channel, (lo, hi) in enumerate(ends or ()):
        r = span[channel % len(span)]
        first = r[0] + max(-(-(lo - r[0]) // r.step), 0) * r.step
        found.append(between(first, min(hi, r[-1]), r.step))
    return found if found and all(found) else span


def _elements(known: Known, op: Any, stops: Collection[str]) -> list[tuple[int, int]] | None:
    """Ends of the exact result of each channel, from every element or from one of each kind; None: too much work."""
    value, cone = op.results[0], _cone(known, op, stops)
    if not _is_scaled(known, op):
        return None
    zeros = zero_ends(value)

    def start(functionals: Functionals, places: Any) -> None:
        units = np.eye(len(places), dtype=np.int64)
        functionals.add_ends(places, units, 0, zeros)
        functionals.expand(known, op, places, units, 0)

    return _followed(known, op, cone, [start])


def _followed(
    known: Known, op: Any, cone: Sequence[Any], starts: Iterable[Callable[[Functionals, Any], None]]
) -> list[tuple[int, int]] | None:
    """Ends over all places and ways to start from them, of each channel; fewer places at a time where weights are many.

    None for too much work.
    """
    count, places, work = op.results[0].type.concrete(1)[-1], _places(known, op, cone), 0
    lo: list[list[int]] = [[] for _ in range(count)]
    hi: list[list[int]] = [[] for _ in range(count)]
    for start in starts:
        parts = np.array_split(places, -(-len(places) // _MOST_PLACES))
        while parts:
            part = parts.pop()
            functionals, ends = Functionals(len(part)), None
            try:
                start(functionals, part)
                ends = functionals.ends(known, cone[1:])
            except TooMany:
                parts += np.array_split(part, 2)
            work += functionals.work + _LEAST_WORK
            if work > _MOST_WORK or (ends is None and len(part) == 1):
                known.skipped.add(op.results[0].name)
                return None
            for place, (low, high) in zip(part if ends else (), ends or (), strict=True):
                lo[place % count].append(low)
                hi[place % count].append(high)
    return [(min(low), max(high)) for low, high in zip(lo, hi, strict=True)]


def _cone(known: Known, op: Op, stops: Collection[str]) -> list[Any]:
    """The ops that functionals of an op's result are followed through, the last first."""
    wanted, found = set(op.results), []
    for other in reversed(known.graph.ops):
        if wanted.isdisjoint(other.results) or (other is not op and other.results[0].name in stops):
            continue
        is_single = other is not op and all(r[0] == r[-1] for r in known.spans[other.results[0]])
        if other is op or (not is_single and _is_linear(known, other)):
            found.append(other)
            wanted.update(other.operands)
    return found


def _is_linear(known: Known, op: Any) -> bool:
    """Whether the result is a linear function of the operands, but for errors that have ends."""
    lanes = known.lanes.get(op.results[0], {})
    match op.mnemonic:
        case "conv2d" | "matmul" | "reduce_sum":
            is_constant = op.mnemonic == "reduce_sum" or constant_weights(known.graph, op) is not None
            return (
                is_constant and _is_inside(lanes["partial"], op.accumulator, op.overflow) and _keeps_products(op, lanes)
            )
        case "requantize" | "add" | "sub" | "mul":
            return _is_scaled(known, op) and "unsaturated" in lanes and cuts_of(known, op) is not None
    is_moved = op.mnemonic in ("reshape", "transpose", "concat", "slice", "gather")
    # Where zero points differ along an axis, an element may be centred by another one than before it is moved.
    return is_moved and all(len({*zero_array(v.type.element).flat}) == 1 for v in (*op.operands, *op.results))


def _is_scaled(known: Known, op: Any) -> bool:
    """Whether a product or requantize is a factor times each element of an operand, before it is narrowed."""
    if op.mnemonic == "mul":
        return bool(factor_order(known.graph, op)[0].type.shape == op.results[0].type.shape)
    return op.mnemonic != "requantize" or not is_clipped(known, op)


def _is_inside(span: Span, room: Any, overflow: str) -> bool:
    (lo, hi), (least, most) = hull(span), kept_ends(room, overflow)
    return least <= lo and hi <= most


def _keeps_products(op: Any, lanes: dict[str, Span]) -> bool:
    return op.product is None or _is_inside(lanes["entering"], op.product, op.product_overflow)


def _places(known: Known, op: Any, cone: Sequence[Any]) -> Any:
    """The elements whose functionals are looked at, by channel: all, or fewer where all ops do the same everywhere.

    Then it is one of each channel, and those whose taps may lie on padding.
    """
    shape = op.results[0].type.concrete(1)
    numbers = np.arange(math.prod(shape)).reshape(shape)
    if all(op.operands[0].type.rank == len(shape) and _is_alike(known, op) for op in cone):
        margin = sum(max(op.pads) for op in cone if op.mnemonic == "conv2d")
        for axis, n in enumerate(shape[:-1]):
            kept = [0] if not axis else sorted({*range(min(margin + 1, n)), *range(max(n - margin, 0), n)})
            numbers = np.take(numbers, kept, axis)
    return np.moveaxis(numbers, -1, 0).reshape(-1)


def _is_alike(known: Known, op: Any) -> bool:
    """Whether an op does the same at every position, the border of a convolution apart."""
    last = op.operands[0].type.rank - 1
    match op.mnemonic:
        case "add" | "sub":
            varying = [v for v in op.operands if v not in known.graph.constants]
            grids = [v.type.shape[1:-1] for v in varying]
            return all(v.type.rank == last + 1 for v in varying) and all(
                g == op.results[0].type.shape[1:-1] or set(g) <= {1} for g in grids
            )
        case "conv2d":
            return bool(set(op.strides) == {1})
        case "reduce_sum":
            return bool(op.keepdims) and sorted(op.axes) == list(range(1, last))
        case "concat" | "gather":
            return bool(op.axis == last)
        case "slice":
            return bool(op.axes == (last,))
    return op.mnemonic in ("requantize", "matmul")


def _partials(known: Known, op: Any, stops: Collection[str]) -> list[tuple[int, int]] | None:
    """Ends of every partial sum of each output; None for too much work."""
    is_conv, factors = op.mnemonic == "conv2d", constant_weights(known.graph, op)
    is_first, partial = "bias" in op.order, np.zeros_like(factors)
    steps = list(np.ndindex(*factors.shape[1:] if is_conv else factors.shape[:1]))
    if "ckhw" in op.order:
        steps.sort(key=lambda step: step[-1])

    def starts() -> Iterator[Callable[[Functionals, Any], None]]:
        for number, step in enumerate(steps, 1):
            at = (slice(None), *step) if is_conv else step
            partial[at] = factors[at]
            for bias in {is_first, is_first or number == len(steps)}:  # the last sum before and after the bias comes in

                def start(functionals: Functionals, places: Any, bias: bool = bias) -> None:
                    units = np.eye(len(places), dtype=np.int64)
                    functionals.expand(known, op, places, units, 0, partial, bias=bias)

                yield start

    found = _followed(known, op, _cone(known, op, stops), starts())
    first = known.spans[op.operands[2]] if is_first and len(op.operands) > 2 else [range(1)]
    if found is None:
        return None
    return [
        (min(lo, first[c % len(first)][0], 0), max(hi, first[c % len(first)][-1], 0))
        for c, (lo, hi) in enumerate(found)
    ]
