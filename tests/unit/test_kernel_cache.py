"""Compiled kernels: kept between processes where some folder can be written, and right where none can."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

from qir.backends.kernels import jit, linear_loops

KERNELS = Path(__file__).parents[2] / "backends" / "kernels"


def _compiled(tree: ast.Module) -> set[str]:
    """The functions of a file that numba compiles."""
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {f.name for f in functions if any(ast.unparse(d) == "kernel" for d in f.decorator_list)}


def test_kernels_call_no_kernel_of_another_file() -> None:
    """Numba's cache of a function watches the file of the function, and none that it calls into."""
    trees = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(KERNELS.glob("*.py"))}
    compiled = {name: _compiled(tree) for name, tree in trees.items()}
    assert {name for name, functions in compiled.items() if functions} >= {"linear_loops", "rescale_loops"}
    for name, tree in trees.items():
        if not compiled[name]:
            continue
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        imported = {f"{node.module}.{alias.name}" for node in imports for alias in node.names}
        for other, functions in compiled.items():
            module = f"qir.backends.kernels.{other}"
            assert module not in imported or not functions, (name, other)
            assert not imported & {f"{module}.{function}" for function in functions if other != name}, (name, other)


def test_kernels_are_kept_on_disk() -> None:
    assert linear_loops.contract._cache.cache_path  # type: ignore[attr-defined]


def _twice(x: Any, out: Any) -> None:
    for i in range(x.shape[0]):
        out[i] = 2 * x[i]


def test_kernels_work_where_no_folder_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])
    with pytest.raises(RuntimeError, match="no locator available"):
        numba.njit(cache=True)(_twice)
    out = np.zeros(3, np.int32)
    jit.kernel(_twice)(np.arange(3, dtype=np.int8), out)
    assert out.tolist() == [0, 2, 4]
