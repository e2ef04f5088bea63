"""Schedules: tasks that are queued at the times of cron expressions."""

from __future__ import annotations

import asyncio
import logging
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from cronsim import CronSim
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from agent_state import (
    AsyncAgentSessionManager,
    InvalidPayloadError,
    MemoryStateStore,
    StatePersistenceManager,
    StateValidationError,
    Task,
    TaskContext,
)
from agent_state.runtime.schedules import Schedule
from agent_state.testing import FakeClock
from tests.deadlines import until
from tests.runtime.runtimes import TroubledStore, make_runtime, puts, with_agent

HOUR, DAY = 3600, 86_400
START = datetime(2026, 1, 1, tzinfo=UTC)


def scheduled(
    store: MemoryStateStore, clock: FakeClock, name: str = "id", **options: Any
) -> tuple[AsyncAgentSessionManager, list[str]]:
    """A runtime with a schedule, and the times for which its task ran."""
    exclusive = options.pop("exclusive", True)
    runtime = make_runtime(store, clock, name=name, exclusive=exclusive)
    ran: list[str] = []

    @runtime.task("digest", agent_type="worker")
    async def digest(ctx: TaskContext, task: Task) -> None:
        assert task.scheduled_for is not None
        ran.append(str(task.scheduled_for))

    runtime.schedule("digest", agent_id="alice", **{"cron": "0 * * * *", **options})
    return runtime, ran


def times(*texts: str) -> list[str]:
    return [f"2026-01-{text}:00.000000Z" for text in texts]


async def test_a_day_of_hourly_runs_runs_each_at_its_hour() -> None:
    clock = FakeClock()
    runtime, ran = scheduled(MemoryStateStore(clock=clock), clock)
    await with_agent(runtime)
    await clock.advance(30 * 60)
    assert ran == []
    for hour in range(1, 25):
        await clock.advance(HOUR)
        assert len(ran) == hour
    assert ran == times(*(f"01T{hour:02d}:00" for hour in range(1, 24)), "02T00:00")
    tasks = await runtime.tasks.list("alice")
    assert tasks[0].task_id == "digest-20260101T010000Z"
    await runtime.stop()


@pytest.mark.parametrize("how", ["stopped", "killed", "stood still"])
async def test_a_missed_day_is_run_once(how: str) -> None:
    clock = FakeClock()
    store = MemoryStateStore(clock=clock)
    runtime, ran = scheduled(store, clock)
    await with_agent(runtime)
    await clock.advance(HOUR)
    if how == "stood still":
        clock.jump(DAY + 600)
        await clock.advance(31)  # the machine slept: the wall clock moved alone
    else:
        await (runtime.stop() if how == "stopped" else runtime.abort())
        await clock.advance(DAY + 600)
        runtime, more = scheduled(store, clock, "after")
        await runtime.start()
        await until(lambda: more)
        ran += more
    await clock.advance(0)
    assert ran == times("01T01:00", "02T01:00")
    await clock.advance(HOUR)
    await runtime.wait_idle()
    assert len(await runtime.tasks.list("alice")) == 3
    await runtime.stop()


async def test_a_restart_within_the_hour_runs_nothing_again() -> None:
    clock = FakeClock()
    store = MemoryStateStore(clock=clock)
    for number in range(5):
        runtime, _ = scheduled(store, clock, f"r{number}")
        await with_agent(runtime)
        await clock.advance(20 * 60)
        await runtime.abort()
    runtime, _ = scheduled(store, clock, "last")
    await runtime.start()
    assert [task.scheduled_for for task in await runtime.tasks.list("alice")] == times("01T01:00")
    await runtime.stop()


