"""Transcripts of the Claude Agent SDK in a state directory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from claude_agent_sdk import fork_session_via_store, list_sessions_from_store
from claude_agent_sdk.testing import run_session_store_conformance

from agent_state import SerializationError
from agent_state_integrations.claude_agent_sdk import AgentStateSessionStore
from tests.integrations.states import (
    HOSTILE,
    STATES,
    cancel_soon,
    kill_after_lines,
    run_at_once,
    state_of,
    writer,
)

KEY: Any = {"project_key": "p", "session_id": "s"}


def entry(uuid: str | None, **fields: Any) -> Any:
    return {"type": "user", **({} if uuid is None else {"uuid": uuid}), **fields}


@pytest.fixture(params=STATES)
async def store(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[AgentStateSessionStore]:
    async with state_of(request.param, tmp_path) as state, AgentStateSessionStore(state) as made:
        yield made


@pytest.mark.parametrize("kind", STATES)
async def test_it_conforms(kind: str, tmp_path: Path) -> None:
    numbers = iter(range(100))
    made: list[AgentStateSessionStore] = []
    if kind in ("directory", "memory"):

        async def fresh() -> AgentStateSessionStore:
            async with state_of(kind, tmp_path / str(next(numbers))) as state:
                made.append(AgentStateSessionStore(state))
            return made[-1]

        await run_session_store_conformance(fresh)
    else:
        async with state_of(kind, tmp_path) as manager:

            async def cleared() -> AgentStateSessionStore:
                for key in await manager.keys("claude_sessions"):
                    await manager.erase("claude_sessions", key[:1])
                for key in await manager.store.logs("claude_sessions"):
                    await manager.erase("claude_sessions", key[:1])
                return AgentStateSessionStore(manager)

            await run_session_store_conformance(cleared)
    for each in made:
        await each.aclose()


async def test_a_retried_batch_doubles_nothing(store: AgentStateSessionStore) -> None:
    await store.append(KEY, [entry("1"), entry("2")])
    await store.append(KEY, [entry("1"), entry("2"), entry("3"), entry("3"), entry(None)])
    await store.append(KEY, [entry(None)])
    await store.append({**KEY, "subpath": "subagents/agent-1"}, [entry("1")])

    loaded = await store.load(KEY)

    assert [each.get("uuid") for each in loaded or ()] == ["1", "2", "3", None, None]
    assert await store.load({**KEY, "subpath": "subagents/agent-1"}) == [entry("1")]
    assert await store.load({**KEY, "subpath": ""}) == loaded
    assert await store.list_subkeys(KEY) == ["subagents/agent-1"]


async def test_a_retried_older_title_does_not_come_back(store: AgentStateSessionStore) -> None:
    older = entry("1", type="custom-title", customTitle="older", sessionId="s")
    newer = entry("2", type="custom-title", customTitle="newer", sessionId="s")
    await store.append(KEY, [older])
    await store.append(KEY, [newer])
    before = await store.list_session_summaries("p")
    await store.append(KEY, [older])

    assert await store.list_session_summaries("p") == before


async def test_an_empty_batch_and_subpaths_make_no_session(store: AgentStateSessionStore) -> None:
    await store.append(KEY, [])
    await store.append({**KEY, "session_id": "t", "subpath": "x"}, [entry("1")])

    assert await store.load(KEY) is None
    assert await store.list_sessions("p") == []


async def test_times_are_those_of_the_summaries_and_grow(store: AgentStateSessionStore) -> None:
    seen = []
    for n in range(5):
        await store.append(KEY, [entry(str(n))])
        [listed] = await store.list_sessions("p")
        [summary] = await store.list_session_summaries("p")
        assert listed["mtime"] == summary["mtime"]
        seen.append(listed["mtime"])

    assert all(type(each) is int for each in seen)
    assert seen == sorted({*seen})


async def test_a_deleted_session_begins_anew(tmp_path: Path) -> None:
    async with AgentStateSessionStore(tmp_path) as one, AgentStateSessionStore(tmp_path) as other:
        await one.append(KEY, [entry("1", text="swordfish")])
        await one.append({**KEY, "subpath": "sub/a"}, [entry("1")])
        await other.append(KEY, [entry("1"), entry("2")])
        await other.delete(KEY)
        assert await one.load(KEY) is None
        assert await one.list_subkeys(KEY) == []
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert not [path for path in files if b"swordfish" in path.read_bytes()]

        await one.append(KEY, [entry("1")])
        assert await other.load(KEY) == [entry("1")]


async def test_every_id_is_a_session_of_its_own(store: AgentStateSessionStore) -> None:
    for name in HOSTILE:
        for key in (
            {"project_key": name, "session_id": "s"},
            {"project_key": "q", "session_id": name},
        ):
            await store.append(key, [entry("1", name=name)])

    for name in HOSTILE:
        assert await store.load({"project_key": name, "session_id": "s"}) == [entry("1", name=name)]
    assert sorted(each["session_id"] for each in await store.list_sessions("q")) == sorted(HOSTILE)


async def test_the_sdk_lists_and_forks_sessions(tmp_path: Path) -> None:
    session_id = "00000000-0000-4000-8000-000000000001"
    async with AgentStateSessionStore(tmp_path) as store:
        from claude_agent_sdk import project_key_for_directory

        project = project_key_for_directory(str(tmp_path))
        key: Any = {"project_key": project, "session_id": session_id}
        message = {"role": "user", "content": "hello there"}
        first = entry(
            "00000000-0000-4000-8000-00000000000a",
            message=message,
            sessionId=session_id,
            timestamp="2026-01-01T00:00:00Z",
            parentUuid=None,
        )
        await store.append(key, [first])

        [listed] = await list_sessions_from_store(store, directory=str(tmp_path))
        forked = await fork_session_via_store(store, session_id, directory=str(tmp_path))

        assert listed.summary == "hello there"
        assert len(await store.load({**key, "session_id": forked.session_id}) or ()) >= 1


async def test_what_is_not_json_is_refused_whole(store: AgentStateSessionStore) -> None:
    with pytest.raises(SerializationError):
        await store.append(KEY, [entry("1"), entry("2", value=float("nan"))])

    assert await store.load(KEY) is None


def test_eight_processes_append_at_once(tmp_path: Path) -> None:
    run_at_once(
        writer(
            AgentStateSessionStore,
            tmp_path,
            times=10,
            body=f"""
