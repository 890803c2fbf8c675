"""The integers that a target has for weights and biases, and the widths where nothing is asked for."""

from __future__ import annotations

from qir.target import Target
from qir.types import IntegerType, integer


def default_widths(target: Target) -> tuple[int, int]:
    """Weight and activation bits: the target's defaults, else those that cost least; of equals, the widest."""
    weights, activations = (
        item.bits if item.default is None else (item.default,) for item in (target.weights, target.activations)
    )
    return min(((w, a) for w in weights for a in activations), key=lambda p: (target.costs.of_mac(*p), -p[0] - p[1]))


def weight_storage(target: Target, bits: int) -> IntegerType:
    """The storage of weights of this width: a width for weights alone uses all of it."""
    return integer(bits) if bits not in target.weights.bits else target.weights.storage(bits)


def bias_storage(target: Target) -> IntegerType:
    """The integers that are added to an accumulator."""
    bits = target.accumulator.bits
    return integer(target.bias_bits or (bits if isinstance(bits, int) else 32))
