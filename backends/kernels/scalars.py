"""Requantization of one accumulator, compiled: the formulas of `qir.fixed_point.requantize` on 64-bit registers."""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import njit

from qir.fixed_point import RequantizeForm, Rounding

#: Codes by which compiled code tells forms and roundings apart.
FORMS: Final = {form: code for code, form in enumerate(RequantizeForm)}
ROUNDINGS: Final = {rounding: code for code, rounding in enumerate(Rounding)}

_DOUBLE: Final = FORMS[RequantizeForm.DOUBLE_ROUND]
_SINGLE: Final = FORMS[RequantizeForm.SINGLE_ROUND]
_NEON: Final = FORMS[RequantizeForm.NEON]
_REDUCED: Final = FORMS[RequantizeForm.REDUCED_16]
_FLOOR: Final = ROUNDINGS[Rounding.FLOOR]
_TOWARD_ZERO: Final = ROUNDINGS[Rounding.TOWARD_ZERO]
_HALF_UP: Final = ROUNDINGS[Rounding.HALF_UP]
_HALF_TOWARD_ZERO: Final = ROUNDINGS[Rounding.HALF_TOWARD_ZERO]
HALF_AWAY: Final = ROUNDINGS[Rounding.HALF_AWAY]
_HALF_DOWN: Final = ROUNDINGS[Rounding.HALF_DOWN]


@njit(nogil=True, cache=True)
def double_round(acc, multiplier, shift):
    """The form `double_round` for a 32-bit accumulator and a positive 31-bit multiplier."""
    left = max(shift, 0)
    high = (np.int64(np.int32(np.int64(acc) << left)) * multiplier + (1 << 30)) >> 31
    right = left - shift
    mask = (np.int64(1) << right) - 1
    return (high >> right) + np.int64((high & mask) > (mask >> 1) + np.int64(high < 0))


@njit(nogil=True, cache=True)
def round_shift(value, shift, rounding):
    """`value / 2**shift` by a rounding code; a shift of 63 or more is refused by the caller."""
    if shift <= 0:
        return value << -shift
    floor = value >> shift
    rest = value - (floor << shift)
    half = np.int64(1) << (shift - 1)
    if rounding == _FLOOR:
        return floor
    if rounding == _TOWARD_ZERO:
        return floor + np.int64(floor < 0 and rest != 0)
    if rest != half:
        return floor + np.int64(rest > half)
    if rounding == _HALF_UP:
        return floor + 1
    if rounding == _HALF_DOWN:
        return floor
    if rounding == HALF_AWAY:
        return floor + np.int64(floor >= 0)
    if rounding == _HALF_TOWARD_ZERO:
        return floor + np.int64(floor < 0)
    return floor + (floor & 1)


@njit(nogil=True, cache=True)
def integer_form(acc, multiplier, shift, form, rounding):
    """Any integer form, by its code."""
    if form == _DOUBLE:
        return double_round(acc, multiplier, shift)
    if form == _NEON:
        left = max(shift, 0)
        high = (np.int64(np.int32(np.int64(acc) << left)) * multiplier + (1 << 30)) >> 31
        return round_shift(high, left - shift, _HALF_UP)
    if form == _SINGLE:
        return round_shift(acc * multiplier, 31 - shift, _HALF_UP)
    if form == _REDUCED:
        reduced = min((multiplier + (1 << 15)) >> 16, 0x7FFF)
        return round_shift(acc * reduced, 15 - shift, _HALF_UP)
    return round_shift(acc, -shift, rounding)