async def test_a_new_schedule_begins_now_and_a_changed_one_anew() -> None:
    clock = FakeClock(datetime(2026, 1, 1, 12, 30, tzinfo=UTC))
    store = MemoryStateStore(clock=clock)
    runtime, ran = scheduled(store, clock, cron="0 3 * * *")
    await with_agent(runtime)
    await clock.advance(60)
    assert ran == []  # 3 o'clock was before it began
    await runtime.stop()
    changed, ran = scheduled(store, clock, "changed", cron="0 9 * * *")
    await changed.start()
    await clock.advance(60)
    assert ran == []
    await clock.advance(DAY)
    assert ran == times("02T09:00")
    await changed.stop()


async def test_of_several_runtimes_one_queues_a_run() -> None:
    clock = FakeClock()
    store = MemoryStateStore(clock=clock)
    runtimes = [scheduled(store, clock, name, exclusive=False) for name in ("a", "b", "c")]
    for runtime, _ in runtimes:
        await with_agent(runtime)
    for _ in range(5):
        await clock.advance(HOUR)
    assert sum(len(ran) for _, ran in runtimes) == 5
    stored = await runtimes[0][0].tasks.list("alice")
    assert [task.scheduled_for for task in stored] == times(
        "01T01:00", "01T02:00", "01T03:00", "01T04:00", "01T05:00"
    )
    for runtime, _ in runtimes:
        await runtime.stop()


async def test_a_run_that_has_not_ended_is_followed_by_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = FakeClock()
    store = MemoryStateStore(clock=clock)
    runtime = make_runtime(store, clock)
    gate = asyncio.Event()
    ran: list[str] = []

    @runtime.task("digest", agent_type="worker")
    async def digest(ctx: TaskContext, task: Task) -> None:
        ran.append(str(task.scheduled_for))
        await gate.wait()

    runtime.schedule("digest", agent_id="alice", cron="*/10 * * * *")
    await with_agent(runtime)
    await clock.advance(HOUR)
    assert ran == times("01T00:10")
    assert len([r for r in caplog.records if "has not ended" in r.getMessage()]) == 1
    gate.set()
    await until(lambda: len(ran) > 1)
    assert ran == times("01T00:10", "01T01:00")
    await runtime.stop()


@pytest.mark.parametrize("end", ["killed", "cancelled"])
async def test_a_late_run_is_queued_once_the_one_before_that_another_runtime_made_has_ended(
    end: str,
) -> None:
    clock = FakeClock()
    store = MemoryStateStore(clock=clock)
    ran: list[tuple[str, str, datetime]] = []

    def runtime_named(name: str) -> AsyncAgentSessionManager:
        runtime = make_runtime(store, clock, name=name, exclusive=False, lease_seconds=30)

        @runtime.task("digest", agent_type="worker")
        async def digest(ctx: TaskContext, task: Task) -> None:
            ran.append((name, str(task.scheduled_for), clock.now()))
            if len(ran) == 1:
                await asyncio.Event().wait()

        runtime.schedule("digest", agent_id="alice", cron="* * * * *")
        return runtime

    dead, heir = runtime_named("dead"), runtime_named("heir")
    await with_agent(dead)
    await heir.start()
    await clock.advance(187)
    assert [due for _, due, _ in ran] == times("01T00:01")
    ended = clock.now()
    if end == "killed":
        await dead.abort()
    else:
        [task] = await heir.tasks.list("alice")
        await heir.tasks.cancel(task)
        await dead.reconciler.catch_up()  # to one another, these two send no notices
        await until(lambda: not dead.state.agents["alice"].tasks)
        await heir.reconciler.catch_up()
    await clock.advance(45)
    if end == "killed":
        [_, (who, again, ended), *_] = ran
        assert (who, [again]) == ("heir", times("01T00:01"))
    [*_, (_, due, moment)] = ran
    assert [due] == times("01T00:03")
    assert moment == ended
    await heir.stop()
    await dead.stop()


