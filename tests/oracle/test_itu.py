"""The basic operators of ITU-T G.191 in terms of qir.fixed_point, against vectors that the operators themselves gave.

A 16-bit DSP computes with these: numbers of 16 bits, accumulators of 32 or, with guard bits, of 40.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qir.fixed_point import Overflow, RequantizeForm, Rounding, narrow, requantize, round_shift, saturate

Array = npt.NDArray[Any]

VECTORS = Path(__file__).parents[1] / "data" / "itu_basop_vectors.npz"


@cache
def vectors() -> dict[str, Array]:
    """The arrays of the file as int64."""
    with np.load(VECTORS) as file:
        return {name: file[name].astype(np.int64) for name in file.files}


def sat(value: Array, bits: int) -> Array:
    return np.asarray(saturate(value, -(1 << (bits - 1)), (1 << (bits - 1)) - 1))


def shifted(value: Array, left: Array, bits: int, rounding: Rounding = Rounding.FLOOR) -> Array:
    """`value * 2**left` in `bits` bits. Python ints, because a shift by 35 leaves int64 before it saturates."""
    return sat(round_shift(value.astype(object), -left, rounding), bits).astype(np.int64)


def norm(value: Array, bits: int) -> Array:
    """By how many places a number can be shifted left without loss, 0 for 0."""
    places = np.arange(1, bits)
    kept = sat(value[:, None] << places, bits) == value[:, None] << places
    return np.where(value == 0, 0, kept.sum(axis=1))


def l_mult(a: Array, b: Array) -> Array:
    return sat(2 * a * b, 32)


def l_mac(acc: Array, a: Array, b: Array) -> Array:
    return sat(acc + l_mult(a, b), 32)


def round_fx(value: Array) -> Array:
    return sat(round_shift(value, 16, Rounding.HALF_UP), 16)


def l_shl(value: Array, left: Array) -> Array:
    return shifted(value, left, 32)


#: Every operator of the file, on its operands a, b (16 bits), c (32 bits), s and t (shifts of 16 and 32 bits).
OPERATORS: dict[str, Callable[[Array, Array, Array, Array, Array], Array]] = {
    "add": lambda a, b, c, s, t: sat(a + b, 16),
    "sub": lambda a, b, c, s, t: sat(a - b, 16),
    "mult": lambda a, b, c, s, t: sat(round_shift(a * b, 15, Rounding.FLOOR), 16),
    "mult_r": lambda a, b, c, s, t: sat(round_shift(a * b, 15, Rounding.HALF_UP), 16),
    "L_mult": lambda a, b, c, s, t: l_mult(a, b),
    "L_mac": lambda a, b, c, s, t: l_mac(c, a, b),
    "L_msu": lambda a, b, c, s, t: sat(c - l_mult(a, b), 32),
    "L_add": lambda a, b, c, s, t: sat(a + c, 32),
    "L_sub": lambda a, b, c, s, t: sat(a - c, 32),
    "round_fx": lambda a, b, c, s, t: round_fx(c),
    "shl": lambda a, b, c, s, t: shifted(a, s, 16),
    "shr": lambda a, b, c, s, t: shifted(a, -s, 16),
    "shr_r": lambda a, b, c, s, t: shifted(a, -s, 16, Rounding.HALF_UP),
    "L_shl": lambda a, b, c, s, t: l_shl(c, t),
    "L_shr": lambda a, b, c, s, t: shifted(c, -t, 32),
    "L_shr_r": lambda a, b, c, s, t: shifted(c, -t, 32, Rounding.HALF_UP),
    "abs_s": lambda a, b, c, s, t: sat(np.abs(a), 16),
    "negate": lambda a, b, c, s, t: sat(-a, 16),
    "L_abs": lambda a, b, c, s, t: sat(np.abs(c), 32),
    "L_negate": lambda a, b, c, s, t: sat(-c, 32),
    "norm_s": lambda a, b, c, s, t: norm(a, 16),
    "norm_l": lambda a, b, c, s, t: norm(c, 32),
    "extract_h": lambda a, b, c, s, t: np.asarray(round_shift(c, 16, Rounding.FLOOR)),
}


def test_every_operator_of_the_file_is_here() -> None:
    assert {f"op_{name}" for name in OPERATORS} == {name for name in vectors() if name.startswith("op_")}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name: str) -> None:
    operands = (vectors()[operand] for operand in ("a", "b", "c", "shift16", "shift32"))
    got, expected = OPERATORS[name](*operands), vectors()[f"op_{name}"]
    assert got.shape == expected.shape == (4096,)
    assert np.flatnonzero(got != expected).tolist() == []


def mac_chain(x: Array, w: Array, bias: Array) -> Array:
    """A dot product per row that starts from the bias and saturates at every step."""
    acc = bias
    for k in range(x.shape[1]):
        acc = l_mac(acc, x[:, k], w[:, k])
    return acc


def dot_operands() -> tuple[Array, Array, Array]:
    v = vectors()
    return v["dot_x"], v["dot_w"], v["dot_bias"]


def test_dot_products_that_saturate_at_every_step() -> None:
    """The accumulator is a chain in order; once at the end, or with the bias last, saturating gives other numbers."""
    x, w, bias = dot_operands()
    acc = mac_chain(x, w, bias)
    assert np.array_equal(acc, vectors()["dot_acc"])
    assert np.array_equal(round_fx(l_shl(acc, vectors()["dot_shift"])), vectors()["dot_out"])
    at_the_end = sat(bias + l_mult(x, w).sum(axis=1), 32)
    bias_last = sat(mac_chain(x, w, 0 * bias) + bias, 32)
    backwards = mac_chain(x[:, ::-1], w[:, ::-1], bias)
    assert min(int((other != acc).sum()) for other in (at_the_end, bias_last, backwards)) > 10


def test_dot_products_with_guard_bits() -> None:
    """40 bits hold the exact sum of 64 products, which saturates once, on its way out."""
    x, w, bias = dot_operands()
    exact = bias + (2 * x * w).sum(axis=1)
    assert np.array_equal(sat(exact, 40), exact)
    assert np.abs(exact).max() > 1 << 31
    acc = narrow(exact, -(1 << 31), (1 << 31) - 1, Overflow.SATURATE)
    assert np.array_equal(acc, vectors()["dot40_acc"])
    assert np.array_equal(round_fx(acc), vectors()["dot40_out"])


def requantized(acc: Array, left: Array) -> Array:
    """`requantize form=shift rounding=half_up overflow=saturate` of qir, to 16 bits."""
    return sat(requantize(acc.astype(object), None, left - 16, RequantizeForm.SHIFT, Rounding.HALF_UP), 16)


def test_the_output_of_a_layer_is_one_requantization() -> None:
    """Shifting with saturation, then rounding with saturation, is one rounded shift that saturates once.

    The two floors of a shift right nest, and what saturates in 32 bits does so in 16.
    """
    v = vectors()
    assert np.array_equal(requantized(v["dot_acc"], v["dot_shift"]), v["dot_out"])
    assert np.array_equal(requantized(v["dot40_acc"], np.zeros(1, np.int64)), v["dot40_out"])
    rng = np.random.default_rng(44)
    powers = np.array([1 << bit for bit in range(32)])
    near = (np.concatenate([powers, 3 * powers, 0x7FFF * powers])[:, None] + np.arange(-2, 3)).reshape(-1)
    edges = np.concatenate([near, -near, [-(1 << 31), (1 << 31) - 1, 0]])
    acc = np.concatenate([edges, rng.integers(-(1 << 31), 1 << 31, 2000), v["c"], v["dot_acc"]])
    acc = np.unique(acc[(acc >= -(1 << 31)) & (acc < 1 << 31)])
    for left in np.arange(-35, 36)[:, None]:
        assert np.array_equal(round_fx(l_shl(acc, left)), requantized(acc, left)), left
