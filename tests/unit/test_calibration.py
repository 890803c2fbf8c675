"""Histograms that merge exactly, observers, and the search for scales."""

from __future__ import annotations

import functools
import math
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from qir.calibration import MAXIMUM_BINS, Calibration, Histogram
from qir.errors import CalibrationError
from qir.observers import Entropy, MeanSquaredError, MinMax, Observer, Percentile, observer_from_string
from qir.scale_search import (
    affine_from_range,
    mean_squared_error,
    power_of_two_from_range,
    search_affine,
    search_power_of_two,
    search_range,
)

Real = float | np.float32
LARGEST = float(np.finfo(np.float32).max)
DENORMAL = 2.0**-149

any_float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
# Plain magnitudes beside every extreme: the first give histograms of many bins, the others of odd exponents.
some_values = st.one_of(
    st.lists(any_float32, min_size=1, max_size=40),
    st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=40),
    st.lists(st.floats(0, 64, width=32), min_size=1, max_size=40),
)
histograms = some_values.map(Histogram.of)
observers = st.sampled_from(
    [MinMax(), Percentile(), Percentile(50.0), Entropy(), Entropy(levels=4), MeanSquaredError()]
)


def heavy_tails() -> np.ndarray:
    return np.random.default_rng(7).standard_t(3, 200_000).astype(np.float32)


def quantize(values: np.ndarray, scale: Real, zero_point: int, qmin: int, qmax: int) -> np.ndarray:
    steps = np.clip(np.rint(values / float(scale)), qmin - zero_point, qmax - zero_point)
    return np.asarray(steps * float(scale))


def squared_error(values: np.ndarray, scale: Real, zero_point: int, qmin: int, qmax: int) -> float:
    exact = values.astype(np.float64)
    return float(np.mean((exact - quantize(exact, scale, zero_point, qmin, qmax)) ** 2))


# Histogram: against the definition, in exact arithmetic


def bin_of(value: float, exponent: int) -> int:
    return math.floor(Fraction(value) / Fraction(2) ** exponent)


@given(some_values)
def test_every_value_is_counted_in_its_bin(values: list[float]) -> None:
    histogram = Histogram.of(values)
    expected = np.zeros(len(histogram.counts), np.int64)
    for value in values:
        expected[bin_of(value, histogram.exponent) - histogram.first] += 1
    assert histogram.counts.tolist() == expected.tolist()
    assert histogram.total == len(values)
    assert (histogram.minimum, histogram.maximum) == (min(values), max(values))


@given(some_values)
def test_exponent_is_the_smallest_that_fits(values: list[float]) -> None:
    histogram = Histogram.of(values)
    assert len(histogram.counts) <= MAXIMUM_BINS
    finer = histogram.exponent - 1
    bins = bin_of(histogram.maximum, finer) - bin_of(histogram.minimum, finer) + 1
    magnitude = max(abs(histogram.minimum), abs(histogram.maximum))
    spacing = max(math.frexp(magnitude)[1] - 24, -149) if magnitude else -149
    assert bins > MAXIMUM_BINS or histogram.exponent == spacing


@given(some_values, st.randoms(use_true_random=False))
def test_order_does_not_matter(values: list[float], generator: random.Random) -> None:
    shuffled = list(values)
    generator.shuffle(shuffled)
    assert Histogram.of(shuffled) == Histogram.of(values)
    one_by_one = functools.reduce(Histogram.observe, ([value] for value in shuffled[1:]), Histogram.of(shuffled[:1]))
    assert one_by_one == Histogram.of(values)


@given(st.lists(some_values, min_size=1, max_size=5))
def test_shards_merge_to_the_whole(shards: list[list[float]]) -> None:
    whole = Histogram.of([value for shard in shards for value in shard])
    parts = [Histogram.of(shard) for shard in shards]
    assert functools.reduce(Histogram.merge, parts) == whole
    assert functools.reduce(Histogram.merge, parts[::-1]) == whole
    assert hash(functools.reduce(Histogram.merge, parts)) == hash(whole)


@given(histograms, histograms, histograms)
def test_merge_is_associative_and_commutative(a: Histogram, b: Histogram, c: Histogram) -> None:
    assert a.merge(b).merge(c) == a.merge(b.merge(c))
    assert a.merge(b) == b.merge(a)


