"""A real server process and real signals."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from agent_state import AsyncAgentSessionManager, StateDirectoryInUseError

SERVER = """
import asyncio, sys
from agent_state import AsyncAgentSessionManager

runtime = AsyncAgentSessionManager(sys.argv[1], grace_seconds=float(sys.argv[2]))

@runtime.handler("worker")
async def worker(ctx, task):
    print("started", flush=True)
    try:
        await asyncio.sleep(task.payload["seconds"])
    except asyncio.CancelledError:
        if task.payload.get("stubborn"):
            await asyncio.sleep(60)
        raise
    return "slept"

async def main():
    serving = asyncio.create_task(runtime.serve())
    while runtime.report is None:
        await asyncio.sleep(0.01)
    print("restored", len(runtime.report.agents), flush=True)
    await runtime.agents.create("alice", agent_type="worker")
    await runtime.tasks.submit("alice", "sleep", {"seconds": float(sys.argv[3])}, dedupe_key="one")
    await serving

asyncio.run(main())
"""


async def serve(root: Path, grace: float, seconds: float) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        SERVER,
        str(root),
        str(grace),
        str(seconds),
        stdout=asyncio.subprocess.PIPE,
    )
    await heard(process, b"started")
    return process


async def heard(process: asyncio.subprocess.Process, word: bytes) -> None:
    assert process.stdout is not None
    async with asyncio.timeout(60):
        async for line in process.stdout:
            if line.startswith(word):
                return
    raise AssertionError(f"the server ended without saying {word!r}")


def task_of(root: Path) -> dict[str, object]:
    [path] = (root / "tasks/alice").glob("*.json")
    content: dict[str, object] = json.loads(path.read_text())
    return content


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_server_in_good_order(tmp_path: Path, number: int) -> None:
    root = tmp_path / "state"
    process = await serve(root, 0.1, 60)
    process.send_signal(number)
    assert await asyncio.wait_for(process.wait(), 60) == 0
    task = task_of(root)
    assert (task["status"], task["attempts"], "lease" in task) == ("pending", 0, False)
    assert json.loads((root / "system/runtime.json").read_text())["status"] == "stopped"
    assert list((root / ".journal").iterdir()) == []


async def test_a_handler_that_finishes_within_the_grace_is_finished(tmp_path: Path) -> None:
    root = tmp_path / "state"
    process = await serve(root, 30, 0.5)
    process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(process.wait(), 60) == 0
    task = task_of(root)
    assert (task["status"], task["result"]) == ("completed", "slept")


async def test_while_it_runs_nobody_else_may_write_and_after_a_kill_everybody_may(
    tmp_path: Path,
) -> None:
    root = tmp_path / "state"
    process = await serve(root, 0.1, 60)
    with pytest.raises(StateDirectoryInUseError, match=f"pid {process.pid}"):
        await AsyncAgentSessionManager(root).start()
    os.kill(process.pid, signal.SIGKILL)
    await process.wait()
    runtime = AsyncAgentSessionManager(root)
    report = await runtime.start()
    assert report.after_crash
    assert [task.attempts for task in report.requeued] == [1]
    assert report.waiting == ["alice"]
    await runtime.stop()
