"""fuse-batch-norm: per-channel arithmetic behind a Conv or MatMul goes into its weights and bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from qir.arrays import Array
from qir.errors import PassError
from qir.ir import Graph, Op, Stage, Value
from qir.ops.constant import Const
from qir.ops.float_elementwise import Add, Div, HardSigmoid, Mul, Sub
from qir.ops.float_nn import BatchNormalization, Conv, MatMul
from qir.pass_manager import Pass, PassContext
from qir.passes.fuse_activation import UNCLIPPED, Clip, clip_of, compose, replace_chain, sole_readers
from qir.rewrite import Rewriter, rewrite
from qir.types import F32, TensorType

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class FuseBatchNorm(Pass):
    """Fuses what follows a Conv or MatMul and is `x * factor + offset` for constants of each output channel.

    BatchNormalization, HardSigmoid, and Mul, Div, Add and Sub by constants go into constant weights and bias, computed
    in float64 and rounded once to float32, where nothing else reads the values between. A BatchNormalization that
    stands elsewhere (also one before a Conv, whose padding it must not reach) becomes a Mul and an Add.

    Raises PassError for a BatchNormalization whose factor is not finite.
    """

    name: ClassVar[str] = "fuse-batch-norm"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.FLOAT})
    ensures: ClassVar[Stage] = Stage.FLOAT

    def run(self, graph: Graph, context: PassContext) -> Graph:
        """The fused graph; the same object where there is nothing to fuse."""
        plan = _Plan(graph)
        context.note(f"{len(plan.absorbed)} ops fused into {len(plan.chains)} Conv and MatMul")
        if plan.norms:
            context.note(f"{len(plan.norms)} BatchNormalization made Mul and Add")
        return rewrite(graph, plan.visit) if plan.chains or plan.norms else graph


@dataclass(frozen=True)
class _Chain:
    """What the ops from `head` to `end` compute: `clip(head * factor + offset)`, one number per channel."""

    head: Conv | MatMul
    factor: Vector
    offset: Vector
    clip: Clip
    end: Op

    def then(self, op: Op, factor: Vector, offset: Vector, clip: Clip) -> _Chain | None:
        """The chain with another op behind it; None where a clip inside keeps them apart."""
        passed = self.clip
        if passed != UNCLIPPED:
            steps = set(zip(factor.tolist(), offset.tolist(), strict=True))
            if len(steps) != 1 or not (factor > 0).all():
                return None  # channels that differ would each need a clip of their own
            f, o = steps.pop()
            passed = passed[0] * f + o, passed[1] * f + o
        return _Chain(self.head, self.factor * factor, self.offset * factor + offset, compose(passed, clip), op)

    def weights(self, data: Mapping[Value, Array]) -> tuple[npt.NDArray[np.float32] | None, ...] | None:
        """The weight and bias with the chain in them, None for one that stays; None where they are not finite."""
        weight, bias = self.head.operands[1], self.head.optional_operand(2)
        scaled = shifted = None
        with np.errstate(over="ignore", invalid="ignore"):
            if not (self.factor == 1).all():
                shape = [-1] + [1] * (weight.type.rank - 1) if isinstance(self.head, Conv) else [-1]
                scaled = (data[weight].data * self.factor.reshape(shape)).astype(np.float32)
            total = self.offset if bias is None else data[bias].data * self.factor + self.offset
            if bias is not None or self.offset.any():
                shifted = total.astype(np.float32)
        fits = all(np.isfinite(a).all() for a in (scaled, shifted) if a is not None)
        return (scaled, shifted) if fits else None


class _Plan:
    """Which ops fuse, decided on the old graph, and how the new one is written."""

    def __init__(self, graph: Graph) -> None:
        self.data = graph.constants
        self.readers = sole_readers(graph)
        self.chains: dict[Op, _Chain] = {}
        self.absorbed: set[Op] = set()
        self.in_place: dict[Value, npt.NDArray[np.float32]] = {}  # constants that only one chain reads
        for op in graph.ops:
            if isinstance(op, Conv | MatMul) and op not in self.absorbed:
                self._follow(op)
        self.norms = {op for op in graph.ops if self._is_constant_norm(op) and op not in self.absorbed}

    def _follow(self, head: Conv | MatMul) -> None:
        """Take in the ops behind `head` as far as they fuse."""
        bias = head.optional_operand(2)
        if bias is not None and bias not in self.data:
            return
        channels = head.result.type.shape[_axis(head)]
        assert isinstance(channels, int)
        chain = _Chain(head, np.ones(channels), np.zeros(channels), clip_of(head), head)
        ops: list[Op] = []
        while (op := self.readers.get(chain.end.result)) is not None:
            step = _affine(op, chain.end.result, _axis(head), channels, self.data)
            longer = chain.then(op, *step) if step is not None else None
            if longer is None or not self._computable(longer):
                break
            chain = longer
            ops.append(op)
        if ops:
            self.chains[head] = chain
            self.absorbed.update(ops)
            for value, array in zip(head.operands[1:], chain.weights(self.data) or (), strict=False):
                if array is not None and value in self.readers:
                    self.in_place[value] = array

    def _computable(self, chain: _Chain) -> bool:
        if not (chain.factor == 1).all() and chain.head.operands[1] not in self.data:
            return False
        return chain.weights(self.data) is not None

    def _is_constant_norm(self, op: Op) -> bool:
        return isinstance(op, BatchNormalization) and all(v in self.data for v in op.operands[1:])

    def visit(self, rewriter: Rewriter, op: Op) -> bool:
        """Write what stands for `op`."""
        if op in self.chains:
            chain = self.chains[op]
            replace_chain(rewriter, chain.head, chain.end, self._operands(rewriter, chain), chain.clip)
        elif op in self.norms:
            assert isinstance(op, BatchNormalization)
            self._write_norm(rewriter, op)
        elif isinstance(op, Const) and op.result in self.in_place:
            rewriter.keep(op, value=Array(self.in_place[op.result], op.value.name))
        else:
            return op in self.absorbed
        return True

    def _operands(self, rewriter: Rewriter, chain: _Chain) -> tuple[Value, ...]:
        operands = list(rewriter.operands(chain.head))
        arrays = chain.weights(self.data) or ()
        for place, array in enumerate(arrays, 1):
            old = chain.head.optional_operand(place)
            if array is None or (old is not None and old in self.in_place):
                continue
            name = old.name if old is not None else f"{chain.head.result.name}.bias"
            new = rewriter.constant(Array(array, name), TensorType(array.shape, F32), name)
            operands[place:] = [new, *operands[place + 1 :]]
        return tuple(operands)

    def _write_norm(self, rewriter: Rewriter, op: BatchNormalization) -> None:
        """`x * factor + offset`, the constants shaped [C, 1, ...] to broadcast."""
        name, shape = op.result.name, (-1, *[1] * (op.result.type.rank - 2))
        factor, offset = (
            rewriter.constant(Array(a, f"{name}.{what}"), TensorType(a.shape, F32), f"{name}.{what}")
            for what, a in zip(
                ("factor", "offset"), (v.astype(np.float32).reshape(shape) for v in _norm(op, self.data)), strict=True
            )
        )
        source = rewriter.get(op.operands[0])
        scaled = rewriter.emit(Mul, [source, factor], name=f"{name}.scaled", location=op.location)
        rewriter.replace(op, Add, [scaled, offset])


def _axis(head: Op) -> int:
    """The axis of the output channels."""
    return 1 if isinstance(head, Conv) else head.result.type.rank - 1


def _affine(
    op: Op, source: Value, axis: int, channels: int, data: Mapping[Value, Array]
) -> tuple[Vector, Vector, Clip] | None:
    """Factor and offset per channel and clip of an op on `source`; None where it is no such op."""
    if isinstance(op, HardSigmoid):
        return np.full(channels, op.alpha), np.full(channels, op.beta), (0.0, 1.0)
    if isinstance(op, BatchNormalization):
        if axis != 1 or op.operands[0] is not source or not all(v in data for v in op.operands[1:]):
            return None
        return *_norm(op, data), UNCLIPPED
    if not isinstance(op, Add | Sub | Mul | Div) or op.result.type != source.type:
        return None
    first = op.operands[0] is source
    other = op.operands[1 if first else 0]
    number = _per_channel(data[other].data, source.type.rank, axis, channels) if other in data else None
    if number is None or (isinstance(op, Div) and not (first and number.all())):
        return None
    ones, zeros = np.ones(channels), np.zeros(channels)
    if isinstance(op, Add):
        return ones, number, clip_of(op)
    if isinstance(op, Sub):
        return (ones, -number, clip_of(op)) if first else (-ones, number, clip_of(op))
    return number if isinstance(op, Mul) else 1 / number, zeros, clip_of(op)


def _per_channel(data: npt.NDArray[Any], rank: int, axis: int, channels: int) -> Vector | None:
    """A constant that broadcasts to the channels as one float64 for each; None where it differs along another axis."""
    shape = (1,) * (rank - data.ndim) + data.shape
    if any(d != 1 for i, d in enumerate(shape) if i != axis):
        return None
    return np.broadcast_to(data.reshape(-1).astype(np.float64), (channels,))


def _norm(op: BatchNormalization, data: Mapping[Value, Array]) -> tuple[Vector, Vector]:
    """Factor and offset per channel. Raises PassError where they are not finite in float32."""
    scale, bias, mean, variance = (data[v].data.astype(np.float64) for v in op.operands[1:])
    with np.errstate(all="ignore"):
        factor = scale / np.sqrt(variance + op.epsilon)
        offset = bias - mean * factor
        fits = all(np.isfinite(a.astype(np.float32)).all() for a in (factor, offset))
    if not fits:
        raise PassError(
            f"{op.describe()}: scale / sqrt(variance + epsilon) is not finite for some channel; correct the "
            "variance or raise epsilon in the model"
        )
    return factor, offset
