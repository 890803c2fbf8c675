"""Compiled loops of requantization: the forms of `qir.fixed_point.requantize` on flat arrays, then narrowing.

Parameters run along the data with the period of their length. Each loop ends alike: the rounded value is clamped to
[low, high], which are the storage bounds less the zero point, that is added, and the store keeps the low bits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from qir.backends.kernels.jit import kernel


@kernel
def rescale_twice(
    x: Any,
    x_zero: Any,
    left: Any,
    multiplier: Any,
    right: Any,
    away: int,
    low: Any,
    high: Any,
    zero: Any,
    out: Any,
) -> None:
    """`double_round` (away = 1: ties of the second rounding go away from zero) and `neon` (away = 0: up). int32 inside.

    Valid for multipliers in [0, 2^31) and shifts, left and right, of at most 31.
    """
    period = multiplier.shape[0]
    for start in range(0, x.shape[0], period):
        count = min(period, x.shape[0] - start)
        source, target = x[start : start + count], out[start : start + count]
        for j in range(count):
            shifted = np.int32(np.int32(np.int32(source[j]) - x_zero[j]) << left[j])
            product = np.int64(shifted) * np.int64(multiplier[j])
            value = np.int32((product + np.int64(1 << 30)) >> np.int64(31))
            mask = np.int32((np.int64(1) << np.int64(right[j])) - np.int64(1))
            threshold = np.int32((mask >> np.int32(1)) + np.int32(away if value < 0 else 0))
            rounded = np.int32((value >> right[j]) + np.int32(1 if np.int32(value & mask) > threshold else 0))
            target[j] = np.int32(min(max(rounded, low[j]), high[j]) + zero[j])


@kernel
def rescale_once(
    x: Any, x_zero: Any, left: Any, multiplier: Any, right: Any, wraps: bool, low: Any, high: Any, zero: Any, out: Any
) -> None:
    """`(x << left) * multiplier / 2^right`, ties up: `single_round`, and `reduced_16`, which then wraps to 32 bits.

    int64 inside, right <= 62.
    """
    period = multiplier.shape[0]
    for start in range(0, x.shape[0], period):
        count = min(period, x.shape[0] - start)
        source, target = x[start : start + count], out[start : start + count]
        for j in range(count):
            product = ((np.int64(source[j]) - x_zero[j]) << left[j]) * multiplier[j]
            half = (product >> max(right[j] - 1, 0)) & np.int64(1 if right[j] > 0 else 0)
            rounded = (product >> right[j]) + half
            rounded = np.int64(np.int32(rounded)) if wraps else rounded
            target[j] = min(max(rounded, low[j]), high[j]) + zero[j]


@kernel
def rescale_shift(
    x: Any, x_zero: Any, left: Any, right: Any, ties: Any, narrowing: Any, low: Any, high: Any, zero: Any, out: Any
) -> None:
    """`(x << left) / 2^right` in the rounding that `ties` describes (see `rescale.TIES`). int64 inside.

    `narrowing` holds the mask and the sign bit with which the result wraps, and the bounds beyond which it becomes 0.
    """
    mask, sign, least, greatest = narrowing[0], narrowing[1], narrowing[2], narrowing[3]
    period = right.shape[0]
    above, tie, tie_positive, tie_negative, tie_odd, negative = ties[0], ties[1], ties[2], ties[3], ties[4], ties[5]
    for start in range(0, x.shape[0], period):
        count = min(period, x.shape[0] - start)
        source, target = x[start : start + count], out[start : start + count]
        for j in range(count):
            value = (np.int64(source[j]) - x_zero[j]) << left[j]
            floor = value >> right[j]
            rest = value - (floor << right[j])
            missing = (np.int64(1) << right[j]) - rest
            is_negative = np.int64(1 if floor < 0 else 0)
            at_tie = tie | (tie_positive & (1 - is_negative)) | (tie_negative & is_negative) | (tie_odd & (floor & 1))
            up = above if rest > missing else (at_tie if rest == missing else np.int64(0))
            up |= negative & is_negative & np.int64(1 if rest != 0 else 0)
            result = min(max(floor + up, low[j]), high[j]) + zero[j]
            result = ((result & mask) ^ sign) - sign
            target[j] = result if least <= result <= greatest else np.int64(0)


@kernel
def rescale_float(x: Any, x_zero: Any, left: Any, multiplier: Any, low: Any, high: Any, zero: Any, out: Any) -> None:
    """`float32(x) * multiplier` in float32, ties to even: the form `float32`."""
    period = multiplier.shape[0]
    limit = np.float32(2.0**62)
    for start in range(0, x.shape[0], period):
        count = min(period, x.shape[0] - start)
        source, target = x[start : start + count], out[start : start + count]
        for j in range(count):
            value = (np.int64(source[j]) - x_zero[j]) << left[j]
            real = np.rint(np.float32(np.float32(value) * multiplier[j]))
            whole = np.int64(min(max(real, -limit), limit))
            target[j] = min(max(whole, low[j]), high[j]) + zero[j]


@kernel
def rescale_double(x: Any, x_zero: Any, left: Any, multiplier: Any, low: Any, high: Any, zero: Any, out: Any) -> None:
    """`float64(x) * multiplier` in float64, ties away from zero: the form `double_away`."""
    period = multiplier.shape[0]
    limit = np.float64(2.0**62)
    for start in range(0, x.shape[0], period):
        count = min(period, x.shape[0] - start)
        source, target = x[start : start + count], out[start : start + count]
        for j in range(count):
            value = (np.int64(source[j]) - x_zero[j]) << left[j]
            real = min(max(np.float64(value) * multiplier[j], -limit), limit)
            floor = np.floor(abs(real))
            floor = floor + (1.0 if abs(real) - floor >= 0.5 else 0.0)
            whole = np.int64(-floor if real < 0 else floor)
            target[j] = min(max(whole, low[j]), high[j]) + zero[j]


@kernel
def _fused(x: Any, scale: Any, addend: Any) -> Any:
    """`x * scale + addend`, rounded to float32 once: `qir.ops.fixed_rescale.fused_multiply_add` says how."""
    product = np.float64(x) * np.float64(scale)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    if error != 0 and np.isfinite(total):
        mantissa, _ = math.frexp(total)
        if np.int64(mantissa * 2.0**53) & 1 == 0:
            total = np.nextafter(total, np.inf if error > 0 else -np.inf)
    return np.float32(total)


@kernel
def quantize_reals(
    x: Any, scale: Any, multiplies: bool, inside: Any, ties: Any, low: Any, high: Any, zero: Any, out: Any
) -> None:
    """`x / scale` (or `x * scale`) in float32, rounded as `ties` says (see `rescale.TIES`); NaN: the zero point.

    What is `inside` the rounding is added to the product in one operation, as an FMA does; see `_fused`.
    """
    period = scale.shape[0]
    limit = np.float32(2.0**62)
    above, tie, tie_positive, tie_negative, tie_odd, negative = ties[0], ties[1], ties[2], ties[3], ties[4], ties[5]
    for start in range(0, x.shape[0], period):
        count = min(period, x.shape[0] - start)
        source, target = x[start : start + count], out[start : start + count]
        for j in range(count):
            if inside[j]:
                real = _fused(source[j], scale[j], inside[j])
            else:
                real = source[j] * scale[j] if multiplies else source[j] / scale[j]
            real = np.float32(inside[j]) if np.isnan(real) else min(max(np.float32(real), -limit), limit)
            below = np.floor(real)
            rest = np.float64(real) - np.float64(below)  # in float32 that of -0.49999997 would be a tie
            floor = np.int64(below)
            is_negative = np.int64(1 if floor < 0 else 0)
            at_tie = tie | (tie_positive & (1 - is_negative)) | (tie_negative & is_negative) | (tie_odd & (floor & 1))
            up = above if rest > 0.5 else (at_tie if rest == 0.5 else np.int64(0))
            up |= negative & is_negative & np.int64(1 if rest != 0 else 0)
            target[j] = min(max(floor + up, low[j]), high[j]) + zero[j]


@kernel
def dequantize_integers(x: Any, scale: Any, zero: Any, out: Any) -> None:
    """`float32(x - zero) * scale`, one rounding to float32 and one product."""
    period = scale.shape[0]
    for start in range(0, x.shape[0], period):
        count = min(period, x.shape[0] - start)
        source, target = x[start : start + count], out[start : start + count]
        for j in range(count):
            target[j] = np.float32(np.int64(source[j]) - zero[j]) * scale[j]


@kernel
def dequantize_nibbles(data: Any, scale: Any, block: int, high_first: int, out: Any) -> None:
    """Signed 4-bit integers, two a byte of `data`, times `scale` [outer, blocks, inner]; out [outer, length, inner]."""
    length, inner = out.shape[1], out.shape[2]
    for i in range(out.shape[0]):
        for k in range(length):
            for j in range(inner):
                place = (i * length + k) * inner + j
                right = 4 * ((place & 1) ^ high_first)
                nibble = (np.int64(data[place >> 1]) >> right) & 15
                out[i, k, j] = np.float32((nibble ^ 8) - 8) * scale[i, k // block, j]
