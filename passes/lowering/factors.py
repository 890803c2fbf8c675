"""Factors of requantization in every form, from the scales that they follow from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qir.fixed_point import RequantizeForm, floor_log2
from qir.integer_functions import Multiplier, mean_multiplier, product_multiplier, rescale_multiplier
from qir.target import Requantizer

Numbers = npt.NDArray[Any]


@dataclass(frozen=True)
class Factor:
    """The multiplier and shift of a requantize: 0-d, or 1-d along the last axis."""

    multiplier: Numbers
    shift: Numbers

    @staticmethod
    def of(pairs: Multiplier | Sequence[Multiplier]) -> Factor:
        """From one multiplier of TensorFlow Lite, or one a channel."""
        single = isinstance(pairs, Multiplier)
        table = np.array([pairs] if single else list(pairs), np.int64).reshape(-1, 2)
        return Factor(*(np.asarray(table[0, i] if single else table[:, i]) for i in (0, 1)))


def factor(rule: Requantizer, scales: Sequence[Numbers | np.float32], output: np.float32, count: int = 1) -> Factor:
    """The factor `product of the scales / (output * count)` in the arithmetic of the rule's form.

    `scales` are one or two float32 values, of which one may be an array along channels; `count` is that of a mean.

    - Integer forms: as TensorFlow Lite derives its multipliers, in float64.
    - `float32`: the product of the scales, then over the output scale, or times its reciprocal, each operation rounded
      to float32; of a mean, `s / (so * n)`.
    - `double_away`: product and quotient in float64.
    - `shift`: exact; all scales are powers of two.
    """
    arrays = np.broadcast_arrays(*(np.asarray(s, np.float32) for s in scales))
    match rule.form:
        case RequantizeForm.FLOAT32 | RequantizeForm.DOUBLE_AWAY:
            return _real(rule, arrays, output, count)
        case RequantizeForm.SHIFT:
            shift = np.asarray(sum(floor_log2(a) for a in arrays) - floor_log2(output))
            assert count == 1
            return Factor(np.ones_like(shift), shift)
    pairs = [_pair([a.reshape(-1)[i] for a in arrays], output, count) for i in range(arrays[0].size)]
    return Factor.of(pairs if arrays[0].ndim else pairs[0])


def _pair(scales: Sequence[np.float32], output: np.float32, count: int) -> Multiplier:
    if len(scales) == 2:
        return product_multiplier(scales[0], scales[1], output)
    return rescale_multiplier(scales[0], output) if count == 1 else mean_multiplier(scales[0], output, count)


def _real(rule: Requantizer, arrays: Sequence[Numbers], output: np.float32, count: int) -> Factor:
    if rule.form is RequantizeForm.DOUBLE_AWAY:
        wide = [a.astype(np.float64) for a in arrays]
        multiplier = np.asarray(math.prod(wide[1:], start=wide[0]) / (np.float64(output) * count))
    else:
        product = arrays[0] if len(arrays) == 1 else arrays[0] * arrays[1]
        divisor = np.float32(output * np.float32(count))
        multiplier = np.asarray(product * (np.float32(1) / divisor) if rule.reciprocal else product / divisor)
    return Factor(multiplier, np.zeros(multiplier.shape, np.int64))
