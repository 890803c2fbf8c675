"""Imports run one way, from the language to the command line, and what is heavy is loaded only where it is used."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A module or subpackage of qir may import from its own layer and from those above it in this table.
LAYERS = (
    (
        "errors",
        "table",
        "arrays",
        "types",
        "fixed_point",
        "levels",
        "packing",
        "integer_functions",
        "integer_functions_16",
        "interval",
        "affine",
    ),
    ("ir",),
    ("checker",),
    ("opdef",),
    ("ops",),
    ("idle", "correlation"),
    ("printer", "parser", "verifier", "interpreter", "rewrite", "proof", "demand", "serialization"),
    (
        "cost_tables",
        "target",
        "target_file",
        "backend",
        "calibration",
        "observers",
        "scale_search",
        "frontend",
        "pass_manager",
    ),
    ("probes", "equivalence", "counterexample", "certificate", "cost"),
    ("passes", "backends"),
    ("program", "compiler", "comparison", "mixed_precision"),
    ("__init__", "testing"),
    ("feeds", "report", "drawing", "cost_report", "width_report", "check", "demo", "cli_input", "cli_widths", "cli"),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}

STRANGERS = {"passes": "backends", "backends": "passes"}
"""Neighbours in one layer that do not know each other."""

HOMES = {
    "numba": "qir.backends.kernels",
    "onnx": "qir.frontend",
    "scipy": "qir.passes.widths",
    "threadpoolctl": "qir.passes.widths",
}
"""The only package that may import a given distribution."""

LATE_ONLY = "networkx"
"""A view for algorithms and drawings: imported in the functions that draw or solve."""

LATE_UPWARD = {("qir.ir", f"Graph.{method}") for method in ("__str__", "diagnose", "to_networkx")}
"""The methods, with their module, that may import against the layers when they are called."""


@dataclass(frozen=True)
class Import:
    """One imported module: where it is imported, and whether by an annotation only."""

    target: str
    line: int
    scope: str
    type_only: bool


class _Reader(ast.NodeVisitor):
    def __init__(self, modules: frozenset[str]) -> None:
        self.modules = modules
        self.imports: list[Import] = []
        self.scope: list[str] = []
        self.in_function = False
        self.type_only = False

    def _add(self, target: str, line: int) -> None:
        scope = ".".join(self.scope) if self.in_function else ""
        self.imports.append(Import(target, line, scope, self.type_only))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        origin = "." * node.level + (node.module or "")
        for alias in node.names:
            member = f"{origin}.{alias.name}"
            self._add(member if member in self.modules else origin, node.lineno)

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) not in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            self.generic_visit(node)
            return
        self.type_only = True
        for child in node.body:
            self.visit(child)
        self.type_only = False
        for child in node.orelse:
            self.visit(child)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.scope.append(node.name)
        self.generic_visit(node)
        self.scope.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        outer, self.in_function = self.in_function, True
        self.scope.append(node.name)
        self.generic_visit(node)
        self.scope.pop()
        self.in_function = outer

    visit_AsyncFunctionDef = visit_FunctionDef


def _imports(source: str, modules: frozenset[str]) -> list[Import]:
    reader = _Reader(modules)
    reader.visit(ast.parse(source))
    return reader.imports


def _unit(module: str) -> str:
    """The entry of LAYERS that `module` belongs to: ``qir.ops.conv`` to ``ops``, ``qir`` itself to ``__init__``."""
    return module.split(".")[1] if "." in module else "__init__"


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def _fault(module: str, found: Import) -> str | None:
    """What is wrong with an import that `module` makes, or None."""
    if found.target.startswith("."):
        return "relative import; write the whole name"
    distribution = found.target.split(".")[0]
    home = HOMES.get(distribution)
    if home is not None and not _within(module, home):
        return f"only {home} imports {distribution}"
    if distribution == LATE_ONLY and not (found.scope or found.type_only):
        return f"{LATE_ONLY} is imported only inside the functions that use it"
    if distribution != "qir":
        return None
    importer, imported = _unit(module), _unit(found.target)
    if imported not in RANK:
        return f"{found.target} stands in no layer"
    if STRANGERS.get(importer) == imported:
        return f"{importer} never import {imported}"
    if RANK[imported] > RANK[importer] and (module, found.scope) not in LATE_UPWARD:
        return f"{importer} stands below {imported} and may not import it"
    return None


def _faults(module: str, source: str, modules: frozenset[str]) -> Iterator[str]:
    if _unit(module) not in RANK:
        yield f"{module} stands in no layer: add {_unit(module)!r} to LAYERS in tests/unit/test_import_law.py"
        return
    for found in _imports(source, modules):
        fault = _fault(module, found)
        if fault is not None:
            yield f"{module}, line {found.line}: import of {found.target}: {fault}"


def _sources() -> dict[str, str]:
    """Module name to source of every file of the package; the linked folders are read where they really lie."""
    sources = {}
    for folder, prefix in (("qir", ""), ("passes", "qir."), ("backends", "qir.")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.is_relative_to(ROOT / "qir" / "passes") or path.is_relative_to(ROOT / "qir" / "backends"):
                continue
            name = prefix + ".".join(path.relative_to(ROOT).with_suffix("").parts)
            sources[name.removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return sources


SOURCES = _sources()
MODULES = frozenset(SOURCES)


def test_the_folders_were_read() -> None:
    assert {"qir", "qir.errors", "qir.ir", "qir.ops", "qir.passes", "qir.backends"} <= MODULES


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_module_keeps_the_law(module: str) -> None:
    assert list(_faults(module, SOURCES[module], MODULES)) == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    edges = {
        module: {i.target for i in _imports(source, MODULES) if not (i.scope or i.type_only) and i.target != module}
        for module, source in SOURCES.items()
    }
    try:
        order = list(TopologicalSorter(edges).static_order())
    except CycleError as error:
        pytest.fail("imports run in a circle: " + " -> ".join(reversed(error.args[1])))
    assert set(order) >= MODULES


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("qir.types", "from qir.ir import Graph", "types stands below ir"),
        ("qir.types", "from qir import ir", "types stands below ir"),
        ("qir.ops.conv", "import qir.parser", "ops stands below parser"),
        ("qir.program", "from qir import Graph", "program stands below __init__"),
        ("qir.passes.legalize", "from qir.backends.kernels import conv", "passes never import backends"),
        ("qir.backends.kernels.conv", "def f():\n    from qir import passes", "backends never import passes"),
        ("qir.backends.gpu", "import numba", "only qir.backends.kernels imports numba"),
        ("qir.program", "def f():\n    import onnx.numpy_helper", "only qir.frontend imports onnx"),
        ("qir.ir", "import networkx as nx", "networkx is imported only inside"),
        ("qir.ir", "class Graph:\n    import networkx", "networkx is imported only inside"),
        ("qir.ir", "class Graph:\n    def dump(self):\n        import qir.printer", "ir stands below printer"),
        ("qir.ir", "if TYPE_CHECKING:\n    from qir.printer import Printer", "ir stands below printer"),
        ("qir.ir", "from . import types", "relative import"),
        ("qir.ir", "from qir.nowhere import x", "qir.nowhere stands in no layer"),
        ("qir.nowhere", "", "add 'nowhere' to LAYERS"),
    ],
)
def test_the_law_catches(module: str, source: str, fault: str) -> None:
    modules = frozenset({"qir", "qir.ir", "qir.types", "qir.passes", "qir.backends"})
    (found,) = _faults(module, source, modules)
    assert fault in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("qir.ir", "class Graph:\n    def __str__(self):\n        from qir.printer import text"),
        ("qir.ir", "def view():\n    import networkx"),
        ("qir.ir", "if TYPE_CHECKING:\n    import networkx"),
        ("qir.backends.kernels.conv", "import numba"),
        ("qir.frontend.onnx_import", "import onnx"),
        ("qir.cli", "import qir\nfrom qir.program import Program"),
    ],
)
def test_the_law_allows(module: str, source: str) -> None:
    assert list(_faults(module, source, frozenset({"qir", "qir.ir"}))) == []


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_import_qir_loads_nothing_heavy() -> None:
    code = "import sys, qir; print(sorted({'numba', 'llvmlite', 'onnx', 'networkx', 'scipy'} & set(sys.modules)))"
    result = _python(code)
    assert (result.stdout.strip(), result.returncode) == ("[]", 0), result.stderr


@pytest.mark.parametrize("folder", ["passes", "backends"])
def test_folder_refuses_its_bare_name(folder: str) -> None:
    result = _python(f"import {folder}")
    assert result.returncode == 1
    assert f"ImportError: the folder '{folder}' was imported as '{folder}'; " in result.stderr
    assert f"import it as 'qir.{folder}'" in result.stderr
