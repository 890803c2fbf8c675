"""What the benchmarks share. The models and graphs of the tests serve here too."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import large_graphs
import models

__all__ = ["large_graphs", "models"]
