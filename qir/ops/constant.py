"""`const`: data that is part of the program."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qir.arrays import Array
from qir.interval import Bounds, Interval, exact
from qir.ir import ALL_STAGES, Op, OpBounds
from qir.packing import packable, packed_bytes
from qir.types import FloatType, IntegerType, Shape, integer, storage_of


@dataclass(frozen=True, eq=False, kw_only=True)
class Const(Op):
    """Constant data. Before stage `fixed` a quantized result type says how the float data will be quantized."""

    mnemonic = "const"
    stages = ALL_STAGES
    operand_names = ()
    value: Array

    @property
    def is_float(self) -> bool:
        """Whether the data are reals."""
        return bool(self.value.data.dtype.kind == "f")

    @property
    def packing(self) -> IntegerType | None:
        """The type that the data are packed as where they are stored; None where they are stored as they are.

        Bounds narrower than the container make no difference to it.
        """
        storage = storage_of(self.results[0].type.element) if self.results else None
        if storage is None or not packable(self.value.data, storage):
            return None
        return storage if storage.levels is not None else integer(storage.bits, storage.signed)

    @property
    def stored_bytes(self) -> int:
        """The bytes that the data take where they are stored."""
        packing = self.packing
        return self.value.data.nbytes if packing is None else packed_bytes(self.value.size, packing)

    def infer(self) -> tuple[Shape, ...]:
        """The shape of the data."""
        return (self.value.shape,)

    def check(self) -> Iterator[str]:
        """Float data are finite and float32; integer data lie in the storage bounds, and are levels if it has any."""
        storage = storage_of(self.result.type.element)
        data = self.value.data
        if data.dtype.kind == "f":
            if data.dtype != np.float32 or isinstance(self.result.type.element, IntegerType):
                yield f"its data are {data.dtype}, its type is {self.result.type}"
            if not np.isfinite(data).all():
                yield "its data hold NaN or infinity; replace them in the model"
        elif isinstance(self.result.type.element, FloatType):
            yield f"its data are {data.dtype}, its type is f32"
        elif storage and data.size and not storage.lo <= int(data.min()) <= int(data.max()) <= storage.hi:
            yield f"its data span [{data.min()}, {data.max()}], beyond the storage bounds [{storage.lo}, {storage.hi}]"
        elif storage and storage.levels is not None and (strange := np.setdiff1d(data, storage.levels)).size:
            yield f"its data hold {strange[0]}, which is none of the levels of {storage}"

    def bounds(self, operands: Sequence[Bounds]) -> OpBounds:
        """The data and their extremes, per last axis."""
        data = self.value.data
        if data.size == 0:
            return OpBounds((Bounds(exact(0), exact(0), data),))
        rows = data.reshape(-1, data.shape[-1]) if data.ndim else data.reshape(1)
        return OpBounds((Bounds(exact(rows.min(axis=0)), exact(rows.max(axis=0)), data),))

    def real_range(self, operands: Sequence[Interval]) -> tuple[Interval, ...]:
        """The extremes of the data."""
        data = self.value.data
        return (Interval(float(data.min()), float(data.max())) if data.size else Interval(0.0, 0.0),)

    def intermediate_bits(self) -> int:
        """The data are computed with as they are."""
        storage = storage_of(self.result.type.element)
        return storage.bits if storage else 32

    def eval_float(self) -> tuple[npt.NDArray[Any], ...]:
        """The data."""
        return (self.value.data,)

    def eval_int(self) -> tuple[npt.NDArray[Any], ...]:
        """The data."""
        return (self.value.data,)
