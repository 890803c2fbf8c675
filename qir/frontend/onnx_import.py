"""ONNX models as float graphs: one loop over the nodes, folding what is known and lowering the rest by a table."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx

from qir.errors import ImportModelError, QirError, RewriteError
from qir.frontend.onnx_context import Known, Node, Scope
from qir.frontend.onnx_fold import fold
from qir.frontend.onnx_inputs import declare_inputs
from qir.frontend.onnx_model import check_model, read_model, tensor_array
from qir.frontend.onnx_table import LOWERINGS
from qir.ir import Graph
from qir.rewrite import GraphBuilder

ShapeSpec = Mapping[str, Sequence[int | str]]


def import_onnx(
    model: str | os.PathLike[str] | onnx.ModelProto, *, shapes: ShapeSpec | None = None, name: str = ""
) -> Graph:
    """The float graph of an ONNX model, opset 7 to the newest that the `onnx` package knows.

    `shapes` gives input shapes that the model leaves open, e.g. `{"x": [1, 3, 48, 192]}`; "N" in front keeps the batch
    open, as a dynamic leading dimension is anyway. `name` names the graph, else the model does. Values keep their ONNX
    names, and the location of an op is its node's name or, where that is empty, its first output's.
    Raises ImportModelError, which names the node or tensor, the reason and the mend.
    """
    path = None if isinstance(model, onnx.ModelProto) else Path(model)
    source = str(path) if path else "the model"
    try:
        proto = model if isinstance(model, onnx.ModelProto) else read_model(Path(model))
        opset = check_model(proto)
        title = name or proto.graph.name or (path.stem if path else "graph")
        return _lower_graph(proto, Scope(GraphBuilder(title), opset, path.parent if path else None), shapes or {})
    except QirError as fault:
        raise ImportModelError(f"{source}: {fault}") from fault


def _lower_graph(proto: onnx.ModelProto, scope: Scope, shapes: ShapeSpec) -> Graph:
    graph = proto.graph
    for tensor in graph.initializer:
        scope.known[tensor.name] = tensor_array(tensor, scope.folder)
    declare_inputs(graph, scope, shapes)
    context = type(onnx.checker.DEFAULT_CONTEXT)()
    context.ir_version = max(proto.ir_version, 3)  # what older versions lack plays no role inside a node
    context.opset_imports = {entry.domain: entry.version for entry in proto.opset_import} | {"": scope.opset}
    scope.read = frozenset(n for node in graph.node for n in node.input) | {output.name for output in graph.output}
    for node in graph.node:
        _lower_node(node, scope, context)
    outputs = []
    for output in graph.output:
        if output.name not in scope.known:
            raise QirError(f'output "{output.name}" is produced by no node; the model is malformed')
        outputs.append(scope.value(output.name))
    return scope.builder.finish(outputs, [output.name for output in graph.output])


def _lower_node(proto: onnx.NodeProto, scope: Scope, context: onnx.checker.C.CheckerContext) -> None:
    node = Node(proto, scope)
    place = f'node "{node.location}"'
    if proto.domain not in ("", "ai.onnx"):
        raise QirError(
            f"{place}: operator {proto.domain}.{proto.op_type} is foreign; only ONNX's own operators are supported"
        )
    missing = next((name for name in proto.input if name and name not in scope.known), None)
    if missing is not None:
        raise QirError(f'{place}: its input "{missing}" is produced by no earlier node; the model is malformed')
    try:
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in proto.attribute):
            raise QirError(_unsupported("operators with graphs inside are"))
        onnx.checker.check_node(proto, context)
        results: tuple[Known | None, ...] | None = fold(node)
        if results is None:
            results = _lowered(node)
    except onnx.checker.ValidationError as fault:
        reason = str(fault).strip().splitlines()[0]
        raise QirError(f"{place}: {reason} (operator set {scope.opset}); the model is malformed") from fault
    except RewriteError as fault:
        raise QirError(f"{fault}") from fault
    except QirError as fault:
        raise QirError(f"{place}: {proto.op_type}: {fault}") from fault
    for name, known in zip(proto.output, results, strict=False):
        if name and known is not None:
            if name in scope.known:
                raise QirError(f'{place}: its output "{name}" exists already; the model is malformed')
            scope.known[name] = known


def _lowered(node: Node) -> tuple[Known | None, ...]:
    lower = LOWERINGS.get(node.proto.op_type)
    if lower is None:
        raise QirError(_unsupported("this operator is"))
    results = lower(node)
    return results if isinstance(results, tuple) else (results,)


def _unsupported(what: str) -> str:
    return (
        f"{what} not supported on values computed at run time; supported are {', '.join(LOWERINGS)}, "
        f"and any other whose inputs are constants"
    )
