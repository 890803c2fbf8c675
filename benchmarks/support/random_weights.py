"""The `light_*` models of the onnx package, real topologies whose weights are stubs, with seeded random weights."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

_BATCH_NORM_INPUTS = {1: "scale", 2: "offset", 3: "mean", 4: "variance"}


def light_model(name: str, folder: Path, seed: int = 0) -> Path:
    """Write `light_<name>` into `folder` with random weights in place of its ConstantOfShape nodes.

    Weights of Conv and Gemm are normal with variance 2 over the fan-in (He et al., 2015), parameters of batch
    normalization lie around the identity, so that activations keep their size through the depth of the network.
    """
    source = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / f"light_{name}.onnx"
    model = onnx.load(source)
    graph, rng = model.graph, np.random.default_rng(seed)
    shapes = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    readers = {tensor: (node.op_type, place) for node in graph.node for place, tensor in enumerate(node.input)}
    stubs = [node for node in graph.node if node.op_type == "ConstantOfShape"]
    weights = []
    for stub in stubs:
        shape = tuple(map(int, shapes[stub.input[0]]))
        data = _weight(rng, shape, *readers[stub.output[0]])
        weights.append(numpy_helper.from_array(data.astype(np.float32), stub.output[0]))
        graph.node.remove(stub)
    used = {tensor for node in graph.node for tensor in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *weights])
    constant = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name in used - constant]
    del graph.input[:]
    graph.input.extend(inputs)
    model.ir_version = 8  # from version 4 on an initializer need not be an input too
    path = folder / f"{name}.onnx"
    onnx.save(model, path)
    return path


def _weight(rng: np.random.Generator, shape: tuple[int, ...], op_type: str, place: int) -> npt.NDArray[np.float64]:
    normal = rng.normal(size=shape)
    if op_type in ("Conv", "Gemm") and place == 1:
        return normal * math.sqrt(2 / math.prod(shape[1:]))
    if op_type == "BatchNormalization" and place in _BATCH_NORM_INPUTS:
        if _BATCH_NORM_INPUTS[place] == "variance":
            return np.abs(1 + 0.2 * normal) + 0.05
        return 0.1 * normal + (_BATCH_NORM_INPUTS[place] == "scale")
    return 1 + 0.1 * normal if op_type in ("Mul", "Unsqueeze") else 0.05 * normal
