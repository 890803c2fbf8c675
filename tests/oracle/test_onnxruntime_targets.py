"""What legalize makes for the targets whose contract ONNX Runtime computes: whole models, and functions as tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from models import PATHS, compiled, labelled_images
from oracle.adversarial import activation_scales
from oracle.float32_graphs import F32, both
from oracle.graph_to_onnx import OnnxRuntime, graph_to_onnx

from qir.arrays import Array
from qir.backend import load_target
from qir.interval import Interval
from qir.ir import Op, Stage
from qir.ops.float_elementwise import HardSigmoid, HardSwish, LeakyRelu, PRelu, Sigmoid, Tanh
from qir.pass_manager import PassContext, integer_feeds
from qir.passes.pipelines import parse_pipeline
from qir.rewrite import GraphBuilder, map_values
from qir.types import S8, TensorType, affine

SAMPLES = 1000
COMPUTED = ["onnxruntime", "tensorrt", "x86-fbgemm"]  # qnnpack rounds its factors otherwise


@pytest.mark.parametrize("name", sorted(PATHS))
@pytest.mark.parametrize("target", COMPUTED)
def test_every_output_bit_of_whole_models(target: str, name: str) -> None:
    model = compiled(name, target)
    graph = model.program.graph
    feeds = integer_feeds(graph, {"x": labelled_images()[0][:SAMPLES]})
    ours = model.program.run_integer(feeds)["logits"]
    theirs = OnnxRuntime(graph_to_onnx(graph, model.typed)).run(feeds)["logits"]
    assert ours.shape == theirs.shape == (SAMPLES, 10)
    assert ours.dtype == theirs.dtype
    assert int((ours != theirs).sum()) == 0


@pytest.mark.parametrize("name", ["fm_cnn", "fm_mobile"])
@pytest.mark.parametrize("target", COMPUTED)
def test_every_output_bit_of_models_with_all_but_convolutions_in_reals(target: str, name: str) -> None:
    """Convolutions as QLinearConv; pooling, sums and matrix products between DequantizeLinear and QuantizeLinear.

    In reals these may round otherwise near ties, which the data of these models do not meet.
    """
    program = compiled(name, target).program
    feeds = integer_feeds(program.graph, {"x": labelled_images()[0][:SAMPLES]})
    model = graph_to_onnx(program.graph, in_reals=True)
    kinds = {node.op_type for node in model.graph.node}
    assert {"QLinearConv", "MatMul", "ReduceMean"} <= kinds
    assert not kinds & {"QGemm", "QLinearMatMul", "QLinearGlobalAveragePool"}
    ours = program.run_integer(feeds)["logits"]
    theirs = OnnxRuntime(model).run(feeds)["logits"]
    assert ours.shape == theirs.shape == (SAMPLES, 10)
    assert int((ours != theirs).sum()) == 0


FUNCTIONS: dict[str, tuple[type[Op], dict[str, Any]]] = {
    "sigmoid": (Sigmoid, {}),
    "tanh": (Tanh, {}),
    "hard swish": (HardSwish, {}),
    "hard sigmoid": (HardSigmoid, {"alpha": 0.2, "beta": 0.5}),
    "leaky relu": (LeakyRelu, {"alpha": 0.3}),
    "prelu": (PRelu, {}),
}


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize(("target", "zero", "out_zero"), [("onnxruntime", 7, -20), ("tensorrt", 0, 0)])
def test_functions(target: str, zero: int, out_zero: int, kind: str) -> None:
    """DequantizeLinear, the function, QuantizeLinear, for every value of the operand."""
    op_class, attributes = FUNCTIONS[kind]
    context, outputs = PassContext(load_target(target)), 0
    for scale in activation_scales(9, 30):
        for out_scale in (1 / 256, 1 / 128, 0.05, scale, float(F32(scale) * F32(0.7))):
            builder = GraphBuilder("case", Stage.TYPED)
            operands = [builder.input("x", TensorType((1, 3, 256), affine(S8, scale, zero)))]
            if op_class is PRelu:
                slopes = Array(np.array([[-0.25], [0.1], [0.7]], F32), "slopes")
                operands.append(builder.constant(slopes, TensorType((3, 1), affine(S8, 0.01))))
            y = builder.emit(op_class, operands, elements=[affine(S8, out_scale, out_zero)], name="y", **attributes)
            typed = map_values(builder.finish([y], ["y"]), lambda v: {"range": Interval(-1.0, 1.0)})
            fixed = parse_pipeline("legalize,range-analysis,insert-saturation").run(typed, context)
            feeds = {"x": np.broadcast_to(np.arange(-128, 128, dtype=np.int8), (1, 3, 256)).copy()}
            theirs = OnnxRuntime(graph_to_onnx(fixed, typed)).run(feeds)["y"]
            assert int((both(fixed, feeds) != theirs).sum()) == 0
            outputs += theirs.size
    assert outputs >= 10_000
