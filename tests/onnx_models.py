"""ONNX models for the tests, written in ONNX's own text."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper


def model(text: str, *, opset: int = 17, **initializers: Any) -> onnx.ModelProto:
    """The model of `text` in ONNX's syntax; `initializers` are arrays, added to it by name."""
    parsed = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]> {text}')
    parsed.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), n) for n, a in initializers.items())
    return parsed


def random(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Normal numbers."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)
