"""The rules of an op that one target has otherwise than another, each of which may be swapped alone."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from qir.arrays import Array
from qir.ir import Op, Value
from qir.ops.accumulate import Accumulating
from qir.ops.constant import Const
from qir.ops.fixed_elementwise import Table
from qir.ops.fixed_rescale import Requantize
from qir.types import storage_of


class Rule(enum.StrEnum):
    """What a contract says differently."""

    WIDTH = "width"  # bits or sign of what is stored
    FORMAT = "format"  # scale, or one scale a channel
    ACCUMULATOR = "accumulator"  # its width, overflow, order, products, or rounding of sums
    ROUNDING = "rounding"  # the formula, the ties, or the multipliers of a change of scale
    SATURATION = "saturation"  # what becomes of results that do not fit, or the bounds that they must fit
    TABLE = "table"  # the entries of the table of a function
    CONSTANT = "constant"  # a bias or another constant, as integers
    ISLAND = "island"  # floating point on one of both
    ALGORITHM = "algorithm"  # other operations


@dataclass(frozen=True, eq=False)
class Swap:
    """One rule of an op that may be exchanged for the first target's: what it is, both in words, and how."""

    rule: Rule
    op: Op
    text: str
    apply: Callable[[Op], Op]


#: Attributes that change only together, and what they are; the others are each their own.
_TOGETHER: Final = (
    ("form", "rounding", "multiplier", "shift", "input_shift", "left_shift", "diff_min"),
    ("rule", "rounding"),
    ("product", "product_overflow"),
    ("product_shift", "rounding"),
)
_RULES: Final = {
    "overflow": Rule.SATURATION,
    **dict.fromkeys(("form", "rounding", "multiplier", "shift", "input_shift", "left_shift", "rule"), Rule.ROUNDING),
}
_PROOFS: Final = ("partial",)
_ABSENT: Final = {"product_shift": "0", "product": "exact"}
_SELF_EXPLANATORY: Final = ("form", "rounding", "rule", "overflow", "accumulator")


def swaps_of(ours: Op, theirs: Op, first: Sequence[Op], other: Sequence[Op], finer: int) -> Iterator[Swap]:
    """What two ops of one class have otherwise: attributes, bounds of the result, constants among `first` and `other`.

    Each gives `theirs` what `ours` has. Plain integers that `ours` reads are in units 2**finer times finer.
    """
    names = [n for n in theirs.attribute_names() if n not in _PROOFS]
    different = [n for n in names if getattr(ours, n) != getattr(theirs, n)]
    while different:
        whole: tuple[str, ...] = next((g for g in _TOGETHER if different[0] in g and g[0] in names), (different[0],))
        group = tuple(n for n in whole if n in names)
        told = [n for n in group if n in different]
        different = [n for n in different if n not in group]
        rule = Rule.ACCUMULATOR if isinstance(theirs, Accumulating) else _RULES.get(told[0], Rule.ALGORITHM)
        yield Swap(rule, theirs, _group_text(ours, theirs, told), _take(ours, group, finer))
    left, right = (storage_of(op.results[0].type.element) for op in (ours, theirs))
    if not isinstance(theirs, Accumulating) and left is not None and right is not None and left != right:
        rule = Rule.SATURATION if left.base_name == right.base_name else Rule.WIDTH
        yield Swap(rule, theirs, f"{left} / {right}", _take_type(ours))
    constants = constants_of(first), constants_of(other)
    for place, (a, b) in enumerate(zip(ours.operands, theirs.operands, strict=False)):
        if a in constants[0] and b in constants[1] and constants[0][a] != constants[1][b]:
            rule = Rule.TABLE if isinstance(theirs, Table) else Rule.CONSTANT
            text = _entries_text(theirs, place, constants[0][a], constants[1][b])
            yield Swap(rule, theirs, text, _take_operand(place, a))


def _take(source: Op, names: Sequence[str], finer: int) -> Callable[[Op], Op]:
    def apply(op: Op) -> Op:
        changes: dict[str, Any] = {n: getattr(source, n) for n in names}
        if "accumulator" in names:
            changes["results"] = _typed_as(op, source)
        if "product_shift" in names:  # a bias is in units of the sum
            changes["operands"] = (*op.operands[:2], *source.operands[2:])
        if isinstance(source, Requantize) and "shift" in names and finer:
            if source.multiplier.data.dtype.kind == "f":
                changes["multiplier"] = Array(np.ldexp(source.multiplier.data, finer))
            else:
                changes["shift"] = Array(source.shift.data + finer)
        return op.with_changes(**changes)

    return apply


def _take_type(source: Op) -> Callable[[Op], Op]:
    return lambda op: op.with_changes(results=_typed_as(op, source))


def _typed_as(op: Op, source: Op) -> tuple[Value, ...]:
    element = source.results[0].type.element
    return (replace(op.results[0], type=op.results[0].type.with_element(element)),)


def _take_operand(place: int, value: Value) -> Callable[[Op], Op]:
    return lambda op: op.with_changes(operands=(*op.operands[:place], value, *op.operands[place + 1 :]))


def _group_text(ours: Op, theirs: Op, names: Sequence[str]) -> str:
    """Both sides of attributes that change together, of numbers only that they are others."""
    words = [n for n in names if not isinstance(getattr(theirs, n), Array)]
    if "form" in names:
        words = ["form", "rounding"]
    if not words:
        return "multipliers"
    sides = [" ".join(str(getattr(o, n)) for n in words if getattr(o, n) is not None) for o in (ours, theirs)]
    head = "" if words[0] in _SELF_EXPLANATORY else f"{words[0].replace('_', ' ')} "
    absent = _ABSENT.get(words[0], "none")
    return f"{head}{sides[0] or absent} / {sides[1] or absent}"


def _entries_text(op: Op, place: int, ours: Array, theirs: Array) -> str:
    name = operand_text(op, place)
    if ours.shape != theirs.shape:
        return name
    return f"{name}: {np.count_nonzero(ours.data != theirs.data):,} of {theirs.size:,} entries"


def constants_of(ops: Sequence[Op]) -> dict[Value, Array]:
    """The data of the constants among these ops."""
    return {op.result: op.value for op in ops if isinstance(op, Const)}


def operand_text(op: Op, place: int) -> str:
    """What an operand is called in a cause: weights and bias by what they are, others by name."""
    known = {1: "weights", 2: "bias"}.get(place) if isinstance(op, Accumulating) else None
    return known or f"%{op.operands[place].name}"
