"""Backends from outside: a real package, installed by pip and found by its entry point, and plugins that are wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qir_chip20 import backend as chip

import qir.backend
from qir.backend import Backend, find_backends, load_target, plugin_for, shipped_backends
from qir.backends.kernels.kernel import Facts, interpreted
from qir.errors import TargetError
from qir.interpreter import interpret
from qir.ir import Graph, Op
from qir.parser import parse
from qir.pass_manager import PassContext, Pipeline
from qir.passes.insert_saturation import InsertSaturation
from qir.passes.range_analysis import RangeAnalysis
from qir.program import Program, load

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tests" / "plugin_package"

#: What chip20 loses to float32 on 2,000 images, at most.
_MARGIN = 0.01


# A package that is installed


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that pip installed the package into, from a copy, because a build leaves its files behind."""
    folder = tmp_path_factory.mktemp("plugin")
    source = shutil.copytree(PACKAGE, folder / "source", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--no-index"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder / "site"), str(source)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return folder / "site"


def python(site: Path, code: str, *arguments: str) -> str:
    """What a script prints where the package is installed, away from the source of it."""
    path = os.pathsep.join(map(str, (site, ROOT, ROOT / "tests")))
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_installed_package_conforms(site: Path) -> None:
    command = "import sys; from qir.cli import main; sys.exit(main(sys.argv[1:]))"
    first, own, *_ = python(site, command, "targets", "chip20", "--check").splitlines()
    assert first.startswith("chip20 conforms: ")
    assert own == "kernels of its own: chip20_conv2d, chip20_matmul, chip20_shift"
    assert "chip20" in {line.split()[0] for line in python(site, command, "targets").splitlines()}
    assert python(site, command, "targets", "chip20") == str(chip.target())


_RUN = """
import json, sys
import numpy as np
import qir, qir_chip20
from models import compiled, labelled_images

assert qir_chip20.__file__.startswith(sys.argv[1])
program = compiled("fm_cnn", "chip20").program
x, labels = labelled_images()
expected, found = qir.interpret(program.graph, {"x": x[:32]}), program.run_integer({"x": x[:32]})
program.save("build")
again = qir.load("build")
floats = qir.interpret(compiled("fm_cnn", "chip20").imported, {"x": x[:2000]})["logits"]
logits = again.run({"x": x[:2000]})["logits"]
print(json.dumps({
    "same": bool(np.array_equal(expected["logits"], found["logits"])),
    "kernels": sorted({step.kernel for step in again.plan().steps}),
    "accuracy": float(np.mean(logits.argmax(axis=1) == labels[:2000])),
    "float": float(np.mean(floats.argmax(axis=1) == labels[:2000])),
}))
"""


def test_fm_cnn_runs_on_the_installed_chip(site: Path) -> None:
    found = json.loads(python(site, _RUN, str(site)))
    assert found["same"]
    assert {"chip20_conv2d", "chip20_matmul", "chip20_shift"} <= set(found["kernels"])
    assert found["accuracy"] > found["float"] - _MARGIN


def test_the_header_that_the_chip_exports_holds_every_constant(tmp_path: Path) -> None:
    assert chip.export is not None
    chip.export(graph(), tmp_path)
    header = (tmp_path / "weights.h").read_text(encoding="utf-8")
    arrays = re.findall(r"static const (\w+) constant_\d+_(\w+)\[\] = \{([^}]*)\};", header)
    assert [(kind, name, [int(n) for n in numbers.split(",")]) for kind, name, numbers in arrays] == [
        ("int8_t", "w", [31, 31, -32, 31]),
        ("int32_t", "b", [500000, -500000]),
    ]
    assert parse((tmp_path / "graph.qir").read_text(encoding="utf-8")) == graph()


def test_the_chips_cost_counts_cycles_and_packed_bytes() -> None:
    assert chip.cost is not None
    parts = chip.cost(graph(), chip.target())
    assert parts == {
        "multiplier cycles": 1,
        "shifter cycles": 3,
        "weight bytes": 8,
    }  # 16 products; 8 + 2 results; 3 + 5


# How plugins are found


NO_BACKEND = "no backend"
IMPOSTOR = replace(chip, name="arm-neon")
MISNAMED = replace(chip, name="chip21")


def install(monkeypatch: pytest.MonkeyPatch, *values: str) -> None:
    """Let these entry points be installed."""
    points = [EntryPoint(f"point{i}", value, qir.backend.GROUP) for i, value in enumerate(values)]
    monkeypatch.setattr(qir.backend, "entry_points", lambda group: points if group == "qir.backends" else [])


def test_a_plugin_joins_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "qir_chip20:backend")
    assert find_backends()["chip20"] is chip
    assert plugin_for("chip20") is chip
    assert load_target("chip20") == chip.target() == load_target(chip.target_file)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_module:backend", r"backend plugin 'point0' \(no_such_module:backend\) failed to load: No module"),
        ("qir_chip20:nothing", r"backend plugin 'point0' \(qir_chip20:nothing\) failed to load: "),
        (f"{__name__}:NO_BACKEND", r"backend plugin 'point0' .* is no qir.backend.Backend"),
        ("qir.backend:Backend", r"backend plugin 'point0' .* is no qir.backend.Backend"),
        (f"{__name__}:IMPOSTOR", r"backend plugin 'point0' .* claims the name 'arm-neon', which is taken"),
    ],
)
def test_a_bad_plugin_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch, value: str, message: str) -> None:
    install(monkeypatch, value)
    for use in (find_backends, lambda: load_target("chip20"), lambda: plugin_for("chip20"), lambda: Program(graph())):
        with pytest.raises(TargetError, match=message):
            use()
    assert load_target("arm-neon").name == "arm-neon"  # what ships does not depend on what else is installed
    assert plugin_for("arm-neon") is None
    Program(graph(target="arm-neon"))


