"""Changing commands on the directory of a running server: the server does what is asked."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agent_state import AgentRuntime, Task, TaskContext
from tests.cli.commands import agent_state
from tests.deadlines import SECONDS, until


@pytest.fixture(
    params=[
        True,
        pytest.param(False, marks=pytest.mark.long("calls the command several times")),
    ],
    ids=["exclusive", "shared"],
)
async def runtime(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[AgentRuntime]:
    """A server with two agents that count words; it owns the directory, or shares it."""
    runtime = AgentRuntime(tmp_path / "state", exclusive=request.param)

    @runtime.handler("reader")
    async def read(_ctx: TaskContext, task: Task) -> int:
        return len(str(task.payload["text"]).split())

    async with runtime:
        for name in ("ann", "bob"):
            await runtime.agents.create(name, agent_type="reader")
        yield runtime


async def asked(folder: Path, *args: str) -> Any:
    return json.loads(await agent_state(folder, *args, "--json"))


async def test_a_task_is_queued_and_done(runtime: AgentRuntime, tmp_path: Path) -> None:
    payload = json.dumps({"text": "two words"})

    task = (await asked(tmp_path, "tasks", "submit", "ann", "count", "--payload", payload))["task"]

    assert await runtime.tasks.result(task["task_id"], timeout_seconds=SECONDS) == 2
    assert list((tmp_path / "state").glob("requests/*")) == []


async def test_a_message_reaches_the_agent(runtime: AgentRuntime, tmp_path: Path) -> None:
    sent = (await asked(tmp_path, "mail", "send", "bob", "hello", "--body", "there"))["message"]

    def inbox() -> list[Any]:
        return [(each.message_id, each.body) for each in runtime.mail.inbox("bob")]

    await until(lambda: inbox() == [(sent["message_id"], "there")])


async def test_agents_are_woken_stopped_and_started(runtime: AgentRuntime, tmp_path: Path) -> None:
    await runtime.agents.sleep("ann", seconds=86_400)

    assert (await asked(tmp_path, "agents", "wake", "ann", "bob"))["changed"] == ["ann"]
    await until(lambda: runtime.agents.get("ann").status == "idle")
    assert await agent_state(tmp_path, "agents", "stop", "ann") == "1 agent stopped\n"
    await until(lambda: runtime.agents.get("ann").status == "stopped")
    payload = json.dumps({"text": "three more words"})
    task = (await asked(tmp_path, "tasks", "submit", "ann", "count", "--payload", payload))["task"]
    assert (await asked(tmp_path, "tasks", "show", task["task_id"]))["task"]["status"] == "pending"

    assert (await asked(tmp_path, "agents", "start", "ann"))["changed"] == ["ann"]

    assert await runtime.tasks.result(task["task_id"], timeout_seconds=SECONDS) == 3


async def test_what_the_server_refuses_is_said(runtime: AgentRuntime, tmp_path: Path) -> None:
    assert runtime.agents.get("ann").status == "idle"

    assert await agent_state(tmp_path, "tasks", "submit", "nobody", "count", code=2) == ""
    assert await agent_state(tmp_path, "agents", "stop", "nobody", code=1) == "0 agents stopped\n"
    assert list((tmp_path / "state").glob("requests/*")) == []
