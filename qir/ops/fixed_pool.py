"""Integer pooling over NHWC maps and softmax over rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qir.errors import QirError
from qir.fixed_point import Rounding, round_divide
from qir.integer_functions import SOFTMAX_ROW_LIMIT, SoftmaxParameters, softmax
from qir.interval import Bounds, Interval
from qir.ir import FIXED_ONLY, Op, OpBounds
from qir.opdef import Window, known_dim, pad_spatial, window_view
from qir.ops.accumulate import bits_of, integer_operands
from qir.types import S8, ElementType, Shape, storage_of

Tensor = npt.NDArray[Any]


@dataclass(frozen=True, eq=False, kw_only=True)
class Pool2d(Op):
    """Base of pooling: windows over NHWC, in which padding never counts."""

    stages = FIXED_ONLY
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    dilations: tuple[int, ...]

    @property
    def window(self) -> Window:
        """The sliding window."""
        return Window(self.kernel, self.strides, self.pads, self.dilations)

    def infer(self) -> tuple[Shape, ...]:
        """[N, Ho, Wo, C]. Raises QirError when the window does not fit."""
        shape = self.operands[0].type.shape
        if len(shape) != 4:
            raise QirError("pooling takes an NHWC input")
        return ((shape[0], *self.window.output(shape[1:3]), shape[3]),)

    def infer_elements(self) -> tuple[ElementType, ...]:
        """The operand's: pooling keeps scale and zero point."""
        return (self.operands[0].type.element,)

    def check(self) -> Iterator[str]:
        """The type is kept and every window holds a real element."""
        yield from integer_operands(self)
        if self.result.type.element != self.operands[0].type.element:
            yield "the result must have the operand's type; requantize it first"
        spatial = [known_dim(d, "a spatial dimension") for d in self.operands[0].type.shape[1:3]]
        outputs = self.window.output(spatial)
        if any(not self.window.taps(a, spatial[a], outputs[a]).any(axis=1).all() for a in range(2)):
            yield "a window lies wholly on padding"

    def windows(self, x: Tensor, fill: int) -> Tensor:
        """[N, Ho, Wo, C, kh, kw]."""
        outputs = self.window.output(x.shape[1:3])
        return window_view(pad_spatial(x, self.window, x.shape[1:3], outputs, 1, fill), self.window, outputs, 1)

    def bounds(self, operands: Sequence[Bounds]) -> OpBounds:
        """The operand's."""
        return OpBounds((operands[0],))


class FixedMaxPool(Pool2d):
    """The greatest element of each window."""

    mnemonic = "max_pool2d"

    def intermediate_bits(self) -> int:
        """Nothing is computed."""
        return bits_of(self.operands[0].type)

    def eval_int(self, x: Tensor) -> tuple[Tensor, ...]:
        """The definition of the op."""
        storage = storage_of(self.operands[0].type.element)
        assert storage is not None
        return (self.windows(x, storage.lo).max(axis=(4, 5)),)

    def asked(self, demand: Bounds, operands: Sequence[Bounds]) -> tuple[Bounds, ...]:
        """What is asked of the result: a maximum of clamped elements is the clamped maximum."""
        return (demand,)


@dataclass(frozen=True, eq=False, kw_only=True)
class FixedAveragePool(Pool2d):
    """The sum of each window's real elements divided by their number, rounded by `rounding`."""

    mnemonic = "average_pool2d"
    rounding: Rounding

    def intermediate_bits(self) -> int:
        """The longest sum."""
        return bits_of(self.operands[0].type) + int(np.prod(self.kernel)).bit_length() + 1

    def eval_int(self, x: Tensor) -> tuple[Tensor, ...]:
        """The definition of the op."""
        outputs = self.window.output(x.shape[1:3])
        rows, columns = (self.window.taps(a, x.shape[1 + a], outputs[a]).sum(axis=1) for a in range(2))
        counts = (rows[:, None] * columns[None, :]).astype(np.int64)[None, :, :, None]
        return (round_divide(self.windows(x, 0).sum(axis=(4, 5)), counts, self.rounding),)

    def bounds(self, operands: Sequence[Bounds]) -> OpBounds:
        """The operand's, without its steps: no average leaves the hull of its elements."""
        x, most = operands[0], int(np.prod(self.kernel))
        whole = x.hull
        lanes = {"sum": Interval(min(whole.lo, 0) * most, max(whole.hi, 0) * most)}
        return OpBounds((Bounds(x.lo, x.hi),), lanes=lanes)


@dataclass(frozen=True, eq=False, kw_only=True)
class FixedSoftmax(Op):
    """TensorFlow Lite's int8 softmax over the last axis, scale 1/256 and zero point -128 at the result.

    The attributes are those of `qir.integer_functions.prepare_softmax`; `softmax` there is the definition.
    """

    mnemonic = "softmax"
    stages = FIXED_ONLY
    multiplier: int
    left_shift: int
    diff_min: int

    @property
    def parameters(self) -> SoftmaxParameters:
        """The attributes as the algorithm takes them."""
        return SoftmaxParameters(self.multiplier, self.left_shift, self.diff_min)

    def infer(self) -> tuple[Shape, ...]:
        """The operand's shape. Raises QirError when a row is too long for the 12 integer bits of its sum."""
        shape = self.operands[0].type.shape
        if not shape or known_dim(shape[-1], "the axis of a softmax") >= SOFTMAX_ROW_LIMIT:
            raise QirError(f"an integer softmax takes rows of fewer than {SOFTMAX_ROW_LIMIT} elements")
        return (shape,)

    def check(self) -> Iterator[str]:
        """8 bits in and out; the operand may be narrowed."""
        source = storage_of(self.operands[0].type.element)
        if source is None or source.base_name != "s8" or storage_of(self.result.type.element) != S8:
            yield "this softmax is defined for s8 in and out"
        if not (0 <= self.multiplier < 1 << 31 and 0 <= self.left_shift <= 31 and -(1 << 31) < self.diff_min <= 0):
            yield "the multiplier is in [0, 2^31), the left shift in [0, 31] and the least difference in (-2^31, 0]"

    def intermediate_bits(self) -> int:
        """Products of two 32-bit registers."""
        return 63

    def eval_int(self, x: Tensor) -> tuple[Tensor, ...]:
        """The definition of the op."""
        rows = softmax(x.astype(np.int64), self.parameters)
        return (rows.astype(x.dtype),)

    def bounds(self, operands: Sequence[Bounds]) -> OpBounds:
        """The whole of s8."""
        return OpBounds((Bounds.of(S8.lo, S8.hi),))
