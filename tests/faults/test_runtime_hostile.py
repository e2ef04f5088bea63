"""Handlers that do what no handler should: only their own task suffers, and it says why."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from agent_state import (
    AsyncAgentSessionManager,
    LeaseLostError,
    MemoryStateStore,
    StateStore,
    Task,
    TaskContext,
    TaskFailedError,
)
from agent_state.testing import FakeClock
from tests.deadlines import soon, until
from tests.faults.tally import Tally
from tests.runtime.runtimes import make_runtime

Does = Callable[[TaskContext, Task], Awaitable[object]]

pytestmark = pytest.mark.proof("R", "handlers that hang, block, lie, and die")


def runtime_with(
    does: Does, store: StateStore | None = None, clock: FakeClock | None = None, **settings: Any
) -> AsyncAgentSessionManager:
    """A runtime in which alice is hostile when her task's name says so, and bob never is."""
    runtime = make_runtime(store, clock, grace_seconds=0.05, **settings)

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> object:
        return await does(ctx, task) if task.name == "hostile" else task.name

    return runtime


async def with_agents(runtime: AsyncAgentSessionManager) -> None:
    await runtime.start()
    for agent_id in ("alice", "bob"):
        await runtime.agents.create(agent_id, agent_type="worker")


async def others_work(runtime: AsyncAgentSessionManager, *agents: str) -> None:
    for agent_id in agents:
        task = await runtime.tasks.submit(agent_id, "fine")
        assert await soon(runtime.tasks.result(task)) == "fine"


# -- how an attempt can end -----------------------------------------------------------------------


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class OwnError(BaseException):
    """What ``except Exception`` does not catch."""


def nested() -> list[Any]:
    inner: list[Any] = []
    for _ in range(100_000):
        inner = [inner]
    return inner


def circular() -> list[Any]:
    inner: list[Any] = []
    inner.append(inner)
    return inner


def raises(error: BaseException) -> Does:
    async def does(ctx: TaskContext, task: Task) -> None:
        raise error

    return does


def returns(make: Callable[[], object]) -> Does:
    async def does(ctx: TaskContext, task: Task) -> object:
        return make()

    return does


def steps(function: Callable[[], object]) -> Does:
    async def does(ctx: TaskContext, task: Task) -> object:
        return await ctx.step("step", function)

    return does


def fails(error: BaseException) -> Callable[[], object]:
    def function() -> object:
        raise error

    return function


async def cancel_itself(ctx: TaskContext, task: Task) -> None:
    current = asyncio.current_task()
    assert current is not None
    current.cancel()
    await asyncio.sleep(0)


async def leave_a_foreign_object(ctx: TaskContext, task: Task) -> None:
    ctx.memory["kept"] = object()


async def leave_one_and_fail(ctx: TaskContext, task: Task) -> None:
    ctx.memory["kept"] = object()
    raise ValueError("and fail")


ENDINGS: dict[str, tuple[Does, str]] = {
    "own BaseException": (raises(OwnError("mine")), "OwnError: mine"),
    "BaseExceptionGroup": (raises(BaseExceptionGroup("g", [OwnError()])), "BaseExceptionGroup"),
    "CancelledError": (raises(asyncio.CancelledError()), "cancelled itself"),
    "StopAsyncIteration": (raises(StopAsyncIteration()), "StopAsyncIteration"),
    "StopIteration": (raises(StopIteration()), "StopIteration"),
    "unprintable": (raises(UnprintableError()), "UnprintableError.*its message raises RuntimeErr"),
    "surrogate": (raises(ValueError("\ud800")), r"ValueError: \\ud800"),
    "cancels itself": (cancel_itself, "cancelled itself"),
    "a generator": (returns(lambda: (n for n in range(3))), "result"),
    "NaN": (returns(lambda: float("nan")), "result"),
    "a circle": (returns(circular), "result"),
    "nested": (returns(nested), "result"),
    "beyond 64 bits": (returns(lambda: 2**70), "result"),
    "foreign memory": (leave_a_foreign_object, "working_memory.kept"),
    "foreign memory of a failure": (leave_one_and_fail, "ValueError: and fail"),
    "StopIteration in a step": (steps(lambda: next(iter(()))), "StopIteration"),
    "SystemExit in a step": (steps(fails(SystemExit(3))), "SystemExit: 3"),
    "unprintable in a step": (steps(fails(UnprintableError())), "UnprintableError"),
    "surrogate in a step": (steps(fails(ValueError("\ud800"))), r"ValueError: \\ud800"),
    "a set from a step": (steps(lambda: {1}), r"steps\.step\.result"),
}


