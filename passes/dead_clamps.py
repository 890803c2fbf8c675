"""Clamps that change no output: requantizes that give back what they read, and bounds that all readers cut anyway."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qir.demand import demands
from qir.fixed_point import Overflow
from qir.idle import is_idle
from qir.interval import Bounds, Interval
from qir.ir import Graph, Op, Value
from qir.ops.accumulate import Accumulating
from qir.ops.fixed_pool import FixedMaxPool
from qir.ops.fixed_rescale import Requantize
from qir.ops.movement import Movement
from qir.pass_manager import PassContext
from qir.passes.range_analysis import RangeAnalysis
from qir.passes.repairs.replacement import readers_take
from qir.proof import Method, Proof, prove
from qir.rewrite import Rewriter, map_values, rewrite
from qir.types import (
    AffineType,
    ElementType,
    FixedPointType,
    IntegerType,
    container_bounds,
    scale_array,
    storage_of,
    stored_in,
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
    idle = {op for op in graph.ops if isinstance(op, Requantize) and op.is_identity(proof.bounds[op.operands[0]].hull)}

    def visit(rewriter: Rewriter, op: Op) -> bool:
        if op not in idle:
            return False
        source, bounds = rewriter.get(op.operands[0]), proof.bounds[op.operands[0]]
        same = _meaning(source.type.element) == _meaning(op.result.type.element)
        gone = same and readers_take(graph, proof.bounds, op.result, source.type, bounds)
        if gone:
            rewriter.set(op.result, source)
        return gone

    bare = rewrite(graph, visit) if idle else graph
    return bare if len(bare.ops) < len(graph.ops) else graph


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
    dead = {op: kind for op in possible if (kind := _freed(op, proof, asked)) is not None}
    if not dead:
        return graph
    whole = _turned_off(graph, dead, method)
    if not find_faults(whole):
        return whole
    taken: dict[Op, IntegerType] = {}
    for op, kind in dead.items():
        more = {**taken, op: kind}
        taken = more if not find_faults(_turned_off(graph, more, method)) else taken
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


def _freed(op: Op, proof: Proof, asked: Mapping[Value, Bounds]) -> IntegerType | None:
    """The storage of an op's result without its clamp; None where some reader asks for more than the clamp leaves.

    An end that no reader asks to go beyond moves to that of the container. One that no value reaches stays, so that
    values without the clamps before it must be proved not to reach it either.
    """
    storage, free, demand = storage_of(op.result.type.element), proof.steps[op].unsaturated, asked.get(op.result)
    if storage is None or free is None or demand is None:
        return None
    least, greatest = container_bounds(storage.bits, storage.signed)
    low = least if demand.hull.lo >= storage.lo else storage.lo
    high = greatest if demand.hull.hi <= storage.hi else storage.hi
    return storage.narrowed(int(low), int(high)) if Interval(low, high).contains(free) else None


def _turned_off(graph: Graph, dead: Mapping[Op, IntegerType], method: Method) -> Graph:
    """These clamps off, their results and what moves or picks from them in wider storage, and ranges proved anew."""
    wider = {op.result: kind for op, kind in dead.items()}
    for op in graph.ops:
        if isinstance(op, Movement | FixedMaxPool) and any(v in wider for v in op.operands):
            parts = [wider[v] for v in op.operands if v in wider]
            storage = storage_of(op.result.type.element)
            assert storage is not None
            low, high = min(k.lo for k in (storage, *parts)), max(k.hi for k in (storage, *parts))
            wider[op.result] = storage.narrowed(low, high)

    def facts(value: Value) -> dict[str, Any]:
        if value not in wider:
            return {}
        return {"type": value.type.with_element(stored_in(value.type.element, wider[value])), "range": None}

    found = map_values(
        graph,
        facts,
        attributes=lambda op: {"overflow": Overflow.NONE} if op in dead else {},
    )
    return RangeAnalysis(method).run(found, PassContext())
