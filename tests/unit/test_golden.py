"""Texts under `tests/golden/`, each of the kind that its `//` lines make it; CONTRIBUTING.md lists the kinds.

- `verifier/`: every finding is announced by `// error: words of it` on the line that defines what it names, or on that
  of `return` where it names no value.
- `run/`: `// run: x=[1, 2] -> y=[3]` holds on the interpreter, with int64 and with unbounded integers, and in the
  program; `qir.testing.goldens` reads such lines, for these texts and for every backend.
- any other folder: `// RUN: pipeline [target=NAME]` turns the text into the one below `// CHECK`.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qir.backend import load_target
from qir.parser import parse
from qir.pass_manager import PassContext
from qir.passes.pipelines import parse_pipeline
from qir.printer import print_graph
from qir.testing import replay
from qir.verifier import find_faults

FOLDER = Path(__file__).parents[1] / "golden"
FILES = {str(p.relative_to(FOLDER)): p for p in sorted(FOLDER.rglob("*.qir"))}
RUNS = [name for name in FILES if name.startswith("run/")]
ILLEGAL = [name for name in FILES if name.startswith("verifier/")]
PASSES = [name for name in FILES if name not in {*RUNS, *ILLEGAL}]

_STRING_OR_COMMENT = re.compile(r'("(?:[^"\\\n]|\\.)*")|[ \t]*//[^\n]*')
_CHECK = "// CHECK\n"
_RUN = re.compile(r"// RUN: (?P<passes>\S+)(?: target=(?P<target>\S+))?")


def without_comments(text: str) -> str:
    bare = _STRING_OR_COMMENT.sub(lambda found: found[1] or "", text)
    return "".join(f"{line}\n" for line in bare.split("\n") if line)


def run_pipeline(text: str, passes: str, target: str | None) -> str:
    """The text after these passes, verified after each."""
    context = PassContext(target=load_target(target) if target else None)
    return print_graph(parse_pipeline(passes).run(parse(text), context))


@pytest.mark.parametrize("name", FILES)
def test_round_trip(name: str) -> None:
    for part in FILES[name].read_text(encoding="utf-8").split(_CHECK):
        graph = parse(part)
        assert print_graph(graph) == without_comments(part)
        assert parse(print_graph(graph)) == graph


@pytest.mark.parametrize("name", PASSES)
def test_pass(name: str, bless: bool) -> None:
    before, check, expected = FILES[name].read_text(encoding="utf-8").partition(_CHECK)
    run = _RUN.match(before)
    assert run is not None, "a golden file of a pass starts with its pipeline"
    found = run_pipeline(before, run["passes"], run["target"])
    if bless:
        FILES[name].write_text(before + _CHECK + found, encoding="utf-8")
    else:
        assert check
        assert found == expected


@pytest.mark.parametrize("name", ILLEGAL)
def test_verifier(name: str) -> None:
    lines = FILES[name].read_text(encoding="utf-8").split("\n")
    announced = [(place, words.strip()) for place, line in enumerate(lines) for words in line.split("// error:")[1:]]
    for finding in find_faults(parse("\n".join(lines))):
        named = re.search(r"%\w+", finding.place)
        place = _defining_line(lines, named[0] if named else "  return")
        matching = next((a for a in announced if a[0] == place and a[1] in finding.message), None)
        assert matching is not None, f"line {place + 1}: nothing announces {finding}"
        announced.remove(matching)
    assert not announced, "announced, but not found"


def _defining_line(lines: list[str], what: str) -> int:
    """The line that starts with `what`, or else defines it in the head of the graph."""
    start = re.compile(rf"(?:  (?:%\w+, )*|graph .*){re.escape(what.strip())}\b")
    return next(place for place, line in enumerate(lines) if start.match(line))


@pytest.mark.parametrize("name", RUNS)
def test_run(name: str) -> None:
    assert replay(FILES[name].read_text(encoding="utf-8")).outputs
