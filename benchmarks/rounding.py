"""Top-1 accuracy with weights of few bits, with and without each method of better rounding, as Markdown tables.

On test images of Fashion-MNIST, calibrated on 256 training images; activations have the target's default
width. fm_mobile has Relu6, across which no channel can be rescaled: only those of its residual sums are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Final

import numpy as np
from support import models
from support.fashion_mnist import calibration_images

import qir
from qir.pass_manager import Progress
from qir.passes.correct_bias import CorrectBias
from qir.passes.equalize_cross_layer import EqualizeCrossLayer
from qir.report import progress_bar

_EQUALIZED: Final = qir.default_pipeline().insert_after("eliminate-dead-code", EqualizeCrossLayer())
_METHODS: Final = {
    "as it is": qir.default_pipeline(),
    "equalize-cross-layer": _EQUALIZED,
    "correct-bias": qir.default_pipeline().insert_after("select-q-formats", CorrectBias()),
    "both": _EQUALIZED.insert_after("select-q-formats", CorrectBias()),
}


def rows(
    name: str, target: str, widths: list[str], count: int, progress: Progress
) -> Iterator[tuple[str, list[float]]]:
    """For each width of weights, with a format or without, the accuracy by each method on so many images."""
    images, labels = (a[:count] for a in models.labelled_images())
    graph, calibration = qir.import_onnx(models.PATHS[name]), [{"x": calibration_images()}]
    for bits in widths:
        found = []
        for pipeline in _METHODS.values():
            program = qir.compile(
                graph, target, calibration, pipeline=pipeline, overrides={"*": f"w{bits}"}, progress=progress
            )
            classes = program.run({"x": images})["logits"].argmax(axis=1)
            found.append(float(np.mean(classes == labels)))
        yield bits, found


def main() -> int:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(models.PATHS), default=["fm_cnn", "fm_mobile"])
    parser.add_argument("--target", default="asic", help="one whose weights take these widths")
    formats = [f"{bits}/{item}" for item in ("power_of_two", "codebook") for bits in (4, 3, 2)]
    parser.add_argument(
        "--bits", nargs="+", default=[*"864321", *formats], help="widths, such as 4, and formats, such as 4/codebook"
    )
    parser.add_argument("--images", type=int, default=10_000, help="how many of the 10,000 test images (all)")
    arguments = parser.parse_args()
    for name in arguments.models:
        print(f"| {name}, {arguments.target}: bits | {' | '.join(_METHODS)} |\n|---|{'---|' * len(_METHODS)}")
        with progress_bar() as progress:
            for bits, found in rows(name, arguments.target, arguments.bits, arguments.images, progress):
                print(f"| {bits} | {' | '.join(f'{a:.4f}' for a in found)} |", flush=True)
        print(flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
