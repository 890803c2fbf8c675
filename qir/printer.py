"""The text of a graph: generic, driven by what each op declares; `parse(print_graph(g)) == g`, always.

Floats print as the shortest decimal that gives the same float32 back. Arrays over 64 elements are named, and a
`resources` section at the end states element type, shape and hash of each. That type is the dtype, or the type which a
sidecar packs the array as (`qir.packing`).
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np

from qir.arrays import Array
from qir.errors import QirError
from qir.interval import Interval
from qir.ir import Graph, Op, Stage, Value
from qir.ops.constant import Const
from qir.types import (
    ElementType,
    FixedPointType,
    FloatType,
    IntegerType,
    TensorType,
    shape_text,
)

BARE_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.$-]*")

#: NumPy dtype -> the word for it in array literals.
DTYPE_WORDS: Final[Mapping[str, str]] = {
    "float32": "f32",
    "float64": "f64",
    "bool": "bool",
    **{f"{kind}int{bits}": f"{'u' if kind else 's'}{bits}" for kind in ("", "u") for bits in (8, 16, 32, 64)},
}


class ResourceNames:
    """Gives each large array one name: its hint, made unique among different contents.

    `packings` are the types that they are packed as in a sidecar; None where one is stored as it is, as an array must
    be that is read as several types.
    """

    def __init__(self) -> None:
        self.arrays: dict[str, Array] = {}
        self.packings: dict[str, IntegerType | None] = {}
        self._names: dict[str, str] = {}

    def name(self, array: Array, packing: IntegerType | None = None) -> str:
        """The name of this content, chosen on first sight; `packing` is that of the constant which holds it."""
        known = self._names.get(array.sha256)
        if known is not None:
            if self.packings[known] != packing:
                self.packings[known] = None
            return known
        hint = (
            "constant" if array.name in ("", "__metadata__") else array.name
        )  # safetensors keeps the latter to itself
        name, count = hint, 0
        while name in self.arrays:
            count += 1
            name = f"{hint}.{count}"
        self.arrays[name] = array
        self.packings[name] = packing
        self._names[array.sha256] = name
        return name


def resource_names(graph: Graph) -> ResourceNames:
    """The large arrays of a graph under the names that its text gives them, and how a sidecar packs them."""
    names = ResourceNames()
    _graph_lines(graph, names)
    return names


def resources(graph: Graph) -> dict[str, Array]:
    """The large arrays of a graph under the names that its text gives them: what the sidecar holds, not packed."""
    return resource_names(graph).arrays


def print_graph(graph: Graph, sidecar: str = "") -> str:
    """The text of `graph`. `sidecar` is the file name to state for the large arrays."""
    names = ResourceNames()
    lines = _graph_lines(graph, names)
    if names.arrays:
        lines.append(f"resources {quote(sidecar)} {{" if sidecar else "resources {")
        lines += [f"  {_resource(name, array, names.packings[name])}" for name, array in names.arrays.items()]
        lines.append("}")
    return "\n".join([*lines, ""])


def _resource(name: str, array: Array, packing: IntegerType | None) -> str:
    head = _array_head(array) if packing is None else f"{packing} {shape_text(array.shape)}"
    return f'@{identifier(name)} : {head} sha256="{array.sha256}"'


def _graph_lines(graph: Graph, names: ResourceNames) -> list[str]:
    header = f"graph @{identifier(graph.name)} stage={graph.stage}"
    if graph.target:
        header += f" target={quote(graph.target)}"
    if graph.attributes:
        header += f" {_braced((k, value_text(v, names)) for k, v in graph.attributes.items())}"
    inputs = ", ".join(f"%{identifier(v.name)}: {_typed(v, names)}" for v in graph.inputs)
    lines = [f"{header} ({inputs}) {{"]
    lines += [f"  {op_text(op, names, graph.stage)}" for op in graph.ops]
    returned = ", ".join(
        f"%{identifier(v.name)}" + (f" as {quote(n)}" if n != v.name else "")
        for v, n in zip(graph.outputs, graph.output_names, strict=True)
    )
    return [*lines, f"  return {returned}".rstrip(), "}"]


def op_text(op: Op, names: ResourceNames | None = None, stage: Stage | None = None) -> str:
    """One op on one line; at stage `fixed`, a float op with the mark of an island."""
    names = names or ResourceNames()
    results = ", ".join(f"%{identifier(r.name)}" for r in op.results)
    text = f"{results} = {op.mnemonic}"
    if op.operands:
        text += " " + ", ".join(f"%{identifier(v.name)}" for v in op.operands)
    packing = op.packing if isinstance(op, Const) else None
    attributes = [(n, getattr(op, n)) for n in op.attribute_names() if n != "partial"]
    shown = [(n, value_text(v, names, packing)) for n, v in attributes if v is not None]
    if shown:
        text += f" {_braced(shown)}"
    text += " : " + ", ".join(_typed(r, names) for r in op.results)
    partial = getattr(op, "partial", None)
    if partial is not None:
        text += f" partial in {interval_text(partial)}"
    if stage is Stage.FIXED and op.island_mark:
        text += f" {op.island_mark}"
    if op.location:
        text += f" loc({quote(op.location)})"
    return text


def _braced(items: Iterable[tuple[str, str]]) -> str:
    return "{" + ", ".join(f"{k}={v}" for k, v in items) + "}"


def _typed(value: Value, names: ResourceNames) -> str:
    text = type_text(value.type, names)
    if value.range is not None:
        text += f" in {interval_text(value.range)}"
    if value.histogram is not None:
        text += f" hist {array_text(value.histogram, names)}"
    if value.storage is not None:
        text += f" storage {value.storage}"
    return text


def type_text(kind: TensorType, names: ResourceNames | None = None) -> str:
    """`Nx8x8x16 x s8<0.04, zero=-128>`; a scalar is its element type alone."""
    element = element_text(kind.element, names)
    return f"{shape_text(kind.shape)} x {element}" if kind.shape else element


def element_text(element: ElementType, names: ResourceNames | None = None) -> str:
    """`f32`, `s8`, `s8[-127, 127]<@w.scale, axis=0>`, `s4{-5, -1, 1, 5}<0.25>`, `s16<2^-12>`."""
    if isinstance(element, FloatType | IntegerType):
        return str(element)
    names = names or ResourceNames()
    axis = "" if element.axis is None else f", axis={element.axis}"
    if isinstance(element, FixedPointType):
        return f"{element.storage}<2^{_parameter(element.exponent, names)}{axis}>"
    zero = f", zero={_parameter(element.zero_point, names)}" if element.has_zero_point else ""
    return f"{element.storage}<{_parameter(element.scale, names)}{zero}{axis}>"


def _parameter(array: Array, names: ResourceNames) -> str:
    """A scale, zero point or exponent: its dtype follows from the place, so only the numbers are written."""
    if array.data.ndim == 0:
        return number_text(array.data[()])
    return _numbers(array) if array.is_inline else f"@{identifier(names.name(array))}"


def interval_text(interval: Interval) -> str:
    """`[-1.5, 3.0]` for reals, `[-128, 127]` for integers."""
    return f"[{number_text(interval.lo)}, {number_text(interval.hi)}]"


def value_text(value: Any, names: ResourceNames, packing: IntegerType | None = None) -> str:
    """An attribute value; `packing` is how a sidecar packs it."""
    if isinstance(value, enum.Enum):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return number_text(value)
    if isinstance(value, str):
        return value if re.fullmatch(r"(?!(?:true|false|inf|nan)$)[a-z_][a-z0-9_]*", value) else quote(value)
    if isinstance(value, tuple):
        return "[" + ", ".join(number_text(v) for v in value) + "]"
    if isinstance(value, Interval):
        return interval_text(value)
    if isinstance(value, Array):
        return array_text(value, names, packing)
    if isinstance(value, IntegerType):
        return str(value)
    raise QirError(f"an attribute of type {type(value).__name__} has no text form")


def array_text(array: Array, names: ResourceNames, packing: IntegerType | None = None) -> str:
    """`s32 2x2 [1, 2, 3, 4]` up to 64 elements, `@name` above."""
    return (
        f"{_array_head(array)} {_numbers(array)}" if array.is_inline else f"@{identifier(names.name(array, packing))}"
    )


def _array_head(array: Array) -> str:
    word = DTYPE_WORDS.get(array.data.dtype.name)
    if word is None:
        raise QirError(f"constant {array!r}: arrays of {array.data.dtype} have no text form")
    return f"{word} {shape_text(array.shape)}".rstrip()


def _numbers(array: Array) -> str:
    return "[" + ", ".join(number_text(v) for v in array.data.reshape(-1)) + "]"


def number_text(value: Any) -> str:
    """An integer in full; a float as the shortest text that round-trips its precision (Python floats: float32)."""
    if isinstance(value, bool | np.bool_):
        return "1" if value else "0"
    if isinstance(value, int | np.integer):
        return str(int(value))
    if isinstance(value, np.float64):
        return repr(float(value))
    single = np.float32(value)
    text = str(single)
    # Readers go by way of float64, and rounding twice can miss: 7.038531e-26 becomes the neighbour of 7.03853069e-26.
    return text if np.float32(float(text)) == single or np.isnan(single) else f"{single:.9g}"


def identifier(name: str) -> str:
    """A name bare where it can be, quoted otherwise."""
    return name if BARE_NAME.fullmatch(name) else quote(name)


def quote(text: str) -> str:
    """A JSON string: escapes are JSON's. A lone surrogate, which UTF-8 lacks, is escaped."""
    return re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", json.dumps(text, ensure_ascii=False))