@given(some_values)
def test_edges_hold_the_values(values: list[float]) -> None:
    histogram = Histogram.of(values)
    lower, upper = histogram.edges()
    for value in values:
        place = bin_of(value, histogram.exponent) - histogram.first
        assert lower[place] <= value <= upper[place]
    assert (lower[0], upper[-1]) == (histogram.minimum, histogram.maximum)
    assert np.all(lower[1:] == upper[:-1])


@pytest.mark.parametrize(
    ("values", "exponent", "first", "bins"),
    [
        ([0.0, -0.0], -149, 0, 1),
        ([1.0, 1.0], -23, 1 << 23, 1),
        ([-3.0], -22, -3 << 22, 1),
        ([DENORMAL], -149, 1, 1),
        ([-DENORMAL, DENORMAL], -149, -1, 3),
        ([LARGEST], 104, (1 << 24) - 1, 1),
        ([-LARGEST, LARGEST], 118, -1024, 2048),
        ([0.0, 2047.0], 0, 0, 2048),
        ([0.0, 2048.0], 1, 0, 1025),
        ([-1.0, 2047.0], 1, -1, 1025),
    ],
)
def test_degenerate_and_extreme_frames(values: list[float], exponent: int, first: int, bins: int) -> None:
    histogram = Histogram.of(values)
    assert (histogram.exponent, histogram.first, len(histogram.counts)) == (exponent, first, bins)
    assert histogram.total == len(values)


def test_large_arrays_of_any_layout_count_as_their_elements() -> None:
    data = np.random.default_rng(1).normal(size=(300, 70, 10)).astype(np.float32)
    whole = Histogram.of(data)
    assert whole == Histogram.of(np.asfortranarray(data)) == Histogram.of(data[::-1, ::-1])
    assert whole == functools.reduce(Histogram.merge, map(Histogram.of, data))
    index = np.floor(data.astype(np.float64).ravel() / 2.0**whole.exponent).astype(int) - whole.first
    assert np.array_equal(np.bincount(index), whole.counts)


def test_equality_is_by_content() -> None:
    assert Histogram.of([0.0, 1.0, 1.0]) == Histogram.of([1.0, 0.0, 1.0])
    assert Histogram.of([0.0, 1.0, 1.0]) != Histogram.of([0.0, 0.0, 1.0])
    assert Histogram.of([0.0, 1.0]) != Histogram.of([-0.5, 1.0])
    assert Histogram.of([0.0]) != 0.0


def test_counts_cannot_be_changed_from_outside() -> None:
    histogram = Histogram.of([0.0])
    with pytest.raises(ValueError, match="read-only"):
        histogram.counts[0] = 5
    mine = np.array([2], np.int64)
    made = Histogram(0.0, 0.0, -149, 0, mine)
    mine[0] = 9
    assert made.total == 2


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8, np.uint64, np.bool_])
def test_real_dtypes_are_rounded_to_float32(dtype: type) -> None:
    assert Histogram.of(np.array([0, 1, 1], dtype)) == Histogram.of([0.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1.0, math.nan, math.inf], "2 of 3 values are NaN or infinite in float32, the first is nan at flat index 1"),
        ([-math.inf], "the first is -inf at flat index 0"),
        ([1e39], "the first is inf"),
        (np.zeros((0, 3)), r"of shape \(0, 3\) holds no values"),
        (["a"], "must be real numbers, not <U1"),
        ([1j], "must be real numbers, not complex128"),
    ],
)
def test_bad_data_is_refused(data: ArrayLike, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        Histogram.of(data)
    with pytest.raises(CalibrationError, match=message):
        Histogram.of([0.0]).observe(data)
    with pytest.raises(CalibrationError, match=f"value %conv1.out: .*{message}"):
        Calibration().observe({"conv1.out": data})


@given(histograms)
def test_array_round_trip(histogram: Histogram) -> None:
    array = histogram.to_array()
    assert array.dtype == np.int64
    again = Histogram.from_array(array)
    assert again == histogram
    assert (again.exponent, again.first) == (histogram.exponent, histogram.first)


def damaged(position: int, value: int) -> np.ndarray:
    array = Histogram.of([-1.0, 0.25, 1.0]).to_array()
    array[position] = value
    return array


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(4, np.int64), "over 4 entries"),
        (np.zeros(8, np.float32), "not float32"),
        (np.zeros((2, 8), np.int64), r"of shape \(2, 8\)"),
        (damaged(0, -1), "not float32 bits"),
        (damaged(0, 0x7FC00000), "minimum nan is not a finite"),
        (damaged(1, 0xBFC00000), "exceeds maximum"),
        (damaged(2, 0), "do not belong"),
        (damaged(3, 0), "do not belong"),
        (damaged(4, 0), "the first and the last above 0"),
        (damaged(5, -1), "at least 0"),
        (damaged(0, 0)[:-1], "do not belong"),
    ],
)
def test_malformed_arrays_are_refused(array: np.ndarray, message: str) -> None:
    with pytest.raises(CalibrationError, match=f"value %x: histogram: .*{message}"):
        Calibration.from_arrays({"x": array})


