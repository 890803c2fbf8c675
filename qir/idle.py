"""Whether what an op does to values that do not fit is idle: what is proved of it stays within its room."""

from __future__ import annotations

from qir.fixed_point import kept_bounds
from qir.interval import Interval
from qir.ir import Op, OpBounds
from qir.types import storage_of


def overflow_room(op: Op) -> Interval | None:
    """The interval that an op's exact value must not leave for its `overflow` to be idle; None: it has no overflow."""
    if not hasattr(op, "overflow"):
        return None
    accumulator = getattr(op, "accumulator", None) or storage_of(op.result.type.element)
    return Interval(*kept_bounds(accumulator.lo, accumulator.hi, op.overflow)) if accumulator is not None else None


def is_idle(op: Op, step: OpBounds | None) -> bool:
    """Whether the proof shows that no value of `op` ever overflows."""
    room = overflow_room(op)
    return room is not None and step is not None and step.unsaturated is not None and room.contains(step.unsaturated)


def is_product_idle(op: Op, step: OpBounds | None) -> bool:
    """Whether the proof shows that no product of an accumulating op leaves the type that products are narrowed to."""
    product, overflow = getattr(op, "product", None), getattr(op, "product_overflow", None)
    if product is None or overflow is None or step is None or step.product is None:
        return False
    return Interval(*kept_bounds(product.lo, product.hi, overflow)).contains(step.product)
