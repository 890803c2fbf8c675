"""Rules of the checker: what follows of an op's result and registers from the ranges of its operands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from qir.checker.arithmetic import cut, scaled
from qir.checker.claims import Image, Span, between, centred, channels, ends_of, hull, step_of, union
from qir.checker.sums import chain
from qir.ir import Graph
from qir.types import storage_of, zero_array


def image(graph: Graph, op: Any, spans: Sequence[Span]) -> Image:
    """What follows of an op's result and registers from the ranges of its operands; None of a result: no rule."""
    storage = storage_of(op.results[0].type.element) if op.results else None
    if storage is None:
        return None, {}
    match op.mnemonic:
        case "const":
            rows = _columns(op.value.data)
            return [between(c.min(), c.max()) for c in rows if c.size], {}
        case "conv2d" | "matmul" | "reduce_sum":
            return chain(graph, op, spans)
        case "requantize":
            return _requantized(op, centred(op.operands[0], spans[0]), storage)
        case "add" | "sub" | "mul" | "div":
            return _arithmetic(op, [centred(v, s) for v, s in zip(op.operands, spans, strict=True)], storage)
        case "reshape" | "transpose" | "concat" | "slice" | "gather" | "pad":
            return _moved(op, spans), {}
        case "table" if op.operands[1] in graph.constants:
            return _looked_up(op, spans[0], np.atleast_2d(graph.constants[op.operands[1]].data)), {}
        case "max_pool2d":
            return spans[0], {}
        case "average_pool2d":
            (lo, hi), count = hull(spans[0]), math.prod(op.kernel)
            return [between(r[0], r[-1]) for r in spans[0]], {"sum": [between(min(lo, 0) * count, max(hi, 0) * count)]}
        case "softmax":
            return [between(-128, 127)], {}
        case "argmax":
            return [between(0, op.operands[0].type.concrete(1)[op.axis] - 1)], {}
        case "quantize":
            return [between(storage.lo, storage.hi)], {}
    return None, {}


def _moved(op: Any, spans: Sequence[Span]) -> Span:
    """What moves elements, carried out on the numbers of their ranges."""
    parts: list[range] = []
    arrays = []
    for value, span in zip(op.operands, spans, strict=True):
        shape = value.type.concrete(1)
        arrays.append(np.broadcast_to(np.arange(len(span)) + len(parts), shape or (1,)).reshape(shape))
        parts += span
    found = _columns(moved(op, arrays, len(parts)))
    parts += [range(op.value, op.value + 1)] if op.mnemonic == "pad" else []
    return [union([parts[i] for i in np.unique(column)]) for column in found]


def moved(op: Any, arrays: Sequence[Any], fill: int = 0) -> Any:
    """What an op that moves elements makes of arrays; `fill` is where it pads."""
    first = arrays[0]
    match op.mnemonic:
        case "reshape":
            return first.reshape(op.results[0].type.concrete(1))
        case "transpose":
            return first.transpose(op.perm)
        case "concat":
            return np.concatenate(arrays, op.axis)
        case "slice":
            for start, end, axis, step in zip(op.starts, op.ends, op.axes, op.steps, strict=True):
                first = np.take(first, range(start, end, step), axis)
            return first
        case "gather":
            return np.take(first, op.indices.data, op.axis)
    widths = [(op.pads[i], op.pads[first.ndim + i]) for i in range(first.ndim)]
    return np.pad(first, widths, constant_values=fill) if widths else first


def _columns(array: Any) -> Any:
    """All elements of each index of the last axis; nothing of an empty array."""
    return array.reshape(-1, array.shape[-1] if array.ndim else 1).T if array.size else ()


