"""Elementwise arithmetic, tables and pooling."""

from __future__ import annotations

import numpy as np
from numba import njit, vectorize

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
