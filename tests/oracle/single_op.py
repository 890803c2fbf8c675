"""Models of one quantized operator, for any runtime that reads .tflite files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from oracle.tflite_writer import ModelWriter

from qir import integer_functions as functions
from qir.fixed_point import RequantizeForm, requantize, saturate

Array = npt.NDArray[Any]
F32 = np.float32
WINDOW: dict[str, Any] = {"padding": "VALID", "stride_h": 1, "stride_w": 1}
UNDILATED: dict[str, Any] = {"dilation_h_factor": 1, "dilation_w_factor": 1}
#: What each fused activation clamps to, in reals.
ACTIVATIONS: dict[str, tuple[float, float]] = {
    "NONE": (-np.inf, np.inf),
    "RELU": (0.0, np.inf),
    "RELU6": (0.0, 6.0),
    "RELU_N1_TO_1": (-1.0, 1.0),
}


class Quantized(NamedTuple):
    """How a tensor stores reals: `scale * (integer - zero_point)`."""

    scale: float
    zero_point: int = 0
    dtype: npt.DTypeLike = np.int8


def one_op(
    kind: str,
    inputs: Sequence[tuple[Sequence[int], Quantized]],
    output: tuple[Sequence[int], Quantized],
    constants: Sequence[Array] = (),
    **options: Any,
) -> bytes:
    """A model of one operator; each tensor is given as (shape, quantization), its int32 constants come last."""
    model = ModelWriter()
    sources = [model.tensor(f"x{i}", shape, q.dtype, q.scale, q.zero_point) for i, (shape, q) in enumerate(inputs)]
    fixed = [model.tensor(f"c{i}", data.shape, data.dtype, data=data) for i, data in enumerate(constants)]
    shape, q = output
    result = model.tensor("y", shape, q.dtype, q.scale, q.zero_point)
    model.operator(kind, [*sources, *fixed], [result], **options)
    return model.finish(sources, [result])


def linear_op(
    kind: str,
    source: tuple[Sequence[int], Quantized],
    weights: Array,
    weight_scale: npt.ArrayLike,
    bias: Array | None,
    output: tuple[Sequence[int], Quantized],
    **options: Any,
) -> bytes:
    """A convolution, depthwise convolution or fully connected op, per channel where there are several scales."""
    model = ModelWriter()
    fully_connected, depthwise = kind == "FULLY_CONNECTED", kind == "DEPTHWISE_CONV_2D"
    (shape, q), (out_shape, out) = source, output
    scales = np.asarray(weight_scale, F32)
    operands = [
        model.tensor("x", shape, q.dtype, q.scale, q.zero_point),
        model.tensor("w", weights.shape, np.int8, scales, 0, 3 if depthwise else 0, weights),
    ]
    if bias is not None:
        operands.append(model.tensor("b", bias.shape, bias.dtype, scales * F32(q.scale), 0, 0, bias))
    elif fully_connected:
        operands.append(-1)
    result = model.tensor("y", out_shape, out.dtype, out.scale, out.zero_point)
    if not fully_connected:
        options = (
            WINDOW | UNDILATED | ({"depth_multiplier": weights.shape[3] // shape[3]} if depthwise else {}) | options
        )
    model.operator(kind, operands, [result], **options)
    return model.finish(operands[:1], [result])


def biased_op(
    kind: str, source: Quantized, weight_scale: npt.ArrayLike, bias: Array, output: Quantized
) -> tuple[bytes, tuple[int, ...]]:
    """A linear op whose weights are zero, so that the bias is the accumulator; the model and the shape of its input."""
    count, depthwise, fully_connected = bias.size, kind == "DEPTHWISE_CONV_2D", kind == "FULLY_CONNECTED"
    lead = (1,) if fully_connected else (1, 1, 1)
    shape = (*lead, count if depthwise else 1)
    weight_shape = (1, 1, 1, count) if depthwise else (count, *lead)
    weights = np.zeros(weight_shape, np.int8)
    return linear_op(kind, (shape, source), weights, weight_scale, bias, ((*lead, count), output)), shape


def patches(x: Array, size: int, stride: int, padding: str, fill: int = 0) -> Array:
    """NHWC -> N, out_h, out_w, C, size, size; SAME pads the smaller half before."""
    if padding == "SAME":
        totals = [max((-(-length // stride) - 1) * stride + size - length, 0) for length in x.shape[1:3]]
        x = np.pad(x, [(0, 0), *((t // 2, t - t // 2) for t in totals), (0, 0)], constant_values=fill)
    return np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))[:, ::stride, ::stride]


def accumulate(
    kind: str, x: Array, weights: Array, bias: Array | None, stride: int = 1, padding: str = "VALID"
) -> Array:
    """The exact accumulators of a linear op over inputs whose zero point was taken off."""
    wide, w = x.astype(np.int64), weights.astype(np.int64)
    if kind == "FULLY_CONNECTED":
        acc = wide @ w.T
    elif kind == "CONV_2D":
        acc = np.einsum("nhwcij,oijc->nhwo", patches(wide, w.shape[1], stride, padding), w)
    else:
        view = patches(wide, w.shape[1], stride, padding)
        taps = w[0].reshape(*w.shape[1:3], x.shape[3], -1)
        acc = np.einsum("nhwcij,ijcm->nhwcm", view, taps)
        acc = acc.reshape(*acc.shape[:3], -1)
    return acc if bias is None else acc + bias.astype(np.int64)


def activation_bounds(activation: str, q: Quantized) -> tuple[int, int]:
    """Where a fused activation clamps: the bounds of the type, or nearer."""
    limits = np.iinfo(q.dtype)
    low, high = ACTIVATIONS[activation]
    lo = limits.min if np.isinf(low) else max(limits.min, functions.quantized_bound(low, q.scale, q.zero_point))
    return lo, limits.max if np.isinf(high) else min(limits.max, functions.quantized_bound(high, q.scale, q.zero_point))


def rescaled(
    acc: Array, factor: tuple[Any, Any], q: Quantized, form: RequantizeForm, activation: str = "NONE"
) -> Array:
    """What is stored for these accumulators."""
    return np.asarray(saturate(requantize(acc, *factor, form) + q.zero_point, *activation_bounds(activation, q)))
