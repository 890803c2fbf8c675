"""Why a layer differs between two targets: the first op at fault, and which of its rules.

Both targets' ops of the layer are walked side by side on equal inputs, value by value that both have. The first value
that differs, and without whose difference the result would be another, is at fault. Its rule is then found by swapping
the rules of the other target for those of the first, one at a time, until the difference is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qir.comparison.replay import Segment, Side, Tensor, Values, onnx_layout, run_ops, same_step, steps
from qir.comparison.swaps import Rule, Swap, constants_of, operand_text, swaps_of
from qir.errors import QirError
from qir.fixed_point import RequantizeForm
from qir.ir import Op, Value
from qir.ops.accumulate import Accumulating
from qir.ops.constant import Const
from qir.ops.fixed_rescale import Requantize
from qir.types import (
    AffineType,
    ElementType,
    FixedPointType,
    IntegerType,
    scale_array,
    storage_of,
)


@dataclass(frozen=True)
class Cause:
    """The first op that makes a layer differ, by its mnemonic and result on the other target, and the rules at fault.

    `detail` holds what both targets have, the first target's before the slash. `proved` says that the difference is
    gone once the other target's op has the rules of the first; types that differ need no such proof.
    """

    op: str
    value: str
    rules: tuple[Rule, ...]
    detail: str
    proved: bool
    position: int = 0

    def __str__(self) -> str:
        joint = " and " if self.proved else " or "
        return f"{self.op}: {joint.join(self.rules)} ({self.detail})"


def type_cause(left: ElementType, right: ElementType, op: str, value: str, position: int = 0) -> Cause:
    """The cause that two types with other steps are: width where they have more or fewer integers, else format."""
    ours, theirs = storage_of(left), storage_of(right)
    if ours is None or theirs is None:
        names = ("float32" if s is None else str(s) for s in (ours, theirs))
        return Cause(op, value, (Rule.ISLAND,), " / ".join(names), True, position)
    is_wider = ours.hi - ours.lo != theirs.hi - theirs.lo
    if is_wider and getattr(left, "axis", None) == getattr(right, "axis", None):
        return Cause(op, value, (Rule.WIDTH,), f"{ours} / {theirs}", True, position)
    return Cause(op, value, (Rule.FORMAT,), _formats_text(left, right), True, position)


def _formats_text(left: ElementType, right: ElementType) -> str:
    sides = left, right
    if not all(isinstance(e, AffineType | FixedPointType) for e in sides):
        return f"{left} / {right}"
    scales = [scale_array(e) for e in sides]  # type: ignore[arg-type]
    if scales[0].shape == scales[1].shape != ():
        return f"{np.count_nonzero(scales[0] != scales[1]):,} of {scales[0].size:,} scales of channels"
    if scales[0].ndim or scales[1].ndim:
        return " / ".join("per channel" if s.ndim else "per tensor" for s in scales)
    return " / ".join(map(_scale_text, sides))


def _scale_text(element: ElementType) -> str:
    if isinstance(element, FixedPointType):
        return f"2^{int(element.exponent.data)}"
    assert isinstance(element, AffineType)
    zero = int(element.zero_point.data)
    return f"{float(element.scale.data):.4g}, zero {zero}" if zero else f"{float(element.scale.data):.4g}"


def find_cause(
    first: Side, ours: Mapping[Value, Tensor], other: Side, theirs: Values, layer: str, known: Cause | None = None
) -> Cause:
    """Why the layer differs, given all values of it on both sides; `known` where nothing before it is at fault."""
    for left, right in zip(first.segments[layer].layer.operands, other.segments[layer].layer.operands, strict=True):
        if right.name in other.places and not same_step(left.type.element, right.type.element):
            return type_cause(left.type.element, right.type.element, "input", right.name)
    return _Walk(_Half(first.segments[layer], ours), _Half(other.segments[layer], theirs), known).cause()


class _Half:
    """One of the two segments as the walk goes on: its ops, all its values, and the units of its plain integers."""

    def __init__(self, segment: Segment, values: Mapping[Value, Tensor]) -> None:
        self.segment, self.ops = segment, list(segment.ops)
        wanted = {v for op in segment.ops for v in op.results} | {*segment.entering, segment.result.value}
        self.values: Values = {v: values[v] for v in wanted if v in values}
        self.stops = set(segment.entering)
        self.taken: dict[Value, int] = {}  # units of values that it has from the other half

    def units(self, ops: Sequence[Op] | None = None) -> dict[Value, int]:
        return _units(self.ops if ops is None else ops, self.taken)

    def piece(self, value: Value) -> list[Op]:
        """The ops that make a value from those on which both halves agree, without constants."""
        needed, found = {value}, []
        for op in reversed(self.ops):
            if not isinstance(op, Const) and needed.intersection(op.results):
                found.append(op)
                needed.update(v for v in op.operands if v not in self.stops)
        return found[::-1]

    def reading(self, value: Value) -> _Reading:
        return self._reading(value, value, self.values, self.ops)

    def _reading(self, value: Value, new: Value, values: Values, ops: Sequence[Op]) -> _Reading:
        last = value is self.segment.result.value and self.segment.result.last
        return _Reading(onnx_layout(values[new], last), new.type.element, self.units(ops).get(new, 0))

    def swapped(self, value: Value, chosen: Sequence[Swap], more: Values) -> _Reading | None:
        """A value once these swaps are made; None where the rules contradict each other. `more` are values to read."""
        piece, values = self.piece(value), {**more, **self.values}
        renamed: dict[Value, Value] = {}
        changed: dict[Op, Op] = {}
        try:
            for op in piece:
                made = op.with_changes(operands=tuple(renamed.get(v, v) for v in op.operands))
                for swap in chosen:
                    made = swap.apply(made) if swap.op is op else made
                renamed.update(zip(op.results, made.results, strict=True))
                changed[op] = made
            run_ops(changed.values(), values)
        except QirError:
            return None
        return self._reading(value, renamed[value], values, [changed.get(op, op) for op in self.ops])


@dataclass(frozen=True, eq=False)
class _Reading:
    """Data with what is needed to compare them: in ONNX's layout, a type, and the unit of plain integers."""

    data: Tensor
    element: ElementType
    unit: int

    def equals(self, other: _Reading | None) -> bool:
        """Whether both mean the same: in steps of one scale, or of the finer unit of sums."""
        if other is None or self.data.shape != other.data.shape or not same_step(self.element, other.element):
            return False
        left, right = steps(self.data, self.element), steps(other.data, other.element)
        if left.dtype.kind == "f" or right.dtype.kind == "f":
            return np.array_equal(left, right, equal_nan=True)
        finer = max(self.unit, other.unit)
        if self.unit != other.unit:
            left, right = left.astype(object) << (finer - self.unit), right.astype(object) << (finer - other.unit)
        return np.array_equal(left, right)