def test_fields_outside_float32_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"0\.1 is not a finite float32"):
        Histogram(0.1, 0.1, -149, 0, np.array([1], np.int64))
    with pytest.raises(CalibrationError, match=r"1e\+300 is not a finite float32"):
        Histogram(0.0, 1e300, -149, 0, np.array([1], np.int64))
    with pytest.raises(CalibrationError, match="must be int64"):
        Histogram(0.0, 0.0, -149, 0, np.array([1.0]))


# Calibration

batches = st.dictionaries(st.sampled_from(["x", "conv1", "y"]), some_values, max_size=3)


@given(st.lists(batches, min_size=1, max_size=4))
def test_calibration_shards_merge_to_the_whole(shards: list[dict[str, list[float]]]) -> None:
    whole = functools.reduce(Calibration.observe, shards, Calibration())
    apart = [Calibration().observe(shard) for shard in shards]
    merged = functools.reduce(Calibration.merge, reversed(apart))
    assert merged == whole
    assert list(merged) == list(whole) == sorted({name for shard in shards for name in shard})
    arrays = whole.to_arrays()
    assert Calibration.from_arrays(arrays) == whole
    assert {name: arrays[name].tobytes() for name in arrays} == {
        name: array.tobytes() for name, array in merged.to_arrays().items()
    }


def test_calibration_is_a_mapping_that_observe_leaves_alone() -> None:
    first = Calibration().observe({"x": [1.0]})
    second = first.observe({"x": [2.0], "y": [3.0]})
    assert first["x"] == Histogram.of([1.0])
    assert "y" not in first
    assert dict(second) == {"x": Histogram.of([1.0, 2.0]), "y": Histogram.of([3.0])}
    assert repr(second) == "Calibration(2 values)"


# Observers


@given(histograms, observers)
def test_ranges_are_float32_within_what_was_observed(histogram: Histogram, observer: Observer) -> None:
    lo, hi = observer.range(histogram)
    assert min(histogram.minimum, 0.0) <= lo <= hi <= max(histogram.maximum, 0.0)
    assert (lo, hi) == (float(np.float32(lo)), float(np.float32(hi)))
    assert observer.range(histogram) == (lo, hi)


@given(some_values)
def test_minmax_holds_every_value(values: list[float]) -> None:
    assert MinMax().range(Histogram.of(values)) == (min(values), max(values))
    assert Percentile(100.0).range(Histogram.of(values)) == (min(values), max(values))


@given(some_values, st.floats(1.0, 100.0))
def test_percentile_leaves_out_no_more_than_its_share(values: list[float], percent: float) -> None:
    lo, hi = Percentile(percent).range(Histogram.of(values))
    share = len(values) * (100.0 - percent) / 200.0
    assert sum(value < lo for value in values) <= share
    assert sum(value > hi for value in values) <= share


def test_percentile_of_uniform_values_is_their_quantile() -> None:
    histogram = Histogram.of(np.arange(100_000) / 100_000)
    lo, hi = Percentile(98.0).range(histogram)
    width = 2.0**histogram.exponent
    assert 0.01 - width <= lo <= 0.01
    assert 0.99 <= hi <= 0.99 + width


@pytest.mark.parametrize("observer", [Percentile(), Percentile(99.0), Entropy(), Entropy(levels=128)])
def test_heavy_tails_are_clipped_on_both_sides(observer: Observer) -> None:
    histogram = Histogram.of(heavy_tails())
    lo, hi = observer.range(histogram)
    assert histogram.minimum * 0.9 < lo < -2.0
    assert 2.0 < hi < histogram.maximum * 0.9


