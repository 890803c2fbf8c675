"""Kernels of sums, alone or with the requantize behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from qir.backends.kernels import linear_loops as loops
from qir.backends.kernels.kernel import Call, Facts, Kernel, Memory, Tensor, fills_container, wrapping
from qir.backends.kernels.ordered import ordered_sums
from qir.backends.kernels.rescale import rescale_of
from qir.backends.kernels.sums import Sums, sums_of
from qir.ir import Op
from qir.ops.accumulate import Accumulating
from qir.ops.fixed_rescale import Requantize

#: Accumulators between a sum and its requantize: few enough to stay in the cache.
_BLOCK_BYTES: Final = 64 << 10


def linear(op: Op, facts: Facts) -> Kernel | None:
    """The kernel of a sum whose accumulators are stored."""
    assert isinstance(op, Accumulating)
    sums = _sums(op, facts)
    if sums is None:
        return None
    if not (sums.is_narrowed or facts.is_idle(op) or fills_container(op.accumulator)):
        mask, sign = wrapping(op.accumulator)
        name = f"{sums.name}+wrap_{op.accumulator.base_name}"
        return _through_block(sums, name, lambda block, out: loops.wrap_flat(block, mask, sign, out))
    if sums.dtype != op.accumulator.dtype:
        return _through_block(sums, f"{sums.name}+{op.accumulator.base_name}", _keep_low_bits)

    def bind(inputs: Sequence[Tensor], output: Tensor, scratch: Sequence[Tensor]) -> Call:
        pixels, fill, prepare = sums.bind(inputs, scratch)
        out = output.reshape(-1)

        def call() -> None:
            if prepare is not None:
                prepare()
            fill(out, 0, pixels)

        return call

    return Kernel(sums.name, bind, sums.scratch, sums.packed_bytes)


def fused(op: Op, following: Requantize, facts: Facts) -> Kernel | None:
    """The kernel of a sum and the requantize that alone reads it: accumulators pass through a block in the cache."""
    if not isinstance(op, Accumulating):
        return None
    sums, rescale = _sums(op, facts), rescale_of(following, facts)
    if sums is None or rescale is None:
        return None
    is_whole = sums.dtype == op.accumulator.dtype and fills_container(op.accumulator)
    if not (sums.is_narrowed or is_whole or facts.is_idle(op)):
        return None  # the requantize must read what the accumulator's own width keeps
    return _through_block(sums, f"{sums.name}+{rescale.name}", rescale.run)


def _sums(op: Accumulating, facts: Facts) -> Sums | None:
    """Sums in any order where they give the op's bits, else step by step."""
    return sums_of(op, facts) or ordered_sums(op, facts)


def _keep_low_bits(block: Tensor, out: Tensor) -> None:
    np.copyto(out, block, casting="unsafe")


def _through_block(sums: Sums, name: str, finish: Callable[[Tensor, Tensor], None]) -> Kernel:
    """Accumulators in blocks of whole pixels, each finished into its part of the output."""
    step, width = max(1, _BLOCK_BYTES // (sums.width * sums.dtype.itemsize)), sums.width

    def bind(inputs: Sequence[Tensor], output: Tensor, scratch: Sequence[Tensor]) -> Call:
        pixels, fill, prepare = sums.bind(inputs, scratch)
        out, block = output.reshape(-1), scratch[-1]
        parts = []
        for first in range(0, pixels, step):
            last = min(first + step, pixels)
            parts.append((first, last, block[: (last - first) * width], out[first * width : last * width]))

        def call() -> None:
            if prepare is not None:
                prepare()
            for first, last, acc, part in parts:
                fill(acc, first, last)
                finish(acc, part)

        return call

    return Kernel(name, bind, (*sums.scratch, Memory((step * width,), sums.dtype)), sums.packed_bytes)
