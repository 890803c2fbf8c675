"""Narrow: take bits off the weights of the channels whose sums may overflow, until none can.

Where the sums are requantized, a channel's weights and bias are halved until its sums fit, and its factor is doubled as
often: only what is rounded off is lost. Elsewhere, or where that loses less, a soft threshold projects the weights on
the L1 ball, as A2Q does in training (Colbert et al., 2023); the ball is what the exact partial sums leave room for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qir.arrays import Array
from qir.fixed_point import FLOAT_FORMS, Overflow, Rounding, round_shift
from qir.ir import Op
from qir.ops.accumulate import centre
from qir.ops.fixed_linear import Conv2d, FixedMatMul
from qir.ops.fixed_rescale import Requantize
from qir.passes.repairs.replacement import Replacement, Site, constant, has_zero, prove_ops, serves
from qir.types import storage_of

Weights = npt.NDArray[np.int64]
Fits = Callable[[Weights], npt.NDArray[np.bool_]]


def narrow(site: Site) -> Replacement | None:
    """The op with narrower weights where they must be; None where they are not constant, or nothing fits.

    Levels are not narrowed, as what is left of them need not be one. Of the two ways, the one that changes weights less
    in the L2 norm. Channels that fit keep theirs.
    """
    op, array = site.op, site.constant(1) if len(site.op.operands) > 1 else None
    if array is None or not isinstance(op, Conv2d | FixedMatMul) or not has_zero(op.operands[1]):
        return None
    if isinstance(op, FixedMatMul) and array.data.ndim != 2:
        return None
    storage = storage_of(op.operands[1].type.element)
    if storage is None or storage.levels is not None:
        return None
    layer = _Layer(site, op, array)
    halved, threshold = layer.halved(), layer.shrunk()
    if halved is None or threshold is None:
        return halved[0] if halved else threshold[0] if threshold else None
    return halved[0] if halved[1] <= threshold[1] else threshold[0]


@dataclass(frozen=True, eq=False)
class _Layer:
    """An op with constant weights, seen as centred rows [channels, n]."""

    site: Site
    op: Conv2d | FixedMatMul
    array: Array

    @property
    def axis(self) -> int:
        """The axis of the output channels."""
        return 0 if isinstance(self.op, Conv2d) else 1

    @property
    def centred(self) -> Weights:
        """The weights less their zero points."""
        return np.asarray(centre(self.array.data.astype(np.int64), self.op.operands[1].type))

    @property
    def rows(self) -> Weights:
        """The centred weights of each output channel."""
        return np.moveaxis(self.centred, self.axis, 0).reshape(self.array.data.shape[self.axis], -1)

    def halved(self) -> tuple[Replacement, float] | None:
        """Weights and bias divided by powers of two, and the share of the weights that is lost.

        None where readers cannot make up for it, or nothing is left.
        """
        rows, op = self.rows, self.op
        readers = self.site.graph.users.get(op.result, ())
        if not readers or op.result in self.site.graph.outputs or not all(isinstance(r, Requantize) for r in readers):
            return None
        if len(op.operands) > 2 and self.site.constant(2) is None:
            return None
        most = np.full(len(rows), max(int(np.abs(rows).max(initial=0)).bit_length(), 1), np.int64)
        halvings = np.zeros(len(rows), np.int64)
        while not bool((fits := self.fits(_halves(rows, halvings), halvings)).all()):
            halvings = np.where(fits, halvings, halvings + 1)
            if bool((halvings > most).any()):
                return None
        changed = _halves(rows, halvings)
        lost, touched = _lost(rows, changed << halvings[:, None]), int((halvings > 0).sum())
        most_often = int(halvings.max())
        times = "once" if most_often == 1 else f"up to {most_often} times"
        done = (
            f"the weights of {touched} of {len(rows)} channels were halved {times} and their factors doubled, "
            f"at {lost:.1%} of their L2 norm"
        )
        attributes: dict[Op, Mapping[str, Any]] = {
            r: _doubled(r, halvings) for r in readers if isinstance(r, Requantize)
        }
        found = Replacement(self.ops(changed, halvings), done, attributes)
        bounds, _ = prove_ops(found.ops, dict(zip(op.operands, self.site.bounds, strict=True)))
        return (found, lost) if serves(self.site, found, bounds[found.result]) else None

    def shrunk(self) -> tuple[Replacement, float] | None:
        """Weights `sign(w) * max(|w| - t, 0)` for the least threshold t of each channel that fits, and what is lost.

        The largest ones get a unit back, as many as fit.
        """
        rows = self.rows
        changed = _shrunk(rows, self.fits)
        if changed is None:
            return None
        lost, touched = _lost(rows, changed), int((rows != changed).any(axis=1).sum())
        done = f"the weights of {touched} of {len(rows)} channels were narrowed, at {lost:.1%} of their L2 norm"
        return Replacement(self.ops(changed), done), lost

    def ops(self, changed: Weights, halvings: Weights | None = None) -> tuple[Op, ...]:
        """The op on other centred rows, and on a bias that is halved as often."""
        op, moved = self.op, np.moveaxis(self.centred, self.axis, 0).shape
        zeros = self.array.data.astype(np.int64) - self.centred
        data = np.moveaxis(changed.reshape(moved), 0, self.axis) + zeros
        weight = constant(np.ascontiguousarray(data.astype(self.array.data.dtype)), op.operands[1], _name(op, 1))
        made, operands = [weight], [op.operands[0], weight.result, *op.operands[2:]]
        if halvings is not None and len(operands) > 2:
            given = self.site.graph.constants[op.operands[2]].data
            made.append(constant(_halves(given, halvings).astype(given.dtype), op.operands[2], _name(op, 2)))
            operands[2] = made[1].result
        return (*made, self.site.with_accumulator(op.accumulator, operands=tuple(operands)))

    def fits(self, changed: Weights, halvings: Weights | None = None) -> npt.NDArray[np.bool_]:
        """Whether all partial sums of each channel stay in the accumulator."""
        *constants, total = self.ops(changed, halvings)
        trial = total.with_changes(overflow=Overflow.WRAP)
        _, steps = prove_ops([*constants, trial], dict(zip(self.op.operands, self.site.bounds, strict=True)))
        found = steps[trial].channel_partials
        assert found is not None
        return np.asarray((found.lo >= self.site.room.lo) & (found.hi <= self.site.room.hi), bool)


def _name(op: Op, place: int) -> str:
    return f"{op.operands[place].name}.narrowed"


def _halves(values: npt.NDArray[Any], halvings: Weights) -> Weights:
    """Each channel divided by its power of two, ties away from zero."""
    along = halvings.reshape(-1, *[1] * (values.ndim - 1))
    return np.asarray(round_shift(values.astype(np.int64), along, Rounding.HALF_AWAY))


def _doubled(reader: Requantize, halvings: Weights) -> Mapping[str, Any]:
    """The factor of each channel doubled as often."""
    multiplier, shift = (np.broadcast_to(a.data, halvings.shape) for a in (reader.multiplier, reader.shift))
    if reader.form in FLOAT_FORMS:
        multiplier = np.ldexp(multiplier, halvings).astype(multiplier.dtype)
    else:
        shift = shift + halvings
    names = (f"{reader.result.name}.multiplier", f"{reader.result.name}.shift")
    return {"multiplier": Array(multiplier.copy(), names[0]), "shift": Array(shift.astype(np.int64), names[1])}


def _lost(before: Weights, after: Weights) -> float:
    """The L2 norm of the difference over that of the weights, of the channels that differ."""
    touched = (before != after).any(axis=1)
    old, new = before[touched].astype(np.float64), after[touched].astype(np.float64)
    return float(np.linalg.norm(old - new) / max(float(np.linalg.norm(old)), 1.0))


def _shrunk(rows: Weights, fits: Fits) -> Weights | None:
    """Centred weights [channels, n] of which each channel fits; None where not even zeros do."""
    done = fits(rows)
    if not bool((done | fits(np.zeros_like(rows))).all()):
        return None
    size = np.abs(rows)
    rank = np.argsort(np.argsort(-size, axis=1, kind="stable"), axis=1)

    def at(threshold: Weights, given_back: Weights) -> Weights:
        kept = size - threshold[:, None] + (rank < given_back[:, None])
        return np.where(done[:, None], rows, np.sign(rows) * np.clip(kept, 0, size))

    nothing = np.zeros(len(rows), np.int64)
    threshold = _bisected(size.max(axis=1), nothing, lambda t: fits(at(t, nothing)))
    given_back = _bisected(nothing, nothing + rows.shape[1], lambda k: fits(at(threshold, k)))
    return at(threshold, given_back)


def _bisected(good: Weights, bad: Weights, fits: Callable[[Weights], npt.NDArray[np.bool_]]) -> Weights:
    """For each channel, a number that fits next to one that does not, between one of each."""
    while bool((np.abs(good - bad) > 1).any()):
        middle = (good + bad) // 2
        is_good = fits(middle)
        good, bad = np.where(is_good, middle, good), np.where(is_good, bad, middle)
    return good
