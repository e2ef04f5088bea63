"""A directory to look at, and a way to call a command."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from agent_state.cli import main
from tests.cli.commands import Call, Called, fill


@pytest.fixture
async def state(tmp_path: Path) -> Path:
    return await fill(tmp_path / "state")


@pytest.fixture
def damaged(state: Path) -> Path:
    (state / "agents/alice.json").write_text('{"agent_id": ')
    return state


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Call the program, in this process."""

    def called(*args: object) -> Called:
        monkeypatch.setattr(sys, "argv", ["agent-state", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return Called(code, captured.out, captured.err)

    return called
