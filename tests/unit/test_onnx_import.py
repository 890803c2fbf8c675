"""ONNX import: what graphs come out, under which names, and how shapes fold around the open batch."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx_models import model, random

from qir.frontend.onnx_import import import_onnx
from qir.interpreter import interpret
from qir.ir import Graph
from qir.ops.float_elementwise import Clip
from qir.ops.movement import Reshape
from qir.parser import parse
from qir.types import S64
from qir.verifier import verify

ROOT = Path(__file__).parents[2]
FLOAT = TensorProto.FLOAT


def mnemonics(graph: Graph) -> list[str]:
    return [op.mnemonic for op in graph.ops if op.mnemonic != "const"]


# Whole models


@pytest.mark.parametrize("path", ["tests/data/fm_cnn.onnx", "tests/data/fm_mlp.onnx", "qir/data/fm_mobile.onnx"])
def test_models_compute_what_onnxruntime_does(path: str) -> None:
    graph = import_onnx(ROOT / path)
    verify(graph)
    assert graph.inputs[0].type.shape == ("N", 1, 28, 28)
    x = random(5, 1, 28, 28)
    (wanted,) = onnxruntime.InferenceSession(ROOT / path).run(None, {"x": x})
    # float32 sums of up to a thousand terms, taken in another order; the logits are of size 1 to 10.
    assert np.allclose(interpret(graph, {"x": x})["logits"], wanted, rtol=1e-4, atol=1e-5)


def test_text_of_an_imported_model_parses_back() -> None:
    source = model(
        "m (float[n, 2, 4] x) => (float[n, 2, 4] y) { a = Relu (x)  y = Clip (a, , six) }", six=np.float32(6)
    )
    source.graph.node[0].output[0] = source.graph.node[1].input[0] = "block/relu:0"
    graph = import_onnx(source)
    assert graph.ops[0].result.name == "block/relu:0"
    assert parse(str(graph)) == graph


def test_light_resnet50_weights_fold_to_constants() -> None:
    path = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / "light_resnet50.onnx"
    graph = import_onnx(path)
    counts = Counter(mnemonics(graph))
    assert (counts["Conv"], counts["BatchNormalization"], counts["Add"], counts["MatMul"]) == (53, 53, 16, 1)
    assert graph.macs() == 4_089_184_256


def test_ten_thousand_nodes_in_a_chain() -> None:
    nodes = [helper.make_node("Relu", [f"v{i}"], [f"v{i + 1}"]) for i in range(10_000)]
    x = helper.make_tensor_value_info("v0", FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("v10000", FLOAT, None)
    chain = helper.make_model(
        helper.make_graph(nodes, "chain", [x], [y]), opset_imports=[helper.make_opsetid("", 13)], ir_version=8
    )
    graph = import_onnx(chain)
    assert len(graph.ops) == 10_000
    assert graph.outputs[0].name == "v10000"


# Names, places, inputs


def test_names_and_locations_are_those_of_the_model() -> None:
    source = model("net (float[n, 2] x) => (float[n, 2] y) { hidden = Relu (x)  y = Tanh (hidden) }")
    source.graph.node[0].name = "first"
    graph = import_onnx(source)
    assert [(op.result.name, op.location) for op in graph.ops] == [("hidden", "first"), ("y", "y")]
    assert (graph.name, graph.output_names) == ("net", ("y",))
    assert import_onnx(source, name="other").name == "other"


def test_an_initializer_that_is_an_input_too_is_a_constant() -> None:
    graph = import_onnx(model("m (float[n, 2] x, float[2] c) => (float[n, 2] y) { y = Add (x, c) }", c=random(2)))
    assert [value.name for value in graph.inputs] == ["x"]


def test_a_constant_output_and_an_input_that_is_an_output() -> None:
    graph = import_onnx(model("m (float[2, 3] x) => (float[2, 3] x, int64[2] s) { s = Shape (x) }"))
    results = interpret(graph, {"x": random(2, 3)})
    assert results["s"].tolist() == [2, 3]
    assert results["x"].tolist() == random(2, 3).tolist()


def test_shapes_fix_or_open_what_the_model_leaves_open() -> None:
    source = model("m (float[n, c, 4] x) => (float[n, c, 4] y) { y = Relu (x) }")
    assert import_onnx(source, shapes={"x": ["N", 3, 4]}).inputs[0].type.shape == ("N", 3, 4)
    assert import_onnx(source, shapes={"x": [2, 3, 4]}).inputs[0].type.shape == (2, 3, 4)
    fixed = model("m (float[1, 3, 4] x) => (float[1, 3, 4] y) { y = Relu (x) }")
    assert import_onnx(fixed).inputs[0].type.shape == (1, 3, 4)
    assert import_onnx(fixed, shapes={"x": ["N", 3, 4]}).inputs[0].type.shape == ("N", 3, 4)


# Lowering


@pytest.mark.parametrize(
    ("body", "constants", "expected"),
    [
        ("y = GlobalAveragePool (x)", {}, ["ReduceMean"]),
        ("y = GlobalMaxPool (x)", {}, ["MaxPool"]),
        ("y = Identity (x)", {}, []),
        ("y = Dropout (x)", {}, []),
        ("y, mask = Dropout (x)", {}, []),
        ("y = Cast <to: int = 1> (x)", {}, []),
        ("y = Flatten (x)", {}, ["Reshape"]),
        ("y = Transpose <perm = [0, 1, 2, 3]> (x)", {}, []),
        ("y = Transpose <perm = [0, 3, 2, 1]> (x)", {}, ["Transpose"]),
        ("y = Concat <axis = 1> (x, x)", {}, ["Concat"]),
        ("y = Concat <axis = 1> (x)", {}, []),
        ("y, z = Split <axis = 1> (x)", {}, ["Slice", "Slice"]),
        ('y = Pad <mode = "reflect"> (x, p)', {"p": np.array([0, 0, 1, 1, 0, 0, 0, 1])}, ["Gather", "Gather"]),
        ("y = Pad (x, p)", {"p": np.array([0, 0, -1, 1, 0, 0, 0, 0])}, ["Slice", "Pad"]),
        ("y = Slice (x, s, e)", {"s": np.array([0, 0]), "e": np.array([2**63 - 1, 2**63 - 1])}, []),
        ("y = Slice (x, s, e)", {"s": np.array([0, -1]), "e": np.array([2**31 - 1, 9])}, ["Slice"]),
        ("y = Gather <axis = 1> (x, i)", {"i": np.array(-1)}, ["Gather"]),
        ("y = Clip (x)", {}, ["Clip"]),
        ("y = Sum (x, x, x)", {}, ["Add", "Add"]),
        ("y = Reshape (x, s)", {"s": np.array([0, -1])}, ["Reshape"]),
        ("y = Reshape (x, s)", {"s": np.array([-1, 64])}, ["Reshape"]),
        ("y = Reshape (x, s)", {"s": np.array([0, 4, 4, 4])}, []),
    ],
)
def test_what_an_operator_becomes(body: str, constants: dict[str, npt.NDArray[Any]], expected: list[str]) -> None:
    source = model(f"m (float[n, 4, 4, 4] x) => (float[] y) {{ {body} }}", opset=13, **constants)
    graph = import_onnx(source)
    verify(graph)
    assert mnemonics(graph) == expected
    assert graph.outputs[0].type.is_batched
    x = random(3, 4, 4, 4)
    del source.graph.output[0].type.tensor_type.shape.dim[:]
    (wanted,) = onnxruntime.InferenceSession(_untyped(source)).run(["y"], {"x": x})
    assert np.allclose(interpret(graph, {"x": x})["y"], wanted, rtol=1e-5, atol=1e-6)


def _untyped(source: onnx.ModelProto) -> bytes:
    """The model without shapes of its outputs, which the texts above do not state."""
    bare = onnx.ModelProto()
    bare.CopyFrom(source)
    for output in bare.graph.output:
        output.type.tensor_type.ClearField("shape")
    data: bytes = bare.SerializeToString()
    return data


@pytest.mark.parametrize("opset", [7, 12, 13])
def test_softmax_flattens_before_opset_13(opset: int) -> None:
    source = model("m (float[n, 2, 3] x) => (float[n, 2, 3] y) { y = Softmax <axis = 1> (x) }", opset=opset)
    x = random(2, 2, 3)
    found = interpret(import_onnx(source), {"x": x})["y"]
    axes = (1, 2) if opset < 13 else (1,)
    assert np.allclose(found.sum(axis=axes), 1, atol=1e-6)


def test_clip_takes_its_bounds_from_attributes_before_opset_11() -> None:
    source = model("m (float[n, 2] x) => (float[n, 2] y) { y = Clip <min = 0.0, max = 6.0> (x) }", opset=7)
    (op,) = import_onnx(source).ops
    assert isinstance(op, Clip)
    assert (op.minimum, op.maximum) == (0.0, 6.0)


@pytest.mark.parametrize("constant_b", [True, False])
@pytest.mark.parametrize("c", [None, (), (1,), (5,), (1, 5), (4, 1), (4, 5)])
def test_gemm(constant_b: bool, c: tuple[int, ...] | None) -> None:
    body = "y = Gemm <alpha = 0.5, beta = 2.0, transA = 1, transB = 1> (a, b" + (", c) }" if c is not None else ") }")
    inputs = "float[3, 4] a" if constant_b else "float[3, 4] a, float[5, 3] b"
    constants: dict[str, Any] = {} if c is None else {"c": random(*c, seed=2)}
    if constant_b:
        constants["b"] = random(5, 3)
    source = model(f"m ({inputs}) => (float[4, 5] y) {{ {body}", **constants)
    feeds = {"a": random(3, 4, seed=1)} | ({} if constant_b else {"b": random(5, 3)})
    (wanted,) = onnxruntime.InferenceSession(source.SerializeToString()).run(None, feeds)
    assert np.allclose(interpret(import_onnx(source), feeds)["y"], wanted, rtol=1e-5, atol=1e-6)


def test_argmax_gives_64_bit_integers() -> None:
    graph = import_onnx(model("m (float[n, 5] x) => (int64[n] y) { y = ArgMax <axis = 1, keepdims = 0> (x) }"))
    assert graph.outputs[0].type.element == S64
    assert interpret(graph, {"x": np.eye(5, dtype=np.float32)})["y"].tolist() == [0, 1, 2, 3, 4]


# Shape arithmetic, with and without the batch


@pytest.mark.parametrize(
    "body",
    [
        # x.view(x.size(0), -1), as exporters write it
        "s = Shape (x) n = Gather (s, zero) u = Unsqueeze (n, axes) "
        "t = Concat <axis = 0> (u, minus) y = Reshape (x, t)",
        "s = Shape (x) n = Slice (s, axes, one) t = Concat <axis = 0> (n, minus) y = Reshape (x, t)",
        "s = Shape <end = 1> (x) i = Cast <to: int = 6> (s) l = Cast <to: int = 7> (i) "
        "t = Concat <axis = 0> (l, minus) y = Reshape (x, t)",
        # the number of elements per sample, from the number of all
        "s = Shape <end = 1> (x) a = Size (x) z = Div (a, s) t = Concat <axis = 0> (s, z) y = Reshape (x, t)",
        "s = Shape (x) a = ReduceProd <keepdims = 1> (s) n = Slice (s, axes, one) z = Div (a, n) "
        "t = Concat <axis = 0> (n, z) y = Reshape (x, t)",
        "s = Shape <end = 1> (x) f = Constant <value_ints = [2]> () d = Mul (s, f) h = Div (d, f) q = Add (h, axes) "
        "r = Sub (q, axes) t = Concat <axis = 0> (r, minus) y = Reshape (x, t)",
        # what Expand's export does: a dimension of -1 is replaced
        "s = Shape <end = 1> (x) e = Equal (s, minus) w = Where (e, one, s) t = Concat <axis = 0> (w, minus) "
        "y = Reshape (x, t)",
        "s = Shape <end = 1> (x) q = Squeeze (s) u = Reshape (q, one) "
        "t = Concat <axis = 0> (u, minus) v = Identity (t) y = Reshape (x, v)",
    ],
)
def test_shapes_that_hold_the_batch_fold(body: str) -> None:
    source = model(
        f"m (float[n, 3, 2, 2] x) => (float[n, 12] y) {{ {body} }}",
        zero=np.array(0),
        one=np.array([1]),
        axes=np.array([0]),
        minus=np.array([-1]),
    )
    graph = import_onnx(source)
    (op,) = [op for op in graph.ops if op.mnemonic != "const"]
    assert isinstance(op, Reshape)
    assert op.shape == (12,)
    assert graph.outputs[0].type.shape == ("N", 12)
    assert mnemonics(import_onnx(source, shapes={"x": [4, 3, 2, 2]})) == ["Reshape"]
