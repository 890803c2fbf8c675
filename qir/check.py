"""What `qir check` finds: the facts of a graph proved again, and for each layer of sums how near they come to them.

The inputs that bring a layer's sums to both ends of their bounds run on the kernels, so that an overflow is shown.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from qir.counterexample import Reach, layer_graph, reach, tightness
from qir.errors import ConformanceError
from qir.fixed_point import Overflow
from qir.idle import is_idle, is_product_idle, overflow_room
from qir.interval import bits_of_interval
from qir.ir import Graph, OpBounds, Stage
from qir.ops.accumulate import STEPWISE, Accumulating
from qir.pass_manager import Progress, no_progress
from qir.program import Program
from qir.proof import Proof, prove_claims
from qir.report import fields_text
from qir.table import columns
from qir.verifier import verify

Tensor = npt.NDArray[Any]

#: The layer comes last: its name alone may be long.
_HEADINGS = ("accumulator", "partial sums", "bits", "slack", "attained", "verdict", "layer")
_NUMBERS = (2, 3, 4)  # columns that hold numbers


@dataclass(frozen=True, eq=False)
class LayerCheck:
    """An accumulating layer: what is proved of its sums, and the inputs that bring them to both ends of that.

    `low` and `high` are of the channels whose bounds reach furthest; None where the layer has no sums, or no rule.
    """

    op: Accumulating
    bounds: OpBounds
    low: Reach | None
    high: Reach | None

    @property
    def is_proved(self) -> bool:
        """Whether no sum leaves the accumulator."""
        return is_idle(self.op, self.bounds)

    @property
    def saturates_stepwise(self) -> bool:
        """Whether a step of a sum may saturate, so that sums must be taken in order."""
        return self.op.overflow in STEPWISE and not self.is_proved

    @property
    def bits(self) -> int:
        """Bits that hold every partial sum, in an accumulator with or without a sign as the layer's."""
        partial = self.bounds.partial
        assert partial is not None
        return bits_of_interval(partial) - (not self.op.accumulator.signed and partial.lo >= 0)

    @property
    def tightness(self) -> Fraction | None:
        """Attained / proved: the share of the bounds of partial sums that inputs of this layer alone span.

        None where there is no input, or where the bounds rest on how its elements depend on each other.
        """
        if self.low is None or self.high is None or self.bounds.sources:
            return None
        return tightness(self.low, self.high)

    @property
    def counterexample(self) -> Reach | None:
        """The input whose sum leaves the accumulator furthest; None where none does."""
        room = overflow_room(self.op)
        found = [r for r in (self.low, self.high) if r is not None and r.overflows]
        if room is None or self.is_proved or not found:
            return None
        return max(found, key=lambda r: max(r.value - room.hi, room.lo - r.value))

    @property
    def verdict(self) -> str:
        """What is said of the layer's sums."""
        return "proved" if self.is_proved else "MAY OVERFLOW"

    def remarks(self) -> Iterator[str]:
        """What the proof rests on beside the layer, a sum that overflows, and what becomes of products."""
        op, found = self.op, self.counterexample
        if self.bounds.sources:
            yield "bounded by what cancels between elements of its operands"
        if not self.is_proved:
            yield f"counterexample: {overflow_text(found)}" if found else "no input is known whose sum overflows"
        if op.product_overflow not in (None, Overflow.NONE) and not is_product_idle(op, self.bounds):
            yield f"products may leave {op.product}: {op.product_overflow}"


def overflow_text(found: Reach) -> str:
    """One sentence on what becomes of a sum that leaves its accumulator."""
    op, at = found.op, f"at {list(found.position)}"
    room = overflow_room(op)
    assert room is not None
    does = {Overflow.WRAP: "wraps", Overflow.SATURATE_ZERO: "falls"}.get(op.overflow, "saturates")
    if not room.lo <= found.exact <= room.hi and found.exact != found.result:
        return f"exact sum {found.exact} {does} to {found.result} in {op.accumulator} {at}"
    behind = f"sum {found.value} behind {found.products} of {found.length} products {does} in {op.accumulator} {at}"
    same = "all the same" if found.exact == found.result else f"instead of {found.exact}"
    return f"{behind}; the result is {found.result} {same}"


def check_layers(graph: Graph, proof: Proof, progress: Progress = no_progress) -> Iterator[LayerCheck]:
    """Each accumulating op that has a range rule. Raises ConformanceError where kernels give other sums."""
    layers = [op for op in graph.ops if isinstance(op, Accumulating) and op in proof.steps]
    for done, op in enumerate(layers, 1):
        operands, bounds = [proof.bounds[v] for v in op.operands], proof.steps[op]
        partials = bounds.channel_partials
        low = high = None
        if partials is not None:
            low = reach(op, operands, bounds, int(np.argmin(partials.lo)), high=False)
            high = reach(op, operands, bounds, int(np.argmax(partials.hi)), high=True)
        if low is not None and high is not None:
            program = Program(layer_graph(op, operands, graph.target))
            for found in (low, high):
                _hold_to_kernels(program, found)
        yield LayerCheck(op, bounds, low, high)
        progress("check", done, len(layers))


