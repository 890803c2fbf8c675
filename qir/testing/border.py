"""The border of a program: reals become integers as the contract says, checked against exact fractions."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from math import floor
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qir.backend import Backend
from qir.errors import ConformanceError
from qir.fixed_point import Rounding
from qir.ops.fixed_rescale import QuantizeRule
from qir.ops.movement import Reshape
from qir.program import Program
from qir.target import Target
from qir.testing.compare import Compared, kernel_names, own_names
from qir.testing.maker import Maker, Widths, scale_of, zero_of
from qir.testing.numbers import steps_of_outputs
from qir.types import IntegerType, storage_of

Reals = npt.NDArray[np.float32]

_HALF: Final = Fraction(1, 2)
_STEPS: Final = 200
_FORMATS: Final = 4


def check_border(backend: Backend, target: Target, widths: Widths, random: np.random.Generator) -> Iterator[Compared]:
    """Reals on ties, beside them, far out and at random, in formats with zero points at both ends.

    Raises ConformanceError with the first real that becomes another integer than the contract says.
    """
    maker = Maker(target, widths, random)
    x = [maker.source(1, exponent=e) for e in range(-_FORMATS, 0)]
    for value in x:
        maker.result(Reshape, [value], value.type.element, shape=(1, 1))  # type: ignore[arg-type]
    graph = maker.case({v: np.zeros((1, 1), np.int64) for v in x}).graph
    program, count = Program(graph, backend), 0
    storage = maker.storage
    reals = {v.name: _reals(scale_of(v), zero_of(v), storage, random) for v in x}
    rows = max(r.size for r in reals.values())
    feeds: dict[str, Any] = {n: np.resize(r, (rows, 1)) for n, r in reals.items()}
    integers, returned = program.run_integer(feeds), program.run(feeds)
    for value, name in zip(x, graph.output_names, strict=True):
        scale, zero = scale_of(value), zero_of(value)
        given = feeds[value.name].reshape(-1)
        found, back = integers[name].reshape(-1), returned[name].reshape(-1)
        for real, q, out in zip(given, found.tolist(), back, strict=True):
            expected = _expected(real, scale, zero, target, storage)
            if q != expected:
                where = f"{real!r} at scale {scale!r} and zero point {zero}"
                raise ConformanceError(f"{where}: expected {expected}, found {q} ({_rule(target)})")
            if out != np.float32(q - zero) * scale:
                raise ConformanceError(f"{q} at scale {scale!r} and zero point {zero}: found {out!r}")
        count += found.size + back.size
    assert storage_of(x[0].type.element) == storage
    yield Compared(count, kernel_names(program), own_names(graph, backend))


def _rule(target: Target) -> str:
    return f"rule {target.input.rule}, rounding {target.input.rounding}"


def _reals(scale: np.float32, zero: int, storage: IntegerType, random: np.random.Generator) -> Reals:
    """Reals at the middle between two integers, and next to it on either side; then some others."""
    steps = steps_of_outputs(storage, random, _STEPS) - zero
    with np.errstate(over="ignore"):
        ties = ((steps + 0.5) * np.float64(scale)).astype(np.float32)
    away, toward = (np.nextafter(ties, np.float32(end), dtype=np.float32) for end in (np.inf, -np.inf))
    far = np.array([0.0, -0.0, 1e30, -1e30, 1e-30, np.finfo(np.float32).max, scale, -scale], np.float32)
    spread = random.normal(0, float(scale) * (storage.hi - storage.lo) / 3, 300).astype(np.float32)
    return np.concatenate([ties, away, toward, far, spread])


def _expected(real: np.float32, scale: np.float32, zero: int, target: Target, storage: IntegerType) -> int:
    """The rule's operations in IEEE float32, then exact fractions."""
    with np.errstate(over="ignore"):
        match target.input.rule:
            case QuantizeRule.DIVIDE:
                scaled = real / scale
            case QuantizeRule.RECIPROCAL:
                scaled = real * (np.float32(1) / scale)
            case QuantizeRule.RECIPROCAL_FUSED:
                exact = Fraction(float(real)) * Fraction(float(np.float32(1) / scale)) + zero
                scaled, zero = nearest_float32(exact), 0
    limit = np.float32(2.0**62)
    whole = Fraction(float(np.clip(scaled, -limit, limit)))
    return min(max(round_fraction(whole, target.input.rounding) + zero, storage.lo), storage.hi)


def nearest_float32(value: Fraction) -> np.float32:
    """The float32 next to an exact fraction, ties to even."""
    with np.errstate(over="ignore"):
        near = np.float32(float(value))
        if not np.isfinite(near):
            return near
        around = [np.nextafter(near, np.float32(end)) for end in (-np.inf, np.inf)]
    finite = [c for c in (near, *around) if np.isfinite(c)]
    return min(finite, key=lambda c: (abs(Fraction(float(c)) - value), int(c.view(np.int32)) & 1))


def round_fraction(value: Fraction, rounding: Rounding) -> int:
    """An exact fraction as an integer: the definition of each rounding in words of its own."""
    low = floor(value)
    rest = value - low
    if not rest:
        return low
    match rounding:
        case Rounding.FLOOR:
            return low
        case Rounding.TOWARD_ZERO:
            return low + (value < 0)
    if rest != _HALF:
        return low + (rest > _HALF)
    up = {
        Rounding.HALF_UP: True,
        Rounding.HALF_DOWN: False,
        Rounding.HALF_AWAY: value > 0,
        Rounding.HALF_TOWARD_ZERO: value < 0,
        Rounding.HALF_EVEN: low % 2 == 1,
    }
    return low + up[rounding]
