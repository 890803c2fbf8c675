"""Sums of the checker: what a chain of products can be after each of its steps, for each kind of position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from qir.checker.arithmetic import cut, kept_ends, rounded
from qir.checker.claims import Image, Span, between, centred, ends_of, hull, step_of, union
from qir.ir import Graph
from qir.types import storage_of, zero_array


class _Layer(NamedTuple):
    """An accumulating op as a grouped convolution of `size` [groups, outputs, taps, inputs]."""

    size: tuple[int, int, int, int]
    x: Span
    weights: Sequence[Any]  # the very weights, or their ends where they are not constant; broadcast to `size`
    real: Any  # which taps are on real elements, for each kind of position: bool [kinds, taps]


class _Terms(NamedTuple):
    """Ends and gaps of what products add [length, outputs], in order, and where they are: bool [kinds, length]."""

    lo: Any
    hi: Any
    gap: Any
    real: Any


def chain(graph: Graph, op: Any, spans: Sequence[Span]) -> Image:
    """The results of an accumulating op, its partial sums and the lanes of its products."""
    layer, bias = _layer(graph, op, spans), spans[2] if len(spans) > 2 else [range(1)]
    if not layer.size[0] * layer.size[1]:
        return [range(1)], {"partial": [range(1)]}
    terms, lanes, is_exact = _entering(op, _terms(op, layer, bias))
    ends, partial = _totals(op, terms, bias)
    lanes["partial"] = partial
    (lo, hi), (least, most) = hull(partial), kept_ends(op.accumulator, op.overflow)
    is_kept = least <= lo and hi <= most
    if not (is_kept or op.overflow.startswith("saturate")):
        return [between(op.accumulator.lo, op.accumulator.hi)], lanes
    first, last = ends[0].min(axis=0), ends[1].max(axis=0)
    gaps = [np.ones((1,), object)]
    if is_exact and is_kept:
        gaps = [np.gcd.reduce(np.where(real[:, None], terms.gap, 0)) for real in terms.real]
        gaps += [*(ends[0] - first), np.array([step_of(r) for r in bias], object)]
    gap = np.broadcast_to(reduce(np.gcd, gaps), first.shape)
    return [between(*each) for each in zip(first, last, gap, strict=True)], lanes


def _layer(graph: Graph, op: Any, spans: Sequence[Span]) -> _Layer:
    x, shape = centred(op.operands[0], spans[0]), op.operands[0].type.concrete(1)
    if op.mnemonic == "reduce_sum":
        x, taps = [union(x)] if len(shape) - 1 in op.axes else x, math.prod(shape[a] for a in op.axes)
        return _Layer((len(x), 1, taps, 1), x, [np.ones((1, 1, 1, 1), np.int64)], np.ones((1, taps), bool))
    weight, is_conv = op.operands[1], op.mnemonic == "conv2d"
    kind = weight.type
    size, place, real = (1, kind.shape[-1], 1, shape[-1]), (1, -1, 1, 1), np.ones((1, 1), bool)
    if is_conv:
        size = (op.groups, kind.shape[0] // op.groups, kind.shape[1] * kind.shape[2], kind.shape[3])
        rows, columns = (_taps(op, a, shape[1 + a], kind.shape[1 + a]) for a in range(2))
        real, place = (rows[:, None, :, None] & columns[None, :, None, :]).reshape(-1, size[2]), (1, 1, 1, -1)
    whole = constant_weights(graph, op)
    if whole is None:
        ends = centred(weight, spans[1])
        return _Layer(size, x, [ends_of(ends, end).reshape(place) for end in (0, -1)], real)
    return _Layer(size, x, [(whole if is_conv else whole.T).reshape(size)], real)


def constant_weights(graph: Graph, op: Any) -> Any:
    """The weights of a sum, centred: [outputs, kh, kw, inputs] or [inputs, outputs]; None where they vary."""
    weight = op.operands[1] if len(op.operands) > 1 else None
    data = graph.constants.get(weight) if weight is not None else None
    if weight is None or data is None or not (op.mnemonic == "conv2d" or weight.type.rank == 2):
        return None
    storage, axis = storage_of(weight.type.element), getattr(weight.type.element, "axis", None)
    zeros = zero_array(weight.type.element).reshape([-1 if i == axis else 1 for i in range(weight.type.rank)])
    dtype: Any = np.int64 if storage is not None and storage.bits < 61 else object
    return data.data.astype(dtype) - zeros


def _taps(op: Any, axis: int, size: int, kernel: int) -> Any:
    """Which taps along a spatial axis are on real elements, for each kind of position: bool [kinds, kernel]."""
    starts = np.arange(op.results[0].type.shape[1 + axis]) * op.strides[axis] - op.pads[axis]
    places = starts[:, None] + np.arange(kernel) * op.dilations[axis]
    return np.unique((places >= 0) & (places < size), axis=0)


def _reach(*parts: Any) -> int:
    """The largest magnitude."""
    return max((max(-int(e.min()), int(e.max())) for e in parts if e.size), default=0)


def _terms(op: Any, layer: _Layer, bias: Span) -> _Terms:
    """The exact products, in int64 where every sum of them and the bias, shifted, stays far below 2**63."""
    size, length, room = layer.size, layer.size[2] * layer.size[3], op.accumulator
    x = [ends_of(layer.x, 0), ends_of(layer.x, -1), np.array([step_of(r) for r in layer.x], object)]
    reach = _reach(*x[:2]) * max(_reach(*layer.weights), 1) + _reach(ends_of(bias, 0), ends_of(bias, -1))
    reach += max(-room.lo, room.hi) if op.overflow.startswith("saturate") else 0
    dtype = np.int64 if reach * (length + 2) << abs(op.product_shift or 0) < 1 << 61 else object
    if not length:  # nothing is summed but the bias
        zeros = np.zeros((1, size[0] * size[1]), dtype)
        return _Terms(zeros, zeros, zeros, np.ones((1, 1), bool))
    lo, hi, step = (np.broadcast_to(e, size[0] * size[3]).reshape(size[0], 1, 1, -1).astype(dtype) for e in x)
    weights = [e.astype(dtype) for e in layer.weights]
    corners = [a * b for a, b in product((lo, hi), weights)]
    steps = np.abs(weights[0]) * step if len(weights) == 1 else np.ones((1, 1, 1, 1), dtype)
    found = reduce(np.minimum, corners), reduce(np.maximum, corners), steps
    is_outside = "ckhw" in op.order
    order = (3, 2, 0, 1) if is_outside else (2, 3, 0, 1)
    low, high, gap = (np.broadcast_to(e, size).transpose(order).reshape(length, -1) for e in found)
    real = np.tile(layer.real, size[3]) if is_outside else np.repeat(layer.real, size[3], axis=1)
    return _Terms(low, high, gap, real)


def _entering(op: Any, terms: _Terms) -> tuple[_Terms, dict[str, Span], bool]:
    """What products add when they are shifted and narrowed, lanes on the way, and whether no bit is lost."""
    lo, hi, step, real = terms
    exact = (lo, hi) if real.all() else (np.minimum(lo, 0), np.maximum(hi, 0))
    pairs = [np.add.reduceat(e, range(0, len(lo), 2)) for e in exact]
    lanes = {"product": [between(exact[0].min(), exact[1].max())], "pair": [between(pairs[0].min(), pairs[1].max())]}
    shift = op.product_shift or 0
    lo, hi, step = (e << max(shift, 0) for e in (lo, hi, step))
    if op.product is None:
        return _Terms(lo, hi, step, real), lanes, shift >= 0
    if shift < 0:
        lo, hi = (rounded(e, -shift, op.rounding) for e in (lo, hi))
    padding = [0] * (not real.all())
    lanes["entering"] = [between(min([lo.min(), *padding]), max([hi.max(), *padding]))]
    least, most = kept_ends(op.product, op.product_overflow)
    is_exact = shift >= 0 and bool(least <= lo.min() and hi.max() <= most)
    return _Terms(*cut(lo, hi, op.product, op.product_overflow), step, real), lanes, is_exact


def _totals(op: Any, terms: _Terms, bias: Span) -> tuple[list[Any], Span]:
    """The ends of the sum after the last step [kinds, outputs], and of all sums on the way before they are narrowed."""
    is_first, dropped = "bias" in op.order, max(-(op.product_shift or 0), 0) if op.product is None else 0
    base = [ends_of(bias, end).astype(terms.lo.dtype) for end in (0, -1)]
    sums = [np.zeros((len(terms.real), terms.lo.shape[1]), terms.lo.dtype) + is_first * b for b in base]
    least, most = np.minimum(sums[0], 0), np.maximum(sums[1], 0)
    for place in range(len(terms.lo) + 1):
        if place < len(terms.lo):
            added = [np.where(terms.real[:, place, None], e[place], 0) for e in terms[:2]]
            sums = [
                s + a if not dropped else rounded((s << dropped) + a, dropped, op.rounding)
                for s, a in zip(sums, added, strict=True)
            ]
        elif not is_first:
            sums = [s + b for s, b in zip(sums, base, strict=True)]
        least, most = np.minimum(least, sums[0]), np.maximum(most, sums[1])
        if op.overflow.startswith("saturate"):
            sums = [*cut(sums[0], sums[1], op.accumulator, op.overflow)]
    return sums, [between(*ends) for ends in zip(least.min(axis=0), most.max(axis=0), strict=True)]
