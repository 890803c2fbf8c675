"""Top-1 accuracy of the three Fashion-MNIST models on every target, on all 10,000 test images, as a Markdown table.

All programs are calibrated on the same 256 training images. float32 is what ONNX Runtime computes. The last row is
`tensorrt` with the weights of every layer in 4 bits (override `*:w4`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from support import models
from support.fashion_mnist import calibration_images

import qir
from qir.backend import find_backends
from qir.pass_manager import Progress
from qir.report import progress_bar

_BATCH = 500
_WEIGHTS_ALONE = "tensorrt, 4-bit weights"


def predicted(path: Path, images: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The float32 model's classes."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    parts = (images[i : i + _BATCH] for i in range(0, len(images), _BATCH))
    return np.concatenate([session.run(None, {"x": part})[0].argmax(axis=1) for part in parts])


def rows(names: list[str], progress: Progress) -> Iterator[tuple[str, list[str]]]:
    """A row a target: its name, and the accuracy of each model."""
    images, labels = models.labelled_images()
    graphs = {name: qir.import_onnx(models.PATHS[name]) for name in names}
    yield "float32", [f"{np.mean(predicted(models.PATHS[name], images) == labels):.4f}" for name in names]
    targets: Mapping[str, tuple[str, dict[str, int | str]]] = {
        **{target: (target, {}) for target in find_backends()},
        _WEIGHTS_ALONE: ("tensorrt", {"*": "w4"}),
    }
    calibration = [{"x": calibration_images()}]
    for title, (target, overrides) in targets.items():
        cells = []
        for name in names:
            program = qir.compile(graphs[name], target, calibration, overrides=overrides)

            def show(done: int, total: int, task: str = f"{title}, {name}") -> None:
                progress(task, done, total)

            found = program.run({"x": images}, progress=show)["logits"].argmax(axis=1)
            cells.append(f"{np.mean(found == labels):.4f}")
        yield title, cells


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(models.PATHS), default=sorted(models.PATHS))
    names = parser.parse_args().models
    print(f"| target | {' | '.join(names)} |\n|---|{'---|' * len(names)}", flush=True)
    with progress_bar() as progress:
        for title, cells in rows(names, progress):
            print(f"| {title} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
