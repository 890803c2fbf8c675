"""Bits that accumulators are proved to need, from types alone, from the weights, and with affine forms; what it costs.

A type-only bound takes every weight at the ends of its type. fm_mobile is calibrated on training images,
light_resnet50 (the onnx package's topology, seeded random weights) on random ones; with `--data DIR` also the text line
classifier of PP-OCR, fetched into DIR unless it lies there. Then: the accumulators that minimize-accumulators gives the
target `fpga`; what of `dsp16` is proved free of step-wise saturation, before and after repairs, with top-1 on 10,000
images; and the time of range analysis on graphs of 10 to 10,000 ops.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from support import large_graphs, models
from support.fashion_mnist import calibration_images
from support.public_data import PPOCR_CLS, FetchError, wheel_file
from support.random_weights import light_model

import qir
from qir.idle import is_idle
from qir.interval import Bounds, bits_of_interval
from qir.ops.accumulate import Accumulating
from qir.pass_manager import PassContext
from qir.proof import Method, Proof, prove
from qir.report import progress_bar
from qir.types import storage_of

Array = npt.NDArray[Any]

SECONDS = 20  # what range analysis of light_resnet50 may take
_SAMPLES = 8
_SIZES = (10, 100, 1000, 10000)
_REPAIRS = {
    "none": "",
    "a wider accumulator": "{repair=widen}",
    "narrower weights": "{repair=narrow,skip=widen;split}",
}


@dataclass(frozen=True)
class Case:
    """A float graph and what calibrates it."""

    name: str
    graph: qir.Graph
    calibration: Sequence[Mapping[str, Array]]


def cases(scratch: Path, data: Path | None) -> Iterator[Case]:
    """fm_mobile, light_resnet50 and, where there is a folder for public data, PP-OCR's classifier."""
    graph = qir.import_onnx(models.PATHS["fm_mobile"])
    yield Case("fm_mobile", graph, [{graph.inputs[0].name: calibration_images()}])
    if data is not None:
        graph = qir.import_onnx(wheel_file(data, PPOCR_CLS), shapes={"x": ["N", 3, 48, 192]}, name="PP-OCR cls")
        yield Case("PP-OCR cls", graph, [_random("x", (_SAMPLES, 3, 48, 192))])
    graph = qir.import_onnx(light_model("resnet50", scratch))
    yield Case("light_resnet50", graph, [_random(graph.inputs[0].name, (1, 3, 224, 224)) for _ in range(_SAMPLES)])


def _random(name: str, shape: tuple[int, ...]) -> dict[str, Array]:
    return {name: np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)}


def type_only_bits(op: Accumulating, proof: Proof) -> int:
    """Bits of the partial sums where operands, weights among them, may be anything that their types hold."""
    operands = []
    for value in op.operands[:2]:
        storage = storage_of(value.type.element)
        assert storage is not None
        operands.append(Bounds.of(storage.lo, storage.hi))
    found = op.bounds([*operands, *(proof.bounds[v] for v in op.operands[2:])])
    assert found is not None
    assert found.partial is not None
    return bits_of_interval(found.partial)


def proved_bits(proof: Proof) -> dict[Accumulating, int]:
    """Bits of the partial sums of each accumulating op."""
    return {
        op: bits_of_interval(step.partial)
        for op, step in proof.steps.items()
        if isinstance(op, Accumulating) and step.partial is not None
    }


def prove_anew(graph: qir.Graph, method: Method) -> tuple[Proof, float]:
    """The proof of a graph, and the seconds that it took."""
    fresh = graph.with_changes()
    start = time.perf_counter()
    return prove(fresh, method), time.perf_counter() - start


def print_bits(case: Case, target: str) -> bool:
    """A row a model; whether its analysis took no longer than it may."""
    with progress_bar() as progress:
        graph = qir.compile(case.graph, target, case.calibration, progress=progress).graph
    (interval, seconds), (affine, affine_seconds) = (prove_anew(graph, m) for m in Method)
    bits = proved_bits(interval)
    columns = [[type_only_bits(op, interval) for op in bits], list(bits.values()), list(proved_bits(affine).values())]
    tighter = sum(bool(step.sources) for step in affine.steps.values())
    means = "".join(f"{np.mean(column):10.2f}" for column in columns)
    print(f"{case.name:16}{len(bits):6}{means}{tighter:9}{seconds:11.2f}{affine_seconds:9.2f}", flush=True)
    return max(seconds, affine_seconds) <= SECONDS


