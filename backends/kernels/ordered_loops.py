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

_SATURATE, _WRAP, _ZERO = 0, 1, 2


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

    In the arithmetic of `acc` [O] and `weights`, float64, which is exact for integers below 2^53.
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
            if clamps_products:
                for k in range(places.shape[0]):
                    term, row = np.float64(x[at + places[k]]) - zeros[g, k], w[k]
                    for o in range(outputs):
                        product = term * row[o]
                        product = p_low if product < p_low else product
                        product = p_high if product > p_high else product
                        total = acc[o] + product
                        total = low if total < low else total
                        acc[o] = high if total > high else total
            else:
                for k in range(places.shape[0]):
                    term, row = np.float64(x[at + places[k]]) - zeros[g, k], w[k]
                    for o in range(outputs):
                        total = acc[o] + term * row[o]
                        total = low if total < low else total
                        acc[o] = high if total > high else total
            target = out[((p - first) * groups + g) * outputs :]
            for o in range(outputs):
                total = acc[o]
                if not bias_first:
                    total += bias[g * outputs + o]
                    total = low if total < low else total
                    total = high if total > high else total
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

    `shifts` are the bits that rounding drops of products and of sums; `ties` is a row of `rescale.TIES`. `narrowings`
    holds mode, low, high, mask and sign of products, then of sums: mode 0 clamps to [low, high], 1 keeps the bits of
    `mask` read with `sign`, 2 makes what leaves [low, high] zero.
    """
    above, tie, tie_positive, tie_negative, tie_odd, negative = ties[0], ties[1], ties[2], ties[3], ties[4], ties[5]
    outputs = weights.shape[2]
    p_drop, drop = shifts[0], shifts[1]
    for p in range(first, last):
        image = p // (height * width)
        at_pixel = starts[image] + (p // width - image * height) * row_step + (p % width) * pixel_step
        for g in range(groups):
            w = weights[which[image] * groups + g]
            at = at_pixel + g * group_step
            for o in range(outputs):
                acc[o] = bias[g * outputs + o] if bias_first else np.int64(0)
            # One more turn than there are places: the last brings in the bias, or only narrows once more.
            for k in range(places.shape[0] + 1):
                is_last = k == places.shape[0]
                term = np.int64(0) if is_last else np.int64(x[at + places[k]]) - zeros[g, k]
                row = w[0] if is_last else w[k]
                for o in range(outputs):
                    if is_last:
                        total = acc[o] + (np.int64(0) if bias_first else bias[g * outputs + o])
                    else:
                        product = term * np.int64(row[o])
                        total = (acc[o] << drop) + product
                        value = product if p_drop else total
                        bits = p_drop | drop
                        floor = value >> bits
                        rest = value - (floor << bits)
                        missing = (np.int64(1) << bits) - rest
                        below = np.int64(1 if floor < 0 else 0)
                        up = tie | (tie_positive & (1 - below)) | (tie_negative & below) | (tie_odd & (floor & 1))
                        up = above if rest > missing else (up if rest == missing else np.int64(0))
                        up |= negative & below & np.int64(1 if rest != 0 else 0)
                        value = floor + (up if bits else np.int64(0))
                        if p_drop or not drop:
                            product = value if p_drop else product
                            if narrowings[0] == _SATURATE:
                                product = min(max(product, narrowings[1]), narrowings[2])
                            elif narrowings[0] == _WRAP:
                                product = ((product & narrowings[3]) ^ narrowings[4]) - narrowings[4]
                            elif product < narrowings[1] or product > narrowings[2]:
                                product = np.int64(0)
                            total = acc[o] + product
                        else:
                            total = value
                    if narrowings[5] == _SATURATE:
                        total = min(max(total, narrowings[6]), narrowings[7])
                    elif narrowings[5] == _WRAP:
                        total = ((total & narrowings[8]) ^ narrowings[9]) - narrowings[9]
                    elif total < narrowings[6] or total > narrowings[7]:
                        total = np.int64(0)
                    acc[o] = total
            target = out[((p - first) * groups + g) * outputs :]
            for o in range(outputs):
                target[o] = acc[o]
