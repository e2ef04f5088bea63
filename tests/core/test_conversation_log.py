"""A long conversation is a log beside its agent: what is stored, and what is read back."""

from __future__ import annotations

import asyncio
import copy
import json
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent_state import MemoryStateStore, StatePersistenceManager
from agent_state.errors import (
    RevisionConflictError,
    SerializationError,
    StateCorruptedError,
    StateValidationError,
)
from agent_state.protocols import Append, Change, Put
from agent_state.redis import RedisStateStore
from agent_state.salvage import read_version
from agent_state.serializers import JsonList
from agent_state.storage import ReadOnlyStateStore
from agent_state.testing import FakeClock
from tests.redis.servers import RedisServer


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def turn(number: int, size: int = 600) -> dict[str, Any]:
    role = "user" if number % 2 else "assistant"
    return {"role": role, "content": f"{number} {'x' * size}"}


def alice(history: list[Any], **more: Any) -> dict[str, Any]:
    context = {"conversation_history": history, "working_memory": {"turns": len(history)}}
    return {"agent_id": "alice", "status": "active", "context": context, **more}


def history_of(state: Any) -> list[Any]:
    assert state is not None
    found: list[Any] = state.model_dump()["context"]["conversation_history"]
    return found


async def log_of(manager: StatePersistenceManager, name: str = "history") -> list[Any]:
    return [entry.record async for entry in manager.read_log("agents", ("alice", name))]


async def marker_of(manager: StatePersistenceManager) -> Any:
    document = await manager.store.get("agents", ("alice",))
    assert document is not None
    return json.loads(document.body)["context"]["conversation_history"]


async def test_a_turn_is_a_line(manager: StatePersistenceManager) -> None:
    history: list[Any] = []
    for number in range(40):
        history.append(turn(number))
        assert await manager.save_agent_state("alice", alice(history)) == number + 1
    assert await log_of(manager) == history
    check = f"{crc32(canonical(history)[:-1]):08x}"
    assert await marker_of(manager) == {"check": check, "log": "history", "ranges": [[1, 40]]}
    assert history_of(await manager.load_agent_state("alice")) == history
    [found] = [stored async for stored in manager.scan("agents")]
    assert (found.revision, found.schema, history_of(found.state)) == (40, "agents", history)


async def test_files_show_what_was_said(tmp_path: Path) -> None:
    async with StatePersistenceManager(tmp_path) as manager:
        await manager.save_agent_state("alice", alice([turn(n) for n in range(20)]))
        lines = (tmp_path / "agents/alice/history.jsonl").read_text()
        await manager.save_agent_state("alice", alice([turn(n) for n in range(21)]))
    after = (tmp_path / "agents/alice/history.jsonl").read_text()
    assert after.startswith(lines)
    [added] = after.removeprefix(lines).splitlines()
    assert json.loads(added)["content"] == turn(20)["content"]
    assert json.loads((tmp_path / "agents/alice.json").read_text())["_schema"] == "agents/2"


async def test_a_short_conversation_stays_in_its_document(
    manager: StatePersistenceManager,
) -> None:
    history = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    await manager.save_agent_state("alice", alice(history))
    assert await marker_of(manager) == history
    assert await manager.store.logs("agents") == []


async def test_an_old_document_moves_at_its_next_save(manager: StatePersistenceManager) -> None:
    history = [turn(n) for n in range(30)]
    await manager.store.commit([Put("agents", ("alice",), canonical(alice(history)), "agents/1")])
    assert history_of(await manager.load_agent_state("alice")) == history
    assert await manager.save_agent_state("alice", alice([*history, turn(30)])) == 2
    assert await log_of(manager) == [*history, turn(30)]


@pytest.mark.parametrize(
    ("change", "ranges", "rest"),
    [
        (lambda h: h[:-1], [[1, 19]], None),
        (lambda h: [*h[:-1], turn(99)], [[1, 19]], [turn(99)]),
        (lambda h: h[5:], [[6, 20]], None),
        (lambda h: [*h[5:], turn(20)], [[6, 21]], None),
        (lambda h: [turn(99), *h], [], [turn(99), *(turn(n) for n in range(20))]),
    ],
)
async def test_what_an_edit_leaves(
    manager: StatePersistenceManager, change: Any, ranges: Any, rest: Any
) -> None:
    history = [turn(n) for n in range(20)]
    await manager.save_agent_state("alice", alice(history))
    edited = change(history)
    await manager.save_agent_state("alice", alice(edited))
    found = await marker_of(manager)
    assert (found["ranges"], found.get("rest")) == (ranges, rest)
    assert history_of(await manager.load_agent_state("alice")) == edited
    await manager.save_agent_state("alice", alice([*edited, turn(50)]))
    assert history_of(await manager.load_agent_state("alice")) == [*edited, turn(50)]
    assert "rest" not in await marker_of(manager)


