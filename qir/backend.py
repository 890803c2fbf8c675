"""How targets are found: those that ship with qir, those of installed plugins, and TOML files by path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path

from qir.errors import TargetError
from qir.target import Target, read_target

GROUP = "qir.backends"


@dataclass(frozen=True)
class Backend:
    """What a backend provides: a name and the file of its contract. Plugins expose one as an entry point."""

    name: str
    target_file: Path


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
            raise TargetError(f"backend plugin {point.name!r} claims the name {backend.name!r}, which is taken")
        found[backend.name] = backend
    return found


def load_target(name: str | Path) -> Target:
    """The target of this name, or the one that a `.toml` file describes.

    Raises TargetError when the name is unknown or the file is malformed.
    """
    if isinstance(name, Path) or str(name).endswith(".toml"):
        return read_target(name)
    backends = find_backends()
    if name not in backends:
        raise TargetError(
            f"unknown target {name!r}; there are: {', '.join(sorted(backends))}; or give the path of a .toml file"
        )
    target = read_target(backends[name].target_file)
    if target.name != name:
        raise TargetError(f"{backends[name].target_file}: describes {target.name!r}, but is installed as {name!r}")
    return target
