"""Switches and hypothesis profiles that all tests share."""

import os

import pytest
from hypothesis import HealthCheck, settings

# Speed differs between machines and the first call of a kernel compiles it: no example fails for being slow.
settings.register_profile("ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(
    "nightly",
    max_examples=2000,
    derandomize=False,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--bless", action="store_true", help="rewrite the expectations of golden files; refused where CI is set"
    )


def pytest_configure(config: pytest.Config) -> None:
    in_ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
    if in_ci and config.getoption("--bless"):
        raise pytest.UsageError(
            "--bless rewrites what the tests expect, which CI never does: bless on your machine and commit what changed"
        )


@pytest.fixture(scope="session")
def bless(pytestconfig: pytest.Config) -> bool:
    """Whether golden expectations are to be rewritten instead of compared."""
    return bool(pytestconfig.getoption("--bless"))