async def test_a_text_that_streams_into_the_last_message(manager: StatePersistenceManager) -> None:
    history: list[Any] = [turn(n) for n in range(10)]
    for number in range(10, 60):
        history.append({"role": "assistant", "content": ""})
        for _ in range(3):
            history[-1]["content"] += f"{number} words "
            await manager.save_agent_state("alice", alice(history))
    assert history_of(await manager.load_agent_state("alice")) == history
    for key in await manager.store.logs("agents"):
        assert len(await log_of(manager, key[1])) < 3 * len(history)


async def test_a_window_that_moves(manager: StatePersistenceManager, fake_clock: FakeClock) -> None:
    history = [turn(n) for n in range(20)]
    for number in range(20, 400):
        history = [*history[1:], turn(number)]
        await fake_clock.advance(2)
        await manager.save_agent_state("alice", alice(history))
    assert history_of(await manager.load_agent_state("alice")) == history
    await manager.close()
    await manager.open()
    assert history_of(await manager.load_agent_state("alice")) == history
    logs = await manager.store.logs("agents")
    assert len(logs) == 2  # the one in use, and the one that an earlier version may name
    for key in logs:
        assert len(await log_of(manager, key[1])) <= 2 * 20 + 101


_EDITS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 30)),
        st.tuples(st.just("cut front"), st.integers(1, 12)),
        st.tuples(st.just("cut end"), st.integers(1, 12)),
        st.tuples(st.just("mutate"), st.integers(0, 60)),
        st.tuples(st.just("insert"), st.integers(0, 60)),
        st.tuples(st.just("clear"), st.just(0)),
        st.tuples(st.just("not a record"), st.integers(0, 3)),
        st.tuples(st.just("delete"), st.just(0)),
        st.tuples(st.just("reopen"), st.just(0)),
        st.tuples(st.just("same again"), st.just(0)),
        st.tuples(st.just("refused"), st.integers(1, 3)),
    ),
    max_size=25,
)


def _edit(history: list[Any], how: str, size: int) -> None:
    """Change a history in place; all messages are different."""
    if how == "append":
        history += [turn(len(history) + n) for n in range(size)]
    elif how == "cut front":
        del history[:size]
    elif how == "cut end":
        del history[max(len(history) - size, 0) :]
    elif how == "mutate" and history and isinstance(history[size % len(history)], dict):
        history[size % len(history)]["content"] = f"mutated {len(history)} {size}"
    elif how == "insert":
        history.insert(size % (len(history) + 1), {"role": "system", "content": f"put in {size}"})
    elif how == "clear":
        history.clear()
    elif how == "not a record":
        history.append(["only text", None, 1.5, {"_seq": 3}][size])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=_EDITS, append_only=st.lists(st.booleans(), min_size=25, max_size=25))
async def test_what_was_saved_is_loaded(
    manager: StatePersistenceManager, edits: list[tuple[str, int]], append_only: list[bool]
) -> None:
    await manager.erase("agents", "alice")
    history: list[Any] = []
    frozen: dict[str, Any] = {}
    revision = 0
    for (how, size), in_place in zip(edits, append_only, strict=False):
        if how == "delete":
            await manager.delete("agents", "alice")
            history, revision = [], 0
            assert await manager.load_agent_state("alice") is None
            continue
        if how == "reopen":
            await manager.close()
            await manager.open()
        _edit(history, how, size)
        given = history
        if not in_place:  # a message that is not changed is the very same object, as in a runtime
            given = [frozen.setdefault(repr(each), copy.deepcopy(each)) for each in history]
        if how == "refused":
            group = manager.new_group()
            longer = [*given, *(turn(900 + n) for n in range(size))]
            group.save("agents", "alice", alice(longer), append_only=not in_place)
            group.check("agents", "bob", 5)
            with pytest.raises(RevisionConflictError):
                await manager.commit(group)
        group = manager.new_group()
        group.save("agents", "alice", alice(given), expected=revision, append_only=not in_place)
        [saved] = await manager.commit(group)
        assert saved >= revision if how in ("same again", "reopen", "refused") else saved > 0
        revision = saved
        loaded = await manager.load_with_revision("agents", "alice")
        assert loaded is not None
        assert (loaded.revision, history_of(loaded.state)) == (revision, history)


