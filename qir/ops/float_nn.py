"""Float ops with weights: Conv, MatMul and BatchNormalization."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qir.errors import QirError
from qir.interval import Interval
from qir.opdef import broadcast_shapes, known_dim, pad_spatial, window_view
from qir.ops.float_base import Clipped, FloatOp, Tensor, Windowed, tap_views
from qir.types import BATCH, Shape, shape_text

_BUFFER_BYTES = 64 << 20  # what one im2col buffer may take


@dataclass(frozen=True, eq=False, kw_only=True)
class Summing(Clipped):
    """Base: an op that sums products. `unclipped` = [lo, hi] is what calibration saw before the fused activation."""

    unclipped: tuple[float, ...] | None = None

    def check(self) -> Iterator[str]:
        """The range before an activation is a pair in order, and there is one."""
        yield from super().check()
        seen = self.unclipped
        if seen is not None and (self.clip is None or len(seen) != 2 or not seen[0] <= seen[1]):
            yield f"unclipped takes [lo, hi] with lo <= hi, and belongs to clip, not {list(seen)}"

    @property
    def sum_range(self) -> Interval | None:
        """The calibrated range of the sums, or None without calibration."""
        if self.unclipped is None:
            return self.result.range
        return Interval(*(float(end) for end in self.unclipped))


@dataclass(frozen=True, eq=False, kw_only=True)
class Conv(Summing, Windowed):
    """Convolution, 1-d or 2-d: input [N, C, spatial], weight [M, C/groups, kernel], bias [M]."""

    mnemonic = "Conv"
    has_tolerance = True
    operand_names = ("input", "weight", "bias?")
    groups: int

    def kernel_shape(self) -> tuple[int, ...]:
        """The spatial size of the weight."""
        return tuple(known_dim(d, "a kernel dimension") for d in self.operands[1].type.shape[2:])

    def infer(self) -> tuple[Shape, ...]:
        """[N, M, outputs]. Raises QirError when channels, groups, bias or window do not fit."""
        source, weight = self.operands[0].type.shape, self.operands[1].type.shape
        spatial = self.spatial_output()
        outputs, per_group = (known_dim(d, "a weight dimension") for d in weight[:2])
        channels = known_dim(source[1], "the channels")
        if self.groups < 1 or channels != per_group * self.groups or outputs % self.groups:
            raise QirError(
                f"{channels} input channels and weight {shape_text(weight)} do not fit {self.groups} groups: "
                f"the weight is [M, C / groups, kernel] with M a multiple of groups"
            )
        bias = self.optional_operand(2)
        if bias is not None and bias.type.shape != (outputs,):
            raise QirError(f"the bias has shape {shape_text(bias.type.shape) or 'scalar'}, not {outputs}")
        return ((source[0], outputs, *spatial),)

    def macs(self) -> int:
        """Every output element takes C / groups times the kernel."""
        weight = self.operands[1].type
        return self.result.type.sample_size * math.prod(weight.concrete(1)[1:])

    def compute(self, *arrays: Tensor) -> Tensor:
        """Matrix products over unrolled windows; tap by tap where each group has one input channel."""
        x, weight = arrays[:2]
        outputs = self.window.output(x.shape[2:])
        result = np.empty((x.shape[0], weight.shape[0], *outputs), np.float32)
        depthwise = weight.shape[1] == 1
        columns = 1 if depthwise else math.prod(weight.shape[2:])
        sample = 4 * max(1, x.shape[1] * columns * math.prod(outputs))
        chunk = max(1, _BUFFER_BYTES // sample)
        compute = self._depthwise if depthwise else self._grouped
        for start in range(0, x.shape[0], chunk):
            compute(x[start : start + chunk], weight, result[start : start + chunk])
        if len(arrays) > 2:
            result += arrays[2].reshape(-1, *[1] * len(outputs))
        return self.clipped(result)

    def _depthwise(self, x: Tensor, weight: Tensor, result: Tensor) -> None:
        multiplier, rank = weight.shape[0] // self.groups, len(self.strides)
        grouped = result.reshape(x.shape[0], self.groups, multiplier, *result.shape[2:])
        factors = weight.reshape(self.groups, multiplier, *[1] * rank, -1)
        grouped[...] = 0
        for tap, view in enumerate(tap_views(x, self.window, result.shape[2:], 0.0)):
            grouped += view[:, :, None] * factors[..., tap]

    def _grouped(self, x: Tensor, weight: Tensor, result: Tensor) -> None:
        batch, groups, outputs = x.shape[0], self.groups, result.shape[2:]
        rank = len(outputs)
        if math.prod(weight.shape[2:]) == 1 and not any(self.pads) and set(self.strides) == {1}:
            columns = x  # a pointwise convolution is a matrix product as it stands
        else:
            window = self.window
            view = window_view(pad_spatial(x, window, x.shape[2:], outputs, 2, 0.0), window, outputs, 2)
            columns = view.transpose(0, 1, *range(2 + rank, 2 + 2 * rank), *range(2, 2 + rank))
        flat = columns.reshape(batch, groups, -1, math.prod(outputs))
        matrix = weight.reshape(groups, weight.shape[0] // groups, -1)
        np.matmul(matrix, flat, out=result.reshape(batch, groups, matrix.shape[1], -1))


@dataclass(frozen=True, eq=False, kw_only=True)
class MatMul(Summing):
    """NumPy's matrix product of operands of rank 2 and more, plus a bias [columns]."""

    mnemonic = "MatMul"
    has_tolerance = True
    operand_names = ("a", "b", "bias?")

    def infer(self) -> tuple[Shape, ...]:
        """[..., rows, columns]. Raises QirError when the operands do not fit or the batch would move."""
        a, b = (v.type.shape for v in self.operands[:2])
        if len(a) < 2 or len(b) < 2:
            raise QirError(f"takes operands of rank 2 and more, not {shape_text(a)} and {shape_text(b)}")
        if a[-1] != b[-2] or BATCH in (a[-1], b[-2], b[-1]):
            raise QirError(
                f"{shape_text(a)} and {shape_text(b)} do not multiply: columns and rows differ, or are the batch"
            )
        result = (*broadcast_shapes([a[:-2], b[:-2]]), a[-2], b[-1])
        if BATCH in result[1:]:
            raise QirError(
                f"{shape_text(a)} times {shape_text(b)} moves the open batch N; fix the batch size at import"
            )
        bias = self.optional_operand(2)
        if bias is not None and bias.type.shape != (b[-1],):
            raise QirError(f"the bias has shape {shape_text(bias.type.shape) or 'scalar'}, not {b[-1]}")
        return (result,)

    def macs(self) -> int:
        """Every output element takes the common dimension."""
        return self.result.type.sample_size * known_dim(self.operands[1].type.shape[-2], "the common dimension")

    def compute(self, *arrays: Tensor) -> Tensor:
        """NumPy's matmul."""
        result = np.matmul(arrays[0], arrays[1])
        if len(arrays) > 2:
            result += arrays[2]
        return self.clipped(result)


