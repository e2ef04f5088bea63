"""Times out of range in the documents of one agent, and in calls: everybody else goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest

from agent_state import (
    AsyncAgentSessionManager,
    MemoryStateStore,
    RateLimit,
    RetryPolicy,
    StatePersistenceManager,
    StateValidationError,
)
from agent_state.runtime.sleep import fall_asleep
from agent_state.sessions import SessionManager
from agent_state.testing import FakeClock
from tests.deadlines import soon, until
from tests.runtime.runtimes import make_runtime, working

LATE, EARLY = "9999-12-31T23:59:59-05:00", "0001-01-01T00:00:00+05:00"


async def save(manager: StatePersistenceManager, kind: str, **fields: Any) -> None:
    key: Mapping[str, tuple[str, ...]] = {
        "sleep": ("odd",),
        "tasks": ("odd", "t"),
        "mail": ("odd", "m"),
    }
    ids: dict[str, dict[str, Any]] = {
        "sleep": {"agent_id": "odd"},
        "tasks": {"task_id": "t", "attempts": 0, "name": "n"},
    }
    body = ids.get(kind, {"message_id": "m", "to_agent": "odd"})
    await manager.save(kind, key[kind], {**body, **fields})


@pytest.mark.parametrize(
    ("kind", "fields", "status", "ran"),
    [
        ("sleep", {"sleep_until": LATE}, "sleeping", False),
        ("sleep", {"sleep_until": "+275760-09-13T00:00:00Z"}, "sleeping", False),
        ("sleep", {"sleep_until": EARLY}, "idle", False),
        ("sleep", {"sleep_until": 1}, "idle", False),
        ("sleep", {"sleep_until": 10**18 * 9}, "sleeping", False),
        ("tasks", {"not_before": LATE}, "idle", False),
        ("tasks", {"not_before": EARLY}, "idle", True),
        ("tasks", {"not_before": 1767225600_000, "created_at": 5}, "idle", True),
        ("mail", {"timestamp": LATE, "read_at": EARLY}, "idle", False),
        ("mail", {"timestamp": 1.5, "read_at": -7}, "idle", False),
    ],
)
async def test_a_time_out_of_range_counts_as_the_nearest_and_everybody_goes_on(
    manager: StatePersistenceManager,
    fake_clock: FakeClock,
    kind: str,
    fields: dict[str, Any],
    status: str,
    ran: bool,
) -> None:
    for agent_id in ("odd", "sound"):
        state = {"agent_id": agent_id, "agent_type": "worker", "created_at": EARLY}
        await manager.save_agent_state(agent_id, state)
    await save(manager, kind, **fields)
    done = list[str]()
    runtime = make_runtime(manager.store, fake_clock)
    working(runtime, done)

    report = await runtime.start()
    await soon(runtime.tasks.result(await runtime.tasks.submit("sound", "n")))
    await fake_clock.advance(1)

    assert (report.failed, report.contained) == ({}, [])
    await until(lambda: runtime.agents.get("odd").status == status)
    assert ("odd/n" in done) is ran
    await runtime.stop()


@pytest.mark.parametrize("delay", [math.nan, "5", None, True])
async def test_a_delay_that_is_no_number_is_refused(delay: Any) -> None:
    async with make_runtime() as runtime:
        await runtime.agents.create("alice", agent_type="worker")
        with pytest.raises(StateValidationError, match="delay_seconds"):
            await runtime.tasks.submit("alice", "n", delay_seconds=delay)


@pytest.mark.parametrize("seconds", [math.inf, 1e300])
async def test_a_delay_without_end_lasts_until_the_last_year(seconds: float) -> None:
    async with make_runtime() as runtime:
        await runtime.agents.create("alice", agent_type="worker")
        task = await runtime.tasks.submit("alice", "n", delay_seconds=seconds)

    assert task.not_before == "9999-12-31T23:59:59.999999Z"


def test_a_sleep_of_nan_seconds_is_refused(fake_clock: FakeClock) -> None:
    with pytest.raises(StateValidationError):
        fall_asleep("alice", now=fake_clock.now(), seconds=math.nan)


@pytest.mark.parametrize(
    "name", ["lease_seconds", "save_interval_seconds", "grace_seconds", "cancel_timeout_seconds"]
)
def test_a_runtime_refuses_an_interval_that_is_none(name: str) -> None:
    given: dict[str, Any] = {name: math.nan}
    with pytest.raises(StateValidationError, match=name):
        AsyncAgentSessionManager(**given)


@pytest.mark.parametrize("name", ["base_seconds", "factor", "max_seconds", "jitter"])
def test_a_retry_policy_refuses_what_is_no_number(name: str) -> None:
    given: dict[str, Any] = {name: math.nan}
    with pytest.raises(StateValidationError, match=name):
        RetryPolicy(**given)


@pytest.mark.parametrize("wrong", [-1, True, 1.5, math.nan, math.inf, "3", None])
def test_a_number_of_interruptions_is_a_count(wrong: Any) -> None:
    with pytest.raises(StateValidationError, match="max_interruptions"):
        RetryPolicy(max_interruptions=wrong)


@pytest.mark.parametrize("wrong", [-1, True, 1.5, math.nan, "3"])
async def test_a_number_of_results_is_a_count(wrong: Any) -> None:
    runtime = make_runtime()
    await runtime.start()
    try:
        await runtime.agents.create("alice", agent_type="worker")
        with pytest.raises(StateValidationError, match="limit"):
            runtime.mail.inbox("alice", limit=wrong)
        with pytest.raises(StateValidationError, match="limit"):
            await runtime.tasks.search(limit=wrong)
        with pytest.raises(StateValidationError, match="start"):
            [each async for each in runtime.manager.read_history("alice", start=wrong)]
    finally:
        await runtime.stop()


@pytest.mark.parametrize("wrong", [True, math.nan, "3", -1])
@pytest.mark.parametrize("name", ["ttl_seconds", "max_sessions_per_user", "renew_interval_seconds"])
def test_sessions_refuse_what_is_no_number(name: str, wrong: Any) -> None:
    manager = StatePersistenceManager(store=MemoryStateStore())
    with pytest.raises(StateValidationError, match=name):
        SessionManager(manager, **{name: wrong})


@pytest.mark.parametrize("wrong", [-1, True, math.nan, "1"])
async def test_what_is_no_length_of_time_is_refused_everywhere(wrong: Any) -> None:
    runtime = make_runtime()
    await runtime.start()
    await runtime.agents.create("ann", agent_type="worker")
    submit = partial(runtime.tasks.submit, "ann", "work")
    for call in (
        lambda: runtime.cleanup_old_states(wrong),
        lambda: runtime.manager.cleanup_old_states(wrong),
        lambda: runtime.agents.sleep("ann", seconds=wrong),
        lambda: submit(delay_seconds=wrong),
        lambda: submit(timeout_seconds=wrong),
        lambda: submit(dedupe_key="k", dedupe_seconds=wrong),
        lambda: submit(max_attempts=wrong),
    ):
        with pytest.raises(StateValidationError):
            await call()
    for make in (
        lambda: make_runtime(lease_seconds=wrong),
        lambda: make_runtime(grace_seconds=wrong),
        lambda: RetryPolicy(max_seconds=wrong),
        lambda: RateLimit("calls", 1, per_seconds=wrong),
    ):
        with pytest.raises(StateValidationError):
            make()
    assert not await runtime.tasks.list("ann")
    await runtime.stop()
