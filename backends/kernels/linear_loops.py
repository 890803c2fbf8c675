"""Compiled loops of sums of products over channels-last data. Sums are taken modulo 2^32 or 2^64, the width of `out`.

Modulo a power of two, sums may be taken in any order and zero points moved into the bias: the bits of the result are
those of any order, whenever the true result fits or the accumulator wraps.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qir.backends.kernels.jit import kernel


@kernel
def contract(
    x: Any,
    starts: Any,
    which: Any,
    runs: Any,
    length: int,
    weights: Any,
    bias: Any,
    bias_step: int,
    groups: int,
    group_step: int,
    height: int,
    width: int,
    row_step: int,
    pixel_step: int,
    out: Any,
    first: int,
    last: int,
) -> None:
    """`out[p - first, g * O + o] = bias[o] + sum(x[base(p) + g * group_step + runs[r] + j] * w[r * length + j, o])`.

    Output pixels `p` in [first, last) count over images, rows and columns; image `n` starts at `starts[n]` of the flat
    `x` and takes the weights `weights[which[n] * groups + g]`, [K, O]. `out` is flat, `groups * O` values a pixel.
    """
    sum_type = out.dtype.type
    outputs = weights.shape[2]
    for p in range(first, last):
        image = p // (height * width)
        row = p // width - image * height
        base = starts[image] + row * row_step + (p % width) * pixel_step
        for g in range(groups):
            index = which[image] * groups + g
            w = weights[index]
            begin = ((p - first) * groups + g) * outputs
            acc = out[begin : begin + outputs]
            initial = bias[index * bias_step]
            for o in range(outputs):
                acc[o] = initial[o]
            for r in range(runs.shape[0]):
                place = base + g * group_step + runs[r]
                k = r * length
                stop = k + length
                while k + 4 <= stop:
                    x0, x1 = sum_type(x[place]), sum_type(x[place + 1])
                    x2, x3 = sum_type(x[place + 2]), sum_type(x[place + 3])
                    w0, w1, w2, w3 = w[k], w[k + 1], w[k + 2], w[k + 3]
                    for o in range(outputs):
                        near = sum_type(sum_type(x0 * sum_type(w0[o])) + sum_type(x1 * sum_type(w1[o])))
                        far = sum_type(sum_type(x2 * sum_type(w2[o])) + sum_type(x3 * sum_type(w3[o])))
                        acc[o] = sum_type(acc[o] + sum_type(near + far))
                    k += 4
                    place += 4
                while k < stop:
                    x0, w0 = sum_type(x[place]), w[k]
                    for o in range(outputs):
                        acc[o] = sum_type(acc[o] + sum_type(x0 * sum_type(w0[o])))
                    k += 1
                    place += 1


@kernel
def contract_depthwise(
    x: Any,
    starts: Any,
    taps: Any,
    weights: Any,
    bias: Any,
    height: int,
    width: int,
    row_step: int,
    pixel_step: int,
    out: Any,
    first: int,
    last: int,
) -> None:
    """`out[p - first, c] = bias[c] + sum over t of x[base(p) + taps[t] + c] * weights[t, c]`.

    As `contract`, with every channel on its own. The number of taps is a multiple of 3; those added have weight 0.
    """
    sum_type = out.dtype.type
    channels = weights.shape[1]
    for p in range(first, last):
        image = p // (height * width)
        row = p // width - image * height
        base = starts[image] + row * row_step + (p % width) * pixel_step
        begin = (p - first) * channels
        acc = out[begin : begin + channels]
        for c in range(channels):
            acc[c] = bias[c]
        for t in range(0, taps.shape[0], 3):
            x0 = x[base + taps[t] : base + taps[t] + channels]
            x1 = x[base + taps[t + 1] : base + taps[t + 1] + channels]
            x2 = x[base + taps[t + 2] : base + taps[t + 2] + channels]
            w0, w1, w2 = weights[t], weights[t + 1], weights[t + 2]
            for c in range(channels):
                near = sum_type(sum_type(x0[c]) * sum_type(w0[c])) + sum_type(sum_type(x1[c]) * sum_type(w1[c]))
                acc[c] = sum_type(acc[c] + sum_type(near + sum_type(sum_type(x2[c]) * sum_type(w2[c]))))


@kernel
def sum_middle(x: Any, offset: int, out: Any) -> None:
    """`out[i, j] = offset + sum over m of x[i, m, j]`."""
    sum_type = out.dtype.type
    initial = sum_type(offset)
    for i in range(x.shape[0]):
        acc = out[i]
        for j in range(x.shape[2]):
            acc[j] = initial
        for m in range(x.shape[1]):
            row = x[i, m]
            for j in range(x.shape[2]):
                acc[j] = sum_type(acc[j] + sum_type(row[j]))
