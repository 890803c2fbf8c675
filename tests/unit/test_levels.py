"""Levels of weights: which there are, which one is nearest, codebooks against a search of all, and their scales."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qir.backend import load_target
from qir.errors import QirError
from qir.fixed_point import Rounding
from qir.levels import codebook, level_scales, nearest_levels, power_of_two_levels
from qir.ops.fixed_rescale import QuantizeRule, quantize_array, quantize_reals
from qir.passes.widths.storage import weight_storage
from qir.target import WeightFormat
from qir.types import BINARY, S8, IntegerType, affine, integer, of_levels

Reals = npt.NDArray[Any]


# Types


def test_powers_of_two() -> None:
    found = [power_of_two_levels(bits) for bits in range(2, 6)]
    assert found[0] == integer(2).narrowed(-1, 1)
    assert [str(kind) for kind in found[:3]] == [
        "s2[-1, 1]",
        "s4{-4, -2, -1, 0, 1, 2, 4}",
        "s8{-64, -32, -16, -8, -4, -2, -1, 0, 1, 2, 4, 8, 16, 32, 64}",
    ]
    assert [kind.stored_bits for kind in found] == [2, 3, 4, 5]
    assert [(kind.base_name, kind.hi) for kind in found] == [("s2", 1), ("s4", 4), ("s8", 64), ("s16", 1 << 14)]
    assert all(kind.is_shift for kind in found)
    for bits in (1, 6):
        with pytest.raises(QirError, match=f"power-of-two weights have 2 to 5 bits, not {bits}"):
            power_of_two_levels(bits)


@pytest.mark.parametrize(
    ("kind", "stored", "is_shift"),
    [
        (BINARY, 1, True),
        (integer(2), 2, True),
        (integer(2).narrowed(-1, 1), 2, True),
        (integer(3), 3, False),
        (integer(2, signed=False), 2, False),
        (integer(1, signed=False), 1, True),
        (S8.narrowed(-1, 2), 8, True),
        (of_levels((-3, 1)), 1, False),
        (of_levels((-64, 0, 1)), 2, True),
        (of_levels(range(-32, 32)), 6, False),
        (of_levels((5, 9, 10, 11, 12)), 3, False),
    ],
)
def test_what_is_stored_and_what_is_a_shift(kind: IntegerType, stored: int, is_shift: bool) -> None:
    assert (kind.stored_bits, kind.is_shift) == (stored, is_shift)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: of_levels((1,)), "an integer type has 2 to 64 levels, not 1"),
        (lambda: of_levels(()), "an integer type has 2 to 64 levels, not 0"),
        (lambda: of_levels(range(65)), "an integer type has 2 to 64 levels, not 65"),
        (lambda: of_levels((0, 2, 1)), r"levels ascend, and \[0, 2, 1\] do not"),
        (lambda: of_levels((0, 1, 1)), r"levels ascend, and \[0, 1, 1\] do not"),
        (lambda: of_levels((0, 1 << 32)), "an integer type with levels has at most 32 bits, not 34"),
        (lambda: IntegerType(8, True, -1, 2, (-1, 1)), r"bounds \[-1, 2\] are not those of the levels \[-1, 1\]"),
        (lambda: IntegerType(2, True, -3, 1, (-3, 1)), r"storage bounds \[-3, 1\] do not fit s2"),
        (lambda: affine(BINARY, 0.5, 1), r"levels have no zero point but 0, and s2\{-1, 1\} is given one"),
    ],
)
def test_bad_levels_are_refused(make: Any, message: str) -> None:
    with pytest.raises(QirError, match=message):
        make()


def test_levels_are_part_of_the_type_and_narrowing_leaves_them() -> None:
    kind = of_levels((-5, -1, 1, 5))
    assert (str(kind), kind.bits, kind.dtype.name) == ("s4{-5, -1, 1, 5}", 4, "int8")
    assert kind != integer(4).narrowed(-5, 5)
    assert kind.narrowed(-5, 5) == integer(4).narrowed(-5, 5)


# The nearest level


def by_definition(real: Fraction, levels: tuple[int, ...], rounding: Rounding) -> int:
    """The docstring of `nearest_levels` in exact fractions."""
    if real <= levels[0] or real >= levels[-1]:
        return levels[0] if real <= levels[0] else levels[-1]
    low, high = next((a, b) for a, b in itertools.pairwise(levels) if a <= real < b)
    if real == low or rounding is Rounding.FLOOR:
        return low
    if rounding is Rounding.TOWARD_ZERO:
        return low if real >= 0 else high
    below, above = real - low, high - real
    if below != above:
        return low if below < above else high
    match rounding:
        case Rounding.HALF_UP:
            return high
        case Rounding.HALF_DOWN:
            return low
        case Rounding.HALF_TOWARD_ZERO:
            return low if real >= 0 else high
        case Rounding.HALF_EVEN if (low + high) % 2:
            return low if low % 2 == 0 else high
    return high if real >= 0 else low


level_sets = st.one_of(
    st.sampled_from(
        [(-1, 1), (-1, 0, 1), (-4, -2, -1, 0, 1, 2, 4), (-5, -1, 1, 5), (2, 4), (-7, -3), tuple(range(-8, 8))]
    ),
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=2, max_size=9, unique=True).map(lambda v: tuple(sorted(v))),
)


@given(levels=level_sets, rounding=st.sampled_from(Rounding), data=st.data())
def test_nearest_levels_by_definition(levels: tuple[int, ...], rounding: Rounding, data: st.DataObject) -> None:
    middles = [(a + b) / 2 for a, b in itertools.pairwise(levels)]
    near = [np.nextafter(np.float32(m), np.float32(end)) for m in middles for end in (-np.inf, np.inf)]
    some = data.draw(st.lists(st.floats(-(2.0**33), 2.0**33, width=32), max_size=5))
    reals = np.array([*middles, *near, *levels, *some, 0.0, -0.0], np.float64)
    found = nearest_levels(reals, levels, rounding)
    assert found.dtype == np.int64
    assert found.tolist() == [by_definition(Fraction(r), levels, rounding) for r in reals.tolist()]


@pytest.mark.parametrize("rounding", Rounding)
def test_all_integers_as_levels_are_rounded_to_as_integers_are(rounding: Rounding) -> None:
    reals = np.concatenate([np.arange(-80, 80) / 8, [np.nan, np.inf, -np.inf, -0.49999997]]).astype(np.float32)
    expected = np.clip(quantize_reals(reals, rounding), -8, 7)
    assert np.array_equal(nearest_levels(reals, tuple(range(-8, 8)), rounding), expected)


def test_quantize_array_takes_the_nearest_level_in_units_of_the_scale() -> None:
    kind = affine(of_levels((-5, -1, 1, 5)), [0.5, 0.25], axis=0)
    reals = np.array([[0.0, 1.5, 1.6, -9.0], [0.0, 0.75, 0.7, -0.7501]], np.float32)
    found = quantize_array(reals, kind, QuantizeRule.DIVIDE, Rounding.HALF_AWAY)
    assert found.tolist() == [[1, 5, 5, -5], [1, 5, 1, -5]]
    assert quantize_array(reals[:, :2], kind, QuantizeRule.DIVIDE, Rounding.HALF_TOWARD_ZERO).tolist() == [[-1, 1]] * 2


# Codebooks


def squared_error(data: Reals, levels: tuple[int, ...], step: float) -> float:
    return float(((data / step - nearest_levels(data / step, levels, Rounding.HALF_AWAY)) ** 2).sum())


@pytest.mark.parametrize("seed", range(3))
def test_a_codebook_of_1_bit_is_the_best_pair_of_all(seed: int) -> None:
    data = np.random.default_rng(seed).laplace(size=40).astype(np.float32)
    step = float(np.abs(data.astype(np.float64)).max()) / 127
    found = codebook(data, 1, None)
    best = min(itertools.combinations(range(-127, 128), 2), key=lambda pair: squared_error(data, pair, step))
    assert found.levels is not None
    assert squared_error(data, found.levels, step) == pytest.approx(squared_error(data, best, step))


@pytest.mark.parametrize("bits", range(1, 7))
def test_codebooks_of_every_width(bits: int) -> None:
    random = np.random.default_rng(bits)
    data = random.normal(size=(3, 500)).astype(np.float32) * np.array([[1], [8], [0]], np.float32)
    found = codebook(data, bits, 0)
    assert (found.bits, found.stored_bits, len(found.levels or ())) == (8, bits, 1 << bits)
    assert found.levels is not None
    steps = np.abs(data).max(axis=1, keepdims=True).astype(np.float64) / 127
    scaled = data / np.where(steps > 0, steps, 1)
    least = squared_error(scaled, found.levels, 1.0)
    for _ in range(30):  # nothing near it is better
        moved = tuple(
            sorted(
                {
                    int(np.clip(v + d, -127, 127))
                    for v, d in zip(found.levels, random.integers(-1, 2, 1 << bits), strict=True)
                }
            )
        )
        if len(moved) > 1:
            assert squared_error(scaled, moved, 1.0) >= least * (1 - 1e-12)
    assert codebook(data, bits, 0) == found


def test_a_codebook_of_few_values_holds_them() -> None:
    values = np.array([-127, -20, 3, 90], np.float32) / 127
    assert codebook(np.tile(values, 9), 2, None).levels == (-127, -20, 3, 90)
    assert codebook(np.tile(values, 9) * 0.75, 2, None, powers=True).levels == (-96, -15, 2, 68)


@pytest.mark.parametrize(
    ("data", "levels"),
    [([[0.0, 0.0]], (0, 1)), ([[3.0, 3.0]], (0, 127)), ([[-1.0], [-5.0]], (-127, 0)), ([[]], (0, 1))],
)
def test_a_codebook_has_two_levels_at_least(data: list[list[float]], levels: tuple[int, ...]) -> None:
    found = codebook(np.array(data, np.float32), 4, 0)
    assert (found.levels, found.stored_bits) == (levels, 1)


# Scales


def test_binary_weights_have_the_mean_magnitude() -> None:
    data = np.array([[1.0, -2.0, 3.0, -6.0], [0.5, 0.5, 0.5, -0.5], [0, 0, 0, 0]], np.float32)
    assert level_scales(data, BINARY, 0).tolist() == [3.0, 0.5, 0.5 / 256]
    assert level_scales(data[:1], BINARY, None) == 3.0
    # 2 and 4 are as far from 3; 2.9 and 3.1 are nearer to one of them
    assert level_scales(data[:1], BINARY, None, powers=True) == 4.0
    assert level_scales(data[:1] * 2.9 / 3, BINARY, None, powers=True) == 2.0


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("kind", [BINARY, *map(power_of_two_levels, range(2, 6)), of_levels((-100, -20, 3, 60))])
def test_scales_of_levels_leave_little_more_error_than_the_best_of_300(kind: IntegerType, axis: int | None) -> None:
    data = np.random.default_rng(0).normal(size=(40, 50)).astype(np.float32)
    levels = kind.levels or tuple(range(kind.lo, kind.hi + 1))
    scales = level_scales(data, kind, axis)
    assert scales.shape == (() if axis is None else (data.shape[axis],))
    totals = np.zeros(3)
    for place, part in enumerate([data] if axis is None else np.moveaxis(data, axis, 0)):
        widest = float(np.abs(part).max()) / max(-kind.lo, kind.hi)
        error, whole, *others = (
            squared_error(part, levels, s) * s**2
            for s in map(float, (scales.reshape(-1)[place], widest, *(widest * np.exp2(np.linspace(-3, 1, 300)))))
        )
        assert error <= whole
        totals += error, whole, min(others)
    assert totals[0] < 1.1 * totals[2]
    assert totals[0] < 0.98 * totals[1]
    powers = level_scales(data, kind, axis, powers=True)
    assert np.array_equal(np.exp2(np.round(np.log2(powers))), powers)
    assert (np.abs(np.log2(powers / scales)) < 1).all()


def test_weights_of_zeros_stay_small_where_no_level_is_zero() -> None:
    data = np.zeros((3, 8), np.float32)
    assert level_scales(data, BINARY, 0).tolist() == [1 / 256] * 3
    assert level_scales(data, power_of_two_levels(3), 0).tolist() == [0.0] * 3


# What a target has


def test_the_storage_of_every_width_and_format() -> None:
    target = load_target("fpga")
    data = np.random.default_rng(0).normal(size=(4, 500)).astype(np.float32)
    for bits in target.weights.bits:
        for item in target.weights.formats_of(bits):
            found = weight_storage(target, bits, item, data, 0)
            assert found.stored_bits == bits
            assert found.is_shift == ((bits <= 2 and item is WeightFormat.UNIFORM) or item is WeightFormat.POWER_OF_TWO)
    with pytest.raises(QirError, match="a codebook is made for weights; give their data"):
        weight_storage(target, 4, WeightFormat.CODEBOOK)
    with pytest.raises(QirError, match="power-of-two weights have 2 to 5 bits, not 6"):
        weight_storage(target, 6, WeightFormat.POWER_OF_TWO)
    assert weight_storage(load_target("tensorrt"), 4) == integer(4)
    assert weight_storage(target, 8) == integer(8)
