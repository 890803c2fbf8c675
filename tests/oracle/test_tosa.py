"""The requantization forms against RESCALE of the TOSA reference model, on the whole domain that TOSA gives it.

TOSA's shift is a right shift from 2 to 62 of the product: 31 less ours, or 15 less ours where a multiplier has 16 bits.
Its multipliers need not be normalized. A value must fit `shift` signed bits, where no left shift can overflow.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from oracle.tosa_reference import REQUIREMENT, TosaReference

from qir.fixed_point import INT32_MAX, INT32_MIN, RequantizeForm, requantize, saturate

Array = npt.NDArray[Any]

ROUNDING = {"SINGLE_ROUND": RequantizeForm.SINGLE_ROUND, "DOUBLE_ROUND": RequantizeForm.DOUBLE_ROUND}
LIMITS = {"INT8": (-128, 127), "INT16": (-32768, 32767), "INT32": (INT32_MIN, INT32_MAX)}
LEAST_OUTPUTS = 100_000


@pytest.fixture(scope="session")
def reference(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> TosaReference:
    """The reference model, fetched once for a clone of the repository."""
    cache: pytest.Cache | None = getattr(pytestconfig, "cache", None)
    name = REQUIREMENT.replace("==", "-")
    return TosaReference(tmp_path_factory.mktemp(name) if cache is None else cache.mkdir(name))


def channels(rng: np.random.Generator, bits: int) -> tuple[Array, Array]:
    """Multipliers of `bits` bits and right shifts: every shift with extreme, normalized and small multipliers."""
    top = 1 << bits
    chosen = [
        0,
        1,
        3,
        5,
        top // 2 - 1,
        top // 2,
        top // 2 + 1,
        3 * top // 4,
        5 * top // 8,
        7 * top // 8,
        top - 2,
        top - 1,
    ]
    every_shift = np.arange(2, 63)
    drawn = np.concatenate(
        [rng.integers(top // 2, top, (4, every_shift.size)), rng.integers(1, top, (2, every_shift.size))]
    )
    multipliers = np.concatenate([np.broadcast_to(np.array(chosen)[:, None], (len(chosen), every_shift.size)), drawn])
    return multipliers.reshape(-1), np.broadcast_to(every_shift, multipliers.shape).reshape(-1)


def column(rng: np.random.Generator, multiplier: int, shift: int, low: int, high: int) -> Array:
    """200 accumulators in [low, high]: ends, all magnitudes, and the neighbours of ties and of the results' ends."""
    ends = [low, low + 1, -2, -1, 0, 1, 2, high - 1, high]
    length = high.bit_length()
    sizes = [rng.integers(-(1 << k), 1 << k) for k in rng.integers(0, length + 1, 56)]
    largest = (high * multiplier) >> shift
    halves = [int(v) for v in rng.integers(-min(largest, 200) - 1, min(largest, 200) + 1, 15)]
    halves += [int(v) for v in rng.integers(-largest - 1, largest + 1, 12)]
    ties = [((2 * half + 1) << shift) // (2 * max(multiplier, 1)) + step for half in halves for step in range(-2, 3)]
    drawn = np.array([*ends, *sizes, *ties], object)
    assert drawn.size == 200
    return np.asarray(np.clip(drawn, low, high), np.int64)


def accumulators(rng: np.random.Generator, multipliers: Array, shifts: Array, bits: int) -> Array:
    """Columns of what TOSA allows for each channel of values of `bits` bits."""
    limits = [(1 << min(bits - 1, int(shift) - 1 if bits == 32 else bits - 1)) for shift in shifts]
    columns = [
        column(rng, int(multiplier), int(shift), -limit, limit - 1)
        for multiplier, shift, limit in zip(multipliers, shifts, limits, strict=True)
    ]
    return np.stack(columns, axis=1)


@pytest.mark.parametrize(
    ("target", "zero_point"), [("INT32", 0), ("INT16", 0), ("INT8", 0), ("INT8", -128), ("INT8", 7)]
)
@pytest.mark.parametrize("rounding_mode", ROUNDING)
def test_rescale_of_32_bits(reference: TosaReference, rounding_mode: str, target: str, zero_point: int) -> None:
    rng = np.random.default_rng(1)
    multipliers, shifts = channels(rng, 31)
    acc = accumulators(rng, multipliers, shifts, 32)
    got = reference.rescale(acc, multipliers, shifts, rounding_mode, target=target, zero_point=zero_point)
    results = {
        form: saturate(requantize(acc, multipliers, 31 - shifts, form) + zero_point, *LIMITS[target])
        for form in ROUNDING.values()
    }
    assert got.size >= LEAST_OUTPUTS
    assert np.array_equal(got, results.pop(ROUNDING[rounding_mode]))
    assert (got != results.popitem()[1]).sum() > 1000, "the accumulators do not tell the forms apart"


@pytest.mark.parametrize("rounding_mode", ROUNDING)
def test_rescale_by_powers_of_two(reference: TosaReference, rounding_mode: str) -> None:
    """Every accumulator of 14 bits, each second of which is a tie at one shift or another, by every power of two."""
    shifts = np.arange(30, 43)
    acc = np.broadcast_to(np.arange(-(1 << 13), 1 << 13)[:, None], (1 << 14, shifts.size))
    multipliers = np.full(shifts.size, 1 << 30)
    got = reference.rescale(acc, multipliers, shifts, rounding_mode)
    assert got.size >= LEAST_OUTPUTS
    assert np.array_equal(got, requantize(acc, multipliers, 31 - shifts, ROUNDING[rounding_mode]))


def test_rescale_of_48_bits_is_reduced_16(reference: TosaReference) -> None:
    rng = np.random.default_rng(2)
    multipliers, shifts = channels(rng, 15)
    acc = accumulators(rng, multipliers, shifts, 48)
    largest = (INT32_MAX << shifts.astype(object)) // np.maximum(multipliers, 1).astype(object) - 1
    acc = np.minimum(np.maximum(acc, -largest), largest).astype(np.int64)  # TOSA's results have 32 bits
    got = reference.rescale(acc, multipliers, shifts, "SINGLE_ROUND", source="INT48")
    assert got.size >= LEAST_OUTPUTS
    assert np.array_equal(got, requantize(acc, multipliers << 16, 15 - shifts, RequantizeForm.REDUCED_16))


def test_what_tosa_leaves_open_is_refused(reference: TosaReference) -> None:
    value, multiplier = np.array([[1 << 20]]), np.array([1 << 30])
    assert reference.rescale(value, multiplier, np.array([22]), "SINGLE_ROUND").item() == 1 << 28
    for shift in (20, 1, 63):
        with pytest.raises(RuntimeError):
            reference.rescale(value, multiplier, np.array([shift]), "SINGLE_ROUND")
