"""Convolutions and pools of every geometry against ONNX Runtime, which nobody here wrote."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from qir.frontend.onnx_import import import_onnx
from qir.interpreter import interpret

# float32 sums of at most 100 terms of size 1, taken in another order.
RELATIVE, ABSOLUTE = 1e-5, 5e-6


def _model(
    op: str, shape: tuple[int, ...], weights: dict[str, npt.NDArray[np.float32]], attributes: dict[str, Any]
) -> onnx.ModelProto:
    node = helper.make_node(op, ["x", *weights], ["y"], **attributes)
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", *shape[1:]])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph([node], "window", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def _compare(model: onnx.ModelProto, x: npt.NDArray[np.float32]) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    (wanted,) = onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})
    found = interpret(import_onnx(model), {"x": x})["y"]
    assert found.shape == wanted.shape
    assert np.allclose(found, wanted, rtol=RELATIVE, atol=ABSOLUTE)


@st.composite
def windows(draw: st.DrawFn, dilated: bool) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The spatial sizes and the attributes of a window that fits and never lies on padding alone."""
    rank = draw(st.integers(1, 2))

    def numbers(low: int, high: int, count: int = rank) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=count, max_size=count))

    sizes, kernel = numbers(1, 12), numbers(1, 4)
    dilations = numbers(1, 2) if dilated else [1] * rank
    pads = [draw(st.integers(0, k - 1)) for k in (*kernel, *kernel)]
    extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    assume(all(n >= e - min(k - 1, 1) for n, e, k in zip(sizes, extents, kernel, strict=True)))
    assume(all(n + pads[i] + pads[rank + i] >= extents[i] for i, n in enumerate(sizes)))
    return tuple(sizes), {"strides": numbers(1, 3), "dilations": dilations, "pads": pads, "kernel_shape": kernel}


@given(
    windows(dilated=True), st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.data()
)
@settings(max_examples=150)
def test_conv(
    window: tuple[tuple[int, ...], dict[str, Any]],
    groups: int,
    inputs: int,
    outputs: int,
    biased: bool,
    data: st.DataObject,
) -> None:
    sizes, attributes = window
    if data.draw(st.booleans()):
        attributes = {"strides": attributes["strides"], "kernel_shape": attributes["kernel_shape"]}
        attributes["auto_pad"] = data.draw(st.sampled_from(["SAME_UPPER", "SAME_LOWER", "VALID"]))
        assume(all(n >= k for n, k in zip(sizes, attributes["kernel_shape"], strict=True)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    x = rng.normal(size=(2, groups * inputs, *sizes)).astype(np.float32)
    weights = {"w": rng.normal(size=(groups * outputs, inputs, *attributes["kernel_shape"])).astype(np.float32)}
    if biased:
        weights["b"] = rng.normal(size=groups * outputs).astype(np.float32)
    _compare(_model("Conv", x.shape, weights, attributes | {"group": groups}), x)


@given(windows(dilated=True), st.booleans(), st.integers(0, 2**32 - 1))
@settings(max_examples=100)
def test_max_pool(window: tuple[tuple[int, ...], dict[str, Any]], ceil_mode: bool, seed: int) -> None:
    sizes, attributes = window
    x = np.random.default_rng(seed).normal(size=(2, 3, *sizes)).astype(np.float32)
    _compare(_model("MaxPool", x.shape, {}, attributes | {"ceil_mode": int(ceil_mode)}), x)


@given(windows(dilated=True), st.booleans(), st.booleans(), st.integers(0, 2**32 - 1))
@settings(max_examples=100)
def test_average_pool(
    window: tuple[tuple[int, ...], dict[str, Any]], ceil_mode: bool, include: bool, seed: int
) -> None:
    sizes, attributes = window
    x = np.random.default_rng(seed).normal(size=(2, 3, *sizes)).astype(np.float32)
    modes = {"ceil_mode": int(ceil_mode), "count_include_pad": int(include)}
    _compare(_model("AveragePool", x.shape, {}, attributes | modes), x)


@given(windows(dilated=False), st.sampled_from(["SAME_UPPER", "SAME_LOWER", "VALID"]), st.integers(0, 2**32 - 1))
@settings(max_examples=100)
def test_average_pool_with_automatic_padding(
    window: tuple[tuple[int, ...], dict[str, Any]], mode: str, seed: int
) -> None:
    sizes, attributes = window
    del attributes["pads"]
    attributes["strides"] = [min(s, k) for s, k in zip(attributes["strides"], attributes["kernel_shape"], strict=True)]
    assume(all(n >= k for n, k in zip(sizes, attributes["kernel_shape"], strict=True)))
    x = np.random.default_rng(seed).normal(size=(2, 3, *sizes)).astype(np.float32)
    _compare(_model("AveragePool", x.shape, {}, attributes | {"auto_pad": mode}), x)
