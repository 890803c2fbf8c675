"""What a chosen kernel is, and the facts that it is chosen by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qir.arrays import Array
from qir.fixed_point import Overflow, kept_bounds
from qir.idle import is_idle, is_product_idle
from qir.interpreter import evaluate_op
from qir.interval import Bounds, Interval
from qir.ir import Graph, Op, Value
from qir.ops.accumulate import centered
from qir.proof import Proof
from qir.types import BATCH, IntegerType, Shape, TensorType, storage_of, zero_array

Tensor = npt.NDArray[Any]
Call = Callable[[], None]

#: Values of the 64-bit loops stay below this magnitude, so that no sum or difference of two of them overflows.
WIDEST: Final = 1 << 62


@dataclass(frozen=True)
class Memory:
    """An array that the plan finds room for; a leading N is the batch."""

    shape: Shape
    dtype: np.dtype[Any]

    @property
    def is_batched(self) -> bool:
        """Whether its size grows with the batch."""
        return self.shape[:1] == (BATCH,)

    @property
    def bytes(self) -> int:
        """Bytes, of one sample where it is batched."""
        return math.prod(d for d in self.shape if isinstance(d, int)) * self.dtype.itemsize


@dataclass(frozen=True)
class Kernel:
    """A kernel chosen for an op, or for an op and the requantize behind it; `name` is what `qir plan` shows.

    `bind(inputs, output, scratch)` ties it to arrays of the stored dtypes and gives the call that fills the output;
    what `scratch` holds is undefined at each call.
    `packed_bytes` is what it keeps of constants in its own layout. A view shares the memory of its only input.
    """

    name: str
    bind: Callable[[Sequence[Tensor], Tensor, Sequence[Tensor]], Call]
    scratch: tuple[Memory, ...] = ()
    packed_bytes: int = 0
    is_view: bool = False


@dataclass(frozen=True)
class Facts:
    """What a choice may rest on besides the op itself: constant data and what is proved."""

    constants: Mapping[Value, Array]
    proof: Proof

    @staticmethod
    def of_types(graph: Graph) -> Facts:
        """What holds without a proof: values span their types, and an op that says `overflow=none` is believed."""
        storages = ((v, storage_of(v.type.element)) for v in graph.values())
        return Facts(graph.constants, Proof({v: Bounds.of(s.lo, s.hi) for v, s in storages if s is not None}, {}, ()))

    def span(self, value: Value) -> Interval:
        """The proved interval of `q - zero_point`."""
        return centered(value.type, self.proof.bounds[value]).hull

    def partial(self, op: Op) -> Interval | None:
        """The proved interval of every partial sum of an accumulating op."""
        step = self.proof.steps.get(op)
        return step.partial if step is not None else None

    def is_idle(self, op: Op) -> bool:
        """Whether the op's overflow mode is `none`, or proved never to act."""
        return getattr(op, "overflow", None) is Overflow.NONE or is_idle(op, self.proof.steps.get(op))

    def is_product_idle(self, op: Op) -> bool:
        """Whether products of an accumulating op are narrowed by `none`, or proved to stay in the type of products."""
        return getattr(op, "product_overflow", None) is Overflow.NONE or is_product_idle(op, self.proof.steps.get(op))


def interpreted(op: Op) -> Kernel:
    """The interpreter's own function: for float islands, and for ops that no kernel takes."""

    def bind(inputs: Sequence[Tensor], output: Tensor, scratch: Sequence[Tensor]) -> Call:
        def call() -> None:
            output[...] = evaluate_op(op, inputs)[0]

        return call

    return Kernel("island" if op.is_float else "interpreter", bind)


def integers(kind: TensorType) -> IntegerType:
    """The storage of a type that is known to be of integers."""
    storage = storage_of(kind.element)
    assert storage is not None
    return storage


def dtype_of(kind: TensorType) -> np.dtype[Any]:
    """The dtype in which values of a type are stored: float32 for reals."""
    storage = storage_of(kind.element)
    return np.dtype(np.float32) if storage is None else storage.dtype


def zero_along_last(kind: TensorType) -> npt.NDArray[np.int64] | None:
    """The zero point, 0-d or one for each index of the last axis; None where it runs along another axis."""
    zeros = zero_array(kind.element)
    axis = getattr(kind.element, "axis", None)
    return zeros if axis is None or axis == kind.rank - 1 else None


def fits(values: npt.ArrayLike, dtype: npt.DTypeLike) -> bool:
    """Whether a NumPy integer dtype holds every value."""
    array, limits = np.asarray(values), np.iinfo(np.dtype(dtype))
    return array.size == 0 or limits.min <= int(array.min()) <= int(array.max()) <= limits.max


def fills_container(storage: IntegerType) -> bool:
    """Whether storing the low bits in the dtype is what wrapping means."""
    return not storage.is_narrowed and storage.bits == 8 * storage.dtype.itemsize


def wrapping(storage: IntegerType) -> tuple[int, int]:
    """Mask and sign bit with which an int64 wraps: `((value & mask) ^ sign) - sign`."""
    if storage.bits == 64:
        return -1, 0
    return (1 << storage.bits) - 1, (1 << (storage.bits - 1) if storage.signed else 0)


def clamp_bounds(storage: IntegerType, overflow: Overflow, is_idle: bool) -> tuple[int, int] | None:
    """Bounds such that clamping a 64-bit value to them and storing its low bits is what `overflow` means.

    None where it means something else.
    """
    match overflow:
        case Overflow.SATURATE | Overflow.SATURATE_SYMMETRIC | Overflow.NONE:
            return kept_bounds(storage.lo, storage.hi, overflow)
        case Overflow.WRAP if fills_container(storage):
            return -WIDEST, WIDEST
        case Overflow.WRAP if storage.is_narrowed:
            return None
        case _:
            return (storage.lo, storage.hi) if is_idle else None
