"""canonicalize: one form for what can be written in several ways, and nothing that does nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from qir.arrays import Array
from qir.ir import Graph, Op, Stage, Value
from qir.ops.constant import Const
from qir.ops.float_elementwise import Activation, Add, Cast, Clip, Div, HardSigmoid, HardSwish, Mul, Relu, Sub
from qir.ops.float_nn import Conv
from qir.ops.float_pool import AveragePool, ReduceMean
from qir.ops.movement import Concat, Pad, Reshape, Slice, Transpose
from qir.pass_manager import Pass, PassContext
from qir.passes.fuse_activation import UNCLIPPED, clip_of, compose
from qir.rewrite import Rewriter, live_ops
from qir.types import F32, TensorType

#: What a rule makes of an op: an op in its place, a value that is there already, or None where it does not apply.
Outcome = Op | Value | None
Tensor = npt.NDArray[Any]

#: How far a constant may be from 1/6, relatively: exporters write it with six to nine decimals.
_SIXTH_TOLERANCE: Final = 2.0**-20


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Rewrites float ops to canonical ones; constants with the same data, and equal ops on them, become one.

    - A constant operand of Add and Mul stands second; Sub and Div by a constant are Add and Mul; `x * 1` and `x + 0`
      are x.
    - Reshape, Transpose, Slice, Pad, Concat and Cast that change nothing go; Reshapes in a row, Transposes in a row
      and activations in a row are one.
    - A Pad with zeros goes into the Conv behind it. An AveragePool over the whole map is a ReduceMean.
    - `clip(x + 3, 0, 6) / 6` is HardSigmoid, and x times it, in any order, HardSwish.

    Ops that no output depends on are dropped, so that fusion finds the values that only one op reads.
    """

    name: ClassVar[str] = "canonicalize"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.FLOAT})
    ensures: ClassVar[Stage] = Stage.FLOAT

    def run(self, graph: Graph, context: PassContext) -> Graph:
        """The canonical graph; the same object where it was one."""
        rewriter = _Canonicalizer(graph)
        for value in graph.inputs:
            rewriter.keep_input(value)
        for op in graph.ops:
            rewriter.visit(op)
        for title, count in sorted(rewriter.applied.items()):
            context.note(f"{count} {title}")
        after = rewriter.finish_graph() if rewriter.applied else graph
        live = live_ops(after)
        if len(live) < len(after.ops):
            context.note(f"{len(after.ops) - len(live)} ops dropped")
            after = after.with_changes(ops=tuple(live))
        if after is graph:
            context.note("nothing to change")
        return after


