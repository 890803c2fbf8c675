"""An op with a fault, the ops that take its place, and the proof that they serve everything that reads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from qir.arrays import Array
from qir.fixed_point import Overflow
from qir.idle import is_idle, overflow_room
from qir.interval import Bounds, Interval
from qir.ir import Graph, Op, OpBounds, Value
from qir.ops.accumulate import Accumulating
from qir.ops.constant import Const
from qir.ops.fixed_rescale import Requantize
from qir.proof import Proof
from qir.rewrite import Rewriter
from qir.target import FORMS_OF_32_BITS, Target
from qir.types import IntegerType, TensorType, storage_of, zero_array

Known = Mapping[Value, Bounds]


@dataclass(frozen=True, eq=False)
class Site:
    """An accumulating op whose sums may overflow, in its graph, whose values are proved to be within `proof`."""

    graph: Graph
    proof: Proof
    target: Target
    op: Accumulating

    @property
    def bounds(self) -> tuple[Bounds, ...]:
        """What is proved of each operand."""
        return tuple(self.proof.bounds[v] for v in self.op.operands)

    @property
    def room(self) -> Interval:
        """What no partial sum may leave."""
        room = overflow_room(self.op)
        assert room is not None
        return room

    @property
    def partial(self) -> Interval:
        """The proved interval of every partial sum, were none narrowed."""
        step = self.op.with_changes(overflow=Overflow.WRAP).bounds(self.bounds)
        assert step is not None
        assert step.unsaturated is not None
        return step.unsaturated

    def constant(self, place: int) -> Array | None:
        """The data of the operand at this place; None where it is not constant."""
        return self.graph.constants.get(self.op.operands[place])

    def with_accumulator(self, kind: IntegerType, **changes: Any) -> Accumulating:
        """The op with sums of another type, and without claims about them."""
        result = Value(self.op.result.name, self.op.result.type.with_element(kind))
        return self.op.with_changes(results=(result,), accumulator=kind, partial=None, channel_bits=None, **changes)


@dataclass(frozen=True, eq=False)
class Replacement:
    """Ops in order, the last of which makes what stands for the result, and what was done, in a few words.

    They read values of the graph or results of each other. `readers` has new attributes of ops that read the result.
    """

    ops: tuple[Op, ...]
    done: str
    readers: Mapping[Op, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def result(self) -> Value:
        """What stands for the result of the op that goes."""
        return self.ops[-1].result


def constant(data: Any, like: Value, name: str) -> Const:
    """Other data of the element type of a constant value."""
    array = Array(data, name)
    return Const(value=array, results=(Value(name, TensorType(array.shape, like.type.element)),))


def has_zero(weight: Value) -> bool:
    """Whether weights may stand for 0: their zero points are within the storage bounds, and levels where there are."""
    storage, zeros = storage_of(weight.type.element), zero_array(weight.type.element)
    if storage is not None and storage.levels is not None:
        return 0 in storage.levels
    return storage is not None and bool(((zeros >= storage.lo) & (zeros <= storage.hi)).all())


def prove_ops(ops: Iterable[Op], known: Known) -> tuple[Known, Mapping[Op, OpBounds]]:
    """Bounds of the results of a few ops and of their operands, and what each op's rule gave."""
    bounds, steps = dict(known), {}
    for op in ops:
        step = op.bounds([bounds[v] for v in op.operands])
        assert step is not None
        steps[op] = step
        for value, found in zip(op.results, step.results, strict=True):
            bounds[value] = found if isinstance(op, Const) else replace(found, data=None)
    return bounds, steps


def is_proved(ops: Sequence[Op], steps: Mapping[Op, OpBounds]) -> bool:
    """Whether no op of these overflows."""
    return all(is_idle(op, steps[op]) for op in ops if hasattr(op, "overflow"))


def serves(site: Site, found: Replacement, bounds: Bounds) -> bool:
    """Whether all that reads the op's result can read what stands for it, within these bounds, to the same effect."""
    old, new = site.op.result, found.result
    same = new.type == old.type and not found.readers
    return same or readers_take(site.graph, site.proof.bounds, old, new.type, bounds, found.readers)


def readers_take(
    graph: Graph,
    known: Known,
    old: Value,
    kind: TensorType,
    bounds: Bounds,
    attributes: Mapping[Op, Mapping[str, Any]] = MappingProxyType({}),
) -> bool:
    """Whether each op that reads a value is legal where it has another integer type, and computes the same formula.

    `attributes` are those that change with it. An output of the graph keeps its type.
    """
    if old in graph.outputs:
        return False
    new = Value(old.name, kind)
    storage = storage_of(kind.element)
    assert storage is not None
    for reader in graph.users.get(old, ()):
        operands = tuple(new if v is old else v for v in reader.operands)
        changed = reader.with_changes(operands=operands, **attributes.get(reader, {}))
        if reader.is_float or any(changed.check()):
            return False
        if isinstance(changed, Requantize) and changed.form in FORMS_OF_32_BITS and storage.bits > 32:
            return False
        step = changed.bounds([bounds if v is new else known[v] for v in changed.operands])
        if step is None or not all(_holds(v, b) for v, b in zip(changed.results, step.results, strict=True)):
            return False
        if isinstance(changed, Requantize) and step.unsaturated is None:  # a register of 32 bits may wrap
            return False
        if getattr(changed, "overflow", None) is Overflow.NONE and not is_idle(changed, step):
            return False
    return True


def _holds(value: Value, bounds: Bounds) -> bool:
    storage = storage_of(value.type.element)
    return storage is not None and Interval(storage.lo, storage.hi).contains(bounds.hull)


def splice(rewriter: Rewriter, old: Op, found: Replacement) -> None:
    """Emit the ops of a replacement and let the last one's result stand for that of the op which goes."""
    made: dict[Value, Value] = {}
    rewriter.claim(old.result)
    for op in found.ops:
        operands = tuple(made[v] if v in made else rewriter.get(v) for v in op.operands)
        hint = old.result.name if op is found.ops[-1] else op.result.name
        result = replace(op.result, name=rewriter.fresh(hint))
        location = "" if isinstance(op, Const) else old.location
        rewriter.ops.append(op.with_changes(operands=operands, results=(result,), location=location))
        made[op.result] = result
    rewriter.set(old.result, made[found.result])
