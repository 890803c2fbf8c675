"""Input that does not fit: exit status 2, one message that names place and reason, and nothing written."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_models import model, random

from qir.cli import main

MODEL = "g (float[N, 4] x) => (float[N, 3] y) { h = Gemm(x, w, b) y = Relu(h) }"
WEIGHTS: dict[str, Any] = {"w": random(4, 3, seed=1), "b": random(3, seed=2)}
SAMPLES: dict[str, Any] = {"x": random(16, 4)}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a model, calibration samples, and a compiled program."""
    monkeypatch.chdir(tmp_path)
    onnx.save(model(MODEL, **WEIGHTS), "model.onnx")
    np.savez("calib.npz", **SAMPLES)
    return tmp_path


def _files(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def _refused(command: str, words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail, leave every file as it was, and say all of `words` ("a ... b") in this order."""
    before = _files(Path())
    capsys.readouterr()
    assert main(command.split()) == 2
    written, message = capsys.readouterr()
    assert (written, message[:5], message.count("\nqir: ")) == ("", "qir: ", 0)
    assert re.search(".*".join(map(re.escape, words.split(" ... "))), message, re.DOTALL), message
    assert _files(Path()) == before
    return message


def _run(command: str) -> None:
    assert main(command.split()) == 0


COMPILE = "compile model.onnx --target arm-neon --calibration calib.npz -o build --dump-ir dumps"


# Models


def _truncate() -> None:
    Path("model.onnx").write_bytes(Path("model.onnx").read_bytes()[:-30])


def _unknown_op() -> None:
    made = model("g (float[N, 4] x) => (float[N, 4] y) { y = Erf(x) }")
    made.graph.node[0].name = "first"
    onnx.save(made, "model.onnx")


def _foreign_op() -> None:
    made = model(MODEL, **WEIGHTS)
    made.graph.node[1].domain = "com.example"
    onnx.save(made, "model.onnx")


def _opset(version: int) -> Callable[[], None]:
    def break_it() -> None:
        made = model(MODEL, **WEIGHTS)
        made.opset_import[0].version = version
        onnx.save(made, "model.onnx")

    return break_it


def _external(location: str) -> Callable[[], None]:
    """The weights in a file beside the model, which says that they lie at `location`."""

    def break_it() -> None:
        made = model(MODEL, **WEIGHTS)
        tensor = made.graph.initializer[0]
        Path("w.bin").write_bytes(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", location), ("length", "48")):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
        Path("model.onnx").write_bytes(made.SerializeToString())

    return break_it


def _weight(value: float) -> Callable[[], None]:
    def break_it() -> None:
        weights = {**WEIGHTS, "w": WEIGHTS["w"].copy()}
        weights["w"][1, 1] = value
        onnx.save(model(MODEL, **weights), "model.onnx")

    return break_it


def _open_shape() -> None:
    onnx.save(model("g (float[N, C] x) => (float[N, C] y) { y = Relu(x) }"), "model.onnx")


BAD_MODELS: dict[str, tuple[Callable[[], object], str]] = {
    "missing": (lambda: Path("model.onnx").unlink(), "model.onnx: cannot be read: No such file"),
    "truncated": (_truncate, "model.onnx: is not an ONNX model, or is cut short"),
    "empty": (lambda: Path("model.onnx").write_bytes(b""), "model.onnx: is not an ONNX model, or is cut short"),
    "text": (lambda: Path("model.onnx").write_text("not a model\n"), "model.onnx: is not an ONNX model"),
    "unknown op": (_unknown_op, 'node "first": Erf: this operator is not supported ... supported are Add, '),
    "foreign op": (_foreign_op, 'node "y": operator com.example.Relu is foreign'),
    "opset too new": (_opset(999), "uses ONNX operator set 999, known are 7 to"),
    "opset too old": (_opset(3), "uses ONNX operator set 3, known are 7 to"),
    "no external file": (_external("gone.bin"), 'tensor "w": the file "gone.bin" is missing'),
    "external file outside": (_external("../w.bin"), 'tensor "w": "../w.bin" lies outside the model\'s folder'),
    "external file absolute": (_external("/etc/passwd"), 'tensor "w": "/etc/passwd" lies outside the model\'s folder'),
    "NaN": (_weight(np.nan), 'tensor "w" holds NaN or infinity (1 of 12 elements)'),
    "infinity": (_weight(-np.inf), 'tensor "w" holds NaN or infinity (1 of 12 elements)'),
    "open shape": (_open_shape, '"x" ... C'),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_model(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    break_it, words = BAD_MODELS[name]
    break_it()
    _refused(COMPILE, words, capsys)


def test_weights_beside_the_model_are_read(here: Path) -> None:
    """The good case of the external files above, so that those fail for the stated reason alone."""
    _external("w.bin")()
    _run(COMPILE)


# Calibration data


def _samples(**arrays: Any) -> Callable[[], None]:
    return lambda: np.savez("calib.npz", **arrays)


def _with(value: float) -> Callable[[], None]:
    samples = SAMPLES["x"].copy()
    samples[3, 2] = value
    return _samples(x=samples)


def _folder() -> None:
    Path("calib.npz").unlink()
    Path("calib.npz").mkdir()


def _bare_array() -> None:
    np.save("calib.npy", SAMPLES["x"])
    Path("calib.npy").rename("calib.npz")


def _cut_short() -> None:
    Path("calib.npz").write_bytes(Path("calib.npz").read_bytes()[:100])


BAD_SAMPLES: dict[str, tuple[Callable[[], object], str]] = {
    "missing": (lambda: Path("calib.npz").unlink(), "calibration data: cannot read calib.npz: No such file"),
    "a folder": (_folder, "cannot read calib.npz: Is a directory"),
    "not npz": (lambda: Path("calib.npz").write_text("x"), "calib.npz is no .npz file of plain arrays"),
    "npy": (_bare_array, "calib.npz is no .npz file"),
    "cut short": (_cut_short, "calib.npz is no .npz file of plain arrays, or is cut short"),
    "objects": (_samples(x=[None, {}]), "calib.npz is no .npz file of plain arrays"),
    "wrong name": (_samples(y=SAMPLES["x"]), "the inputs are ['x']; missing ['x'], unknown ['y']"),
    "one name too many": (_samples(x=SAMPLES["x"], y=SAMPLES["x"]), "missing [], unknown ['y']"),
    "wrong shape": (_samples(x=random(16, 5)), "input 'x' has shape 16x5, expected Nx4"),
    "wrong rank": (_samples(x=random(4)), "input 'x' has shape 4, expected Nx4"),
    "a number": (_samples(x=1.0), "input 'x' has shape (), expected Nx4"),
    "texts": (_samples(x=[["a", "b", "c", "d"]]), "input 'x' is of <U1, expected float32"),
    "complex": (_samples(x=SAMPLES["x"] * 1j), "input 'x' is of complex64, expected float32"),
    "NaN": (_with(np.nan), "input 'x' holds NaN or infinity"),
    "infinity": (_with(np.inf), "input 'x' holds NaN or infinity"),
    "no samples": (_samples(x=random(0, 4)), "calibration data is empty"),
    "no arrays": (_samples(), "missing ['x'], unknown []"),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_calibration(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    break_it, words = BAD_SAMPLES[name]
    break_it()
    _refused(COMPILE, words, capsys)


def test_no_calibration(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = _refused("compile model.onnx --target arm-neon -o build", "there is no calibration data", capsys)
    assert "--calibration" in message
    assert "pass calibrate failed" in message
    assert "passes done: fold-constants" in message


@pytest.mark.parametrize(
    ("shapes", "arrays", "words"),
    [
        ("--shape x=3x4", {"x": random(16, 4)}, "'x' holds 16 samples, and the graph takes exactly 3 at a time"),
        ("--shape x=3x4", {"x": random(3, 5)}, "input 'x' has shape 3x5, expected 3x4"),
        ("--shape x=3x5", {"x": random(3, 5)}, "model.onnx: ... x"),
        ("--shape z=3x5", {"x": random(3, 4)}, 'shapes names "z", which is no input; the inputs are x'),
    ],
)
def test_fixed_batch(
    shapes: str, arrays: dict[str, Any], words: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez("calib.npz", **arrays)
    _refused(f"{COMPILE} {shapes}", words, capsys)


def test_inputs_with_different_numbers_of_samples(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(model("g (float[1, 4] a, float[1, 4] b) => (float[1, 4] y) { y = Add(a, b) }"), "model.onnx")
    np.savez("calib.npz", a=random(3, 4), b=random(2, 4))
    _refused(COMPILE, "different numbers of samples; in batches: 'a' 3, 'b' 2", capsys)


# Targets, pipelines and places


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (COMPILE.replace("arm-neon", "arm-nean"), "unknown target 'arm-nean'; there are: arm-neon"),
        (COMPILE.replace("arm-neon", "gone.toml"), "cannot read target gone.toml: No such file"),
        (COMPILE.replace("arm-neon", "bad.toml"), "bad.toml:1: description: this field is missing"),
        (COMPILE.replace("arm-neon", "own.toml"), "own.toml:5: accumulator.bits: 9 bits hold no sums of activations"),
        ("targets own.toml", "own.toml:5: accumulator.bits: 9 bits hold no sums of activations of 16 bits"),
        ("targets child.toml", "own.toml:5: accumulator.bits: 9 bits hold no sums of activations of 16 bits"),
        ("targets arm-nean", "unknown target 'arm-nean'"),
        ("targets arm-nean --check", "unknown target 'arm-nean'"),
        ("targets --check", "--check is of one target; name it, or give the path of its .toml file"),
        ("opt model.onnx --passes canonicalize --target arm-nean", "unknown target 'arm-nean'"),
        ("opt model.onnx --passes canonicalise", "unknown pass 'canonicalise'; there are: "),
        ("opt model.onnx --passes canonicalize{fast=true}", "pass canonicalize has no option 'fast'"),
        ("opt model.onnx --passes canonicalize,", 'expected "name{option=value},..."'),
        ("opt model.onnx --passes legalize --target arm-neon", "takes stage typed, the graph is at float"),
        (f"{COMPILE} --passes canonicalize", "the pipeline ended at stage float, a program needs stage fixed"),
        ("opt gone.qir --passes canonicalize", "cannot read gone.qir: No such file"),
        ("opt binary.qir --passes canonicalize", "cannot read binary.qir: it is not UTF-8 text"),
        ("opt text.qir --passes canonicalize --shape x=3x4", "--shape is for ONNX models"),
        ("run gone --inputs calib.npz -o y.npz", "cannot read gone/graph.qir: No such file"),
        ("plan gone", "cannot read gone/graph.qir"),
        ("check gone", "cannot read gone: No such file"),
    ],
)
def test_what_is_named_must_exist(command: str, words: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.toml").write_text('name = "bad"\n')
    head = 'name = "{0}"\ndescription = "{0}"\ninherits = "{1}"\n'
    Path("own.toml").write_text(head.format("own", "dsp16") + "[accumulator]\nbits = 9\n")
    Path("child.toml").write_text(head.format("child", "own.toml"))
    Path("binary.qir").write_bytes(b"\xff\xfe\x00")
    Path("text.qir").write_text("graph @g stage=float (%x: N x f32) {\n  return %x\n}\n")
    _refused(command, words, capsys)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (COMPILE.replace("-o build", "-o file/build"), "cannot write file/build: "),
        (COMPILE.replace("-o build", "-o file"), "file exists and holds more than qir output"),
        (COMPILE.replace("-o build", "-o full"), "full exists and holds more than qir output"),
        (COMPILE.replace("--dump-ir dumps", "--dump-ir full"), "full exists and holds more than qir output"),
        (COMPILE.replace("--dump-ir dumps", "--dump-ir file/dumps"), "cannot write file/dumps: "),
        (COMPILE.replace("--dump-ir dumps", "--dump-ir build/dumps"), "--dump-ir build/dumps lie in each other"),
        ("demo -o file/demo", "cannot write file/demo: "),
        ("opt model.onnx --passes canonicalize -o file/out.qir", "cannot write file/out.qir: Not a directory"),
        ("opt model.onnx --passes canonicalize -o nowhere/out.qir", "cannot write nowhere/out.qir: No such file"),
    ],
)
def test_places_that_cannot_be_written(
    command: str, words: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").write_text("in the way\n")
    Path("full/inner").mkdir(parents=True)
    Path("full/inner/precious.txt").write_text("keep me\n")
    Path("full/graph.qir").write_text("\n")
    _refused(command, words, capsys)


# Texts and sidecars

TEXT = """graph @g stage=float (%x: Nx4 x f32) {
  %y = Relu %x : Nx4 x f32
  return %y
}
"""


@pytest.mark.parametrize(
    ("old", "new", "place", "words"),
    [
        ("Relu %x", "Relu %z", "2:13", "%z is used before it is defined"),
        ("Relu", "Rely", "2:8", "unknown op 'Rely'"),
        ("stage=float", "stage=fluid", "1:16", "unknown stage 'fluid'; the stages are float, ranged, typed, fixed"),
        ("Nx4 x f32) {", "Nx4 x f33) {", "1:33", "expected an element type such as f32, s8 or u4, found 'f33'"),
        ("%y = Relu", "%y = Relu ?", "2:13", "unexpected character '?'"),
        ("return %y\n}\n", "return %y\n", "4:1", "expected ',', found 'end of text'"),
        ("Relu %x :", "Relu %x {alpha=1.0} :", "2:17", "Relu has no attribute 'alpha'; it has: none"),
        (TEXT, "", "1:1", "expected 'graph', found 'end of text'"),
    ],
)
@pytest.mark.parametrize("command", ["opt graph.qir --passes canonicalize", "check graph.qir"])
def test_malformed_text_is_placed(
    command: str, old: str, new: str, place: str, words: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("graph.qir").write_text(TEXT.replace(old, new))
    _refused(command, f"graph.qir:{place}: ... {words}", capsys)


@pytest.mark.parametrize("command", ["opt graph.qir --passes canonicalize", "check graph.qir"])
def test_illegal_graph_lists_every_finding(command: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = TEXT.replace("%y = Relu %x : Nx4", "%y = Relu %x : Nx5").replace("(%x: Nx4 x f32)", "(%x: Nx4 x s8<0.5>)")
    Path("graph.qir").write_text(text)
    message = _refused(command, "graph @g is not legal, 2 finding(s): ... %x: a quantized type ... Relu %y", capsys)
    assert "has shape Nx5, the op makes Nx4" in message


@pytest.fixture
def build(here: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A compiled program whose weights are large enough for the sidecar."""
    wide: dict[str, Any] = {"w": random(4, 30, seed=1), "b": random(30, seed=2)}
    onnx.save(model(MODEL.replace("N, 3", "N, 30"), **wide), "model.onnx")
    _run("compile model.onnx --target arm-neon --calibration calib.npz -o build")
    return here / "build"


READERS = [
    "check build",
    "plan build",
    "run build --inputs calib.npz -o y.npz",
    "opt build/graph.qir --passes legalize",
]


@pytest.mark.parametrize("command", READERS)
def test_changed_sidecar(command: str, build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sidecar = build / "weights.safetensors"
    data = bytearray(sidecar.read_bytes())
    data[-1] ^= 1
    sidecar.write_bytes(data)
    words = "graph.qir: ... : resource @w: the sidecar's array has hash ... , the text states"
    _refused(command, words, capsys)


@pytest.mark.parametrize("command", READERS)
def test_missing_sidecar(command: str, build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (build / "weights.safetensors").unlink()
    _refused(command, "its sidecar build/weights.safetensors is missing", capsys)


def test_truncated_sidecar(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sidecar = build / "weights.safetensors"
    sidecar.write_bytes(sidecar.read_bytes()[:20])
    _refused("check build", "build/weights.safetensors: not a readable safetensors file", capsys)


def test_sidecar_outside_the_folder(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (build / "graph.qir").read_text()
    (build / "graph.qir").write_text(text.replace('"weights.safetensors"', '"../weights.safetensors"'))
    _refused("check build", "the sidecar '../weights.safetensors' must lie beside the text", capsys)


@pytest.mark.parametrize("command", READERS[:3])
def test_edited_facts_are_refused(command: str, build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (build / "graph.qir").read_text()
    edited = re.sub(r"partial in \[-?\d+, ", "partial in [0, ", text)
    assert edited != text
    (build / "graph.qir").write_text(edited)
    _refused(command, "graph @g is not legal ... states partial sums in [0, ... is what is proved", capsys)


def test_range_analysis_mends_edited_facts(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the error above advises is possible: `opt` takes a graph whose facts do not hold yet."""
    text = (build / "graph.qir").read_text()
    (build / "graph.qir").write_text(re.sub(r"partial in \[-?\d+, ", "partial in [0, ", text))
    _run("opt build/graph.qir --passes range-analysis -o mended.qir")
    assert Path("mended.qir").read_text().split("resources")[0] == text.split("resources")[0]


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"z": random(2, 4)}, "the inputs are ['x']; missing ['x'], unknown ['z']"),
        ({"x": random(2, 5)}, "input 'x' has shape 2x5, expected Nx4"),
        ({"x": np.full((2, 4), np.nan, np.float32)}, "input 'x' holds NaN or infinity"),
        ({"x": np.full((2, 4), 300)}, "input 'x' spans [300, 300], beyond its type's [-128, 127]"),
    ],
)
@pytest.mark.parametrize("integer", ["", "--integer"])
def test_run_refuses(
    arrays: dict[str, Any], words: str, integer: str, build: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez("x.npz", **arrays)
    _refused(f"run build --inputs x.npz -o y.npz {integer}", words, capsys)


def test_run_cannot_write(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _refused("run build --inputs calib.npz -o nowhere/y.npz", "cannot write nowhere/y.npz: No such file", capsys)


# The command line itself


@pytest.mark.parametrize(
    "command",
    ["", "frobnicate", "compile model.onnx", f"{COMPILE} --fast", f"{COMPILE} --shape x=axb", f"{COMPILE} --shape 3x4"],
)
def test_malformed_command_line(command: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = _files(here)
    with pytest.raises(SystemExit) as stop:
        main(command.split())
    assert stop.value.code == 2
    assert "usage: qir" in capsys.readouterr().err
    assert _files(here) == before
