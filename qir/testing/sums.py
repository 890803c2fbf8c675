"""Vectors for sums of products: chains that overflow and come back, ties behind them, windows and odd shapes."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qir.ir import Op
from qir.ops.float_nn import Conv, MatMul
from qir.ops.float_pool import ReduceMean
from qir.passes.widths.storage import bias_storage
from qir.target import Target
from qir.testing.maker import Case, Cases, Maker, Widths, exponent_of, zero_of
from qir.testing.numbers import boundary, every_value, in_rows, patterns, steps_of_outputs, uniform
from qir.types import IntegerType, integer

Tensor = npt.NDArray[Any]
New = Callable[[], Maker]

#: Chains are no longer than this; where products are too small to overflow so soon, a bias at an end makes them.
_LONGEST: Final = 2048
_SHORTEST: Final = 21
_TIES: Final = 300
_WIDEST: Final = 48
_WINDOW: Final[dict[str, Any]] = {"strides": (1, 1), "pads": (1, 1, 1, 1), "dilations": (1, 1), "groups": 1}

#: Name, input [C, H, W], output channels, attributes.
_WINDOWS: Final[list[tuple[str, tuple[int, int, int], int, dict[str, Any]]]] = [
    ("depthwise 3x3", (5, 4, 3), 5, {"kernel": (3, 3), "groups": 5}),
    ("1x1 on a 1x1 map", (7, 1, 1), 3, {"kernel": (1, 1), "pads": (0, 0, 0, 0)}),
    ("depthwise 3x2, two outputs a channel", (3, 5, 4), 6, {"kernel": (3, 2), "groups": 3, "strides": (2, 1)}),
    ("2 groups, stride 2, cut", (6, 5, 5), 4, {"kernel": (3, 3), "groups": 2, "strides": (2, 2), "pads": (0, 1, 2, 0)}),
    ("dilated 3x3", (3, 7, 6), 5, {"kernel": (3, 3), "dilations": (2, 2), "pads": (2, 1, 0, 2)}),
    ("3x3 on a 1x1 map", (3, 1, 1), 5, {"kernel": (3, 3)}),
    ("1x5 on a row", (1, 1, 9), 1, {"kernel": (1, 5), "pads": (0, 2, 0, 2)}),
    ("1x1, odd channels", (9, 3, 2), 17, {"kernel": (1, 1), "pads": (0, 0, 0, 0)}),
]
#: Shape behind the batch, axes, keepdims.
_MEANS: Final = (((5, 3, 3), (2, 3), True), ((3, 2, 7), (2, 3), False), ((11,), (1,), True))


def sum_cases(target: Target, widths: Widths, random: np.random.Generator, *, thorough: bool) -> Cases:
    """Convolutions, matrix products and means at these widths; `thorough` adds all shapes."""

    def new() -> Maker:
        return Maker(target, widths, random)

    cases: Cases = [
        ("chains of products", lambda: _chains(new())),
        ("conv 3x3", lambda: _convolution(new())),
        ("sums shifted left", lambda: _small_sums(new())),
        ("matmul on ties", lambda: _ties(new(), MatMul)),
        ("conv on ties", lambda: _ties(new(), Conv)),
    ]
    for name, shape, outputs, attributes in _WINDOWS if thorough else _WINDOWS[:2]:
        cases.append((f"conv {name}", partial(_window, new, shape, outputs, **attributes)))
    if thorough:
        cases += [("matmul of rows", lambda: _rows(new())), ("matmul of activations", lambda: _two(new()))]
        cases += [(f"mean over axes {axes}", partial(_mean, new, shape, axes, keep)) for shape, axes, keep in _MEANS]
        cases += [(f"matmul of {length} products", partial(_short, new, length)) for length in (0, 1)]
    return cases


def _chain_length(maker: Maker) -> int:
    """Products in a chain of which a half drives the accumulator past its end, where so many are few."""
    needed = 2 * ((1 << (_register(maker) - 1)) // _largest_product(maker)) + 7
    return needed if _SHORTEST < needed <= _LONGEST else _SHORTEST


def _register(maker: Maker) -> int:
    bits = maker.target.accumulator.bits
    return bits if isinstance(bits, int) else 64


def _largest_product(maker: Maker) -> int:
    a, b = (max(-s.lo, s.hi, 1) for s in (maker.storage, maker.weight_storage))
    return a * b << maker.target.product.shift


def _right(maker: Maker, length: int) -> int:
    """The shift that brings the largest sum of a chain, as far as the accumulator holds it, to the output's width."""
    reach = (_largest_product(maker) * max(length, 1)).bit_length()
    return min(reach, _register(maker)) - maker.storage.bits


