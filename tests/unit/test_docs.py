"""The code in README and docs, run as it stands there.

A fence may name a file (```python file=a.py): the block is written there. Diffs are applied to a copy of the source.
Other Python blocks run as scripts, shell blocks with `qir` on the path; a text block behind a shell block is what it
prints.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest

from qir.cost_tables import Costs
from qir.demo import normalized
from qir.fixed_point import Overflow, RequantizeForm, Rounding
from qir.passes.widths.costs import Metric
from qir.target import Target, WeightFormat

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^```(?P<kind>\w+)(?: file=(?P<file>\S+))?\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    kind: str
    file: str
    text: str


def _blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [Block(m["kind"], m["file"] or "", m["text"]) for m in _FENCE.finditer(text)]
    assert 2 * len(found) == len(re.findall("^```", text, re.MULTILINE)), (
        f"{page}: a fence without a kind, or not closed"
    )
    return found


def _write(folder: Path, block: Block) -> None:
    path = folder / block.file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.text, encoding="utf-8")


def _apply(folder: Path, diff: str) -> None:
    """Apply a diff whose hunks are found by their text, which must stand in the file exactly once."""
    head, *hunks = re.split(r"^@@\n", diff, flags=re.MULTILINE)
    match = re.fullmatch(r"--- a/(\S+)\n\+\+\+ b/\1\n", head)
    assert match is not None
    path = folder / match[1]
    text = path.read_text(encoding="utf-8")
    for hunk in hunks:
        lines = hunk.splitlines()
        assert all(line[0] in " +-" for line in lines)
        before, after = ("".join(f"{line[1:]}\n" for line in lines if line[0] in kept) for kept in (" -", " +"))
        assert text.count(before) == 1, f"{match[1]} does not hold once:\n{before}"
        text = text.replace(before, after)
    path.write_text(text, encoding="utf-8")


class Shell:
    """Runs scripts and shell blocks in a folder, with `qir` imported from `source`."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.folder = folder
        commands = folder / ".commands"
        commands.mkdir()
        launcher = commands / "qir"
        launcher.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{_LAUNCH}" "$@"\n')
        launcher.chmod(0o755)
        self.environment = {
            **os.environ,
            "PYTHONPATH": f"{folder}{os.pathsep}{source}",
            "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        }

    def __call__(self, *command: str) -> str:
        result = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    def python(self, text: str) -> str:
        script = self.folder / "block.py"
        script.write_text(text, encoding="utf-8")
        return self(sys.executable, "-W", "error", str(script))


_LAUNCH = "import sys; from qir.cli import main; sys.exit(main())"


def _install(folder: Path, project: str) -> None:
    """What pip leaves of a project for its entry points to be found: a dist-info folder."""
    data = tomllib.loads(project)["project"]
    info = folder / f"{data['name'].replace('-', '_')}-{data['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {data['name']}\nVersion: {data['version']}\n")
    lines = [
        line
        for group, points in data["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in points.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join([*lines, ""]))


def test_add_a_pass(tmp_path: Path) -> None:
    shell = Shell(tmp_path, ROOT)
    blocks = _blocks("docs/add-a-pass.md")
    for place, block in enumerate(blocks):
        if block.file:
            _write(tmp_path, block)
        elif block.kind == "python":
            shell.python(block.text)
        elif block.kind == "sh":
            assert shell("sh", "-e", "-c", block.text) == blocks[place + 1].text
        if block.kind == "toml":
            _install(tmp_path, block.text)
    assert [b.kind for b in blocks] == ["python", "python", "python", "toml", "python", "text", "sh", "text"]


def test_choose_bit_widths(tmp_path: Path) -> None:
    shell = Shell(tmp_path, ROOT)
    blocks = _blocks("docs/choose-bit-widths.md")
    for block in blocks:
        if block.file:
            _write(tmp_path, block)
        else:
            shell.python(block.text)
    assert [b.kind for b in blocks] == ["python"] * 5
    text = (ROOT / "docs" / "choose-bit-widths.md").read_text(encoding="utf-8")
    listed = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)))
    assert listed == list(Metric)


