"""Compiled loops of sums of products over channels-last data. Sums are taken modulo 2^32 or 2^64, the width of `out`.

Modulo a power of two, sums may be taken in any order and zero points moved into the bias: the bits of the result are
those of any order, whenever the true result fits or the accumulator wraps.
"""

from __future__ import annotations

from typing import Any

from qir.backends.kernels.jit import kernel


@kernel
def contract(
    x: Any,
    starts: Any,
    which: Any,
    height: int,
    width: int,
    row_step: int,
    pixel_step: int,
    group_step: int,
    places: Any,
    weights: Any,
    bias: Any,
    groups: int,
    out: Any,
    first: int,
    last: int,
) -> None:
    """`out[p - first, g * O + o] = bias[g * O + o] + sum over k of x[at(p) + g * group_step + places[k]] * w[k, o]`.

    Output pixels `p` in [first, last) count over images, rows and columns: `at(p)` is `starts[image] + row * row_step +
    column * pixel_step` in the flat `x`. Image `i` takes the weights `w = weights[which[i] * groups + g]`, [K, O], with
    K a multiple of 4. `out` is flat, `groups * O` values a pixel.
    """
    number = out.dtype.type
    outputs = weights.shape[2]
    for p in range(first, last):
        image = p // (height * width)
        row = p // width - image * height
        pixel = starts[image] + row * row_step + (p % width) * pixel_step
        for g in range(groups):
            w = weights[which[image] * groups + g]
            begin = ((p - first) * groups + g) * outputs
            acc = out[begin : begin + outputs]
            initial = bias[g * outputs : (g + 1) * outputs]
            for o in range(outputs):
                acc[o] = initial[o]
            at = pixel + g * group_step
            for k in range(0, places.shape[0], 4):
                x0, x1 = number(x[at + places[k]]), number(x[at + places[k + 1]])
                x2, x3 = number(x[at + places[k + 2]]), number(x[at + places[k + 3]])
                w0, w1, w2, w3 = w[k], w[k + 1], w[k + 2], w[k + 3]
                for o in range(outputs):
                    near = number(number(x0 * number(w0[o])) + number(x1 * number(w1[o])))
                    far = number(number(x2 * number(w2[o])) + number(x3 * number(w3[o])))
                    acc[o] = number(acc[o] + number(near + far))


@kernel
def contract_depthwise(
    x: Any,
    starts: Any,
    height: int,
    width: int,
    row_step: int,
    pixel_step: int,
    places: Any,
    weights: Any,
    bias: Any,
    out: Any,
    first: int,
    last: int,
) -> None:
    """`out[p - first, c] = bias[c] + sum over k of x[at(p) + places[k] + c] * weights[k, c]`; see `contract`.

    The number of places is a multiple of 3.
    """
    number = out.dtype.type
    channels = weights.shape[1]
    for p in range(first, last):
        image = p // (height * width)
        row = p // width - image * height
        pixel = starts[image] + row * row_step + (p % width) * pixel_step
        begin = (p - first) * channels
        acc = out[begin : begin + channels]
        for c in range(channels):
            acc[c] = bias[c]
        for k in range(0, places.shape[0], 3):
            at0, at1, at2 = pixel + places[k], pixel + places[k + 1], pixel + places[k + 2]
            x0, x1, x2 = x[at0 : at0 + channels], x[at1 : at1 + channels], x[at2 : at2 + channels]
            w0, w1, w2 = weights[k], weights[k + 1], weights[k + 2]
            for c in range(channels):
                near = number(number(x0[c]) * number(w0[c]) + number(x1[c]) * number(w1[c]))
                acc[c] = number(acc[c] + number(near + number(number(x2[c]) * number(w2[c]))))


@kernel
def sum_middle(x: Any, offset: int, out: Any) -> None:
    """`out[i, j] = offset + sum over m of x[i, m, j]`."""
    number = out.dtype.type
    for i in range(x.shape[0]):
        acc = out[i]
        for j in range(x.shape[2]):
            acc[j] = number(offset)
        for m in range(x.shape[1]):
            row = x[i, m]
            for j in range(x.shape[2]):
                acc[j] = number(acc[j] + number(row[j]))
