"""The commands: what they print, what they write, and how they end."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_models import model, random

import qir
from qir import cli
from qir.cli import main
from qir.demo import run_demo
from qir.feeds import join_samples, read_npz, split_samples, write_npz
from qir.pass_manager import no_progress
from qir.report import pass_table, progress_bar

ROOT = Path(__file__).parents[2]
TEXT = """g (float[N, 1, 8, 8] x) => (float[N, 3] y) {
    h = Conv(x, w, b) r = Relu(h) p = GlobalAveragePool(r) y = Flatten(p)
}"""
WEIGHTS: dict[str, Any] = {"w": random(3, 1, 5, 5, seed=1), "b": random(3, seed=2)}
SAMPLES = random(70, 1, 8, 8)
COMPILE = "compile model.onnx --target arm-neon --calibration calib.npz -o build"


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "import sys; from qir.cli import main; sys.exit(main())", *arguments]


def _run(command: str) -> None:
    assert main(command.split()) == 0


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a model and samples."""
    monkeypatch.chdir(tmp_path)
    onnx.save(model(TEXT, **WEIGHTS), "model.onnx")
    np.savez("calib.npz", x=SAMPLES)
    return tmp_path


@pytest.fixture
def build(here: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The compiled program."""
    _run(COMPILE)
    capsys.readouterr()
    return here / "build"


def test_compile_says_what_happened_and_writes_the_program(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _run(f"{COMPILE} --dump-ir dumps")
    out, err = capsys.readouterr()
    lines = out.splitlines()
    names = [p.name for p in qir.default_pipeline()]
    assert [line.split()[0] for line in lines[1 : 1 + len(names)]] == names
    assert "1 activations fused" in lines[1 + names.index("fuse-activation")]
    assert lines[-4].split()[:4] == ["weights", "312", "bytes", "(0.3"]
    assert lines[-3].split() == ["work", "1,200", "multiply-accumulates", "a", "sample"]
    assert (lines[-2].split(), lines[-1].split()) == (["program", "build"], ["IR", "dumps", "dumps"])
    assert err == ""
    assert sorted(p.name for p in Path("build").iterdir()) == ["certificate.json", "graph.qir", "weights.safetensors"]
    texts = sorted(p.name for p in Path("dumps").glob("*.qir"))
    assert texts == [f"{i:02d}_{n}.qir" for i, n in enumerate(["import", *names])]
    expected = qir.compile("model.onnx", "arm-neon", [{"x": SAMPLES}])
    assert qir.load("build").graph == expected.graph
    assert qir.read_graph(Path("dumps") / texts[-1]) == expected.graph


def test_compile_replaces_what_it_wrote_before(build: Path) -> None:
    first = (build / "graph.qir").read_bytes()
    np.savez("calib.npz", x=SAMPLES * 2)
    _run(COMPILE)
    assert (build / "graph.qir").read_bytes() != first
    assert sorted(p.name for p in build.parent.iterdir()) == ["build", "calib.npz", "model.onnx"]


def test_each_pass_alone_gives_the_next_dump(here: Path) -> None:
    _run(f"{COMPILE} --dump-ir dumps")
    texts = sorted(Path("dumps").glob("*.qir"))
    Path("again").mkdir()
    for before, after, item in zip(texts, texts[1:], qir.default_pipeline(), strict=False):
        _run(f"opt {before} --passes {item} --target arm-neon --calibration calib.npz -o again/{after.name}")
        assert (Path("again") / after.name).read_text() == after.read_text()


def test_opt_prints_what_it_writes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _run("opt model.onnx --passes canonicalize,fuse-activation -o out.qir")
    assert capsys.readouterr().out == ""
    _run("opt out.qir --passes eliminate-dead-code")
    printed = capsys.readouterr().out
    assert printed == str(qir.read_graph("out.qir"))
    assert "clip=[0.0, inf]" in printed
    assert "Relu" not in printed


def test_opt_compiles_from_a_text(here: Path) -> None:
    _run("opt model.onnx --passes canonicalize -o float.qir")
    _run(f"{COMPILE} --passes {qir.default_pipeline()}")
    expected = Path("build/graph.qir").read_text()
    _run(f"{COMPILE.replace('model.onnx', 'float.qir')}")
    assert Path("build/graph.qir").read_text() == expected


@pytest.mark.parametrize("integer", [False, True])
def test_run_writes_the_outputs_of_every_sample(integer: bool, build: Path) -> None:
    _run(f"run build --inputs calib.npz -o y.npz {'--integer' * integer}")
    program = qir.load(build)
    expected = (program.run_integer if integer else program.run)({"x": SAMPLES})
    found = read_npz("y.npz")
    assert found.keys() == expected.keys() == {"y"}
    assert found["y"].dtype == expected["y"].dtype == (np.int8 if integer else np.float32)
    assert np.array_equal(found["y"], expected["y"])


def test_fixed_batch_runs_batch_by_batch(here: Path) -> None:
    _run(f"{COMPILE} --shape x=7x1x8x8")
    _run("run build --inputs calib.npz -o y.npz --integer")
    program = qir.load("build")
    assert program.graph.inputs[0].type.shape == (7, 1, 8, 8)
    parts = [program.run_integer({"x": SAMPLES[i : i + 7]})["y"] for i in range(0, 70, 7)]
    assert np.array_equal(read_npz("y.npz")["y"], np.concatenate(parts))
    _run(COMPILE)
    assert np.array_equal(qir.load("build").run_integer({"x": SAMPLES})["y"], np.concatenate(parts))


def test_plan_names_the_kernels(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _run("plan build")
    assert capsys.readouterr().out == f"{qir.load(build).plan()}\n"


def test_targets_lists_and_prints(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _run("targets")
    assert any(line.startswith("arm-neon  ") for line in capsys.readouterr().out.splitlines())
    _run("targets arm-neon")
    Path("mine.toml").write_text(capsys.readouterr().out)
    assert qir.load_target("mine.toml") == qir.load_target("arm-neon")


def test_check_says_what_holds(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _run("check build")
    graph = qir.load(build).graph
    modes = [str(op.overflow) for op in graph.ops if hasattr(op, "overflow")]
    integers = sum(1 for _ in graph.values())
    out = capsys.readouterr().out
    assert f"@g at stage fixed for arm-neon, {len(graph.ops)} ops, legal\n" in out
    assert f"{integers} of {integers} integer values state one, all proved\n" in out
    assert f"{modes.count('none')} ops proved free of it\n" in out
    assert f"{modes.count('saturate')} saturate, {modes.count('wrap')} wrap\n" in out
    assert "none" in modes
    assert "certificate    19 claims, all hold\n" in out
    _run("check build/graph.qir")
    assert capsys.readouterr().out == out.replace("certificate    19 claims, all hold\n", "")


def test_check_takes_any_stage(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _run("opt model.onnx --passes canonicalize -o float.qir")
    _run("check float.qir")
    assert capsys.readouterr().out.split() == ["graph", "@g", "at", "stage", "float,", "6", "ops,", "legal"]


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for option, words in (("--version", f"qir {qir.__version__}"), ("--help", "demo")):
        with pytest.raises(SystemExit) as stop:
            main([option])
        assert stop.value.code == 0
        assert words in capsys.readouterr().out


def test_interrupt_ends_quietly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "find_backends", interrupt)
    assert main(["targets"]) == 128 + signal.SIGINT
    assert capsys.readouterr() == ("", "")


def test_reader_that_goes_away_is_no_error() -> None:
    with subprocess.Popen(
        _command("targets", "arm-neon"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 128 + signal.SIGPIPE)


def test_errors_of_a_process(tmp_path: Path) -> None:
    result = subprocess.run(_command("check", str(tmp_path)), cwd=ROOT, capture_output=True, text=True, check=False)
    message = f"qir: cannot read {tmp_path / 'graph.qir'}: No such file or directory\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", message)


# The demo


def test_demo_shows_what_it_does(tmp_path: Path) -> None:
    result = subprocess.run(
        _command("demo", "-o", str(tmp_path / "out")),
        cwd=tmp_path,
        # All else is kept: variables may choose the BLAS that calibration runs on, which both runs must share.
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": "", "NUMBA_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    words = [
        *(p.name for p in qir.default_pipeline()),
        "float32 accuracy  93.2%",
        "integer accuracy  93.",
        "of 1,000 images",
        "3,116,896 multiply-accumulates an image",
        "ms an image",
        f"{tmp_path}/out/dumps",
        f"{tmp_path}/out/program",
    ]
    assert [w for w in words if w not in result.stdout] == []
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"dumps", "program"}
    assert len(list((tmp_path / "out" / "dumps").glob("*.qir"))) == 1 + len(qir.default_pipeline())
    said: list[str] = []
    first = (tmp_path / "out" / "program" / "graph.qir").read_bytes()
    run_demo(tmp_path / "out", said.append, no_progress)
    assert (tmp_path / "out" / "program" / "graph.qir").read_bytes() == first
    assert said[1].splitlines()[0] == "pass                 stage        time  what it changed"


# Samples and reports


def _inputs(text: str) -> tuple[qir.Value, ...]:
    return qir.import_onnx(model(text)).inputs


def test_samples_of_an_open_batch_are_cut_to_feeds() -> None:
    inputs = _inputs("g (float[N, 2] x, float[1, 2] s) => (float[N, 2] y) { y = Add(x, s) }")
    x, s = random(70, 2), random(1, 2)
    feeds = split_samples(inputs, {"x": x, "s": s})
    assert [len(f["x"]) for f in feeds] == [32, 32, 6]
    assert np.array_equal(np.concatenate([f["x"] for f in feeds]), x)
    assert all(f["s"] is s for f in feeds)


def test_samples_of_scalar_inputs_are_single_numbers() -> None:
    inputs = _inputs("g (float x, float[1] s) => (float[1] y) { y = Add(x, s) }")
    feeds = split_samples(inputs, {"x": np.arange(3.0), "s": np.arange(3.0)})
    assert [(f["x"].shape, f["s"].shape, float(f["x"])) for f in feeds] == [((), (1,), i) for i in (0.0, 1.0, 2.0)]


def test_outputs_are_joined_as_they_were_cut() -> None:
    text = "g (float[N, 2] x) => (float[N, 2] y, float[2] c) { y = Relu(x) c = Identity(k) }"
    graph = qir.import_onnx(model(text, k=random(2)))
    x = random(70, 2)
    results = [qir.interpret(graph, feed) for feed in split_samples(graph.inputs, {"x": x})]
    joined, whole = join_samples(graph, results), qir.interpret(graph, {"x": x})
    assert all(np.array_equal(joined[name], whole[name]) for name in ("y", "c"))


def test_npz_holds_any_name(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {"file": np.arange(3), "a/b.0:1": random(2, 3), "empty": random(0, 4)}
    arrays["number"] = np.float32(2)
    write_npz(tmp_path / "x.npz", arrays)
    with np.load(tmp_path / "x.npz") as loaded:
        assert set(loaded.files) == set(arrays)
        assert all(np.array_equal(loaded[n], arrays[n]) for n in arrays)
    found = read_npz(tmp_path / "x.npz")
    assert all(np.array_equal(found[n], arrays[n]) for n in arrays)


def test_long_notes_wrap_under_their_column() -> None:
    graph = qir.parse("graph @g stage=float (%x: 2 x f32) {\n  return %x\n}\n")
    notes = tuple(f"note number {i} of a pass that has much to say" for i in range(6))
    lines = pass_table([qir.PassRecord("talkative", 0.25, notes, graph, graph)]).splitlines()
    column = lines[0].index("what it changed")
    assert len(lines) > 3
    assert lines[1].startswith("talkative  float      250 ms  note number 0")
    assert all(line[:column].strip() == "" for line in lines[2:])
    assert " ".join(line[column:] for line in lines[1:]) == "; ".join(notes)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_shows_on_terminals_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, expected in ((_Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("TERM", "xterm")
        with progress_bar() as progress:
            progress("calibrate", 1, 4)
        assert ("calibrate" in stream.getvalue()) is expected