class _Walk:
    """The two segments of a layer side by side; the second half has the values as they are when all before agrees."""

    def __init__(self, first: _Half, other: _Half, known: Cause | None) -> None:
        self.first, self.other, self.known = first, other, known
        self.twins = _twins(first.segment, other.segment)

    def cause(self) -> Cause:
        """The first op at fault. Its result on both sides may be the layer's alone, which is known to differ."""
        for position in range(len(self.other.ops)):
            op = self.other.ops[position]
            twin = None if isinstance(op, Const) else self.twins.get(op.results[0])
            if twin is None:
                continue
            if self.known is not None and position >= self.known.position:
                return self.known
            found = self._at(position, op, twin)
            if found is not None:
                return found
        last, ends = self.other.segment.result.value, self._ends()
        if not same_step(*ends):
            return type_cause(*ends, "input", last.name)
        ours = self.first.piece(self.first.segment.result.value)
        return Cause("input", last.name, (Rule.ALGORITHM,), _mnemonics(ours, ()), False)

    def _at(self, position: int, op: Op, twin: Value) -> Cause | None:
        """The cause where it is this op, or those before it that the sides do not share a value of."""
        value = op.results[0]
        pairs = list(_pairs(self.first.piece(twin), self.other.piece(value)))
        found = self._constants(pairs)
        if found is not None:
            return replace(found, position=position)
        if not self.first.reading(twin).equals(self.other.reading(value)):
            is_last = value is self.other.segment.result.value
            kinds = self._ends() if is_last else (twin.type.element, value.type.element)
            if not same_step(*kinds):
                return type_cause(*kinds, op.mnemonic, value.name, position)
            if is_last or not self._is_idle(position, value, twin):
                return replace(self._rule(value, twin, pairs), position=position)
        self.first.stops.add(twin)
        self.other.stops |= {value, twin}
        return None

    def _ends(self) -> tuple[ElementType, ElementType]:
        """The types of the layer's result, without the bounds of a fused activation."""
        return tuple(half.segment.layer.result.type.element for half in (self.first, self.other))  # type: ignore[return-value]

    def _constants(self, pairs: Sequence[tuple[Op, Op]]) -> Cause | None:
        """The cause where constants that both ops read have other types."""
        ours, theirs = constants_of(self.first.ops), constants_of(self.other.ops)
        for a, b in pairs:
            for place, (x, y) in enumerate(zip(a.operands, b.operands, strict=False)):
                if x in ours and y in theirs and not same_step(x.type.element, y.type.element):
                    found = type_cause(x.type.element, y.type.element, b.mnemonic, y.name)
                    return replace(found, detail=f"{operand_text(b, place)}: {found.detail}")
        return None

    def _rule(self, value: Value, twin: Value, pairs: Sequence[tuple[Op, Op]]) -> Cause:
        """Which rules of the ops that make a value make it another."""
        pieces = self.first.piece(twin), self.other.piece(value)
        islands = [next((o.mnemonic for o in ops if o.is_float), "") for ops in pieces]
        if bool(islands[0]) != bool(islands[1]):
            detail = " / ".join("float32" if island else "integers" for island in islands)
            return Cause("".join(islands), value.name, (Rule.ISLAND,), detail, True)
        units = self.first.units(), self.other.units()
        theirs: list[Swap] = []
        ours: list[Swap] = []  # the same swaps the other way round: of the first half's ops
        for a, b in pairs:
            finer = units[0].get(a.operands[0], 0) - units[1].get(b.operands[0], 0)
            theirs += swaps_of(a, b, self.first.ops, self.other.ops, finer)
            ours += swaps_of(b, a, self.other.ops, self.first.ops, -finer)
        goals = self.first.reading(twin), self.other.reading(value)

        def removes(places: Sequence[int]) -> bool:
            made = self.other.swapped(value, [theirs[i] for i in places], self.first.values)
            if goals[0].equals(made):
                return True
            return goals[1].equals(self.first.swapped(twin, [ours[i] for i in places], self.other.values))

        chosen = _fewest(len(theirs), removes)
        same = [type(o) for o in pieces[0]] == [type(o) for o in pieces[1]]
        if chosen is None and not (same and theirs):
            return Cause(pieces[1][-1].mnemonic, value.name, (Rule.ALGORITHM,), _mnemonics(*pieces), False)
        told = theirs if chosen is None else [theirs[i] for i in chosen]
        rules = tuple(dict.fromkeys(s.rule for s in told))
        return Cause(told[0].op.mnemonic, value.name, rules, ", ".join(s.text for s in told), chosen is not None)

    def _is_idle(self, position: int, value: Value, twin: Value) -> bool:
        """Whether the result stays as it is when this value is the first target's; from here on, it then is."""
        kinds = twin.type.element, value.type.element
        if not all(isinstance(kind, IntegerType) for kind in kinds) and kinds[0] != kinds[1]:
            return False
        unit = self.first.units().get(twin, 0)
        if unit != self.other.units().get(value, 0):
            return False
        half, result = self.other, self.other.segment.result.value
        values: Values = {**half.values, twin: self.first.values[twin]}
        rest = [
            op.with_changes(operands=tuple(twin if v is value else v for v in op.operands))
            for op in half.ops[position + 1 :]
        ]
        run_ops(rest, values)
        if not np.array_equal(values[result], half.values[result]):
            return False
        half.ops[position + 1 :], half.values = rest, values
        half.taken[twin] = unit
        return True


