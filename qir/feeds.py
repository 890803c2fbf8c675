"""Samples in `.npz` files: arrays by input name whose leading dimension counts samples, cut into feeds and joined."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qir.errors import QirError
from qir.ir import Graph, Value
from qir.serialization import write_bytes

Tensor = npt.NDArray[Any]

#: Samples in a feed of a graph whose batch is open: few enough for memory, enough for fast matrix products.
CHUNK: Final = 32


def read_npz(path: str | Path) -> dict[str, Tensor]:
    """The arrays of a file. Raises QirError when it cannot be read, is no `.npz` file or holds Python objects."""
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as member:
                    arrays[name.removesuffix(".npy")] = np.lib.format.read_array(member, allow_pickle=False)
    except OSError as fault:
        raise QirError(f"cannot read {path}: {fault.strerror or fault}") from fault
    except (EOFError, NotImplementedError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error) as fault:
        raise QirError(
            f"{path} is no .npz file of plain arrays, or is cut short; write it with "
            "numpy.savez(file, **{input name: samples})"
        ) from fault
    return arrays


def write_npz(path: str | Path, arrays: Mapping[str, Tensor]) -> None:
    """Write arrays by name, whole or not at all. Raises QirError when the place cannot be written."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # numpy.savez takes no array named "file"
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
    write_bytes(Path(path), buffer.getvalue())


def split_samples(inputs: Sequence[Value], arrays: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The samples as feeds: of 32 where the batch is open, else of the batch size that the graph fixes.

    Beside an open batch, an input of fixed shape goes whole into every feed. Names and shapes that do not fit stay as
    they are, for whoever takes the feeds to refuse. Raises QirError when samples do not fill whole batches or inputs
    hold different numbers of them.
    """
    if {v.name for v in inputs} != set(arrays) or any(arrays[v.name].ndim == 0 for v in inputs if v.type.rank):
        return [dict(arrays)]
    is_open = any(v.type.is_batched for v in inputs)
    parts = {v.name: _parts(v, arrays[v.name], is_open) for v in inputs}
    counts = {name: len(p) for name, p in parts.items() if p is not None}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name!r} {count}" for name, count in counts.items())
        raise QirError(f"the inputs hold different numbers of samples; in batches: {listed}")
    total = next(iter(counts.values()), 1)
    return [{name: arrays[name] if p is None else p[i] for name, p in parts.items()} for i in range(total)]


def _parts(value: Value, array: Tensor, is_open: bool) -> list[Tensor] | None:
    """The pieces of one input; None where every feed takes the whole array."""
    if value.type.is_batched:
        return [array[i : i + CHUNK] for i in range(0, len(array), CHUNK)]
    if is_open:
        return None
    if not value.type.rank:
        return list(array) if array.ndim else [array]
    batch = int(value.type.shape[0])
    if not batch or len(array) % batch:
        raise QirError(
            f"input {value.name!r} holds {len(array)} samples, and the graph takes exactly {batch} at a time; "
            "give whole batches"
        )
    return [array[i : i + batch] for i in range(0, len(array), batch)]


def join_samples(graph: Graph, results: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The outputs of all feeds behind each other; beside an open batch, those of fixed shape as the first feed made."""
    found: dict[str, list[Tensor]] = {name: [] for name in graph.output_names}
    for result in results:
        for name, array in result.items():
            found[name].append(np.asarray(array))
    is_open = any(v.type.is_batched for v in graph.inputs)
    joined = {}
    for name, value in zip(graph.output_names, graph.outputs, strict=True):
        arrays = found[name]
        whole = is_open and not value.type.is_batched
        joined[name] = arrays[0] if whole or len(arrays) == 1 else np.concatenate([np.atleast_1d(a) for a in arrays])
    return joined
