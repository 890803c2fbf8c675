"""Writes what the chip's own tools read: the constants of a compiled graph as a C header."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import wrap

from qir import Array, Graph


def export(graph: Graph, folder: Path) -> None:
    """`weights.h` with every constant, and `graph.qir` that says what is computed of them."""
    (folder / "weights.h").write_text("\n".join(_header(graph)) + "\n", encoding="utf-8")
    (folder / "graph.qir").write_text(str(graph), encoding="utf-8")


def _header(graph: Graph) -> Iterator[str]:
    yield f"/* Constants of {graph.name}, compiled for {graph.target}. */"
    yield "#include <stdint.h>"
    for place, (value, array) in enumerate(graph.constants.items()):
        name = re.sub(r"\W", "_", value.name)
        yield ""
        yield f"/* %{value.name}: {value.type} */"
        yield f"static const {_c_type(array)} constant_{place}_{name}[] = {{"
        yield from (f"    {line}" for line in wrap(", ".join(map(str, array.data.reshape(-1).tolist())), 96))
        yield "};"


def _c_type(array: Array) -> str:
    return "float" if array.data.dtype.kind == "f" else f"{array.data.dtype}_t"
