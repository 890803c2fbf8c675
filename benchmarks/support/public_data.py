"""Public models and fonts that are not part of the repository, unpacked into a folder of the caller's choice.

Layout: one folder a package, holding what the package would install. What lies there already is not fetched again, so a
folder filled by other means serves as well.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

#: Folder -> distribution on PyPI; both Apache-2.0. Only the model files inside are used, nothing is installed.
WHEELS = {"qonnx": "qonnx==1.0.0", "rapidocr_onnxruntime": "rapidocr-onnxruntime==1.4.4"}
#: Debian packages with free TrueType fonts.
FONTS = ("fonts-dejavu-core", "fonts-freefont-ttf", "fonts-liberation")

MNIST_CONV = "qonnx/qonnx/data/onnx/mnist-conv/model.onnx"
PPOCR_CLS = "rapidocr_onnxruntime/rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx"


class FetchError(Exception):
    """A package could not be had; the text says which, why, and what to do."""


def wheel_file(folder: Path, place: str) -> Path:
    """The file `place` of `folder`, whose first part is a key of `WHEELS`; fetched with pip when it is not there."""
    name = place.split("/", 1)[0]
    if not (folder / name).is_dir():
        with tempfile.TemporaryDirectory() as scratch:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            _run([*pip, "--dest", scratch, WHEELS[name]], Path(scratch), f"download {WHEELS[name]} from PyPI")
            with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
                wheel.extractall(Path(scratch) / "unpacked")
            _keep(Path(scratch) / "unpacked", folder / name)
    if not (folder / place).is_file():
        raise FetchError(f"{folder / place} is missing; remove {folder / name}, and it is fetched again")
    return folder / place


def fonts(folder: Path) -> list[Path]:
    """Every TrueType text font of the packages in `FONTS`, sorted; fetched with apt-get where they are not there."""
    for package in FONTS:
        if not (folder / package).is_dir():
            with tempfile.TemporaryDirectory() as scratch:
                mend = f"get the Debian package {package} (apt-get update may help), or unpack it at {folder / package}"
                _run(["apt-get", "download", "-q", package], Path(scratch), mend)
                archive = next(Path(scratch).glob("*.deb"))
                _run(["dpkg-deb", "-x", str(archive), "unpacked"], Path(scratch), mend)
                _keep(Path(scratch) / "unpacked", folder / package)
    found = (file for package in FONTS for file in (folder / package).rglob("*.ttf"))
    return sorted((file for file in found if "MathTeX" not in file.name), key=str)


def _keep(unpacked: Path, place: Path) -> None:
    """Move a complete folder to its place: one that is there is whole."""
    place.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=place.parent)) / place.name
    shutil.copytree(unpacked, part)
    part.rename(place)
    part.parent.rmdir()


def _run(command: list[str], folder: Path, what: str) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError as fault:
        raise FetchError(f"could not {what}: there is no command {command[0]}") from fault
    except subprocess.CalledProcessError as fault:
        raise FetchError(f"could not {what}:\n{fault.stderr.strip()}") from fault
