"""Functionals of the checker: weights of elements of one sample, followed backward through linear ops.

Weights are exact integers in units of 2**-scale. What an op adds beside them - roundings, clamps, constants - has ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from qir.checker.arithmetic import kept_ends, rounded
from qir.checker.claims import Span, centred, hull
from qir.checker.rules import moved
from qir.checker.sums import constant_weights
from qir.ir import Graph, Value
from qir.types import storage_of, zero_array

#: Weights that functionals side by side may have.
_MOST_AT_A_TIME = 1 << 23


@dataclass(frozen=True)
class Known:
    """What is certified so far: ranges, exact results before they are narrowed a channel, and other registers.

    `skipped` names the values whose linear functions have too many weights to be followed.
    """

    graph: Graph
    spans: dict[Value, Span] = field(default_factory=dict)
    free: dict[Value, Span] = field(default_factory=dict)
    lanes: dict[Value, dict[str, Span]] = field(default_factory=dict)
    skipped: set[str] = field(default_factory=set)


def cuts_of(known: Known, op: Any) -> list[tuple[int, int]] | None:
    """By how much narrowing changes exact results, a channel; None where that has no bounds."""
    least, most = kept_ends(storage_of(op.results[0].type.element), op.overflow)
    cuts = [(min(most - r[-1], 0), max(least - r[0], 0)) for r in known.free[op.results[0]]]
    return cuts if op.overflow in ("saturate", "saturate_symmetric") or not any(map(any, cuts)) else None


def factor_order(graph: Graph, op: Any) -> list[Value]:
    """The operands of a product: first the one that is followed, which varies, on more positions than the other."""
    return sorted(op.operands, key=lambda v: (v in graph.constants, -v.type.sample_size))


def zero_ends(value: Value) -> list[tuple[int, int]]:
    """Ends of the zero point of each channel; of all of them where they run along another axis than the last."""
    zeros = zero_array(value.type.element).reshape(-1).tolist()
    is_last = getattr(value.type.element, "axis", None) in (None, value.type.rank - 1)
    return [(z, z) for z in zeros] if is_last else [(min(zeros), max(zeros))]


def is_clipped(known: Known, op: Any) -> bool:
    """Whether a requantize may reach beyond 2**62, where the floating-point forms are clipped."""
    if op.form not in ("float32", "double_away"):
        return False
    return max(map(Fraction, op.multiplier.data.reshape(-1).tolist())) * _reach(known, op) >= 1 << 61


def _reach(known: Known, op: Any) -> int:
    """The largest magnitude of the operand of a requantize, shifted."""
    value = op.operands[0]
    reach: int = max(map(abs, hull(centred(value, known.spans[value])))) << op.input_shift
    return reach


class TooMany(Exception):
    """Functionals have more weights than are followed."""


class Functionals:
    """Linear functions side by side: of each value the places of elements, their weights [functions, places] and units.

    `lo` and `hi` are the ends of what is apart from them, `work` counts the weights that were made.
    """

    def __init__(self, count: int) -> None:
        self.parts: dict[Value, tuple[Any, Any, int]] = {}
        self.lo = np.array([Fraction(0)] * count, object)
        self.hi = self.lo.copy()
        self.work = 0

    def add(self, value: Value, places: Any, weights: Any, scale: int) -> None:
        """More weights of a value; all in the finer units. Places of -1 lie on padding."""
        places, weights = places[places >= 0], weights[:, places >= 0]
        if value in self.parts:
            others, known, own = self.parts[value]
            finest = max(own, scale)
            parts = _times(known, 1 << (finest - own)), _times(weights, 1 << (finest - scale))
            places, weights, scale = np.concatenate([others, places]), np.concatenate(parts, axis=1), finest
        self.parts[value] = (*_merged(places, weights), scale)

    def pull(self, value: Value, places: Any, weights: Any, factors: Any, scale: int) -> None:
        """Weights [functions, n] of results that are sums over places [n, m] of a value, times factors."""
        size = len(weights) * places.size
        self.work += size
        if size > _MOST_AT_A_TIME:
            raise TooMany
        spread = _times(weights[:, :, None], np.broadcast_to(factors, places.shape))
        self.add(value, places.reshape(-1), spread.reshape(len(weights), -1), scale)

    def add_ends(self, places: Any, weights: Any, scale: int, ends: Sequence[tuple[Any, Any]]) -> None:
        """What elements within ends, of all or of each channel, add."""
        if not any(map(any, ends)):
            return
        channels = places % len(ends)
        up, down = (
            _merged(channels, part)[1].astype(object) for part in (np.maximum(weights, 0), np.minimum(weights, 0))
        )
        met = np.unique(channels)
        lo, hi = (np.array([Fraction(ends[c][i]) for c in met], object) for i in (0, 1))
        unit = Fraction(2) ** -scale
        self.lo = self.lo + (up * lo + down * hi).sum(axis=1) * unit
        self.hi = self.hi + (up * hi + down * lo).sum(axis=1) * unit

    def ends(self, known: Known, cone: Sequence[Any]) -> list[tuple[int, int]]:
        """The integers that the functions lie between, once they are followed through the linear ops of a cone."""
        for op in cone:
            if op.results[0] in self.parts:
                places, weights, scale = self.parts.pop(op.results[0])
                if op.mnemonic in ("requantize", "add", "sub", "mul"):
                    self.add_ends(places, weights, scale, cuts_of(known, op) or [])
                self.expand(known, op, places, weights, scale)
        for value, (places, weights, scale) in self.parts.items():
            self.add_ends(places, weights, scale, [(r[0], r[-1]) for r in centred(value, known.spans[value])])
        return [(math.ceil(lo), math.floor(hi)) for lo, hi in zip(self.lo, self.hi, strict=True)]

    def expand(
        self, known: Known, op: Any, places: Any, weights: Any, scale: int, factors: Any = None, *, bias: bool = True
    ) -> None:
        """Weights of the exact centred result of a linear op as weights of its centred operands.

        `factors` stand for the constant weights of a sum.
        """
        match op.mnemonic:
            case "conv2d" | "matmul" | "reduce_sum":
                if bias and len(op.operands) > 2:
                    self.add_ends(places, weights, scale, [(r[0], r[-1]) for r in known.spans[op.operands[2]]])
                self._summed(
                    op, places, weights, scale, constant_weights(known.graph, op) if factors is None else factors
                )
            case "requantize":
                self._rescaled(known, op, places, weights, scale)
            case "add" | "sub" | "mul":
                self.add_ends(places, weights, scale, [(-hi, -lo) for lo, hi in zero_ends(op.results[0])])
                if op.mnemonic == "mul":
                    self._multiplied(known, op, places, weights, scale)
                    return
                for sign, value in zip((1, 1 if op.mnemonic == "add" else -1), op.operands, strict=True):
                    numbers = _numbers(value)
                    spread = np.broadcast_to(numbers, op.results[0].type.concrete(1)).reshape(-1)
                    self.pull(value, spread[places][:, None], weights, sign, scale)
            case _:
                numbers, first = [], 0
                for value in op.operands:
                    numbers.append(_numbers(value) + first)
                    first += numbers[-1].size
                taken = moved(op, numbers).reshape(-1)[places]
                for value, own in zip(op.operands, numbers, strict=True):
                    inside = (taken >= own.min(initial=first)) & (taken <= own.max(initial=-1))
                    self.pull(value, np.where(inside, taken - own.min(initial=first), -1)[:, None], weights, 1, scale)

    def _rescaled(self, known: Known, op: Any, places: Any, weights: Any, scale: int) -> None:
        value = op.operands[0]
        reach = _reach(known, op)
        factors, ends = zip(*(_factor(op, i, reach) for i in range(op.multiplier.size)), strict=True)
        self.add_ends(places, weights, scale, ends)
        powers = [f.denominator.bit_length() - 1 for f in factors]
        by = np.array([f.numerator << (max(powers) - p) for f, p in zip(factors, powers, strict=True)], object)
        self.pull(value, places[:, None], weights, by[places % len(by)][:, None], scale + max(powers) - op.input_shift)

    def _multiplied(self, known: Known, op: Any, places: Any, weights: Any, scale: int) -> None:
        """An operand times the middle of the other's range, off by half its width times the operand's reach."""
        value, other = factor_order(known.graph, op)
        ranges = centred(other, known.spans[other])
        reach = max(map(abs, hull(centred(value, known.spans[value]))))
        self.add_ends(places, weights, scale + 1, [(-reach * (r[-1] - r[0]), reach * (r[-1] - r[0])) for r in ranges])
        by = np.array([r[0] + r[-1] for r in ranges], object)
        self.pull(value, places[:, None], weights, by[places % len(by)][:, None], scale + 1)

    def _summed(self, op: Any, places: Any, weights: Any, scale: int, factors: Any) -> None:
        x, shift = op.operands[0], op.product_shift or 0
        numbers, outputs = _numbers(x), op.results[0].type.concrete(1)[-1:]
        if op.mnemonic == "reduce_sum":
            axes = range(len(op.axes))
            rows = (
                np.moveaxis(numbers, op.axes, axes).reshape(math.prod(numbers.shape[a] for a in op.axes), -1).T[places]
            )
            by = 1
        elif op.mnemonic == "matmul":
            rows, by = numbers.reshape(-1, len(factors))[places // outputs[0]], factors.T[places % outputs[0]]
        else:
            rows, by = _taps_of(op, numbers, places), factors.reshape(len(factors), -1)[places % outputs[0]]
        if shift < 0:
            low, high = _lost(op.rounding, -shift)
            self.add_ends(places, weights, scale, [(rows.shape[1] * low, rows.shape[1] * high)])
        self.pull(x, rows, weights, by, scale - shift)


def _numbers(value: Value) -> Any:
    """The numbers of a sample's elements, in its shape."""
    shape = value.type.concrete(1)
    return np.arange(math.prod(shape)).reshape(shape)