def print_widths(name: str, graph: qir.Graph) -> None:
    """What minimize-accumulators says of a model on `fpga`, and how many outputs differ after it."""
    (x,) = graph.inputs
    context, pipeline = PassContext(qir.load_target("fpga")), qir.parse_pipeline("minimize-accumulators{per=channel}")
    before = qir.compile(graph, "fpga", [{x.name: calibration_images()}])
    after = qir.Program(pipeline.run(before.graph, context))
    images = {x.name: models.labelled_images()[0]}
    outputs = [p.run_integer(images) for p in (before, after)]
    differ = sum(int((outputs[0][n] != outputs[1][n]).sum()) for n in outputs[0])
    total = sum(a.size for a in outputs[0].values())
    print(f"{name}, fpga: {'; '.join(context.notes)}; {differ} of {total:,} outputs differ", flush=True)


def print_repairs(name: str, graph: qir.Graph) -> None:
    """Layers of a model that are proved free of step-wise saturation on `dsp16`, and top-1, after each repair alone."""
    (x,), (output,) = graph.inputs, graph.output_names
    images, labels = models.labelled_images()
    calibration = [{x.name: calibration_images()}]
    for title, options in _REPAIRS.items():
        pipeline = qir.default_pipeline().before("insert-saturation") + qir.parse_pipeline(
            f"insert-saturation{options}"
        )
        program = qir.compile(graph, "dsp16", calibration, pipeline=pipeline)
        proof = prove(program.graph)
        sums = [op for op in program.graph.ops if isinstance(op, Accumulating)]
        free = sum(is_idle(op, proof.steps.get(op)) for op in sums)
        start = time.perf_counter()
        classes = program.run({x.name: images})[output].argmax(axis=1)
        seconds = time.perf_counter() - start
        row = f"{free:4} of {len(sums):2}{np.mean(classes == labels):10.4f}{1e3 * seconds / len(images):12.3f}"
        print(f"{f'{name}, {title}':28}{row}", flush=True)


def print_growth() -> None:
    """Milliseconds of range analysis on integer graphs of growing size, and how time per op grew at the last step."""
    print(f"\n{'milliseconds':24}" + "".join(f"{f'{size:,} ops':>13}" for size in _SIZES) + f"{'growth':>9}")
    target, samples = qir.load_target("arm-neon"), list(large_graphs.samples(4))
    graphs = []
    for size in _SIZES:
        before = qir.default_pipeline().before("legalize") + qir.parse_pipeline("legalize")
        graphs.append(before.run(large_graphs.large_graph(size), PassContext(target, samples), []))
    for method in Method:
        best = [min(_times(graph, method, 1000 // size)) for graph, size in zip(graphs, _SIZES, strict=True)]
        growth = best[-1] / _SIZES[-1] / (best[-2] / _SIZES[-2])
        print(f"{f'range analysis, {method}':24}" + "".join(f"{1000 * s:13,.1f}" for s in best) + f"{growth:9.2f}")


def _times(graph: qir.Graph, method: Method, runs: int) -> list[float]:
    return [prove_anew(graph, method)[1] for _ in range(max(1, min(10, runs)))]


def main() -> int:
    """Print the tables; 1 where an analysis takes longer than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="where public models lie or are put")
    parser.add_argument("--target", default="arm-neon", help="whose accumulators to bound (default: %(default)s)")
    options = parser.parse_args()
    titles = f"{'types':>10}{'weights':>10}{'affine':>10}{'tighter':>9}{'s, weights':>11}{'affine':>9}"
    print(f"{'mean bits':16}{'sums':>6}{titles}")
    is_quick = True
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for case in cases(Path(scratch), options.data):
                is_quick &= print_bits(case, options.target)
        except FetchError as fault:
            print(f"error: {fault}", file=sys.stderr)
            return 2
    if options.data is None:
        print("PP-OCR cls: give --data DIR")
    print()
    for name in ("fm_cnn", "fm_mobile"):
        print_widths(name, qir.import_onnx(models.PATHS[name]))
    print(f"\n{'dsp16, repair':28}{'proved':>10}{'top-1':>10}{'ms an image':>12}")
    for name in ("fm_cnn", "fm_mobile"):
        print_repairs(name, qir.import_onnx(models.PATHS[name]))
    print_growth()
    return int(not is_quick)


if __name__ == "__main__":
    sys.exit(main())
