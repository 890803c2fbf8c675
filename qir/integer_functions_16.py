"""Logistic and tanh of 16-bit operands as TensorFlow Lite's int16 reference kernels compute them.

Both look a table of 256 entries up and interpolate. Operands have zero point 0, results scale 2^-15 and zero point 0.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qir.fixed_point import FixedPointError, Integers, Rounding, round_shift
from qir.integer_functions import Scale

#: The scale that both results have.
OUTPUT_SCALE: Final = 2.0**-15
_STEPS: Final = 24  # table entries for each unit of the argument
_LAST: Final = 255
_FACTOR_LIMIT: Final = 1 << 16  # times 16 bits it leaves 32


def logistic_16(x: Integers, input_scale: Scale) -> Integers:
    """The logistic function of int64 arrays of 16-bit integers, at scale 2^-15.

    Raises FixedPointError when the input scale is so large that the runtime's 32-bit product overflows.
    """
    steps = _steps(x, input_scale, (0,))
    result = _interpolated(np.abs(steps), 9, 0x7FFF << 10)
    return np.where(steps >= 0, result + 512, (1 << 25) - result + 511) >> 10


def tanh_16(x: Integers, input_scale: Scale) -> Integers:
    """The hyperbolic tangent of int64 arrays of 16-bit integers, `2 * logistic(2x) - 1`, at scale 2^-15.

    Raises FixedPointError as `logistic_16` does.
    """
    steps = _steps(x, input_scale, (0, 1))
    result = _interpolated(np.abs(steps), 8, 0xFFFF << 8) - (1 << 23)
    return np.where(steps >= 0, result + 128, 127 - result) >> 8


def _table() -> npt.NDArray[Any]:
    """Logistic at every 24th, in Q0.16, lifted by half of what a line to the next entry lacks midway."""
    at = np.arange(_LAST + 1) / _STEPS
    half = 0.5 / _STEPS

    def logistic(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.asarray(1 / (1 + np.exp(-x)))

    sag = logistic(at + half) - (logistic(at) + logistic(at + 2 * half)) / 2
    table: npt.NDArray[Any] = np.floor(65536 * (logistic(at) + sag / 2) + 0.5).astype(np.int64)
    table[_LAST] = 65535
    return table


def _steps(x: Integers, input_scale: Scale, exact_powers: tuple[int, ...]) -> Integers:
    """The operand in steps of 1 / (3 * 4096). Factors are truncated to 15 bits, but some powers of two are exact."""
    scale = float(np.float32(input_scale))
    power = round(math.log2(scale)) + 12
    if power in exact_powers and scale == 2.0 ** (power - 12):
        return x * (3 << power)
    factor, shift = scale * 4096 * 3, 0
    if factor >= _FACTOR_LIMIT:
        raise FixedPointError(f"logistic and tanh of 16 bits need an input scale below 16/3, not {scale!r}")
    while factor <= 32767 / 2 and shift <= 30:
        factor, shift = factor * 2, shift + 1
    return round_shift(x * int(factor), shift, Rounding.HALF_UP)


def _interpolated(magnitude: Integers, bits: int, beyond: int) -> Integers:
    table = _table()
    index = np.minimum(magnitude >> bits, _LAST - 1)
    part = magnitude & ((1 << bits) - 1)
    between = (table[index] << bits) + part * (table[index + 1] - table[index])
    return np.where(magnitude >> bits >= _LAST, beyond, between)