def test_add_an_op(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for folder in ("qir", "passes", "backends"):
        shutil.copytree(
            ROOT / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "data")
        )
    shell = Shell(tmp_path, source)
    for file in ("tests/conftest.py", "tests/unit/test_golden.py"):
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, source / file)
    for block in _blocks("docs/add-an-op.md"):
        if block.kind == "diff":
            _apply(source, block.text)
        elif block.file:
            _write(source, block)
        else:
            shell.python(block.text)
    goldens = shell(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", str(source / "tests"))
    assert "4 passed" in goldens  # both texts round-trip, and both say what is true


@pytest.fixture
def readme(tmp_path: Path) -> Shell:
    """The files that the README's examples read: a model and samples, of the demo."""
    shutil.copy(ROOT / "qir" / "data" / "fm_mobile.onnx", tmp_path / "model.onnx")
    with np.load(ROOT / "qir" / "data" / "fashion_mnist_demo.npz") as data:
        np.savez(tmp_path / "calibration.npz", x=normalized(data["calibration_images"][:32]))
        np.savez(tmp_path / "samples.npz", x=normalized(data["test_images"][:40]))
    return Shell(tmp_path, ROOT)


def test_add_a_backend(readme: Shell) -> None:
    blocks = _blocks("docs/add-a-backend.md")
    for place, block in enumerate(blocks):
        if block.file:
            _write(readme.folder, block)
        elif block.kind == "python":
            readme.python(block.text)
        elif block.kind == "sh":
            assert readme("sh", "-e", "-c", block.text) == blocks[place + 1].text
    assert [b.kind for b in blocks] == ["toml", *["sh", "text"] * 3, "python"]
    assert {"build", "y.npz"} <= {p.name for p in readme.folder.iterdir()}


def test_a_target_of_ones_own_takes_less_than_60_lines_to_read() -> None:
    page = (ROOT / "docs/add-a-backend.md").read_text(encoding="utf-8")
    first, _, _ = page.partition("\n## How a file is read\n")
    assert "qir run" in first
    assert len(first.splitlines()) < 60


_WORDS: dict[str, type[StrEnum]] = {
    "Rounding": Rounding,
    "Overflow": Overflow,
    "Forms": RequantizeForm,
    "Formats": WeightFormat,
}
#: Words that a field has by its type and not by its meaning: a contract that states them is refused.
_REFUSED = {
    "product.bits": {"proved"},
    "accumulator.bits": {"exact", "accumulator"},
}


def _rows(page: str) -> dict[str, dict[str, list[str]]]:
    """The rows of a page's tables by heading and first cell."""
    found: dict[str, dict[str, list[str]]] = {}
    for line in page.splitlines():
        if line.startswith("#"):
            heading = line.strip("# []")
        elif line.startswith("| `"):
            name, *rest = (cell.strip() for cell in line.strip("|").split(" | "))
            found.setdefault(heading, {})[name.strip("` ")] = rest
    return found


def _kinds(hint: object) -> tuple[Any, ...]:
    return tuple(k for k in get_args(hint) if k is not NoneType) or (hint,)


def _default(item: Field[Any]) -> str:
    if item.default is MISSING:
        return "-" if item.default_factory is MISSING else "{}"
    return json.dumps(item.default) if isinstance(item.default, tuple) else str(item.default).lower()


def _accepted(path: str, values: str, hint: object) -> None:
    """The cell names the words that a field takes, or the kind of its value."""
    (words,) = [set(k) for k in _kinds(hint) if isinstance(k, type) and issubclass(k, StrEnum)] or [set()]
    if stated := re.fullmatch(r"a word of \[(\w+)\]\(#\w+\)( but `none`)?", values):
        assert words == set(_WORDS[stated[1]]), path
        assert bool(stated[2]) is (stated[1] == "Overflow"), path  # a contract that claims a proof is refused
        return
    if hint in (bool, str):
        assert values == ("truth value" if hint is bool else "text"), path
    elif words:
        assert set(re.findall(r"`(\w+)`", values)) == words - _REFUSED.get(path, set()), path


def test_every_field_of_a_contract_is_documented() -> None:
    rows = _rows((ROOT / "docs/add-a-backend.md").read_text(encoding="utf-8"))
    hints = get_type_hints(Target)
    tables = {name: kind for name, hint in hints.items() for kind in _kinds(hint) if is_dataclass(kind)}
    costs = {f"costs.{n}": k for n, h in get_type_hints(Costs).items() for k in _kinds(h) if is_dataclass(k)}
    assert costs
    sections: dict[str, Any] = {"Top level": Target, **tables, **costs}
    assert rows.keys() == sections.keys() | _WORDS.keys()
    for section, kind in sections.items():
        stated = [f for f in fields(kind) if section != "Top level" or f.name not in {*tables, "memory"}]
        assert list(rows[section]) == [f.name for f in stated], section
        for item in stated:
            values, default, meaning = rows[section][item.name]
            assert (default.strip("`"), bool(meaning)) == (_default(item), True), (section, item.name)
            _accepted(f"{section}.{item.name}", values, get_type_hints(kind)[item.name])
    assert {name: set(rows[name]) for name in _WORDS} == {name: set(words) for name, words in _WORDS.items()}


def test_readme(readme: Shell) -> None:
    ran = []
    for block in _blocks("README.md"):
        if block.kind == "python":
            readme.python(block.text)
        elif block.kind == "sh" and "pip install" not in block.text:
            readme("sh", "-e", "-c", block.text)
        else:
            continue
        ran.append(block.kind)
    assert ran == ["python", "sh", "sh"]
    assert {"build", "dumps", "y.npz"} <= {p.name for p in readme.folder.iterdir()}


PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/add-{what}.md" for what in ("an-op", "a-pass", "a-backend"))]


@pytest.mark.parametrize("page", PAGES)
def test_files_that_pages_name_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    named = re.findall(r"`((?:qir|passes|backends|tests|docs)/[\w./-]+)`", text)
    made = {block.file for block in _blocks(page)}
    places = [*((ROOT / page).parent / link for link in links), *(ROOT / name for name in named if name not in made)]
    assert [str(p) for p in places if not p.exists()] == []
