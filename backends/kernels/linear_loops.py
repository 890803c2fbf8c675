"""Compiled loops of sums of products over channels-last data. Sums are taken modulo 2^32 or 2^64, the width of `out`.

Modulo a power of two, sums may be taken in any order and zero points moved into the bias: the bits of the result are
those of any order, whenever the true result fits or the accumulator wraps.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from qir.backends.kernels.jit import kernel

#: Neighbouring pixels of a row that are summed together: the innermost loop then starts without checks of its own, and
#: weights are read once for all of them.
_BLOCK: Final = 32


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
    width_out = groups * outputs
    p = first
    while p < last:
        image, column = p // (height * width), p % width
        count = min(width - column, last - p, _BLOCK)
        pixel = starts[image] + (p // width - image * height) * row_step + column * pixel_step
        for g in range(groups):
            w = weights[which[image] * groups + g]
            acc = out[(p - first) * width_out + g * outputs :]
            for i in range(count):
                for o in range(outputs):
                    acc[i * width_out + o] = bias[g * outputs + o]
            at = pixel + g * group_step
            for k in range(0, places.shape[0], 4):
                at0, at1, at2, at3 = at + places[k], at + places[k + 1], at + places[k + 2], at + places[k + 3]
                w0, w1, w2, w3 = w[k], w[k + 1], w[k + 2], w[k + 3]
                for i in range(count):
                    move = i * pixel_step
                    x0, x1, x2, x3 = (
                        number(x[at0 + move]),
                        number(x[at1 + move]),
                        number(x[at2 + move]),
                        number(x[at3 + move]),
                    )
                    target = acc[i * width_out : i * width_out + outputs]
                    for o in range(outputs):
                        near = number(number(x0 * number(w0[o])) + number(x1 * number(w1[o])))
                        far = number(number(x2 * number(w2[o])) + number(x3 * number(w3[o])))
                        target[o] = number(target[o] + number(near + far))
        p += count


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
    p = first
    while p < last:
        image, column = p // (height * width), p % width
        count = min(width - column, last - p, _BLOCK)
        pixel = starts[image] + (p // width - image * height) * row_step + column * pixel_step
        acc = out[(p - first) * channels : (p - first + count) * channels]
        for i in range(count):
            for c in range(channels):
                acc[i * channels + c] = bias[c]
        for k in range(0, places.shape[0], 3):
            w0, w1, w2 = weights[k], weights[k + 1], weights[k + 2]
            for i in range(count):
                at = pixel + i * pixel_step
                at0, at1, at2 = at + places[k], at + places[k + 1], at + places[k + 2]
                x0, x1, x2 = x[at0 : at0 + channels], x[at1 : at1 + channels], x[at2 : at2 + channels]
                target = acc[i * channels : (i + 1) * channels]
                for c in range(channels):
                    near = number(number(x0[c]) * number(w0[c]) + number(x1[c]) * number(w1[c]))
                    target[c] = number(target[c] + number(near + number(number(x2[c]) * number(w2[c]))))
        p += count


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


@kernel
def wrap_flat(x: Any, mask: int, sign: int, out: Any) -> None:
    """The low bits of `mask`, read as two's complement with the sign bit `sign`, or as unsigned where that is 0."""
    for i in range(x.shape[0]):
        out[i] = ((np.int64(x[i]) & mask) ^ sign) - sign
