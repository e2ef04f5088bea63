"""The page /metrics, as Prometheus' own parser reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from agent_state import (
    AsyncAgentSessionManager,
    MemoryStateStore,
    RetryPolicy,
    StatePersistenceManager,
    Task,
    TaskContext,
)
from agent_state.testing import FakeClock
from agent_state.web import LiveBackend, ReadOnlyBackend
from tests.web.client import TOKEN, Client, answering

ODD = 'a "type"\nwith \\ odd letters é'


async def figures(client: Client) -> dict[str, dict[tuple[str, ...], float]]:
    """The samples of the page, by name and by the values of the labels."""
    response = await client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(response.text):
        assert family.documentation
        assert family.type in {"gauge", "counter", "histogram"}
        for sample in family.samples:
            found.setdefault(sample.name, {})[(*sample.labels.values(),)] = sample.value
    return found


def work_or_fail(runtime: AsyncAgentSessionManager, agent_type: str) -> AsyncAgentSessionManager:
    @runtime.handler(agent_type)
    async def work(ctx: TaskContext, task: Task) -> None:
        if task.name == "bad":
            raise ValueError("no")
        if task.name == "sleep":
            await ctx.sleep(seconds=10**6)

    return runtime


@pytest.fixture
def runtime() -> AsyncAgentSessionManager:
    clock = FakeClock()
    retry = RetryPolicy(base_seconds=0.001, max_seconds=0.001)
    store = MemoryStateStore(clock=clock)
    return AsyncAgentSessionManager(
        store=store, clock=clock, retry=retry, save_interval_seconds=10**6
    )


async def test_the_page_of_a_runtime_has_its_queues_attempts_and_saves(
    runtime: AsyncAgentSessionManager,
) -> None:
    clock: Any = runtime.manager.clock
    work_or_fail(runtime, ODD)
    async with runtime, answering(LiveBackend(runtime=runtime)) as client:
        await runtime.agents.create("ann", agent_type=ODD)
        await runtime.agents.create("bob", agent_type="nobody")
        for name in ("good", "bad", "sleep"):
            await runtime.tasks.submit("ann", name, max_attempts=1)
            await runtime.wait_idle()
        await runtime.tasks.submit("bob", "now")
        await clock.advance(40)
        await runtime.tasks.submit("bob", "later", delay_seconds=1000)
        await runtime.wait_idle()

        found = await figures(client)

    assert found["agent_state_agents"] == {("sleeping",): 1, ("waiting",): 1}
    assert found["agent_state_tasks_waiting"] == {(ODD,): 1, ("nobody",): 2}
    assert found["agent_state_tasks_oldest_age_seconds"] == {(ODD,): 40, ("nobody",): 40}
    assert found["agent_state_tasks_running"] == {(): 0}
    assert found["agent_state_tasks_dead"] == {(): 1}
    assert found["agent_state_attempts_total"] == {
        (ODD, "completed"): 1, (ODD, "dead"): 1, (ODD, "pending"): 1,
    }  # fmt: skip
    assert found["agent_state_save_duration_seconds_count"][()] > 0
    assert (
        found["agent_state_save_duration_seconds_bucket"][("+Inf",)]
        == (found["agent_state_save_duration_seconds_count"][()])
    )


async def test_dead_letters_are_counted_from_the_store_and_those_that_die_since_added(
    runtime: AsyncAgentSessionManager,
) -> None:
    work_or_fail(runtime, "worker")
    async with runtime, answering(LiveBackend(runtime=runtime)) as client:
        await runtime.agents.create("ann", agent_type="worker")
        await runtime.manager.save(  # of an agent that is not here
            "tasks", ("gone", "t"), {"task_id": "t", "agent_id": "gone", "status": "Dead"}
        )
        assert (await figures(client))["agent_state_tasks_dead"] == {(): 1}

        await runtime.tasks.submit("ann", "bad", max_attempts=1)
        await runtime.wait_idle()

        assert (await figures(client))["agent_state_tasks_dead"] == {(): 2}


async def test_a_restarted_runtime_knows_its_dead_letters(tmp_path: Path) -> None:
    first = work_or_fail(AsyncAgentSessionManager(tmp_path / "state"), "worker")
    async with first:
        await first.agents.create("ann", agent_type="worker")
        await first.tasks.submit("ann", "bad", max_attempts=1)
        await first.wait_idle()
    second = work_or_fail(AsyncAgentSessionManager(tmp_path / "state"), "worker")
    async with second, answering(LiveBackend(runtime=second)) as client:
        found = await figures(client)

    assert found["agent_state_tasks_dead"] == {(): 1}
    assert found["agent_state_journal_lag_seconds"][()] >= 0
    assert "agent_state_journal_waiting" in found


async def test_a_directory_that_another_process_owns_is_counted_as_it_is_stored(
    tmp_path: Path,
) -> None:
    async with StatePersistenceManager(tmp_path / "state", exclusive=True) as owner:
        for number, status in enumerate(["pending", "failed", "dead", "in_progress", "completed"]):
            task_id = str(number)
            await owner.save(
                "tasks", ("ann", task_id),
                {"task_id": task_id, "agent_id": "ann", "status": status,
                 "created_at": "2026-01-01T00:00:00.000000Z"},
            )  # fmt: skip
        async with ReadOnlyBackend(tmp_path / "state") as directory, answering(directory) as client:
            found = await figures(client)
        async with answering(LiveBackend(manager=owner)) as client:
            own = await figures(client)

    for page in (found, own):
        assert page["agent_state_tasks_waiting"] == {(): 2}
        assert page["agent_state_tasks_dead"] == {(): 1}
        assert page["agent_state_tasks_running"] == {(): 1}
        assert page["agent_state_tasks_oldest_age_seconds"][()] > 86_400
    assert "agent_state_journal_waiting" in own


async def test_a_time_that_a_person_or_another_program_wrote_does_not_hide_the_oldest() -> None:
    clock = FakeClock()
    store = MemoryStateStore(clock=clock)
    times = [None, "", "soon", 1767225600, "2025-12-31T23:00:00.000000Z", "2026-01-01T00:00:00Z"]
    async with StatePersistenceManager(store=store, clock=clock) as manager:
        for number, time in enumerate(times):
            task: dict[str, object] = {
                "task_id": str(number),
                "agent_id": "ann",
                "status": "pending",
            }
            task |= {} if time is None else {"created_at": time}
            await manager.save("tasks", ("ann", str(number)), task)
        async with answering(LiveBackend(manager=manager)) as client:
            found = await figures(client)

    assert found["agent_state_tasks_waiting"] == {(): 6}
    assert found["agent_state_tasks_oldest_age_seconds"] == {(): 3600}


async def test_only_an_operator_may_read_it(runtime: AsyncAgentSessionManager) -> None:
    async with runtime, answering(LiveBackend(runtime=runtime)) as client:
        assert (await client.get("/metrics")).status_code == 200
        for headers in ({"Authorization": "Bearer nonsense"}, {"Authorization": f"Basic {TOKEN}"}):
            assert (await client.get("/metrics", headers=headers)).status_code == 401