def _bias_ends(maker: Maker) -> IntegerType:
    """What a bias can be, but no more than its reals can say."""
    storage = bias_storage(maker.target)
    return storage if storage.bits <= _WIDEST else integer(_WIDEST)


def _chains(maker: Maker) -> Case:
    """Matrix products of every pattern with every pattern: without bias, with one at either end, and clipped."""
    length = _chain_length(maker)
    x = maker.source(length)
    weights = patterns(maker.weight_storage, length, 0, maker.random).T
    right, ends = _right(maker, length), _bias_ends(maker)
    biases = np.resize([ends.hi, ends.lo, 1, ends.lo // 2, ends.hi // 2], weights.shape[1])
    maker.layer(MatMul, x, weights, right=right)
    maker.layer(MatMul, x, weights, biases, right=right - 2, drop=3)
    maker.layer(MatMul, x, weights[:, ::-1], biases[::-1], right=right - 1, drop=1, is_clipped=True)
    return maker.case({x: patterns(maker.storage, length, zero_of(x), maker.random)})


def _convolution(maker: Maker) -> Case:
    """The same through windows that padding cuts: the taps of the one in the middle are a chain."""
    channels = max(3, -(-_chain_length(maker) // 9) | 1)
    length = 9 * channels
    x = maker.source(channels, 3, 3)
    rows = patterns(maker.weight_storage, length, 0, maker.random)
    right, ends = _right(maker, length), _bias_ends(maker)
    biases = np.resize([ends.lo, ends.hi, -1], len(rows))
    maker.layer(Conv, x, _taps_first(rows, 3, 3), right=right, **_WINDOW)
    maker.layer(Conv, x, rows.reshape(-1, channels, 3, 3), biases, right=right - 1, drop=2, **_WINDOW)
    maps = patterns(maker.storage, length, zero_of(x), maker.random)
    return maker.case({x: np.concatenate([_taps_first(maps, 3, 3), maps.reshape(-1, channels, 3, 3)])})


def _taps_first(rows: Tensor, height: int, width: int) -> Tensor:
    """Rows that run over rows, columns and channels, in ONNX's layout."""
    return rows.reshape(len(rows), height, width, -1).transpose(0, 3, 1, 2)


def _small_sums(maker: Maker) -> Case:
    """Sums so small that they are shifted left."""
    x = maker.source(3)
    signs = np.array([[1, 0, 0, -1], [0, 1, 0, 1], [0, 0, 1, -1]])
    weights = np.clip(signs, maker.weight_storage.lo, maker.weight_storage.hi)
    for right in (-1, -3):
        maker.layer(MatMul, x, weights, right=right)
    maker.layer(MatMul, x, weights, np.array([3, -3, 0, 1]), right=0, drop=1)
    near = zero_of(x) + maker.random.integers(-9, 10, (20, 3))
    rows = [patterns(maker.storage, 3, zero_of(x), maker.random), np.clip(near, maker.storage.lo, maker.storage.hi)]
    return maker.case({x: np.concatenate(rows)})


def _ties(maker: Maker, op_class: type[Op]) -> Case:
    """Sums at every boundary between two outputs and beside it: weights of 1, and a bias that is the boundary."""
    is_conv = op_class is Conv
    steps, source = steps_of_outputs(maker.storage, maker.random, _TIES), _bias_ends(maker)

    def biases(ratios: npt.NDArray[np.float64], zero: int) -> Tensor:
        wide = np.broadcast_to(ratios, steps.shape)
        found = [boundary(Fraction(float(r)), int(k), zero) for r, k in zip(wide, steps, strict=True)]
        return np.array([min(max(f, source.lo), source.hi) for f in found], np.int64)

    one = min(1, maker.weight_storage.hi) or -1
    x = maker.source(*((1, 1, 1) if is_conv else (1,)))
    ones = np.full((steps.size, 1, 1, 1) if is_conv else (1, steps.size), one)
    attributes = {**_WINDOW, "pads": (0, 0, 0, 0)} if is_conv else {}
    deepest = max(1, min(source.bits, 31) - maker.storage.bits - 3)
    for right in sorted({1, min(4, deepest), deepest}):
        maker.layer(op_class, x, ones, biases, right=right, **attributes)
    near = np.array([*(zero_of(x) + d for d in range(-3, 4)), maker.storage.lo, maker.storage.hi])
    feed = np.clip(near, maker.storage.lo, maker.storage.hi)
    return maker.case({x: feed.reshape(-1, 1, 1, 1) if is_conv else feed[:, None]})


def _window(new: New, shape: tuple[int, int, int], outputs: int, *, kernel: tuple[int, int], **attributes: Any) -> Case:
    maker, chosen = new(), {**_WINDOW, **attributes}
    channels, height, width = shape
    length = channels // int(chosen["groups"]) * kernel[0] * kernel[1]
    x = maker.source(*shape)
    rows = np.resize(patterns(maker.weight_storage, length, 0, maker.random), (outputs, length))
    rows[-1:] = uniform(maker.weight_storage, (1, length), maker.random)
    weights, right = _taps_first(rows, *kernel), _right(maker, length) - 1
    maker.layer(Conv, x, weights, right=right, **chosen)
    maker.layer(Conv, x, weights, np.arange(outputs) - 2, right=right - 1, drop=1, is_clipped=True, **chosen)
    return maker.case(
        {x: _taps_first(patterns(maker.storage, channels * height * width, zero_of(x), maker.random), height, width)}
    )


def _rows(maker: Maker) -> Case:
    """A product whose rows have more dimensions, and odd sizes."""
    x = maker.source(3, 2, 7)
    maker.layer(MatMul, x, uniform(maker.weight_storage, (7, 5), maker.random), right=_right(maker, 7) - 1)
    return maker.case({x: patterns(maker.storage, 42, zero_of(x), maker.random).reshape(-1, 3, 2, 7)})


def _two(maker: Maker) -> Case:
    """A product of two inputs, of which neither is constant."""
    a, b = maker.source(2, 3, 9), maker.source(2, 9, 5)
    maker.result(MatMul, [a, b], maker.format(exponent_of(a) + exponent_of(b) + maker.storage.bits + 3))
    rows = patterns(maker.storage, 54, zero_of(a), maker.random).reshape(-1, 2, 3, 9)
    columns = patterns(maker.storage, 90, zero_of(b), maker.random).reshape(-1, 2, 9, 5)
    return maker.case({a: np.concatenate([rows, rows]), b: np.concatenate([columns, np.roll(columns, 1, 0)])})


def _mean(new: New, shape: tuple[int, ...], axes: tuple[int, ...], keepdims: bool) -> Case:
    maker = new()
    x = maker.source(*shape)
    for change in (0, -2):
        maker.result(ReduceMean, [x], maker.format(exponent_of(x) + change), axes=axes, keepdims=keepdims)
    size = x.type.sample_size
    counted = in_rows(every_value(maker.storage)[: 1 << 12], size)
    rows = np.concatenate([patterns(maker.storage, size, zero_of(x), maker.random), counted])
    return maker.case({x: rows.reshape(-1, *shape)})


def _short(new: New, length: int) -> Case:
    """A chain of one product, or of none: the bias alone."""
    maker = new()
    x = maker.source(length)
    maker.layer(MatMul, x, np.full((length, 3), maker.weight_storage.lo), np.array([5, -7, 0]), right=1)
    return maker.case({x: patterns(maker.storage, max(length, 1), zero_of(x), maker.random)[:, :length]})
