"""Shape arithmetic at import: shapes that hold the open batch N are object arrays of ints and multiples of N.

Sound by construction: what is not a multiple of N, or depends on the value of N, is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from qir.errors import QirError
from qir.types import BATCH, Dim, Shape

Tensor = npt.NDArray[Any]


def _refuse(what: str) -> NoReturn:
    raise QirError(f"computes {what} from the open batch N, which is no multiple of it; fix the batch size with shapes")


@dataclass(frozen=True, slots=True)
class BatchMultiple:
    """`factor * N`, the factor positive."""

    factor: int

    def __str__(self) -> str:
        return f"{self.factor}*{BATCH}" if self.factor != 1 else BATCH

    def __mul__(self, other: object) -> BatchMultiple | int:
        if not isinstance(other, int) or other < 0:
            _refuse(f"{self} * {other}")
        return BatchMultiple(self.factor * other) if other else 0

    __rmul__ = __mul__

    def __add__(self, other: object) -> BatchMultiple:
        if isinstance(other, BatchMultiple):
            return BatchMultiple(self.factor + other.factor)
        return self if other == 0 else _refuse(f"{self} + {other}")

    __radd__ = __add__

    def __sub__(self, other: object) -> BatchMultiple | int:
        if isinstance(other, BatchMultiple) and other.factor <= self.factor:
            rest = self.factor - other.factor
            return BatchMultiple(rest) if rest else 0
        return self if other == 0 else _refuse(f"{self} - {other}")

    def __rsub__(self, other: object) -> NoReturn:
        _refuse(f"{other} - {self}")

    def __floordiv__(self, other: object) -> BatchMultiple | int:
        if isinstance(other, BatchMultiple) and self.factor % other.factor == 0:
            return self.factor // other.factor
        if isinstance(other, int) and other > 0 and self.factor % other == 0:
            return BatchMultiple(self.factor // other)
        return _refuse(f"{self} / {other}")

    def __rfloordiv__(self, other: object) -> NoReturn:
        _refuse(f"{other} / {self}")


def shape_array(shape: Shape) -> Tensor:
    """A shape as ONNX's Shape gives it: int64, or object where it holds N."""
    return settle(objects([BatchMultiple(1) if d == BATCH else d for d in shape]))


def settle(array: Tensor) -> Tensor:
    """int64 where no element depends on N any more."""
    if any(isinstance(item, BatchMultiple) for item in array.reshape(-1)):
        return array
    return array.astype(np.int64)


def size_of(shape: Shape) -> Tensor:
    """The number of elements as ONNX's Size gives it."""
    total: Any = 1
    for dim in shape:
        total = total * (BatchMultiple(1) if dim == BATCH else dim)
    return settle(objects(total))


def equal(left: Tensor, right: Tensor) -> Tensor:
    """Elementwise equality. Raises QirError where it would depend on the value of N."""
    return np.asarray(np.frompyfunc(_equal, 2, 1)(objects(left), objects(right)), np.bool_)


def _equal(left: object, right: object) -> bool:
    if isinstance(left, BatchMultiple) and isinstance(right, BatchMultiple):
        return left == right or _refuse(f"{left} == {right}")
    for one, other in ((left, right), (right, left)):
        if isinstance(one, BatchMultiple) and isinstance(other, int) and other >= 0:
            _refuse(f"{one} == {other}")  # a negative number is never N
    return left == right


def objects(items: Any) -> Tensor:
    """An object array of a list, an array, or one element by itself (0-d)."""
    data = np.asarray(items, object) if isinstance(items, list | np.ndarray) else items
    if isinstance(data, np.ndarray):
        return data
    cell = np.empty((), object)
    cell[()] = data
    return cell


def as_objects(array: Tensor) -> Tensor:
    """The integers of `array` as Python ints beside multiples of N. Raises QirError for other data."""
    if array.dtype == object:
        return array
    if array.dtype.kind not in "iub":
        raise QirError(
            f"combines a shape that holds the open batch N with {array.dtype}; fix the batch size with shapes"
        )
    return objects(array.astype(object))


def to_dims(items: tuple[int | BatchMultiple, ...]) -> tuple[Dim, ...]:
    """A shape from folded integers. Raises QirError for a multiple of N other than N itself."""
    dims: list[Dim] = []
    for item in items:
        if isinstance(item, BatchMultiple):
            if item.factor != 1:
                raise QirError(
                    f"the dimension {item} moves elements into the open batch N; fix the batch size with shapes"
                )
            dims.append(BATCH)
        else:
            dims.append(item)
    return tuple(dims)