def _fewest(count: int, removes: Callable[[Sequence[int]], bool]) -> list[int] | None:
    """One of `count` swaps that removes the difference alone, or as few of the first ones as do; None: all do not."""
    for place in range(count):
        if removes([place]):
            return [place]
    chosen = next((list(range(n)) for n in range(2, count + 1) if removes(range(n))), None)
    for place in list(chosen or ()):
        fewer = [i for i in chosen or () if i != place]
        chosen = fewer if removes(fewer) else chosen
    return chosen


def _mnemonics(ours: Sequence[Op], theirs: Sequence[Op]) -> str:
    return " / ".join(", ".join(o.mnemonic for o in ops) or "nothing" for ops in (ours, theirs))


def _twins(first: Segment, other: Segment) -> dict[Value, Value]:
    """Values of the second segment that the first has under the same name and in the same layout; the results."""
    twins: dict[Value, Value] = {}
    if first.result.last == other.result.last and set(first.entering.values()) == set(other.entering.values()):
        names = {v.name: v for op in first.ops if not isinstance(op, Const) for v in op.results}
        for op in other.ops:
            for value in op.results:
                twin = names.get(value.name)
                if twin is not None and not isinstance(op, Const) and twin.type.shape == value.type.shape:
                    twins[value] = twin
    ends = first.result.value, other.result.value
    twins = {theirs: ours for theirs, ours in twins.items() if ours is not ends[0] and theirs is not ends[1]}
    return {**twins, ends[1]: ends[0]}


def _pairs(ours: Sequence[Op], theirs: Sequence[Op]) -> Iterator[tuple[Op, Op]]:
    """Ops of one class, the n-th of the first with the n-th of the second."""
    waiting = list(ours)
    for op in theirs:
        twin = next((o for o in waiting if type(o) is type(op)), None)
        if twin is not None:
            waiting.remove(twin)
            yield twin, op


def _units(ops: Sequence[Op], known: Mapping[Value, int]) -> dict[Value, int]:
    """The binary logarithm of how much finer than its operands' scales each plain integer is."""
    found = dict(known)
    for op in ops:
        if isinstance(op, Const) or not isinstance(op.results[0].type.element, IntegerType):
            continue
        unit = found.get(op.operands[0], 0) if op.operands else 0
        if isinstance(op, Accumulating):
            unit += op.shift
        elif isinstance(op, Requantize):
            by_shift = op.form is RequantizeForm.SHIFT and op.shift.data.ndim == 0
            unit += (int(op.shift.data) if by_shift else 0) + op.input_shift
        found[op.results[0]] = unit
    return found