def _merged(places: Any, weights: Any) -> tuple[Any, Any]:
    """Each place once, with the sum of its weights."""
    unique, first, counts = np.unique(places, return_index=True, return_counts=True)
    if len(unique) == len(places):
        return unique, weights[:, first]
    order = np.argsort(places, kind="stable")
    starts = np.cumsum(counts) - counts
    return unique, np.add.reduceat(_times(weights, 1, int(counts.max()))[:, order], starts, axis=1)


def _taps_of(op: Any, numbers: Any, places: Any) -> Any:
    """The elements that results of a convolution read, in the order of its weights; -1 on padding."""
    _, height, width, _ = numbers.shape
    outputs, rows, columns, inputs = op.operands[1].type.shape
    sample, y, x, channel = np.unravel_index(places, op.results[0].type.concrete(1))
    row, column, place = np.indices((rows, columns, inputs)).reshape(3, -1)
    y = y[:, None] * op.strides[0] - op.pads[0] + row * op.dilations[0]
    x = x[:, None] * op.strides[1] - op.pads[1] + column * op.dilations[1]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    own = (channel // (outputs // op.groups) * inputs)[:, None] + place
    return np.where(inside, numbers[sample[:, None], np.where(inside, y, 0), np.where(inside, x, 0), own], -1)


def _times(weights: Any, factors: Any, terms: int = 1) -> Any:
    """The product, in Python ints unless int64 holds it and sums of so many like it."""
    largest = max(-int(weights.min(initial=0)), int(weights.max(initial=0)))
    by = np.asarray(factors, object) if isinstance(factors, int) else factors
    most = max(-int(by.min(initial=0)), int(by.max(initial=0))) if by.size else 0
    if weights.dtype == object or largest * most * terms >= 1 << 62:
        return weights.astype(object) * by.astype(object)
    return weights if isinstance(factors, int) and factors == 1 else weights * by.astype(np.int64)


def _lost(rounding: str, bits: int) -> tuple[Fraction, Fraction]:
    """By how much rounding so many fraction bits away changes a number."""
    lost = 1 - Fraction(1, 1 << max(bits, 0))
    if rounding in ("floor", "toward_zero"):
        return -lost, Fraction(0) if rounding == "floor" else lost
    return -min(lost, Fraction(1, 2)), min(lost, Fraction(1, 2))


def _factor(op: Any, channel: int, reach: int) -> tuple[Fraction, tuple[Fraction, Fraction]]:
    """The factor of a requantize that no register wraps in, and the ends of what its roundings add."""
    multiplier, shift = (e.data.reshape(-1)[channel].item() for e in (op.multiplier, op.shift))
    half = Fraction(1, 2)
    match op.form:
        case "shift":
            return Fraction(2) ** shift, _lost(op.rounding, -shift)
        case "single_round":
            error, factor = half, Fraction(multiplier) * Fraction(2) ** (shift - 31)
        case "reduced_16":
            error, factor = (
                half,
                Fraction(min(rounded(multiplier, 16, "half_up"), 0x7FFF)) * Fraction(2) ** (shift - 15),
            )
        case "double_round" | "neon":
            error, factor = (
                half + (half * Fraction(2) ** shift if shift < 0 else 0),
                Fraction(multiplier) * Fraction(2) ** (shift - 31),
            )
        case _:  # each operation is off by half a unit in the last place at most, and underflow by next to nothing
            is_single = op.form == "float32"
            factor = Fraction(float(np.float32(multiplier)) if is_single else float(multiplier))
            error = half + factor * reach / (1 << (22 if is_single else 51)) + Fraction(1, 1 << 60)
    return factor, (-error, error)
