"""The runtime's operations, cancelled at every await: memory and disk still say the same."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent_state import AgentStateError, AsyncAgentSessionManager, Task, TaskContext
from tests.deadlines import until
from tests.faults.interrupting import Footprint, SlowSync, cancel_at, locks_held
from tests.faults.tally import Tally

Runtime = AsyncAgentSessionManager
Step = Callable[[Runtime, str], Awaitable[object]]
MOST = 200


def make_runtime(root: Path, exclusive: bool) -> Runtime:
    runtime = AsyncAgentSessionManager(root, exclusive=exclusive, grace_seconds=1.0)

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> object:
        return task.payload.get("n")

    return runtime


@dataclass(frozen=True)
class Act:
    """``run`` is cancelled after ``first``; then ``newer`` counts, and ``look`` gives True.

    ``look`` is asked of the same runtime and of the next one; an agent's name goes to all.
    """

    first: Step
    run: Step
    newer: Step
    look: Step


async def nothing(runtime: Runtime, name: str) -> None:
    pass


async def sleep(runtime: Runtime, name: str) -> None:
    await runtime.agents.sleep(name, reason="tired")


async def wake(runtime: Runtime, name: str) -> None:
    await runtime.agents.wake(name)


async def stop(runtime: Runtime, name: str) -> None:
    await runtime.agents.stop(name)


async def start(runtime: Runtime, name: str) -> None:
    await runtime.agents.start(name)


async def create(runtime: Runtime, name: str) -> None:
    await runtime.agents.create(f"{name}-new", agent_type="worker")


async def created(runtime: Runtime, name: str) -> object:
    task = await runtime.tasks.submit(f"{name}-new", "work", {"n": 1}, dedupe_key="once")
    return await asyncio.wait_for(runtime.tasks.result(task), 60) == 1


async def submit(runtime: Runtime, name: str) -> None:
    await runtime.tasks.submit(name, "work", {"n": 7}, dedupe_key="one")


async def done(runtime: Runtime, name: str) -> object:
    """Submitted again, as its caller would, the task is done once."""
    task = await runtime.tasks.submit(name, "work", {"n": 7}, dedupe_key="one")
    return await asyncio.wait_for(runtime.tasks.result(task), 60) == 7


async def send(runtime: Runtime, name: str) -> None:
    await runtime.mail.send("nobody", name, subject="hi", dedupe_key="m")


async def arrived(runtime: Runtime, name: str) -> object:
    return [mail.dedupe_key for mail in runtime.mail.inbox(name)] == ["m"]


def mail_of(runtime: Runtime, name: str) -> str:
    """Return the id of the agent's only message."""
    [message_id] = runtime.state.agents[name].mail
    return message_id


async def read(runtime: Runtime, name: str) -> None:
    await runtime.mail.read(name, mail_of(runtime, name))


async def archive(runtime: Runtime, name: str) -> None:
    await runtime.mail.archive(name, mail_of(runtime, name))


async def archived(runtime: Runtime, name: str) -> object:
    history = [mail.status for mail in await runtime.mail.history(name)]
    return runtime.mail.inbox(name, status=None) == [] and history == ["archived"]


async def send_to(runtime: Runtime, name: str) -> None:
    await runtime.agents.create(f"{name}-friend", agent_type="worker")
    await runtime.mail.send(f"{name}-friend", name, subject="hi", dedupe_key="m")


async def reply(runtime: Runtime, name: str) -> None:
    await runtime.mail.reply(name, mail_of(runtime, name), "yes")


async def replied(runtime: Runtime, name: str) -> object:
    answers = [mail.reply_to for mail in runtime.mail.inbox(f"{name}-friend")]
    asked = [mail.status for mail in runtime.mail.inbox(name, status=None)]
    return (answers, asked) == ([mail_of(runtime, name)], ["replied"])


async def save(runtime: Runtime, name: str) -> None:
    await runtime.save_session_state(name)


async def save_all(runtime: Runtime, name: str) -> None:
    await runtime.save_all_session_states()


async def asleep(runtime: Runtime, name: str) -> object:
    stored = await runtime.manager.load_sleep_state(name)
    agent = runtime.state.agents[name]
    return stored is not None and stored.is_sleeping and agent.sleep is not None


async def awake(runtime: Runtime, name: str) -> object:
    stored = await runtime.manager.load_sleep_state(name)
    agent = runtime.state.agents[name]
    return (stored is None or not stored.is_sleeping) and agent.sleep is None


async def stopped(runtime: Runtime, name: str) -> object:
    stored = await runtime.manager.load_agent_state(name)
    return stored is not None and stored.status == runtime.agents.get(name).status == "stopped"


async def started(runtime: Runtime, name: str) -> object:
    stored = await runtime.manager.load_agent_state(name)
    return stored is not None and stored.status == runtime.agents.get(name).status == "idle"


async def finish(runtime: Runtime, name: str) -> None:
    await runtime.tasks.result(await runtime.tasks.submit(name, "work", {"n": 7}))


async def cleanup(runtime: Runtime, name: str) -> None:
    await runtime.cleanup_old_states(max_age_hours=0)


async def cleaned(runtime: Runtime, name: str) -> object:
    logged = [e async for e in runtime.manager.read_log("tasks", (name, "archive"))]
    return not await runtime.manager.keys("tasks", name) and len(logged) == 1


