"""How targets are found: those that ship with qir, those of installed plugins, and TOML files by path."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from typing import Any

from qir.errors import TargetError
from qir.ir import Graph, Op
from qir.target import Target
from qir.target_file import read_target

GROUP = "qir.backends"


@dataclass(frozen=True)
class Backend:
    """What a backend provides: a name and the file of its contract; plugins expose one as an entry point.

    Optional are `kernels(op, facts)`, which gives a `qir.backends.kernels.kernel.Kernel` for an op that it has a kernel
    of its own for, or None; `cost(graph, target)`, which gives the cost of a fixed-stage graph by part; and
    `export(graph, folder)`, which writes what the chip's own tools read. `qir.testing.check_backend` checks all three.
    """

    name: str
    target_file: Path
    kernels: Callable[[Op, Any], Any] | None = None
    cost: Callable[[Graph, Target], Mapping[str, float]] | None = None
    export: Callable[[Graph, Path], None] | None = None

    def target(self) -> Target:
        """The contract. Raises TargetError when the file is malformed or describes a target of another name."""
        target = read_target(self.target_file, _parent_file)
        if target.name != self.name:
            raise TargetError(f"{self.target_file}: describes {target.name!r}, but is installed as {self.name!r}")
        return target


def shipped_backends() -> dict[str, Backend]:
    """The backends in qir's own folder, by target name."""
    found: dict[str, Backend] = {}
    for folder in sorted(Path(str(files("qir.backends"))).iterdir()):
        file = folder / "target.toml"
        if file.is_file():
            name = folder.name.replace("_", "-")
            found[name] = Backend(name, file)
    return found


def find_backends() -> Mapping[str, Backend]:
    """Every backend by name. Raises TargetError, which names the plugin, when one cannot be loaded or takes a name."""
    found = shipped_backends()
    for point in entry_points(group=GROUP):
        try:
            backend = point.load()
        except Exception as fault:
            raise TargetError(f"backend plugin {point.name!r} ({point.value}) failed to load: {fault}") from fault
        if not isinstance(backend, Backend):
            raise TargetError(f"backend plugin {point.name!r} ({point.value}) is no qir.backend.Backend")
        if backend.name in found:
            raise TargetError(
                f"backend plugin {point.name!r} ({point.value}) claims the name {backend.name!r}, which is taken"
            )
        found[backend.name] = backend
    return found


def plugin_for(target: str) -> Backend | None:
    """The installed plugin for the target of a compiled graph.

    None where that ships with qir or is not installed here: a graph says all that it computes without its target.
    Raises TargetError as `find_backends` does.
    """
    if not target or target in shipped_backends():
        return None
    return find_backends().get(target)


def load_backend(name: str | Path) -> Backend:
    """The backend of this name; of a `.toml` file, one that is nothing but its contract.

    Raises TargetError when the name is unknown or the file is malformed.
    """
    if _is_path(name):
        return Backend(load_target(name).name, Path(name))
    return _backend(str(name))


def target_of(given: Target | str | os.PathLike[str]) -> Target:
    """The target that is given, as such, by name or by path. Raises TargetError as `load_target` does."""
    if isinstance(given, Target):
        return given
    return load_target(given if isinstance(given, str) else Path(given))


def load_target(name: str | Path) -> Target:
    """The target of this name, or the one that a `.toml` file describes.

    Raises TargetError when the name is unknown or the file is malformed.
    """
    if _is_path(name):
        return read_target(name, _parent_file)
    return _backend(str(name)).target()


def _is_path(name: str | Path) -> bool:
    return isinstance(name, Path) or name.endswith(".toml")


def _backend(name: str) -> Backend:
    shipped = shipped_backends()
    backends = shipped if name in shipped else find_backends()
    if name not in backends:
        raise TargetError(
            f"unknown target {name!r}; there are: {', '.join(sorted(backends))}; or give the path of a .toml file"
        )
    return backends[name]


def _parent_file(name: str, child: Path) -> Path:
    """The file of the target that `child` inherits from: a path beside it, or a name."""
    return child.parent / name if _is_path(name) else _backend(name).target_file