def test_entropy_keeps_a_uniform_distribution_whole() -> None:
    histogram = Histogram.of(np.linspace(-1.0, 2.0, 100_001))
    assert Entropy().range(histogram) == (-1.0, 2.0)


def test_entropy_drops_a_lone_outlier_but_mse_weighs_its_distance() -> None:
    values = np.append(np.random.default_rng(3).normal(size=50_000), 40.0)
    histogram = Histogram.of(values)
    assert Entropy().range(histogram)[1] < 10.0
    assert 10.0 < MeanSquaredError().range(histogram)[1] < 40.0


def test_entropy_is_not_misled_by_the_zeros_of_a_rectifier() -> None:
    normal = np.random.default_rng(5).normal(size=50_000)
    lo, hi = Entropy().range(Histogram.of(np.maximum(normal, 0.0)))
    assert lo == 0.0
    assert hi > 3.0


def test_entropy_considers_no_range_of_fewer_bins_than_levels() -> None:
    histogram = Histogram.of(np.append(np.random.default_rng(3).normal(size=50_000), 400.0))
    lo, hi = Entropy().range(histogram)
    assert 256 * 2.0**histogram.exponent < hi - lo < 400.0


def test_entropy_of_values_far_from_zero() -> None:
    assert Entropy().range(Histogram.of(np.linspace(900.0, 1000.0, 100_001))) == (900.0, 1000.0)


@pytest.mark.parametrize("values", [[0.0], [5.0], [-5.0, -5.0], [DENORMAL], [LARGEST, -LARGEST], [3.0, 5.0]])
def test_entropy_of_too_few_bins_or_values_is_the_observed_range(values: list[float]) -> None:
    assert Entropy(levels=4096).range(Histogram.of(values)) == (min(values), max(values))


@given(st.sampled_from([Percentile(99.9), Entropy(64), MeanSquaredError(16, True), MinMax(), Entropy(), Percentile()]))
def test_observers_read_what_they_print(observer: Observer) -> None:
    assert observer_from_string(str(observer)) == observer
    assert observer_from_string(observer.name) == type(observer)()


def test_observer_text() -> None:
    assert str(Percentile(99.9)) == "percentile{percent=99.9}"
    assert str(MinMax()) == "minmax"
    assert observer_from_string(" mse{ symmetric=True, levels = 16 } ") == MeanSquaredError(16, True)
    assert observer_from_string("entropy{}") == Entropy()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("maximum", "unknown observer 'maximum'; known are minmax, percentile, entropy, mse"),
        ("", "unknown observer ''"),
        ("percentile{percent=99", "unknown observer"),
        ("percentile{percent=high}", "'high' is no value for percent"),
        ("percentile{percent=101}", "percent must be over 0 and at most 100, not 101"),
        ("percentile{percent=nan}", "percent must be over 0"),
        ("percentile{percent=9,percent=9}", "option 'percent' is unknown or given twice"),
        ("minmax{levels=3}", "option 'levels' is unknown or given twice; options are: none"),
        ("entropy{levels=2}", "levels must be from 3"),
        ("mse{levels=1.5}", "'1.5' is no value for levels"),
        ("mse{symmetric=1}", "'1' is no value for symmetric"),
    ],
)
def test_bad_observer_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        observer_from_string(text)


# Scales

LEVELS = [(-128, 127), (0, 255), (-127, 127), (-8, 7), (-32768, 32767), (-1, 0), (0, 1)]


@given(any_float32, any_float32, st.sampled_from(LEVELS))
def test_affine_range_is_covered_up_to_half_a_step(a: float, b: float, levels: tuple[int, int]) -> None:
    lo, hi = min(a, b), max(a, b)
    qmin, qmax = levels
    scale, zero_point = affine_from_range(lo, hi, qmin, qmax, symmetric=False)
    assert isinstance(scale, np.float32)
    assert np.finfo(np.float32).tiny <= scale <= LARGEST
    assert qmin <= zero_point <= qmax  # so that 0.0 is on the grid
    if hi - lo < LARGEST:  # wider, two levels cannot span it
        slack = float(scale) * (0.5 + 1e-4)
        assert (qmin - zero_point) * float(scale) - slack <= min(lo, 0.0)
        assert max(hi, 0.0) <= (qmax - zero_point) * float(scale) + slack
    if lo >= 0:
        assert zero_point == qmin
    elif hi <= 0:
        assert zero_point == qmax


