"""The demo: a small real model and real images, both shipped with qir, from ONNX to integers in one go."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qir.compiler import compile as compile_graph
from qir.frontend.onnx_import import import_onnx
from qir.interpreter import interpret
from qir.ir import Graph
from qir.pass_manager import Dump, Progress, Timing
from qir.printer import op_text
from qir.program import Program
from qir.report import constant_bytes, fields_text, pass_table, size_text
from qir.serialization import whole_folder, write_graph

Tensor = npt.NDArray[Any]
Say = Callable[[str], None]

_BATCH = 50


def run_demo(output: Path, say: Say, progress: Progress) -> None:
    """Compile, run and measure; what there is to know goes to `say`, texts and the program into the folder `output`.

    Raises QirError when the folder cannot be written.
    """
    data = Path(str(files("qir"))) / "data"
    with np.load(data / "fashion_mnist_demo.npz") as arrays:
        calibration, images = (normalized(arrays[name]) for name in ("calibration_images", "test_images"))
        labels = arrays["test_labels"]
    graph = import_onnx(data / "fm_mobile.onnx", name="fm_mobile")
    timing = Timing()
    with whole_folder(output) as folder:
        say(
            f"fm_mobile, a float32 network for Fashion-MNIST, becomes an integer program for arm-neon: int8 with the\n"
            f"arithmetic of TensorFlow Lite Micro, calibrated on {len(calibration)} images.\n"
        )
        dumps = folder / "dumps"
        dumps.mkdir()
        write_graph(graph, dumps / "00_import.qir")
        feeds = [{"x": batch} for batch in _batches(calibration)]
        program = compile_graph(graph, "arm-neon", feeds, instruments=[timing, Dump(dumps)], progress=progress)
        program.save(folder / "program")
    say(pass_table(timing.records))
    say(_last_layer(graph, program.graph))
    say(fields_text(_measure(graph, program, images, labels, progress)))
    say(
        f"\nEvery pass left its text in {output}/dumps: read them, or run one pass alone on one (qir opt).\n"
        f"The program is in {output}/program: graph.qir with its weights. Next:\n"
        f"  qir check {output}/program    proves again what the text states\n"
        f"  qir plan {output}/program     shows buffers and kernels on this host"
    )


def normalized(images: Tensor) -> Tensor:
    """What the model takes, float32 [N, 1, 28, 28], from bytes [N, 28, 28]."""
    scaled = (images.astype(np.float32) / np.float32(255) - np.float32(0.2860)) / np.float32(0.3530)
    return scaled[:, None]


def _batches(images: Tensor) -> Iterator[Tensor]:
    yield from (images[i : i + _BATCH] for i in range(0, len(images), _BATCH))


def _classes(name: str, images: Tensor, run: Callable[[Tensor], Tensor], progress: Progress) -> tuple[Tensor, float]:
    """The class of each image, and the seconds that all took."""
    found, start = [], time.perf_counter()
    for batch in _batches(images):
        found.append(run(batch).argmax(axis=1))
        progress(name, len(found) * _BATCH, len(images))
    return np.concatenate(found), time.perf_counter() - start


def _measure(
    graph: Graph, program: Program, images: Tensor, labels: Tensor, progress: Progress
) -> list[tuple[str, str]]:
    """Accuracy, agreement, size, multiply-accumulates and time."""
    count = len(images)
    real, _ = _classes("float32", images, lambda x: interpret(graph, {"x": x})["logits"], progress)
    start = time.perf_counter()
    program.run_integer({"x": images[:_BATCH]})
    first = time.perf_counter() - start
    integer, seconds = _classes("integer", images, lambda x: program.run_integer({"x": x})["logits"], progress)
    before, after = constant_bytes(graph), program.weight_bytes()
    return [
        ("images", f"{count:,} of the test set, none of them seen in training or calibration"),
        ("float32 accuracy", f"{np.mean(real == labels):.1%}"),
        ("integer accuracy", f"{np.mean(integer == labels):.1%}"),
        ("same class", f"{np.count_nonzero(integer == real):,} of {count:,} images"),
        ("weights, float32", size_text(before)),
        ("weights, integer", f"{size_text(after)}, {before / after:.1f} times smaller"),
        ("work", f"{program.macs():,} multiply-accumulates an image"),
        ("time", f"{seconds / count * 1000:.2f} ms an image in batches of {_BATCH}, after {first:.1f} s for the first"),
    ]


def _last_layer(before: Graph, after: Graph) -> str:
    """The op that makes the output, as imported, and the ops that compute it as integers."""
    last = before.producers[before.outputs[0]]
    ours = [op for op in after.ops if last.location and op.location == last.location]
    lines = [
        "",
        "The last layer as imported:",
        _wrapped(op_text(last)),
        "and as integers, with what is proved of them:",
    ]
    return "\n".join([*lines, *(_wrapped(op_text(op)) for op in ours), ""])


def _wrapped(text: str) -> str:
    return textwrap.fill(
        text, 108, initial_indent="  ", subsequent_indent="      ", break_long_words=False, break_on_hyphens=False
    )
