"""The state documents of a session, and the workflows that it follows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import pytest

from agent_state import MemoryStateStore, StateNotFoundError, StatePersistenceManager
from agent_state.errors import InvalidKeyError, Key, StateValidationError
from agent_state.protocols import Document
from agent_state.sessions import SessionManager
from agent_state.testing import FakeClock
from tests.sessions.managers import session_manager

CONTENT = "ContentAnalysisOrchestrator"


@pytest.fixture
async def sessions(files: StatePersistenceManager) -> SessionManager:
    made = session_manager(files)
    await made.create("ann")
    return made


# -- states --------------------------------------------------------------------------------------


async def test_a_state_is_restored_as_it_was_persisted(
    sessions: SessionManager, clock: FakeClock
) -> None:
    stored = await sessions.states.save(
        "s1",
        {"rows": 3},
        state_id="parsed",
        orchestrator=CONTENT,
        workflow_id="w1",
        delegation_chain=[CONTENT, "FileParser"],
        metadata={"backend": "any"},
    )
    assert await sessions.states.load("s1", "parsed") == stored
    await clock.advance(1)
    await sessions.states.add_contribution(
        "s1", "FileParser", "parsed_file_data", state_id="parsed"
    )
    again = await sessions.states.save("s1", {"rows": 4}, state_id="parsed")
    assert again.state_data == {"rows": 4}
    assert again.created_at == stored.created_at < again.stored_at
    assert again.metadata == {"backend": "any"}
    origin = again.orchestrator_metadata
    assert (origin.created_by_orchestrator, origin.workflow_id) == (CONTENT, "w1")
    assert [
        (each.service, each.contribution) for each in origin.enabling_service_contributions
    ] == [("FileParser", "parsed_file_data")]
    assert origin.delegation_chain == [CONTENT, "FileParser"]


async def test_contributions_made_at_once_are_all_there(sessions: SessionManager) -> None:
    await sessions.states.save("s1", {})
    await asyncio.gather(
        *(sessions.states.add_contribution("s1", f"Service{n}", n) for n in range(10))
    )
    state = await sessions.states.load("s1")
    made = state.orchestrator_metadata.enabling_service_contributions
    assert sorted(each.contribution for each in made) == list(range(10))


async def test_a_state_that_is_stored_again_still_ends(
    sessions: SessionManager, files: StatePersistenceManager, clock: FakeClock
) -> None:
    await sessions.states.save("s1", {"a": 1}, state_id="short", ttl_seconds=60)
    await clock.advance(50)
    await sessions.states.save("s1", {"a": 2}, state_id="short", ttl_seconds=60)
    await sessions.states.save("s1", {}, state_id="long")
    await clock.advance(59)
    assert [each.state_id for each in await sessions.states.load_all("s1")] == ["long", "short"]
    await clock.advance(1)
    with pytest.raises(StateNotFoundError):
        await sessions.states.load("s1", "short")
    with pytest.raises(StateNotFoundError):
        await sessions.states.add_contribution("s1", "x", 1, state_id="short")
    assert [each.state_id for each in await sessions.states.load_all("s1")] == ["long"]
    await sessions.cleanup()
    assert await files.keys("session_states") == [("s1", "long")]


class _Busy(MemoryStateStore):
    """Another writer stores states again while they are scanned."""

    write: Callable[[], Awaitable[object]] | None = None

    async def scan(self, kind: str, prefix: Key = ()) -> AsyncIterator[Document]:
        async for document in super().scan(kind, prefix):
            if kind == "session_states" and self.write is not None:
                await self.write()
            yield document


async def test_a_state_that_is_stored_again_while_cleaning_up_stays(clock: FakeClock) -> None:
    store = _Busy(clock=clock)
    async with StatePersistenceManager(store=store, clock=clock) as files:
        sessions = session_manager(files)
        await sessions.create("ann")
        await sessions.states.save("s1", {"a": 1}, ttl_seconds=60)
        await clock.advance(60)
        store.write = partial(sessions.states.save, "s1", {"a": 2}, ttl_seconds=60)
        await sessions.cleanup()
        store.write = None
        assert (await sessions.states.load("s1")).state_data == {"a": 2}


async def test_a_state_that_is_not_there_is_said_so(sessions: SessionManager) -> None:
    with pytest.raises(StateNotFoundError, match="session_states/s1/nothing"):
        await sessions.states.load("s1", "nothing")
    assert await sessions.states.delete("s1", "nothing") is False
    await sessions.states.save("s1", {}, state_id="x")
    assert await sessions.states.delete("s1", "x") is True
    assert await sessions.states.load_all("s1") == []


async def test_the_states_of_two_sessions_have_nothing_to_do_with_each_other(
    sessions: SessionManager,
) -> None:
    await sessions.create()
    await sessions.states.save("s1", {"of": 1})
    await sessions.states.save("s2", {"of": 2})
    assert (await sessions.states.load("s1")).state_data == {"of": 1}
    assert [each.state_data for each in await sessions.states.load_all("s2")] == [{"of": 2}]


# -- workflows -----------------------------------------------------------------------------------


async def test_a_workflow_can_be_followed_by_its_id_alone(
    sessions: SessionManager, clock: FakeClock
) -> None:
    tracked = await sessions.workflows.track("s1", "w1", data={"a": 1})
    assert (tracked.status, tracked.tracked_at) == ("active", "2026-01-01T00:00:00.000000Z")
    await clock.advance(1)
    tracked = await sessions.workflows.track("s1", "w1", status="done", data={"b": 2})
    assert tracked.data == {"a": 1, "b": 2}
    assert tracked.tracked_at == "2026-01-01T00:00:00.000000Z"
    assert (await sessions.get("s1")).workflow_states == {"w1": tracked}
    assert await sessions.workflows.get("s1", "w1") == tracked
    await sessions.workflows.track("s1", "w2", status="completed")
    assert [each.workflow_id for each in await sessions.workflows.unfinished("s1")] == ["w1"]
    with pytest.raises(StateNotFoundError, match="w3"):
        await sessions.workflows.get("s1", "w3")


async def test_what_was_given_back_may_change_and_nothing_stored_does(
    sessions: SessionManager,
) -> None:
    tracked = await sessions.workflows.track("s1", "w1", data={"a": [1]})
    conversation = await sessions.conversations.update_context("s1", "guide_agent", {"a": [1]})
    updated = await sessions.update("s1", {"a": [1]})
    before = await sessions.renew("s1")
    for given in (tracked.data, conversation.orchestrator_context, updated.state):
        given["a"].append(2)
    assert await sessions.renew("s1") == before


async def test_what_makes_no_sense_is_refused_by_name_and_changes_nothing(
    sessions: SessionManager,
) -> None:
    before = await sessions.get("s1")
    nonsense: list[Callable[[], Awaitable[object]]] = [
        lambda: sessions.workflows.track("s1", ""),
        lambda: sessions.workflows.track("s1", "w1", status=7),  # type: ignore[arg-type]
        lambda: sessions.states.save("s1", {}, ttl_seconds=-1),
        lambda: sessions.create(7),  # type: ignore[arg-type]
        lambda: sessions.history("s1", limit=0),
        lambda: sessions.history("s1", limit=1001),
    ]
    for call in nonsense:
        with pytest.raises(StateValidationError):
            await call()
    with pytest.raises(InvalidKeyError):
        await sessions.states.save("s1", {}, state_id="")
    assert await sessions.get("s1") == before
    assert len((await sessions.history("s1", limit=1000)).events) == 1