uuids = [f"{{sys.argv[1]}}-{{n}}", f"all-{{n}}"]
await it.append({KEY!r}, [{{"type": "user", "uuid": uuid}} for uuid in uuids])
""",
        ),
        8,
    )

    async def read() -> Any:
        async with AgentStateSessionStore(tmp_path) as store:
            return await store.load(KEY)

    uuids = [each["uuid"] for each in asyncio.run(read())]
    assert len(uuids) == len({*uuids}) == 90


def test_a_batch_survives_kill_9_whole(tmp_path: Path) -> None:
    lines = kill_after_lines(
        writer(
            AgentStateSessionStore,
            tmp_path,
            body=f"""
uuids = [f"{{n}}{{half}}" for half in "ab"]
await it.append({KEY!r}, [{{"type": "user", "uuid": uuid}} for uuid in uuids])
""",
        ),
        15,
    )

    async def read() -> Any:
        async with AgentStateSessionStore(tmp_path) as store:
            return await store.load(KEY), await store.list_sessions("p")

    loaded, listed = asyncio.run(read())
    uuids = [each["uuid"] for each in loaded]
    assert uuids == [f"{n}{half}" for n in range(len(uuids) // 2) for half in "ab"]
    assert len(uuids) // 2 in (len(lines), len(lines) + 1)
    assert len(listed) == 1


async def test_an_append_that_the_sdk_gave_up_is_made(tmp_path: Path) -> None:
    async with AgentStateSessionStore(tmp_path) as store:
        await cancel_soon(store.append(KEY, [entry("1"), entry("2")]))

        assert await store.load(KEY) == [entry("1"), entry("2")]


async def test_ten_thousand_entries(tmp_path: Path) -> None:
    async with state_of("exclusive", tmp_path) as manager:
        store = AgentStateSessionStore(manager)
        for start in range(0, 10_000, 500):
            await store.append(KEY, [entry(str(n)) for n in range(start, start + 500)])
        await store.append(KEY, [entry("7"), entry("10000")])

        assert len(await store.load(KEY) or ()) == 10_001