async def test_an_unchanged_agent_is_no_new_revision(manager: StatePersistenceManager) -> None:
    history = [turn(n) for n in range(20)]
    assert await manager.save_agent_state("alice", alice(history)) == 1
    assert await manager.save_agent_state("alice", alice(history)) == 1
    assert len(await log_of(manager)) == 20


async def test_expected_revisions(manager: StatePersistenceManager) -> None:
    history = [turn(n) for n in range(20)]
    await manager.save("agents", "alice", alice(history), expected=0)
    with pytest.raises(RevisionConflictError) as refused:
        await manager.save("agents", "alice", alice([*history, turn(20)]), expected=0)
    assert (refused.value.expected, refused.value.actual) == (0, 1)
    with pytest.raises(RevisionConflictError) as refused:
        await manager.save("agents", "alice", alice([*history, turn(20)]), expected=7)
    assert (refused.value.expected, refused.value.actual) == (7, 1)
    assert await log_of(manager) == history
    assert await manager.save("agents", "alice", alice([*history, turn(20)]), expected=1) == 2


async def test_a_group_that_is_refused_appends_nothing(manager: StatePersistenceManager) -> None:
    history = [turn(n) for n in range(20)]
    await manager.save_agent_state("alice", alice(history))
    group = manager.new_group()
    group.save("agents", "alice", alice([*history, turn(20)]))
    group.check("agents", "alice", 5)
    with pytest.raises(RevisionConflictError):
        await manager.commit(group)
    assert await log_of(manager) == history
    assert history_of(await manager.load_agent_state("alice")) == history


async def test_an_agent_twice_in_a_group(manager: StatePersistenceManager) -> None:
    history = [turn(n) for n in range(20)]
    group = manager.new_group()
    group.save("agents", "alice", alice(history))
    group.append("talk", "alice", {"said": 1})
    group.save("agents", "alice", alice([*history, turn(20)]))
    group.delete("agents", "bob")
    numbers = await manager.commit(group)
    assert numbers == [1, 1, 2, 0]
    assert history_of(await manager.load_agent_state("alice")) == [*history, turn(20)]


async def test_many_savers_at_once(manager: StatePersistenceManager) -> None:
    """Each save is whole: the stored conversation is that of one of them, to the last."""
    history = [turn(n) for n in range(20)]
    await manager.save_agent_state("alice", alice(history))
    branches = [[*history, *(turn(100 * b + n) for n in range(3))] for b in range(12)]
    saved = await asyncio.gather(*(manager.save_agent_state("alice", alice(b)) for b in branches))
    assert len({*saved}) == 12
    loaded = history_of(await manager.load_agent_state("alice"))
    assert loaded == branches[saved.index(max(saved))]


async def test_a_number_that_a_record_must_get(manager: StatePersistenceManager) -> None:
    commit = manager.store.commit
    first = Append("notes", ("alice",), b'{"n":1}', expected=1)
    assert await commit([first, Append("notes", ("alice",), b'{"n":2}', expected=2)]) == [1, 2]
    with pytest.raises(RevisionConflictError) as refused:
        await commit([Append("notes", ("bob",), b"{}"), first])
    assert (refused.value.expected, refused.value.actual) == (1, 3)
    assert await manager.store.logs("notes") == [("alice",)]


async def test_what_a_save_refuses(manager: StatePersistenceManager) -> None:
    class Colour(StrEnum):
        RED = "red"

    history: list[Any] = [turn(n) for n in range(20)]
    await manager.save_agent_state("alice", alice(history))
    for bad in (Colour.RED, float("nan"), 2**70, {1}, {1: 2}, "\ud800"):
        with pytest.raises(SerializationError, match=r"conversation_history\[20\]"):
            await manager.save_agent_state(
                "alice", alice([*history, {"role": "user", "content": bad}])
            )
    deep: Any = 0
    for _ in range(198):
        deep = [deep]
    with pytest.raises(SerializationError, match="deeper"):
        await manager.save_agent_state("alice", alice([*history, {"content": deep}]))
    assert history_of(await manager.load_agent_state("alice")) == history


