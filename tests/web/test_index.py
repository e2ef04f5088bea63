"""The first look after a start: what the start has read is not read again."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from agent_state import AsyncAgentSessionManager, StatePersistenceManager
from agent_state.protocols import Document, Key
from agent_state.storage import WALStateStore
from agent_state.web import LiveBackend
from agent_state.web.index import StateIndexes
from tests.deadlines import until
from tests.web.client import Client, answering


class CountedStore(WALStateStore):
    """A store that counts what is read of each kind."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.scans: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()

    async def scan(self, kind: str, prefix: Key = ()) -> AsyncIterator[Document]:
        self.scans[kind] += 1
        async for document in super().scan(kind, prefix):
            yield document

    async def get(self, kind: str, key: Key) -> Document | None:
        self.reads[kind] += 1
        return await super().get(kind, key)


async def _filled(root: Path) -> None:
    async with StatePersistenceManager(root, exclusive=True) as manager:
        for agent_id in ("alice", "bob"):
            await manager.save("agents", agent_id, {"agent_id": agent_id, "agent_type": "writer"})
            for task_id in ("t1", "t2", "t3"):
                task = {"task_id": task_id, "name": "read", "agent_id": agent_id}
                await manager.save("tasks", (agent_id, task_id), task)


async def _tasks(client: Client) -> tuple[list[str], list[str]]:
    page = (await client.get("/api/tasks")).json()
    return sorted(f"{one['agent_id']}/{one['task_id']}" for one in page["items"]), page["unusable"]


async def _summary(client: Client) -> dict[str, Any]:
    found: dict[str, Any] = (await client.get("/api/summary")).json()
    return found


async def test_what_a_start_reads_is_not_read_again_for_the_first_overview(tmp_path: Path) -> None:
    await _filled(tmp_path)
    store = CountedStore(tmp_path)
    runtime = AsyncAgentSessionManager(store=store)
    async with answering(LiveBackend(runtime=runtime), dashboard=True) as client, runtime:
        assert store.scans["tasks"] == 1
        store.reads.clear()
        summary = await _summary(client)

    assert (summary["agents"], summary["tasks_by_status"]) == (2, {"pending": 6})
    assert {kind: store.scans[kind] for kind in ("agents", "tasks")} == {"agents": 1, "tasks": 1}
    assert store.reads["tasks"] == store.reads["agents"] == 0


async def test_the_first_overview_has_what_changed_since_the_start_read_it(tmp_path: Path) -> None:
    await _filled(tmp_path)
    (tmp_path / "tasks" / "bob" / "t2.json").write_text("{ a person was here")
    runtime = AsyncAgentSessionManager(tmp_path)
    async with answering(LiveBackend(runtime=runtime), dashboard=True) as client, runtime:
        await runtime.manager.delete("tasks", ("alice", "t1"))
        new = await runtime.tasks.submit("bob", "new")
        await runtime.tasks.cancel(new)
        summary = await _summary(client)
        found = await _tasks(client)

    assert summary["tasks_by_status"] == {"cancelled": 1, "pending": 4}
    kept = ["alice/t2", "alice/t3", "bob/t1", "bob/t3", f"bob/{new.task_id}"]
    assert found == (sorted(kept), [])


async def test_a_runtime_that_starts_again_is_seen_as_it_is_then(tmp_path: Path) -> None:
    await _filled(tmp_path)
    runtime = AsyncAgentSessionManager(tmp_path)
    async with answering(LiveBackend(runtime=runtime), dashboard=True) as client:
        async with runtime:
            assert len((await _tasks(client))[0]) == 6
        (tmp_path / "tasks" / "bob" / "t1.json").unlink()
        async with runtime:
            assert len((await _tasks(client))[0]) == 5


async def test_an_index_that_nobody_looks_at_is_dropped(tmp_path: Path) -> None:
    async with StatePersistenceManager(tmp_path, exclusive=True) as manager:
        indexes = StateIndexes(manager.subscribe, most_waiting=10)
        await indexes.get("tasks", manager)
        for number in range(12):
            await manager.save("tasks", ("alice", f"t{number}"), {"task_id": f"t{number}"})
        await until(lambda: not indexes.have_filled(["tasks"]))
        assert (await indexes.get("tasks", manager)).statuses == {"pending": 12}
        await indexes.aclose()
