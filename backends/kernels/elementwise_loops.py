"""Compiled loops over elements: arithmetic, tables, greatest elements, pooling and softmax."""

from __future__ import annotations

from typing import Any

import numpy as np

from qir.backends.kernels.jit import kernel


@kernel
def add_flat(a: Any, a_zero: int, b: Any, b_zero: int, sign: int, low: int, high: int, out: Any) -> None:
    """`(a - a_zero) + sign * (b - b_zero)` clamped to [low, high]; all arrays are flat and equally long."""
    offset = -a_zero - sign * b_zero
    for i in range(out.shape[0]):
        out[i] = min(max(np.int64(a[i]) + sign * np.int64(b[i]) + offset, low), high)


@kernel
def multiply_flat(a: Any, a_zero: int, b: Any, b_zero: int, low: int, high: int, out: Any) -> None:
    """`(a - a_zero) * (b - b_zero)` clamped to [low, high]; all arrays are flat and equally long."""
    for i in range(out.shape[0]):
        out[i] = min(max((np.int64(a[i]) - a_zero) * (np.int64(b[i]) - b_zero), low), high)


@kernel
def divide_flat(
    a: Any, a_zero: int, b: Any, b_zero: int, up: int, down: int, limit: int, zero: int, low: int, high: int, out: Any
) -> None:
    """`(a - a_zero) * up / ((b - b_zero) * down) + zero`, ties away from zero, clamped; `limit` at a zero divisor."""
    for i in range(out.shape[0]):
        dividend, divisor = np.int64(a[i]) - a_zero, np.int64(b[i]) - b_zero
        if divisor == 0:
            quotient = np.int64(0) if dividend == 0 else np.int64(limit)
        else:
            numerator, denominator = abs(dividend) * up, abs(divisor) * down
            quotient = numerator // denominator
            rest = numerator - quotient * denominator
            if rest >= denominator - rest:
                quotient += 1
        if (dividend < 0) != (divisor < 0):
            quotient = -quotient
        out[i] = min(max(quotient + zero, low), high)


@kernel
def look_up(x: Any, table: Any, row_step: int, first: int, out: Any) -> None:
    """`out[i, c] = table[c * row_step, x[i, c] - first]`."""
    for i in range(x.shape[0]):
        for c in range(x.shape[1]):
            out[i, c] = table[c * row_step, np.int64(x[i, c]) - first]


@kernel
def argmax_middle(x: Any, last: bool, out: Any) -> None:
    """`out[i, j]` is the place `m` of the greatest `x[i, m, j]`: the first of equals, or the last."""
    for i in range(x.shape[0]):
        for j in range(x.shape[2]):
            best = 0
            for m in range(1, x.shape[1]):
                if x[i, m, j] > x[i, best, j] or (last and x[i, m, j] == x[i, best, j]):
                    best = m
            out[i, j] = best


@kernel
def max_windows(x: Any, kernel_size: Any, strides: Any, pads: Any, dilations: Any, out: Any) -> None:
    """The greatest real element of each window, channel by channel; x [N, H, W, C]."""
    for n in range(out.shape[0]):
        for i in range(out.shape[1]):
            for j in range(out.shape[2]):
                target = out[n, i, j]
                fresh = True
                for r in range(kernel_size[0]):
                    y = i * strides[0] + r * dilations[0] - pads[0]
                    for s in range(kernel_size[1]):
                        z = j * strides[1] + s * dilations[1] - pads[1]
                        if y < 0 or y >= x.shape[1] or z < 0 or z >= x.shape[2]:
                            continue
                        pixel = x[n, y, z]
                        if fresh:
                            for c in range(target.shape[0]):
                                target[c] = pixel[c]
                            fresh = False
                        else:
                            for c in range(target.shape[0]):
                                target[c] = max(target[c], pixel[c])


@kernel
def average_windows(
    x: Any, kernel_size: Any, strides: Any, pads: Any, dilations: Any, ties: Any, sums: Any, out: Any
) -> None:
    """The sum of each window's real elements over their number, rounded as `ties` says; `sums` is int64 [C].

    `ties` is a row of `rescale.TIES`.
    """
    above, tie, tie_positive, tie_negative, tie_odd, negative = ties[0], ties[1], ties[2], ties[3], ties[4], ties[5]
    channels = out.shape[3]
    for n in range(out.shape[0]):
        for i in range(out.shape[1]):
            for j in range(out.shape[2]):
                for c in range(channels):
                    sums[c] = 0
                count = np.int64(0)
                for r in range(kernel_size[0]):
                    y = i * strides[0] + r * dilations[0] - pads[0]
                    for s in range(kernel_size[1]):
                        z = j * strides[1] + s * dilations[1] - pads[1]
                        if y < 0 or y >= x.shape[1] or z < 0 or z >= x.shape[2]:
                            continue
                        count += 1
                        pixel = x[n, y, z]
                        for c in range(channels):
                            sums[c] += np.int64(pixel[c])
                target = out[n, i, j]
                for c in range(channels):
                    floor = sums[c] // count
                    rest = sums[c] - floor * count
                    is_negative = np.int64(1 if floor < 0 else 0)
                    at_tie = tie | (tie_positive & (1 - is_negative)) | (tie_negative & is_negative)
                    at_tie |= tie_odd & (floor & 1)
                    up = above if rest > count - rest else (at_tie if rest == count - rest else np.int64(0))
                    up |= negative & is_negative & np.int64(1 if rest != 0 else 0)
                    target[c] = floor + up


@kernel
def softmax_sums(x: Any, terms: Any, greatest: Any, totals: Any) -> None:
    """The greatest element of each row of x [rows, length], and the sum of `terms` by the distance from it."""
    for i in range(x.shape[0]):
        top = np.int64(x[i, 0])
        for j in range(1, x.shape[1]):
            top = max(top, np.int64(x[i, j]))
        total = np.int64(0)
        for j in range(x.shape[1]):
            total += terms[top - np.int64(x[i, j])]
        greatest[i] = top
        totals[i] = total


@kernel
def softmax_ratios(x: Any, exponentials: Any, greatest: Any, reciprocals: Any, rights: Any, out: Any) -> None:
    """Each exponential times its row's reciprocal in Q0.31, divided by `2^right`, ties away from zero, less 128."""
    for i in range(x.shape[0]):
        reciprocal, right = reciprocals[i], rights[i]
        half = (np.int64(1) << right) >> np.int64(1)
        for j in range(x.shape[1]):
            high = (reciprocal * exponentials[greatest[i] - np.int64(x[i, j])] + np.int64(1 << 30)) >> np.int64(31)
            out[i, j] = min(((high + half) >> right) - 128, 127)
