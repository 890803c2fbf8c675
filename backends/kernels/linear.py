"""Convolution and matrix product on padded, centred samples; channels vectorize, taps and pixels are loops."""

from __future__ import annotations

import numpy as np
from numba import njit

from qir.backends.kernels.scalars import double_round, integer_form


@njit(nogil=True, cache=True)
def conv_pixels(x, weights, bias, stride_h, stride_w, dilation_h, dilation_w, groups, out):
    """Accumulators of one sample.

    x [H, W, C] padded and centred; weights [kh, kw, C / groups, O], O grouped; bias [O]; out [Ho, Wo, O], whose dtype
    is the accumulator: sums wrap at its width.
    """
    height, width, outputs = out.shape
    rows, columns, per_group = weights.shape[0], weights.shape[1], weights.shape[2]
    group_outputs = outputs // groups
    for i in range(height):
        for j in range(width):
            acc = out[i, j]
            acc[:] = bias
            for r in range(rows):
                for c in range(columns):
                    pixel = x[i * stride_h + r * dilation_h, j * stride_w + c * dilation_w]
                    for g in range(groups):
                        part = acc[g * group_outputs : (g + 1) * group_outputs]
                        for k in range(per_group):
                            value = pixel[g * per_group + k]
                            if value != 0:
                                row = weights[r, c, k, g * group_outputs : (g + 1) * group_outputs]
                                for o in range(group_outputs):
                                    part[o] += value * row[o]


@njit(nogil=True, cache=True)
def depthwise_pixels(x, weights, bias, stride_h, stride_w, dilation_h, dilation_w, out):
    """As `conv_pixels` for one input and one output channel a group; weights [kh, kw, C]."""
    height, width, channels = out.shape
    rows, columns = weights.shape[0], weights.shape[1]
    for i in range(height):
        for j in range(width):
            acc = out[i, j]
            acc[:] = bias
            for r in range(rows):
                for c in range(columns):
                    pixel = x[i * stride_h + r * dilation_h, j * stride_w + c * dilation_w]
                    row = weights[r, c]
                    for o in range(channels):
                        acc[o] += pixel[o] * row[o]


@njit(nogil=True, cache=True)
def rescale_double(acc, zero, multiplier, shift, new_zero, lo, hi, out):
    """Requantize rows [P, C] by `double_round`, one multiplier a channel, saturating to [lo, hi]."""
    for p in range(acc.shape[0]):
        row, target = acc[p], out[p]
        for c in range(row.shape[0]):
            value = double_round(np.int64(row[c]) - zero, multiplier[c], shift[c]) + new_zero
            target[c] = min(max(value, lo), hi)


@njit(nogil=True, cache=True)
def rescale_any(acc, zero, multiplier, shift, input_shift, form, rounding, new_zero, lo, hi, out):
    """As `rescale_double` for any integer form, after a left shift by `input_shift`."""
    for p in range(acc.shape[0]):
        row, target = acc[p], out[p]
        for c in range(row.shape[0]):
            centred = (np.int64(row[c]) - zero) << input_shift
            value = integer_form(centred, multiplier[c], shift[c], form, rounding) + new_zero
            target[c] = min(max(value, lo), hi)
