"""Oracles that are compiled once for all tests."""

from __future__ import annotations

import pytest
from oracle.ap_fixed import ApFixed


@pytest.fixture(scope="session")
def ap_fixed(tmp_path_factory: pytest.TempPathFactory) -> ApFixed:
    """The ap_fixed headers, with what was compiled for one test kept for the others."""
    return ApFixed(tmp_path_factory.mktemp("ap_fixed"))
