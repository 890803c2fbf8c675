"""`qir check` on a model whose 16-bit sums overflow: the counterexample, the file of inputs, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_models import model, random

import qir
from qir.cli import main
from qir.feeds import read_npz
from qir.ops.constant import Const
from qir.ops.fixed_linear import Conv2d
from qir.types import zero_array

TEXT = """g (float[N, 1, 8, 8] x) => (float[N, 3] y) {
    h = Conv(x, w, b) r = Relu(h) p = GlobalAveragePool(r) y = Flatten(p)
}"""
WEIGHTS: dict[str, Any] = {"w": random(3, 1, 5, 5, seed=1), "b": random(3, seed=2)}
NARROW = """name = "narrow"
inherits = "arm-neon"
description = "an 8-bit CPU with 16-bit sums"

[accumulator]
bits = 16
"""


def _run(command: str) -> None:
    assert main(command.split()) == 0


def _build(target: str) -> None:
    _run(f"compile model.onnx --target {target} --calibration calib.npz -o build")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a model, samples, and contracts with a narrow accumulator."""
    monkeypatch.chdir(tmp_path)
    onnx.save(model(TEXT, **WEIGHTS), "model.onnx")
    np.savez("calib.npz", x=random(70, 1, 8, 8))
    Path("narrow.toml").write_text(NARROW)
    Path("saturating.toml").write_text(f'{NARROW}overflow = "saturate"\n')
    return tmp_path


def _exact(conv: Conv2d, graph: qir.Graph, x: Any, position: tuple[int, ...]) -> int:
    """The sum at a position of a convolution without padding, by a loop over Python integers."""
    constants = {op.result: op.value.data for op in graph.ops if isinstance(op, Const)}
    weights, bias = (constants[v] for v in conv.operands[1:])
    _, i, j, o = position
    total = int(bias[o])
    for (r, s, c), weight in np.ndenumerate(weights[o]):
        total += (int(x[0, i + r, j + s, c]) - int(zero_array(conv.operands[0].type.element))) * int(weight)
    return total


def test_the_wrap_shown_is_the_wrap_of_the_program(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _build("narrow.toml")
    capsys.readouterr()
    _run("check build --counterexamples worst.npz")
    out = capsys.readouterr().out
    assert "accumulators   1 of 2 layers proved free of overflow; 1 MAY OVERFLOW\n" in out
    assert "step-wise" not in out  # sums wrap
    assert "bounds attained by inputs of 2 of 2 layers; mean 1\n" in out
    row = next(line for line in out.splitlines() if "  conv2d %r.acc (from node " in line)
    assert row.split("[")[0].split() == ["s16", "wrap"]
    assert row.split("]")[1].split()[1:6] == ["-2", "1", "MAY", "OVERFLOW", "conv2d"]
    assert row.index("conv2d") < 80
    found = re.search(r"counterexample: exact sum (\d+) wraps to (-?\d+) in s16 at \[(.*)\]\n", out)
    assert found is not None
    exact, given, position = int(found[1]), int(found[2]), tuple(map(int, found[3].split(", ")))
    assert (exact > 32767, given) == (True, (exact + 32768) % 65536 - 32768)

    arrays = read_npz("worst.npz")
    assert {name.rpartition(":")[0] for name in arrays} == {"r.acc:low", "r.acc:high", "p.acc:low", "p.acc:high"}
    program = qir.load("build")
    conv = next(op for op in program.graph.ops if isinstance(op, Conv2d))
    x = arrays[f"r.acc:high:{conv.operands[0].name}"]
    assert (x.dtype.name, x.shape) == ("int8", (1, 8, 8, 1))
    assert _exact(conv, program.graph, x, position) == exact
    # The same integers through the whole program, whose input has the ONNX layout.
    assert int(program.trace({"x": x.transpose(0, 3, 1, 2)})["r.acc"][position]) == given


def test_steps_that_saturate_are_counted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _build("saturating.toml")
    capsys.readouterr()
    _run("check build")
    out = capsys.readouterr().out
    assert "1 of 2 (50%) proved free of step-wise saturation\n" in out
    assert re.search(r"counterexample: exact sum -?\d+ saturates to (32767|-32768) in s16 at \[", out)


def test_nothing_is_said_of_overflow_where_there_is_none(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _build("arm-neon")
    capsys.readouterr()
    _run("check build")
    out = capsys.readouterr().out
    assert "accumulators   2 of 2 layers proved free of overflow\n" in out
    assert out.count("  proved  ") == 2
    assert "MAY OVERFLOW" not in out
    assert "counterexample" not in out


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "check float.qir --counterexamples worst.npz",
            "is for stage fixed; graph @g is at stage float",
        ),
        ("check build --counterexamples nowhere/worst.npz", "cannot write nowhere/worst.npz"),
        ("check nothing", "cannot read nothing"),
    ],
)
def test_refused(command: str, words: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _build("narrow.toml")
    _run("opt model.onnx --passes canonicalize -o float.qir")
    before = sorted(here.rglob("*"))
    capsys.readouterr()
    assert main(command.split()) == 2
    out, err = capsys.readouterr()
    assert (out, err[:5]) == ("", "qir: ")
    assert words in err
    assert sorted(here.rglob("*")) == before


def test_claim_that_an_overflow_cannot_happen_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _build("narrow.toml")
    text = Path("build/graph.qir").read_text()
    assert text.count("overflow=wrap") == 1
    Path("build/graph.qir").write_text(text.replace("overflow=wrap", "overflow=none"))
    capsys.readouterr()
    assert main(["check", "build"]) == 2
    assert "claims overflow=none, which is not proved" in capsys.readouterr().err
