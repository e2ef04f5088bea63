"""Sessions in the files of Claude Code, which the SDK's own function brings into a store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from claude_agent_sdk import (
    get_session_messages,
    get_session_messages_from_store,
    get_subagent_messages,
    get_subagent_messages_from_store,
    import_session_to_store,
)

from agent_state_integrations.claude_agent_sdk import AgentStateSessionStore

SESSION = str(uuid4())


def transcript(count: int, **fields: Any) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for n in range(count):
        role = "assistant" if n % 2 else "user"
        made.append(
            {
                "type": role,
                "uuid": str(uuid4()),
                "parentUuid": made[-1]["uuid"] if made else None,
                "sessionId": SESSION,
                "timestamp": f"2026-01-01T12:00:{n % 60:02}.000Z",
                "message": {"role": role, "content": [{"type": "text", "text": f"ü {n}"}]},
                **fields,
            }
        )
    return made


def write(path: Path, entries: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(each)}\n" for each in entries))


async def test_a_session_of_claude_code_is_the_same_in_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLAUDE_CONFIG_DIR", str(tmp_path / "config"))
    work = tmp_path / "work"
    work.mkdir()
    folder = (
        tmp_path
        / "config"
        / "projects"
        / "".join(each if each.isalnum() else "-" for each in str(work.resolve()))
    )
    path = folder / f"{SESSION}.jsonl"
    write(path, transcript(1_203, cwd=str(work)))  # more than two batches
    agent = folder / SESSION / "subagents" / "agent-one"
    write(agent.with_suffix(".jsonl"), transcript(4, isSidechain=True, agentId="one"))
    agent.with_suffix(".meta.json").write_text('{"agentType": "Explore"}')

    for _ in range(2):  # a second run adds nothing
        async with AgentStateSessionStore(tmp_path / "state") as store:
            await import_session_to_store(SESSION, store, directory=str(work))
    async with AgentStateSessionStore(tmp_path / "state") as store:
        theirs = get_session_messages(SESSION, directory=str(work))
        assert len(theirs) == 1_203
        assert await get_session_messages_from_store(store, SESSION, str(work)) == theirs
        theirs = get_subagent_messages(SESSION, "one", directory=str(work))
        assert len(theirs) == 4
        ours = await get_subagent_messages_from_store(store, SESSION, "one", str(work))
        assert ours == theirs
        key: Any = {"project_key": folder.name, "session_id": SESSION}
        lines = [json.loads(each) for each in path.read_text().splitlines()]
        assert await store.load(key) == lines
