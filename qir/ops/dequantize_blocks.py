"""4-bit weights, two a byte, with a float32 scale for each block: what weight-only quantization stores."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qir.errors import QirError
from qir.interval import Bounds
from qir.ir import FIXED_ONLY, Op, OpBounds
from qir.types import F32, U8, ElementType, Shape, shape_text

Tensor = npt.NDArray[Any]
_BITS = 4


class Packing(enum.StrEnum):
    """Which of the two 4-bit values of a byte comes first."""

    LOW_FIRST = "low_first"
    HIGH_FIRST = "high_first"


def pack(values: Tensor, packing: Packing) -> npt.NDArray[np.uint8]:
    """Signed 4-bit integers [n] as bytes [(n + 1) // 2]; the half that is over is zero."""
    nibbles = np.zeros(-(-values.size // 2) * 2, np.uint8)
    nibbles[: values.size] = values & 15
    first, second = nibbles[::2], nibbles[1::2]
    low, high = (first, second) if packing is Packing.LOW_FIRST else (second, first)
    return np.asarray(low | (high << 4), np.uint8)


def unpack(data: Tensor, count: int, packing: Packing) -> npt.NDArray[np.int8]:
    """The first `count` signed 4-bit integers of the bytes: the inverse of `pack`."""
    data = data.astype(np.uint8)
    pair = (data & 15, data >> 4) if packing is Packing.LOW_FIRST else (data >> 4, data & 15)
    nibbles = np.stack(pair, axis=1).reshape(-1)[:count].astype(np.int8)
    return np.asarray((nibbles ^ 8) - 8, np.int8)


@dataclass(frozen=True, eq=False, kw_only=True)
class DequantizeBlocks(Op):
    """`float32(q) * scale`, one product in float32: ONNX's DequantizeLinear with a block size.

    `data` holds the 4-bit integers of a tensor of `shape` in row-major order, two a byte, as `packing` says. `scale`
    has that shape, but one element for each `block` neighbours along `axis`.
    """

    mnemonic = "dequantize_blocks"
    stages = FIXED_ONLY
    operand_names = ("data", "scale")
    shape: tuple[int, ...]
    axis: int
    block: int
    packing: Packing

    def infer(self) -> tuple[Shape, ...]:
        """The stated shape. Raises QirError when data or scales do not fit it."""
        data, scale = (v.type.shape for v in self.operands)
        if not 0 <= self.axis < len(self.shape) or self.block < 1 or min(self.shape, default=0) < 0:
            raise QirError("the axis is one of the shape's, counted from the front, and a block has elements")
        count = int(np.prod(self.shape, dtype=np.int64))
        blocks = tuple(-(-d // self.block) if i == self.axis else d for i, d in enumerate(self.shape))
        if data != (-(-count // 2),) or scale != blocks:
            raise QirError(
                f"{shape_text(self.shape)} takes {-(-count // 2)} bytes and scales {shape_text(blocks)}, "
                f"not {shape_text(data)} and {shape_text(scale)}"
            )
        return (self.shape,)

    def infer_elements(self) -> tuple[ElementType, ...]:
        """float32."""
        return (F32,)

    def check(self) -> Iterator[str]:
        """Bytes and reals."""
        if self.operands[0].type.element != U8 or self.operands[1].type.element != F32:
            yield "data are of u8 and scales of f32"

    def eval_int(self, data: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """The definition of the op; the result is float32."""
        q = unpack(data, int(np.prod(self.shape, dtype=np.int64)), self.packing).reshape(self.shape)
        spread = np.repeat(scale, self.block, axis=self.axis).take(range(self.shape[self.axis]), axis=self.axis)
        return (q.astype(np.float32) * spread.astype(np.float32),)

    def bounds(self, operands: Sequence[Bounds]) -> OpBounds:
        """Reals have none."""
        return OpBounds((Bounds.of(0, 0),))
