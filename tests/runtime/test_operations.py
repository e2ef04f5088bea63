"""Tasks are operated: found over all agents, run again, cancelled, deleted, one or many."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_state import (
    AsyncAgentSessionManager,
    MemoryStateStore,
    RetryPolicy,
    StateNotFoundError,
    StatePersistenceManager,
    StateValidationError,
    Task,
    TaskContext,
    TaskFailedError,
    TaskFilter,
    TaskRequest,
    TaskTimeoutError,
)
from agent_state.protocols import Notice
from agent_state.runtime import transitions
from agent_state.runtime.operations import StoredTasks, TaskOperator
from agent_state.serializers import JSONStateSerializer
from agent_state.testing import FakeClock
from tests.deadlines import soon, until
from tests.runtime.runtimes import (
    counted,
    edit,
    hanging,
    make_runtime,
    sharing,
    with_agent,
    working,
)

AT_ONCE = RetryPolicy(base_seconds=0.0, jitter=0.0)


def reading(runtime: AsyncAgentSessionManager) -> None:
    """Register a handler that needs ``doc`` in its payload, and counts its attempts."""

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> object:
        ctx.memory["attempts"] = ctx.memory.get("attempts", 0) + 1
        return task.payload["doc"]


async def dead_task(
    runtime: AsyncAgentSessionManager, agent_id: str = "alice", **fields: object
) -> Task:
    task = await runtime.tasks.submit(agent_id, "index", dict(fields), max_attempts=2)
    with pytest.raises(TaskFailedError):
        await soon(runtime.tasks.result(task))
    return await runtime.tasks.get(task)


@pytest.fixture
async def runtime() -> AsyncIterator[AsyncAgentSessionManager]:
    runtime = make_runtime(retry=AT_ONCE)
    reading(runtime)
    await with_agent(runtime)
    yield runtime
    await runtime.stop()


# -- one task, by its id alone -------------------------------------------------------------------


async def test_a_dead_task_with_a_mended_payload_runs_again(
    runtime: AsyncAgentSessionManager,
) -> None:
    task = await dead_task(runtime, text="x")
    await edit(runtime, "tasks", ("alice", task.task_id), payload={"doc": "mended"})
    assert await runtime.tasks.retry(task.task_id)
    assert await soon(runtime.tasks.result(task.task_id)) == "mended"
    done = await runtime.tasks.get(task.task_id)
    assert (done.status, done.attempts, done.forgiven, done.error) == ("completed", 3, 2, None)


async def test_a_task_that_is_run_again_has_all_its_attempts_again(
    runtime: AsyncAgentSessionManager,
) -> None:
    task = await dead_task(runtime)
    for rounds in (1, 2):
        assert await runtime.tasks.retry(task)
        with pytest.raises(TaskFailedError):
            await soon(runtime.tasks.result(task))
        dead = await runtime.tasks.get(task)
        assert (dead.status, dead.attempts) == ("dead", 2 + 2 * rounds)
        assert (dead.max_attempts, dead.forgiven) == (2, 2 * rounds)


async def test_a_task_waiting_for_its_next_attempt_runs_at_once() -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock, retry=RetryPolicy(base_seconds=1000, max_seconds=1000))
    reading(runtime)
    await with_agent(runtime)
    task = await runtime.tasks.submit("alice", "index")
    await until(lambda: runtime.state.agents["alice"].tasks[task.task_id].task.status == "failed")
    await edit(runtime, "tasks", ("alice", task.task_id), payload={"doc": 1})
    assert await runtime.tasks.retry(task.task_id)
    assert await soon(runtime.tasks.result(task.task_id)) == 1
    await runtime.stop()


async def test_a_cancelled_task_runs_again(runtime: AsyncAgentSessionManager) -> None:
    task = await runtime.tasks.submit("alice", "index", {"doc": 7}, delay_seconds=3600)
    assert await runtime.tasks.cancel(task.task_id)
    assert await runtime.tasks.retry(task.task_id)
    assert await soon(runtime.tasks.result(task.task_id)) == 7


@pytest.mark.parametrize("action", ["retry", "delete"])
async def test_a_pending_task_is_neither_run_again_nor_deleted(
    runtime: AsyncAgentSessionManager, action: str
) -> None:
    task = await runtime.tasks.submit("alice", "index", {"doc": 1}, delay_seconds=60)
    assert not await getattr(runtime.tasks, action)(task.task_id)
    assert await runtime.tasks.get(task.task_id) == task


async def test_a_completed_task_is_not_run_again(runtime: AsyncAgentSessionManager) -> None:
    task = await runtime.tasks.submit("alice", "index", {"doc": 1})
    await runtime.tasks.result(task)
    assert not await runtime.tasks.retry(task)
    assert (await runtime.tasks.get(task)).result == 1


async def test_a_running_task_is_cancelled_by_its_id_and_not_deleted() -> None:
    runtime = make_runtime()
    started = hanging(runtime)
    await with_agent(runtime)
    task = await runtime.tasks.submit("alice", "wait")
    await started.wait()
    assert not await runtime.tasks.delete(task.task_id)
    assert not await runtime.tasks.retry(task.task_id)
    assert await runtime.tasks.cancel(task.task_id)
    with pytest.raises(TaskFailedError, match="cancelled"):
        await soon(runtime.tasks.result(task.task_id))
    assert await runtime.tasks.delete(task.task_id)
    with pytest.raises(StateNotFoundError):
        await runtime.tasks.get(task.task_id)
    await runtime.stop()


async def test_a_deleted_task_does_not_come_back(runtime: AsyncAgentSessionManager) -> None:
    task = await dead_task(runtime)
    assert await runtime.tasks.delete(task.task_id)
    assert await runtime.reconciler.check() == 0
    assert await runtime.tasks.search() == []
    with pytest.raises(StateNotFoundError, match="no such task"):
        await runtime.tasks.delete(task.task_id)


@pytest.mark.parametrize("alone", [False, True])
async def test_a_task_that_was_cleaned_up_was_finished_and_is_not_cancelled(alone: bool) -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock)
    working(runtime)
    await with_agent(runtime)
    task = await runtime.tasks.submit("alice", "x")
    await runtime.tasks.result(task)
    clock.jump(100 * 3600)
    await runtime.cleanup_old_states(1)
    assert await runtime.manager.keys("tasks") == []
    assert await runtime.tasks.cancel(task.task_id if alone else task) is False
    assert (await runtime.tasks.get(task)).status == "completed"
    await runtime.stop()


async def test_an_unknown_id_is_an_error_that_names_it(runtime: AsyncAgentSessionManager) -> None:
    for call in (
        runtime.tasks.get,
        runtime.tasks.retry,
        runtime.tasks.cancel,
        runtime.tasks.delete,
        runtime.tasks.result,
    ):
        with pytest.raises(StateNotFoundError, match="nowhere"):
            await call("nowhere")


async def test_an_id_that_two_agents_have_must_name_the_agent(
    runtime: AsyncAgentSessionManager,
) -> None:
    for agent_id in ("alice", "bob"):
        await runtime.manager.save(
            "tasks", (agent_id, "same"), {"task_id": "same", "status": "dead"}
        )
    with pytest.raises(StateValidationError, match="alice, bob"):
        await runtime.tasks.retry("same")
    assert await runtime.tasks.retry(("alice", "same"))


async def test_two_who_run_a_task_again_at_once_run_it_once(
    runtime: AsyncAgentSessionManager,
) -> None:
    task = await dead_task(runtime)
    before = runtime.agents.get("alice").context.working_memory
    assert before == {}  # failed attempts change nothing
    await edit(runtime, "tasks", ("alice", task.task_id), payload={"doc": 1})
    outcomes = await asyncio.gather(*(runtime.tasks.retry(task.task_id) for _ in range(5)))
    assert sorted(outcomes) == [False] * 4 + [True]
    await runtime.wait_idle()
    await runtime.reconciler.check()
    await runtime.wait_idle()
    assert runtime.agents.get("alice").context.working_memory == {"attempts": 1}


async def test_a_task_of_an_agent_that_does_not_exist_is_operated_too(
    runtime: AsyncAgentSessionManager,
) -> None:
    await runtime.manager.save("tasks", ("gone", "old"), {"task_id": "old", "status": "dead"})
    assert await runtime.tasks.retry("old")
    assert (await runtime.tasks.get("old")).status == "pending"
    assert await runtime.tasks.cancel("old")
    assert await runtime.tasks.delete("old")


async def test_a_runtime_operates_a_task_whose_agent_another_one_owns() -> None:
    clock = FakeClock()
    store = MemoryStateStore(clock=clock)
    owner, other = (sharing(store, clock, name) for name in ("owner", "other"))
    await with_agent(owner)
    await owner.agents.stop("alice")
    task = await owner.tasks.submit("alice", "index")
    await other.start()
    assert await other.tasks.cancel(task.task_id)
    assert (await owner.tasks.get(task.task_id)).status == "cancelled"
    assert await other.tasks.retry(task.task_id)
    await owner.reconciler.catch_up()
    await owner.agents.start("alice")
    assert await soon(owner.tasks.result(task.task_id)) == "owner"
    assert await other.tasks.delete(task.task_id)
    for runtime in (other, owner):
        await runtime.stop()


async def test_a_cleaned_up_task_is_found_by_its_id_alone() -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock)
    working(runtime)
    await with_agent(runtime)
    task = await runtime.tasks.submit("alice", "x")
    await runtime.tasks.result(task)
    await clock.advance(7200)
    report = await runtime.cleanup_old_states(1)
    assert report.tasks == [f"alice/{task.task_id}"]
    assert (await runtime.tasks.get(task.task_id)).result == "alice"
    assert await runtime.tasks.result(task.task_id) == "alice"
    for ref in (task.task_id, task):  # it is finished, and stays as it is
        assert not await runtime.tasks.retry(ref)
        assert not await runtime.tasks.cancel(ref)
        assert not await runtime.tasks.delete(ref)
    request = TaskRequest(action="retry", tasks=[task.task_id])
    told = await runtime.tasks.perform(request)
    assert told.refused == {task.task_id: "it is completed, and archived"}
    await runtime.stop()


# -- waiting -------------------------------------------------------------------------------------


async def test_a_wait_for_a_result_ends_in_time_and_the_task_goes_on() -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock)
    go = asyncio.Event()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> int:
        await go.wait()
        return 5

    await with_agent(runtime)
    task = await runtime.tasks.submit("alice", "x")
    waiting = asyncio.create_task(runtime.tasks.result(task.task_id, timeout_seconds=90))
    await clock.advance(60)
    assert not waiting.done()
    await clock.advance(60)
    with pytest.raises(TaskTimeoutError, match=f"90 s.*{task.task_id}"):
        await soon(waiting)
    assert len(runtime.tasks.waiters) == 0
    go.set()
    assert await soon(runtime.tasks.result(task.task_id, int, timeout_seconds=60)) == 5
    assert issubclass(TaskTimeoutError, TimeoutError)
    await runtime.stop()


async def test_a_watcher_sees_the_changes_of_the_tasks_it_asked_for(
    runtime: AsyncAgentSessionManager,
) -> None:
    seen: list[tuple[str, str]] = []

    async def watch() -> None:
        async for task in runtime.tasks.watch(
            TaskFilter(name="index", status=("dead", "completed"))
        ):
            seen.append((task.task_id, task.status))  # noqa: PERF401  # one at a time

    watching = asyncio.create_task(watch())
    await until(lambda: len(runtime.manager.store._broadcast.subscriptions) == 2)  # type: ignore[attr-defined]
    bad = await dead_task(runtime)
    good = await runtime.tasks.submit("alice", "index", {"doc": 1})
    await runtime.tasks.submit("alice", "other", {"doc": 1})
    await until(lambda: len(seen) == 2)
    await runtime.wait_idle()
    assert seen == [(bad.task_id, "dead"), (good.task_id, "completed")]
    await runtime.stop()
    await soon(watching)  # it ends with the runtime


# -- many tasks ----------------------------------------------------------------------------------


async def test_tasks_of_all_agents_are_filtered_sorted_and_paged() -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock, retry=AT_ONCE)
    reading(runtime)
    await with_agent(runtime)
    await runtime.agents.create("bob", agent_type="worker")
    for number in range(6):
        agent_id = "alice" if number % 2 else "bob"
        payload = {"doc": number} if number < 4 else {}
        await runtime.tasks.submit(agent_id, f"n{number % 3}", payload, max_attempts=1)
        await clock.advance(60)
    await runtime.wait_idle()

    async def payloads(wanted: TaskFilter, **how: object) -> list[object]:
        found = await runtime.tasks.search(wanted, **how)  # type: ignore[arg-type]
        return [task.payload.get("doc") for task in found]

    assert await payloads(TaskFilter()) == [0, 1, 2, 3, None, None]
    assert await payloads(TaskFilter(), newest_first=True, limit=3) == [None, None, 3]
    assert await payloads(TaskFilter(status="completed"), newest_first=True) == [3, 2, 1, 0]
    assert await payloads(TaskFilter(agent_id="alice", status="completed")) == [1, 3]
    assert await payloads(TaskFilter(name="n1")) == [1, None]
    assert await payloads(TaskFilter(error="KeyError: 'doc'")) == [None, None]
    assert await payloads(TaskFilter(older_than_seconds=180)) == [0, 1, 2, 3]
    assert await payloads(TaskFilter(newer_than_seconds=180)) == [None, None]
    assert await payloads(TaskFilter(older_than_seconds=180, newer_than_seconds=300)) == [2, 3]
    pages: list[Task] = []
    while page := await runtime.tasks.search(limit=4, after=pages[-1] if pages else None):
        assert len(page) <= 4
        pages += page
    assert [task.payload.get("doc") for task in pages] == [0, 1, 2, 3, None, None]
    newest: list[Task] = []
    while page := await runtime.tasks.search(
        limit=4, newest_first=True, after=newest[-1] if newest else None
    ):
        newest += page
    assert newest == pages[::-1]
    await runtime.stop()


async def test_all_dead_tasks_are_run_again_and_no_other() -> None:
    runtime = make_runtime(retry=AT_ONCE)
    reading(runtime)
    await with_agent(runtime)
    done = await runtime.tasks.submit("alice", "index", {"doc": 1})
    later = await runtime.tasks.submit("alice", "index", {"doc": 1}, delay_seconds=60)
    gone = await runtime.tasks.submit("alice", "index", {"doc": 1}, delay_seconds=60)
    await runtime.tasks.cancel(gone)
    dead = [await dead_task(runtime) for _ in range(3)]
    for task in dead:
        await edit(runtime, "tasks", ("alice", task.task_id), payload={"doc": "m"})
    counted = await runtime.tasks.retry_all(dry_run=True)
    assert (counted.matched, counted.changed, counted.dry_run) == (3, 0, True)
    assert {task.status for task in await runtime.tasks.search(TaskFilter(name="index"))} == {
        "completed", "pending", "cancelled", "dead",
    }  # fmt: skip
    report = await runtime.tasks.retry_all(TaskFilter(name="index"))
    assert (report.matched, report.changed, report.refused) == (3, 3, {})
    assert [await soon(runtime.tasks.result(task)) for task in dead] == ["m", "m", "m"]
    assert (await runtime.tasks.get(gone)).status == "cancelled"
    assert (await runtime.tasks.get(later)).status == "pending"
    assert (await runtime.tasks.get(done)).attempts == 1
    assert (await runtime.tasks.retry_all()).matched == 0
    assert (await runtime.tasks.retry_all(TaskFilter(status="cancelled"))).changed == 1
    await runtime.stop()


async def test_many_are_cancelled_and_deleted(runtime: AsyncAgentSessionManager) -> None:
    await runtime.agents.stop("alice")
    for name in ("a", "a", "b"):
        await runtime.tasks.submit("alice", name)
    assert (await runtime.tasks.cancel_all(TaskFilter(name="a"), dry_run=True)).matched == 2
    assert (await runtime.tasks.cancel_all(TaskFilter(name="a"))).changed == 2
    assert (await runtime.tasks.delete_all(TaskFilter())).changed == 2
    assert [task.name for task in await runtime.tasks.search()] == ["b"]


async def test_named_tasks_that_cannot_be_changed_are_reported_and_the_others_are(
    runtime: AsyncAgentSessionManager,
) -> None:
    dead = await dead_task(runtime)
    done = await runtime.tasks.submit("alice", "index", {"doc": 1})
    await runtime.tasks.result(done)
    await runtime.manager.save("tasks", ("a/b", "c/d"), {"task_id": "c/d", "status": "dead"})
    names = [dead.task_id, f"alice/{done.task_id}", "nowhere", "a/b/c/d"]
    counted = await runtime.tasks.perform(TaskRequest(action="retry", tasks=names, dry_run=True))
    assert (counted.matched, counted.changed) == (2, 0)
    report = await runtime.tasks.perform(TaskRequest(action="retry", tasks=names))
    assert (report.matched, report.changed) == (2, 2)
    assert report.refused == {
        f"alice/{done.task_id}": "it is completed",
        "nowhere": "no such task",
    }


WORDS = st.sampled_from(["dead", "pending", "DEAD", "Failed", "completed", "erledigt", "started"])
TEXTS = st.sampled_from(["index", "größe", 'a "b"', "line\nbreak", '\\"status\\":\\"dead\\"', ""])


@given(
    status=WORDS,
    name=TEXTS,
    error=st.none() | TEXTS,
    steps=st.lists(st.sampled_from(["done", "failed", "started"]), max_size=2),
    payload=st.fixed_dictionaries({}, optional={"status": WORDS, "name": TEXTS}),
    wanted=st.builds(
        TaskFilter,
        status=st.sampled_from([(), "dead", ("failed", "dead"), "pending", "completed"]),
        name=st.none() | TEXTS,
        error=st.none() | TEXTS.map(lambda text: text[:3]),
    ),
    ascii_only=st.booleans(),
)
async def test_what_is_left_out_without_parsing_does_not_match(
    status: str,
    name: str,
    error: str | None,
    steps: list[str],
    payload: dict[str, str],
    wanted: TaskFilter,
    ascii_only: bool,
) -> None:
    manager = StatePersistenceManager(
        store=MemoryStateStore(), serializer=AsciiSerializer() if ascii_only else None
    )
    body: dict[str, Any] = {"task_id": "t", "status": status, "name": name, "error": error}
    body["payload"] = payload
    body["steps"] = {str(n): {"status": word} for n, word in enumerate(steps)}
    async with manager:
        await manager.save("tasks", ("alice", "t"), body)
        stored = await manager.load("tasks", ("alice", "t"))
        assert isinstance(stored, Task)
        operator = TaskOperator(manager, manager.clock, StoredTasks(manager, manager.clock))
        found = await operator.search(wanted, newest_first=False, limit=None, after=None)
        assert len(found) == wanted.matches(stored, manager.clock.now())


class AsciiSerializer(JSONStateSerializer):
    """Writes what is not ASCII as escapes, with spaces."""

    def dumps(self, state: Mapping[str, Any]) -> bytes:
        return json.dumps(super().loads(super().dumps(state)), sort_keys=True).encode()


async def test_a_search_parses_little_more_than_what_it_finds(
    runtime: AsyncAgentSessionManager,
) -> None:
    dead = [await dead_task(runtime, text="x") for _ in range(2)]
    for number in range(200):
        await runtime.tasks.submit("alice", "index", {"doc": number})
    await runtime.wait_idle()
    with counted() as all_of_them:
        assert len(await runtime.tasks.search()) == 202
    everything = all_of_them()
    for wanted in (TaskFilter(status="dead"), TaskFilter(error="KeyError")):
        with counted() as some:
            found = await runtime.tasks.search(wanted)
        assert [task.task_id for task in found] == [task.task_id for task in dead]
        assert some() < everything / 2
    with counted() as few:
        assert await runtime.tasks.search(TaskFilter(name="other")) == []
    assert few() < everything / 4


# -- a store that several share ------------------------------------------------------------------


async def deleted_elsewhere(runtime: AsyncAgentSessionManager, task: Task) -> None:
    """Cancel and delete a task as another process does, before its owner sees any of it."""
    stored = StoredTasks(runtime.manager, runtime.manager.clock)
    assert (await stored.apply("cancel", ("alice", task.task_id))).changed
    assert (await stored.apply("delete", ("alice", task.task_id))).changed


LOOKS = ["checks", "hears of it", "catches up", "begins it", "cancels it", "starts again"]
LOOKS.append("cancels and begins it")  # seed 3280 of the simulation


@pytest.mark.parametrize("owner_then", LOOKS)
async def test_a_task_that_is_deleted_before_its_owner_looks_stays_deleted(owner_then: str) -> None:
    clock = FakeClock()
    store = MemoryStateStore(clock=clock)
    owner = sharing(store, clock, "owner")
    await with_agent(owner)
    task = await owner.tasks.submit("alice", "index", delay_seconds=5)
    waiting = asyncio.create_task(owner.tasks.result(task))
    await clock.advance(0)
    await deleted_elsewhere(owner, task)
    key = ("alice", task.task_id)
    if owner_then == "hears of it":
        for notice in [Notice("tasks", key, None), *await left_behind(owner)]:
            await owner.reconciler.notice(replace(notice, outside=True))
    elif owner_then == "catches up":
        await owner.reconciler.catch_up()
    elif owner_then == "begins it":
        await clock.advance(5)
    elif owner_then == "cancels it":
        with pytest.raises(StateNotFoundError):
            await owner.tasks.cancel(task.task_id)
    elif owner_then == "cancels and begins it":
        async with owner.state.agents["alice"].lock:
            cancelling = asyncio.create_task(owner.tasks.cancel(task.task_id))
            await clock.advance(5)  # both wait now
        with pytest.raises(StateNotFoundError):
            await cancelling
    elif owner_then == "starts again":
        await owner.abort()
        waiting.cancel()
        await clock.advance(60)
        owner = sharing(store, clock, "heir")
        await owner.start()
    for _ in range(3):
        await owner.reconciler.check()
        await owner.reconciler.check_some()
    if owner_then != "starts again":
        with pytest.raises(StateNotFoundError):
            await soon(waiting)
    assert await owner.tasks.search() == []
    assert await left_behind(owner) == []
    assert owner.state.agents["alice"].tasks == {}
    await clock.advance(10)
    await owner.wait_idle()
    assert "index" not in owner.agents.get("alice").context.working_memory
    again = await owner.tasks.submit("alice", "index")
    assert await soon(owner.tasks.result(again)) == ("heir" if "again" in owner_then else "owner")
    await owner.stop()


async def test_a_wait_for_a_task_that_another_runtime_finished_and_archived_ends() -> None:
    """Seed 281 of the simulation: this runtime stood still meanwhile."""
    clock = FakeClock()
    store = MemoryStateStore(clock=clock)
    runtime = sharing(store, clock, "here")
    await with_agent(runtime)
    await runtime.agents.stop("alice")
    task = await runtime.tasks.submit("alice", "index")
    waiting = asyncio.create_task(runtime.tasks.result(task))
    await clock.advance(0)
    done = transitions.complete(await runtime.tasks.get(task), "elsewhere", clock.now())
    await runtime.manager.save("tasks", ("alice", task.task_id), done)
    await clock.advance(1)
    assert (await runtime.manager.cleanup_old_states(0)).tasks == [f"alice/{task.task_id}"]
    runtime.state.agents["alice"].tasks.clear()  # as when the agent is read again
    await runtime.tasks.waiters.refresh()
    assert await soon(waiting) == "elsewhere"
    await runtime.stop()


async def left_behind(runtime: AsyncAgentSessionManager) -> list[Notice]:
    """The notices of what says that tasks were deleted."""
    keys = await runtime.manager.keys("system", "deleted_tasks")
    return [Notice("system", key, 1) for key in keys]


async def test_a_task_of_the_same_key_may_follow_a_deleted_one_at_once() -> None:
    clock = FakeClock()
    store = MemoryStateStore(clock=clock)
    owner = sharing(store, clock, "owner")
    await with_agent(owner)
    task = await owner.tasks.submit("alice", "index", {"n": 1}, delay_seconds=5, dedupe_key="k")
    await deleted_elsewhere(owner, task)
    other = sharing(store, clock, "other")
    await other.start()
    again = await other.tasks.submit("alice", "index", {"n": 2}, delay_seconds=5, dedupe_key="k")
    assert again.task_id == task.task_id
    for notice in await left_behind(owner):
        await owner.reconciler.notice(replace(notice, outside=True))
    for _ in range(3):
        await owner.reconciler.check_some()
    assert owner.state.agents["alice"].tasks[task.task_id].task.payload == {"n": 2}
    await clock.advance(5)
    assert await soon(owner.tasks.result(again)) == "owner"
    for runtime in (other, owner):
        await runtime.stop()


async def test_a_task_that_its_person_removes_by_hand_is_saved_again_in_a_shared_directory(
    tmp_path: Path,
) -> None:
    runtime = AsyncAgentSessionManager(tmp_path, exclusive=False)
    reading(runtime)
    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        task = await runtime.tasks.submit("alice", "index", delay_seconds=3600)
        file = tmp_path / f"tasks/alice/{task.task_id}.json"
        await runtime.manager.flush()
        file.unlink()
        await runtime.reconciler.check()
        assert (await runtime.tasks.get(task)).status == "pending"


# -- without a runtime ---------------------------------------------------------------------------


@pytest.mark.parametrize("exclusive", [True, False])
async def test_stored_tasks_are_operated_at_rest_and_the_next_start_does_them(
    tmp_path: Path, exclusive: bool
) -> None:
    first = AsyncAgentSessionManager(tmp_path, exclusive=exclusive, retry=AT_ONCE)
    reading(first)
    async with first:
        await first.agents.create("alice", agent_type="worker")
        dead = await dead_task(first, text="x")
        other = await first.tasks.submit("alice", "index", {"doc": 1}, delay_seconds=3600)
    file = tmp_path / f"tasks/alice/{dead.task_id}.json"
    file.write_text(file.read_text().replace('"text": "x"', '"doc": "mended"'))
    async with StatePersistenceManager(tmp_path) as manager:
        operator = TaskOperator(manager, manager.clock, StoredTasks(manager, manager.clock))
        report = await operator.perform(TaskRequest(action="retry"))
        assert (report.changed, report.refused) == (1, {})
        report = await operator.perform(TaskRequest(action="cancel", tasks=[other.task_id]))
        assert report.changed == 1
        report = await operator.perform(TaskRequest(action="delete", tasks=[other.task_id]))
        assert report.changed == 1
    second = AsyncAgentSessionManager(tmp_path, exclusive=exclusive)
    reading(second)
    async with second:
        assert await soon(second.tasks.result(dead.task_id)) == "mended"
        assert [task.task_id for task in await second.tasks.search()] == [dead.task_id]


STATES = st.sampled_from(["pending", "in_progress", "completed", "failed", "dead", "cancelled"])


@given(status=STATES, attempts=st.integers(0, 50), interruptions=st.integers(0, 25))
def test_a_task_that_is_run_again_may_fail_as_often_as_a_new_one(
    status: str, attempts: int, interruptions: int
) -> None:
    interruptions = min(interruptions, attempts)
    task = Task(
        task_id="t", status=status, attempts=attempts, interruptions=interruptions, max_attempts=3
    )
    again = transitions.retry(task)
    if status not in {"failed", "dead", "cancelled"}:
        assert again is None
        return
    assert again is not None
    clock = FakeClock()
    for number in (1, 2, 3):
        again = transitions.claim(again, "me", clock.now())
        assert transitions.counted_failures(again) == number
        again = transitions.fail(again, "x", clock.now(), AT_ONCE, Random(1))
        assert again.status == ("dead" if number == 3 else "failed")
    assert again.attempts == attempts + 3