async def test_a_deleted_agent_leaves_no_log(manager: StatePersistenceManager) -> None:
    history = [turn(n) for n in range(20)]
    await manager.save_agent_state("alice", alice(history))
    await manager.delete("agents", "alice")

    async with asyncio.timeout(60):
        while await manager.store.logs("agents"):
            await asyncio.sleep(0.002)
    await manager.save_agent_state("alice", alice([turn(7), *history]))
    assert history_of(await manager.load_agent_state("alice")) == [turn(7), *history]


async def test_an_agent_that_is_there_again_keeps_its_log(manager: StatePersistenceManager) -> None:
    history = [turn(n) for n in range(20)]
    for _ in range(5):
        await manager.save_agent_state("alice", alice(history))
        await manager.delete("agents", "alice")
    await manager.save_agent_state("alice", alice(history))
    await manager.close()
    await manager.open()
    assert history_of(await manager.load_agent_state("alice")) == history


@pytest.mark.parametrize("manager", ["shared", "exclusive"], indirect=True)
async def test_an_earlier_version_has_its_conversation(
    manager: StatePersistenceManager, tmp_path: Path
) -> None:
    history = [turn(n) for n in range(20)]
    await manager.save_agent_state("alice", alice(history))
    await manager.flush()
    earlier = (tmp_path / "agents/alice.json").read_bytes()
    await manager.save_agent_state("alice", alice([*history, turn(20)]))
    version = await read_version(manager, "agents", ("alice",), earlier)
    assert version.body["context"]["conversation_history"] == history
    await manager.flush()
    (tmp_path / "agents/alice/history.jsonl").unlink()
    with pytest.raises(StateCorruptedError, match="has 0 of the 20 records"):
        await read_version(manager, "agents", ("alice",), earlier)


@pytest.mark.parametrize("manager", ["shared", "exclusive"], indirect=True)
async def test_a_log_that_was_cut_off_is_reported(
    manager: StatePersistenceManager, tmp_path: Path
) -> None:
    history = [turn(n) for n in range(20)]
    await manager.save_agent_state("alice", alice(history))
    await manager.close()
    log = tmp_path / "agents/alice/history.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:12]))
    await manager.open()
    assert history_of(await manager.load_agent_state("alice")) == history[:12]
    [incident] = manager.incidents()
    assert "12 of the 20 records" in incident.what
    assert await manager.save_agent_state("alice", alice([*history[:12], turn(50)])) == 2
    assert history_of(await manager.load_agent_state("alice")) == [*history[:12], turn(50)]


async def test_a_range_without_an_end_goes_on(manager: StatePersistenceManager) -> None:
    history = [turn(n) for n in range(20)]
    await manager.save_agent_state("alice", alice(history))
    document = await manager.store.get("agents", ("alice",))
    assert document is not None
    body = document.body.replace(b"[[1,20]]", b"[[1]]")
    change = manager.new_group()
    change.append("agents", ("alice", "history"), turn(20))
    await manager.commit(change)
    # As a merge leaves it.
    await manager.store.commit([Put("agents", ("alice",), body, "agents/2", None)])
    assert history_of(await manager.load_agent_state("alice")) == [*history, turn(20)]
    await manager.save_agent_state("alice", alice([*history, turn(20), turn(21)]))
    assert (await marker_of(manager))["ranges"] == [[1, 22]]


@pytest.mark.parametrize(
    "place",
    [
        {"log": "history"},
        {"log": 3, "ranges": []},
        {"log": "", "ranges": [[1, 5]]},
        {"log": "../bob/history", "ranges": [[1, 5]]},
        {"log": "history", "ranges": [[5, 2]]},
        {"log": "history", "ranges": [[1, 3], [2, 4]]},
        {"log": "history", "ranges": [[1], [4, 5]]},
        {"log": "history", "ranges": [[True, 5]]},
        {"log": "history", "ranges": [[1, 5]], "more": 1},
    ],
)
@pytest.mark.parametrize("manager", ["shared", "exclusive"], indirect=True)
async def test_a_place_that_cannot_be_read_is_damage(
    manager: StatePersistenceManager, tmp_path: Path, place: Any
) -> None:
    history = [turn(n) for n in range(20)]
    await manager.save_agent_state("alice", alice(history))
    await manager.close()
    file = tmp_path / "agents/alice.json"
    content = json.loads(file.read_text())
    content["context"]["conversation_history"] = place
    file.write_text(json.dumps(content))
    await manager.open()
    try:
        found = history_of(await manager.load_agent_state("alice"))
    except StateCorruptedError:
        found = history  # no earlier version is kept
    assert found == history
    assert any("conversation" in incident.what for incident in manager.incidents())


