"""Clamps that change no output: requantizes that give back what they read, and bounds that all readers cut anyway."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from qir.demand import demands
from qir.fixed_point import Overflow
from qir.interval import Bounds, Interval
from qir.ir import Graph, Op, Value
from qir.ops.accumulate import Accumulating
from qir.ops.fixed_pool import FixedMaxPool
from qir.ops.fixed_rescale import Requantize
from qir.ops.movement import Movement
from qir.pass_manager import PassContext
from qir.passes.range_analysis import RangeAnalysis
from qir.passes.repairs.replacement import readers_take
from qir.proof import Method, Proof, is_idle, prove
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


def remove_dead_clamps(graph: Graph, method: Method, context: PassContext) -> Graph:
    """The graph without idle requantizes between equal types, and with dead clamps turned off.

    A clamp is dead where its container holds all that it may be given and no reader asks for more than its bounds; its
    result then uses the whole container. Outputs keep their bits; the same object where nothing changes.
    """
    bare = _without_identities(graph, method)
    found = _unclamped(bare, method)
    if found is graph:
        return graph
    removed, turned_off = len(graph.ops) - len(bare.ops), _handled(bare) - _handled(found)
    context.note(f"dead clamps: {removed} requantizes removed, {turned_off} turned off")
    return found


def _handled(graph: Graph) -> int:
    return sum(getattr(op, "overflow", Overflow.NONE) is not Overflow.NONE for op in graph.ops)


def _without_identities(graph: Graph, method: Method) -> Graph:
    """Readers of a requantize that gives back what it reads, in a type of the same meaning, read its operand."""
    proof = prove(graph, method)
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


def _unclamped(graph: Graph, method: Method) -> Graph:
    """The graph with every dead clamp turned off that leaves all of it legal and proved."""
    proof = prove(graph, method)
    possible = [op for op in graph.ops if _is_held(op, proof)]
    asked = demands(graph, proof) if possible else {}
    dead = [op for op in possible if _is_dead(op, proof, asked)]
    if not dead:
        return graph
    whole = _turned_off(graph, dead, method)
    if not find_faults(whole):
        return whole
    taken: list[Op] = []
    for op in dead:
        taken = [*taken, op] if not find_faults(_turned_off(graph, [*taken, op], method)) else taken
    return _turned_off(graph, taken, method) if taken else graph


def _is_held(op: Op, proof: Proof) -> bool:
    """Whether an op saturates to bounds narrower than its container, which would hold all of its values."""
    step = proof.steps.get(op)
    if getattr(op, "overflow", None) is not Overflow.SATURATE or isinstance(op, Accumulating) or step is None:
        return False
    storage, free = storage_of(op.result.type.element), step.unsaturated
    if storage is None or free is None or is_idle(op, step):
        return False
    return Interval(*container_bounds(storage.bits, storage.signed)).contains(free)


def _is_dead(op: Op, proof: Proof, asked: Mapping[Value, Bounds]) -> bool:
    """Whether every reader of an op cuts its values where its clamp does, or further in."""
    storage, free = storage_of(op.result.type.element), proof.steps[op].unsaturated
    demand = asked.get(op.result)
    if storage is None or free is None or demand is None:
        return False
    below = free.lo >= storage.lo or demand.hull.lo >= storage.lo
    above = free.hi <= storage.hi or demand.hull.hi <= storage.hi
    return below and above


def _turned_off(graph: Graph, dead: Sequence[Op], method: Method) -> Graph:
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
    return RangeAnalysis(method).run(found, PassContext())


def _container(element: ElementType) -> ElementType:
    """The same element type with the bounds of its container."""
    storage = storage_of(element)
    assert storage is not None
    whole = storage.narrowed(*container_bounds(storage.bits, storage.signed))
    return replace(element, storage=whole) if isinstance(element, AffineType | FixedPointType) else whole
