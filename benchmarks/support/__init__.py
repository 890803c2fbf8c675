"""What the benchmarks share. The models and graphs of the tests serve here too."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

sys.path.insert(0, str(ROOT / "tests"))

import models  # noqa: E402

__all__ = ["ROOT", "models"]
