"""Compiled loops of sums whose every step counts: products one by one, in order, each sum narrowed before the next.

Geometry as in `linear_loops.contract`: output pixels `p` in [first, last) count over images, rows and columns; image
`i` reads the flat `x` from `starts[i]` and takes the weights `weights[which[i] * groups + g]`, [K, O]. `places` [K] and
`zeros` [groups, K] say where the terms lie and what is taken from each; terms come in their order, row `k` of the
weights with place `k`. `bias` is added to the initial value where `bias_first`, else to the end.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qir.backends.kernels.jit import kernel


@kernel
def _clamp(value: float, low: float, high: float) -> float:
    value = low if value < low else value
    return high if value > high else value


@kernel
def accumulate_clamped(
    x: Any,
    starts: Any,
    which: Any,
    height: int,
    width: int,
    row_step: int,
    pixel_step: int,
    group_step: int,
    places: Any,
    zeros: Any,
    weights: Any,
    bias: Any,
    bias_first: bool,
    groups: int,
    clamps_products: bool,
    limits: Any,
    acc: Any,
    out: Any,
    first: int,
    last: int,
) -> None:
    """Every sum saturates to `limits[2:4]`, and where `clamps_products` every product to `limits[:2]` before.

    In the arithmetic of `acc` [O] and `weights`, float64, which is exact for integers below 2^53. The number of terms
    is a multiple of 4.
    """
    outputs = weights.shape[2]
    p_low, p_high, low, high = limits[0], limits[1], limits[2], limits[3]
    for p in range(first, last):
        image = p // (height * width)
        at_pixel = starts[image] + (p // width - image * height) * row_step + (p % width) * pixel_step
        for g in range(groups):
            w = weights[which[image] * groups + g]
            at = at_pixel + g * group_step
            for o in range(outputs):
                acc[o] = bias[g * outputs + o] if bias_first else np.float64(0)
            for k in range(0, places.shape[0], 4):
                x0 = np.float64(x[at + places[k]]) - zeros[g, k]
                x1 = np.float64(x[at + places[k + 1]]) - zeros[g, k + 1]
                x2 = np.float64(x[at + places[k + 2]]) - zeros[g, k + 2]
                x3 = np.float64(x[at + places[k + 3]]) - zeros[g, k + 3]
                w0, w1, w2, w3 = w[k], w[k + 1], w[k + 2], w[k + 3]
                if clamps_products:
                    for o in range(outputs):
                        total = acc[o] + _clamp(x0 * w0[o], p_low, p_high)
                        total = _clamp(total, low, high) + _clamp(x1 * w1[o], p_low, p_high)
                        total = _clamp(total, low, high) + _clamp(x2 * w2[o], p_low, p_high)
                        total = _clamp(total, low, high) + _clamp(x3 * w3[o], p_low, p_high)
                        acc[o] = _clamp(total, low, high)
                else:
                    for o in range(outputs):
                        total = _clamp(acc[o] + x0 * w0[o], low, high)
                        total = _clamp(total + x1 * w1[o], low, high)
                        total = _clamp(total + x2 * w2[o], low, high)
                        acc[o] = _clamp(total + x3 * w3[o], low, high)
            target = out[((p - first) * groups + g) * outputs :]
            for o in range(outputs):
                total = acc[o]
                if not bias_first:
                    total = _clamp(total + bias[g * outputs + o], low, high)
                target[o] = np.int64(total)


@kernel
def accumulate_stepwise(
    x: Any,
    starts: Any,
    which: Any,
    height: int,
    width: int,
    row_step: int,
    pixel_step: int,
    group_step: int,
    places: Any,
    zeros: Any,
    weights: Any,
    bias: Any,
    bias_first: bool,
    groups: int,
    shifts: Any,
    ties: Any,
    narrowings: Any,
    acc: Any,
    out: Any,
    first: int,
    last: int,
) -> None:
    """The general step, in int64: round and narrow the product, add, round and narrow the sum.

    `shifts` are the bits that rounding drops of products and of sums, of which one is 0; `ties` is a row of
    `rescale.TIES`. `narrowings` holds, of products and then of sums: bounds to clamp to, mask and sign bit to wrap
    with, and bounds beyond which there is zero. All three are applied, so that the loop has no branches; those that are
    not meant change nothing.
    """
    above, tie, tie_positive, tie_negative, tie_odd, negative = ties[0], ties[1], ties[2], ties[3], ties[4], ties[5]
    p_low, p_high, p_mask, p_sign, p_least, p_greatest = narrowings[0]
    low, high, mask, sign, least, greatest = narrowings[1]
    outputs = weights.shape[2]
    p_drop, drop = shifts[0], shifts[1]
    bits = p_drop | drop
    whole = np.int64(1) << bits
    for p in range(first, last):
        image = p // (height * width)
        at_pixel = starts[image] + (p // width - image * height) * row_step + (p % width) * pixel_step
        for g in range(groups):
            w = weights[which[image] * groups + g]
            at = at_pixel + g * group_step
            for o in range(outputs):
                acc[o] = bias[g * outputs + o] if bias_first else np.int64(0)
            for k in range(places.shape[0]):
                term, row = np.int64(x[at + places[k]]) - zeros[g, k], w[k]
                for o in range(outputs):
                    # What is rounded is the product, or the sum with the product's fraction bits.
                    value = term * np.int64(row[o]) + (acc[o] << drop) * (drop > 0)
                    floor = value >> bits
                    rest = value - (floor << bits)
                    missing = whole - rest
                    below = np.int64(floor < 0)
                    at_tie = tie | (tie_positive & (1 - below)) | (tie_negative & below) | (tie_odd & (floor & 1))
                    up = (above & (rest > missing)) | (at_tie & (rest == missing))
                    value = floor + (up | (negative & below & (rest != 0))) * (bits > 0)
                    product = min(max(value, p_low), p_high)
                    product = ((product & p_mask) ^ p_sign) - p_sign
                    product *= (product >= p_least) & (product <= p_greatest)
                    total = product + acc[o] * (drop == 0)
                    total = min(max(total, low), high)
                    total = ((total & mask) ^ sign) - sign
                    acc[o] = total * ((total >= least) & (total <= greatest))
            target = out[((p - first) * groups + g) * outputs :]
            for o in range(outputs):
                total = acc[o] + (np.int64(0) if bias_first else bias[g * outputs + o])
                total = min(max(total, low), high)
                total = ((total & mask) ^ sign) - sign
                target[o] = total if least <= total <= greatest else np.int64(0)
