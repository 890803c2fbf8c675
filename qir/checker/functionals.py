"""Functionals of the checker: weights for every element of one sample, followed backward through linear ops.

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


@dataclass(frozen=True)
class Known:
    """What is certified so far: ranges, exact results before they are narrowed a channel, and other registers."""

    graph: Graph
    spans: dict[Value, Span] = field(default_factory=dict)
    free: dict[Value, Span] = field(default_factory=dict)
    lanes: dict[Value, dict[str, Span]] = field(default_factory=dict)


def cuts_of(known: Known, op: Any) -> list[tuple[int, int]] | None:
    """By how much narrowing changes exact results, a channel; None where that has no bounds."""
    least, most = kept_ends(storage_of(op.results[0].type.element), op.overflow)
    cuts = [(min(most - r[-1], 0), max(least - r[0], 0)) for r in known.free[op.results[0]]]
    return cuts if op.overflow in ("saturate", "saturate_symmetric") or not any(map(any, cuts)) else None


def factor_order(graph: Graph, op: Any) -> list[Value]:
    """The operands of a product: first the one that is followed, which varies, on more positions than the other."""
    return sorted(op.operands, key=lambda v: (v in graph.constants, -v.type.sample_size))


class Functionals:
    """Linear functions of elements, side by side: weights by value, and the ends of what is apart from them."""

    def __init__(self, count: int) -> None:
        self.parts: dict[Value, tuple[Any, int]] = {}
        self.lo = np.array([Fraction(0)] * count, object)
        self.hi = self.lo.copy()

    def add(self, value: Value, weights: Any, scale: int) -> None:
        """More weights of a value; all in the finer units."""
        if value in self.parts:
            other, own = self.parts[value]
            finest = max(own, scale)
            other, weights = _times(other, 1 << (finest - own)), _times(weights, 1 << (finest - scale))
            weights, scale = _times(other, 1, 2) + _times(weights, 1, 2), finest
        self.parts[value] = weights, scale

    def add_ends(self, weights: Any, scale: int, ends: Sequence[tuple[Any, Any]]) -> None:
        """What elements within ends, of all or of each channel, add."""
        if not any(map(any, ends)):
            return
        flat = _times(weights.reshape(len(weights), -1, weights.shape[-1]), 1, weights[0].size or 1)
        up, down = (part.sum(axis=1).astype(object) for part in (np.maximum(flat, 0), np.minimum(flat, 0)))
        lo, hi = (np.array([Fraction(e[i]) for e in ends], object) for i in (0, 1))
        unit = Fraction(2) ** -scale
        self.lo = self.lo + (up * lo + down * hi).sum(axis=1) * unit
        self.hi = self.hi + (up * hi + down * lo).sum(axis=1) * unit

    def ends(self, known: Known, cone: Sequence[Any]) -> list[tuple[int, int]]:
        """The integers that the functions lie between, once they are followed through the linear ops of a cone."""
        for op in cone:
            if op.results[0] in self.parts:
                weights, scale = self.parts.pop(op.results[0])
                if op.mnemonic in ("requantize", "add", "sub", "mul"):
                    self.add_ends(weights, scale, cuts_of(known, op) or [])
                self.expand(known, op, weights, scale)
        for value, (weights, scale) in self.parts.items():
            self.add_ends(weights, scale, [(r[0], r[-1]) for r in centred(value, known.spans[value])])
        return [(math.ceil(lo), math.floor(hi)) for lo, hi in zip(self.lo, self.hi, strict=True)]

    def expand(
        self, known: Known, op: Any, weights: Any, scale: int, factors: Any = None, *, with_bias: bool = True
    ) -> None:
        """Weights of the exact centred result of a linear op as weights of its centred operands.

        `factors` stand for the constant weights of a sum.
        """
        match op.mnemonic:
            case "conv2d" | "matmul" | "reduce_sum":
                if with_bias and len(op.operands) > 2:
                    self.add_ends(weights, scale, [(r[0], r[-1]) for r in known.spans[op.operands[2]]])
                self._summed(op, weights, scale, constant_weights(known.graph, op) if factors is None else factors)
            case "requantize":
                self._rescaled(known, op, weights, scale)
            case "add" | "sub" | "mul":
                zeros = zero_array(op.results[0].type.element).reshape(-1).tolist()
                self.add_ends(weights, scale, [(-z, -z) for z in zeros])
                if op.mnemonic == "mul":
                    self._multiplied(known, op, weights, scale)
                    return
                for sign, value in zip((1, 1 if op.mnemonic == "add" else -1), op.operands, strict=True):
                    self.add(value, sign * _gathered(weights, value.type.concrete(1)), scale)
            case _:
                self._moved(op, weights, scale)

    def _moved(self, op: Any, weights: Any, scale: int) -> None:
        sizes = [math.prod(v.type.concrete(1)) for v in op.operands]
        parts = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
        shaped = [part.reshape(v.type.concrete(1)) for part, v in zip(parts, op.operands, strict=True)]
        flat = np.zeros((len(weights), sum(sizes)), weights.dtype)
        np.add.at(flat.T, moved(op, shaped).reshape(-1), weights.reshape(len(weights), -1).T)
        for part, value in zip(parts, op.operands, strict=True):
            self.add(value, flat[:, part].reshape(len(weights), *(value.type.concrete(1) or (1,))), scale)

    def _rescaled(self, known: Known, op: Any, weights: Any, scale: int) -> None:
        value = op.operands[0]
        reach = max(map(abs, hull(centred(value, known.spans[value])))) << op.input_shift
        factors, ends = zip(*(_factor(op, i, reach) for i in range(op.multiplier.size)), strict=True)
        self.add_ends(weights, scale, ends)
        powers = [f.denominator.bit_length() - 1 for f in factors]
        mantissas = np.array([f.numerator << (max(powers) - p) for f, p in zip(factors, powers, strict=True)], object)
        self.add(value, _times(weights, mantissas), scale + max(powers) - op.input_shift)

    def _multiplied(self, known: Known, op: Any, weights: Any, scale: int) -> None:
        """An operand times the middle of the other's range, off by half its width times the operand's reach."""
        value, other = factor_order(known.graph, op)
        by = centred(other, known.spans[other])
        reach = max(map(abs, hull(centred(value, known.spans[value]))))
        self.add_ends(weights, scale + 1, [(-reach * (r[-1] - r[0]), reach * (r[-1] - r[0])) for r in by])
        self.add(value, _times(weights, np.array([r[0] + r[-1] for r in by], object)), scale + 1)

    def _summed(self, op: Any, weights: Any, scale: int, factors: Any) -> None:
        x, shift = op.operands[0], op.product_shift or 0
        shape = x.type.concrete(1)
        if op.mnemonic == "reduce_sum":
            count, kept = math.prod(shape[a] for a in op.axes), [1 if a in op.axes else n for a, n in enumerate(shape)]
            found = np.broadcast_to(weights.reshape(len(weights), *kept), (len(weights), *shape))
        elif op.mnemonic == "matmul":
            count = len(factors)
            found = _times(weights, 1, factors.shape[1] * int(np.abs(factors).max(initial=1))) @ factors.T
        else:
            count, found = factors[0].size, _transposed(op, weights, factors)
        if shift < 0:
            low, high = _lost(op.rounding, -shift)
            self.add_ends(weights, scale, [(count * low, count * high)])
        self.add(x, found, scale - shift)


def _times(weights: Any, factor: Any, terms: int = 1) -> Any:
    """The product, in Python ints unless int64 holds it and sums of so many like it."""
    largest = max(-int(weights.min(initial=0)), int(weights.max(initial=0)))
    by = max(map(abs, np.reshape(factor, -1).tolist()), default=0)
    if weights.dtype == object or largest * by * terms >= 1 << 62:
        return weights.astype(object) * factor
    return weights if isinstance(factor, int) and factor == 1 else weights * np.asarray(factor, np.int64)


def _gathered(weights: Any, shape: tuple[int, ...]) -> Any:
    """The weights of an operand that is broadcast."""
    flat = _times(weights, 1, weights[0].size or 1)
    lead = flat.ndim - 1 - len(shape)
    flat = flat.sum(axis=tuple(range(1, 1 + lead))) if lead else flat
    axes = tuple(1 + a for a, n in enumerate(shape) if n == 1 and flat.shape[1 + a] != 1)
    flat = flat.sum(axis=axes, keepdims=True) if axes else flat
    return flat if shape else flat.reshape(-1, 1)


def _transposed(op: Any, weights: Any, factors: Any) -> Any:
    """A convolution backward: weights of the results [B, N, Ho, Wo, O] as weights of the operand."""
    samples, height, width, channels = op.operands[0].type.concrete(1)
    outputs, rows, columns, per = factors.shape
    weights = _times(weights, 1, factors.size * int(np.abs(factors).max(initial=1)))
    high, wide = weights.shape[2:4]
    grouped = weights.reshape(-1, high, wide, op.groups, 1, outputs // op.groups)
    kernel = factors.reshape(op.groups, outputs // op.groups, rows, columns, per).astype(weights.dtype)
    ends = [
        (n - 1) * s + (k - 1) * d + 1
        for n, s, k, d in zip((high, wide), op.strides, (rows, columns), op.dilations, strict=True)
    ]
    sizes = [max(end, pad + n) for end, pad, n in zip(ends, op.pads[:2], (height, width), strict=True)]
    found = np.zeros((len(grouped), *sizes, channels), weights.dtype)
    for i, j in np.ndindex(rows, columns):
        y, x = i * op.dilations[0], j * op.dilations[1]
        place = found[
            :,
            y : y + (high - 1) * op.strides[0] + 1 : op.strides[0],
            x : x + (wide - 1) * op.strides[1] + 1 : op.strides[1],
        ]
        place += (grouped @ kernel[:, :, i, j]).reshape(place.shape)
    found = found[:, op.pads[0] : op.pads[0] + height, op.pads[1] : op.pads[1] + width]
    return found.reshape(-1, samples, height, width, channels)


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
