"""Milliseconds an image of the three Fashion-MNIST models: qir's program beside ONNX Runtime, float32 and int8.

All take turns in one process, on one thread each, so that they see the same machine. A ratio is formed within a round,
qir's time over the other's, and shown as median (least to greatest): under 1 qir is faster. ONNX Runtime's int8 is its
own static quantizer (QDQ, per channel, min-max) on its default kernels, which on x86 without VNNI saturate 16-bit sums
and so give other bits than they should: a peer in speed alone.
"""

from __future__ import annotations

import argparse
import functools
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from support import models
from support.fashion_mnist import calibration_images

from qir.pass_manager import Progress
from qir.report import progress_bar

Array = npt.NDArray[Any]
Run = Callable[[Array], object]

_FLOAT, _INT8 = "ONNX Runtime float32", "ONNX Runtime int8"
_LEAST_SECONDS = 0.05  # of one measurement: short calls are repeated


class _Samples(CalibrationDataReader):  # type: ignore[misc]
    """The calibration images, 16 at a time."""

    def __init__(self, images: Array) -> None:
        self._feeds = iter([{"x": images[i : i + 16]} for i in range(0, len(images), 16)])

    def get_next(self) -> dict[str, Array] | None:
        """The next feed, or None."""
        return next(self._feeds, None)


def session(path: Path) -> Run:
    """A model in ONNX Runtime on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    made = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: made.run(None, {"x": images})


def contenders(name: str, scratch: Path) -> dict[str, Run]:
    """How each runs a batch of images."""
    program, path = models.compiled(name).program, models.PATHS[name]
    quantized = scratch / f"{name}.onnx"
    quantize_static(
        path,
        quantized,
        _Samples(calibration_images()),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
    )
    return {"qir": lambda images: program.run({"x": images}), _FLOAT: session(path), _INT8: session(quantized)}


def measure(
    runs: Mapping[str, Run], images: Array, rounds: int, progress: Callable[[int, int], None]
) -> dict[str, Array]:
    """Milliseconds an image by contender, one for each round; whoever begins changes from round to round."""
    repeats = {}
    for name, run in runs.items():
        run(images)  # compiles kernels, lays out memory
        repeats[name] = max(1, round(_LEAST_SECONDS / _seconds(run, images, 1)))
    found: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seconds = _seconds(runs[name], images, repeats[name])
            found[name].append(1000 * seconds / repeats[name] / len(images))
        progress(number + 1, rounds)
    return {name: np.array(times) for name, times in found.items()}


def _seconds(run: Run, images: Array, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run(images)
    return time.perf_counter() - start


def row(name: str, batch: int, times: Mapping[str, Array]) -> str:
    """One line of the table."""
    text = f"{name:10}{batch:6}" + "".join(f"{statistics.median(t):9.3f}" for t in times.values())
    for other in (_FLOAT, _INT8):
        ratio = times["qir"] / times[other]
        text += f"{f'{np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f})':>26}"
    return text


def report(batches: Sequence[int], rounds: int, progress: Progress) -> None:
    """Print a row for each model and batch size."""
    images, _ = models.labelled_images()
    print(f"{'':16}{'milliseconds an image':>27}{'qir over':>26}{'qir over':>26}")
    print(f"{'model':10}{'batch':>6}{'qir':>9}{'float32':>9}{'int8':>9}{_FLOAT:>26}{_INT8:>26}")
    with tempfile.TemporaryDirectory() as scratch:
        for name in models.PATHS:
            runs = contenders(name, Path(scratch))
            for batch in batches:
                times = measure(
                    runs, images[:batch], rounds, functools.partial(progress, f"{name} in batches of {batch}")
                )
                print(row(name, batch, times), flush=True)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each (default: %(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 100], help="images at a time (default: 1 and 100)")
    options = parser.parse_args()
    onnxruntime.set_default_logger_severity(3)
    logging.disable(logging.WARNING)  # the quantizer recommends preprocessing, which makes no difference here
    with progress_bar() as progress:
        report(options.batch, options.rounds, progress)
    return 0


if __name__ == "__main__":
    sys.exit(main())
