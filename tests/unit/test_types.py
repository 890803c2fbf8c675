"""Types and immutable arrays: bounds, dtypes, scales, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from qir.arrays import INLINE_LIMIT, Array
from qir.errors import QirError
from qir.interval import Bounds, Interval, exact, hull_of
from qir.types import (
    BATCH,
    BOOL,
    F32,
    S8,
    S64,
    U8,
    AffineType,
    Dim,
    FixedPointType,
    IntegerType,
    TensorType,
    affine,
    fixed_point,
    integer,
    is_quantized,
    scale_array,
    shape_text,
    storage_of,
    zero_array,
)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(1, 65))
def test_every_width(bits: int, signed: bool) -> None:
    kind = integer(bits, signed)
    assert kind.hi - kind.lo == 2**bits - 1
    assert kind.lo == (-(2 ** (bits - 1)) if signed else 0)
    assert str(kind) == f"{'s' if signed else 'u'}{bits}"
    limits = np.iinfo(kind.dtype)
    assert limits.min <= kind.lo <= kind.hi <= limits.max
    smaller = np.dtype(f"{'i' if signed else 'u'}{max(kind.dtype.itemsize // 2, 1)}")
    assert kind.dtype.itemsize == 1 or np.iinfo(smaller).max < kind.hi


def test_narrowed_bounds() -> None:
    kind = S8.narrowed(-127, 127)
    assert (kind.is_narrowed, str(kind), kind.base_name) == (True, "s8[-127, 127]", "s8")
    assert S8.narrowed(-128, 127) == S8
    assert str(BOOL) == "u1"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: integer(0), "1 to 64 bits, not 0"),
        (lambda: integer(65), "1 to 64 bits, not 65"),
        (lambda: S8.narrowed(-129, 0), r"\[-129, 0\] do not fit s8, which holds \[-128, 127\]"),
        (lambda: S8.narrowed(1, 0), r"\[1, 0\] do not fit s8"),
        (lambda: U8.narrowed(-1, 0), r"\[-1, 0\] do not fit u8"),
        (lambda: affine(S8, 0.0), "positive and finite"),
        (lambda: affine(S8, -1.0), "positive and finite"),
        (lambda: affine(S8, math.inf), "positive and finite"),
        (lambda: affine(S8, [1.0, math.nan], 0, 0), "positive and finite"),
        (lambda: affine(S8, [1.0, 2.0]), "scalars per tensor"),
        (lambda: affine(S8, 1.0, axis=0), "scalars per tensor"),
        (lambda: AffineType(S8, Array(np.ones(2, np.float32)), Array(np.zeros(3, np.int64)), 0), "scalars per tensor"),
        (lambda: AffineType(S8, Array(np.float64(0.5)), Array(np.int64(0))), "scales are float32 .* not float64"),
        (lambda: AffineType(S8, Array(np.float32(0.5)), Array(np.int8(0))), "zero points int64, not .* int8"),
        (lambda: affine(S8, 1.0, 128), r"zero point must lie in s8, which holds \[-128, 127\]"),
        (lambda: affine(U8, [1.0, 1.0], [0, -1], 0), "zero point must lie in u8"),
        (lambda: fixed_point(S8, [1, 2]), "a scalar per tensor"),
        (lambda: FixedPointType(S8, Array(np.int32(1))), "exponents are int64, not int32"),
        (lambda: fixed_point(S8, 128), r"\[-149, 127\]"),
        (lambda: fixed_point(S8, [0, -150], 0), r"\[-149, 127\]"),
        (lambda: TensorType((2, BATCH)), "only the leading dimension can be the batch N, not dimension 1"),
        (lambda: TensorType((-1,)), "a non-negative integer or N, not -1"),
        (lambda: TensorType((True,)), "a non-negative integer or N, not True"),
        (lambda: TensorType((2, 3), affine(S8, [1.0, 2.0], 0, 1)), "2 scales do not fit axis 1 of shape 2x3"),
        (lambda: TensorType((2, 3), affine(S8, [1.0, 2.0], 0, 2)), "2 scales do not fit axis 2"),
        (lambda: TensorType((2, 3), affine(S8, [1.0, 2.0], 0, -2)), "2 scales do not fit axis -2"),
        (lambda: TensorType((BATCH, 2), fixed_point(S8, [1], 0)), "1 scales do not fit axis 0 of shape Nx2"),
    ],
)
def test_refused(make: Any, message: str) -> None:
    with pytest.raises(QirError, match=message):
        make()


def test_a_zero_point_may_lie_outside_of_narrowed_bounds() -> None:
    assert affine(S8.narrowed(0, 127), 0.5, -128).has_zero_point


def test_quantized_types() -> None:
    per_axis = affine(S8, [0.1, 0.2], 3, 1, name="w")
    assert per_axis.zero_point == Array(np.array([3, 3]))
    assert (per_axis.scale.name, per_axis.zero_point.name) == ("w.scale", "w.zero")
    assert per_axis == affine(S8, np.array([0.1, 0.2], np.float32), [3, 3], 1)
    assert len({per_axis, affine(S8, [0.1, 0.2], 3, 1), affine(S8, [0.1, 0.2], 4, 1)}) == 2
    assert per_axis.with_storage(U8) == affine(U8, [0.1, 0.2], 3, 1)
    assert scale_array(per_axis).tolist() == [float(np.float32(0.1)), float(np.float32(0.2))]
    point = fixed_point(S8, [-3, 4], 0)
    assert scale_array(point).tolist() == [0.125, 16.0]
    assert scale_array(fixed_point(S8, -149))[()].astype(np.float32) == np.float32(1e-45)
    assert point.with_storage(U8) == fixed_point(U8, [-3, 4], 0)
    assert point.parameters == point.exponent
    assert zero_array(per_axis).tolist() == [3, 3]
    assert zero_array(point) == zero_array(S8) == 0
    assert [is_quantized(k) for k in (F32, S8, per_axis, point)] == [False, False, True, True]
    assert [storage_of(k) for k in (F32, S8, per_axis, point)] == [None, S8, S8, S8]


@pytest.mark.parametrize(
    ("shape", "text", "size", "concrete"),
    [
        ((), "", 1, ()),
        ((BATCH,), "N", 1, (7,)),
        ((BATCH, 3, 0), "Nx3x0", 0, (7, 3, 0)),
        ((10**10, 10**10), "10000000000x10000000000", 10**20, (10**10, 10**10)),
    ],
)
def test_shapes(shape: tuple[Dim, ...], text: str, size: int, concrete: tuple[int, ...]) -> None:
    kind = TensorType(shape)
    assert shape_text(shape) == text
    assert (kind.rank, kind.sample_size, kind.concrete(7)) == (len(shape), size, concrete)
    assert kind.is_batched == text.startswith("N")
    assert str(kind) == (f"{text} x f32" if shape else "f32")


def test_tensor_types_change_by_halves() -> None:
    kind = TensorType((BATCH, 2), affine(S8, 0.5))
    assert kind.with_element(S64) == TensorType((BATCH, 2), S64)
    assert kind.with_shape([3]) == TensorType((3,), affine(S8, 0.5))
    assert str(kind) == "Nx2 x s8"


def test_arrays_are_immutable_and_shared() -> None:
    source = np.arange(6, dtype=np.int8)
    array = Array(source, "a")
    source[0] = 100
    assert array.data[0] == 0
    with pytest.raises(ValueError, match="read-only"):
        array.data[0] = 1
    assert Array(array.data).data is array.data
    assert (array.shape, array.size, repr(array)) == ((6,), 6, "Array(a, int8[6])")


def test_arrays_are_equal_by_content_and_hash_by_it() -> None:
    one = Array(np.arange(6, dtype=np.int16), "a")
    assert one == Array(np.arange(6, dtype=np.int16), "b")
    assert hash(one) == hash(Array(np.arange(6, dtype=np.int16)))
    assert one == Array(np.arange(6, dtype=">i2"))
    assert one == Array(np.arange(12, dtype=np.int16)[::2] // 2)
    assert one != Array(np.arange(6, dtype=np.int32))
    assert one != Array(np.arange(6, dtype=np.int16).reshape(2, 3))
    assert one != Array(np.arange(1, 7, dtype=np.int16))
    assert one != "a"
    assert Array(np.float32(np.nan)) == Array(np.float32(np.nan))
    assert Array(np.float32(0.0)) != Array(np.float32(-0.0))
    assert Array(np.zeros((0, 2), np.int8)) != Array(np.zeros((0, 3), np.int8))


def test_arrays_of_up_to_64_elements_stand_in_the_text() -> None:
    assert Array(np.zeros(INLINE_LIMIT)).is_inline
    assert not Array(np.zeros(INLINE_LIMIT + 1)).is_inline


def test_intervals() -> None:
    one, two = Interval(-3, 5), Interval(5, 9)
    assert one.hull(two) == Interval(-3, 9)
    assert one.intersect(two) == Interval(5, 5)
    assert one.intersect(Interval(6, 7)) is None
    assert one.contains(Interval(-3, 0))
    assert not one.contains(two)
    for ends in ((1, 0), (math.nan, 1.0), (0.0, math.nan)):
        with pytest.raises(QirError, match="empty interval"):
            Interval(*ends)


def test_exact_integers_are_python_ints() -> None:
    for values in ([1, 2**63], [[-1, 2**64]], np.array([5], np.int8), np.int64(7), [np.int8(127)], 2**70, True):
        found = exact(values)
        assert {type(v) for v in found.reshape(-1).tolist()} <= {int, bool}
        assert np.array_equal(found, np.array(values, object))
    assert (exact([np.int8(127)]) + 1).tolist() == [128]
    assert exact(np.zeros((0, 3), np.int8)).shape == (0, 3)


def test_bounds() -> None:
    bounds = Bounds.of([-5, 2**63], [3, 2**64])
    assert (bounds.channels, bounds.hull) == (2, Interval(-5, 2**64))
    assert bounds.flat().hull == bounds.hull
    assert (bounds.flat().channels, Bounds.of(1, 2).channels) == (None, None)
    assert bounds.clamp(0, 10).hull == Interval(0, 10)
    assert Bounds.of(5, 7).clamp(0, 6).hull == Interval(5, 6)
    assert bounds.shifted([1, -1]).hull == Interval(-4, 2**64 - 1)
    assert bounds.union(Bounds.of(-9, -9)).lo.tolist() == [-9, -9]
    assert hull_of([bounds, Bounds.of(-7, 0)]).hull == Interval(-7, 2**64)
    assert Bounds.of([], []).hull == Interval(0, 0)
    with pytest.raises(QirError, match="empty bounds"):
        Bounds.of([0, 1], [0, 0])
    assert isinstance(integer(3), IntegerType)
