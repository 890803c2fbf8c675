"""What every legal graph obeys. Findings are collected, each with its place; the rules of one op stand in its class.

1. Names of values and of outputs are unique; operands are defined before they are used; outputs are defined.
2. An op stands only at its stages and has as many operands as it declares.
3. Results have the shapes that the op infers, and the element types where the op fixes them.
4. The op's own `check` finds nothing.
5. Before `typed` no value has a quantized type; at `ranged` and `typed` every real value has a finite range.
6. At `fixed` a float op is an island: it reads and makes float32 only, and so does whatever feeds it.
7. Only constants have types with levels, and their data are levels.
8. At `fixed` every stated range, partial sum and `overflow=none` is supported by the proof.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from qir.errors import Diagnostic, QirError, VerifyError
from qir.ir import Graph, Op, Stage, Value
from qir.ops.constant import Const
from qir.proof import Proof, false_claims, prove_claims
from qir.types import ElementType, FloatType, IntegerType, is_quantized, shape_text, storage_of

_LEVELS: Final = "only constants have levels"


def verify(graph: Graph, proof: Proof | None = None) -> None:
    """Raise VerifyError with every finding unless the graph is legal. `proof` saves proving it anew."""
    faults = find_faults(graph, proof)
    if faults:
        raise VerifyError(faults, graph.name)


def find_faults(graph: Graph, proof: Proof | None = None, *, claims: bool = True) -> tuple[Diagnostic, ...]:
    """Every finding, in graph order; the proof is tried only on a graph that is otherwise sound.

    Without `claims` invariant 8 is left out, for a graph whose facts are about to be proved anew.
    """
    faults = [*_naming(graph)]
    if not faults:
        for value in graph.inputs:
            faults += [Diagnostic(f"%{value.name}", m) for m in (*_value(graph, value), *_levels(value))]
        for op in graph.ops:
            faults += [Diagnostic(op.describe(), m) for m in _op(graph, op)]
    if claims and not faults and graph.stage is Stage.FIXED:
        faults += false_claims(graph, proof or prove_claims(graph))
    return tuple(faults)


def _naming(graph: Graph) -> Iterator[Diagnostic]:
    names: set[str] = set()
    defined: set[Value] = set()
    for place, values in _definitions(graph):
        for operand in () if isinstance(place, str) else place.operands:
            if operand not in defined:
                yield Diagnostic(_describe(place), f"reads %{operand.name}, which is not defined before it")
        for value in values:
            if value.name in names:
                yield Diagnostic(_describe(place), f"the name %{value.name} is defined twice")
            names.add(value.name)
            defined.add(value)
    for value, name in zip(graph.outputs, graph.output_names, strict=True):
        if value not in defined:
            yield Diagnostic(f"output {name!r}", f"%{value.name} is not defined")
    if len(set(graph.output_names)) != len(graph.output_names):
        yield Diagnostic("outputs", "two outputs have the same name")
    if not graph.outputs:
        yield Diagnostic("outputs", "the graph returns nothing")


def _definitions(graph: Graph) -> Iterator[tuple[Op | str, tuple[Value, ...]]]:
    yield "inputs", graph.inputs
    for op in graph.ops:
        yield op, op.results


def _describe(place: Op | str) -> str:
    return place if isinstance(place, str) else place.describe()


def _op(graph: Graph, op: Op) -> Iterator[str]:
    if graph.stage not in op.stages and not (graph.stage is Stage.FIXED and op.is_float):
        yield f"{op.mnemonic} does not belong at stage {graph.stage}"
        return
    try:
        op.check_operand_count()
        shapes = op.infer()
        elements = op.infer_elements()
    except QirError as fault:
        yield str(fault)
        return
    if len(shapes) != len(op.results):
        yield f"makes {len(shapes)} results, not {len(op.results)}"
        return
    for place, (value, shape) in enumerate(zip(op.results, shapes, strict=True)):
        if value.type.shape != shape:
            yield f"%{value.name} has shape {shape_text(value.type.shape)}, the op makes {shape_text(shape)}"
            return
        element = value.type.element
        if elements is not None:
            is_right = _is_real(graph, elements[place]) == _is_real(graph, element)
        else:
            is_right = not op.is_float or isinstance(op, Const) or _is_real(graph, element)
        if not is_right:
            yield f"%{value.name} is {'reals' if _is_real(graph, element) else 'integers'}, the op makes the other"
            return
        for message in _value(graph, value):
            yield f"%{value.name}: {message}"
        if not isinstance(op, Const):
            yield from (f"%{value.name}: {message}" for message in _levels(value))
    for name in op.attribute_names():
        kind = getattr(op, name)
        if isinstance(kind, IntegerType) and kind.levels is not None:
            yield f"its {name} is {kind}; {_LEVELS}"
    yield from op.check()
    if graph.stage is Stage.FIXED and op.is_float:
        for value in (*op.operands, *op.results):
            if not isinstance(value.type.element, FloatType):
                yield f"is a float island, but %{value.name} is not float32"


def _levels(value: Value) -> Iterator[str]:
    for kind in (storage_of(value.type.element), value.storage):
        if kind is not None and kind.levels is not None:
            yield f"is of {kind}; {_LEVELS}"


def _is_real(graph: Graph, element: ElementType) -> bool:
    """Before `fixed`, quantized values are reals on a grid."""
    return isinstance(element, FloatType) or (graph.stage is not Stage.FIXED and is_quantized(element))


def _value(graph: Graph, value: Value) -> Iterator[str]:
    early = graph.stage in (Stage.FLOAT, Stage.RANGED)
    if early and is_quantized(value.type.element):
        yield f"a quantized type at stage {graph.stage}"
    if graph.stage in (Stage.RANGED, Stage.TYPED) and _is_real(graph, value.type.element):
        if value.range is None:
            yield f"has no range at stage {graph.stage}; run calibrate and range-analysis"
        elif not (math.isfinite(value.range.lo) and math.isfinite(value.range.hi)):
            yield f"its range [{value.range.lo}, {value.range.hi}] is not finite"
