"""The integers that a target has for weights and biases, and the widths where nothing is asked for."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from qir.errors import QirError
from qir.levels import codebook, power_of_two_levels
from qir.ops.float_nn import Conv, MatMul
from qir.target import Granularity, Scales, Target, WeightFormat
from qir.types import IntegerType, integer


def default_widths(target: Target) -> tuple[int, int]:
    """Weight and activation bits: the target's defaults, else those that cost least; of equals, the widest."""
    weights, activations = (
        item.bits if item.default is None else (item.default,) for item in (target.weights, target.activations)
    )
    return min(((w, a) for w in weights for a in activations), key=lambda p: (target.costs.of_mac(*p), -p[0] - p[1]))


def weight_choices(target: Target) -> dict[str, tuple[int, WeightFormat]]:
    """The widths and formats of weights, by names such as `8` and `4/codebook`, the widest first."""
    pairs = [(bits, item) for item in target.weights.formats for bits in target.weights.widths(item)]
    return {
        f"{bits}{'' if item is WeightFormat.UNIFORM else f'/{item}'}": (bits, item)
        for bits, item in sorted(pairs, key=lambda pair: -pair[0])
    }


def weight_storage(
    target: Target,
    bits: int,
    format: WeightFormat = WeightFormat.UNIFORM,
    data: npt.NDArray[Any] | None = None,
    axis: int | None = None,
) -> IntegerType:
    """The storage of weights of this width and format: a width for weights alone uses all of it.

    A codebook is made for `data`, with a scale for each index of `axis` or one for all; see `scale_axis`. Which formats
    a target has at a width says `target.weights.formats_of(bits)`. Raises QirError for a codebook without data, and for
    a width that the format lacks.
    """
    match format:
        case WeightFormat.POWER_OF_TWO:
            return power_of_two_levels(bits)
        case WeightFormat.CODEBOOK:
            if data is None:
                raise QirError("a codebook is made for weights; give their data")
            return codebook(data, bits, axis, powers=target.weights.scales is Scales.POWER_OF_TWO)
    return integer(bits) if bits not in target.weights.bits else target.weights.storage(bits)


def scale_axis(target: Target, op: Conv | MatMul) -> int | None:
    """The axis of constant weights along which the target has scales of their own; None for one scale."""
    rank = op.operands[1].type.rank
    granularity = target.weights.conv if isinstance(op, Conv) else target.weights.matmul
    if granularity is Granularity.PER_TENSOR or rank not in (2, 3, 4):
        return None
    return 0 if isinstance(op, Conv) else rank - 1


def bias_storage(target: Target) -> IntegerType:
    """The integers that are added to an accumulator."""
    bits = target.accumulator.bits
    return integer(target.bias_bits or (bits if isinstance(bits, int) else 32))
