"""Whole compiled models against TensorFlow Lite Micro, every output bit, and against the interpreter, every value."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from models import PATHS, compiled, labelled_images
from oracle.graph_to_tflite import graph_to_tflite
from oracle.litert import Kernels, run_litert
from oracle.tflite_writer import MicroRuntime

from qir.interpreter import trace
from qir.pass_manager import integer_feeds

NAMES = sorted(PATHS)
#: The targets whose whole arithmetic is that of TensorFlow Lite Micro.
TARGETS = ("arm-neon", "arm-neon-symmetric", "arm-neon-16x8", "cortex-m")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NAMES)
def test_every_output_bit_is_that_of_tensorflow_lite_micro(name: str, target: str) -> None:
    model = compiled(name, target)
    x, _ = labelled_images()
    feeds = integer_feeds(model.program.graph, {"x": x[:1000]})
    ours = model.program.run_integer(feeds)["logits"]
    runtime = MicroRuntime(graph_to_tflite(model.program.graph, model.typed))
    theirs = np.concatenate([runtime.run(image[None])[0] for image in feeds["x"]])
    assert ours.shape == theirs.shape == (1000, 10)
    assert int((ours != theirs).sum()) == 0


@pytest.mark.parametrize("name", NAMES)
def test_every_output_bit_is_that_of_xnnpack(name: str) -> None:
    """XNNPACK as LiteRT runs it on this host; the zero points are such that its means round as the contract does."""
    model = compiled(name, "arm-neon-xnnpack")
    feeds = integer_feeds(model.program.graph, {"x": labelled_images()[0][:1000]})
    ours = model.program.run_integer(feeds)["logits"]
    file = graph_to_tflite(model.program.graph, model.typed, batch=1000)
    theirs = run_litert(file, feeds["x"], kernels=Kernels.XNNPACK)
    assert ours.shape == theirs.shape == (1000, 10)
    assert int((ours != theirs).sum()) == 0


@pytest.mark.parametrize("name", NAMES)
def test_every_output_bit_is_that_of_litert_where_fully_connected_rounds_otherwise(name: str, tmp_path: Path) -> None:
    """LiteRT's reference kernels requantize fully connected layers in float64: a contract of three lines says so."""
    path = tmp_path / "litert.toml"
    path.write_text(
        'name = "litert"\ndescription = "LiteRT, reference kernels"\ninherits = "arm-neon"\n'
        '[requantization.matmul]\nform = "double_away"\n'
    )
    model = compiled(name, str(path))
    feeds = integer_feeds(model.program.graph, {"x": labelled_images()[0][:1000]})
    ours = model.program.run_integer(feeds)["logits"]
    file = graph_to_tflite(model.program.graph, model.typed, batch=1000)
    theirs = run_litert(file, feeds["x"], kernels=Kernels.REFERENCE)
    assert ours.shape == theirs.shape == (1000, 10)
    assert int((ours != theirs).sum()) == 0
    rounded_twice = compiled(name).program.run_integer(feeds)["logits"]
    assert bool((rounded_twice != theirs).any())  # the two rules do differ


@pytest.mark.parametrize("name", NAMES)
def test_kernels_give_every_value_of_the_interpreter(name: str) -> None:
    program = compiled(name).program
    feeds = integer_feeds(program.graph, {"x": labelled_images()[0][:32]})
    expected, found = trace(program.graph, feeds), program.trace(feeds)
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array, err_msg=key)
    fused = program.run_integer(feeds)
    np.testing.assert_array_equal(fused["logits"], expected[program.graph.outputs[0].name])


@pytest.mark.parametrize("name", NAMES)
def test_accuracy_on_all_test_images_is_within_a_fifth_of_a_point(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    model = compiled(name)
    x, labels = labelled_images()
    session = onnxruntime.InferenceSession(str(PATHS[name]), providers=["CPUExecutionProvider"])
    real = np.concatenate([session.run(None, {"x": x[i : i + 500]})[0] for i in range(0, len(x), 500)])
    integer = model.program.run({"x": x})["logits"]
    float_accuracy, accuracy = (float((o.argmax(axis=1) == labels).mean()) for o in (real, integer))
    record_property("float32", float_accuracy)
    record_property("arm-neon", accuracy)
    assert accuracy >= float_accuracy - 0.002
