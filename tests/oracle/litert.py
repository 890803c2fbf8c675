"""Runs .tflite files on LiteRT: on its reference kernels, or on XNNPACK, to which it hands all that it can."""

from __future__ import annotations

from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt
from ai_edge_litert.interpreter import Interpreter, OpResolverType

Array = npt.NDArray[Any]


class Kernels(Enum):
    """Which kernels run a model."""

    REFERENCE = OpResolverType.BUILTIN_REF
    XNNPACK = OpResolverType.BUILTIN


def run_litert(model: bytes, *inputs: Array, kernels: Kernels) -> Array:
    """The first output for one set of inputs. Raises RuntimeError when other kernels would run than those asked for."""
    interpreter = Interpreter(model_content=model, experimental_op_resolver_type=kernels.value, num_threads=1)
    interpreter.allocate_tensors()
    if is_delegated(interpreter) != (kernels is Kernels.XNNPACK):
        raise RuntimeError(f"the model does not run on {kernels.name}")
    for details, value in zip(interpreter.get_input_details(), inputs, strict=True):
        interpreter.set_tensor(details["index"], value)
    interpreter.invoke()
    return np.asarray(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]))


def is_delegated(interpreter: Interpreter) -> bool:
    """Whether a delegate, which can only be XNNPACK here, took the operators over."""
    return any(details["op_name"] == "DELEGATE" for details in interpreter._get_ops_details())
