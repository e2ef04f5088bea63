"""Stopping: by a call, by a real signal, and by a kill."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from agent_state import (
    AsyncAgentSessionManager,
    MemoryStateStore,
    StateDirectoryInUseError,
    StatePersistenceManager,
    StorageFullError,
    Task,
    TaskContext,
    TaskFailedError,
)
from agent_state.protocols import Change
from tests.deadlines import soon, until
from tests.runtime.runtimes import (
    TroubledStore,
    counting,
    hanging,
    make_runtime,
    puts,
    working,
)

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
    assert json.loads((root / ".runtime/runtime.json").read_text())["status"] == "stopped"
    assert list((root / ".journal").glob("[!.]*")) == []


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


# -- without a process ----------------------------------------------------------------------------


async def test_a_stop_in_good_order_puts_back_what_did_not_finish() -> None:
    store = MemoryStateStore()
    runtime = make_runtime(store, grace_seconds=0.01)
    started = hanging(runtime)
    await runtime.start()
    await runtime.agents.create("alice", agent_type="worker")
    task = await runtime.tasks.submit("alice", "run")
    await started.wait()
    await runtime.stop()

    runtime = make_runtime(store)
    counting(runtime)
    report = await runtime.start()
    assert not report.after_crash
    assert report.requeued == []
    assert await runtime.tasks.result(task) == 1
    await runtime.stop()


async def test_a_running_handler_is_given_its_grace() -> None:
    runtime = make_runtime(grace_seconds=30)
    go = asyncio.Event()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> str:
        await go.wait()
        return "finished"

    store = runtime.manager.store
    await runtime.start()
    await runtime.agents.create("alice", agent_type="worker")
    task = await runtime.tasks.submit("alice", "run")
    await until(lambda: runtime.runner.running_handlers)
    stopping = asyncio.create_task(runtime.stop())
    await until(lambda: runtime.state.stopping)
    go.set()
    await stopping
    async with StatePersistenceManager(store=store) as manager:
        stored = await manager.load("tasks", ("alice", task.task_id))
        assert isinstance(stored, Task)
        assert (stored.status, stored.result) == ("completed", "finished")


@pytest.mark.parametrize("word", ["in_progress", "completed"])
async def test_a_stop_waits_for_what_is_being_stored(word: str) -> None:
    store = TroubledStore()
    runtime = make_runtime(store)
    working(runtime)
    await runtime.start()
    await runtime.agents.create("alice", agent_type="worker")
    store.hold = puts("tasks", word)
    task = await runtime.tasks.submit("alice", "x")
    await store.held.wait()
    stopping = asyncio.create_task(runtime.stop())
    await asyncio.sleep(0)
    store.gate.set()
    await soon(stopping)
    again = make_runtime(store)
    report = await again.start()
    assert report.requeued == []
    stored = await again.tasks.get(task)
    assert (stored.status, stored.attempts) in {("pending", 0), ("completed", 1)}
    await again.stop()


async def test_a_stop_saves_every_agent_that_can_be_saved() -> None:
    store = TroubledStore()
    runtime = make_runtime(store)
    await runtime.start()
    for agent_id in ("alice", "bob"):
        await runtime.agents.create(agent_id, agent_type="none")
        runtime.state.agents[agent_id].state.metadata["note"] = "unsaved"
        runtime.state.agents[agent_id].stored_status = None  # as whoever changes it says
    store.full = lambda change: change.kind == "agents" and change.key == ("alice",)
    with pytest.raises(StorageFullError):
        await runtime.stop()
    stored = await runtime.manager.load_agent_state("bob")
    assert stored is not None
    assert stored.metadata == {"note": "unsaved"}
    last = await runtime.manager.load_system_state("runtime")
    assert last is not None
    assert last.model_dump()["status"] == "stopped"


async def test_who_waits_when_the_runtime_stops_is_told() -> None:
    runtime = make_runtime()
    working(runtime)
    await runtime.start()
    await runtime.agents.create("alice", agent_type="worker")
    task = await runtime.tasks.submit("alice", "x", delay_seconds=100)
    waiting = asyncio.create_task(runtime.tasks.result(task))
    await asyncio.sleep(0)
    await runtime.stop()
    with pytest.raises(TaskFailedError, match="pending"):
        await soon(waiting)


async def test_a_task_that_was_claimed_when_the_stop_began_is_put_back_unbegun() -> None:
    store, ran = TroubledStore(), list[str]()
    runtime = make_runtime(store)
    working(runtime, ran)
    await runtime.start()
    await runtime.agents.create("alice", agent_type="worker")
    store.hold = puts("tasks", "in_progress")
    task = await runtime.tasks.submit("alice", "x")
    await store.held.wait()
    stopping = asyncio.create_task(runtime.stop())
    await until(lambda: runtime.state.stopping)
    store.gate.set()
    await soon(stopping)
    stored = await runtime.manager.load("tasks", ("alice", task.task_id))
    assert isinstance(stored, Task)
    assert (stored.status, stored.attempts, ran) == ("pending", 0, [])


WITH_BLOCK = """
import asyncio, os, signal, sys
from agent_state import AgentRuntime

