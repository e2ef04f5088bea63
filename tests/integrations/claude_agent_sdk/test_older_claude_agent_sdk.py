"""Transcripts that older versions have kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from claude_agent_sdk import fork_session_via_store, get_session_messages_from_store

from agent_state_integrations.claude_agent_sdk import AgentStateSessionStore
from tests.integrations.older import OlderState, check, name_of, older_states

VERSIONS = ("claude-agent-sdk",)
PROJECT = "/home/ann/work"
SESSION = "11111111-1111-4111-8111-111111111111"


def entries(turn: int) -> list[Any]:
    """A question and its answer, as the command line of Claude Code writes them."""
    common = {
        "sessionId": SESSION,
        "cwd": PROJECT,
        "version": "2.0.0",
        "isSidechain": False,
        "timestamp": f"2026-01-0{turn}T12:00:00.000Z",
    }
    first, second = (f"{turn}{n}000000-0000-4000-8000-000000000000" for n in (1, 2))
    before = f"{turn - 1}2000000-0000-4000-8000-000000000000" if turn > 1 else None
    asked = {"role": "user", "content": f"question {turn} ü"}
    said = {"role": "assistant", "content": [{"type": "text", "text": f"answer {turn}"}]}
    return [
        {"type": "user", "uuid": first, "parentUuid": before, "message": asked, **common},
        {"type": "assistant", "uuid": second, "parentUuid": first, "message": said, **common},
        {"type": "custom-title", "customTitle": f"title {turn}", "sessionId": SESSION},
    ]


async def write(directory: Path, turn: int) -> None:
    async with AgentStateSessionStore(directory) as store:
        key: Any = {"project_key": "-home-ann-work", "session_id": SESSION}
        for n in range(1, turn + 1):  # what is stored already is not doubled
            await store.append(key, entries(n)[: 3 if n == turn else 2])
        await store.append({**key, "subpath": "subagents/agent-1"}, entries(turn)[:2])
        await store.append({**key, "session_id": f"other {turn}"}, entries(turn)[:1])


async def read(directory: Path) -> Any:
    found: dict[str, Any] = {}
    async with AgentStateSessionStore(directory) as store:
        for listed in await store.list_sessions("-home-ann-work"):
            key: Any = {"project_key": "-home-ann-work", "session_id": listed["session_id"]}
            names = await store.list_subkeys(key)
            parts = [await store.load({**key, "subpath": name}) for name in ("", *names)]
            found[listed["session_id"]] = [names, parts]
        for summary in await store.list_session_summaries("-home-ann-work"):
            found[summary["session_id"]].append(summary["data"])
    return found


@pytest.mark.parametrize("older", older_states("claude_agent_sdk"), ids=name_of)
async def test_a_transcript_of_an_older_version_goes_on(older: OlderState, tmp_path: Path) -> None:
    await check(older, tmp_path, write, read)


@pytest.mark.parametrize("older", older_states("claude_agent_sdk"), ids=name_of)
async def test_the_sdk_reads_and_forks_what_an_older_one_had(
    older: OlderState, tmp_path: Path
) -> None:
    older.unpack(tmp_path)
    async with AgentStateSessionStore(tmp_path) as store:
        messages = await get_session_messages_from_store(store, SESSION, PROJECT)
        assert [each.type for each in messages] == ["user", "assistant"]
        forked = await fork_session_via_store(store, SESSION, PROJECT)
        messages = await get_session_messages_from_store(store, forked.session_id, PROJECT)
        assert [each.type for each in messages] == ["user", "assistant"]