async def wait_to_cancel(runtime: Runtime, name: str) -> None:
    await runtime.agents.stop(name)
    await runtime.tasks.submit(name, "work", {"n": 8}, dedupe_key="two")


async def cancel(runtime: Runtime, name: str) -> None:
    await runtime.tasks.cancel(await runtime.tasks.submit(name, "work", {"n": 8}, dedupe_key="two"))


async def cancelled(runtime: Runtime, name: str) -> object:
    task = await runtime.tasks.submit(name, "work", {"n": 8}, dedupe_key="two")
    return task.status == "cancelled"


ACTS = {
    "sleep": Act(nothing, sleep, wake, awake),
    "sleep again": Act(nothing, sleep, sleep, asleep),
    "wake": Act(sleep, wake, sleep, asleep),
    "wake again": Act(sleep, wake, wake, awake),
    "stop_session": Act(nothing, stop, start, started),
    "start_session": Act(stop, start, stop, stopped),
    "create_session": Act(nothing, create, create, created),
    "submit": Act(nothing, submit, submit, done),
    "send_mail": Act(nothing, send, send, arrived),
    "read_mail": Act(send, read, archive, archived),
    "archive_mail": Act(send, archive, archive, archived),
    "reply": Act(send_to, reply, reply, replied),
    "save_session_state": Act(nothing, save, stop, stopped),
    "save_all": Act(nothing, save_all, stop, stopped),
    "cleanup": Act(finish, cleanup, cleanup, cleaned),
    "cancel": Act(wait_to_cancel, cancel, cancel, cancelled),
}

SHARED = pytest.param(False, id="shared", marks=pytest.mark.full)
KINDS = pytest.mark.parametrize("exclusive", [SHARED, pytest.param(True, id="exclusive")])


@KINDS
@pytest.mark.parametrize("name", ACTS)
@pytest.mark.proof("T9", "cancelled or timed out at every await; the newer save wins")
async def test_what_comes_after_a_cancelled_operation_counts(
    tmp_path: Path, tally: Tally, full: bool, name: str, exclusive: bool
) -> None:
    act, before, wrong = ACTS[name], Footprint(), []
    runtime = make_runtime(tmp_path, exclusive)
    agents: list[str] = []
    async with runtime:
        with SlowSync(0.3 if full else 0.01) as sync:
            for point in range(1, MOST):
                agent = f"a{point}"
                agents.append(agent)
                await runtime.agents.create(agent, agent_type="worker")
                await act.first(runtime, agent)
                sync.arm()
                reached = await cancel_at(point, lambda agent=agent: _run(act.run, runtime, agent))  # type: ignore[misc]
                await act.newer(runtime, agent)
                tally.points, tally.faults = tally.points + 1, tally.faults + reached
                tally.acknowledged += 1
                wrong += await _look(act, runtime, agent, f"point {point}")
                if not reached:
                    break
        await until(lambda: not _locks_of_acts(tmp_path))  # the store writes back by itself
    leaked = await before.still_leaked() + locks_held(tmp_path)
    tally.leaked += len(leaked)
    async with make_runtime(tmp_path, exclusive) as again:
        for agent in agents:
            wrong += await _look(act, again, agent, f"{agent} after a restart")
    tally.lost += len(wrong)
    assert wrong == []
    assert leaked == []
    assert tally.faults


def _locks_of_acts(root: Path) -> list[str]:
    """The locks that are not held as long as a runtime lives."""
    return [path for path in locks_held(root) if not path.startswith(("writers.d", "owner"))]


async def _run(step: Step, runtime: Runtime, agent: str) -> None:
    await step(runtime, agent)


async def _look(act: Act, runtime: Runtime, agent: str, when: str) -> list[str]:
    try:
        good = await act.look(runtime, agent)
    except (AgentStateError, TimeoutError) as error:
        good = repr(error)
    return [] if good is True else [f"{when}: {good}"]


@KINDS
@pytest.mark.proof("T9", "cancelled or timed out at every await; the newer save wins")
async def test_a_runtime_cancelled_while_it_starts_or_stops_can_be_started_again(
    tmp_path: Path, tally: Tally, exclusive: bool
) -> None:
    async with make_runtime(tmp_path, exclusive) as runtime:
        for n in range(3):
            await runtime.agents.create(f"a{n}", agent_type="worker")
    before = Footprint()
    for what in ("start", "stop"):
        for point in range(1, MOST):
            runtime = make_runtime(tmp_path, exclusive)
            if what == "start":
                reached = await cancel_at(point, runtime.start)
            else:
                await runtime.start()
                await runtime.tasks.submit("a1", "work", {"n": point}, dedupe_key=f"{what} {point}")
                reached = await cancel_at(point, runtime.stop)
            if what == "stop" or not reached:
                await runtime.stop()
            leaked = await before.still_leaked() + locks_held(tmp_path)
            tally.points, tally.faults = tally.points + 1, tally.faults + reached
            tally.leaked += len(leaked)
            assert leaked == [], f"{what}, point {point}"
            async with make_runtime(tmp_path, exclusive) as again:
                assert again.agents.list() == ["a0", "a1", "a2"]
                if what == "stop":
                    task = await again.tasks.submit(
                        "a1", "work", {"n": point}, dedupe_key=f"{what} {point}"
                    )
                    assert await asyncio.wait_for(again.tasks.result(task), 60) == point
                    tally.acknowledged += 1
            if not reached:
                break
    assert tally.clean()
