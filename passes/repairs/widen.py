"""Widen: sum in the narrowest register of the chip that holds every partial sum."""

from __future__ import annotations

from qir.passes.repairs.replacement import Replacement, Site, is_proved, prove_ops
from qir.target import Width
from qir.types import integer


def widen(site: Site) -> Replacement | None:
    """The op in the first of the target's wider accumulators in which its sums are proved to fit; None: there is none.

    A product that is cast to the accumulator is cast to the wider one.
    """
    for bits in site.target.accumulator.wider:
        register = integer(bits)
        cast = site.op.product is not None and site.target.product.bits is Width.ACCUMULATOR
        op = site.with_accumulator(register, product=register if cast else site.op.product)
        _, steps = prove_ops([op], dict(zip(op.operands, site.bounds, strict=True)))
        if bits > site.op.accumulator.bits and is_proved([op], steps):
            return Replacement((op,), f"its {site.op.accumulator} became {register}")
    return None