def _hold_to_kernels(program: Program, found: Reach) -> None:
    given = int(program.run_integer(found.feeds)[found.op.result.name][found.position])
    if given != found.result:
        raise ConformanceError(
            f"{found.op.describe()}: the kernels give {given} at {list(found.position)}, and the op is defined to give "
            f"{found.result}; hold the kernels to their contract by `qir targets NAME --check`"
        )


@dataclass(frozen=True, eq=False)
class CheckReport:
    """What was verified and proved, as names and texts, and the accumulating layers."""

    fields: tuple[tuple[str, str], ...]
    layers: tuple[LayerCheck, ...] = ()

    def inputs(self) -> dict[str, Tensor]:
        """The inputs of all layers, by result of the op, end of the bounds and operand: `conv1.acc:high:x`."""
        return {
            f"{layer.op.result.name}:{end}:{name}": array
            for layer in self.layers
            for end, found in (("low", layer.low), ("high", layer.high))
            if found is not None
            for name, array in found.feeds.items()
        }

    def __str__(self) -> str:
        return "\n".join([fields_text(self.fields), *(["", *_table(self.layers)] if self.layers else [])])


def check_graph(graph: Graph, progress: Progress = no_progress, claims: int = 0) -> CheckReport:
    """Verify a graph and, at stage `fixed`, prove its facts again and try its layers on the kernels.

    `claims` is how many of a certificate the independent checker has found to hold.
    Raises VerifyError with the findings, ConformanceError where kernels give other sums.
    """
    target = f" for {graph.target}" if graph.target else ""
    head = ("graph", f"@{graph.name} at stage {graph.stage}{target}, {len(graph.ops)} ops, legal")
    verify(graph)
    if graph.stage is not Stage.FIXED:
        return CheckReport((head,))
    proof = prove_claims(graph)
    layers = tuple(check_layers(graph, proof, progress))
    warnings = [("warning", f"{d.place}: {d.message}") for d in proof.diagnostics]
    certified = [("certificate", f"{claims} claims, all hold")] if claims else []
    return CheckReport((head, *certified, *_facts(graph, proof), *_summary(layers), *warnings), layers)


def _facts(graph: Graph, proof: Proof) -> Iterator[tuple[str, str]]:
    modes = [getattr(op, "overflow", None) for op in graph.ops]
    stated = sum(v.range is not None for v in graph.values() if v in proof.bounds)
    sums = sum(getattr(op, "partial", None) is not None for op in graph.ops)
    islands = Counter(op.island_mark for op in graph.ops if op.island_mark)
    yield "ranges", f"{stated} of {len(proof.bounds)} integer values state one, all proved"
    yield "partial sums", f"{sums} stated, all proved"
    yield "overflow", f"{modes.count(Overflow.NONE)} ops proved free of it"
    yield "", f"{modes.count(Overflow.SATURATE)} saturate, {modes.count(Overflow.WRAP)} wrap"
    yield "float islands", f"{islands.total()}, {islands['island tolerance']} of them with a tolerance"


def _summary(layers: tuple[LayerCheck, ...]) -> Iterator[tuple[str, str]]:
    if not layers:
        return
    count, proved = len(layers), sum(layer.is_proved for layer in layers)
    loud = f"; {count - proved} MAY OVERFLOW" if proved < count else ""
    yield "accumulators", f"{proved} of {count} layers proved free of overflow{loud}"
    free = sum(not layer.saturates_stepwise for layer in layers)
    if free == proved:  # where sums wrap instead, none saturates, which says nothing
        yield "", f"{free} of {count} ({_percent(Fraction(free, count))}) proved free of step-wise saturation"
    known = [layer.tightness for layer in layers if layer.tightness is not None]
    if known:
        mean = _ratio(sum(known, Fraction(0)) / len(known))
        yield "tightness", f"bounds attained by inputs of {known.count(Fraction(1))} of {count} layers; mean {mean}"


def _percent(share: Fraction) -> str:
    return f"{math.floor(share * 1000) / 10:g}%"


def _ratio(share: Fraction | None) -> str:
    """Cut, not rounded, so that nothing but 1 shows as 1."""
    return "-" if share is None else "1" if share == 1 else f"{math.floor(share * 10_000) / 10_000:.4f}"


def _table(layers: tuple[LayerCheck, ...]) -> Iterator[str]:
    rows = [_HEADINGS, *map(_row, layers)]
    for line, layer in zip(columns(rows, _NUMBERS), (None, *layers), strict=True):
        yield line
        if layer is not None:
            yield from (f"    {remark}" for remark in layer.remarks())


def _row(layer: LayerCheck) -> tuple[str, ...]:
    op, partial = layer.op, layer.bounds.partial
    assert partial is not None
    return (
        f"{op.accumulator} {op.overflow}",
        f"[{partial.lo}, {partial.hi}]",
        str(layer.bits),
        str(op.accumulator.bits - layer.bits),
        _ratio(layer.tightness),
        layer.verdict,
        op.describe(),
    )