def _looked_up(op: Any, span: Span, table: Any) -> Span:
    """The entries that the operand can reach."""
    storage, result = storage_of(op.operands[0].type.element), []
    first = -(table.shape[1] // 2) if storage is not None and storage.signed else 0
    for channel, (r, _) in enumerate(channels(span, [range(1)] * len(table))):
        reached = table[channel % len(table)][r[0] - first : r[-1] - first + 1 : r.step]
        result.append(union([range(entry, entry + 1) for entry in np.unique(reached).tolist()]))
    return result


def _requantized(op: Any, operand: Span, storage: Any) -> Image:
    """The images of both ends: every form is monotonic as long as no 32-bit register wraps."""
    x = [between(r[0] << op.input_shift, r[-1] << op.input_shift, r.step << op.input_shift) for r in operand]
    shifts = op.shift.data.reshape(-1).tolist()
    early = [max(s, 0) if op.form in ("double_round", "neon", "shift") else 0 for s in shifts]
    registers = [end << s for end in hull(x) for s in (0, *early)]
    if op.form == "reduced_16":
        registers = [scaled(op, end, channel) for end in hull(x) for channel in range(len(shifts))]
    zeros = zero_array(op.results[0].type.element).reshape(-1).tolist()
    shifted, free = [], []
    for channel, (r, *_) in enumerate(channels(x, [range(1)] * len(shifts), [range(1)] * len(zeros))):
        left, zero = early[channel % len(early)], zeros[channel % len(zeros)]
        shifted.append(between(r[0] << left, r[-1] << left))
        least, most = (scaled(op, end, channel) + zero for end in (r[0], r[-1]))
        unit = 1 << max(-shifts[channel % len(shifts)], 0)
        is_exact = op.form == "shift" and r[0] % unit == 0 and step_of(r) % unit == 0
        free.append(between(least, most, step_of(r) // unit << left if is_exact else 1))
    lanes = {"shifted": [between(*hull(shifted))]}
    if op.form in ("double_round", "neon", "reduced_16") and any((r + (1 << 31)) >> 32 for r in registers):
        return [between(storage.lo, storage.hi)], lanes
    return _narrowed(op, free, storage, lanes)


def _arithmetic(op: Any, spans: Sequence[Span], storage: Any) -> Image:
    """The extremes lie where both operands are at an end, as long as no divisor is 0."""
    if op.mnemonic == "div" and hull(spans[1])[0] <= 0 <= hull(spans[1])[1]:
        return [between(storage.lo, storage.hi)], {}
    free = []
    for a, b in channels(*spans):
        corners = [_combined(op, *ends) for ends in product((a[0], a[-1]), (b[0], b[-1]))]
        step = 1 if op.mnemonic == "div" else math.gcd(step_of(a), step_of(b))
        if op.mnemonic == "mul":
            step = math.gcd(a[0] * step_of(b), b[0] * step_of(a), step_of(a) * step_of(b))
        free.append(between(min(corners), max(corners), step))
    return _narrowed(op, free, storage, {})


def _combined(op: Any, a: int, b: int) -> int:
    match op.mnemonic:
        case "add":
            return a + b
        case "sub":
            return a - b
        case "mul":
            return a * b
    shift = int(op.shift)
    above, below = abs(a) * int(op.multiplier) << max(shift - 31, 0), abs(b) << max(31 - shift, 0)
    quotient: int = (2 * above + below) // (2 * below)  # ties away from zero
    return int(zero_array(op.results[0].type.element)) + (quotient if a * b >= 0 else -quotient)


def _narrowed(op: Any, free: Span, storage: Any, lanes: dict[str, Span]) -> Image:
    """What becomes of exact results when they are narrowed to the storage bounds of the result."""
    result = []
    for r, lo, hi in zip(free, *cut(ends_of(free, 0), ends_of(free, -1), storage, op.overflow), strict=True):
        at_bound = (lo, hi) == (r[0], r[-1]) or op.overflow in ("saturate", "saturate_symmetric", "none")
        result.append(between(lo, hi, math.gcd(step_of(r), lo - r[0], hi - r[-1]) if at_bound else 1))
    return result, lanes | {"unsaturated": free}
