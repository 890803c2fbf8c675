"""Cross-layer equalization: models whose channels differ in scale, what it says, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from models import calibration_images, labelled_images
from rescaled import mobile_with_relu, rescaled

import qir
from qir.errors import PassError
from qir.ir import Graph
from qir.parser import parse
from qir.pass_manager import PassContext
from qir.passes.calibrate import Calibrate
from qir.passes.equalize_cross_layer import EqualizeCrossLayer
from qir.passes.pipelines import default_pipeline, parse_pipeline
from qir.target import Granularity, Target

EQUALIZED = default_pipeline().insert_after("eliminate-dead-code", EqualizeCrossLayer())


def accuracy(graph: Graph, target: Target, pipeline: qir.Pipeline) -> float:
    """Percent of 2,000 test images."""
    images, labels = (a[:2000] for a in labelled_images())
    program = qir.compile(graph, target, [{"x": calibration_images()}], pipeline=pipeline)
    found = program.run({"x": images})["logits"].argmax(axis=1)
    return 100 * float(np.mean(found == labels))


def imported(model: onnx.ModelProto, folder: Path) -> Graph:
    onnx.save(model, folder / "model.onnx")
    return qir.import_onnx(folder / "model.onnx")


def test_a_model_with_scales_of_its_channels_at_random_is_saved_by_equalization(tmp_path: Path) -> None:
    arm = qir.load_target("arm-neon")
    per_tensor = replace(arm, weights=replace(arm.weights, conv=Granularity.PER_TENSOR))
    images, labels = (a[:2000] for a in labelled_images())
    graph = imported(rescaled(mobile_with_relu()), tmp_path)
    original = imported(mobile_with_relu(), tmp_path)
    real = [qir.interpret(g, {"x": images})["logits"] for g in (original, graph)]
    np.testing.assert_allclose(real[0], real[1], rtol=0, atol=1e-3)  # float rounding: logits reach 20
    float_accuracy = 100 * float(np.mean(real[1].argmax(axis=1) == labels))
    assert accuracy(graph, per_tensor, default_pipeline()) < 20  # ten classes: chance is 10
    assert accuracy(graph, per_tensor, EQUALIZED) > float_accuracy - 0.5
    assert accuracy(graph, arm, default_pipeline()) < 50  # a scale for each output channel does not mend inputs
    assert accuracy(graph, arm, EQUALIZED) > float_accuracy - 0.5


def two_layers(written: str, read: str, bias: str = "1.0") -> Graph:
    return parse(f"""
        graph @two stage=float (%x: Nx1 x f32) {{
          %w = const {{value=f32 1x1 [{written}]}} : 1x1 x f32
          %b = const {{value=f32 1 [{bias}]}} : 1 x f32
          %h = MatMul %x, %w, %b : Nx1 x f32 loc("fc1")
          %v = const {{value=f32 1x1 [{read}]}} : 1x1 x f32
          %y = MatMul %h, %v : Nx1 x f32 loc("fc2")
          return %y
        }}
    """)


def constants(graph: Graph) -> dict[str, float]:
    return {v.name: float(a.data.reshape(-1)[0]) for v, a in graph.constants.items()}


def test_a_channel_of_little_but_its_bias_is_not_blown_up() -> None:
    after = EqualizeCrossLayer().run(two_layers("1e-12", "1.0"), PassContext())
    assert constants(after)["b"] == 1.0


@pytest.mark.parametrize(("written", "read", "bias"), [("0.0", "8.0", "0.0"), ("8.0", "0.0", "0.0")])
def test_a_channel_of_zeros_keeps_its_scale(written: str, read: str, bias: str) -> None:
    graph = two_layers(written, read, bias)
    context = PassContext()
    assert EqualizeCrossLayer().run(graph, context) is graph
    assert context.notes == ["no channels to rescale"]


def test_powers_of_two_are_the_nearest() -> None:
    after = EqualizeCrossLayer(power_of_two=True).run(two_layers("7.0", "1.0"), PassContext())
    assert constants(after) == {"w": 3.5, "b": 0.5, "v": 2.0}


def test_it_says_what_it_changed() -> None:
    context = PassContext()
    EqualizeCrossLayer().run(
        parse("""
        graph @uneven stage=float (%x: Nx1 x f32) {
          %w = const {value=f32 1x2 [16.0, 1.0]} : 1x2 x f32
          %h = MatMul %x, %w {clip=[0.0, inf]} : Nx2 x f32
          %v = const {value=f32 2x1 [1.0, 16.0]} : 2x1 x f32
          %y = MatMul %h, %v : Nx1 x f32
          return %y
        }
        """),
        context,
    )
    assert context.notes == [
        "2 channels rescaled in 2 sweeps; largest weight of a channel to that of its layer 0.53 on average, now 1.00"
    ]


def test_a_calibrated_graph_is_refused() -> None:
    graph = Calibrate().run(two_layers("1.0", "4.0"), PassContext(calibration=[{"x": np.ones((1, 1), np.float32)}]))
    with pytest.raises(PassError, match="%x is calibrated, and its scale would change; run equalize-cross-layer be"):
        EqualizeCrossLayer().run(graph, PassContext())


def test_powers_of_two_that_would_leave_float32_are_an_error_that_names_the_layer() -> None:
    graph = parse("""
        graph @huge stage=float (%x: Nx1 x f32) {
          %w = const {value=f32 1x1 [3.4e38]} : 1x1 x f32
          %h = MatMul %x, %w : Nx1 x f32 loc("fc1")
          %v = const {value=f32 1x1 [1.15e38]} : 1x1 x f32
          %i = MatMul %h, %v : Nx1 x f32 loc("fc2")
          %u = const {value=f32 1x1 [3.4e38]} : 1x1 x f32
          %y = MatMul %i, %u : Nx1 x f32 loc("fc3")
          return %y
        }
    """)
    with pytest.raises(PassError, match=r'MatMul %i \(from node "fc2"\): .* leave float32; leave power-of-two out'):
        EqualizeCrossLayer(power_of_two=True).run(graph, PassContext())
    # The scales of the third root of 3.4 * 1.15 * 3.4; rounded, the second layer would take four times its weights.
    assert all(2.3e38 < w < 2.4e38 for w in constants(EqualizeCrossLayer().run(graph, PassContext())).values())


def test_the_option_is_read_and_printed() -> None:
    text = "equalize-cross-layer{power-of-two=true}"
    assert str(parse_pipeline(text)) == text
    with pytest.raises(PassError, match="option power-of-two=maybe: expected true or false"):
        parse_pipeline("equalize-cross-layer{power-of-two=maybe}")
