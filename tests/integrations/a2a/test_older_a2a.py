"""Tasks that older versions have saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from a2a.server.context import ServerCallContext
from a2a.types.a2a_pb2 import ListTasksRequest, Message, Part, Role, Task, TaskState
from google.protobuf.json_format import MessageToDict

from agent_state_integrations.a2a import AgentStateTaskStore
from tests.integrations.older import OlderState, check, name_of, older_states

VERSIONS = ("a2a-sdk",)
ANN = ServerCallContext()


def task(task_id: str, turn: int) -> Task:
    made = Task(id=task_id, context_id=f"context {turn}")
    made.status.state = TaskState.TASK_STATE_INPUT_REQUIRED
    made.status.timestamp.FromSeconds(1_700_000_000 + turn)
    made.history.append(
        Message(message_id=f"m{turn}", role=Role.ROLE_USER, parts=[Part(text="ü and more")])
    )
    made.artifacts.add(artifact_id="a").parts.add().raw = b"\x00\xff"
    made.metadata.update({"n": 1.5, "nested": {"a": [True, None]}})
    return made


async def write(directory: Path, turn: int) -> None:
    async with AgentStateTaskStore(directory) as store:
        await store.save(task("both", turn), ANN)
        await store.save(task(f"of/{turn}", turn), ANN)


async def read(directory: Path) -> Any:
    async with AgentStateTaskStore(directory) as store:
        found = await store.list(ListTasksRequest(), ANN)
        return [MessageToDict(each) for each in found.tasks]


@pytest.mark.parametrize("older", older_states("a2a"), ids=name_of)
async def test_tasks_of_an_older_version_are_read_and_replaced(
    older: OlderState, tmp_path: Path
) -> None:
    await check(older, tmp_path, write, read)
    async with AgentStateTaskStore(tmp_path / "older") as store:
        assert await store.get("of/1", ANN) == task("of/1", 1)
