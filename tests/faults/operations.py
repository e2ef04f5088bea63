"""Every public operation that changes something, each on a directory that was prepared for it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent_state import AsyncAgentSessionManager, RetryPolicy, Task, TaskContext, TaskFilter
from agent_state.encryption import Keyring
from agent_state.manager import StatePersistenceManager
from agent_state.models import MailMessage
from agent_state.protocols import StateStore
from agent_state.storage import WALStateStore
from agent_state.testing import Crash, Fault, FaultyDisk

Runtime = AsyncAgentSessionManager

# -- what is there before ----------------------------------------------------------------------


async def inhabit(manager: StatePersistenceManager) -> None:
    """Agents with tasks, mail and a log, one of them asleep; some of it is for cleaning up."""
    await manager.save("agents", "zoe", {"agent_id": "zoe", "status": "stopped"})
    for name in ("alice", "bob", "carol"):
        await manager.save("agents", name, {"agent_id": name, "agent_type": "worker"})
    for name, status in (("old", "completed"), ("due", "completed"), ("next", "cancelled")):
        task = {"task_id": name, "agent_id": "bob", "status": status, "name": name}
        await manager.save("tasks", ("bob", name), task)
    for name, status in (("m1", "read"), ("m2", "archived"), ("m3", "archived")):
        mail = {"message_id": name, "from_agent": "bob", "to_agent": "alice", "status": status}
        await manager.save("mail", ("alice", name), mail)
    await manager.save("sleep", "carol", {"agent_id": "carol", "sleep_until": "2999-01-01T00:00Z"})
    await manager.save("system", "settings", {"colour": "red"})
    for number in range(3):
        await manager.append("notes", "alice", {"n": number}, dedupe_key=f"d{number}")
    await manager.save("notes", "first", {"n": 1})
    await manager.save("notes", "second", {"n": 2})


async def prepare_settled(root: Path, keyring: Keyring | None = None) -> None:
    async with StatePersistenceManager(root, encryption=keyring) as manager:
        await inhabit(manager)


async def prepare_nothing(root: Path, keyring: Keyring | None = None) -> None:
    """No directory at all, and none above it."""


async def prepare_journal(root: Path, keyring: Keyring | None = None) -> None:
    """What an exclusive store leaves that was killed with a journal in two segments."""
    await prepare_settled(root, keyring)
    store = WALStateStore(root)
    manager = StatePersistenceManager(store=store, encryption=keyring)
    with FaultyDisk() as disk:
        await manager.open()
        await store._writing().stop()
        for number in range(2):
            await manager.save("agents", "alice", {"agent_id": "alice", "n": number})
            async with manager.group() as group:
                group.save("notes", "first", {"n": 10 + number})
                group.delete("notes", "second")
                group.save("notes", ("third", str(number)), {"n": number})
                group.append("notes", "alice", {"n": 3 + number}, dedupe_key=f"d{3 + number}")
            for change in range(2):  # the second one is a patch
                large = {"n": 2 * number + change, "text": ["long enough"] * 400}
                await manager.save("notes", "large", large)
            if number == 0 and store._commits is not None:
                await store._commits.seal()
        disk.crash()
        with contextlib.suppress(Crash):
            await manager.close()


async def prepare_intent(root: Path, keyring: Keyring | None = None, *, renames: int = 2) -> None:
    """What a shared store leaves that was killed in the middle of a group."""
    await prepare_settled(root, keyring)
    manager = StatePersistenceManager(root, encryption=keyring)
    await manager.open()
    with FaultyDisk(Fault(at=renames, call="rename", action="crash before")):
        with contextlib.suppress(Crash):
            async with manager.group() as group:
                group.save("notes", "first", {"n": 10})
                group.append("notes", "alice", {"n": 3}, dedupe_key="d3")
                group.delete("notes", "second")
                group.save("notes", ("third", "x"), {"n": 3})
        with contextlib.suppress(Crash):
            await manager.close()


SCENES: dict[str, Callable[[Path, Keyring | None], Awaitable[None]]] = {
    "settled": prepare_settled,
    "nothing": prepare_nothing,
    "journal": prepare_journal,
    "intent": prepare_intent,
}

# -- what is done ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """``run`` does it, with an open manager or (``runtime``) a running runtime."""

    run: Callable[[Any], Awaitable[object]]
    scene: str = "settled"
    runtime: bool = False


OPERATIONS: dict[str, Operation] = {}
Manager = StatePersistenceManager


def operation(
    name: str, *scenes: str
) -> Callable[[Callable[[Manager], Awaitable[object]]], Callable[[Manager], Awaitable[object]]]:
    def register(
        run: Callable[[Manager], Awaitable[object]],
    ) -> Callable[[Manager], Awaitable[object]]:
        for scene in scenes or ("settled",):
            title = name if scene == "settled" else f"{name}, {scene}"
            OPERATIONS[title] = Operation(run, scene)
        return run

    return register


@operation("open and close", "settled", "nothing", "journal", "intent")
async def nothing(_: Manager) -> None:
    """Opening recovers, closing settles; nothing else is done."""


@operation("save", "settled", "nothing", "journal", "intent")
async def save(manager: Manager) -> None:
    await manager.save_agent_state("alice", {"agent_id": "alice", "status": "active"})


@operation("save anew")
async def create(manager: Manager) -> None:
    await manager.save_system_state("new", {"n": 1})
    await manager.save("notes", ("deep", "er", "new"), {"n": 1})


@operation("save nothing new")
async def same(manager: Manager) -> None:
    await manager.save("notes", "first", {"n": 1})


@operation("save a task queue")
async def queue(manager: Manager) -> None:
    state = await manager.load_task_queue_state("bob")
    assert state is not None
    await manager.save_task_queue_state("alice", {**state.model_dump(), "agent_id": "alice"})


@operation("save a mailbox")
async def mailbox(manager: Manager) -> None:
    state = await manager.load_mailbox_state("alice")
    assert state is not None
    await manager.save_mailbox_state("bob", {**state.model_dump(), "agent_id": "bob"})


@operation("save a sleep")
async def sleep(manager: Manager) -> None:
    await manager.save_sleep_state("bob", {"agent_id": "bob", "reason": "tired"})


@operation("delete", "settled", "journal")
async def delete(manager: Manager) -> None:
    await manager.delete("notes", "first")


@operation("delete and make anew")
async def reborn(manager: Manager) -> None:
    await manager.delete("notes", "first")
    await manager.save("notes", "first", {"n": 5})


@operation("erase", "settled", "journal", "intent")
async def erase(manager: Manager) -> None:
    await manager.erase("tasks", "bob")
    await manager.erase("notes", "alice")
    await manager.append("notes", "alice", {"n": 9}, dedupe_key="d0")


@operation("edit")
async def edit(manager: Manager) -> None:
    for number in range(2):
        async with manager.edit("system", "settings") as state:
            state.colour = f"blue {number}"


@operation("group", "settled", "journal", "intent")
async def group(manager: Manager) -> None:
    async with manager.group() as changes:
        changes.save("notes", "first", {"n": 20})
        changes.delete("notes", "second")
        changes.save("agents", "dave", {"agent_id": "dave"})
        changes.append("notes", "alice", {"n": 7}, dedupe_key="d7")
        changes.append("notes", "fresh", {"n": 1})


@operation("append", "settled", "nothing", "journal", "intent")
async def append(manager: Manager) -> None:
    await manager.append("notes", "alice", {"n": 8, "text": "x" * 3000}, dedupe_key="d8")
    await manager.append("notes", "alice", {"n": 8, "text": "again"}, dedupe_key="d8")
    await manager.append("notes", "alice", {"n": 9})


@operation("cleanup")
async def cleanup(manager: Manager) -> None:
    await manager.cleanup_old_states(max_age_hours=0)


@operation("quarantine")
async def quarantine(manager: Manager) -> None:
    await manager.store.quarantine("notes", ("second",), "no good")


@operation("many at once")
async def together(manager: Manager) -> None:
    await asyncio.gather(
        manager.save("agents", "alice", {"agent_id": "alice", "n": 1}),
        manager.append("notes", "bob", {"n": 1}),
        manager.save("system", "other", {"n": 1}),
        manager.delete("mail", ("alice", "m1")),
        manager.save("tasks", ("bob", "due"), {"task_id": "due", "agent_id": "bob", "n": 2}),
    )


@operation("flush")
async def flush(manager: Manager) -> None:
    await manager.save("notes", "first", {"n": 30})
    await manager.flush()
    await manager.save("notes", "first", {"n": 31})
    await manager.append("notes", "alice", {"n": 31})
    await manager.flush()


# -- the runtime's -----------------------------------------------------------------------------


def make_runtime(store: StateStore) -> Runtime:
    """A runtime on real time whose tasks are tried again at once."""
    policy = RetryPolicy(base_seconds=0.001, max_interruptions=1000)
    runtime = Runtime(store=store, retry=policy, grace_seconds=1.0)

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> object:
        number = await ctx.step("number", lambda: 42)
        ctx.memory["last"] = task.name
        if task.name == "mail":
            await ctx.send_mail("carol", subject="from a task", body=number)
        if task.name == "checkpoint":
            await ctx.checkpoint({"half": True})
        if task.name == "fails once" and ctx.attempt - task.interruptions == 1:
            raise RuntimeError("the first try always fails")
        return number

    return runtime


def runtime_operation(
    name: str,
) -> Callable[[Callable[[Runtime], Awaitable[object]]], Callable[[Runtime], Awaitable[object]]]:
    def register(
        run: Callable[[Runtime], Awaitable[object]],
    ) -> Callable[[Runtime], Awaitable[object]]:
        OPERATIONS[f"runtime: {name}"] = Operation(run, runtime=True)
        return run

    return register


@runtime_operation("start and stop")
async def start(_: Runtime) -> None:
    """Restoring and saving all sessions is all there is."""


@runtime_operation("a task")
async def task(runtime: Runtime) -> None:
    done = await runtime.tasks.submit("alice", "mail", {"n": 1}, dedupe_key="one")
    await runtime.tasks.submit("alice", "mail", {"n": 1}, dedupe_key="one")
    assert await runtime.tasks.result(done) == 42


@runtime_operation("tasks that fail and report")
async def failing(runtime: Runtime) -> None:
    tasks = [await runtime.tasks.submit("bob", name, {}) for name in ("fails once", "checkpoint")]
    for one in tasks:
        await runtime.tasks.result(one)


@runtime_operation("mail")
async def mail(runtime: Runtime) -> None:
    sent: MailMessage = await runtime.mail.send("bob", "alice", subject="hi", body="there")
    await runtime.mail.read("alice", sent.message_id)
    await runtime.mail.reply("alice", sent.message_id, "thanks")
    await runtime.mail.archive("alice", "m1")


@runtime_operation("sleep and wake")
async def nap(runtime: Runtime) -> None:
    await runtime.agents.sleep("alice", seconds=3600, wake_on=["mail_received"])
    await runtime.mail.send("bob", "alice", subject="wake up", body="")
    await runtime.agents.wake("carol")
    await runtime.wait_idle()


@runtime_operation("sessions")
async def sessions(runtime: Runtime) -> None:
    await runtime.agents.create("dave", agent_type="worker", configuration={"a": 1})
    await runtime.agents.stop("bob")
    await runtime.agents.start("bob")
    await runtime.save_session_state("alice")
    await runtime.emit("system_event", {"n": 1})


@runtime_operation("cancel")
async def cancel(runtime: Runtime) -> None:
    await runtime.agents.stop("bob")
    waiting = await runtime.tasks.submit("bob", "never", {})
    await runtime.tasks.cancel(waiting)


@runtime_operation("operate tasks")
async def operate(runtime: Runtime) -> None:
    await runtime.tasks.retry("next")
    await runtime.tasks.result("next")
    await runtime.tasks.delete("old")
    await runtime.tasks.delete_all(TaskFilter(name="due"))


async def perform(name: str, store: StateStore) -> None:
    """Open, do it, close. Raises what it raises; the store is closed all the same."""
    doing = OPERATIONS[name]
    if doing.runtime:
        runtime = make_runtime(store)
        async with runtime:
            await doing.run(runtime)
        return
    async with StatePersistenceManager(store=store) as manager:
        await doing.run(manager)
