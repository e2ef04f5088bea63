"""A real server of agents, killed again and again: every task done, every mail once."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest

SERVER = """
import asyncio, sys
from agent_state import AsyncAgentSessionManager, RetryPolicy

root, agents, tasks = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
runtime = AsyncAgentSessionManager(
    root, lease_seconds=1.0, retry=RetryPolicy(base_seconds=0.01, max_interruptions=1000)
)

@runtime.handler("worker")
async def worker(ctx, task):
    n = task.payload["n"]
    ctx.memory["begun"] = ctx.memory.get("begun", 0) + 1
    doubled = await ctx.step("double", lambda: n * 2)
    await ctx.send_mail("boss", subject=task.name, body=doubled)
    await ctx.checkpoint({"mailed": True})
    await asyncio.sleep(0.002)
    if n % 17 == 0 and ctx.attempt - task.interruptions == 1:
        raise RuntimeError("the first try always fails")
    await ctx.submit("clerk", "file", {"n": n})
    return doubled

@runtime.handler("clerk")
async def clerk(ctx, task):
    return task.payload["n"]

async def main():
    async with runtime:
        print("restored", flush=True)
        await runtime.create_session("boss", agent_type="boss")
        await runtime.create_session("clerk", agent_type="clerk")
        for n in range(agents):
            await runtime.create_session(f"w{n}", agent_type="worker")
        for n in range(tasks):
            await runtime.submit(f"w{n % agents}", f"task {n}", {"n": n}, dedupe_key=f"t{n}")
        print("submitted", flush=True)
        await runtime.wait_idle()
        print("idle", flush=True)

asyncio.run(main())
"""


async def serve(root: Path, agents: int, tasks: int, lifetime: float | None) -> bool:
    """Run the server; kill it after so many seconds of work. Whether it got to its end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        SERVER,
        str(root),
        str(agents),
        str(tasks),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    async with asyncio.timeout(60):
        assert await process.stdout.readline() == b"restored\n"
    try:
        await asyncio.wait_for(process.wait(), lifetime)
    except TimeoutError:
        os.kill(process.pid, signal.SIGKILL)
    return await process.wait() == 0


@pytest.mark.timeout(240)
async def test_a_killed_server_finishes_every_task_and_sends_every_mail_once(
    tmp_path: Path,
) -> None:
    root, agents, tasks = tmp_path / "state", 20, 300
    chance = random.Random(4)
    kills = 0
    while kills < 12 and not await serve(root, agents, tasks, chance.uniform(0.05, 0.6)):
        kills += 1
    assert kills >= 5, "the server was too quick to be killed"
    assert await serve(root, agents, tasks, None)

    done = [json.loads(path.read_text()) for path in root.glob("tasks/w*/*.json")]
    assert Counter(task["status"] for task in done) == {"completed": tasks}
    assert {task["payload"]["n"]: task["result"] for task in done} == {
        n: n * 2 for n in range(tasks)
    }
    mail = [json.loads(path.read_text()) for path in root.glob("mail/boss/*.json")]
    assert Counter(message["subject"] for message in mail) == {f"task {n}": 1 for n in range(tasks)}
    filed = [json.loads(path.read_text()) for path in root.glob("tasks/clerk/*.json")]
    assert sorted(task["payload"]["n"] for task in filed) == list(range(tasks))
    assert {task["status"] for task in filed} == {"completed"}
    assert list((root / ".quarantine").rglob("*")) == []
    assert list(root.rglob(".tmp-*")) == []
