"""fm_mobile with plain Relu, and the same function with the scales of its channels drawn at random."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from models import PATHS
from onnx import numpy_helper


def mobile_with_relu() -> onnx.ModelProto:
    """fm_mobile with Relu in place of Relu6."""
    model = onnx.load(PATHS["fm_mobile"])
    for node in model.graph.node:
        if node.op_type == "Clip":
            node.op_type = "Relu"
            del node.input[1:]
    return model


def rescaled(model: onnx.ModelProto, seed: int = 0) -> onnx.ModelProto:
    """The same function, up to float rounding: channels between two layers times 2**U(-4, 4), those of a sum alike."""
    random = np.random.default_rng(seed)
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    weights = {t.name: t for t in changed.graph.initializer}
    kept = {v.name for v in (*changed.graph.input, *changed.graph.output)}
    leader: dict[str, str] = {}
    for node in changed.graph.node:
        operands = [v for v in node.input if v and v not in weights]
        if not operands:
            continue
        (result,) = node.output
        leader[result] = result if node.op_type in ("Conv", "Gemm") else leader.get(operands[0], operands[0])
        for other in operands[1:]:
            joined = leader[other]
            leader.update({v: leader[result] for v, found in leader.items() if found == joined})
    factors: dict[str, npt.NDArray[Any]] = {}
    for node in changed.graph.node:
        if node.op_type not in ("Conv", "Gemm"):
            continue
        source, result = leader.get(node.input[0], node.input[0]), leader[node.output[0]]
        weight, bias = (numpy_helper.to_array(weights[v]) for v in node.input[1:3])
        if result not in factors:
            channels = np.ones(len(bias)) if result in kept else np.exp2(random.uniform(-4, 4, len(bias)))
            factors[result] = channels
        if source in factors:
            read = factors[source]
            per_input = read[:, None] if weight.shape[1] == 1 else read[None]
            weight = weight / per_input.reshape(*per_input.shape, *[1] * (weight.ndim - 2))
        written = factors[result]
        for name, array in zip(
            node.input[1:3], (weight * written.reshape(-1, *[1] * (weight.ndim - 1)), bias * written), strict=True
        ):
            weights[name].CopyFrom(numpy_helper.from_array(array.astype(np.float32), name))
    return changed
