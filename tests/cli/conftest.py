"""A directory to look at, and a way to call a command."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent_state.cli.app import run
from tests.cli.commands import Call, Called, fill


@pytest.fixture
async def state(tmp_path: Path) -> Path:
    return await fill(tmp_path / "state")


@pytest.fixture
def damaged(state: Path) -> Path:
    (state / "agents/alice.json").write_text('{"agent_id": ')
    return state


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def called(*args: object) -> Called:
        code = run([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Called(code, captured.out, captured.err)

    return called