runtime = AgentRuntime(sys.argv[1], grace_seconds=0.1)


@runtime.handler("worker")
async def worker(ctx, task):
    await asyncio.sleep(3600)


async def main():
    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        await runtime.tasks.submit("alice", "x")
        while not runtime.runner.running_handlers:
            await asyncio.sleep(0)
        if sys.argv[2] == "ends":  # as the signal comes
            print("the block was ended", flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            print("running", flush=True)
            try:
                await asyncio.Event().wait()
            finally:
                print("the block was ended", flush=True)
    print("after the block", asyncio.current_task().cancelling(), flush=True)
    await asyncio.sleep(0)
    print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, flush=True)


asyncio.run(main())
"""


async def in_block(root: Path, how: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", WITH_BLOCK, str(root), how, stdout=-1
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_block_in_good_order(tmp_path: Path, number: int) -> None:
    process = await in_block(tmp_path, "waits")
    await heard(process, b"running")
    process.send_signal(number)
    out, _ = await soon(process.communicate())
    assert out.decode().split("\n")[:3] == ["the block was ended", "after the block 0", "True"]
    assert process.returncode == 0
    assert task_of(tmp_path)["status"] == "pending"
    assert json.loads((tmp_path / ".runtime/runtime.json").read_text())["status"] == "stopped"


async def test_a_signal_at_the_end_of_the_block_does_not_disturb_the_stop(tmp_path: Path) -> None:
    process = await in_block(tmp_path, "ends")
    out, _ = await soon(process.communicate())
    assert out.decode().split("\n")[:3] == ["the block was ended", "after the block 0", "True"]
    assert process.returncode == 0
    assert task_of(tmp_path)["status"] == "pending"
    assert json.loads((tmp_path / ".runtime/runtime.json").read_text())["status"] == "stopped"


async def test_a_program_that_handles_signals_itself_keeps_its_handlers() -> None:
    loop = asyncio.get_running_loop()
    runtime = make_runtime()
    seen: list[int] = []
    loop.add_signal_handler(signal.SIGTERM, seen.append, 1)
    try:
        async with runtime:
            signal.raise_signal(signal.SIGTERM)
            await until(lambda: seen)
        assert seen == [1]
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


async def test_a_cancellation_by_somebody_else_is_not_swallowed() -> None:
    runtime = make_runtime()
    inside = asyncio.Event()

    async def block() -> None:
        async with runtime:
            inside.set()
            await asyncio.Event().wait()

    running = asyncio.create_task(block())
    await inside.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_a_signal_during_the_start_ends_the_block_once_it_has_begun() -> None:
    class Signalling(MemoryStateStore):
        async def open(self) -> None:
            signal.raise_signal(signal.SIGTERM)
            await asyncio.sleep(0)
            await super().open()

    begun = []
    async with make_runtime(Signalling()):
        begun.append(1)
        await asyncio.Event().wait()
        begun.append(2)
    assert begun == [1]
    signals = signal.getsignal(signal.SIGTERM)
    assert signals is signal.SIG_DFL


class PutsStore(MemoryStateStore):
    """Notes the keys of the agents that are saved."""

    def __init__(self) -> None:
        super().__init__()
        self.saved: list[str] = []

    async def commit(self, changes: Sequence[Change]) -> list[int]:
        self.saved += [each.key[0] for each in changes if each.kind == "agents"]
        return await super().commit(changes)


async def test_stopping_saves_only_agents_that_are_not_stored_as_they_are() -> None:
    store = PutsStore()
    runtime = make_runtime(store)
    working(runtime)
    async with runtime:
        for number in range(100):
            await runtime.agents.create(f"w{number}", agent_type="worker")
        task = await runtime.tasks.submit("w1", "work")
        await runtime.tasks.result(task)
        await runtime.agents.sleep("w2", seconds=1000)
        await runtime.agents.sleep("w3", seconds=1000)
        await runtime.agents.wake("w3")
        await runtime.agents.stop("w4")
        store.saved.clear()
    assert store.saved == ["w3"], "what is known of that one is that it woke"

    again = make_runtime(store)
    working(again)
    async with again:
        store.saved.clear()
    assert store.saved == []

    without = make_runtime(store)  # handlers: its agents wait for some now
    async with without:
        store.saved.clear()
    assert sorted(store.saved) == sorted({f"w{n}" for n in range(100)} - {"w2", "w4"})
    stored = await make_runtime(store).manager.load_agent_state("w7")
    assert stored is not None
    assert stored.status == "waiting"


async def test_an_agent_whose_last_save_failed_is_saved_when_the_runtime_stops() -> None:
    store = TroubledStore()
    runtime = make_runtime(store)
    async with runtime:
        await runtime.agents.create("ann", agent_type="none")
        store.full = puts("agents")
        with pytest.raises(StorageFullError):
            await runtime.save_session_state("ann")
        store.full = lambda _: False
        last_active = runtime.state.agents["ann"].state.last_active
    stored = await make_runtime(store).manager.load_agent_state("ann")
    assert stored is not None
    assert stored.last_active == last_active
