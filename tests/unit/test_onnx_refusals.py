"""Every refusal of the importer names place, reason and mend; nothing outside the model's folder is read."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_models import model, random

from qir.errors import ImportModelError
from qir.frontend.onnx_import import import_onnx
from qir.interpreter import interpret

FLOAT = TensorProto.FLOAT


def refused(source: str | Path | onnx.ModelProto, **options: Any) -> str:
    with pytest.raises(ImportModelError) as caught:
        import_onnx(source, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("s = Shape (x) y = Mul (s, s)", "computes N * N from the open batch N"),
        ("s = Shape <end = 1> (x) y = Add (s, one)", "computes N + 1"),
        ("s = Shape <end = 1> (x) y = Sub (one, s)", "computes 1 - N"),
        ("s = Shape <end = 1> (x) y = Div (s, two)", "computes N / 2"),
        ("s = Shape <end = 1> (x) y = Equal (s, one)", "computes N == 1"),
        ("s = Shape (x) y = ConstantOfShape (s)", "which only Add, Cast, Concat"),
        ("s = Shape (x) y = Cast <to: int = 1> (s)", "casts a shape that holds the open batch N"),
        ("s = Shape (x) y = Identity (s)", '"y" depends on the open batch N'),
        (
            "a = Size (x) s = Reshape (a, one) y = Reshape (x, s)",
            "the dimension 6*N moves elements into the open batch N",
        ),
        ("y = Reshape (x, four)", "takes the open batch N of Nx6 apart"),
        ("y = Reshape (x, six)", "takes the open batch N of Nx6 apart"),
        ("y = Flatten <axis = 2> (x)", "mixes the open batch N"),
        ("y = Flatten <axis = 0> (x)", "mixes the open batch N"),
        ("y = Unsqueeze (x, zero)", "does not keep the open batch N in front"),
        ("y = Transpose (x)", "moves the open batch N"),
        ("y = ReduceMean <axes = [0]> (x)", "cannot be the open batch N"),
        ("y = Softmax <axis = 0> (x)", "cannot be the open batch N"),
        ("y = Concat <axis = 0> (x, x)", "cannot be the open batch N"),
        ("y = Slice (x, zero, one)", "cannot be the open batch N"),
        ("y = Slice (x, zero, minus)", "cannot be the open batch N"),
        ("y = Gather (x, zero)", "cannot be the open batch N"),
        ("y = Pad (x, pads)", "the open batch N cannot be padded"),
    ],
)
def test_what_would_mix_the_batch_is_refused(body: str, reason: str) -> None:
    source = model(
        f"m (float[n, 6] x) => (float[] y) {{ {body} }}",
        zero=np.array([0]),
        one=np.array([1]),
        two=np.array([2]),
        minus=np.array([-1]),
        four=np.array([-1, 4]),
        six=np.array([1, -1, 6]),
        pads=np.array([1, 0, 0, 0]),
    )
    message = refused(source)
    assert reason in message
    assert 'node "' in message or 'tensor "' in message or "depends on" in message


# External data


def save_external(folder: Path, location: str = "weights.bin") -> Path:
    """A model whose weight lies in `location`; the file is written, the model's reference to it is not checked."""
    source = model("m (float[n, 3] x) => (float[n, 3] y) { y = Mul (x, w) }")
    tensor = source.graph.initializer.add()
    tensor.name, tensor.data_type, tensor.data_location = "w", FLOAT, TensorProto.EXTERNAL
    tensor.dims.append(3)
    for key, value in (("location", location), ("offset", "4"), ("length", "12")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    path = folder / "model.onnx"
    path.write_bytes(source.SerializeToString())
    np.array([9, 1, 2, 3], np.float32).tofile(folder / "weights.bin")
    return path


def test_external_data_are_read_beside_the_model(tmp_path: Path) -> None:
    graph = import_onnx(save_external(tmp_path))
    assert interpret(graph, {"x": np.ones((1, 3), np.float32)})["y"].tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(
    "location", ["../weights.bin", "/etc/hostname", "sub/../../weights.bin", "C:\\weights.bin", "..\\weights.bin", ""]
)
def test_external_data_outside_the_folder_are_not_read(tmp_path: Path, location: str) -> None:
    message = refused(save_external(tmp_path, location))
    assert f'tensor "w": "{location}" lies outside the model\'s folder' in message


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    path = save_external(inner)
    (inner / "weights.bin").rename(tmp_path / "weights.bin")
    (inner / "weights.bin").symlink_to(tmp_path / "weights.bin")
    assert "lies outside the model's folder" in refused(path)


def test_a_missing_external_file_is_named(tmp_path: Path) -> None:
    path = save_external(tmp_path)
    (tmp_path / "weights.bin").unlink()
    assert 'tensor "w": the file "weights.bin" is missing' in refused(path)
    (tmp_path / "weights.bin").mkdir()
    assert '"weights.bin" in' in refused(path)


def test_a_short_external_file_is_refused(tmp_path: Path) -> None:
    path = save_external(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"\0" * 12)
    assert 'tensor "w" takes 12 bytes at offset 4 of "weights.bin"' in refused(path)


def test_a_model_object_has_no_folder(tmp_path: Path) -> None:
    source = onnx.load(save_external(tmp_path), load_external_data=False)
    assert 'tensor "w" has external data ("weights.bin"), but a model object has no folder' in refused(source)


# Files and models that are not what they should be


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    data = model("m (float[n, 3] x) => (float[n, 3] y) { y = Mul (x, w) }", w=random(3)).SerializeToString()
    path = tmp_path / "cut.onnx"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        message = refused(path)
        assert message.startswith(f"{path}: ")
        assert "cut short" in message


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.onnx"
    text.write_text("this is not a model", encoding="utf-8")
    assert "is not an ONNX model" in refused(text)
    assert "cannot be read: No such file" in refused(tmp_path / "absent.onnx")
    assert "cannot be read: Is a directory" in refused(tmp_path)
    assert "is not an ONNX model" in refused(onnx.ModelProto())


def test_unknown_operators_are_named_with_those_that_are_known() -> None:
    source = model("m (float[n, 2] x) => (float[n, 2] y) { y = Erf (x) }")
    source.graph.node[0].name = "gelu"
    message = refused(source)
    assert 'node "gelu": Erf: this operator is not supported' in message
    assert "supported are Add, ArgMax, AveragePool" in message


def test_operators_with_graphs_inside_are_refused() -> None:
    branch = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["r"])], "b", [], [helper.make_tensor_value_info("r", FLOAT, None)]
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    inputs = [
        helper.make_tensor_value_info("x", FLOAT, [2]),
        helper.make_tensor_value_info("c", TensorProto.INT64, [1]),
    ]
    output = helper.make_tensor_value_info("y", FLOAT, [2])
    source = helper.make_model(
        helper.make_graph([node], "m", inputs, [output]), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    assert 'node "y": If: operators with graphs inside are not supported' in refused(source)


def test_foreign_operators_are_named() -> None:
    source = model("m (float[n, 2] x) => (float[n, 2] y) { y = com.example.Fused (x) }")
    assert 'node "y": operator com.example.Fused is foreign' in refused(source)


@pytest.mark.parametrize("opset", [6, 999])
def test_operator_sets_out_of_reach_are_refused(opset: int) -> None:
    newest = onnx.defs.onnx_opset_version()
    source = model("m (float[n, 2] x) => (float[n, 2] y) { y = Relu (x) }")
    source.opset_import[0].version = opset
    assert f"uses ONNX operator set {opset}, known are 7 to {newest}" in refused(source)


def test_an_operator_newer_than_the_operator_set_is_refused() -> None:
    message = refused(model("m (float[n, 2] x) => (float[n, 2] y) { y = HardSwish (x) }", opset=13))
    assert 'node "y": No Op registered for HardSwish' in message


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weight = random(3)
    weight[1] = bad
    source = model("m (float[n, 3] x) => (float[n, 3] y) { y = Mul (x, w) }", w=weight)
    source.graph.node[0].name = "scale"
    assert 'node "scale": Mul: tensor "w" holds NaN or infinity (1 of 3 elements)' in refused(source)


@pytest.mark.parametrize(("kind", "name"), [("float16", "FLOAT16"), ("double", "DOUBLE"), ("bool", "BOOL")])
def test_only_float32_and_integers_are_computed_with(kind: str, name: str) -> None:
    message = refused(model(f"m ({kind}[n, 3] x) => ({kind}[n, 3] y) {{ y = Identity (x) }}"))
    assert f'input "x": elements of type {name} are not supported' in message
    assert "export the model in float32" in message


def test_half_precision_weights_follow_their_cast() -> None:
    body = "m (float[n, 3] x) => (float[n, 3] y) { f = Cast <to: int = 1> (w) y = Mul (x, f) }"
    graph = import_onnx(model(body, w=np.array([1, 2, 3], np.float16)))
    assert interpret(graph, {"x": np.ones((1, 3), np.float32)})["y"].tolist() == [[1, 2, 3]]
    body = "m (float[n, 3] x) => (float[n, 3] y) { y = Mul (x, w) }"
    assert 'tensor "w": elements of type FLOAT16' in refused(model(body, w=np.array([1, 2, 3], np.float16)))


def test_open_dimensions_are_asked_for_by_name() -> None:
    source = model("m (float[n, 3, h, w] x, float[n, t] z) => (float[n, 3, h, w] y) { y = Relu (x) }")
    message = refused(source)
    assert 'input "x" (Nx3x?x?) leaves dimension 2 (h), 3 (w) open' in message
    assert 'input "z" (Nx?) leaves dimension 1 (t) open' in message
    assert "--shape x=Nx3x?x? --shape z=Nx?" in message
    assert 'shapes={"x": ["N", 3, ?, ?], "z": ["N", ?]}' in message


def test_an_input_without_a_shape_is_asked_for() -> None:
    source = model("m (float[n, 3] x) => (float[n, 3] y) { y = Relu (x) }")
    source.graph.input[0].type.tensor_type.ClearField("shape")
    assert 'input "x" has no shape at all' in refused(source)
    assert import_onnx(source, shapes={"x": ["N", 5]}).inputs[0].type.shape == ("N", 5)


def test_two_names_of_leading_dimensions_are_asked_about() -> None:
    source = model("m (float[n, 3] x, float[k, 3] z) => (float[n, 3] y) { y = Add (x, z) }")
    assert 'inputs "x" (n), "z" (k) are open under different names' in refused(source)
    shapes: dict[str, list[int | str]] = {"x": ["N", 3], "z": ["N", 3]}
    assert import_onnx(source, shapes=shapes).outputs[0].type.shape == ("N", 3)


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ({"z": [1, 3]}, 'shapes names "z", which is no input; the inputs are x'),
        ({"x": [1, 4]}, 'shapes gives input "x" 1x4, the model states Nx3'),
        ({"x": [1, 3, 1]}, 'shapes gives input "x" 1x3x1, the model states Nx3'),
        ({"x": [1, "N"]}, "the dimension 'N'; it takes positive integers, and N in front"),
        ({"x": [0, 3]}, "the dimension 0"),
        ({"x": ["batch", 3]}, "the dimension 'batch'"),
    ],
)
def test_given_shapes_must_fit(shapes: dict[str, list[int | str]], reason: str) -> None:
    assert reason in refused(model("m (float[n, 3] x) => (float[n, 3] y) { y = Relu (x) }"), shapes=shapes)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = Relu (absent)", 'node "y": its input "absent" is produced by no earlier node'),
        ("y = Relu (x) y = Tanh (x)", 'node "y": its output "y" exists already'),
        ("z = Relu (x)", 'output "y" is produced by no node'),
        ("y = Conv (x)", "input size 1 not in range"),
        ("y = Relu <slope = 3> (x)", "Unrecognized attribute: slope"),
        ("y = Conv (x, w)", "takes [N, C, W] or [N, C, H, W] here, not an input of shape Nx2"),
        ("y = MatMul (x, w)", "do not multiply"),
        ("y = Add (x, w)", "do not broadcast"),
        ("y = Reshape (x, i)", 'its shape "i" is computed at run time; it must be a constant'),
        ("y = Gather (x, i)", 'its indices "i" is computed at run time'),
        ("y = ArgMax <axis = 5> (x)", "axis 5 is outside a tensor of rank 2"),
        ("y, m = Dropout (x) y2 = Cast <to: int = 1> (m)", "its second output, the mask, is not supported"),
        ("y = Pad (x, p, inf)", "it pads with inf"),
        ("y = Add (i, i)", "holds plain integers (s64); cast it to f32 first"),
        ("y = Cast <to: int = 10> (x)", "elements of type FLOAT16 are not supported"),
        ("y = PRelu (c, s)", "its slope of shape 3x2 does not broadcast to the input's 1x2"),
    ],
)
def test_nodes_that_do_not_fit_are_named(body: str, reason: str) -> None:
    source = model(
        f"m (float[n, 2] x, int64[n] i, float[1, 2] c) => (float[] y) {{ {body} }}",
        w=random(5, 7),
        p=np.array([0, 1, 0, 0]),
        inf=np.float32(np.inf),
        s=random(3, 2),
    )
    message = refused(source)
    assert reason in message
    assert message.startswith("the model: ")
    assert message.count("\n") == 0