async def test_an_agent_that_is_created_later_gets_the_run_that_is_due(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = FakeClock()
    runtime, ran = scheduled(MemoryStateStore(clock=clock), clock)
    await runtime.start()
    await clock.advance(2 * HOUR + 60)
    assert len([r for r in caplog.records if "no agent 'alice'" in r.getMessage()]) == 1
    await runtime.agents.create("alice", agent_type="worker")
    await until(lambda: ran)
    assert ran == times("01T02:00")
    await runtime.stop()


async def test_a_run_whose_commit_failed_is_queued_later_and_one_whose_reply_was_lost_once() -> (
    None
):
    for fault in ("full", "unknown"):
        clock = FakeClock()
        store = TroubledStore(clock)
        runtime, ran = scheduled(store, clock)
        await with_agent(runtime)
        await clock.advance(60)
        setattr(store, fault, puts("tasks", "digest"))
        await clock.advance(HOUR)
        store.full = lambda _: False
        await clock.advance(120)
        await until(lambda: ran)  # noqa: B023
        assert ran == times("01T01:00")
        assert len(await runtime.tasks.list("alice")) == 1
        await runtime.stop()


async def test_a_run_that_the_store_refused_is_queued_soon_after_it_answers_again() -> None:
    clock = FakeClock()
    store = TroubledStore(clock)
    runtime, ran = scheduled(store, clock)
    await with_agent(runtime)
    await clock.advance(60)
    store.full = puts("tasks", "digest")
    for minutes in (60, 600):  # after a short outage, and after a long one
        await clock.advance(minutes * 60 - 57)
        store.full = lambda _: False
        before = len(ran)
        await clock.advance(5)
        await until(lambda: len(ran) > before)  # noqa: B023
        await clock.advance(52)
        store.full = puts("tasks", "digest")
    assert ran == times("01T01:00", "01T11:00")
    await runtime.stop()


async def test_a_schedule_has_a_payload_a_zone_and_may_be_added_while_it_runs() -> None:
    class Region(BaseModel):
        region: str

    clock = FakeClock(datetime(2026, 7, 3, tzinfo=UTC))
    runtime = make_runtime(clock=clock)
    ran: list[Any] = []

    @runtime.task("digest", agent_type="worker", priority="high", version=2)
    async def digest(ctx: TaskContext, payload: Region) -> None:
        ran.append((payload.region, ctx.task.scheduled_for, ctx.task.priority))

    await with_agent(runtime)
    await clock.advance(60)
    runtime.schedule(
        "digest", agent_id="alice", cron="30 8 * * MON-FRI", zone="Europe/Paris",
        payload=Region(region="eu"),
    )  # fmt: skip
    await clock.advance(DAY)
    assert ran == [("eu", "2026-07-03T06:30:00.000000Z", "high")]
    await clock.advance(2 * DAY)
    assert len(ran) == 1  # the weekend
    await runtime.stop()


async def test_what_is_no_schedule_is_refused() -> None:
    runtime = make_runtime()

    @runtime.task("typed", agent_type="worker")
    async def typed(ctx: TaskContext, payload: int) -> None: ...

    for cron in ("every day", "61 * * * *", "", "0 3 * *", "0 0 30 2 *"):
        with pytest.raises(StateValidationError, match=r"cron expression|no time to come"):
            runtime.schedule("digest", agent_id="alice", cron=cron)
    for zone in ("Europe/Nowhere", "", "../etc/passwd"):
        with pytest.raises(StateValidationError, match="no known time zone"):
            runtime.schedule("digest", agent_id="alice", cron="0 3 * * *", zone=zone)
    with pytest.raises(InvalidPayloadError):
        runtime.schedule("digest", agent_id="alice", cron="0 3 * * *", payload=3)
    runtime.schedule("digest", agent_id="alice", cron="0 3 * * *")
    with pytest.raises(ValueError, match="has a schedule already"):
        runtime.schedule("digest", agent_id="alice", cron="0 4 * * *")


async def test_a_hand_edit_of_the_last_run_begins_anew_where_it_is_no_time() -> None:
    clock = FakeClock()
    store = MemoryStateStore(clock=clock)
    runtime, ran = scheduled(store, clock)
    await with_agent(runtime)
    await clock.advance(60)
    key = ("schedules", "alice", "digest")
    stored = await runtime.manager.load("system", key)
    assert stored is not None
    body = stored.model_dump()
    assert body["last_run"] == "2026-01-01T00:00:00.000000Z"
    await runtime.manager.save("system", key, {**body, "last_run": "yesterday"})
    await clock.advance(2 * HOUR)
    assert ran == times("01T02:00")
    await runtime.stop()


CRONS = st.sampled_from(
    [
        "* * * * *", "*/7 * * * *", "0 * * * *", "30 2 * * *", "0 0 1 * *", "15 1,2,3 * * *",
        "0 3 * * 1-5", "59 23 L * *", "0 12 29 2 *", "30 0 * * SUN",
    ]
)  # fmt: skip
ZONES = st.sampled_from(["UTC", "Europe/Paris", "America/New_York", "Australia/Lord_Howe"])


@given(
    CRONS,
    ZONES,
    st.integers(0, 730 * DAY).map(lambda seconds: START + timedelta(seconds=seconds)),
)
def test_the_last_time_is_the_one_after_which_the_next_comes(
    cron: str, zone: str, moment: datetime
) -> None:
    schedule = Schedule("alice", "digest", cron, ZoneInfo(zone), {})
    last, following = schedule.last_until(moment), schedule.next_after(moment)
    assert last is not None
    assert following is not None
    assert last <= moment < following
    assert schedule.last_until(last) == last
    assert schedule.next_after(last) == following


@pytest.mark.parametrize("zone", ["Europe/Paris", "America/New_York"])
@pytest.mark.parametrize("cron", ["30 2 * * *", "0 3 * * *", "30 1 * * *"])
def test_a_daily_run_is_due_once_a_day_also_when_the_clocks_change(cron: str, zone: str) -> None:
    schedule = Schedule("alice", "digest", cron, ZoneInfo(zone), {})
    moment, due = START, []
    for _ in range(365):
        following = schedule.next_after(moment)
        assert following is not None
        due.append(moment := following)
    days = [each.astimezone(ZoneInfo(zone)).date() for each in due]
    assert all(later - earlier == timedelta(days=1) for earlier, later in pairwise(days))
    assert all(schedule.last_until(each) == each for each in due)
    assert (
        len(list(zip(due, CronSim(cron, due[0].astimezone(ZoneInfo(zone))), strict=False))) == 365
    )


SERVER = """
import asyncio, sys
from agent_state import AsyncAgentSessionManager, Task, TaskContext

runtime = AsyncAgentSessionManager(sys.argv[1])

@runtime.task("tick", agent_type="worker")
async def tick(ctx: TaskContext, task: Task) -> None:
    print("ran", task.scheduled_for, flush=True)

runtime.schedule("tick", agent_id="alice", cron="* * * * * *")  # every second

async def main():
    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.long("real seconds pass")
def test_runs_of_a_server_that_is_killed_again_and_again_are_queued_once(tmp_path: Path) -> None:
    ran: list[str] = []
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER, tmp_path / "state"], stdout=subprocess.PIPE, text=True
        )
        with process:
            assert process.stdout is not None
            ran += [process.stdout.readline().split()[1] for _ in range(2)]
            process.send_signal(signal.SIGKILL)
            ran += [line.split()[1] for line in process.stdout if line.startswith("ran")]

    async def stored() -> list[Task]:
        async with StatePersistenceManager(tmp_path / "state", exclusive=True) as manager:
            found = [loaded.state async for loaded in manager.scan("tasks", "alice")]
        return [task for task in found if isinstance(task, Task)]

    tasks = asyncio.run(stored())
    scheduled_for = [task.scheduled_for for task in tasks]
    assert len(set(scheduled_for)) == len(scheduled_for)
    assert set(ran) <= set(scheduled_for)


def test_a_schedule_without_its_extra_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "cronsim", None)
    with pytest.raises(ImportError, match=r"pip install 'agent-state\[cron\]'"):
        make_runtime().schedule("digest", agent_id="alice", cron="0 3 * * *")


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="agent_state.runtime")