@pytest.mark.parametrize("ending", ENDINGS)
async def test_however_a_handler_ends_its_task_says_so_and_others_go_on(
    ending: str, tally: Tally
) -> None:
    does, says = ENDINGS[ending]
    runtime = runtime_with(does)
    await with_agents(runtime)
    task = await runtime.tasks.submit("alice", "hostile", max_attempts=1)
    with pytest.raises(TaskFailedError, match=says):
        await soon(runtime.tasks.result(task))
    await others_work(runtime, "alice", "bob")
    stored = await runtime.tasks.get(task)
    assert (stored.status, stored.attempts) == ("dead", 1)
    tally.points += 3
    tally.faults += 1
    tally.lost += stored.error is None
    await soon(runtime.stop())
    assert tally.clean()


# -- what a handler does to what it was given -----------------------------------------------------


def change_payload(ctx: TaskContext, task: Task) -> None:
    task.payload["x"] = object()


def change_id(ctx: TaskContext, task: Task) -> None:
    task.task_id = ctx.task.task_id = "other"


def change_all(ctx: TaskContext, task: Task) -> None:
    for known in (task, ctx.task):
        known.status, known.attempts, known.lease = "completed", -5, None
        known.steps = None  # type: ignore[assignment]  # a handler need not be typed


def change_progress(ctx: TaskContext, task: Task) -> None:
    ctx.progress["x"] = {1, 2}


@pytest.mark.parametrize("change", [change_payload, change_id, change_all, change_progress])
async def test_a_handler_that_changes_what_it_was_given_changes_nothing_that_is_stored(
    change: Callable[[TaskContext, Task], None], tally: Tally
) -> None:
    async def does(ctx: TaskContext, task: Task) -> str:
        change(ctx, task)
        await ctx.checkpoint({"changed": True})
        return "done"

    runtime = runtime_with(does)
    await with_agents(runtime)
    task = await runtime.tasks.submit("alice", "hostile", {"given": [1]})
    assert await soon(runtime.tasks.result(task)) == "done"
    stored = await runtime.tasks.get(task)
    assert (stored.task_id, stored.payload, stored.attempts) == (task.task_id, {"given": [1]}, 1)
    await others_work(runtime, "alice", "bob")
    tally.faults += 1
    tally.points += 1
    await runtime.stop()


async def test_what_was_stored_stays_whatever_becomes_of_the_value_it_came_from(
    tally: Tally,
) -> None:
    """A step's result, progress, a payload and a letter, each changed after it was stored."""
    seen: list[Any] = []

    async def does(ctx: TaskContext, task: Task) -> None:
        found = await ctx.step("find", lambda: [1, 2, 3])
        seen.append((list(found), task.payload["items"][:], ctx.progress))
        found.clear()
        task.payload["items"].clear()
        noted = {"items": [4]}
        body = {"items": [5]}
        await ctx.checkpoint(noted)
        sent = await ctx.send_mail("bob", subject="items", body=body)
        for changed in (noted["items"], body["items"], sent.body["items"]):
            changed.clear()
        await ctx.step(f"saves the task once more {ctx.attempt}", lambda: None)
        if ctx.attempt == 1:
            raise RuntimeError("again")

    clock = FakeClock()
    runtime = runtime_with(does, clock=clock)
    await with_agents(runtime)
    await runtime.agents.stop("bob")
    payload = {"items": [6]}
    task = await runtime.tasks.submit("alice", "hostile", payload)
    payload["items"].clear()
    live = runtime.state.agents["alice"].tasks[task.task_id]
    await until(lambda: live.task.status == "failed")
    await clock.advance(60)
    await soon(runtime.tasks.result(task))
    tally.points, tally.faults = 4, 2
    assert seen == [([1, 2, 3], [6], {}), ([1, 2, 3], [6], {"items": [4]})]
    [message] = runtime.mail.inbox("bob")
    await runtime.mail.read("bob", message.message_id)
    stored = await runtime.manager.load("mail", ("bob", message.message_id))
    assert stored is not None
    assert stored.model_dump()["body"] == {"items": [5]}
    await runtime.stop()


