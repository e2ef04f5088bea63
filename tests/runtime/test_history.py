"""A conversation that a killed process left with a call and no result can be continued."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agent_state import AsyncAgentSessionManager, MemoryStateStore, Task, TaskContext
from tests.core.model_apis import FORMS, Form, RefusedError

KILLED = """
import asyncio, json, os, signal, sys
from agent_state import AsyncAgentSessionManager

runtime = AsyncAgentSessionManager(sys.argv[1])


@runtime.handler("assistant")
async def work(ctx, task):
    ctx.history.extend(task.payload["messages"])
    await ctx.checkpoint({"asked": True})
    os.kill(os.getpid(), signal.SIGKILL)  # before the tool has a result


async def main():
    async with runtime:
        await runtime.agents.create("ann", agent_type="assistant")
        await runtime.tasks.submit("ann", "work", {"messages": json.loads(sys.argv[2])})
        await runtime.wait_idle()


asyncio.run(main())
"""


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
async def test_a_history_that_a_kill_left_with_an_orphaned_call_is_repaired(
    form: Form, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    messages = [form.said("hello"), *form.calls("a", "b"), *form.answers("b")]
    command = [sys.executable, "-c", KILLED, str(state), json.dumps(messages)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    found: list[Any] = []
    runtime = AsyncAgentSessionManager(state)

    @runtime.handler("assistant")
    async def work(ctx: TaskContext, task: Task) -> int:
        found.append([*ctx.history])
        repair = ctx.repair_history()
        assert repair.messages == ctx.history
        assert not ctx.repair_history()
        return len(repair.unknown)

    async with runtime:
        await runtime.wait_idle()
        history = runtime.agents.get("ann").context.conversation_history
        [task] = await runtime.tasks.list("ann")

    assert task.result == 1
    assert found == [messages]
    with pytest.raises(RefusedError):
        form.judge(messages)
    form.judge(history)  # what is stored is what the model is sent


async def test_a_history_without_orphans_is_not_touched() -> None:
    runtime = AsyncAgentSessionManager(store=MemoryStateStore())

    @runtime.handler("assistant")
    async def work(ctx: TaskContext, task: Task) -> bool:
        ctx.add_turn("user", "hello")
        before = ctx.history
        return bool(ctx.repair_history()) or before is not ctx.history

    async with runtime:
        await runtime.agents.create("ann", agent_type="assistant")
        task = await runtime.tasks.submit("ann", "work")
        assert await runtime.tasks.result(task) is False
