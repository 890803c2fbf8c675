"""The public surface, name by name with signatures, as committed in `public_names.txt`; `--bless` rewrites it."""

import enum
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import qir

ROOT = Path(__file__).parents[2]
SNAPSHOT = Path(__file__).with_name("public_names.txt")


def _members(kind: type) -> Iterator[str]:
    if issubclass(kind, enum.Enum):
        yield from (f"{m.name} = {m.value!r}" for m in kind)
        return
    for name, member in vars(kind).items():
        if name.startswith("_"):
            continue
        plain = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if inspect.isfunction(plain):
            yield f"{name}{inspect.signature(plain)}"
        elif isinstance(member, property):
            yield name


def _constructor(kind: type) -> str:
    """The signature where qir itself declares one: those of Exception and Enum differ between versions of Python."""
    own = inspect.getattr_static(kind, "__init__", None)
    if not inspect.isfunction(own) or issubclass(kind, enum.Enum) or getattr(kind, "_is_protocol", False):
        return ""
    return str(inspect.signature(kind))


def _surface() -> str:
    lines = []
    for name in qir.__all__:
        found = getattr(qir, name)
        if not isinstance(found, type):
            lines.append(f"{name}{inspect.signature(found)}")
            continue
        lines.append(f"class {name}{_constructor(found)}")
        lines += [f"    {member}" for member in sorted(_members(found))]
    return re.sub(r"<function (\w+) at 0x\w+>", r"\1", "\n".join([*lines, ""]))


def test_public_names_are_those_committed(bless: bool) -> None:
    if bless:
        SNAPSHOT.write_text(_surface(), encoding="utf-8")
    assert _surface() == SNAPSHOT.read_text(encoding="utf-8")


def test_all_is_sorted_and_complete() -> None:
    assert qir.__all__ == sorted(qir.__all__)
    assert set(qir.__all__) <= set(dir(qir))


def test_every_public_name_says_what_it_is() -> None:
    assert [name for name in qir.__all__ if not inspect.getdoc(getattr(qir, name))] == []


def test_every_error_is_a_qir_error() -> None:
    errors = [getattr(qir, name) for name in qir.__all__ if name.endswith("Error")]
    assert len(errors) == 12
    assert all(issubclass(kind, qir.QirError) for kind in errors)


def test_version_is_that_of_the_package() -> None:
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert qir.__version__ == stated


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'qir' has no attribute 'quantize_everything'"):
        getattr(qir, "quantize_everything")  # noqa: B009


@pytest.mark.parametrize(("name", "home"), [("import_onnx", "onnx"), ("compile", "numba"), ("load", "numba")])
def test_late_names_load_what_they_need(name: str, home: str) -> None:
    code = f"import sys, qir; before = {home!r} in sys.modules; qir.{name}; print(before, {home!r} in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "True"]
