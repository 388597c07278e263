"""How long the chaos kit runs: a short form by default, all of it with --chaos-full."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chaos-full", action="store_true", help="the full chaos kit")


@pytest.fixture(scope="session")
def chaos_full(request: pytest.FixtureRequest) -> bool:
    """Only a run that names this folder knows the option; any other is a short one."""
    return bool(request.config.getoption("--chaos-full", default=False))
