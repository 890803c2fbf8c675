"""Products whose weights alone are quantized, block by block: dequantized, then multiplied in floating point."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qir.arrays import Array
from qir.ir import Op, Value
from qir.ops.dequantize_blocks import DequantizeBlocks, pack
from qir.passes.lowering.context import Lowering, NoIntegerForm
from qir.target import Target
from qir.types import TensorType, integer, storage_of


def uses_weights_alone(target: Target, weight: Value) -> bool:
    """Whether these weights have a width that the target has for weights alone."""
    contract, storage = target.weight_only, storage_of(weight.type.element)
    return contract is not None and storage is not None and storage.bits in contract.bits


def lower_weight_only(b: Lowering, op: Op) -> None:
    """The op as a float island that reads weights from `dequantize_blocks`: its last bits are the host's."""
    contract, weight = b.target.weight_only, op.operands[1]
    if contract is None or weight not in b.graph.constants:
        raise NoIntegerForm("weights that are quantized alone must be constant")
    data = b.graph.constants[weight].data
    axis = block_axis(op)
    integers, scales = quantize_blocks(data, axis, contract.block, contract.bits[0])
    name = b.claim(weight)
    packed = pack(integers.reshape(-1), contract.packing)
    bytes_value = b.constant(
        Array(packed, name), TensorType(packed.shape, integer(8, signed=False)), name=f"{name}.packed"
    )
    scale_value = b.constant(Array(scales, f"{name}.scale"), TensorType(scales.shape), name=f"{name}.scale")
    real = b.emit(
        DequantizeBlocks,
        [bytes_value, scale_value],
        shape=data.shape,
        axis=axis,
        block=contract.block,
        packing=contract.packing,
        name=name,
        location=op.location,
    )
    b.island(op, {weight: real})


def block_axis(op: Op) -> int:
    """The axis of weights along which blocks lie, the summed one: [K, N] has it first, [O, C / groups, ...] second."""
    return op.operands[1].type.rank - 2 if op.mnemonic == "MatMul" else 1


def quantize_blocks(
    data: npt.NDArray[Any], axis: int, block: int, bits: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Integers [-2^(bits-1), 2^(bits-1) - 1] and a float32 scale for each block along `axis`; the last may be short.

    A scale is the largest magnitude of its block over the greatest integer, or 1 in a block of zeros.
    """
    least, greatest = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    starts = np.arange(0, data.shape[axis], block)
    largest = np.maximum.reduceat(np.abs(data.astype(np.float64)), starts, axis=axis)
    scales = (largest / greatest).astype(np.float32)
    scales = np.where(scales > 0, scales, np.float32(1))  # a block of zeros, or of what float32 has no scale for
    spread = np.repeat(scales, block, axis=axis).take(range(data.shape[axis]), axis=axis)
    return np.clip(np.rint(data.astype(np.float32) / spread), least, greatest).astype(np.int64), scales
