"""The three Fashion-MNIST models and their data, each compiled once a session."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qir.backend import load_target
from qir.frontend.onnx_import import import_onnx
from qir.ir import Graph, Stage
from qir.pass_manager import Pass, PassContext, PassRecord, Verifier
from qir.passes.pipelines import default_pipeline
from qir.program import Program

ROOT = Path(__file__).parents[1]
PATHS = {
    "fm_cnn": ROOT / "tests" / "data" / "fm_cnn.onnx",
    "fm_mlp": ROOT / "tests" / "data" / "fm_mlp.onnx",
    "fm_mobile": ROOT / "qir" / "data" / "fm_mobile.onnx",
}

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Compiled:
    """A model at three stages: as imported, with types, and as a program."""

    imported: Graph
    typed: Graph
    program: Program


class _KeepTyped:
    graph: Graph | None = None

    def after_pass(self, index: int, ran: Pass, record: PassRecord, context: PassContext) -> None:
        if record.after.stage is Stage.TYPED:
            self.graph = record.after


def images(raw: Array) -> Array:
    """uint8 [N, 28, 28] as the models take them: float32 [N, 1, 28, 28]."""
    scaled = (raw.astype(np.float32) / np.float32(255) - np.float32(0.2860)) / np.float32(0.3530)
    return scaled[:, None]


@cache
def labelled_images() -> tuple[Array, Array]:
    """All 10,000 test images and labels."""
    folder = ROOT / "tests" / "data"
    with gzip.open(folder / "t10k-images-idx3-ubyte.gz") as file:
        raw = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(folder / "t10k-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return images(raw), labels


@cache
def calibration_images() -> Array:
    """The 256 training images that ship with qir."""
    with np.load(ROOT / "qir" / "data" / "fashion_mnist_demo.npz") as data:
        return images(data["calibration_images"])


@cache
def compiled(name: str, target: str = "arm-neon") -> Compiled:
    """A model compiled for a target on the 256 calibration images."""
    imported = import_onnx(PATHS[name])
    keep = _KeepTyped()
    context = PassContext(load_target(target), [{"x": calibration_images()}])
    fixed = default_pipeline().run(imported, context, [Verifier(), keep])
    assert keep.graph is not None
    return Compiled(imported, keep.graph, Program(fixed))
