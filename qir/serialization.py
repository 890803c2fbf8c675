"""Graphs on disk: a `.qir` text and, beside it, a safetensors sidecar of its large arrays.

Constants that take fewer bits than their dtype are packed there: one row of bytes each, as `qir.packing` lays them out.
Files are written whole or not at all: to a temporary name first, then renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from qir.arrays import Array
from qir.errors import QirError, ResourceError
from qir.ir import Graph
from qir.packing import pack_integers
from qir.parser import parse
from qir.printer import DTYPE_WORDS, ResourceNames, print_graph, resource_names

#: What a program's proof rests on, beside its text.
CERTIFICATE_FILE: Final = "certificate.json"

#: Names are quoted without line breaks, so nothing else in a text can start a line like this.
_SIDECAR: Final = re.compile(
    r'^[ \t]*resources[ \t]*("(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*")', re.MULTILINE
)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all. Raises QirError when the place cannot be written."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
    except OSError as fault:
        raise QirError(f"cannot write {path}: {fault.strerror}; choose a place that can be written") from fault


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that takes the place of `path` only when the block succeeds.

    An existing folder is replaced only when nothing is in it, at any depth, but files that qir writes; anything else
    there is an error, as is a parent that cannot be written.
    """
    if path.exists() and not _replaceable(path):
        raise QirError(f"{path} exists and holds more than qir output; choose another output folder or remove it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as fault:
        raise QirError(f"cannot write {path}: {fault.strerror}; choose an output folder that can be written") from fault
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        _swap(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, path: Path) -> None:
    """Put `new` in the place of `path`, or leave both as they are."""
    old = new.with_name(f"{new.name}.old")
    try:
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(new, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
    except OSError as fault:
        raise QirError(f"cannot replace {path}: {fault.strerror}; choose another output folder") from fault
    shutil.rmtree(old, ignore_errors=True)


def _replaceable(path: Path) -> bool:
    if not path.is_dir() or path.is_symlink():
        return False
    found = (p for p in path.rglob("*") if not p.is_dir())
    return all(p.suffix in (".qir", ".safetensors") or p.name == CERTIFICATE_FILE for p in found)


def sidecar_name(names: ResourceNames) -> str:
    """A file name that follows from what the file holds, so that dumps with the same constants share one file."""
    digest = hashlib.sha256()
    for name, array in sorted(names.arrays.items()):
        digest.update(f"{name}\0{array.sha256}\0{names.packings[name] or ''}\0".encode())
    return f"constants-{digest.hexdigest()[:16]}.safetensors"


def _stored(names: ResourceNames) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a sidecar by name: bytes of those that are packed, the others as they are."""
    packings = ((name, array, names.packings[name]) for name, array in names.arrays.items())
    return {n: a.data if packing is None else pack_integers(a.data, packing) for n, a, packing in packings}


def write_graph(graph: Graph, path: str | Path, sidecar: str = "") -> None:
    """Write the text to `path` and its large arrays beside it, in `sidecar` or a file named by their hash."""
    path = Path(path)
    names = resource_names(graph)
    sidecar = (sidecar or sidecar_name(names)) if names.arrays else ""
    text = print_graph(graph, sidecar).encode()  # before anything is written: a graph may have no text
    if names.arrays and not (sidecar.startswith("constants-") and (path.parent / sidecar).exists()):
        write_bytes(path.parent / sidecar, save(_stored(names)))
    write_bytes(path, text)


def read_graph(path: str | Path) -> Graph:
    """The graph written at `path`, with the sidecar that its text names.

    Raises QirError when a file is missing or unreadable, ParseError and ResourceError as `parse` does.
    """
    path = Path(path)
    text = read_text(path)
    sidecar = sidecar_of(text)
    return parse(text, _read_sidecar(path, sidecar) if sidecar is not None else None, str(path))


def read_text(path: Path) -> str:
    """The text of a file. Raises QirError when it is missing or unreadable."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        reason = fault.strerror if isinstance(fault, OSError) else "it is not UTF-8 text"
        raise QirError(f"cannot read {path}: {reason}") from fault


def sidecar_of(text: str) -> str | None:
    """The file name of the sidecar that a text names, or None."""
    match = _SIDECAR.search(text)
    return str(json.loads(match[1])) if match else None


def _read_sidecar(path: Path, name: str) -> dict[str, Array]:
    if Path(name).name != name:
        raise ResourceError(f"{path}: the sidecar {name!r} must lie beside the text, under a plain file name")
    sidecar = path.parent / name
    if not sidecar.is_file():
        raise ResourceError(f"{path}: its sidecar {sidecar} is missing; keep the two files together")
    try:
        found = load_file(sidecar)
    except (SafetensorError, OSError, TypeError, AttributeError) as fault:  # the last two: a type that NumPy lacks
        raise ResourceError(f"{sidecar}: not a readable safetensors file: {fault}") from fault
    for key, data in found.items():
        if data.dtype.name not in DTYPE_WORDS:  # NumPy may know more types, where another package registers them
            raise ResourceError(f"{sidecar}: not a readable safetensors file: array {key!r} is of {data.dtype}")
    return {key: Array(_frozen(data), key) for key, data in found.items()}


def _frozen(data: npt.NDArray[Any]) -> npt.NDArray[Any]:
    data.setflags(write=False)  # nobody else holds it, so that Array need not copy it
    return data
