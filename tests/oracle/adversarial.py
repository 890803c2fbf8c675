"""Scales and accumulators on which wrong rounding shows.

Random scales hide rounding bugs, so scales are powers of two, or such that one accumulator lands within a float32
rounding error of a tie: then a factor derived in the wrong float type shows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

F32 = np.float32


def near_tie(product: float, acc: int, rng: np.random.Generator) -> np.float32:
    """An output scale that puts `acc * product / scale` within a float32 rounding error of a tie."""
    return F32(product * abs(acc) / (rng.integers(20, 127) + 0.5))


def scale_pairs(rng: np.random.Generator, count: int) -> list[tuple[float, float]]:
    """Input and output scales: powers of two times small odd numbers, and such that some input lies near a tie."""
    powers = [(0.5, 0.5 * n / m) for n in (1, 2, 3, 5, 6, 7, 10, 14) for m in (1, 4)]
    inputs = rng.uniform(0.01, 0.1, count).astype(F32)
    return powers + [(float(s), float(near_tie(float(s), int(rng.integers(100, 256)), rng))) for s in inputs]


def boundary_accumulators(real: float) -> npt.NDArray[Any]:
    """Accumulators on both sides of every boundary between two outputs, as int32."""
    ties = np.round((np.arange(-140, 140) + 0.5) / real).astype(np.int64)
    return np.unique(np.clip(ties[:, None] + np.arange(-12, 13), -(2**31) + 1, 2**31 - 1))


def activation_scales(seed: int, count: int) -> list[float]:
    rng = np.random.default_rng(seed)
    return [2.0**k for k in range(-12, 3)] + [float(F32(s)) for s in np.exp(rng.uniform(-9, 1, count))]


def hard_swish_scales() -> list[tuple[float, float]]:
    """Input and output scales, some of which put the 16-bit multiplier near a tie of its own rounding."""
    rng = np.random.default_rng(10)
    ratios = [2.0**k for k in range(-8, 7)] + [float(ratio) for ratio in np.exp(rng.uniform(-5, 4, 30))]
    cases = [(float(F32(ratio * out)), out) for ratio in ratios for out in (2.0**-7, 0.05, 0.75)]
    for out in rng.uniform(0.01, 0.1, 60).astype(F32).tolist():
        mantissa = (rng.integers(1 << 14, 1 << 15) + 0.5) / (1 << 15)
        cases.append((float(F32(mantissa * 2.0 ** rng.integers(-1, 6) * out)), out))
    return cases