async def test_two_processes_in_turns(tmp_path: Path) -> None:
    history: list[Any] = [turn(n) for n in range(20)]
    async with (
        StatePersistenceManager(tmp_path) as one,
        StatePersistenceManager(tmp_path) as other,
    ):
        await one.save_agent_state("alice", alice(history))
        for number in range(20, 40):
            manager = other if number % 2 else one
            loaded = await manager.load_with_revision("agents", "alice")
            assert loaded is not None
            state = loaded.state.model_dump()
            assert history_of(loaded.state) == history
            history.append(turn(number))
            state["context"]["conversation_history"].append(turn(number))
            await manager.save("agents", "alice", state, expected=loaded.revision)
    assert len((tmp_path / "agents/alice/history.jsonl").read_text().splitlines()) == 40


_WRITER = """
import asyncio, sys
from agent_state import MemoryStateStore, StatePersistenceManager

async def main():
    exclusive = sys.argv[2] == "exclusive"
    async with StatePersistenceManager(sys.argv[1], exclusive=exclusive) as manager:
        loaded = await manager.load_agent_state("alice")
        history = loaded.model_dump()["context"]["conversation_history"] if loaded else []
        number = int(history[-1]["content"].split()[0]) if history else 0
        while True:
            number += 1
            history.append({"role": "user", "content": f"{number} " + "x" * 600})
            if len(history) % 37 == 0:
                del history[:20]
            state = {"agent_id": "alice", "context": {
                "conversation_history": history, "working_memory": {"turns": len(history)}}}
            await manager.save_agent_state("alice", state)
            print(number, flush=True)

asyncio.run(main())
"""


def _last_of(state: Any) -> int:
    """The last number in a conversation that is whole."""
    history = history_of(state)
    assert state.context.working_memory["turns"] == len(history)
    numbers = [int(message["content"].split()[0]) for message in history]
    assert numbers == [*range(numbers[0], numbers[0] + len(numbers))]
    return numbers[-1]


@pytest.mark.parametrize("mode", ["shared", "exclusive"])
async def test_an_agent_and_its_log_are_one(tmp_path: Path, mode: str) -> None:
    """A reader beside a writer sees no half of a save, and neither does who comes after a kill."""
    for _ in range(4):
        writer = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _WRITER, str(tmp_path), mode, stdout=asyncio.subprocess.PIPE
        )
        assert writer.stdout is not None
        lines = [await writer.stdout.readline() for _ in range(40)]
        async with StatePersistenceManager(store=ReadOnlyStateStore(tmp_path)) as reader:
            for _ in range(20):
                _last_of(await reader.load_agent_state("alice"))
        writer.kill()
        lines += [line async for line in writer.stdout]
        await writer.wait()
        acknowledged = int([line for line in lines if line.endswith(b"\n")][-1])
        async with StatePersistenceManager(tmp_path, exclusive=mode == "exclusive") as manager:
            found = _last_of(await manager.load_agent_state("alice"))
            assert acknowledged <= found <= acknowledged + 1
            assert not manager.incidents()


async def test_redis_keeps_both(server: RedisServer) -> None:
    async with StatePersistenceManager(store=RedisStateStore(server.url)) as manager:
        await test_a_turn_is_a_line(manager)
        await test_a_number_that_a_record_must_get(manager)
        await manager.erase("agents", "alice")
        await test_many_savers_at_once(manager)


async def test_an_observer_is_given_the_whole_agent() -> None:
    seen: list[Any] = []

    class Watcher:
        def committed(self, changes: Sequence[Change], numbers: Sequence[int]) -> None:
            seen.extend(each.body for each in changes if isinstance(each, Put))

    manager = StatePersistenceManager(store=MemoryStateStore(), observer=Watcher())
    async with manager:
        history = [turn(n) for n in range(20)]
        await manager.save_agent_state("alice", alice(history))
        await manager.save_agent_state("alice", alice([*history, turn(20)]))
    assert seen == [canonical(alice(history)), canonical(alice([*history, turn(20)]))]


