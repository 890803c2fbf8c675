"""Runs the RESCALE of Arm's TOSA reference model, a program that its wheel carries.

The wheel asks for other versions of NumPy and flatbuffers than the tests have, and would install a package `tests`.
So it is not installed: its program and schema are unpacked from it, into a folder that is kept between runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

#: Pinned like what pyproject.toml pins for the tests.
REQUIREMENT = "tosa-tools==2026.8.0"
PROGRAM = "tosa_reference_model" + (".exe" if sys.platform == "win32" else "")
SCHEMA = "tosa.fbs"
_TYPES: dict[str, npt.DTypeLike] = {"INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT48": np.int64}


class TosaReference:
    """The reference model; its files are fetched into `folder` unless they are there. Raises where pip cannot."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        if not (folder / PROGRAM).exists():
            _fetch(folder)

    def rescale(
        self,
        values: Array,
        multipliers: Array,
        shifts: Array,
        rounding_mode: str,
        source: str = "INT32",
        target: str = "INT32",
        zero_point: int = 0,
    ) -> Array:
        """Values [n, channels], rescaled with a multiplier and a right shift for each channel.

        Multipliers have 16 bits where the values have 48. Raises RuntimeError when the model refuses an operand.
        """
        channels = values.shape[1]
        wide = source != "INT48"
        no_zero_point = np.zeros(1, np.int32) if wide else np.zeros(6, np.int8)
        constants = {
            "multiplier": (
                (channels,),
                "INT32" if wide else "INT16",
                multipliers.astype(np.int32 if wide else np.int16),
            ),
            "shift": ((channels,), "INT8", shifts.astype(np.int8)),
            "input_zp": ((1,), source, no_zero_point),
            "output_zp": ((1,), target, np.array([zero_point], _TYPES[target])),
        }
        attributes = {
            "scale32": wide,
            "rounding_mode": rounding_mode,
            "per_channel": True,
            "input_unsigned": False,
            "output_unsigned": False,
        }
        tensors = [_tensor("x", values.shape, source), _tensor("y", values.shape, target)]
        tensors += [_tensor(name, *constant) for name, constant in constants.items()]
        operators = [_operator("CONST", "Const", {}, [], name) for name in constants]
        operators.append(_operator("RESCALE", "Rescale", attributes, ["x", *constants], "y"))
        return self._run(_graph(tensors, operators), values.astype(_TYPES[source]))

    def _run(self, graph: dict[str, Any], values: Array) -> Array:
        with tempfile.TemporaryDirectory() as scratch:
            Path(scratch, "graph.json").write_text(json.dumps(graph), encoding="utf-8")
            np.save(Path(scratch, "x.npy"), values)
            options = {
                "operator_fbs": self._folder / SCHEMA,
                "flatbuffer_dir": scratch,
                "output_dir": scratch,
                "tosa_file": "graph.json",
                "tosa_level": "NONE",
            } | {"ifm_name": "x", "ifm_file": "x.npy", "ofm_name": "y", "ofm_file": "y.npy"}
            words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
            done = subprocess.run([self._folder / PROGRAM, *words], capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stdout + done.stderr)
            return np.asarray(np.load(Path(scratch, "y.npy")))


def _tensor(name: str, shape: tuple[int, ...], kind: str, data: Array | None = None) -> dict[str, Any]:
    held = {} if data is None else {"data": list(data.tobytes())}
    return {"name": name, "shape": shape, "type": kind} | held


def _operator(kind: str, table: str, attributes: dict[str, Any], inputs: list[str], output: str) -> dict[str, Any]:
    attribute = {"attribute_type": f"{table}Attribute", "attribute": attributes}
    return {"op": kind, "inputs": inputs, "outputs": [output]} | attribute


def _graph(tensors: list[dict[str, Any]], operators: list[dict[str, Any]]) -> dict[str, Any]:
    body = {"name": "main", "operators": operators, "tensors": tensors, "inputs": ["x"], "outputs": ["y"], "shapes": []}
    version = {"_major": 1, "_minor": 0, "_patch": 0, "_draft": False}
    return {"version": version, "regions": [{"name": "main", "blocks": [body]}]}


def _fetch(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*command, "--dest", scratch, REQUIREMENT], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in (SCHEMA, PROGRAM):  # the program last: what is there is whole
                part = Path(scratch, name)
                part.write_bytes(archive.read(f"bin/{name}"))
                part.chmod(0o755)
                os.replace(part, folder / name)
