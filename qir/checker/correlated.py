"""The rule `affine` of the checker: an element as a linear function of elements of other values, followed backward.

A functional is a weight for every element of one sample; weights are exact integers in units of 2**-scale. Backward
through an op that is linear but for rounding and clamps, weights of its result become weights of its operands and
errors, until values remain that the certificate names as inputs of the rule, or that are not linear in others.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from itertools import product
from typing import Any

import numpy as np

from qir.checker.arithmetic import kept_ends
from qir.checker.claims import Image, Span, between, hull
from qir.checker.functionals import Functionals, Known, cuts_of, factor_order
from qir.checker.sums import constant_weights
from qir.ir import Op
from qir.types import storage_of, zero_array

#: Weights that one claim may take, and that are held at a time.
_MOST_WEIGHTS, _CHUNK = 1 << 28, 1 << 22


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
    shape = value.type.concrete(1)
    places = _places(shape, cone)
    size = math.prod(shape) + sum(math.prod(v.type.concrete(1)) for o in cone for v in o.operands)
    if len(places) * size > _MOST_WEIGHTS or (op.mnemonic == "mul" and not _is_factor_whole(known, op)):
        return None
    ends: list[tuple[int, int]] = []
    for first in range(0, len(places), max(_CHUNK // size, 1)):
        units = _units(shape, places[first : first + max(_CHUNK // size, 1)])
        functionals = Functionals(len(units))
        zeros = zero_array(value.type.element).reshape(-1).tolist()
        functionals.add_ends(units, 0, [(z, z) for z in zeros])
        functionals.expand(known, op, units, 0)
        ends += functionals.ends(known, cone[1:])
    return _of_channels(ends, [place[-1] for place in places], shape[-1])


def _units(shape: tuple[int, ...], places: Sequence[tuple[int, ...]]) -> Any:
    """A weight of 1 for each of these elements."""
    units = np.zeros((len(places), *shape), np.int64)
    units[(np.arange(len(places)), *np.transpose(places))] = 1
    return units


def _of_channels(ends: Sequence[tuple[int, int]], channels: Sequence[int], count: int) -> list[tuple[int, int]]:
    grouped: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    for each, channel in zip(ends, channels, strict=True):
        grouped[channel].append(each)
    return [(min(e[0] for e in group), max(e[1] for e in group)) for group in grouped]


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
            if op.mnemonic == "mul" and not _is_factor_whole(known, op):
                return False
            return "unsaturated" in lanes and cuts_of(known, op) is not None
    return op.mnemonic in ("reshape", "transpose", "concat", "slice", "gather")


def _is_factor_whole(known: Known, op: Any) -> bool:
    return bool(factor_order(known.graph, op)[0].type.shape == op.results[0].type.shape)


def _is_inside(span: Span, room: Any, overflow: str) -> bool:
    (lo, hi), (least, most) = hull(span), kept_ends(room, overflow)
    return least <= lo and hi <= most


def _keeps_products(op: Any, lanes: dict[str, Span]) -> bool:
    return op.product is None or _is_inside(lanes["entering"], op.product, op.product_overflow)


def _places(shape: tuple[int, ...], cone: Sequence[Any]) -> list[tuple[int, ...]]:
    """The elements whose functionals are looked at: all of them, or fewer where all ops do the same everywhere.

    Then it is one of each channel, and those whose taps may lie on padding.
    """
    if not all(op.operands[0].type.rank == len(shape) and _is_alike(op) for op in cone):
        return list(np.ndindex(*shape))
    margin = sum(max(op.pads) for op in cone if op.mnemonic == "conv2d")
    axes = [sorted({*range(min(margin + 1, n)), *range(max(n - margin, 0), n)}) for n in shape[1:-1]]
    return list(product((0,), *axes, range(shape[-1])))


def _is_alike(op: Any) -> bool:
    """Whether an op does the same at every position, the border of a convolution apart."""
    last = op.operands[0].type.rank - 1
    match op.mnemonic:
        case "add" | "sub":
            grids = [v.type.shape[1:-1] for v in op.operands if v.type.rank == last + 1]
            return all(g == op.results[0].type.shape[1:-1] or set(g) <= {1} for g in grids)
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
    """Ends of every partial sum of each output; None where taps lie on padding, or for too much work."""
    is_conv, factors = op.mnemonic == "conv2d", constant_weights(known.graph, op)
    if is_conv and any(op.pads):
        return None
    cone, shape = _cone(known, op, stops), op.results[0].type.concrete(1)
    places, is_first = _places(shape, cone), "bias" in op.order
    steps = list(np.ndindex(*factors.shape[1:] if is_conv else factors.shape[:1]))
    if "ckhw" in op.order:
        steps.sort(key=lambda step: step[-1])
    size = math.prod(shape) + sum(math.prod(v.type.concrete(1)) for o in cone for v in o.operands)
    if len(places) * len(steps) * size > _MOST_WEIGHTS or len(places) * size > _CHUNK:
        return None
    bias = (
        [(min(r[0], 0), max(r[-1], 0)) for r in known.spans[op.operands[2]]]
        if is_first and len(op.operands) > 2
        else []
    )
    units, partial, ends = _units(shape, places), np.zeros_like(factors), []
    for number, step in enumerate(steps, 1):
        at = (slice(None), *step) if is_conv else step
        partial[at] = factors[at]
        for with_bias in {is_first, is_first or number == len(steps)}:  # the sum before and after the bias comes in
            functionals = Functionals(len(places))
            functionals.expand(known, op, units, 0, partial, with_bias=with_bias)
            ends += functionals.ends(known, cone[1:])
    channels = [place[-1] for place in places] * (len(ends) // len(places))
    found = _of_channels(ends, channels, shape[-1])
    starts = (bias or [(0, 0)]) * (1 if len(bias) == len(found) else len(found))
    return [(min(a[0], b[0], 0), max(a[1], b[1], 0)) for a, b in zip(found, starts, strict=False)]