# -- handlers that do not end, and those that go on after their end -------------------------------


async def test_a_handler_that_hangs_keeps_nobody_else_and_no_stop_waiting(tally: Tally) -> None:
    async def hang(ctx: TaskContext, task: Task) -> None:
        await asyncio.Event().wait()

    store = MemoryStateStore()
    runtime = runtime_with(hang, store)
    await with_agents(runtime)
    task = await runtime.tasks.submit("alice", "hostile")
    waits = await runtime.tasks.submit("alice", "fine")
    await until(lambda: runtime.runner.running_handlers)
    await others_work(runtime, "bob")
    await soon(runtime.stop())

    async def end(ctx: TaskContext, task: Task) -> str:
        return "ended"

    later = runtime_with(end, store, name="later")
    await later.start()
    assert await soon(later.tasks.result(task)) == "ended"
    assert await soon(later.tasks.result(waits)) == "fine"
    tally.points, tally.faults = 2, 1
    await later.stop()


async def test_a_handler_that_will_not_be_cancelled_is_left_behind_and_writes_no_more(
    tally: Tally,
) -> None:
    """Its time is over and the next attempt runs: what the first still does is refused."""
    go_on = asyncio.Event()
    refused: list[object] = []
    saw: list[object] = []

    async def stubborn(ctx: TaskContext, task: Task) -> str:
        if ctx.attempt > 1:
            saw.append(ctx.progress)
            go_on.set()
            await until(lambda: len(refused) == 2)
            await ctx.checkpoint({"by": "the second"})
            return "the second"
        while not go_on.is_set():
            try:
                await go_on.wait()
            except asyncio.CancelledError:
                continue  # as `except BaseException: pass` does
        late: list[Callable[[], Awaitable[object]]] = [
            lambda: ctx.checkpoint({"by": "the first"}),
            lambda: ctx.step("pay", lambda: saw.append("paid")),
        ]
        for act in late:
            with pytest.raises(LeaseLostError, match="has ended"):
                await act()
            refused.append(act)
        return "the first"

    clock = FakeClock()
    runtime = runtime_with(stubborn, clock=clock, cancel_timeout_seconds=0.1)
    await with_agents(runtime)
    task = await runtime.tasks.submit("alice", "hostile", timeout_seconds=5)
    await until(lambda: runtime.runner.running_handlers and clock.sleepers)
    await clock.advance(6)
    await others_work(runtime, "bob")
    await until(lambda: not runtime.runner.running_handlers)
    await clock.advance(60)
    assert await soon(runtime.tasks.result(task)) == "the second"
    stored = await runtime.tasks.get(task)
    assert (stored.result, stored.progress, saw) == ("the second", {"by": "the second"}, [{}])
    tally.points, tally.faults = 3, 2
    await soon(runtime.stop())


async def test_a_stop_does_not_wait_for_who_will_not_be_cancelled(tally: Tally) -> None:
    ended = asyncio.Event()

    async def stubborn(ctx: TaskContext, task: Task) -> None:
        while not ended.is_set():
            try:
                await ended.wait()
            except asyncio.CancelledError:
                continue

    runtime = runtime_with(stubborn, cancel_timeout_seconds=0.1)
    await with_agents(runtime)
    task = await runtime.tasks.submit("alice", "hostile")
    await until(lambda: runtime.runner.running_handlers)
    await soon(runtime.stop())
    stored = await runtime.manager.load("tasks", ("alice", task.task_id))
    assert isinstance(stored, Task)
    assert (stored.status, stored.attempts) == ("pending", 0)
    tally.points, tally.faults = 1, 1
    ended.set()


