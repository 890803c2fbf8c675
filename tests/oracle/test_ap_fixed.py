"""Rounding and overflow of qir.fixed_point, and layers made of them, against apytypes and the ap_fixed headers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from apytypes import APyFixedArray, OverflowMode, QuantizationMode
from oracle import ap_fixed as headers
from oracle.ap_fixed import OVERFLOWS, ROUNDINGS, ApFixed, FixedType, Operation, dense

from qir.fixed_point import Overflow, Rounding, narrow, round_shift

Array = npt.NDArray[Any]

#: apytypes names the modes as ap_fixed does, and has only these two overflow modes.
APYTYPES_ROUNDINGS = {rounding: QuantizationMode[name.removeprefix("AP_")] for rounding, name in ROUNDINGS.items()}
APYTYPES_OVERFLOWS = {Overflow.WRAP: OverflowMode.WRAP, Overflow.SATURATE: OverflowMode.SAT}


def every_value(kind: FixedType) -> Array:
    return np.arange(kind.lo, kind.hi + 1)


def cast(values: Array, fraction_bits: int, target: FixedType) -> Array:
    """What qir computes where ap_fixed assigns numbers with so many fraction bits to a variable of type `target`."""
    rounded = round_shift(values, fraction_bits - target.fraction_bits, target.rounding)
    return np.asarray(narrow(rounded, target.lo, target.hi, target.overflow))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("rounding", Rounding)
def test_every_cast_of_up_to_10_bits_against_apytypes(rounding: Rounding, signed: bool) -> None:
    """All its numbers are signed: unsigned ones are given one bit more, and read from the bits of a wrapped cast.

    Formats with more integer bits than bits, or fewer than none, are among them.
    """
    compared = 0
    for width, int_bits in product(range(1, 11), (-2, 4)):
        source = FixedType(width, int_bits, signed)
        values = every_value(source)
        apy = APyFixedArray(values, int_bits=int_bits + (not signed), frac_bits=source.fraction_bits)
        for drop, target_width in product(range(-3, width + 4), range(1, 13)):
            fraction_bits = source.fraction_bits - drop
            for overflow, mode in APYTYPES_OVERFLOWS.items():
                got = apy.cast(
                    bits=target_width,
                    frac_bits=fraction_bits,
                    quantization=APYTYPES_ROUNDINGS[rounding],
                    overflow=mode,
                ).to_bits(numpy=True)
                bits = np.asarray(got, np.int64)
                sign = 1 << (target_width - 1)
                target = FixedType(target_width, target_width - fraction_bits, True, rounding, overflow)
                assert np.array_equal(cast(values, source.fraction_bits, target), (bits ^ sign) - sign), (
                    source,
                    target,
                )
                compared += bits.size
                if overflow is Overflow.WRAP:
                    target = FixedType(target_width, target_width - fraction_bits, False, rounding, overflow)
                    assert np.array_equal(cast(values, source.fraction_bits, target), bits), (source, target)
                    compared += bits.size
    assert compared > 1_000_000


#: Source and target as (width, integer bits).
FORMATS = [
    ((8, 4), (5, 3)),  # rounds and overflows
    ((7, 2), (7, 2)),  # the same: only signs and symmetry change anything
    ((6, 3), (9, 4)),  # room on both sides
    ((8, 1), (4, 6)),  # coarser than whole numbers, nothing overflows but by a sign
    ((5, -2), (3, 4)),  # every bit is dropped, and two more
    ((9, 6), (6, 2)),  # overflows, exact
    ((4, 4), (10, 3)),  # a shift left that overflows
    ((7, 5), (2, 1)),
]


def casts() -> Iterator[tuple[FixedType, FixedType]]:
    """Every rounding, overflow and pair of signs, for every pair of formats."""
    for (source, target), signed, target_signed in product(FORMATS, (True, False), (True, False)):
        for rounding, overflow in product(ROUNDINGS, OVERFLOWS):
            yield FixedType(*source, signed), FixedType(*target, target_signed, rounding, overflow)


def test_every_cast_between_some_formats_against_the_headers(ap_fixed: ApFixed) -> None:
    cases = list(casts())
    ap_fixed.compile(headers.cast(source, target) for source, target in cases)
    compared = 0
    for source, target in cases:
        values = every_value(source)
        got = ap_fixed.cast(source, target, values)
        assert np.array_equal(cast(values, source.fraction_bits, target), got), (source, target)
        compared += got.size
    assert compared > 100_000


def test_one_signed_bit_is_where_the_headers_leave_the_definition(ap_fixed: ApFixed) -> None:
    """The bounds of a signed bit are -1 and 0, and those of symmetric saturation -0 and 0. The headers keep -1."""
    source, target = FixedType(4, 4), FixedType(1, 1, overflow=Overflow.SATURATE_SYMMETRIC)
    values = every_value(source)
    assert not cast(values, 0, target).any()
    assert np.array_equal(ap_fixed.cast(source, target, values), np.where(values < 0, -1, 0))


def boundary_values(source: FixedType, target: FixedType) -> Array:
    """Values of a wide type about the ties and the bounds of another, and random ones of every magnitude."""
    rng = np.random.default_rng(41)
    drop = source.fraction_bits - target.fraction_bits
    half = 1 << max(drop - 1, 0)
    magnitudes = rng.integers(-(1 << 63), (1 << 63) - 1, 300) >> rng.integers(0, source.width, 300)
    whole = [value >> drop << drop if drop > 0 else value for value in magnitudes.tolist()]
    bounds = [bound << drop if drop > 0 else bound >> -drop for bound in (target.lo, target.hi, -target.hi)]
    ties = {value + offset for value in (*whole, *bounds, source.lo, source.hi) for offset in (-half, 0, half)}
    values = {tie + offset for tie in ties for offset in (-1, 0, 1)}
    return np.array(sorted(value for value in values if source.lo <= value <= source.hi), object)


#: Source and target as (width, integer bits); the targets are signed or not, as the third says.
WIDE = [
    ((64, 32), (33, 20, True)),
    ((64, 20), (64, 44, True)),
    ((48, 16), (40, 30, False)),
    ((63, 3), (16, 2, True)),
    ((40, 8), (60, 20, False)),
]


def test_casts_of_wide_numbers_against_the_headers(ap_fixed: ApFixed) -> None:
    cases = [
        (FixedType(*source), FixedType(*target, rounding, overflow))
        for (source, target), rounding, overflow in product(WIDE, ROUNDINGS, OVERFLOWS)
    ]
    ap_fixed.compile(headers.cast(source, target) for source, target in cases)
    for source, target in cases:
        values = boundary_values(source, target)
        assert values.size > 300
        got = ap_fixed.cast(source, target, values.astype(np.int64))
        assert np.array_equal(cast(values, source.fraction_bits, target), got), (source, target)


def test_sums_and_products_are_exact(ap_fixed: ApFixed) -> None:
    """A sum has one integer bit more than the wider operand, a product the bits of both: qir casts from these."""
    formats = [((6, 3), (6, 3)), ((5, 1), (7, 5)), ((4, -1), (6, 8)), ((8, 8), (3, 0))]
    pairs = [
        (FixedType(*left, signed), FixedType(*right, right_signed))
        for (left, right), signed, right_signed in product(formats, (True, False), (True, False))
    ]
    ap_fixed.compile(make(*pair) for pair in pairs for make in (headers.add, headers.multiply))
    for left, right in pairs:
        a, b = (grid.reshape(-1) for grid in np.meshgrid(every_value(left), every_value(right)))
        kind, got = ap_fixed.binary(headers.multiply(left, right), a, b)
        assert (kind.width, kind.int_bits) == (left.width + right.width, left.int_bits + right.int_bits)
        assert np.array_equal(got, a * b)
        kind, got = ap_fixed.binary(headers.add(left, right), a, b)
        fraction_bits = max(left.fraction_bits, right.fraction_bits)
        int_bits = max(side.int_bits + (kind.signed and not side.signed) for side in (left, right)) + 1
        assert (kind.int_bits, kind.fraction_bits) == (int_bits, fraction_bits)
        total = (a << (fraction_bits - left.fraction_bits)) + (b << (fraction_bits - right.fraction_bits))
        assert np.array_equal(got, total)


def expected_dense(layer: Operation, x: Array, w: Array, bias: Array) -> Array:
    """The layer in qir's terms: a chain in order, from the bias on, cast at every step; object arrays are exact."""
    (x_type, w_type, bias_type), (acc_type, out_type), (cast_products,) = layer.inputs, layer.outputs, layer.flags
    acc = np.broadcast_to(cast(bias, bias_type.fraction_bits, acc_type), (len(x), len(bias)))
    for k in range(x.shape[1]):
        term, fraction_bits = x[:, k, None] * w[k], x_type.fraction_bits + w_type.fraction_bits
        if cast_products:
            term, fraction_bits = cast(term, fraction_bits, acc_type), acc_type.fraction_bits
        finer = max(fraction_bits - acc_type.fraction_bits, 0)
        coarser = max(acc_type.fraction_bits - fraction_bits, 0)
        acc = cast((acc << finer) + (term << coarser), acc_type.fraction_bits + finer, acc_type)
    return cast(acc, acc_type.fraction_bits, out_type)


