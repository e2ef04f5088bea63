"""Tasks of an A2A server in a state directory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from a2a.server.context import ServerCallContext
from a2a.server.tasks import InMemoryTaskStore
from a2a.types.a2a_pb2 import ListTasksRequest, Task, TaskState
from a2a.utils.errors import InvalidParamsError
from a2a.utils.task import encode_page_token

from agent_state_integrations.a2a import AgentStateTaskStore
from tests.integrations.states import (
    HOSTILE,
    STATES,
    cancel_soon,
    kill_after_lines,
    run_at_once,
    state_of,
    writer,
)

ANN = ServerCallContext(state={"owner": "ann"})
BOB = ServerCallContext(state={"owner": "bob"})


def owner_of(context: ServerCallContext) -> str:
    return str(context.state["owner"])


def task(task_id: str, seconds: int | None = None, context_id: str = "c", state: Any = 1) -> Task:
    made = Task(id=task_id, context_id=context_id)
    made.status.state = state
    if seconds is not None:
        made.status.timestamp.FromSeconds(seconds)
    return made


@pytest.fixture(params=STATES)
async def store(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[AgentStateTaskStore]:
    async with (
        state_of(request.param, tmp_path) as state,
        AgentStateTaskStore(state, owner_resolver=owner_of) as made,
    ):
        yield made


async def test_a_task_comes_back_as_it_was(store: AgentStateTaskStore) -> None:
    made = task("1", 5)
    made.metadata.update({"n": 1.5, "nested": {"a": [True, None]}})
    part = made.artifacts.add(artifact_id="a").parts.add()
    part.raw = b"\x00\xff"
    before = Task()
    before.CopyFrom(made)
    await store.save(made, ANN)
    made.context_id = "changed"
    got = await store.get("1", ANN)
    assert got == before
    got.context_id = "changed"

    assert await store.get("1", ANN) == before
    assert await store.get("1", BOB) is None
    await store.delete("1", BOB)
    assert await store.get("1", ANN) == before
    await store.delete("1", ANN)
    await store.delete("1", ANN)
    assert await store.get("1", ANN) is None


async def test_it_lists_as_the_sdks_own_store(store: AgentStateTaskStore) -> None:
    reference = InMemoryTaskStore(owner_resolver=owner_of)
    for n in range(23):
        each = task(f"t{n}", None if n % 5 == 0 else n // 3, f"c{n % 2}", 1 + n % 3)
        for one in (store, reference):
            await one.save(each, ANN)
    requests = [
        ListTasksRequest(),
        ListTasksRequest(page_size=4),
        ListTasksRequest(context_id="c1", page_size=3),
        ListTasksRequest(status=TaskState.TASK_STATE_WORKING, page_size=2),
    ]
    after = ListTasksRequest(page_size=5)
    after.status_timestamp_after.FromSeconds(3)
    for request in [*requests, after]:
        while True:
            ours, theirs = await store.list(request, ANN), await reference.list(request, ANN)
            assert ours == theirs
            if not ours.next_page_token:
                break
            request.page_token = ours.next_page_token
    assert (await store.list(ListTasksRequest(), BOB)).total_size == 0


async def test_a_token_stays_valid_when_its_task_goes(store: AgentStateTaskStore) -> None:
    for n in range(6):
        await store.save(task(str(n), n), ANN)
    first = await store.list(ListTasksRequest(page_size=2), ANN)
    await store.delete(first.tasks[-1].id, ANN)

    second = await store.list(ListTasksRequest(page_size=2, page_token=first.next_page_token), ANN)

    assert [each.id for each in second.tasks] == ["3", "2"]
    older = ListTasksRequest(page_size=2, page_token=encode_page_token("2"))
    assert [each.id for each in (await store.list(older, ANN)).tasks] == ["2", "1"]
    for token in ("nonsense", encode_page_token("missing")):
        with pytest.raises(InvalidParamsError):
            await store.list(ListTasksRequest(page_token=token), ANN)


async def test_every_id_is_a_task_of_its_own(store: AgentStateTaskStore) -> None:
    for name in HOSTILE:
        owner = ServerCallContext(state={"owner": name})
        await store.save(task(name, 1, "ids"), ANN)
        await store.save(task("same", 1, name), owner)

    for name in HOSTILE:
        owner = ServerCallContext(state={"owner": name})
        assert (await store.get(name, ANN)) == task(name, 1, "ids")
        assert (await store.get("same", owner)) == task("same", 1, name)


def test_eight_processes_save_at_once(tmp_path: Path) -> None:
    run_at_once(
        writer(
            AgentStateTaskStore,
            tmp_path,
            times=10,
            body="""
from a2a.server.context import ServerCallContext
from a2a.types.a2a_pb2 import Task
await it.save(Task(id="same"), ServerCallContext())
await it.save(Task(id=f"{sys.argv[1]}-{n}"), ServerCallContext())
""",
        ),
        8,
    )

    async def read() -> int:
        async with AgentStateTaskStore(tmp_path) as store:
            return int((await store.list(ListTasksRequest(), ServerCallContext())).total_size)

    assert asyncio.run(read()) == 81


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    lines = kill_after_lines(
        writer(
            AgentStateTaskStore,
            tmp_path,
            body="""
from a2a.server.context import ServerCallContext
from a2a.types.a2a_pb2 import Task
await it.save(Task(id="t", context_id=str(n)), ServerCallContext())
""",
        ),
        15,
    )

    async def read() -> Any:
        async with AgentStateTaskStore(tmp_path) as store:
            return await store.get("t", ServerCallContext())

    assert int(asyncio.run(read()).context_id) >= int(lines[-1])


async def test_a_cancelled_save_is_whole(tmp_path: Path) -> None:
    async with AgentStateTaskStore(tmp_path, owner_resolver=owner_of) as store:
        await store.save(task("1", 1), ANN)
        await cancel_soon(store.save(task("1", 2), ANN))

        assert await store.get("1", ANN) in (task("1", 1), task("1", 2))


async def test_ten_thousand_tasks(tmp_path: Path) -> None:
    async with state_of("exclusive", tmp_path) as state:
        store = AgentStateTaskStore(state, owner_resolver=owner_of)
        for start in range(0, 10_000, 500):
            some = (store.save(task(str(n), n), ANN) for n in range(start, start + 500))
            await asyncio.gather(*some)

        page = await store.list(ListTasksRequest(page_size=2), ANN)
        assert [each.id for each in page.tasks] == ["9999", "9998"]
        assert page.total_size == 10_000
