"""Integers of any width packed into bytes, as a sidecar of constants holds them.

Fields of `stored_bits` bits follow each other without gaps, in row-major order of the elements, the least significant
bit first, so that a field may cross bytes. A field is the element in two's complement, or the index of its level. The
bits behind the last one are 0.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from qir.errors import QirError
from qir.types import IntegerType, container_bounds

Integers = npt.NDArray[Any]


def packable(data: Integers, storage: IntegerType) -> bool:
    """Whether these integers take fewer bits packed than in their dtype, and come back from it as they are."""
    if data.dtype != storage.dtype or storage.stored_bits >= 8 * storage.dtype.itemsize:
        return False
    if storage.levels is not None:
        return bool(np.isin(data, storage.levels).all())
    lo, hi = container_bounds(storage.bits, storage.signed)
    return not data.size or lo <= int(data.min()) <= int(data.max()) <= hi


def packed_bytes(count: int, storage: IntegerType) -> int:
    """The bytes of so many elements, packed."""
    return -(-count * storage.stored_bits // 8)


def pack_integers(data: Integers, storage: IntegerType) -> npt.NDArray[np.uint8]:
    """The bytes of integers of any shape, which must be `packable`."""
    flat = data.reshape(-1)
    if storage.levels is not None:
        flat = np.searchsorted(np.array(storage.levels, data.dtype), flat).astype(np.uint8)
    little = np.ascontiguousarray(flat.astype(flat.dtype.newbyteorder("<"), copy=False))
    bits = np.unpackbits(little.view(np.uint8).reshape(flat.size, flat.dtype.itemsize), axis=1, bitorder="little")
    return np.packbits(bits[:, : storage.stored_bits], bitorder="little")


def unpack_integers(packed: Integers, shape: tuple[int, ...], storage: IntegerType) -> Integers:
    """The integers that `pack_integers` packed, in the dtype of their storage.

    Raises QirError for bytes of another number, bits behind the last element, and an index without a level.
    """
    count, width = math.prod(shape), storage.stored_bits
    expected = packed_bytes(count, storage)
    if packed.dtype != np.uint8 or packed.ndim != 1 or packed.size != expected:
        has = f"{packed.dtype} {'x'.join(map(str, packed.shape))}"
        raise QirError(f"{count} elements of {width} bits take {expected} bytes, and it is {has}")
    bits = np.unpackbits(packed, bitorder="little")
    if bits[count * width :].any():
        raise QirError("the bits behind its last element are not 0")
    fields = bits[: count * width].reshape(count, width)
    dtype = storage.dtype if storage.levels is None else np.dtype(np.uint8)
    whole = np.zeros((count, 8 * dtype.itemsize), np.uint8)
    whole[:, :width] = fields
    if storage.signed and storage.levels is None:
        whole[:, width:] = fields[:, -1:]
    flat = np.packbits(whole, axis=1, bitorder="little").view(dtype.newbyteorder("<")).reshape(count)
    if storage.levels is None:
        return flat.astype(dtype, copy=False).reshape(shape)
    most = int(flat.max(initial=0))
    if most >= len(storage.levels):
        raise QirError(f"it holds the index {most} and has {len(storage.levels)} levels")
    return np.array(storage.levels, storage.dtype)[flat].reshape(shape)
