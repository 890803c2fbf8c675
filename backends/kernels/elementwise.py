"""Elementwise arithmetic, tables and pooling."""

from __future__ import annotations

import numpy as np
from numba import njit, vectorize

from qir.backends.kernels.scalars import HALF_AWAY, round_shift

_PAIR = ["int64(int64, int64, int64, int64, int64, int64)"]


@vectorize(_PAIR, nopython=True, cache=True)
def add(a, b, zero_a, zero_b, lo, hi):
    """`(a - za) + (b - zb)`, saturated."""
    return min(max((a - zero_a) + (b - zero_b), lo), hi)


@vectorize(_PAIR, nopython=True, cache=True)
def subtract(a, b, zero_a, zero_b, lo, hi):
    """`(a - za) - (b - zb)`, saturated."""
    return min(max((a - zero_a) - (b - zero_b), lo), hi)


@vectorize(_PAIR, nopython=True, cache=True)
def multiply(a, b, zero_a, zero_b, lo, hi):
    """`(a - za) * (b - zb)`, saturated."""
    return min(max((a - zero_a) * (b - zero_b), lo), hi)


@njit(nogil=True, cache=True)
def look_up(x, table, first, out):
    """Rows [P, C] through tables [1 or C, entries]."""
    step = 1 if table.shape[0] > 1 else 0
    for p in range(x.shape[0]):
        for c in range(x.shape[1]):
            out[p, c] = table[c * step, np.int64(x[p, c]) - first]


@njit(nogil=True, cache=True)
def max_pool(x, kernel, strides, pads, dilations, out):
    """The greatest real element of each window; x [N, H, W, C]."""
    for n in range(out.shape[0]):
        for i in range(out.shape[1]):
            for j in range(out.shape[2]):
                target = out[n, i, j]
                fresh = True
                for r in range(kernel[0]):
                    y = i * strides[0] + r * dilations[0] - pads[0]
                    if y < 0 or y >= x.shape[1]:
                        continue
                    for s in range(kernel[1]):
                        z = j * strides[1] + s * dilations[1] - pads[1]
                        if z < 0 or z >= x.shape[2]:
                            continue
                        pixel = x[n, y, z]
                        if fresh:
                            target[:] = pixel
                            fresh = False
                        else:
                            for c in range(target.shape[0]):
                                target[c] = max(target[c], pixel[c])


@njit(nogil=True, cache=True)
def average_pool(x, kernel, strides, pads, dilations, sums, out):
    """The sum of each window's real elements over their number, ties away from zero; `sums` is [C] of int64."""
    for n in range(out.shape[0]):
        for i in range(out.shape[1]):
            for j in range(out.shape[2]):
                sums[:] = 0
                count = 0
                for r in range(kernel[0]):
                    y = i * strides[0] + r * dilations[0] - pads[0]
                    if y < 0 or y >= x.shape[1]:
                        continue
                    for s in range(kernel[1]):
                        z = j * strides[1] + s * dilations[1] - pads[1]
                        if 0 <= z < x.shape[2]:
                            count += 1
                            pixel = x[n, y, z]
                            for c in range(sums.shape[0]):
                                sums[c] += pixel[c]
                for c in range(sums.shape[0]):
                    magnitude = (2 * abs(sums[c]) + count) // (2 * count)
                    out[n, i, j, c] = magnitude if sums[c] >= 0 else -magnitude


@njit(nogil=True, cache=True)
def softmax_sums(x, terms, greatest, totals):
    """The greatest element of each row [R, C] and the sum of `terms`, indexed by the distance from it."""
    for r in range(x.shape[0]):
        top = np.int64(x[r, 0])
        for c in range(1, x.shape[1]):
            top = max(top, np.int64(x[r, c]))
        total = np.int64(0)
        for c in range(x.shape[1]):
            total += terms[top - x[r, c]]
        greatest[r], totals[r] = top, total


@njit(nogil=True, cache=True)
def softmax_rows(x, exponentials, greatest, reciprocals, shifts, out):
    """Each exponential times its row's reciprocal, rounded twice as `double_round` does, less 128."""
    for r in range(x.shape[0]):
        for c in range(x.shape[1]):
            high = (reciprocals[r] * exponentials[greatest[r] - x[r, c]] + (1 << 30)) >> 31
            value = round_shift(high, shifts[r], HALF_AWAY) - 128
            out[r, c] = min(max(value, -128), 127)


@njit(nogil=True, cache=True)
def arg_max(x, last, out):
    """The index of the greatest element of each [outer, axis, inner]; the first of equals, or the last."""
    for o in range(x.shape[0]):
        for i in range(x.shape[2]):
            best = 0
            for k in range(1, x.shape[1]):
                if x[o, k, i] > x[o, best, i] or (last and x[o, k, i] == x[o, best, i]):
                    best = k
            out[o, i] = best


@vectorize(["int64(int64, int64, int64, int64, int64, int64, int64, int64, int64)"], nopython=True, cache=True)
def divide(a, b, zero_a, zero_b, multiplier, down, zero, lo, hi):
    """`(a - za) / (b - zb) * multiplier / 2**down + z`, ties away from zero; a zero divisor gives a bound."""
    a, b = a - zero_a, b - zero_b
    if b == 0:
        return hi if a > 0 else lo if a < 0 else zero
    numerator, denominator = abs(a) * multiplier, abs(b) << down
    quotient = numerator // denominator
    rest = numerator - quotient * denominator
    quotient += np.int64(rest >= denominator - rest)
    value = quotient if (a < 0) == (b < 0) else -quotient
    return min(max(value + zero, lo), hi)
