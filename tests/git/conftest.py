"""Fixtures of the tests with a real git repository."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.git.repositories import Repository
from tests.git.server import Server


@pytest.fixture(autouse=True)
def state_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The claims of this test's servers are seen by no other test."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "repository")


@pytest.fixture
async def servers() -> AsyncIterator[list[Server]]:
    begun: list[Server] = []
    yield begun
    for server in begun:
        await server.end()
