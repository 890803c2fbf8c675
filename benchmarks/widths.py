"""The exact front of weight widths beside greedy and uniform ones, on the integer kernels, as tables and charts.

Top-1 on test images of Fashion-MNIST, calibrated on 256 training images; weights are searched by outputs and their
rounding is learned. The exit status is 1 where the front is worse than greedy in what it minimizes, more than 0.3
points below greedy or uniform widths of 8, 6 and 4 bits in accuracy, or at half the bytes of 8 bits farther from
float32 than 1 point (fm_cnn) or 3 points (fm_mobile).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from support import models
from support.fashion_mnist import calibration_images

import qir
from qir.mixed_precision import Point
from qir.passes.learn_rounding import LearnRounding
from qir.passes.search_weight_ranges import Method, SearchWeightRanges
from qir.passes.widths.storage import default_widths
from qir.report import progress_bar
from qir.serialization import write_bytes
from qir.width_report import draw_front, front_text

_ALLOWED: Final = {"fm_cnn": 0.01, "fm_mobile": 0.03, "fm_mlp": 0.01}  # below float32, at half the bytes of 8 bits
_BEHIND: Final = 0.003  # the front may be in accuracy, whose noise is as large on 10,000 images
_COMPARED: Final = ("8", "6", "4")


def front_of(name: str, arguments: argparse.Namespace) -> qir.Front:
    """The front of a model."""
    images, labels = (a[: arguments.images] for a in models.labelled_images())
    pipeline = qir.default_pipeline().insert_after(
        "select-q-formats", SearchWeightRanges(Method.OUTPUT), LearnRounding()
    )
    target = qir.load_target(arguments.target)
    with progress_bar() as progress:
        return qir.pareto(
            qir.import_onnx(models.PATHS[name]),
            target,
            [{"x": calibration_images()}],
            points=arguments.points,
            evaluation=[{"x": images}],
            score=lambda outputs: float((outputs["logits"].argmax(axis=1) == labels).mean()),
            pipeline=pipeline,
            weights=arguments.weights,
            activations=[default_widths(target)[1]],
            cache=arguments.cache,
            progress=progress,
        )


def faults(name: str, front: qir.Front) -> Iterator[str]:
    """What misses what is allowed."""
    best = front.of("front")
    for point, other in zip(best, front.of("greedy"), strict=True):
        if point.loss > other.loss:
            within = f"{point.costs['weights']:,.0f} bytes"
            yield f"greedy loses {other.loss:.4g} within {within}, the front {point.loss:.4g}"
        yield from _behind(point, other)
    for other in front.of("uniform"):
        (width,) = set(other.widths["weights"].values())
        if width in _COMPARED:
            yield from _behind(_within(best, other.costs["weights"]), other)
    half = max(p.costs["weights"] for p in front.of("uniform") if set(p.widths["weights"].values()) == {"8"}) / 2
    point = _within(best, half)
    assert front.float_score is not None
    assert point.score is not None
    lost = front.float_score - point.score
    print(f"{name} at half the bytes of 8 bits: {point.score:.4f}, {100 * lost:.2f} points below float32")
    if lost > _ALLOWED[name]:
        yield f"at half the bytes {100 * lost:.2f} points are lost, {100 * _ALLOWED[name]:.1f} are allowed"


def _within(points: tuple[Point, ...], most: float) -> Point:
    """The best point of a front within some bytes."""
    return max((p for p in points if p.costs["weights"] <= most), key=lambda p: p.costs["weights"])


def _behind(point: Point, other: Point) -> Iterator[str]:
    assert point.score is not None
    assert other.score is not None
    if point.score < other.score - _BEHIND:
        yield (
            f"at {point.costs['weights']:,.0f} bytes the front scores {point.score:.4f}, {other.origin} "
            f"{other.score:.4f} at {other.costs['weights']:,.0f}"
        )


def main() -> int:
    """Print a table for each model, and what misses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(models.PATHS), default=["fm_cnn", "fm_mobile"])
    parser.add_argument("--target", default="fpga", help="one with several widths (default: %(default)s)")
    parser.add_argument("--weights", nargs="+", default=["8", "6", "4", "3", "2", "1"], help="widths to choose from")
    parser.add_argument("--points", type=int, default=8, help="of the front, at even steps (default: %(default)s)")
    parser.add_argument("--images", type=int, default=10_000, help="how many of the 10,000 test images (all)")
    parser.add_argument("--cache", metavar="DIR", help="folder for measured losses, to be found again")
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, help="folder for widths-MODEL.svg and .json")
    arguments = parser.parse_args()
    missed = False
    for name in arguments.models:
        front = front_of(name, arguments)
        print(f"{name}\n{front_text(front)}\n")
        for fault in faults(name, front):
            missed = True
            print(f"MISSED: {fault}")
        print(flush=True)
        if arguments.output:
            write_bytes(arguments.output / f"widths-{name}.json", front.to_json().encode())
            write_bytes(arguments.output / f"widths-{name}.svg", draw_front(front, ".svg"))
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
