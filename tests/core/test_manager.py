"""The manager: every public method, on all three stores."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from agent_state import (
    AgentState,
    JSONStateSerializer,
    MemoryStateStore,
    RevisionConflictError,
    StateCorruptedError,
    StateNotFoundError,
    StatePersistenceManager,
    StateValidationError,
    Task,
)
from agent_state.migrations import schema_of
from agent_state.protocols import JsonObject, Notice, Put
from agent_state.testing import FakeClock


async def states(manager: StatePersistenceManager, kind: str, prefix: str = "") -> dict[Any, Any]:
    return {
        loaded.key: loaded.state.model_dump() async for loaded in manager.scan(kind, prefix or ())
    }


async def test_each_kind_is_saved_and_loaded_by_name(manager: StatePersistenceManager) -> None:
    for name, state in {
        "agent": {"agent_id": "alice", "status": "idle"},
        "sleep": {"agent_id": "alice", "wake_events": ["mail_received"]},
        "system": {"anything": [1]},
        "task_queue": {"agent_id": "alice", "pending_tasks": [{"task_id": "t"}]},
        "mailbox": {"agent_id": "alice", "messages": [{"message_id": "m"}]},
    }.items():
        load, save = getattr(manager, f"load_{name}_state"), getattr(manager, f"save_{name}_state")
        assert await load("alice") is None
        await save("alice", state)
        assert (await load("alice")).model_dump() == state
        assert await load("Alice") is None
    assert await manager.list_persisted_agents() == ["alice"]


async def test_a_model_and_a_mapping_are_the_same_state(manager: StatePersistenceManager) -> None:
    assert await manager.save_agent_state("a", AgentState(agent_id="a", status="x")) == 1
    assert await manager.save_agent_state("a", {"agent_id": "a", "status": "x"}) == 1


async def test_a_save_is_a_snapshot_and_a_load_a_copy(manager: StatePersistenceManager) -> None:
    given: dict[str, Any] = {"agent_id": "a", "context": {"working_memory": {"list": [1]}}}
    await manager.save_agent_state("a", given)
    given["context"]["working_memory"]["list"].append(2)

    first = await manager.load_agent_state("a")
    assert first is not None
    first.context.working_memory["list"].append(3)
    first.status = "changed"

    second = await manager.load_agent_state("a")
    assert second is not None
    assert second.context.working_memory == {"list": [1]}
    assert second.status == "idle"


async def test_a_group_takes_each_state_as_it_is_when_handed_over(
    manager: StatePersistenceManager,
) -> None:
    state = {"n": 1}
    async with manager.group() as group:
        group.save("system", "a", state)
        state["n"] = 2
        group.save("system", "b", state)

    assert await states(manager, "system") == {("a",): {"n": 1}, ("b",): {"n": 2}}


async def test_a_group_is_saved_whole(manager: StatePersistenceManager) -> None:
    await manager.save("system", "old", {"n": 1})
    async with manager.group() as group:
        group.save("agents", "alice", {"agent_id": "alice"})
        group.save("tasks", ("alice", "t"), Task(task_id="t"))
        group.delete("system", "old")
        group.append("events", "alice", {"what": "began"}, dedupe_key="1")

    assert await manager.list_persisted_agents() == ["alice"]
    assert await manager.load("tasks", ("alice", "t")) == Task(task_id="t")
    assert await manager.load("system", "old") is None
    assert [entry.record async for entry in manager.read_log("events", "alice")] == [
        {"what": "began"}
    ]


async def test_an_error_inside_a_group_saves_nothing(manager: StatePersistenceManager) -> None:
    with pytest.raises(ZeroDivisionError):
        async with manager.group() as group:
            group.save("system", "a", {})
            raise ZeroDivisionError
    with pytest.raises(StateValidationError):
        async with manager.group() as group:
            group.save("system", "a", {})
            group.save("agents", "a", {"agent_id": ""})
    with pytest.raises(RevisionConflictError):
        async with manager.group() as group:
            group.save("system", "a", {})
            group.save("system", "b", {}, expected=3)

    assert await manager.keys("system") == []
    assert await manager.commit(manager.new_group()) == []


async def test_an_edit_is_locked_fresh_and_saved_on_leaving(
    manager: StatePersistenceManager,
) -> None:
    await manager.save("system", "counter", {"n": 0})

    async def increment() -> None:
        async with manager.edit("system", "counter") as state:
            state.n += 1

    await asyncio.gather(*(increment() for _ in range(10)))

    loaded = await manager.load_with_revision("system", "counter")
    assert loaded is not None
    assert (loaded.state.model_dump(), loaded.revision) == ({"n": 10}, 11)


async def test_an_edit_waits_for_a_save_that_is_on_its_way(
    manager: StatePersistenceManager,
) -> None:
    await manager.save_agent_state("bob", {"agent_id": "bob"})
    again = asyncio.create_task(
        manager.save_agent_state("bob", {"agent_id": "bob", "status": "waiting"})
    )
    await asyncio.sleep(0)
    async with manager.edit("agents", "bob") as agent:
        assert agent.status == "waiting"
        agent.status = "stopped"
    assert await again == 2
    loaded = await manager.load_with_revision("agents", "bob")
    assert loaded is not None
    assert (loaded.revision, loaded.state.model_dump()["status"]) == (3, "stopped")


async def test_an_edit_that_fails_or_finds_nothing_saves_nothing(
    manager: StatePersistenceManager,
) -> None:
    await manager.save("agents", "a", {"agent_id": "a"})
    with pytest.raises(ZeroDivisionError):
        async with manager.edit("agents", "a") as state:
            state.status = "changed"
            raise ZeroDivisionError
    with pytest.raises(StateValidationError):
        async with manager.edit("agents", "a") as state:
            state.status = 7
    with pytest.raises(StateNotFoundError):
        async with manager.edit("agents", "b"):
            raise AssertionError("there is nothing to edit")

    assert await manager.load_agent_state("a") == AgentState(agent_id="a")


async def test_compare_and_set(manager: StatePersistenceManager) -> None:
    assert await manager.save("system", "a", {"n": 1}, expected=0) == 1
    with pytest.raises(RevisionConflictError):
        await manager.save("system", "a", {"n": 2}, expected=0)
    assert await manager.save("system", "a", {"n": 2}, expected=1) == 2
    with pytest.raises(RevisionConflictError):
        await manager.delete("system", "a", expected=1)
    assert await manager.delete("system", "a", expected=2)
    assert not await manager.delete("system", "a")


async def test_keys_and_scan_go_below_a_prefix(manager: StatePersistenceManager) -> None:
    keys: list[str | tuple[str, ...]] = ["x", ("x", "1"), ("x", "2"), ("y", "1")]
    for key in keys:
        await manager.save("notes", key, {"key": list(key)})

    assert await manager.keys("notes", "x") == [("x", "1"), ("x", "2")]
    assert await manager.keys("notes") == [("x",), ("x", "1"), ("x", "2"), ("y", "1")]
    assert set(await states(manager, "notes", "x")) == {("x", "1"), ("x", "2")}


async def test_a_log_is_read_as_objects(manager: StatePersistenceManager) -> None:
    assert await manager.append("events", ("alice", "today"), {"n": 1}) == 1
    assert await manager.append("events", ("alice", "today"), {"n": 2}, dedupe_key="x") == 2
    assert await manager.append("events", ("alice", "today"), {"n": 3}, dedupe_key="x") == 2

    entries = [entry async for entry in manager.read_log("events", ("alice", "today"), last=1)]

    assert [(entry.seq, entry.record, entry.dedupe_key) for entry in entries] == [
        (2, {"n": 2}, "x")
    ]


@pytest.mark.parametrize("name", ["_seq", "_crc", "_dedupe", "_id"])
async def test_a_record_may_not_use_our_names(manager: StatePersistenceManager, name: str) -> None:
    with pytest.raises(StateValidationError, match=name):
        await manager.append("events", "a", {name: 1})


@pytest.mark.parametrize("name", ["_checksum", "_revision", "_saved_at", "_schema", "_id"])
async def test_a_state_may_not_use_our_names(manager: StatePersistenceManager, name: str) -> None:
    with pytest.raises(StateValidationError, match=name) as caught:
        await manager.save_agent_state("a", {"agent_id": "a", name: 1})
    assert (caught.value.kind, caught.value.key) == ("agents", ("a",))


async def test_a_watch_tells_what_is_saved(manager: StatePersistenceManager) -> None:
    async with aclosing(manager.watch()) as notices:  # type: ignore[type-var]
        first = asyncio.ensure_future(anext(notices))
        await asyncio.sleep(0)
        while not first.done():
            await manager.save("system", "a", {"n": 1})
            await manager.delete("system", "a")
            await asyncio.sleep(0)
    assert (await first).key == ("a",)
    assert isinstance(await first, Notice)


async def test_a_subscription_reports_from_the_moment_it_is_returned(
    manager: StatePersistenceManager,
) -> None:
    async with aclosing(await manager.subscribe()) as notices:
        await manager.save("system", "a", {"n": 1})
        assert await anext(notices) == Notice("system", ("a",), 1)


async def test_a_lock_keeps_other_tasks_out(manager: StatePersistenceManager) -> None:
    async with manager.lock("system", "a"), manager.lock("system", ("a",)):
        other = asyncio.create_task(manager.save("system", "a", {"n": "theirs"}))
        for _ in range(50):
            await asyncio.sleep(0)
        assert await manager.save("system", "a", {"n": "mine"}, expected=0) == 1
    assert await other == 2


async def test_only_a_key_of_one_segment_is_an_agent(manager: StatePersistenceManager) -> None:
    await manager.save_agent_state("alice", {"agent_id": "alice"})
    await manager.save("agents", ("alice", "notes"), {"agent_id": "notes"})

    assert await manager.list_persisted_agents() == ["alice"]


async def test_an_unusable_document_is_reported_once_however_often_it_is_met(
    manager: StatePersistenceManager,
) -> None:
    await manager.store.commit(
        [
            Put("notes", ("one",), b"{}", "notes/2"),
            Put("notes", ("two",), b"{}", "notes/2"),
        ]
    )
    for _ in range(3):
        assert await states(manager, "notes") == {}

    found = {incident.key: incident for incident in manager.incidents()}
    assert len(manager.incidents()) == 2
    assert set(found) == {("one",), ("two",)}
    assert all("newer" in incident.what for incident in found.values())


async def test_a_scan_goes_on_after_a_document_it_cannot_use(
    manager: StatePersistenceManager,
) -> None:
    for number in range(6):
        await manager.save_agent_state(f"good-{number}", {"agent_id": f"good-{number}"})
        newer = Put("agents", (f"newer-{number}",), b"{}", "agents/1000")
        await manager.store.commit([newer])
        unusable = Put("agents", (f"bad-{number}",), b'{"status": 5}', schema_of("agents"))
        await manager.store.commit([unusable])
    await manager.flush()

    found = await states(manager, "agents")

    assert set(found) == {(f"good-{number}",) for number in range(6)}
    reported = {(incident.kind, incident.key) for incident in manager.incidents()}
    bad = {(f"newer-{number}",) for number in range(6)} | {
        (f"bad-{number}",) for number in range(6)
    }
    assert reported == {("agents", key) for key in bad}


async def test_deleting_says_whether_there_was_a_state(manager: StatePersistenceManager) -> None:
    await manager.save("notes", "one", {"n": 1})

    assert await manager.delete("notes", "one") is True
    assert await manager.delete("notes", "one") is False


async def test_erasing_returns_how_many_states_and_logs_there_were(
    manager: StatePersistenceManager,
) -> None:
    await manager.save("notes", "one", {"n": 1})
    await manager.save("notes", ("one", "below"), {"n": 1})
    await manager.append("notes", "one", {"n": 1})
    await manager.save("notes", "two", {"n": 1})

    assert await manager.erase("notes", "one") == 3
    assert await manager.keys("notes") == [("two",)]
    assert await manager.erase("notes", "one") == 0


async def test_a_log_is_read_after_a_number_and_from_its_end(
    manager: StatePersistenceManager,
) -> None:
    for number in range(1, 6):
        await manager.append("events", "log", {"n": number})

    async def numbers(**where: int) -> list[int]:
        return [entry.seq async for entry in manager.read_log("events", "log", **where)]

    assert await numbers(after=3) == [4, 5]
    assert await numbers(last=2) == [4, 5]
    assert await numbers(after=4, last=3) == [5]


async def test_a_guard_is_made_with_its_group_or_refuses_it(
    manager: StatePersistenceManager,
) -> None:
    group = manager.new_group()
    group.save("notes", "one", {"n": 1})
    group.append("events", "log", {"n": 1})
    fence = Put("notes", ("fence",), b"{}", "notes/1", expected=0)

    assert await manager.commit(group, guard=fence) == [1, 1]
    assert await manager.load("notes", "fence") is not None
    with pytest.raises(RevisionConflictError):
        await manager.commit(group, guard=fence)
    assert await manager.commit(manager.new_group()) == []
    assert await manager.commit(manager.new_group(), guard=replace(fence, expected=1)) == []


# -- what a user may supply -------------------------------------------------------------------


class Shouting(JSONStateSerializer):
    """Stores text in capitals, to be seen at work."""

    def dumps(self, state: Mapping[str, Any]) -> bytes:
        return super().dumps({name: self._shout(value) for name, value in state.items()})

    @staticmethod
    def _shout(value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value


class Strict:
    """A validator that wants a name."""

    def validate(self, kind: str, state: Mapping[str, Any]) -> None:
        if kind == "agents" and not state.get("agent_name"):
            raise StateValidationError("agent_name: say who it is", kind=kind)
        if kind == "task_queues" and state.get("forbidden"):
            raise StateValidationError("forbidden", kind=kind)


async def test_a_serializer_of_ones_own_is_used(tmp_path: Path) -> None:
    async with StatePersistenceManager(tmp_path, serializer=Shouting()) as manager:
        await manager.save("notes", "a", {"word": "quiet"})
        loaded = await manager.load("notes", "a")
    assert loaded is not None
    assert loaded.model_dump() == {"word": "QUIET"}


@pytest.mark.parametrize("exclusive", [True, False])
async def test_a_validator_of_ones_own_is_asked_on_the_way_in_and_out(
    tmp_path: Path, exclusive: bool
) -> None:
    named: JsonObject = {"agent_id": "a", "agent_name": "Alice"}
    async with StatePersistenceManager(
        tmp_path, validator=Strict(), exclusive=exclusive
    ) as manager:
        with pytest.raises(StateValidationError, match="who it is"):
            await manager.save_agent_state("a", {"agent_id": "a"})
        await manager.save_agent_state("a", named)
        assert await manager.load_agent_state("a") == AgentState(**named)
        await manager.flush()

        path = tmp_path / "agents" / "b.json"
        path.write_text(json.dumps({"agent_id": "b"}))
        with pytest.raises(StateCorruptedError, match="who it is"):
            await manager.load_agent_state("b")
        assert not path.exists()


@pytest.mark.parametrize(
    "given", [{"state_dir": "state"}, {"exclusive": True}, {"durability": "fsync"}]
)
def test_a_store_contradicts_the_settings_of_files(given: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(given))}=.* and store= contradict"):
        StatePersistenceManager(**given, store=MemoryStateStore())


def test_every_argument_that_contradicts_a_store_is_named() -> None:
    with pytest.raises(TypeError, match=r"^state_dir=, exclusive=, durability= and store="):
        StatePersistenceManager(
            "/nonexistent",
            exclusive=True,
            durability="nonsense",  # type: ignore[arg-type]
            store=MemoryStateStore(),
        )


@pytest.mark.parametrize("exclusive", [False, True])
def test_an_unknown_durability_is_refused(tmp_path: Path, exclusive: bool) -> None:
    with pytest.raises(ValueError, match="durability is 'fsync' or 'os', not 'nonsense'"):
        StatePersistenceManager(
            tmp_path,
            exclusive=exclusive,
            durability="nonsense",  # type: ignore[arg-type]
        )


def test_nothing_is_restored_without_a_mirror(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="mirror_restores= needs a mirror="):
        StatePersistenceManager(tmp_path, mirror_restores=True)


async def test_a_manager_may_be_opened_and_closed_twice(tmp_path: Path) -> None:
    manager = StatePersistenceManager(tmp_path)
    await manager.open()
    await manager.open()
    await manager.save("system", "a", {})
    await manager.flush()
    await manager.close()
    await manager.close()
    await manager.open()
    assert await manager.keys("system") == [("a",)]
    await manager.close()


async def test_files_are_what_the_documentation_shows(tmp_path: Path) -> None:
    clock = FakeClock(datetime(2026, 11, 21, 3, 11, tzinfo=UTC))
    async with StatePersistenceManager(tmp_path, clock=clock, exclusive=True) as manager:
        await manager.save_agent_state("Alice", {"status": "idle", "agent_id": "Alice", "é": "ü"})

    body = '{"agent_id":"Alice","status":"idle","é":"ü"}'
    assert (tmp_path / "agents" / "!alice.json").read_text() == (
        "{\n"
        f'  "_checksum": "{crc32(body.encode()):08x}",\n'
        '  "_revision": 1,\n'
        '  "_saved_at": "2026-11-21T03:11:00.000000Z",\n'
        '  "_schema": "agents/1",\n'
        '  "_session_id": "Alice",\n'
        '  "agent_id": "Alice",\n'
        '  "status": "idle",\n'
        '  "é": "ü"\n'
        "}\n"
    )
