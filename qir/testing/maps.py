"""Vectors for what is left: tables, softmax and argmax, pooling, movement and islands."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qir.arrays import Array
from qir.ir import Op, Value
from qir.ops.float_elementwise import HardSigmoid, HardSwish, LeakyRelu, PRelu, Sigmoid, Tanh
from qir.ops.float_nn import BatchNormalization, MatMul
from qir.ops.float_pool import ArgMax, AveragePool, MaxPool, Softmax
from qir.ops.movement import Concat, Gather, Pad, Reshape, Slice, Transpose
from qir.target import Target
from qir.testing.maker import Case, Cases, Maker, Widths, exponent_of, scale_of, zero_of
from qir.testing.numbers import edges, every_value, in_rows, patterns
from qir.types import F32, S64, TensorType, affine, integer

Tensor = npt.NDArray[Any]

_FUNCTIONS: Final[dict[type[Op], dict[str, Any]]] = {
    Sigmoid: {},
    Tanh: {},
    HardSwish: {},
    HardSigmoid: {"alpha": 0.2, "beta": 0.5},
    LeakyRelu: {"alpha": 0.1},
    PRelu: {},
}
_COLUMNS: Final = 3

New = Callable[[], Maker]


def other_cases(target: Target, widths: Widths, random: np.random.Generator) -> Cases:
    """Tables, softmax, argmax, pooling and movement; islands where the target has floating point."""

    def new() -> Maker:
        return Maker(target, widths, random)

    cases: Cases = [(kind.mnemonic, partial(_function, new, kind, more)) for kind, more in _FUNCTIONS.items()]
    cases += [
        ("Softmax", lambda: _softmax(new())),
        ("ArgMax", lambda: _argmax(new())),
        ("MaxPool", lambda: _max_pool(new())),
        ("AveragePool", lambda: _average_pool(new())),
        ("Concat", lambda: _concat(new())),
        ("Reshape, Transpose, Slice, Gather, Pad", lambda: _movement(new())),
    ]
    if target.floating_point:
        cases.append((BatchNormalization.mnemonic, lambda: _island(new())))
    if target.weight_only is not None:
        cases.append(("weights alone", lambda: _weights_alone(new())))
    return cases


def _function(new: New, op_class: type[Op], attributes: dict[str, Any]) -> Case:
    """A table over every value of its operand; slopes differ by channel."""
    maker = new()
    exponent = 3 - maker.storage.hi.bit_length()
    x = maker.source(_COLUMNS, exponent=exponent)
    operands = [x]
    if op_class is PRelu:
        slopes = np.array([maker.storage.lo // 2, 0, maker.storage.hi])
        operands.append(maker.real_constant(slopes, maker.format(-maker.storage.bits)))
    for change in (0, -1):
        maker.result(op_class, operands, maker.format(exponent + change), **attributes)
    feed = in_rows(np.repeat(every_value(maker.storage), _COLUMNS), _COLUMNS)
    return maker.case({x: feed})


def _softmax(maker: Maker) -> Case:
    x = maker.source(7, exponent=3 - maker.storage.hi.bit_length())
    maker.result(Softmax, [x], maker.format(1 - maker.storage.bits), axis=1)
    feed = np.concatenate([patterns(maker.storage, 7, zero_of(x), maker.random), _rows(maker, x, 7)])
    return maker.case({x: feed})


def _rows(maker: Maker, x: Value, width: int) -> Tensor:
    """Rows of edges, shuffled so that neighbours differ."""
    values = edges(maker.storage, zero_of(x), maker.random, 200)
    return in_rows(maker.random.permutation(values), width)


def _argmax(maker: Maker) -> Case:
    """Greatest elements that are there more than once."""
    x = maker.source(5, 3, 2)
    for axis, keepdims, last in ((1, False, False), (2, True, True), (3, False, True)):
        maker.result(ArgMax, [x], S64, axis=axis, keepdims=keepdims, select_last_index=last)
    feed = np.concatenate([patterns(maker.storage, 30, zero_of(x), maker.random), _rows(maker, x, 30)])
    return maker.case({x: feed.reshape(-1, 5, 3, 2)})


def _map(maker: Maker, *shape: int, exponent: int = 0) -> tuple[Value, Tensor]:
    x = maker.source(*shape, exponent=exponent)
    size = int(np.prod(shape))
    near = zero_of(x) + maker.random.integers(-3, 4, (12, size))
    feed = np.concatenate([patterns(maker.storage, size, zero_of(x), maker.random), _rows(maker, x, size), near])
    return x, np.clip(feed, maker.storage.lo, maker.storage.hi).reshape(-1, *shape)


def _max_pool(maker: Maker) -> Case:
    x, feed = _map(maker, 5, 7, 6)
    element = x.type.element
    window: dict[str, Any] = {"strides": (2, 2), "dilations": (1, 1), "pads": (1, 0, 1, 1)}
    maker.result(MaxPool, [x], element, kernel=(3, 2), **window)  # type: ignore[arg-type]
    maker.result(MaxPool, [x], element, kernel=(2, 2), ceil_mode=True, **window)  # type: ignore[arg-type]
    maker.result(MaxPool, [x], maker.format(1), kernel=(3, 3), **(window | {"pads": (0, 0, 0, 0), "dilations": (2, 2)}))
    return maker.case({x: feed})


def _average_pool(maker: Maker) -> Case:
    """Windows of an even number of elements, whose averages lie on ties; padding that counts, and that does not."""
    x, feed = _map(maker, 3, 5, 6)
    element = x.type.element
    for kernel, strides, counts in (((2, 2), (1, 1), False), ((3, 2), (2, 2), True), ((1, 4), (1, 2), False)):
        pads = (kernel[0] - 1, 0, 0, 1)
        attributes: dict[str, Any] = {"kernel": kernel, "strides": strides, "pads": pads, "dilations": (1, 1)}
        maker.result(AveragePool, [x], element, count_include_pad=counts, **attributes)  # type: ignore[arg-type]
    return maker.case({x: feed})


def _concat(maker: Maker) -> Case:
    """Operands of three formats in one."""
    x, feed = _map(maker, 2, 3, 3)
    y, other = _map(maker, 1, 3, 3, exponent=2)
    maker.result(Concat, [x, y, x], maker.format(1), axis=1)
    maker.result(Concat, [x, x], x.type.element, axis=3)  # type: ignore[arg-type]
    rows = max(len(feed), len(other))
    return maker.case({v: np.resize(f, (rows, *f.shape[1:])) for v, f in ((x, feed), (y, other))})


def _movement(maker: Maker) -> Case:
    """Data movement, some of it to nothing at all."""
    x, feed = _map(maker, 3, 4, 5)
    element: Any = x.type.element
    maker.result(Reshape, [x], element, shape=(6, 10))
    maker.result(Transpose, [x], element, perm=(0, 3, 1, 2))
    maker.result(Slice, [x], element, starts=(3, 0), ends=(-1, 2), axes=(2, 3), steps=(-1, 1))
    maker.result(Slice, [x], element, starts=(1,), ends=(1,), axes=(1,), steps=(1,))
    maker.result(Gather, [x], element, indices=Array(np.array([2, 0, 2], np.int64)), axis=1)
    maker.result(Pad, [x], element, pads=(0, 0, 1, 2, 0, 1, 0, 3), value=float(scale_of(x)) * 3)
    maker.result(Pad, [x], maker.format(1), pads=(0, 0, 1, 0, 0, 0, 0, 0), value=-1e9)
    return maker.case({x: feed})


def _island(maker: Maker) -> Case:
    """Integers to reals and back around an op that has no rule anywhere; half of the values come back on ties."""
    x = maker.source(_COLUMNS)
    halves, ones, zeros = (
        maker.constant(Array(np.full(_COLUMNS, v, np.float32)), TensorType((_COLUMNS,), F32), "k") for v in (0.5, 1, 0)
    )
    for change in (0, -1, 1):
        operands = [x, halves, zeros, zeros, ones]
        maker.result(BatchNormalization, operands, maker.format(exponent_of(x) + change), epsilon=0.0)
    feed = in_rows(every_value(maker.storage), _COLUMNS)
    return maker.case({x: feed})


def _weights_alone(maker: Maker) -> Case:
    """Weights that are dequantized in blocks, the last of which is short."""
    contract = maker.target.weight_only
    assert contract is not None
    length = contract.block * 2 + 5
    x = maker.source(length)
    reals = maker.random.normal(0, 1, (length, 3)).astype(np.float32)
    kind = TensorType(reals.shape, affine(integer(contract.bits[0]), 1.0))
    weight = maker.constant(Array(reals), kind, "w")
    maker.result(MatMul, [x, weight], maker.format(4))
    feed = patterns(maker.storage, length, zero_of(x), maker.random)
    return maker.case({x: feed})