def test_a_list_in_many_parts() -> None:
    found = JsonList()
    for number in range(600):
        longer = found.extended([canonical(turn(number, 2))])
        assert longer.begins_with(found)
        assert not found.begins_with(longer)
        found = longer
    expected = canonical([turn(number, 2) for number in range(600)])
    assert (found.size, found.count) == (len(expected), 600)
    assert found.array == expected
    assert found.items() == [canonical(turn(number, 2)) for number in range(600)]
    assert not JsonList(b"[12]", 1).begins_with(JsonList(b"[1]", 1))


_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["append", "append", "cut front", "cut end", "mutate", "insert", "clear"]),
        st.integers(1, 9),
        st.sampled_from(["a part", "a part", "all"]),
    ),
    max_size=20,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=_STEPS, window=st.integers(1, 9))
async def test_a_part_is_loaded_and_saved(
    manager: StatePersistenceManager, steps: list[tuple[str, int, str]], window: int
) -> None:
    await manager.erase("agents", "alice")
    part = StatePersistenceManager(store=manager.store, history_window=window)
    expected = [turn(n) for n in range(30)]
    await manager.save_agent_state("alice", alice(expected))
    for how, size, of in steps:
        by = part if of == "a part" else manager
        agent = await by.load_agent_state("alice")
        assert agent is not None
        memory = agent.context
        start = memory.conversation_history_offset
        assert memory.conversation_history == expected[start:]
        if by is part:
            in_log = (await manager.store.logs("agents", ("alice",))) and len(expected) > window
            assert start == (len(expected) - window if in_log and start else 0)
        _edit(memory.conversation_history, how, size)
        expected = expected[:start] + copy.deepcopy(memory.conversation_history)
        await by.save_agent_state("alice", agent)
        assert history_of(await manager.load_agent_state("alice")) == expected
        assert [each async for each in part.read_history("alice")] == expected
        assert [each async for each in manager.read_history("alice", start=7)] == expected[7:]
        async for stored in part.scan("agents"):
            assert history_of(stored.state) in (expected, expected[-window:])


async def test_a_part_does_not_read_the_rest(manager: StatePersistenceManager) -> None:
    history = [turn(n) for n in range(50)]
    await manager.save_agent_state("alice", alice(history))
    part = StatePersistenceManager(store=manager.store, history_window=10)
    agent = await part.load_agent_state("alice")
    assert agent is not None
    assert agent.context.conversation_history_offset == 40
    assert agent.context.conversation_history == history[40:]
    read: list[int] = []
    read_log = manager.store.read_log

    def counted(kind: str, key: Any, *, after: int = 0, last: int | None = None) -> Any:
        read.append(after)
        return read_log(kind, key, after=after, last=last)

    manager.store.read_log = counted  # type: ignore[method-assign]  # it counts, and reads
    for number in range(50, 60):
        agent.context.conversation_history.append(turn(number))
        await part.save_agent_state("alice", agent)
    assert set(read) == {40}
    del manager.store.read_log
    assert await log_of(manager) == [turn(n) for n in range(60)]
    stored = await manager.store.get("agents", ("alice",))
    assert stored is not None
    assert b"offset" not in stored.body


async def test_a_part_of_what_is_not_stored(manager: StatePersistenceManager) -> None:
    history = [turn(n) for n in range(50)]
    await manager.save_agent_state("alice", alice(history))
    part = StatePersistenceManager(store=manager.store, history_window=10)
    agent = await part.load_agent_state("alice")
    assert agent is not None
    await manager.save_agent_state("alice", alice(history[:30]))
    await part.save_agent_state("alice", agent)
    kept = history_of(await manager.load_agent_state("alice"))
    assert kept == history[:30] + history[40:]
    await manager.delete("agents", "alice")
    await part.save_agent_state("alice", agent)
    assert history_of(await manager.load_agent_state("alice")) == history[40:]


@pytest.mark.parametrize("offset", [-1, True, 1.5, "40"])
async def test_an_offset_that_is_none(manager: StatePersistenceManager, offset: object) -> None:
    state = alice([turn(n) for n in range(20)])
    state["context"]["conversation_history_offset"] = offset
    with pytest.raises(StateValidationError, match="offset"):
        await manager.save_agent_state("alice", state)


@pytest.mark.parametrize("window", [0, -1, True, 2.5, "9"])
def test_a_window_is_a_number_of_messages(window: Any) -> None:
    with pytest.raises(ValueError, match="history_window"):
        StatePersistenceManager(store=MemoryStateStore(), history_window=window)
