"""minimize-accumulators: on chips with accumulators of any width, the narrowest in which every sum is proved to fit."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from qir.arrays import Array
from qir.errors import PassError
from qir.fixed_point import Overflow
from qir.ir import Graph, Op, Stage, Value
from qir.ops.accumulate import Accumulating
from qir.pass_manager import Pass, PassContext
from qir.passes.repairs.replacement import readers_take
from qir.proof import channel_bits, prove_claims
from qir.rewrite import map_values
from qir.target import Width
from qir.types import TensorType, integer

#: What other tools give every sum.
_FIXED_BITS = 32
#: No accumulator has more bits.
_WIDEST = 64


class Per(enum.StrEnum):
    """What has a width of its own."""

    LAYER = "layer"
    CHANNEL = "channel"


@dataclass(frozen=True)
class MinimizeAccumulators(Pass):
    """Gives each accumulating op the narrowest signed accumulator that holds its proved partial sums.

    Legalize knows only the types of operands; this pass knows their proved ranges. With `per=channel` it also writes
    `channel_bits`, the width that each output channel needs. Every result keeps its bits. Raises PassError for a target
    whose accumulator has a width of its own.
    """

    name: ClassVar[str] = "minimize-accumulators"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.FIXED})
    ensures: ClassVar[Stage] = Stage.FIXED

    per: Per = Per.LAYER

    def run(self, graph: Graph, context: PassContext) -> Graph:
        """The graph with narrower sums; the same object where none can be. Notes the total of bits."""
        target = context.need_target(self.name)
        if target.accumulator.bits is not Width.PROVED:
            raise PassError(
                f'{target.name} has accumulators of {target.accumulator.bits} bits; state bits = "proved" in its '
                "table [accumulator] where they may have any width"
            )
        proof = prove_claims(graph)
        layers = [op for op in graph.ops if isinstance(op, Accumulating)]
        proved = {op: channel_bits(proof.steps.get(op)) for op in layers}
        sums = {op: bits for op, bits in proved.items() if bits is not None and 0 < bits.max(initial=0) <= _WIDEST}
        types: dict[Value, TensorType] = {}
        changes: dict[Op, Mapping[str, Any]] = {}
        for op, bits in sums.items():
            width = max(int(bits.max()), 2)
            kind = op.result.type.with_element(integer(width))
            found: dict[str, Any] = {"channel_bits": Array(bits, "channel_bits")} if self.per is Per.CHANNEL else {}
            if width < op.accumulator.bits and readers_take(
                graph, proof.bounds, op.result, kind, proof.bounds[op.result]
            ):
                types[op.result] = kind
                found |= {"accumulator": integer(width), "overflow": Overflow.NONE}
            if any(getattr(op, name) != value for name, value in found.items()):
                changes[op] = found
        after = graph
        if changes:
            after = map_values(
                graph, lambda v: {"type": types[v]} if v in types else {}, attributes=lambda op: changes.get(op, {})
            )
        for note in _totals(graph, after):
            context.note(note)
        return after


def _totals(before: Graph, after: Graph) -> Iterator[str]:
    """Bits of all accumulators, one a layer and one a channel, before, after and against a fixed width."""
    old, new = ([op for op in graph.ops if isinstance(op, Accumulating)] for graph in (before, after))
    for what, weights in (("layer", [1] * len(old)), ("channel", [_channels(op) for op in old])):
        bits = [sum(op.accumulator.bits * count for op, count in zip(ops, weights, strict=True)) for ops in (old, new)]
        if what == "channel":
            bits[1] = sum(_channel_total(op) for op in new)
        fixed = _FIXED_BITS * sum(weights)
        share = f", {bits[1] / fixed:.0%} of the {fixed:,} of {_FIXED_BITS} each" if fixed else ""
        yield f"one accumulator a {what}: {bits[0]:,} bits became {bits[1]:,}{share}"


def _channels(op: Accumulating) -> int:
    last = op.result.type.shape[-1] if op.result.type.shape else 1
    return last if isinstance(last, int) else 1


def _channel_total(op: Accumulating) -> int:
    """Bits of an accumulator for each output channel."""
    if op.channel_bits is None:
        return op.accumulator.bits * _channels(op)
    return int(np.broadcast_to(op.channel_bits.data, (_channels(op),)).sum())