def adversarial_rows(kind: FixedType, depth: int, seed: int) -> Array:
    """Rows of extremes, alternating extremes, a climb and a fall, and random numbers of two magnitudes."""
    alternating = [kind.lo if k % 2 else kind.hi for k in range(depth)]
    climb = [kind.hi if k < depth // 2 else kind.lo for k in range(depth)]
    full = np.random.default_rng(seed).integers(kind.lo, kind.hi, (4, depth), endpoint=True)
    small = full[:, ::-1] >> (kind.width // 2 - 1)
    rows = [[kind.lo] * depth, [kind.hi] * depth, alternating, climb, *full.tolist(), *small.tolist()]
    return np.array(rows, object)


def adversarial_operands(layer: Operation, depth: int = 24) -> tuple[Array, Array, Array]:
    """Python ints for x [12, depth], w [depth, 12] and bias [12]."""
    x, w, bias = layer.inputs
    return adversarial_rows(x, depth, 43), adversarial_rows(w, depth, 44).T, adversarial_rows(bias, 1, 45)[:, 0]


def layers() -> Iterator[Operation]:
    """Products with 9 fraction bits into accumulators of 4 and of 11, in every mode; then types of other shapes."""
    x, w, bias, out = FixedType(8, 3), FixedType(6, 2), FixedType(9, 4), FixedType(6, 3)
    for index, (rounding, overflow) in enumerate(product(ROUNDINGS, OVERFLOWS)):
        coarse, fine = FixedType(10, 6, True, rounding, overflow), FixedType(17, 6, bool(index % 3), rounding, overflow)
        yield dense(x, w, bias, coarse, FixedType(6, 4, True, rounding, overflow))
        yield dense(x, w, bias, coarse, out, cast_products=True)
        yield dense(x, FixedType(6, 2, bool(index % 2)), bias, fine, FixedType(7, 4, False, rounding, overflow))
    half_up = (Rounding.HALF_UP, Overflow.SATURATE)
    relu = FixedType(8, 2, False, *half_up)
    yield dense(relu, w, bias, FixedType(24, 12), relu)  # unsigned activations, and no overflow at all
    yield dense(
        FixedType(16, 1), FixedType(16, 1), FixedType(32, 2), FixedType(40, 10), FixedType(16, 1, True, *half_up)
    )
    yield dense(FixedType(16, 6), FixedType(16, 6), FixedType(16, 6), FixedType(16, 6), FixedType(16, 6), True)
    wide = FixedType(32, 8)
    yield dense(wide, wide, wide, FixedType(48, 18, True, Rounding.HALF_EVEN, Overflow.SATURATE), FixedType(32, 18))
    yield dense(wide, wide, wide, FixedType(62, 12, True, *half_up), FixedType(40, 12, True, *half_up))


def differing(ap_fixed: ApFixed, layer: Operation, *operands: Array) -> int:
    got = ap_fixed.dense(layer, *(operand.astype(np.int64) for operand in operands))
    expected = expected_dense(layer, *operands)
    assert got.shape == expected.shape
    return int((got != expected).sum())


def test_dense_layers_against_the_headers(ap_fixed: ApFixed) -> None:
    cases = list(layers())
    ap_fixed.compile(cases)
    for layer in cases:
        operands = adversarial_operands(layer)
        assert differing(ap_fixed, layer, *operands) == 0, layer
        for depth in (0, 1):
            x, w, bias = operands
            assert differing(ap_fixed, layer, x[:, :depth], w[:depth], bias) == 0, layer


@pytest.mark.parametrize("overflow", [Overflow.SATURATE, Overflow.WRAP])
def test_the_layers_tell_apart_what_a_compiler_may_not_change(ap_fixed: ApFixed, overflow: Overflow) -> None:
    """The order of a chain, the place of its bias, casting products: each shows on the very data of the layers."""
    kinds = FixedType(8, 3), FixedType(6, 2), FixedType(9, 4)
    acc = FixedType(10, 6, True, Rounding.HALF_EVEN, overflow)
    layer = dense(*kinds, acc, acc)
    x, w, bias = adversarial_operands(layer)
    expected = expected_dense(layer, x, w, bias)
    assert differing(ap_fixed, layer, x, w, bias) == 0
    assert differing(ap_fixed, dense(*kinds, acc, acc, cast_products=True), x, w, bias) == 0
    bias_last = cast(expected_dense(layer, x, w, bias * 0) + cast(bias, 5, acc), acc.fraction_bits, acc)
    others = [
        expected_dense(dense(*kinds, acc, acc, cast_products=True), x, w, bias),
        expected_dense(layer, x[:, ::-1], w[::-1], bias),
        bias_last,
    ]
    assert [int((other != expected).sum()) > 10 for other in others] == [True] * 3
