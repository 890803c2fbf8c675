"""The ladder of repairs: each sum that may overflow takes the first rung after which it is proved not to."""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Final

from qir.fixed_point import Overflow
from qir.idle import is_idle, is_product_idle
from qir.interval import bits_of_interval
from qir.ir import Graph, Op
from qir.ops.accumulate import STEPWISE, Accumulating
from qir.pass_manager import PassContext
from qir.passes.repairs.narrow import narrow
from qir.passes.repairs.replacement import Replacement, Site, is_proved, prove_ops, serves, splice
from qir.passes.repairs.split import split
from qir.passes.repairs.widen import widen
from qir.proof import Method, prove
from qir.rewrite import Rewriter, live_ops, map_values, rewrite
from qir.target import Target, Width


class Repair(enum.StrEnum):
    """How far to go for a sum that may overflow, from what changes least to what changes most."""

    PROVE = "prove"  # nothing: the bits are the contract's
    WIDEN = "widen"  # a wider accumulator of the target
    SPLIT = "split"  # several sums, added in a type that holds them all
    NARROW = "narrow"  # fewer bits of weights, or smaller ones, in the channels concerned
    SATURATE = "saturate"  # every step saturates


def saturate(site: Site) -> Replacement | None:
    """The op with steps that saturate; None where they do already."""
    if site.op.overflow in STEPWISE:
        return None
    op = site.with_accumulator(site.op.accumulator, overflow=Overflow.SATURATE)
    return Replacement((op,), "its steps saturate")


RUNGS: Final[Mapping[Repair, Callable[[Site], Replacement | None]]] = MappingProxyType(
    {Repair.WIDEN: widen, Repair.SPLIT: split, Repair.NARROW: narrow, Repair.SATURATE: saturate}
)


def repair_accumulators(
    graph: Graph,
    target: Target,
    limit: Repair,
    passed_over: Collection[Repair],
    method: Method,
    context: PassContext,
) -> Graph:
    """Repair every accumulating op whose sums may overflow, as far as `limit`, with a note for each.

    What a repair changes is read by later ops, so they are proved again until none needs another. The first of an order
    that is left is final after each round, so that the rounds end.
    """
    rungs = [r for r in list(RUNGS)[: list(Repair).index(limit)] if r not in passed_over]
    while True:
        found: dict[Op, Replacement] = {}
        proof = prove(graph, method)
        for op in graph.ops:
            if isinstance(op, Accumulating) and not is_idle(op, proof.steps.get(op)):
                site = Site(graph, proof, target, op)
                replacement = next((r for rung in rungs if (r := _climbed(site, rung)) is not None), None)
                if replacement is not None:
                    found[op] = replacement
                    context.note(_note(site, replacement))
        if not found:
            return _claiming_less(graph, target, method)
        graph = _replaced(graph, found)


def _climbed(site: Site, rung: Repair) -> Replacement | None:
    """What a rung gives, if it leaves nothing to overflow and all readers can take it."""
    found = RUNGS[rung](site)
    if found is None:
        return None
    bounds, steps = prove_ops(found.ops, dict(zip(site.op.operands, site.bounds, strict=True)))
    saturates = rung is Repair.SATURATE
    return found if (saturates or is_proved(found.ops, steps)) and serves(site, found, bounds[found.result]) else None


def _replaced(graph: Graph, found: Mapping[Op, Replacement]) -> Graph:
    """The graph with these ops replaced, and without the constants that nothing reads any more."""
    readers = {op: changes for replacement in found.values() for op, changes in replacement.readers.items()}

    def visit(rewriter: Rewriter, op: Op) -> bool:
        if op in found:
            splice(rewriter, op, found[op])
        elif op in readers:
            rewriter.keep(op, **readers[op])
        return op in found or op in readers

    changed = rewrite(graph, visit)
    return changed.with_changes(ops=tuple(live_ops(changed)))


def _claiming_less(graph: Graph, target: Target, method: Method) -> Graph:
    """The graph without the claims `none` that what was repaired before them disproved: overflow is as contracted."""
    proof = prove(graph, method)
    sums, products = target.accumulator, target.product
    step = Overflow.WRAP if sums.guard_bits else sums.overflow
    changes: dict[Op, dict[str, Overflow]] = {}
    for op in graph.ops:
        found = proof.steps.get(op)
        if getattr(op, "overflow", None) is Overflow.NONE and not is_idle(op, found):
            changes.setdefault(op, {})["overflow"] = step if isinstance(op, Accumulating) else Overflow.SATURATE
        if getattr(op, "product_overflow", None) is Overflow.NONE and not is_product_idle(op, found):
            cast = products.bits is Width.ACCUMULATOR
            changes.setdefault(op, {})["product_overflow"] = sums.overflow if cast else products.overflow
    return map_values(graph, lambda value: {}, attributes=lambda op: changes.get(op, {})) if changes else graph


def _note(site: Site, found: Replacement) -> str:
    partial = site.partial
    bits = bits_of_interval(partial)
    return (
        f"{site.op.describe()}: partial sums in [{partial.lo}, {partial.hi}] take {bits} bits and "
        f"{site.op.accumulator} has {site.op.accumulator.bits}: {found.done}"
    )