class _Canonicalizer(Rewriter):
    """A rewriter that knows who made each new value, and applies the rules to every op until none fits."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.applied: Counter[str] = Counter()
        self._makers: dict[Value, Op] = {}
        self._seen: dict[object, Op] = {}

    def visit(self, op: Op) -> None:
        """Write what stands for an old op."""
        operands = self.operands(op)
        current = op if operands == op.operands else op.with_changes(operands=operands)
        while (found := self._apply_one(current)) is not None:
            if isinstance(found, Value):
                self.set(op.result, found)
                return
            current = found
        key = _content(current)
        twin = self._seen.get(key)
        if twin is not None:
            self.applied["equal ops merged"] += 1
        else:
            self._seen[key] = twin = current
            self.append(current)
            self._makers.update(dict.fromkeys(current.results, current))
        for old, new in zip(op.results, twin.results, strict=True):
            self.set(old, new)

    def _apply_one(self, op: Op) -> Outcome:
        for kinds, title, rule in RULES:
            if isinstance(op, kinds):
                found = rule(self, op)
                if found is not None:
                    self.applied[title] += 1
                    return found
        return None

    def maker(self, value: Value) -> Op | None:
        """The op that makes a new value; None for an input."""
        return self._makers.get(value)

    def data(self, value: Value) -> Tensor | None:
        """The data of a constant."""
        op = self._makers.get(value)
        return op.value.data if isinstance(op, Const) else None

    def scalar(self, value: Value) -> float | None:
        """The number that a constant of one element holds."""
        data = self.data(value)
        return float(data.reshape(-1)[0]) if data is not None and data.size == 1 else None

    def number(self, data: Tensor, name: str) -> Value:
        """A float constant, new unless one of the same data stands already."""
        array = Array(np.asarray(data, np.float32), name)
        kind = TensorType(array.shape, F32)
        key = _content(Const(results=(Value(name, kind),), value=array))
        if key not in self._seen:
            value = self.constant(array, kind, name)
            self._makers[value] = self._seen[key] = self.ops[-1]
        return self._seen[key].result


def _content(op: Op) -> object:
    """What two ops share that compute the same."""
    return type(op), op.operands, tuple(getattr(op, n) for n in op.attribute_names()), tuple(r.type for r in op.results)


def _instead(op: Op, op_class: type[Op], *operands: Value, **attributes: Any) -> Op:
    """An op in place of another, with its result and location."""
    return op_class(operands=operands, results=op.results, location=op.location, **attributes)


def _keeps_shape(op: Op) -> bool:
    return op.result.type == op.operands[0].type


def _identity(_: _Canonicalizer, op: Op) -> Outcome:
    if isinstance(op, Reshape):
        same = _keeps_shape(op)
    elif isinstance(op, Transpose):
        same = op.perm == tuple(range(len(op.perm)))
    elif isinstance(op, Slice):
        same = _keeps_shape(op) and set(op.steps) <= {1}
    elif isinstance(op, Pad):
        same = not any(op.pads)
    elif isinstance(op, Concat):
        same = len(op.operands) == 1
    else:
        same = _keeps_shape(op)  # a Cast to the type that it is given
    return op.operands[0] if same else None


def _merge_reshapes(graph: _Canonicalizer, op: Op) -> Outcome:
    before = graph.maker(op.operands[0])
    return op.with_changes(operands=before.operands) if isinstance(before, Reshape) else None


def _merge_transposes(graph: _Canonicalizer, op: Op) -> Outcome:
    before = graph.maker(op.operands[0])
    if not isinstance(op, Transpose) or not isinstance(before, Transpose):
        return None
    return op.with_changes(operands=before.operands, perm=tuple(before.perm[p] for p in op.perm))


def _merge_activations(graph: _Canonicalizer, op: Op) -> Outcome:
    assert isinstance(op, Activation)
    before = graph.maker(op.operands[0])
    if isinstance(before, Activation):
        return _activation(op, before.operands[0], compose(before.activation, op.activation))
    if op.activation == UNCLIPPED:
        return op.operands[0]
    return _instead(op, Relu, op.operands[0]) if isinstance(op, Clip) and op.activation == _RELU else None


_RELU: Final = (0.0, float("inf"))


def _activation(op: Op, source: Value, clip: tuple[float, float]) -> Outcome:
    """The op that only clips `source`, in place of `op`."""
    if clip == UNCLIPPED:
        return source
    return _instead(op, Relu, source) if clip == _RELU else _instead(op, Clip, source, minimum=clip[0], maximum=clip[1])


def _constant_second(graph: _Canonicalizer, op: Op) -> Outcome:
    a, b = op.operands
    return op.with_changes(operands=(b, a)) if graph.data(a) is not None and graph.data(b) is None else None


def _subtract_constant(graph: _Canonicalizer, op: Op) -> Outcome:
    assert isinstance(op, Sub)
    a, b = op.operands
    data = graph.data(b)
    if data is None or graph.data(a) is not None:
        return None
    return _instead(op, Add, a, graph.number(-data, f"{b.name}.negated"), clip=op.clip)


def _divide_by_constant(graph: _Canonicalizer, op: Op) -> Outcome:
    assert isinstance(op, Div)
    a, b = op.operands
    data = graph.data(b)
    if data is None or graph.data(a) is not None:
        return None
    with np.errstate(all="ignore"):
        reciprocal = (1 / data.astype(np.float64)).astype(np.float32)
    if not np.isfinite(reciprocal).all() or not _is_normal(reciprocal):
        return None  # the quotient would lose its precision, or the constant be infinite
    return _instead(op, Mul, a, graph.number(reciprocal, f"{b.name}.reciprocal"), clip=op.clip)


def _is_normal(data: Tensor) -> bool:
    return bool((np.abs(data) >= np.finfo(np.float32).smallest_normal).all())


def _neutral_constant(graph: _Canonicalizer, op: Op) -> Outcome:
    assert isinstance(op, Add | Mul)
    data = graph.data(op.operands[1])
    if data is None or not _keeps_shape(op) or not (data == (1 if isinstance(op, Mul) else 0)).all():
        return None
    return _activation(op, op.operands[0], clip_of(op))


def _pad_into_conv(graph: _Canonicalizer, op: Op) -> Outcome:
    assert isinstance(op, Conv)
    pad = graph.maker(op.operands[0])
    if not isinstance(pad, Pad) or pad.value != 0:
        return None
    rank = pad.result.type.rank
    begins, ends = pad.pads[:rank], pad.pads[rank:]
    if any((*begins[:2], *ends[:2])):
        return None
    pads = tuple(a + b for a, b in zip(op.pads, (*begins[2:], *ends[2:]), strict=True))
    return op.with_changes(operands=(pad.operands[0], *op.operands[1:]), pads=pads)


def _whole_average(_: _Canonicalizer, op: Op) -> Outcome:
    assert isinstance(op, AveragePool)
    source, result = op.operands[0].type.shape, op.result.type.shape
    if any(op.pads) or op.kernel != source[2:] or set(result[2:]) != {1} or set(op.dilations) != {1}:
        return None
    return _instead(op, ReduceMean, op.operands[0], axes=tuple(range(2, len(source))), keepdims=True)


def _is_sixth(value: float | None) -> bool:
    return value is not None and abs(value * 6 - 1) <= _SIXTH_TOLERANCE


def _relu6_of_shifted(graph: _Canonicalizer, value: Value) -> Value | None:
    """The x where `value` is `clip(x + 3, 0, 6)`, the clip an op of its own or fused into the Add."""
    op = graph.maker(value)
    if isinstance(op, Clip) and op.activation == (0.0, 6.0):
        op = graph.maker(op.operands[0])
        fused = UNCLIPPED
    else:
        fused = (0.0, 6.0)
    if not isinstance(op, Add) or clip_of(op) != fused or graph.scalar(op.operands[1]) != 3 or not _keeps_shape(op):
        return None
    return op.operands[0]


def _hard_sigmoid(graph: _Canonicalizer, op: Op) -> Outcome:
    assert isinstance(op, Mul)
    x = _relu6_of_shifted(graph, op.operands[0])
    if x is None or op.clip is not None or not _is_sixth(graph.scalar(op.operands[1])) or not _keeps_shape(op):
        return None
    return _instead(op, HardSigmoid, x, alpha=1 / 6, beta=0.5)


def _hard_swish(graph: _Canonicalizer, op: Op) -> Outcome:
    assert isinstance(op, Mul)
    if op.clip is not None:
        return None
    for x in _hard_swish_sources(graph, op):
        if x.type == op.result.type:
            return _instead(op, HardSwish, x)
    return None


def _hard_swish_sources(graph: _Canonicalizer, op: Mul) -> Iterator[Value]:
    """The x for which the product is x * hard_sigmoid(x), or x, relu6(x + 3) and 1/6 in some order."""
    left, right = op.operands
    for a, b in ((left, right), (right, left)):
        gate = graph.maker(b)
        if isinstance(gate, HardSigmoid) and gate.operands[0] is a and _is_sixth(gate.alpha) and gate.beta == 0.5:
            yield a
        x = _relu6_of_shifted(graph, b)
        if x is not None and _sixth_of(graph, a) is x:
            yield x
    product = _sixth_of(graph, op.result, op)
    inner = graph.maker(product) if product is not None else None
    if isinstance(inner, Mul) and inner.clip is None:
        for a, b in (inner.operands, inner.operands[::-1]):
            if _relu6_of_shifted(graph, b) is a:
                yield a


def _sixth_of(graph: _Canonicalizer, value: Value, maker: Op | None = None) -> Value | None:
    """The y where `value` is `y * (1/6)`."""
    op = maker or graph.maker(value)
    if isinstance(op, Mul) and op.clip is None and _keeps_shape(op) and _is_sixth(graph.scalar(op.operands[1])):
        return op.operands[0]
    return None


Rule = Callable[[_Canonicalizer, Op], Outcome]

#: The classes that a rule looks at, what it is called in notes, and the rule; tried in order until none applies.
RULES: Final[tuple[tuple[type[Op] | tuple[type[Op], ...], str, Rule], ...]] = (
    ((Reshape, Transpose, Slice, Pad, Concat, Cast), "ops without effect removed", _identity),
    (Reshape, "Reshapes merged", _merge_reshapes),
    (Transpose, "Transposes merged", _merge_transposes),
    (Activation, "activations simplified", _merge_activations),
    ((Add, Mul), "constants put second", _constant_second),
    (Sub, "Sub made Add", _subtract_constant),
    (Div, "Div made Mul", _divide_by_constant),
    ((Add, Mul), "neutral constants removed", _neutral_constant),
    (Mul, "HardSwish recognized", _hard_swish),
    (Mul, "HardSigmoid recognized", _hard_sigmoid),
    (Conv, "Pads moved into Conv", _pad_into_conv),
    (AveragePool, "AveragePool made ReduceMean", _whole_average),
)
