"""qir: float ONNX models in, proved and bit-exact integer programs out.

What stands in `__all__` is the public surface. Op classes live in `qir.ops`, what passes build graphs with in
`qir.rewrite`, the passes themselves in `qir.passes`. Importing `qir` loads the language alone; what needs numba or onnx
is loaded when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from qir.arrays import Array
from qir.backend import Backend, load_target
from qir.calibration import Calibration, Histogram
from qir.equivalence import Equivalence
from qir.errors import (
    CalibrationError,
    CertificateError,
    ConformanceError,
    Diagnostic,
    ImportModelError,
    ParseError,
    PassError,
    QirError,
    ResourceError,
    RewriteError,
    RunError,
    TargetError,
    VerifyError,
)
from qir.interpreter import interpret, trace
from qir.interval import Interval
from qir.ir import Graph, Op, Stage, Value
from qir.parser import parse
from qir.pass_manager import (
    Differential,
    Dump,
    Instrument,
    Pass,
    PassContext,
    PassRecord,
    Pipeline,
    Timing,
    Verifier,
)
from qir.printer import resources
from qir.rewrite import GraphBuilder, Rewriter
from qir.serialization import read_graph, write_graph
from qir.target import Target
from qir.types import AffineType, FixedPointType, FloatType, IntegerType, TensorType
from qir.verifier import verify

if TYPE_CHECKING:
    from qir.comparison.comparer import compare
    from qir.comparison.result import Comparison
    from qir.compiler import compile  # noqa: A004
    from qir.frontend.onnx_import import import_onnx
    from qir.mixed_precision import Front, pareto, sensitivity
    from qir.passes.calibrate import observe
    from qir.passes.pipelines import default_pipeline, parse_pipeline
    from qir.passes.widths.quality import Quality
    from qir.passes.widths.sensitivity import Sensitivity
    from qir.program import Program, load

__version__ = "0.1.0"

__all__ = [
    "AffineType",
    "Array",
    "Backend",
    "Calibration",
    "CalibrationError",
    "CertificateError",
    "Comparison",
    "ConformanceError",
    "Diagnostic",
    "Differential",
    "Dump",
    "Equivalence",
    "FixedPointType",
    "FloatType",
    "Front",
    "Graph",
    "GraphBuilder",
    "Histogram",
    "ImportModelError",
    "Instrument",
    "IntegerType",
    "Interval",
    "Op",
    "ParseError",
    "Pass",
    "PassContext",
    "PassError",
    "PassRecord",
    "Pipeline",
    "Program",
    "QirError",
    "Quality",
    "ResourceError",
    "RewriteError",
    "Rewriter",
    "RunError",
    "Sensitivity",
    "Stage",
    "Target",
    "TargetError",
    "TensorType",
    "Timing",
    "Value",
    "Verifier",
    "VerifyError",
    "compare",
    "compile",
    "default_pipeline",
    "import_onnx",
    "interpret",
    "load",
    "load_target",
    "observe",
    "pareto",
    "parse",
    "parse_pipeline",
    "read_graph",
    "resources",
    "sensitivity",
    "trace",
    "verify",
    "write_graph",
]

_LATE = {
    "Comparison": "qir.comparison.result",
    "Front": "qir.mixed_precision",
    "Program": "qir.program",
    "Quality": "qir.passes.widths.quality",
    "Sensitivity": "qir.passes.widths.sensitivity",
    "compare": "qir.comparison.comparer",
    "compile": "qir.compiler",
    "default_pipeline": "qir.passes.pipelines",
    "import_onnx": "qir.frontend.onnx_import",
    "load": "qir.program",
    "observe": "qir.passes.calibrate",
    "pareto": "qir.mixed_precision",
    "parse_pipeline": "qir.passes.pipelines",
    "sensitivity": "qir.mixed_precision",
}

if not TYPE_CHECKING:  # a type checker must see that other names do not exist

    def __getattr__(name: str) -> object:
        if name not in _LATE:
            raise AttributeError(f"module 'qir' has no attribute {name!r}")
        return getattr(importlib.import_module(_LATE[name]), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
