"""What the repository promises around the code: commands, switches and the data that ship with the package."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("command", ["pip install -e . && qir demo", "pip install -e '.[test]' && pytest"])
def test_readme_has_the_command(command: str) -> None:
    assert command in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()


def test_bless_is_refused_in_ci() -> None:
    command = [sys.executable, "-m", "pytest", "--bless", "--collect-only", "-q", "tests/unit/test_repository.py"]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "CI": "true"}, capture_output=True, text=True, check=False
    )
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert "bless on your machine" in result.stderr


def test_demo_data_is_what_its_origin_says() -> None:
    images = gzip.decompress((ROOT / "tests" / "data" / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((ROOT / "tests" / "data" / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:]
    with np.load(ROOT / "qir" / "data" / "fashion_mnist_demo.npz") as demo:
        assert demo["calibration_images"].shape == (256, 28, 28)
        assert demo["calibration_images"].dtype == np.uint8
        assert demo["test_images"].shape == (1000, 28, 28)
        assert demo["test_images"].tobytes() == images[: 1000 * 28 * 28]
        assert demo["test_labels"].dtype == np.uint8
        assert demo["test_labels"].tobytes() == labels[:1000]
