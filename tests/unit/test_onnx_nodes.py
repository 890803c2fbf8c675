"""The importer and every float op against the node tests that the `onnx` package ships.

Each case is imported as it stands, and again with every input but the first as an initializer, since weights, axes and
shapes must be constants here. Whatever imports must give the shipped outputs, and must give them again with the leading
dimension of its inputs left open. The list of what imports is committed beside this file; `--bless` rewrites it.
"""

import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx.backend.test.loader import load_model_tests

from qir.errors import ImportModelError
from qir.frontend.onnx_import import import_onnx
from qir.frontend.onnx_table import LOWERINGS
from qir.interpreter import interpret
from qir.ir import Graph

LIST = Path(__file__).with_name("onnx_node_coverage.txt")

# float32 sums taken in another order, and NumPy's exp and tanh: a few units in the last place. ONNX allows 1e-3.
RELATIVE, ABSOLUTE = 1e-5, 2e-6

FOUR_DECIMALS = "test_averagepool_2d_ceil_last_window_starts_on_pad"
"""This case states its outputs with four decimals only."""

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Outcome:
    """What became of one case: the graphs that it gave, and why the last attempt was refused if there are none."""

    name: str
    op: str
    graphs: tuple[tuple[Graph, Arrays], ...]
    expected: tuple[npt.NDArray[Any], ...]
    reason: str


def _variants(model: onnx.ModelProto, feeds: Arrays) -> Iterator[tuple[onnx.ModelProto, Arrays]]:
    yield model, feeds
    names = list(feeds)
    if len(names) > 1:
        bound = onnx.ModelProto()
        bound.CopyFrom(model)
        bound.graph.initializer.extend(onnx.numpy_helper.from_array(feeds[n], n) for n in names[1:])
        yield bound, {names[0]: feeds[names[0]]}


def _attempt(case: Any) -> Outcome:
    inputs, outputs = ([_array(item) for item in items] for items in case.data_sets[0])
    expected = tuple(array for array in outputs if array is not None)
    feeds = {v.name: a for v, a in zip(case.model.graph.input, inputs, strict=True) if a is not None}
    if len(feeds) < len(inputs) or len(expected) < len(outputs):
        return Outcome(case.name, _op(case), (), (), "sequences and optionals are not supported")
    graphs, reason = [], ""
    for model, bound in _variants(case.model, feeds):
        try:
            graphs.append((import_onnx(model), bound))
        except ImportModelError as error:
            reason = str(error)
            continue
        leading = next((a.shape[0] for a in bound.values() if a.ndim), 0)
        opened = {n: ["N", *a.shape[1:]] for n, a in bound.items() if leading and a.shape[:1] == (leading,)}
        with suppress(ImportModelError):  # an op that mixes the leading dimension with others refuses to leave it open
            graphs.append((import_onnx(model, shapes=opened), bound))
    return Outcome(case.name, _op(case), tuple(graphs), expected, "" if graphs else _category(reason, _op(case)))


def _array(item: object) -> npt.NDArray[Any] | None:
    """The data of a tensor; None for a sequence or an optional."""
    if isinstance(item, onnx.TensorProto):
        return onnx.numpy_helper.to_array(item)
    return np.asarray(item) if isinstance(item, np.ndarray | np.generic | float | int) else None


def _op(case: Any) -> str:
    """The first operator of the case that the importer does not know, else the first."""
    ops = [node.op_type if not node.domain else f"{node.domain}.{node.op_type}" for node in case.model.graph.node]
    return next((op for op in ops if op not in LOWERINGS), ops[0])


def _category(message: str, op: str) -> str:
    """The reason without what belongs to the case alone: names, operators, shapes and numbers of elements."""
    if op not in LOWERINGS:
        return "unknown operator"
    message = re.sub(r'^the model: ((node|input|tensor|output) "[^"]*": )?(\w+: )?', "", message)
    message = re.sub(r'"[^"]*"|%\w+', '"..."', message)
    message = re.sub(r"--shape.*|shapes=.*", "...", message)
    return re.sub(r"[\d?]+(x[\d?]+)+|\d+ of \d+|\([su]\d+\)", "...", message)


@pytest.fixture(scope="module")
def outcomes() -> tuple[Outcome, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the generators of the cases overflow on purpose
        cases = load_model_tests(kind="node")
    return tuple(_attempt(case) for case in sorted(cases, key=lambda case: str(case.name)))


def _mismatches(outcome: Outcome) -> Iterator[str]:
    absolute = 1e-4 if outcome.name == FOUR_DECIMALS else ABSOLUTE
    for graph, feeds in outcome.graphs:
        found = interpret(graph, feeds)
        for name, wanted in zip(graph.output_names, outcome.expected, strict=True):
            got = found[name]
            same = got.shape == wanted.shape and got.dtype == wanted.dtype
            if not same or not np.allclose(got, wanted, rtol=RELATIVE, atol=absolute, equal_nan=True):
                yield f"{outcome.name}: {name}: {got.dtype}{got.shape} differs from {wanted.dtype}{wanted.shape}"


def test_outputs_are_those_shipped(outcomes: tuple[Outcome, ...]) -> None:
    compared = sum(len(outcome.graphs) for outcome in outcomes)
    assert compared > 480
    assert [fault for outcome in outcomes for fault in _mismatches(outcome)] == []


def test_an_open_batch_was_compared(outcomes: tuple[Outcome, ...]) -> None:
    open_ops = {o.op for o in outcomes for graph, _ in o.graphs if any(v.type.is_batched for v in graph.inputs)}
    assert {"Conv", "Gemm", "MatMul", "BatchNormalization", "AveragePool", "Softmax", "ReduceMean", "Split"} <= open_ops


def _listed(outcomes: tuple[Outcome, ...]) -> str:
    covered = [o for o in outcomes if o.graphs]
    unknown = Counter(o.op for o in outcomes if o.reason == "unknown operator")
    refused = [o for o in outcomes if o.reason and o.reason != "unknown operator"]
    reasons = sorted({o.reason for o in refused})
    lines = [f"# covered: {len(covered)}", *(o.name for o in covered), ""]
    lines.append(f"# refused: {len(refused) + unknown.total()}")
    for reason in reasons:
        names = [o.name for o in refused if o.reason == reason]
        lines += [f"## {len(names)}: {reason}", *names]
    lines.append(f"## {unknown.total()}: unknown operator, cases of each")
    lines += [f"{op} {count}" for op, count in sorted(unknown.items())]
    return "\n".join([*lines, ""])


def test_the_committed_list_is_what_imports(outcomes: tuple[Outcome, ...], bless: bool) -> None:
    listed = _listed(outcomes)
    if bless:
        LIST.write_text(listed, encoding="utf-8")
    assert LIST.read_text(encoding="utf-8") == listed, "run pytest --bless and review the difference"
