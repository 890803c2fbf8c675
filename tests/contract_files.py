"""Contracts that users write: variants of a target with one offending line, and how they are refused."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest

from qir.backend import load_target
from qir.errors import ContractError, TargetError

#: Stands on the line that the message must name.
MARK = "# here"


def child(parent: str, *lines: str) -> str:
    """A file that inherits."""
    return "\n".join(['name = "mine"', 'description = "a chip"', f'inherits = "{parent}"', *lines, ""])


def case(parent: str, *lines: str) -> str:
    """A child whose offending line is marked; without a mark it is the line that inherits."""
    text = child(parent, *lines)
    return text if MARK in text else text.replace(f'"{parent}"\n', f'"{parent}"  {MARK}\n')


def marked_line(text: str) -> int:
    """The number of the only line with a mark."""
    (number,) = [number for number, line in enumerate(text.splitlines(), 1) if MARK in line]
    return number


def refusal(text: str, name: str = "mine.toml") -> tuple[int, str]:
    """The line and the rest of the message by which a file is refused."""
    Path(name).write_text(text, encoding="utf-8")
    with pytest.raises(TargetError) as caught:
        load_target(name)
    place, _, message = str(caught.value).partition(": ")
    file, _, line = place.rpartition(":")
    assert file == name, caught.value
    return int(line), message


def reached(module: ModuleType, texts: Iterable[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[int]]:
    """How many ContractErrors a module raises, and the lines of those by which no text is refused."""
    raised: dict[str, int] = {}

    class Recorded(ContractError):
        def __init__(self, key: str, message: str) -> None:
            super().__init__(key, message)
            raised[message] = sys._getframe(1).f_lineno

    monkeypatch.setattr(module, "ContractError", Recorded)
    lines = set()
    for text in texts:
        raised.clear()
        _, message = refusal(text)
        lines |= {line for said, line in raised.items() if message.endswith(said)}
    calls = [
        node
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "ContractError"
    ]
    return len(calls), [n.lineno for n in calls if not lines & set(range(n.lineno, (n.end_lineno or 0) + 1))]
