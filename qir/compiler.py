"""From a float graph to a program, in one call: the pipeline, verified after every pass, then bound to kernels."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path

from qir.backend import target_of
from qir.calibration import Calibration
from qir.errors import PassError
from qir.frontend.onnx_import import import_onnx
from qir.ir import Graph, Stage
from qir.pass_manager import Feeds, Instrument, PassContext, Pipeline, Progress, Verifier, no_progress
from qir.passes.assign_bit_widths import AssignBitWidths
from qir.passes.pipelines import default_pipeline, pipeline_of
from qir.program import Program
from qir.target import Target
from qir.verifier import verify


def compile(
    graph: Graph | str | os.PathLike[str],
    target: Target | str | os.PathLike[str],
    calibration: Iterable[Feeds] | Calibration | None = None,
    *,
    pipeline: Pipeline | str | None = None,
    overrides: Mapping[str, int | str] | None = None,
    instruments: Sequence[Instrument] = (),
    progress: Progress = no_progress,
    executor: Executor | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> Program:
    """The integer program of `graph` (a float graph, or the path of an ONNX file) on `target` (or its name or path).

    `calibration` is any iterable of feeds, each a mapping of input names to float32 arrays, or what was observed of
    them before (`qir.observe`). `pipeline` replaces the default one and may be a string. `overrides` gives bit widths
    of their own to ops: pattern of a result's name or a location -> bits, or `"w4"` for weights alone and `"a16"` for
    results; `"w4/power_of_two"` and `"w4/codebook"` are formats of weights; the last match counts. The graph is
    verified before the first pass and after each; `instruments` then see every pass. Nothing that is passed in is
    changed.

    Raises a QirError: ImportModelError, TargetError, CalibrationError or VerifyError for what is passed in, and
    PassError, which names the pass and those done and keeps the last good graph, for what fails on the way.
    """
    source = graph if isinstance(graph, Graph) else import_onnx(graph)
    contract = target_of(target)
    passes = _with_overrides(pipeline_of(pipeline), overrides or {})
    verify(source)
    folder = None if cache is None else Path(cache)
    context = PassContext(contract, calibration, progress, executor=executor, cache=folder)
    fixed = passes.run(source, context, [Verifier(), *instruments])
    if fixed.stage is not Stage.FIXED:
        raise PassError(
            f"the pipeline ended at stage {fixed.stage}, a program needs stage fixed; end it as the default does: "
            f"{default_pipeline()}",
            [p.name for p in passes],
            fixed,
        )
    return Program(fixed)


def _with_overrides(pipeline: Pipeline, overrides: Mapping[str, int | str]) -> Pipeline:
    """The pipeline whose assign-bit-widths also knows these. Raises PassError where the pipeline has no such pass."""
    if not overrides:
        return pipeline
    old = next((p for p in pipeline if isinstance(p, AssignBitWidths)), None)
    if old is None:
        raise PassError(f"overrides are for {AssignBitWidths.name}, which the pipeline lacks; it runs {pipeline}")
    added = tuple(f"{pattern}:{bits}" for pattern, bits in overrides.items())
    return pipeline.replace(old.name, replace(old, override=(*old.override, *added)))
