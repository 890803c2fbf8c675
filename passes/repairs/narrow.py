"""Narrow: shrink the weights of the channels whose sums may overflow until none can.

A soft threshold projects a channel's weights on the L1 ball, as A2Q does in training (Colbert et al., 2023); here it is
applied to the trained integers, and the ball is what the exact partial sums leave room for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from qir.fixed_point import Overflow
from qir.ops.accumulate import centre
from qir.ops.fixed_linear import Conv2d, FixedMatMul
from qir.passes.repairs.replacement import Replacement, Site, constant, has_zero, prove_ops
from qir.types import storage_of

Weights = npt.NDArray[np.int64]
Fits = Callable[[Weights], npt.NDArray[np.bool_]]


def narrow(site: Site) -> Replacement | None:
    """The op with smaller weights where they must be; None where weights are not constant, or the bias alone overflows.

    Weights of a channel are `sign(w) * max(|w| - t, 0)` about their zero point, for the least threshold t that fits,
    and the largest ones get a unit back, as many as fit. Other channels keep theirs.
    """
    op, array = site.op, site.constant(1) if len(site.op.operands) > 1 else None
    if array is None or not isinstance(op, Conv2d | FixedMatMul) or not has_zero(op.operands[1]):
        return None
    if isinstance(op, FixedMatMul) and array.data.ndim != 2:
        return None
    kind, axis = op.operands[1].type, 0 if isinstance(op, Conv2d) else 1
    storage = storage_of(kind.element)
    assert storage is not None
    wide = array.data.astype(np.int64)
    centred = centre(wide, kind)
    zeros = wide - centred
    rows = np.moveaxis(centred, axis, 0).reshape(wide.shape[axis], -1)

    def tensor(changed: Weights) -> npt.NDArray[Any]:
        moved = changed.reshape(np.moveaxis(centred, axis, 0).shape)
        return np.ascontiguousarray((np.moveaxis(moved, 0, axis) + zeros).astype(array.data.dtype))

    def replaced(changed: Weights) -> Replacement:
        weight = constant(tensor(changed), op.operands[1], f"{op.operands[1].name}.narrowed")
        operands = (op.operands[0], weight.result, *op.operands[2:])
        total = site.with_accumulator(op.accumulator, operands=operands)
        return Replacement((weight, total), _done(rows, changed))

    def fits(changed: Weights) -> npt.NDArray[np.bool_]:
        weight, total = replaced(changed).ops
        trial = total.with_changes(overflow=Overflow.WRAP)
        _, steps = prove_ops([weight, trial], dict(zip(op.operands, site.bounds, strict=True)))
        found = steps[trial].channel_partials
        assert found is not None
        return np.asarray((found.lo >= site.room.lo) & (found.hi <= site.room.hi), bool)

    changed = _shrunk(rows, fits)
    return None if changed is None else replaced(changed)


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


def _done(before: Weights, after: Weights) -> str:
    touched = (before != after).any(axis=1)
    old, new = before[touched].astype(np.float64), after[touched].astype(np.float64)
    norm = float(np.linalg.norm(old - new) / max(float(np.linalg.norm(old)), 1.0))
    return (
        f"the weights of {int(touched.sum())} of {len(before)} channels were narrowed, by {norm:.1%} of their L2 norm"
    )