@pytest.mark.parametrize(
    ("lo", "hi", "qmin", "qmax", "symmetric", "scale", "zero_point"),
    [
        (0.0, 0.0, -128, 127, False, 1.0, -128),
        (0.0, 0.0, -127, 127, True, 1.0, 0),
        (0.0, 6.0, -128, 127, False, 6 / 255, -128),
        (3.0, 6.0, -128, 127, False, 6 / 255, -128),
        (-6.0, -3.0, -128, 127, False, 6 / 255, 127),
        (-1.0, 1.0, -128, 127, False, 2 / 255, -1),  # position -0.5: the tie goes away from zero
        (-1.0, 1.0, 0, 255, False, 2 / 255, 128),
        (-0.1, 25.4, -128, 127, False, 25.5 / 255, -127),
        (-1.0, 0.5, -128, 127, True, 1 / 127, 0),
        (-1.0, 0.5, -127, 127, True, 1 / 127, 0),
        (0.5, 2.0, 0, 255, True, 2 / 255, 0),
        (0.0, DENORMAL, -128, 127, False, 2.0**-126, -128),
        (-LARGEST, LARGEST, 0, 1, False, LARGEST, 1),
    ],
)
def test_affine_cases(
    lo: float, hi: float, qmin: int, qmax: int, symmetric: bool, scale: float, zero_point: int
) -> None:
    assert affine_from_range(lo, hi, qmin, qmax, symmetric) == (np.float32(scale), zero_point)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, 0.0, -128, 127, False), "not a finite range"),
        ((0.0, math.inf, -128, 127, False), "not a finite range"),
        ((math.nan, 1.0, -128, 127, False), "not a finite range"),
        ((0.0, 1.0, 5, 5, False), "at least two"),
        ((0.0, 1.0, -(1 << 63), (1 << 63) - 1, False), r"fewer than 2\*\*53"),
        ((-1.0, 1.0, 0, 255, True), "use signed levels"),
        ((-1.0, 1.0, -1, 0, True), "levels around 0"),
    ],
)
def test_affine_refuses(arguments: tuple[float, float, int, int, bool], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        affine_from_range(*arguments)


@given(histograms, st.sampled_from(LEVELS), st.booleans())
def test_search_is_never_worse_than_minmax(histogram: Histogram, levels: tuple[int, int], symmetric: bool) -> None:
    if symmetric:
        levels = (0, 255) if histogram.minimum >= 0 else (-127, 127)
    found = search_affine(histogram, *levels, symmetric)
    unclipped = affine_from_range(histogram.minimum, histogram.maximum, *levels, symmetric)
    assert mean_squared_error(histogram, *found, *levels) <= mean_squared_error(histogram, *unclipped, *levels)
    if symmetric:
        assert found[1] == 0
    elif histogram.minimum >= 0:
        assert found[1] == levels[0]


@pytest.mark.parametrize("levels", [(-8, 7), (-128, 127)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_search_beats_minmax_on_the_data_themselves(levels: tuple[int, int], symmetric: bool) -> None:
    values = heavy_tails()
    found = search_affine(Histogram.of(values), *levels, symmetric)
    unclipped = affine_from_range(float(values.min()), float(values.max()), *levels, symmetric)
    assert squared_error(values, *found, *levels) < squared_error(values, *unclipped, *levels)


def test_search_clips_each_side_on_its_own() -> None:
    generator = np.random.default_rng(11)
    values = np.concatenate([generator.uniform(-1.0, 0.0, 20_000), generator.exponential(size=20_000)])
    scale, zero_point = search_affine(Histogram.of(values), -8, 7, symmetric=False)
    assert (-8 - zero_point) * scale < -0.75
    assert (7 - zero_point) * scale < 0.7 * values.max()


def test_one_candidate_is_the_unclipped_range() -> None:
    histogram = Histogram.of(heavy_tails())
    assert search_range(histogram, -8, 7, False, candidates=1) == (histogram.minimum, histogram.maximum)
    with pytest.raises(CalibrationError, match="at least 1, not 0"):
        search_range(histogram, -8, 7, False, candidates=0)


@pytest.mark.parametrize("levels", [(-2, 1), (-128, 127), (-32768, 32767)])
@pytest.mark.parametrize("scale", [0.31, 0.0127])
def test_expected_error_is_the_mean_over_evenly_filled_bins(levels: tuple[int, int], scale: float) -> None:
    histogram = Histogram.of([-1.0, -0.5, 0.2, 0.2, 0.3, 1.5])
    held = histogram.counts > 0
    lower, upper = (ends[held] for ends in histogram.edges())
    fine = (np.arange(50_000) + 0.5) / 50_000
    expected = sum(
        count * squared_error(low + (high - low) * fine, scale, 1, *levels)
        for low, high, count in zip(lower, upper, histogram.counts[held], strict=True)
    )
    found = mean_squared_error(histogram, scale, 1, *levels)
    assert found == pytest.approx(expected / histogram.total, rel=1e-6)


def test_expected_error_of_one_value_is_its_own() -> None:
    histogram = Histogram.of([0.3] * 3)
    assert mean_squared_error(histogram, 0.25, 0, -8, 7) == pytest.approx(
        (float(np.float32(0.3)) - 0.25) ** 2, rel=1e-12
    )
    assert mean_squared_error(histogram, 0.01, 0, -8, 7) == pytest.approx(
        (float(np.float32(0.3)) - 0.07) ** 2, rel=1e-12
    )
    assert mean_squared_error(Histogram.of([0.75]), 0.25, 0, -8, 7) == 0.0


@given(any_float32, any_float32, st.integers(1, 64), st.booleans())
def test_power_of_two_is_the_smallest_that_reaches(a: float, b: float, bits: int, signed: bool) -> None:
    lo, hi = min(a, b), max(a, b)
    if not signed and lo < 0:
        with pytest.raises(CalibrationError, match="use signed ones"):
            power_of_two_from_range(lo, hi, bits, signed)
        return
    exponent = power_of_two_from_range(lo, hi, bits, signed)
    qmin, qmax = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)

    def reaches(exponent: int) -> bool:
        step = Fraction(2) ** exponent
        return qmin * step <= Fraction(lo) and Fraction(hi) <= qmax * step

    if lo == hi == 0:
        assert exponent == 0
    else:
        assert exponent == 127 or reaches(exponent)
        assert exponent == -126 or not reaches(exponent - 1)


@pytest.mark.parametrize(
    ("lo", "hi", "bits", "signed", "exponent"),
    [
        (-1.0, 0.5, 8, True, -7),
        (-1.0, 1.0, 8, True, -6),
        (0.0, 255.0, 8, False, 0),
        (0.0, 256.0, 8, False, 1),
        (0.0, 0.0, 8, True, 0),
        (0.0, DENORMAL, 8, True, -126),
        (-LARGEST, LARGEST, 1, True, 127),
        (-1.0, 1.0, 64, True, -62),
    ],
)
def test_power_of_two_cases(lo: float, hi: float, bits: int, signed: bool, exponent: int) -> None:
    assert power_of_two_from_range(lo, hi, bits, signed) == exponent


@pytest.mark.parametrize("bits", [0, 65])
def test_power_of_two_refuses_widths(bits: int) -> None:
    with pytest.raises(CalibrationError, match=f"1 to 64 bits, not {bits}"):
        search_power_of_two(Histogram.of([1.0]), bits, signed=True)


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("signed", [False, True])
def test_power_of_two_search_is_the_best_on_the_data_themselves(bits: int, signed: bool) -> None:
    values = heavy_tails() if signed else np.abs(heavy_tails())
    qmin, qmax = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    errors = {e: squared_error(values, 2.0**e, 0, qmin, qmax) for e in range(-16, 10)}
    assert search_power_of_two(Histogram.of(values), bits, signed) == min(errors, key=errors.__getitem__)


@given(histograms, st.integers(1, 64))
def test_power_of_two_search_never_exceeds_the_covering_exponent(histogram: Histogram, bits: int) -> None:
    widest = power_of_two_from_range(histogram.minimum, histogram.maximum, bits, signed=True)
    assert max(widest - 8, -126) <= search_power_of_two(histogram, bits, signed=True) <= widest
