"""The correlation-aware part of the proof: affine forms of values, and what they add to the bounds of an op.

A value that no form describes, because its op is not linear, clamps too much or would take too many weights, is a
source of its own for what follows. Everything found is intersected with what intervals give, and so never wider.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from qir.affine import Form, Source
from qir.fixed_point import Overflow
from qir.idle import is_product_idle, overflow_room
from qir.interval import Bounds, Interval, exact
from qir.ir import Op, OpBounds, Value
from qir.ops.accumulate import STEPWISE, Accumulating, centered, zero_ends
from qir.ops.constant import Const
from qir.ops.movement import Movement
from qir.types import zero_array

#: A clamp that cuts off at most this share of a value's range is an error of the form; a harder one ends it.
_MOST_CUT: Final = 4
#: Sources are of fewer bits than this.
_SOURCE_BITS: Final = 40


class Correlations:
    """Forms of the values of one graph, op by op in its order."""

    def __init__(self) -> None:
        self._forms: dict[Value, Form] = {}

    def tighten(self, op: Op, bounds: Mapping[Value, Bounds], step: OpBounds) -> OpBounds:
        """The bounds of an op with what the forms of its operands add; `bounds` holds those of the operands."""
        if isinstance(op, Const) or op.is_float or len(op.results) != 1 or not op.result.type.sample_size:
            return step
        given = [bounds[v] for v in op.operands if v in bounds]
        operands = [self._operand(v, bounds) for v in op.operands]
        if len(given) != len(operands) or not any(operands) or _may_move_zeros(op):
            return step
        form = op.affine(operands, given)
        if form is None:
            return step
        if isinstance(op, Accumulating):
            found, kept = _accumulated(op, operands, given, step, form)
        else:
            found, kept = _narrowed(op, step, form)
        if kept is not None:
            self._forms[op.result] = kept
        return replace(found, sources=form.sources) if _is_tighter(found, step) else found

    def _operand(self, value: Value, bounds: Mapping[Value, Bounds]) -> Form | None:
        """What is known of an operand: its form, or itself as a source; None for constants and what is too wide."""
        if value in self._forms or value not in bounds or bounds[value].data is not None:
            return self._forms.get(value)
        shape, found = value.type.shape, centered(value.type, bounds[value])
        hull = found.hull
        is_wide = max(abs(int(hull.lo)), abs(int(hull.hi))).bit_length() > _SOURCE_BITS
        if len(shape) < 2 or not value.type.sample_size or is_wide:
            return None
        lo, hi = (np.broadcast_to(e, (int(shape[-1]),)).astype(np.int64) for e in (found.lo, found.hi))
        form = Form.of(Source(value.name, lo, hi, tuple(int(d) for d in shape[1:-1])))
        if form is not None:
            self._forms[value] = form
        return form


def _narrowed(op: Op, step: OpBounds, form: Form) -> tuple[OpBounds, Form | None]:
    """The bounds of an op that narrows its exact result, or only moves elements."""
    free = form.bounds().within(*zero_ends(op.result.type))
    room = overflow_room(op)
    if room is None or step.unsaturated is None:
        return replace(step, results=(step.results[0].intersect(free),)), form
    unsaturated = _both(step.unsaturated, free.hull)
    if room.contains(unsaturated):
        return replace(step, results=(step.results[0].intersect(free),), unsaturated=unsaturated), form
    step = replace(step, unsaturated=unsaturated)
    if getattr(op, "overflow", None) not in (Overflow.SATURATE, Overflow.SATURATE_SYMMETRIC):
        return step, None
    past = exact(room.hi - free.hi), exact(room.lo - free.lo)
    cut = exact(np.minimum(past[0], 0)), exact(np.maximum(past[1], 0))
    step = replace(step, results=(step.results[0].intersect(free.clamp(int(room.lo), int(room.hi))),))
    most = max(-int(cut[0].min()), int(cut[1].max()))
    is_slight = most * _MOST_CUT <= int(unsaturated.hi) - int(unsaturated.lo)
    return step, form.shifted(*cut) if is_slight else None


def _may_move_zeros(op: Op) -> bool:
    """Whether elements may be centred by another zero point where an op puts them than where it takes them from."""
    return isinstance(op, Movement) and any(
        len(set(zero_array(v.type.element).reshape(-1).tolist())) > 1 for v in (*op.operands, op.result)
    )


def _accumulated(
    op: Accumulating, forms: Sequence[Form | None], bounds: Sequence[Bounds], step: OpBounds, form: Form
) -> tuple[OpBounds, Form | None]:
    """The bounds of an accumulator: those of its sums where no step changes any of them."""
    kept = overflow_room(op)
    assert kept is not None
    assert step.channel_partials is not None
    if op.product_overflow not in (None, Overflow.NONE) and not is_product_idle(op, step):
        return step, None
    prefixes = op.affine_partials(forms, bounds)
    if prefixes is not None and (op.overflow not in STEPWISE or kept.contains(prefixes.hull)):
        partials = step.channel_partials.intersect(prefixes)
        step = replace(step, partial=partials.hull, unsaturated=partials.hull, channel_partials=partials)
    assert step.partial is not None
    if not kept.contains(step.partial):
        return step, None
    return replace(step, results=(step.results[0].intersect(form.bounds()),)), form


def _both(a: Interval, b: Interval) -> Interval:
    found = a.intersect(b)
    assert found is not None
    return found


def _is_tighter(found: OpBounds, step: OpBounds) -> bool:
    """Whether forms gave anything that intervals did not."""
    pairs = [(found.results[0], step.results[0]), (found.channel_partials, step.channel_partials)]
    return found.unsaturated != step.unsaturated or any(
        bool(np.any(new.lo != old.lo) or np.any(new.hi != old.hi))
        for new, old in pairs
        if new is not None and old is not None
    )