def test_training_mode_is_refused() -> None:
    statistics: dict[str, Any] = {name: random(2) for name in "sbmv"}
    node = "y, a, c = BatchNormalization <training_mode = 1> (x, s, b, m, v)"
    body = f"m (float[n, 2, 4] x) => (float[n, 2, 4] y) {{ {node} }}"
    assert "normalizes by the statistics of its batch (training mode)" in refused(model(body, **statistics))


def test_a_malformed_tensor_is_named() -> None:
    source = model("m (float[n, 3] x) => (float[n, 3] y) { y = Mul (x, w) }", w=random(3))
    source.graph.initializer[0].raw_data = b"\0" * 7
    assert 'tensor "w" is malformed' in refused(source)
    source.graph.initializer[0].dims[0] = -3
    assert 'tensor "w" has negative dimensions [-3]' in refused(source)


def test_sparse_weights_are_refused() -> None:
    source = model("m (float[n, 3] x) => (float[n, 3] y) { y = Mul (x, w) }")
    values, indices = numpy_helper.from_array(random(1), "w"), numpy_helper.from_array(np.array([1]))
    source.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [3]))
    assert 'tensor "w" is sparse' in refused(source)


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
def test_padding_that_runtimes_read_differently_is_refused(mode: str) -> None:
    body = f'y = MaxPool <kernel_shape = [2], dilations = [2], auto_pad = "{mode}"> (x)'
    message = refused(model(f"m (float[n, 2, 9] x) => (float[] y) {{ {body} }}"))
    assert f"runtimes read its auto_pad {mode} in different ways" in message