async def test_what_a_handler_leaves_running_may_not_write_to_its_task(tally: Tally) -> None:
    left: list[asyncio.Task[None]] = []

    async def leave(ctx: TaskContext, task: Task) -> str:
        go = asyncio.Event()

        async def later() -> None:
            await go.wait()
            await ctx.checkpoint({"late": True})

        left.append(asyncio.create_task(later()))
        asyncio.get_running_loop().call_later(0.02, go.set)
        return "done"

    runtime = runtime_with(leave)
    await with_agents(runtime)
    task = await runtime.tasks.submit("alice", "hostile")
    assert await soon(runtime.tasks.result(task)) == "done"
    with pytest.raises(LeaseLostError, match="has ended"):
        await soon(left[0])
    assert (await runtime.tasks.get(task)).progress == {}
    await others_work(runtime, "alice", "bob")
    tally.points, tally.faults = 1, 1
    await runtime.stop()


# -- real time, real processes --------------------------------------------------------------------


async def test_who_blocks_its_loop_past_its_lease_loses_the_task_and_overwrites_nothing(
    tmp_path: Path, tally: Tally
) -> None:
    """Two runtimes on real files, each with a loop of its own."""
    root = tmp_path / "state"
    begun: list[str] = []

    def sharing(name: str) -> AsyncAgentSessionManager:
        runtime = AsyncAgentSessionManager(root, exclusive=False, lease_seconds=0.5)

        @runtime.handler("worker")
        async def worker(ctx: TaskContext, task: Task) -> str:
            begun.append(name)
            if name == "blocks":
                time.sleep(2.0)  # noqa: ASYNC251  # what it must not do
            ctx.memory["by"] = name
            await ctx.send_mail("boss", subject="done", body=name)
            return name

        return runtime

    async def block() -> None:
        async with sharing("blocks") as runtime:
            await runtime.agents.create("alice", agent_type="worker")
            await runtime.agents.create("boss", agent_type="none")
            await runtime.tasks.submit("alice", "work", dedupe_key="once")
            await until(lambda: begun)
            await asyncio.sleep(0.3)  # back at last: it learns that it has lost the task

    thread = Thread(target=lambda: asyncio.run(block()))
    thread.start()
    await until(lambda: begun)
    async with sharing("free") as runtime:
        async with asyncio.timeout(60):
            while thread.is_alive() or begun != ["blocks", "free"]:
                await asyncio.sleep(0.05)
        await runtime.wait_idle()
        [stored] = [found.state async for found in runtime.manager.scan("tasks", "alice")]
        mail = [found.state async for found in runtime.manager.scan("mail", "boss")]
        alice = await runtime.manager.load_agent_state("alice")
    thread.join()
    assert isinstance(stored, Task)
    assert (stored.status, stored.result, stored.interruptions) == ("completed", "free", 1)
    assert alice is not None
    assert alice.context.working_memory == {"by": "free"}
    assert len(mail) == 1
    tally.points, tally.faults = 3, 1


SERVER = """
import asyncio, os, sys
from agent_state import AsyncAgentSessionManager, RetryPolicy

runtime = AsyncAgentSessionManager(sys.argv[1], retry=RetryPolicy(base_seconds=0.01))

def pay(number):
    if not os.path.exists(sys.argv[2] + str(number)):
        open(sys.argv[2] + str(number), "x").close()
        os._exit(9)
    return number

@runtime.handler("worker")
async def worker(ctx, task):
    await ctx.send_mail("boss", subject="paying")
    before = list(ctx.unknown_steps)
    for number in range(2):
        await ctx.step(f"pay {number}", pay, number)
    return before

async def main():
    async with runtime:
        await runtime.agents.create("boss", agent_type="boss")
        await runtime.agents.create("alice", agent_type="worker")
        task = await runtime.tasks.submit("alice", "pay", dedupe_key="once")
        print(await runtime.tasks.result(task), len(runtime.mail.inbox("boss")), flush=True)

asyncio.run(main())
"""


async def test_a_process_that_exits_in_a_step_does_that_step_again_and_no_other(
    tmp_path: Path, tally: Tally
) -> None:
    """``os._exit`` in the middle of two steps, each the first time it runs."""
    returned: list[int | None] = []
    said = b""
    while len(returned) < 9 and (not returned or returned[-1] == 9):
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            SERVER,
            str(tmp_path / "state"),
            str(tmp_path / "paid-"),
            stdout=asyncio.subprocess.PIPE,
        )
        said, _ = await asyncio.wait_for(process.communicate(), 60)
        returned.append(process.returncode)
    assert returned == [9, 9, 0]
    assert said == b"['pay 1'] 1\n"
    tally.points, tally.faults = len(returned), 2
