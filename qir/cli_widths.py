"""The commands on bit widths: what each costs in quality, and the front of the best."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

import qir
from qir.cli_input import add_input_options, read_calibration, read_model
from qir.drawing import drawing_of
from qir.errors import CalibrationError, QirError
from qir.feeds import read_npz, split_samples
from qir.interpreter import check_feeds
from qir.mixed_precision import Score
from qir.pass_manager import Feeds
from qir.passes.widths.costs import Metric
from qir.passes.widths.jobs import samples_of
from qir.passes.widths.quality import KL, QUALITIES, SQNR, Outputs
from qir.passes.widths.sensitivity import read_sensitivity
from qir.report import progress_bar
from qir.serialization import write_bytes
from qir.width_report import draw_front, draw_sensitivity, front_text, sensitivity_text

Add = Callable[[str, Callable[[argparse.Namespace], None], str], argparse.ArgumentParser]


def add_width_commands(add: Add) -> None:
    """`qir sensitivity` and `qir pareto`."""
    sense = add("sensitivity", _sensitivity, "Measure what each width of each layer costs in quality, on samples.")
    _add_common(sense, SQNR.name)
    sense.add_argument(
        "--other-ways", action="store_true", help="measure other formats that the contract allows, such as per_tensor"
    )
    sense.add_argument("--proxy", action="store_true", help="measure one width of each layer and estimate the others")
    sense.add_argument("-o", "--output", metavar="FILE", help="write all numbers here, as JSON for assign-bit-widths")

    front = add("pareto", _pareto, "Trace the exact front of widths, and measure it on the integer kernels.")
    _add_common(front, KL.name)
    front.add_argument(
        "--metric", default=Metric.WEIGHTS, choices=tuple(Metric), help="what is traded for loss (default: %(default)s)"
    )
    front.add_argument("--points", type=int, default=12, metavar="N", help="of the front (default: %(default)s)")
    front.add_argument(
        "--budget",
        action="append",
        default=[],
        metavar="METRIC:AMOUNT",
        help="to keep everywhere, such as latency:120us, dsp:96 or energy:0.5x of the default widths; repeatable",
    )
    front.add_argument("--inputs", metavar="FILE", help="samples to measure on (default: those of the calibration)")
    front.add_argument(
        "--labels", metavar="FILE", help=".npz file of one array, the class of each sample: measures top-1 accuracy"
    )
    front.add_argument("--sensitivity", metavar="FILE", help="losses from here, as qir sensitivity -o writes them")
    front.add_argument("-o", "--output", metavar="FILE", help="write all points here, as JSON")


def add_work_options(parser: argparse.ArgumentParser) -> None:
    """`--workers` and `--cache`."""
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that measure losses (default: 0)"
    )
    parser.add_argument("--cache", metavar="DIR", help="folder for measured losses, to be found again")


@contextlib.contextmanager
def workers(arguments: argparse.Namespace) -> Iterator[Executor | None]:
    """The processes that the options ask for, or None."""
    if arguments.workers < 0:
        raise QirError(f"--workers takes 0 or more, not {arguments.workers}")
    if not arguments.workers:
        yield None
        return
    with ProcessPoolExecutor(arguments.workers, get_context("spawn")) as executor:
        yield executor


def _add_common(parser: argparse.ArgumentParser, quality: str) -> None:
    parser.add_argument("model", help="an .onnx file, or a .qir text at stage float")
    parser.add_argument("--target", required=True, metavar="NAME", help="name of a target, or path of its .toml file")
    parser.add_argument("--passes", metavar="STR", help="pipeline to compile with (default: the full one)")
    parser.add_argument(
        "--quality", default=quality, choices=tuple(QUALITIES), help="what loss is measured by (default: %(default)s)"
    )
    parser.add_argument(
        "--weights",
        type=_names,
        default=(),
        metavar="A,B,...",
        help="widths of weights to choose from, such as 8,6,4/codebook (default: all of the target's)",
    )
    parser.add_argument(
        "--activations",
        type=_numbers,
        default=(),
        metavar="A,B,...",
        help="widths of activations to choose from (default: all of the target's)",
    )
    parser.add_argument("--plot", metavar="FILE", help="draw it: an .svg or .png file; needs matplotlib")
    add_work_options(parser)
    add_input_options(parser)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str) -> tuple[int, ...]:
    names = _names(text)
    if not all(n.isdecimal() for n in names):
        raise argparse.ArgumentTypeError(f"expected widths such as 8,16, found {text!r}")
    return tuple(map(int, names))


def _sensitivity(arguments: argparse.Namespace) -> None:
    kind = drawing_of(arguments.plot)
    with _common(arguments) as (graph, options):
        found = qir.sensitivity(
            graph,
            arguments.target,
            _feeds(arguments, graph),
            other_ways=arguments.other_ways,
            proxy=arguments.proxy,
            **options,
        )
    _write(arguments.output, found.to_json().encode())
    if kind:
        _write(arguments.plot, draw_sensitivity(found, kind))
    print(sensitivity_text(found))


def _pareto(arguments: argparse.Namespace) -> None:
    kind = drawing_of(arguments.plot)
    with _common(arguments) as (graph, options):
        evaluation = split_samples(graph.inputs, read_npz(arguments.inputs)) if arguments.inputs else None
        calibration = _feeds(arguments, graph)
        found = qir.pareto(
            graph,
            arguments.target,
            calibration,
            metric=arguments.metric,
            points=arguments.points,
            budgets=arguments.budget,
            evaluation=evaluation,
            score=_top_1(arguments.labels, graph, evaluation or calibration) if arguments.labels else None,
            measured=read_sensitivity(Path(arguments.sensitivity)) if arguments.sensitivity else None,
            **options,
        )
    _write(arguments.output, found.to_json().encode())
    if kind:
        _write(arguments.plot, draw_front(found, kind))
    print(front_text(found))


@contextlib.contextmanager
def _common(arguments: argparse.Namespace) -> Iterator[tuple[qir.Graph, dict[str, Any]]]:
    """The model, and the options that both commands have."""
    graph = read_model(arguments.model, arguments.shape)
    with progress_bar() as progress, workers(arguments) as executor:
        yield (
            graph,
            {
                "pipeline": arguments.passes,
                "quality": arguments.quality,
                "weights": arguments.weights,
                "activations": arguments.activations,
                "executor": executor,
                "cache": arguments.cache,
                "progress": progress,
            },
        )


def _write(path: str | None, data: bytes) -> None:
    if path:
        write_bytes(Path(path), data)


def _feeds(arguments: argparse.Namespace, graph: qir.Graph) -> list[dict[str, Any]]:
    found = read_calibration(arguments.calibration, graph)
    if found is None:
        raise CalibrationError("losses are measured on samples, and there are none; give --calibration FILE")
    return found


def _top_1(path: str, graph: qir.Graph, feeds: Sequence[Feeds]) -> Score:
    """The share of samples whose largest output is that of their class."""
    arrays = read_npz(path)
    labels = next(iter(arrays.values()), np.zeros(0))
    if len(arrays) != 1 or labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise QirError(f"{path} must hold one array, the classes of the samples as integers [samples]")
    if len(graph.output_names) != 1:
        raise QirError(f"--labels is for models of one output, and graph @{graph.name} has {len(graph.output_names)}")
    for feed in feeds:
        check_feeds(graph.inputs, feed)
    samples = sum(samples_of(graph, feed) for feed in feeds)
    if len(labels) != samples:
        raise QirError(f"{path} holds {len(labels):,} classes, and there are {samples:,} samples; give one for each")
    outputs = graph.outputs[0].type
    classes = outputs.sample_size * (samples if outputs.is_batched else len(feeds)) // samples
    if not 0 <= labels.min() <= labels.max() < classes:
        raise QirError(
            f"{path} holds classes from {labels.min()} to {labels.max()}, and graph @{graph.name} tells {classes} "
            "apart, from 0; number them so"
        )

    def score(outputs: Outputs) -> float:
        (logits,) = outputs.values()
        return float(np.mean(logits.reshape(len(labels), -1).argmax(axis=1) == labels))

    return score
