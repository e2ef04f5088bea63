"""Checkpoints, histories and sessions that older versions have kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from agent_framework import AgentSession, Message, WorkflowCheckpoint

from agent_state_integrations.agent_framework import (
    AgentStateCheckpointStorage,
    AgentStateHistoryProvider,
)
from tests.integrations.agent_framework.letters import (
    ALLOWED,
    NAME,
    STEPS,
    Draft,
    Letter,
    workflow_with,
)
from tests.integrations.older import OlderState, check, name_of, older_states

try:  # the oldest versions have no stores of sessions
    from agent_state_integrations.agent_framework import AgentStateSessionStore
except ImportError:
    AgentStateSessionStore = None  # type: ignore[assignment,misc]  # see above

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # parts of it are experimental

VERSIONS = ("agent-framework-core",)


def storage_in(directory: Path) -> AgentStateCheckpointStorage:
    return AgentStateCheckpointStorage(directory, allowed_checkpoint_types=ALLOWED)


async def write(directory: Path, turn: int) -> None:
    async with storage_in(directory) as storage:
        letter = Letter(to="ann", draft=Draft("ü", tags={"a"}))
        for name in ("both", f"of/{turn}"):
            made = WorkflowCheckpoint(
                workflow_name="w",
                graph_signature_hash="g",
                checkpoint_id=name,
                timestamp=f"2026-01-0{turn}T12:00:00+00:00",
                state={"letter": letter, "n": (turn, 2**70), "b": b"\x00\xff"},
            )
            await storage.save(made)
        if turn == 1:
            await workflow_with(storage).run(Draft(""))
    async with AgentStateHistoryProvider(directory) as history:
        for session_id in ("s/ü", None):
            call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
            given = [Message("user", [f"turn {turn}"]), Message("assistant", [call])]
            await history.save_messages(session_id, given)
    if AgentStateSessionStore is not None:
        async with AgentStateSessionStore(directory) as sessions:
            for name in ("both", f"of/{turn}"):
                session = AgentSession(session_id=f"inner {turn}")
                session.state = {"n": 2**70, "m": [Message("user", ["hi"])]}
                await sessions.set(name, session)


async def read(directory: Path) -> Any:
    async with storage_in(directory) as storage:
        found = [
            [each.checkpoint_id, each.timestamp, repr(each.state)]
            for each in await storage.list_checkpoints(workflow_name="w")
        ]
    async with AgentStateHistoryProvider(directory) as history:
        told = [
            [[str(each.role), each.text, len(each.contents)] for each in messages]
            for messages in [await history.get_messages(name) for name in ("s/ü", None)]
        ]
    kept = []
    if AgentStateSessionStore is not None:
        async with AgentStateSessionStore(directory) as sessions:
            for name in ("both", "of/1", "of/2"):
                session = await sessions.get(name)
                if session is not None:
                    text = session.state["m"][0].text
                    kept.append([name, session.session_id, session.state["n"], text])
    return [found, told, kept]


@pytest.mark.parametrize("older", older_states("agent_framework"), ids=name_of)
async def test_what_an_older_version_kept_is_read_and_replaced(
    older: OlderState, tmp_path: Path
) -> None:
    await check(older, tmp_path, write, read)


@pytest.mark.parametrize("older", older_states("agent_framework"), ids=name_of)
async def test_a_workflow_goes_on_from_each_checkpoint_of_an_older_version(
    older: OlderState, tmp_path: Path
) -> None:
    older.unpack(tmp_path)
    async with storage_in(tmp_path) as storage:
        checkpoints = await storage.list_checkpoints(workflow_name=NAME)
        assert len(checkpoints) >= STEPS
        for each in checkpoints[:-1]:
            result = await workflow_with(storage).run(checkpoint_id=each.checkpoint_id)
            assert result.get_outputs() == ["." * STEPS]
