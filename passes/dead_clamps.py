"""Clamps that change no output: requantizes that give back what they read, and bounds that all readers cut anyway."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from qir.demand import demands
from qir.fixed_point import Overflow
from qir.interval import Bounds
from qir.ir import Graph, Op, Value
from qir.ops.accumulate import Accumulating
from qir.ops.fixed_pool import FixedMaxPool
from qir.ops.fixed_rescale import Requantize
from qir.ops.movement import Movement
from qir.pass_manager import PassContext
from qir.passes.range_analysis import RangeAnalysis
from qir.passes.repairs.replacement import readers_take
from qir.proof import Proof, is_idle, prove
from qir.rewrite import Rewriter, map_values, rewrite
from qir.types import (
    AffineType,
    ElementType,
    FixedPointType,
    container_bounds,
    scale_array,
    storage_of,
)
from qir.verifier import find_faults


def remove_dead_clamps(graph: Graph, context: PassContext) -> Graph:
    """The graph without idle requantizes between equal types, and with dead clamps turned off.

    A clamp is dead where its container holds all that it may be given and no reader asks for more than its bounds; its
    result then uses the whole container. Outputs keep their bits; the same object where nothing changes.
    """
    bare = _without_identities(graph)
    found = _unclamped(bare)
    if found is graph:
        return graph
    removed, turned_off = len(graph.ops) - len(bare.ops), _handled(bare) - _handled(found)
    context.note(f"dead clamps: {removed} requantizes removed, {turned_off} turned off")
    return found


def _handled(graph: Graph) -> int:
    return sum(getattr(op, "overflow", Overflow.NONE) is not Overflow.NONE for op in graph.ops)


def _without_identities(graph: Graph) -> Graph:
    """Readers of a requantize that gives back what it reads, in a type of the same meaning, read its operand."""
    proof = prove(graph)
    idle = {op for op in graph.ops if isinstance(op, Requantize) and _is_identity(graph, proof, op)}

    def visit(rewriter: Rewriter, op: Op) -> bool:
        if op in idle:
            rewriter.set(op.result, rewriter.get(op.operands[0]))
        return op in idle

    return rewrite(graph, visit) if idle else graph


def _is_identity(graph: Graph, proof: Proof, op: Requantize) -> bool:
    source, bounds = op.operands[0], proof.bounds[op.operands[0]]
    same = _meaning(source.type.element) == _meaning(op.result.type.element)
    return same and op.is_identity(bounds.hull) and readers_take(graph, proof.bounds, op.result, source.type, bounds)


def _meaning(element: ElementType) -> object:
    """The container of a type, and the reals that its integers stand for."""
    storage = storage_of(element)
    assert storage is not None
    scale = scale_array(element).tolist() if isinstance(element, AffineType | FixedPointType) else None
    return storage.base_name, scale, getattr(element, "axis", None)


def _unclamped(graph: Graph) -> Graph:
    """The graph with every dead clamp turned off that leaves all of it legal and proved."""
    proof = prove(graph)
    asked = demands(graph, proof)
    dead = [op for op in graph.ops if op.result not in graph.outputs and _is_dead(op, proof, asked)]
    if not dead:
        return graph
    whole = _turned_off(graph, dead)
    if not find_faults(whole):
        return whole
    taken: list[Op] = []
    for op in dead:
        taken = [*taken, op] if not find_faults(_turned_off(graph, [*taken, op])) else taken
    return _turned_off(graph, taken) if taken else graph


def _is_dead(op: Op, proof: Proof, asked: Mapping[Value, Bounds]) -> bool:
    """Whether an op saturates for nothing: its container holds what it clamps, and readers clamp as much."""
    overflow, step = getattr(op, "overflow", None), proof.steps.get(op)
    if overflow is not Overflow.SATURATE or isinstance(op, Accumulating) or step is None or is_idle(op, step):
        return False
    storage, free, demand = storage_of(op.result.type.element), step.unsaturated, asked.get(op.result)
    if storage is None or free is None or demand is None:
        return False
    least, greatest = container_bounds(storage.bits, storage.signed)
    below = free.lo >= storage.lo or demand.hull.lo >= storage.lo
    above = free.hi <= storage.hi or demand.hull.hi <= storage.hi
    return least <= free.lo and free.hi <= greatest and below and above


def _turned_off(graph: Graph, dead: Sequence[Op]) -> Graph:
    """These clamps off, their results and what moves or picks from them in whole containers, and ranges proved anew."""
    whole = {op.result for op in dead}
    for op in graph.ops:
        if isinstance(op, Movement | FixedMaxPool) and any(v in whole for v in op.operands):
            whole.update(op.results)
    ops = set(dead)
    found = map_values(
        graph,
        lambda v: {"type": v.type.with_element(_container(v.type.element)), "range": None} if v in whole else {},
        attributes=lambda op: {"overflow": Overflow.NONE} if op in ops else {},
    )
    return RangeAnalysis().run(found, PassContext())


def _container(element: ElementType) -> ElementType:
    """The same element type with the bounds of its container."""
    storage = storage_of(element)
    assert storage is not None
    whole = storage.narrowed(*container_bounds(storage.bits, storage.signed))
    return replace(element, storage=whole) if isinstance(element, AffineType | FixedPointType) else whole