def test_two_plugins_cannot_share_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "qir_chip20:backend", "qir_chip20:backend")
    with pytest.raises(TargetError, match=r"backend plugin 'point1' .* claims the name 'chip20', which is taken"):
        find_backends()


def test_a_plugin_whose_file_describes_another_target_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, f"{__name__}:MISNAMED")
    with pytest.raises(TargetError, match=r"target.toml: describes 'chip20', but is installed as 'chip21'"):
        load_target("chip21")


def test_what_ships_is_no_plugin() -> None:
    assert all(plugin_for(name) is None for name in shipped_backends())
    assert plugin_for("") is None


# What a program makes of a plugin


def graph(target: str = "chip20", overflow: str = "saturate") -> Graph:
    """A layer as legalize writes it for chip20, and a maximum behind it, for which the chip has no kernel."""
    text = f"""
    graph @layer stage=fixed target="{target}" (%x: Nx2x2x2 x s12) {{
      %w = const {{value=s8 2x1x1x2 [31, 31, -32, 31]}} : 2x1x1x2 x s6
      %b = const {{value=s32 2 [500000, -500000]}} : 2 x s20
      %acc = conv2d %x, %w, %b {{accumulator=s20, overflow={overflow}, order=bias_khwc, pads=[0, 0, 0, 0], strides=[1, 1], dilations=[1, 1], groups=1}} : Nx2x2x2 x s20
      %y = requantize %acc {{multiplier=s64 [1], shift=s64 [-8], form=shift, input_shift=0, rounding=half_even, overflow=saturate}} : Nx2x2x2 x s12
      %top = max_pool2d %y {{kernel=[2, 2], strides=[1, 1], pads=[0, 0, 0, 0], dilations=[1, 1]}} : Nx1x1x2 x s12
      return %top
    }}"""  # noqa: E501
    return Pipeline([RangeAnalysis(), InsertSaturation()]).run(parse(text), PassContext())


def kernels(program: Program) -> list[str]:
    return [step.kernel for step in program.plan().steps]


FEEDS = {"x": np.random.default_rng(0).choice(np.array([-2048, 2047, 100, -7], np.int16), (50, 2, 2, 2))}


def assert_right(program: Program) -> None:
    expected = interpret(program.graph, FEEDS)["top"]
    np.testing.assert_array_equal(program.run_integer(FEEDS)["top"], expected, strict=True)
    np.testing.assert_array_equal(program.trace(FEEDS)["top"], expected, strict=True)


def test_a_plugins_kernels_come_first_and_show_in_the_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, "qir_chip20:backend")
    program = Program(graph())
    assert kernels(program) == ["chip20_conv2d", "chip20_shift", "max_pool2d"]
    assert "chip20_conv2d" in str(program.plan())
    assert_right(program)
    program.save(tmp_path / "build")
    assert kernels(load(tmp_path / "build")) == kernels(program)


def test_without_the_plugin_the_text_runs_by_qirs_own_kernels_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    program = Program(graph())
    assert kernels(program) == ["conv2d_ordered_s16s8s32+requantize_shift", "max_pool2d"]
    assert_right(program)
    assert kernels(Program(graph(), chip)) == ["chip20_conv2d", "chip20_shift", "max_pool2d"]


def test_a_plugin_is_asked_only_for_graphs_of_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "qir_chip20:backend")
    assert "chip20_conv2d" not in kernels(Program(graph(target="arm-neon")))
    assert "chip20_conv2d" not in kernels(Program(graph(target="chip21")))


def test_an_op_that_says_something_else_is_none_of_the_chips(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "qir_chip20:backend")
    program = Program(graph(overflow="wrap"))
    assert kernels(program)[1:] == ["chip20_shift", "max_pool2d"]
    assert "chip20_conv2d" not in kernels(program)
    assert_right(program)


@pytest.mark.parametrize("mnemonic", ["conv2d", "requantize", "max_pool2d"])
def test_no_kernel_of_two_ops_swallows_one_that_a_plugin_takes(mnemonic: str) -> None:
    def choose(op: Op, facts: Facts) -> Any:
        return replace(interpreted(op), name="mine") if op.mnemonic == mnemonic else None

    program = Program(graph(), Backend("mine", chip.target_file, choose))
    assert kernels(program).count("mine") == 1
    assert len(kernels(program)) == (2 if mnemonic == "max_pool2d" else 3)
    assert_right(program)


def test_a_choice_that_is_no_kernel_is_an_error_that_names_plugin_and_op() -> None:
    with pytest.raises(TargetError, match=r"backend 'mine' gave 1 for conv2d %acc, which is no Kernel"):
        Program(graph(), Backend("mine", chip.target_file, lambda op, facts: 1))


def test_a_choice_that_fails_is_an_error_that_names_plugin_and_op() -> None:
    def choose(op: Op, facts: Facts) -> Any:
        raise RuntimeError("no device")

    with pytest.raises(
        TargetError, match=r"backend 'mine' failed to choose a kernel for conv2d %acc: no device"
    ) as error:
        Program(graph(), Backend("mine", chip.target_file, choose))
    assert isinstance(error.value.__cause__, RuntimeError)
