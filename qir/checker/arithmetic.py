"""Arithmetic of the checker: rounding, narrowing and the formulas of requantize, written for it alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def rounded(value: Any, down: int, mode: str) -> Any:
    """Integers or arrays of them divided by 2**down, rounded."""
    value, unit = value * (1 << max(-down, 0)), 1 << max(down, 0)
    floor = value // unit
    rest, tie = 2 * (value - floor * unit), True
    match mode:
        case "floor" | "toward_zero":
            return floor + ((floor < 0) & (rest != 0) & (mode == "toward_zero"))
        case "half_down" | "half_even":
            tie = (floor % 2 == 1) & (mode == "half_even")
        case "half_away" | "half_toward_zero":
            tie = (floor < 0) == (mode == "half_toward_zero")
    return floor + ((rest > unit) | ((rest == unit) & tie))


def kept_ends(room: Any, overflow: str) -> tuple[int, int]:
    """The ends of what narrowing leaves as it is."""
    return (max(room.lo, -room.hi) if overflow == "saturate_symmetric" else room.lo), room.hi


def cut(lo: Any, hi: Any, room: Any, overflow: str) -> tuple[Any, Any]:
    """The ends of what narrowing makes of values between lo and hi, element by element."""
    least, most = kept_ends(room, overflow)
    if lo.dtype != object:
        least, most = max(least, -(1 << 63)), min(most, (1 << 63) - 1)
    leaves = (lo < least) | (hi > most)
    if overflow == "wrap":
        return np.where(leaves, least, lo), np.where(leaves, most, hi)
    low, high = (np.minimum(np.maximum(e, least), most) for e in (lo, hi))
    leaves &= overflow == "saturate_zero"
    return np.where(leaves, np.minimum(low, 0), low), np.where(leaves, np.maximum(high, 0), high)


def scaled(op: Any, x: int, channel: int) -> int:
    """What requantize makes of a centred x, already shifted by `input_shift`, before the zero point is added."""
    factor, shift = (e.data.reshape(-1)[channel % e.size].item() for e in (op.multiplier, op.shift))
    match op.form:
        case "float32":
            with np.errstate(over="ignore"):
                return int(np.clip(np.rint(np.int64(x).astype(np.float32) * np.float32(factor)), -(2.0**62), 2.0**62))
        case "double_away":
            real = max(-(2.0**62), min(float(x) * float(factor), 2.0**62))
            return math.trunc(real) + (round(math.copysign(1, real)) if abs(real) % 1 >= 0.5 else 0)
        case "single_round":
            return int(rounded(x * factor, 31 - shift, "half_up"))
        case "reduced_16":
            return int(rounded(x * min(rounded(factor, 16, "half_up"), 0x7FFF), 15 - shift, "half_up"))
        case "shift":
            return int(rounded(x, -shift, op.rounding))
    high = rounded((x << max(shift, 0)) * factor, 31, "half_up")
    return int(rounded(high, max(-shift, 0), "half_up" if op.form == "neon" else "half_away"))
