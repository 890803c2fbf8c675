"""The inputs of a model: which are real inputs, and how their open dimensions are settled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from qir.errors import QirError
from qir.frontend.onnx_context import Scope, element_type
from qir.types import BATCH, Dim, TensorType

#: A dimension as the model states it: a size, N, or None where it is open.
_Stated = Dim | None


def declare_inputs(graph: onnx.GraphProto, scope: Scope, shapes: Mapping[str, Sequence[int | str]]) -> None:
    """Add the graph's inputs. An input that is also an initializer is a constant, as in models before IR version 4.

    Raises QirError naming every input whose shape stays open, and for shapes that do not fit.
    """
    inputs = [value for value in graph.input if value.name not in scope.known]
    names = [value.name for value in inputs]
    unknown = [name for name in shapes if name not in names]
    if unknown:
        raise QirError(f'shapes names "{unknown[0]}", which is no input; the inputs are {", ".join(names) or "none"}')
    stated = {value.name: _stated_dims(value) for value in inputs}
    _refuse_two_batches(inputs, shapes)
    settled = {name: _settle(name, stated[name], shapes.get(name)) for name in names}
    open_inputs = {name: dims for name, dims in settled.items() if dims is None or None in dims}
    if open_inputs:
        raise QirError(_ask(open_inputs, {value.name: value for value in inputs}))
    for value in inputs:
        try:
            element = element_type(value.type.tensor_type.elem_type)
        except QirError as fault:
            raise QirError(f'input "{value.name}": {fault}') from fault
        dims = tuple(d for d in settled[value.name] or () if d is not None)
        scope.known[value.name] = scope.builder.input(value.name, TensorType(dims, element))


def _stated_dims(value: onnx.ValueInfoProto) -> tuple[_Stated, ...] | None:
    """What the model says: None for an unknown rank; an open leading dimension is N."""
    if not value.type.HasField("tensor_type"):
        kind = value.type.WhichOneof("value") or "of no type"
        raise QirError(f'input "{value.name}" is no tensor ({kind}); only tensors are supported')
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    # Some exporters write -1 or 0 for an open dimension.
    dims: list[_Stated] = [d.dim_value if d.dim_value > 0 else None for d in tensor.shape.dim]
    if dims and dims[0] is None:
        dims[0] = BATCH
    return tuple(dims)


def _refuse_two_batches(inputs: Sequence[onnx.ValueInfoProto], shapes: Mapping[str, Sequence[int | str]]) -> None:
    """One name for a leading dimension is the batch; two names may be two sizes, so they are asked about."""
    named: dict[str, str] = {}
    for value in inputs:
        dims = value.type.tensor_type.shape.dim
        if dims and dims[0].dim_param and value.name not in shapes:
            named.setdefault(dims[0].dim_param, value.name)
    if len(named) > 1:
        told = ", ".join(f'"{name}" ({symbol})' for symbol, name in named.items())
        raise QirError(
            f"the leading dimensions of inputs {told} are open under different names; only one batch can stay open: "
            f"give their shapes, with N in front where it is the batch"
        )


def _settle(
    name: str, stated: tuple[_Stated, ...] | None, given: Sequence[int | str] | None
) -> tuple[_Stated, ...] | None:
    """The stated dimensions with the given ones put in. Raises QirError when they contradict each other."""
    if given is None:
        return stated
    dims: list[_Stated] = []
    for place, dim in enumerate(given):
        if dim == BATCH and place == 0:
            dims.append(BATCH)
        elif isinstance(dim, int | np.integer) and dim > 0:
            dims.append(int(dim))
        else:
            raise QirError(
                f'shapes gives input "{name}" the dimension {dim!r}; it takes positive integers, and N in front'
            )
    if stated is None:
        return tuple(dims)
    # The leading dimension may be opened or fixed at will: it is the batch.
    fits = len(dims) == len(stated) and all(s in (None, d) for s, d in list(zip(stated, dims, strict=True))[1:])
    leading = not stated or not dims or BATCH in (stated[0], dims[0]) or stated[0] == dims[0]
    if not fits or not leading:
        raise QirError(f'shapes gives input "{name}" {_shown(dims)}, the model states {_shown(stated)}')
    return tuple(dims)


def _shown(dims: Sequence[_Stated]) -> str:
    return "x".join("?" if d is None else str(d) for d in dims) or "a scalar"


def _ask(open_inputs: Mapping[str, tuple[_Stated, ...] | None], inputs: Mapping[str, onnx.ValueInfoProto]) -> str:
    """One sentence that names each open dimension and shows how to give it."""
    places, options, entries = [], [], []
    for name, dims in open_inputs.items():
        if dims is None:
            places.append(f'"{name}" has no shape at all')
            options.append(f"--shape {name}=Nx...")
            entries.append(f'"{name}": ["N", ...]')
            continue
        symbols = [d.dim_param for d in inputs[name].type.tensor_type.shape.dim]
        spots = [f"{i}" + (f" ({symbols[i]})" if symbols[i] else "") for i, d in enumerate(dims) if d is None]
        places.append(f'"{name}" ({_shown(dims)}) leaves dimension {", ".join(spots)} open')
        options.append(f"--shape {name}={_shown(dims)}")
        shown = ", ".join('"N"' if d == BATCH else "?" if d is None else str(d) for d in dims)
        entries.append(f'"{name}": [{shown}]')
    return (
        f"input {'; input '.join(places)}. Put a number for each ?: {' '.join(options)} on the command line, "
        f"or shapes={{{', '.join(entries)}}}"
    )
