"""What a compiled graph costs on the chip: cycles of its multiplier and of its shifter, bytes of memory."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

from qir import Graph, Op, Target
from qir.ops.constant import Const
from qir.types import storage_of

#: Multipliers and shifters that work at once.
MULTIPLIERS = 16
SHIFTERS = 4


def cost(graph: Graph, target: Target) -> Mapping[str, float]:
    """Cycles of a sample by unit, and bytes of the weights as the chip packs them, 6 bits each."""
    moved = sum(op.result.type.sample_size for op in graph.ops if not op.macs() and not isinstance(op, Const))
    weight, activation = target.weights.bits[0], target.activations.bits[0]
    return {
        "multiplier cycles": ceil(graph.macs() * target.costs.of_mac(weight, activation) / MULTIPLIERS),
        "shifter cycles": ceil(moved / SHIFTERS),
        "weight bytes": sum(_bytes(op) for op in graph.ops),
    }


def _bytes(op: Op) -> int:
    if not isinstance(op, Const):
        return 0
    storage = storage_of(op.result.type.element)
    return ceil(op.value.size * (storage.stored_bits if storage is not None else 32) / 8)
