"""Top-1 accuracy with weights of few bits, with and without each method of better rounding, as Markdown tables.

On test images of Fashion-MNIST, calibrated on 256 training images; activations have the target's default width.
equalize is equalize-cross-layer, search is search-weight-ranges by outputs, bias is correct-bias, learn is
learn-rounding, which corrects biases itself: all together is without correct-bias. The last column is the model in
float32. A width that the target's weights lack has no row. fm_mobile has Relu6, across which no channel can be
rescaled: only those of its residual sums are.
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
from qir.pass_manager import Pass, Progress
from qir.passes.correct_bias import CorrectBias
from qir.passes.equalize_cross_layer import EqualizeCrossLayer
from qir.passes.learn_rounding import LearnRounding
from qir.passes.search_weight_ranges import Method, SearchWeightRanges
from qir.passes.widths.storage import weight_choices
from qir.report import progress_bar

_SEARCH: Final = SearchWeightRanges(Method.OUTPUT)
_METHODS: Final[dict[str, tuple[Pass, ...]]] = {
    "as it is": (),
    "equalize": (EqualizeCrossLayer(),),
    "search": (_SEARCH,),
    "bias": (CorrectBias(),),
    "search, bias": (_SEARCH, CorrectBias()),
    "learn": (LearnRounding(),),
    "search, learn": (_SEARCH, LearnRounding()),
    "equalize, search, learn": (EqualizeCrossLayer(), _SEARCH, LearnRounding()),
}


def pipeline_of(passes: tuple[Pass, ...]) -> qir.Pipeline:
    """The default pipeline with these, each where it belongs, in this order."""
    pipeline = qir.default_pipeline()
    for item in reversed(passes):
        place = "eliminate-dead-code" if isinstance(item, EqualizeCrossLayer) else "select-q-formats"
        pipeline = pipeline.insert_after(place, item)
    return pipeline


def rows(
    name: str, target: qir.Target, widths: list[str], count: int, progress: Progress
) -> Iterator[tuple[str, list[float]]]:
    """The accuracy of each width of weights, with a format or without, by each method, and that of float32."""
    images, labels = (a[:count] for a in models.labelled_images())
    graph, calibration = qir.import_onnx(models.PATHS[name]), [{"x": calibration_images()}]

    def accuracy(logits: models.Array) -> float:
        return float(np.mean(logits.argmax(axis=1) == labels))

    real = accuracy(np.concatenate([qir.interpret(graph, {"x": x})["logits"] for x in np.array_split(images, 10)]))
    for bits in widths:
        found = []
        for passes in _METHODS.values():
            program = qir.compile(
                graph,
                target,
                calibration,
                pipeline=pipeline_of(passes),
                overrides={"*": f"w{bits}"},
                progress=progress,
            )
            found.append(accuracy(program.run({"x": images})["logits"]))
        yield bits, [*found, real]


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
    target = qir.load_target(arguments.target)
    offered = weight_choices(target)
    lacking = [bits for bits in arguments.bits if bits not in offered]
    for bits in lacking:
        print(f"no row of {bits} bits: {target.name} has weights of {', '.join(offered)} bits", file=sys.stderr)
    widths = [bits for bits in arguments.bits if bits not in lacking]
    for name in arguments.models if widths else ():
        heads = [*_METHODS, "float32"]
        print(f"| {name}, {target.name}: bits | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
        with progress_bar() as progress:
            for bits, found in rows(name, target, widths, arguments.images, progress):
                print(f"| {bits} | {' | '.join(f'{a:.4f}' for a in found)} |", flush=True)
        print(flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
