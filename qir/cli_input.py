"""What commands read: models and samples, by options that several of them have."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any, Final

import qir
from qir.errors import CalibrationError, QirError
from qir.feeds import read_npz, split_samples
from qir.ir import Graph

#: What a file of samples holds.
SAMPLES: Final = (
    "an array for each input name; its leading dimension counts samples, in whole batches where the batch is fixed"
)


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """`--calibration` and `--shape`."""
    parser.add_argument("--calibration", metavar="FILE", help=f".npz file: {SAMPLES}")
    parser.add_argument(
        "--shape",
        action="append",
        default=[],
        type=_shape,
        metavar="INPUT=SHAPE",
        help="shape of an input that an ONNX model leaves open, such as x=1x3x48x192 or x=Nx3x48x192; repeatable",
    )


def _shape(text: str) -> tuple[str, list[int | str]]:
    name, _, sizes = text.rpartition("=")
    dims = sizes.split("x")
    if not name or not all(d.isdecimal() or (d == "N" and not i) for i, d in enumerate(dims)):
        raise argparse.ArgumentTypeError(f"expected INPUT=SHAPE such as x=1x3x48x192, found {text!r}")
    return name, [d if d == "N" else int(d) for d in dims]


def read_model(path: str, shapes: Iterable[tuple[str, list[int | str]]]) -> Graph:
    """A `.qir` text, or an ONNX model."""
    given = dict(shapes)
    if not path.endswith(".qir"):
        return qir.import_onnx(path, shapes=given)
    if given:
        raise QirError(f"--shape is for ONNX models; the shapes of {path} stand in its text")
    return qir.read_graph(path)


def read_calibration(path: str | None, graph: Graph) -> list[dict[str, Any]] | None:
    """The feeds of a file. Raises CalibrationError where they do not fit the graph."""
    if path is None:
        return None
    try:
        return split_samples(graph.inputs, read_npz(path))
    except QirError as fault:
        raise CalibrationError(f"calibration data: {fault}") from fault
