"""Texts that say what they compute: `// run: x=[1, 2] -> y=[3]`. Those of qir's own tests ship with it.

Such a line holds on the interpreter, with int64 and with unbounded integers, and in the program. Lists are flat and
row-major; as many samples as they fill are run. A line may go on in `//   -> z=[4]`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qir.backend import Backend
from qir.errors import ConformanceError
from qir.interpreter import interpret, trace
from qir.ir import Graph, Value
from qir.parser import parse
from qir.pass_manager import PassContext
from qir.passes.range_analysis import RangeAnalysis
from qir.program import Program
from qir.testing.compare import Compared, difference, kernel_names, own_names
from qir.types import storage_of
from qir.verifier import verify

Tensor = npt.NDArray[Any]

_RUN_LINES: Final = re.compile(r"^// run: (.*(?:\n//  +->.*)*)$", re.MULTILINE)
_LIST: Final = re.compile(r"([A-Za-z0-9_.]+)=(\[[^\]]*\])")


def golden_texts() -> dict[str, str]:
    """The texts that ship with qir, by file name."""
    folder = files("qir") / "data" / "golden"
    found = sorted((p for p in folder.iterdir() if p.name.endswith(".qir")), key=lambda p: p.name)
    return {p.name: p.read_text(encoding="utf-8") for p in found}


def replay(text: str, backend: Backend | None = None) -> Compared:
    """Check every `// run:` line of a text, with the kernels of a backend where it is given.

    Raises ConformanceError that names the line and the first output that differs, and VerifyError for an illegal text.
    """
    graph = RangeAnalysis().run(parse(text), PassContext())
    verify(graph)
    program = Program(graph, backend)
    runners: Mapping[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
        "interpreter": lambda feeds: interpret(graph, feeds),
        "unbounded interpreter": lambda feeds: interpret(graph, feeds, unbounded=True),
        "program": program.run_integer,
    }
    lines, count = _RUN_LINES.findall(text), 0
    if not lines:
        raise ConformanceError("a golden text of a run has a line `// run: x=[1, 2] -> y=[3]`")
    for line in lines:
        left, _, right = line.partition("->")
        inputs, outputs = ({k: json.loads(v) for k, v in _LIST.findall(side)} for side in (left, right))
        names = [[v.name for v in graph.inputs], list(graph.output_names)]
        if [sorted(inputs), sorted(outputs)] != [sorted(n) for n in names]:
            raise ConformanceError(f"{line}: the inputs are {names[0]} and the outputs {names[1]}")
        batch = _batch(graph, inputs)
        feeds = {v.name: _array(inputs[v.name], v, batch) for v in graph.inputs}
        for place, run in runners.items():
            found = run(feeds)
            for key, value in zip(graph.output_names, graph.outputs, strict=True):
                expected = _array(outputs[key], value, batch)
                fault = difference(expected, found[key])
                if fault is not None:
                    raise ConformanceError(f"@{graph.name}, {place}, {left.strip()}: {key}: {fault}")
                count += expected.size
        _check_ranges(graph, trace(graph, feeds))
    return Compared(count, kernel_names(program), own_names(graph, backend))


def _batch(graph: Graph, lists: Mapping[str, list[Any]]) -> int:
    """The samples that the lists fill; 1 where there is no saying."""
    sized = [v for v in graph.inputs if v.type.is_batched and v.type.sample_size]
    return len(lists[sized[0].name]) // sized[0].type.sample_size if sized else 1


def _array(numbers: list[Any], value: Value, batch: int) -> Tensor:
    storage, shape = storage_of(value.type.element), value.type.concrete(batch)
    if len(numbers) != math.prod(shape):
        raise ConformanceError(f"{len(numbers)} numbers, {numbers}, do not fill {list(shape)} of %{value.name}")
    return np.array(numbers, storage.dtype if storage else np.float32).reshape(shape)


def _check_ranges(graph: Graph, arrays: Mapping[str, Tensor]) -> None:
    for value in graph.values():
        array = arrays[value.name]
        if value.range is not None and array.size:
            lo, hi = array.min(), array.max()
            if not value.range.lo <= lo <= hi <= value.range.hi:
                raise ConformanceError(f"@{graph.name}: %{value.name} is in [{lo}, {hi}] and leaves {value.range}")