@dataclass(frozen=True, eq=False, kw_only=True)
class BatchNormalization(FloatOp):
    """`(x - mean) / sqrt(variance + epsilon) * scale + bias` along axis 1."""

    mnemonic = "BatchNormalization"
    operand_names = ("input", "scale", "bias", "mean", "variance")
    epsilon: float

    def infer(self) -> tuple[Shape, ...]:
        """The shape of the input. Raises QirError when a parameter is not one number per channel."""
        shape = self.operands[0].type.shape
        if len(shape) < 2:
            raise QirError(f"takes [N, C, ...], not an operand of rank {len(shape)}")
        for name, value in zip(self.operand_names[1:], self.operands[1:], strict=True):
            if value.type.shape != (shape[1],):
                raise QirError(
                    f"{name} has shape {shape_text(value.type.shape) or 'scalar'}, the input {shape[1]} channels"
                )
        return (shape,)

    def check(self) -> Iterator[str]:
        """Epsilon is not negative."""
        yield from super().check()
        if not self.epsilon >= 0:
            yield f"epsilon is at least 0, not {self.epsilon}"

    def compute(self, *arrays: Tensor) -> Tensor:
        """The formula, with the parameters merged into one factor per channel."""
        x = arrays[0]
        scale, bias, mean, variance = (a.reshape(-1, *[1] * (x.ndim - 2)) for a in arrays[1:])
        return (x - mean) * (scale / np.sqrt(variance + np.float32(self.epsilon))) + bias
