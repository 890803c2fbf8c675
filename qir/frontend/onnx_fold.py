"""Folding at import: nodes whose inputs are all known become data, so that shapes and axes are plain numbers.

Ordinary data go through `onnx.reference`, ONNX's own definition of its operators. Shapes that hold the open batch N are
computed here, by the few operators that exporters compute shapes with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from qir.errors import QirError
from qir.frontend.onnx_batch import BatchMultiple, as_objects, equal, objects, settle
from qir.frontend.onnx_context import Node, Tensor
from qir.ir import Value
from qir.opdef import normalize_axis

# Random; or lowered, whether or not their inputs are known. (The reference lacks the flattening of the older Softmax.)
_UNFOLDED: Final = frozenset({"Bernoulli", "Multinomial", "Constant", "Dropout", "Shape", "Size", "Softmax"})
_FAULTS: Final = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def fold(node: Node) -> tuple[Tensor, ...] | None:
    """The results of a node whose inputs are all known at import; None for any other node.

    Raises QirError when the node cannot be computed.
    """
    kind = node.proto.op_type
    if kind in _UNFOLDED or kind.startswith("Random"):
        return None
    names = [name for name in node.proto.input if name]
    known = {name: node.scope.known[name] for name in names}
    feeds = {name: data for name, data in known.items() if not isinstance(data, Value)}
    if not names or len(feeds) < len(known):
        return None
    if any(data.dtype == object for data in feeds.values()):
        return _fold_symbolic(node)
    return _fold_by_reference(node, feeds)


def _fold_by_reference(node: Node, feeds: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    try:
        with np.errstate(all="ignore"):
            results = ReferenceEvaluator(_alone(node)).run(None, dict(feeds))
    except _FAULTS as fault:
        raise QirError(f"its inputs are constants, but it cannot be computed at import: {fault}") from fault
    by_name = dict(zip([name for name in node.proto.output if name], results, strict=True))
    return tuple(_tensor(by_name[name]) if name else np.zeros(0) for name in node.proto.output)


def _alone(node: Node) -> onnx.ModelProto:
    """A model of this node only: the reference goes by the operator set of a model, never by that of a node."""
    helper = onnx.helper
    untyped = onnx.TensorProto.UNDEFINED
    inputs, outputs = (
        [helper.make_tensor_value_info(name, untyped, None) for name in dict.fromkeys(names) if name]
        for names in (node.proto.input, node.proto.output)
    )
    graph = helper.make_graph([node.proto], "node", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", node.opset)])


def _tensor(result: object) -> Tensor:
    if not isinstance(result, np.ndarray | np.generic):
        raise QirError(f"gives {type(result).__name__}, not a tensor; sequences and optionals are not supported")
    return np.asarray(result)


def _fold_symbolic(node: Node) -> tuple[Tensor, ...]:
    rule = _SYMBOLIC.get(node.proto.op_type)
    if rule is None:
        known = ", ".join(sorted(_SYMBOLIC))
        raise QirError(
            f"computes with a shape that holds the open batch N, which only {known} can; fix the batch size with shapes"
        )
    results = rule(node)
    return tuple(settle(r) if r.dtype == object else r for r in (results if isinstance(results, tuple) else (results,)))


def _symbols(node: Node, index: int) -> Tensor:
    return as_objects(node.data(index, f"input {index}"))


def _arithmetic(function: Callable[[Any, Any], Any]) -> Callable[[Node], Tensor]:
    elementwise = np.frompyfunc(function, 2, 1)
    return lambda node: objects(elementwise(_symbols(node, 0), _symbols(node, 1)))


def _divide(left: Any, right: Any) -> Any:
    """ONNX divides integers towards zero."""
    if isinstance(left, BatchMultiple) or isinstance(right, BatchMultiple):
        return left // right
    if right == 0:
        raise QirError("divides by zero")
    return abs(left) // abs(right) * (1 if (left < 0) == (right < 0) else -1)


def _cast(node: Node) -> Tensor:
    if node.number("to") not in (onnx.TensorProto.INT64, onnx.TensorProto.INT32):
        raise QirError(
            "casts a shape that holds the open batch N to other than int32 or int64; fix the batch size with shapes"
        )
    return _symbols(node, 0)


def _axes(node: Node, rank: int, since: int = 13) -> tuple[int, ...]:
    axes = node.whole(1, "axes") if node.opset >= since and node.has(1) else node.integers("axes", range(rank))
    return tuple(normalize_axis(a, rank) for a in axes)


def _squeeze(node: Node) -> Tensor:
    data = _symbols(node, 0)
    axes = [a for a in _axes(node, data.ndim) if data.shape[a] == 1]
    return np.squeeze(data, tuple(axes))


def _unsqueeze(node: Node) -> Tensor:
    data = _symbols(node, 0)
    axes = node.whole(1, "axes") if node.opset >= 13 else node.integers("axes", ())
    rank = data.ndim + len(axes)
    return np.expand_dims(data, tuple(normalize_axis(a, rank) for a in axes))


def _gather(node: Node) -> Tensor:
    data, indices = _symbols(node, 0), node.data(1, "indices")
    axis = normalize_axis(node.number("axis"), data.ndim)
    size = data.shape[axis]
    if indices.dtype == object or (indices.size and not -size <= int(indices.min()) <= int(indices.max()) < size):
        raise QirError(f"its indices are outside an axis of {size} elements")
    return objects(np.take(data, indices, axis))


def _slice(node: Node) -> Tensor:
    data = _symbols(node, 0)
    return objects(data[slice_index(node, data.shape)])


def slice_index(node: Node, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """What a Slice node selects, one slice per axis, as stated: bounds may be negative or beyond the axis."""
    if node.opset >= 10:
        starts, ends = node.whole(1, "starts"), node.whole(2, "ends")
        axes = node.whole(3, "axes") if node.has(3) else tuple(range(len(starts)))
        steps = node.whole(4, "steps") if node.has(4) else (1,) * len(starts)
    else:
        starts, ends = node.integers("starts", ()), node.integers("ends", ())
        axes, steps = node.integers("axes", range(len(starts))), (1,) * len(starts)
    if not len(starts) == len(ends) == len(axes) == len(steps) or 0 in steps:
        raise QirError("its starts, ends, axes and steps must be equally long, and no step 0")
    index = [slice(None)] * len(shape)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        place = normalize_axis(axis, len(shape))
        # Counting down, ONNX clamps a start below the front to the front, and an end below it to "past the first".
        if step < 0 and start < -shape[place]:
            start = 0
        index[place] = slice(start, None if step < 0 and end < -shape[place] else end, step)
    return tuple(index)


def _reshape(node: Node) -> Tensor:
    data, target = _symbols(node, 0), node.whole(1, "shape")
    copied = [data.shape[i] if d == 0 and i < data.ndim else d for i, d in enumerate(target)]
    try:
        return data.reshape(copied)
    except ValueError as fault:
        raise QirError(f"cannot reshape {list(data.shape)} to {list(target)}") from fault


def _reduce_prod(node: Node) -> Tensor:
    data = _symbols(node, 0)
    axes = _axes(node, data.ndim, since=18)
    return objects(np.prod(data, axis=axes, keepdims=bool(node.number("keepdims"))))


def _where(node: Node) -> Tensor:
    return np.where(node.data(0, "condition"), _symbols(node, 1), _symbols(node, 2))


def _concat(node: Node) -> Tensor:
    return np.concatenate([_symbols(node, i) for i in range(len(node.proto.input))], axis=node.number("axis"))


_SYMBOLIC: Final[Mapping[str, Callable[[Node], Tensor]]] = MappingProxyType(
    {
        "Add": _arithmetic(lambda a, b: a + b),
        "Cast": _cast,
        "Concat": _concat,
        "Div": _arithmetic(_divide),
        "Equal": lambda node: equal(_symbols(node, 0), _symbols(node, 1)),
        "Gather": _gather,
        "Identity": lambda node: _symbols(node, 0),
        "Mul": _arithmetic(lambda a, b: a * b),
        "ReduceProd": _reduce_prod,
        "Reshape": _reshape,
        "Slice": _slice,
        "Squeeze": _squeeze,
        "Sub": _arithmetic(lambda a, b: a - b),
        "Unsqueeze": _unsqueeze,
        "Where": _where,
    }
)
