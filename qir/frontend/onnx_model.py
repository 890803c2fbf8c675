"""Reading ONNX files: the protobuf, the operator set, and tensors, whose data may lie in files beside the model."""

from __future__ import annotations

import math
import os
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import numpy_helper

from qir.errors import ImportModelError

OLDEST_OPSET: Final = 7


def read_model(path: Path) -> onnx.ModelProto:
    """The model in a file. Raises ImportModelError when it cannot be read or is no complete ONNX model."""
    try:
        data = path.read_bytes()
    except OSError as fault:
        raise ImportModelError(f"cannot be read: {fault.strerror}; give the path of an .onnx file") from fault
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as fault:
        raise ImportModelError("is not an ONNX model, or is cut short; export or copy it again") from fault
    return model


def check_model(model: onnx.ModelProto) -> int:
    """The version of the operator set. Raises ImportModelError when the model is empty, too old or too new."""
    if not model.ir_version or not model.HasField("graph") or not model.graph.output:
        raise ImportModelError("is not an ONNX model, or is cut short; export or copy it again")
    versions = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if not versions:
        raise ImportModelError("names no ONNX operator set; it is cut short, or uses only foreign operators")
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= versions[0] <= newest:
        raise ImportModelError(
            f"uses ONNX operator set {versions[0]}, known are {OLDEST_OPSET} to {newest}; "
            f"convert it with onnx.version_converter, or update the onnx package"
        )
    if model.graph.sparse_initializer:
        name = model.graph.sparse_initializer[0].values.name
        raise ImportModelError(f'tensor "{name}" is sparse; store it as a dense initializer')
    return int(versions[0])


def tensor_array(tensor: onnx.TensorProto, folder: Path | None) -> npt.NDArray[Any]:
    """The data of a tensor, read-only.

    External data are read from inside `folder` alone. Raises ImportModelError, which names the tensor, otherwise.
    """
    if any(d < 0 for d in tensor.dims):
        raise ImportModelError(f'tensor "{tensor.name}" has negative dimensions {list(tensor.dims)}; export it again')
    try:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            return _external_array(tensor, folder)
        array = numpy_helper.to_array(tensor)
    except OSError as fault:
        raise ImportModelError(f'tensor "{tensor.name}" cannot be read: {fault}') from fault
    except (KeyError, TypeError, ValueError) as fault:
        raise ImportModelError(f'tensor "{tensor.name}" is malformed: {fault}; export the model again') from fault
    array.flags.writeable = False
    return array


def _external_array(tensor: onnx.TensorProto, folder: Path | None) -> npt.NDArray[Any]:
    fields = {entry.key: entry.value for entry in tensor.external_data}
    location = fields.get("location", "")
    path = _inside(folder, location, tensor.name)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    if dtype.kind not in "biuf":
        raise ImportModelError(f'tensor "{tensor.name}": external data of type {dtype} are not supported')
    count, offset = math.prod(tensor.dims), int(fields.get("offset", 0))
    needed, size = count * dtype.itemsize, path.stat().st_size
    length = int(fields.get("length", needed))
    if offset < 0 or length != needed or offset + needed > size:
        raise ImportModelError(
            f'tensor "{tensor.name}" takes {needed} bytes at offset {offset} of "{location}", '
            f"the model states {length} and the file has {size}; copy the file again"
        )
    array = np.fromfile(path, dtype.newbyteorder("<"), count, offset=offset).astype(dtype, copy=False)
    array = array.reshape(tuple(tensor.dims))
    array.flags.writeable = False
    return array


def _inside(folder: Path | None, location: str, name: str) -> Path:
    """The file that a tensor names. Raises ImportModelError when it is missing or lies outside the model's folder."""
    if folder is None:
        raise ImportModelError(
            f'tensor "{name}" has external data ("{location}"), but a model object has no folder; import its file'
        )
    # A path is judged by the rules of both families, so that a model means the same everywhere.
    pure = (PurePosixPath(location), PureWindowsPath(location))
    outside = not location or any(p.is_absolute() or p.drive or p.root or ".." in p.parts for p in pure)
    path = folder / location
    if not outside and not os.path.lexists(path):
        raise ImportModelError(
            f'tensor "{name}": the file "{location}" is missing in {folder}; copy it beside the model'
        )
    if outside or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise ImportModelError(
            f'tensor "{name}": "{location}" lies outside the model\'s folder, where nothing is read; '
            f"copy the file into the folder and name it by a relative path"
        )
    if not path.is_file():
        raise ImportModelError(f'tensor "{name}": "{location}" in {folder} is no file; copy the data there')
    return path
