"""Immutable arrays with a content hash: constants, per-axis scales, lookup tables and histograms.

Two arrays are equal when dtype, shape and bytes are; the name is a hint for printing and never part of equality.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

#: Arrays up to this many elements are written in the text; larger ones go to the sidecar.
INLINE_LIMIT = 64


class Array:
    """A read-only NumPy array with a name hint; hashable and compared by content, so that weights are shared freely.

    The data is not copied when it is already read-only and contiguous (it may be memory-mapped).
    """

    __slots__ = ("__dict__", "data", "name")

    def __init__(self, data: npt.ArrayLike, name: str = "") -> None:
        array = np.asarray(data)
        array = array.astype(array.dtype.newbyteorder("="), copy=False)  # one byte order, so that equal text is equal
        if array.flags.writeable or not array.flags.c_contiguous:
            array = np.array(array, order="C")
            array.setflags(write=False)
        self.data: npt.NDArray[Any] = array
        self.name = name

    @cached_property
    def sha256(self) -> str:
        """Hex digest over dtype, shape and little-endian bytes."""
        digest = hashlib.sha256(f"{self.data.dtype.newbyteorder('<').str}{self.data.shape}".encode())
        little = self.data.astype(self.data.dtype.newbyteorder("<"), copy=False)
        digest.update(np.ascontiguousarray(little).reshape(-1).view(np.uint8).data if little.size else b"")
        return digest.hexdigest()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the data."""
        return self.data.shape

    @property
    def size(self) -> int:
        """The number of elements."""
        return int(self.data.size)

    @property
    def is_inline(self) -> bool:
        """Whether the text holds the elements; otherwise it names a sidecar entry."""
        return self.size <= INLINE_LIMIT

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Array):
            return NotImplemented
        if self.data is other.data:
            return True
        return self.data.dtype == other.data.dtype and self.shape == other.shape and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __repr__(self) -> str:
        return f"Array({self.name or 'unnamed'}, {self.data.dtype}{list(self.shape)})"
