"""``agent-state import strands``: what a FileSessionManager has stored, in a state directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from strands.session.file_session_manager import FileSessionManager
from strands.types.session import SessionAgent, SessionMessage

from agent_state.cli.app import run as main
from agent_state_integrations.strands import AgentStateSessionRepository


def message(number: int, text: str = "hello") -> SessionMessage:
    content: Any = [{"text": f"{text} {number}"}, {"image": {"source": {"bytes": b"\x00\xff"}}}]
    return SessionMessage.from_message({"role": "user", "content": content}, number)


class Swarm:
    """A multi-agent with a state."""

    id = "swarm"

    def serialize_state(self) -> dict[str, Any]:
        return {"id": "swarm", "nodes": {"b": 1, "a": [2]}}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "old"
    for name in ("one", "two"):
        old = FileSessionManager(name, storage_dir=str(path))
        for agent in ("a", "b"):
            old.create_agent(name, SessionAgent(agent, {"n": 1}, {"removed": 0}))
            for number in range(12):  # more than nine: their files are not sorted by number
                old.create_message(name, agent, message(number))
        old.create_multi_agent(name, Swarm())
    return path


def test_every_session_is_brought_over_once(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"
    command = ["import", "strands", str(directory), "--state", str(state)]

    assert main([*command, "--dry-run"]) == 0
    assert "2 sessions with 48 messages would be brought over" in capsys.readouterr().out
    assert not state.exists()
    for _ in range(2):
        assert main([*command, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report == {"sessions": 2, "agents": 4, "messages": 48, "refused": {}}
    old = FileSessionManager("one", storage_dir=str(directory))
    with AgentStateSessionRepository(state) as new:
        assert new.read_session("one") == old.read_session("one")
        assert new.read_agent("one", "b") == old.read_agent("one", "b")
        assert new.list_messages("one", "a") == old.list_messages("one", "a")
        assert new.read_multi_agent("one", "swarm") == old.read_multi_agent("one", "swarm")


def test_what_differs_or_is_damaged_is_refused(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"
    with AgentStateSessionRepository(state) as new:
        new.create_agent("one", SessionAgent("a", {}, {}))
        new.create_message("one", "a", message(3, "another"))
    (directory / "session_two/agents/agent_a/messages/message_5.json").write_text("{")

    assert main(["import", "strands", str(directory), "--state", str(state)]) == 1
    said = capsys.readouterr().err
    assert "not brought over: session_one" in said
    assert "not brought over: session_two" in said
    assert main(["import", "strands", str(tmp_path / "missing"), "--state", str(state)]) == 2
    assert "no such directory" in capsys.readouterr().err
