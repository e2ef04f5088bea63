"""The workflows behind a session, the services they use, and the states they leave."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from agent_state import StateNotFoundError, StatePersistenceManager
from agent_state.errors import InvalidKeyError, StateValidationError
from agent_state.sessions import SessionManager
from agent_state.testing import FakeClock
from tests.sessions.managing import session_manager

CONTENT = "ContentAnalysisOrchestrator"


@pytest.fixture
async def sessions(files: StatePersistenceManager) -> SessionManager:
    made = session_manager(files)
    await made.create_session("ann")
    return made


# -- workflows -----------------------------------------------------------------------------------


async def test_a_second_workflow_of_an_orchestrator_stands_beside_the_first(
    sessions: SessionManager, clock: FakeClock
) -> None:
    await sessions.track_orchestrator_workflow("s1", CONTENT, "w1", status="processing")
    await clock.advance(1)
    await sessions.track_orchestrator_workflow("s1", CONTENT, "w2")
    state = await sessions.get_orchestrator_state("s1", CONTENT)
    assert [(each.workflow_id, each.status) for each in state.workflows] == [
        ("w1", "processing"),
        ("w2", "active"),
    ]
    await clock.advance(1)
    await sessions.track_orchestrator_workflow("s1", CONTENT, "w1", status="completed")
    context = (await sessions.get_session("s1")).orchestrator_context
    assert [each.workflow_id for each in context.active_orchestrators] == ["w2"]
    assert [each.workflow_id for each in context.finished_orchestrators] == ["w1"]
    assert (await sessions.get_orchestrator_state("s1", CONTENT)).status == "completed"


async def test_a_workflow_keeps_its_start_and_merges_its_progress(
    sessions: SessionManager, clock: FakeClock
) -> None:
    await sessions.track_orchestrator_workflow(
        "s1", CONTENT, "w1", progress={"of": 3, "files": {"a": "read"}}, data={"kind": "csv"}
    )
    await clock.advance(60)
    workflow = await sessions.track_orchestrator_workflow(
        "s1", CONTENT, "w1", status="processing", progress={"done": 1, "files": {"b": "read"}}
    )
    assert workflow.progress == {"of": 3, "done": 1, "files": {"a": "read", "b": "read"}}
    assert workflow.data == {"kind": "csv"}
    assert workflow.started_at == "2026-01-01T00:00:00.000000Z"
    assert workflow.updated_at == "2026-01-01T00:01:00.000000Z"
    assert workflow.finished_at is None


async def test_workflows_told_of_at_once_are_all_there(sessions: SessionManager) -> None:
    await asyncio.gather(
        *(sessions.track_orchestrator_workflow("s1", CONTENT, f"w{number}") for number in range(20))
    )
    assert len((await sessions.get_orchestrator_state("s1", CONTENT)).workflows) == 20


async def test_each_usual_orchestrator_has_a_state_and_any_other_that_works(
    sessions: SessionManager,
) -> None:
    await sessions.track_orchestrator_workflow("s1", CONTENT, "w1", status="processing")
    await sessions.track_orchestrator_workflow("s1", "Weather", "w2", status="failed")
    assert sessions.orchestrator_states(await sessions.get_session("s1")) == {
        "ContentAnalysisOrchestrator": "processing",
        "InsightsOrchestrator": "not_started",
        "OperationsOrchestrator": "not_started",
        "BusinessOutcomesOrchestrator": "not_started",
        "Weather": "failed",
    }
    unknown = await sessions.get_orchestrator_state("s1", "InsightsOrchestrator")
    assert (unknown.status, unknown.workflows) == ("not_started", [])


async def test_the_document_keeps_the_latest_finished_ones_and_the_history_all(
    sessions: SessionManager,
) -> None:
    for number in range(25):
        await sessions.track_orchestrator_workflow("s1", CONTENT, f"w{number}", status="completed")
    context = (await sessions.get_session("s1")).orchestrator_context
    assert len(context.finished_orchestrators) == 20
    assert context.finished_orchestrators[0].workflow_id == "w5"
    history = await sessions.get_session_history("s1")
    assert sum(event.event == "workflow" for event in history.events) == 25


# -- services ------------------------------------------------------------------------------------


async def test_each_use_of_a_service_is_counted_with_its_time(
    sessions: SessionManager, clock: FakeClock
) -> None:
    await asyncio.gather(
        *(sessions.update_enabling_service_status("s1", "FileParser") for _ in range(10))
    )
    await clock.advance(5)
    await sessions.update_enabling_service_status("s1", "FileParser", "busy", invocations=3)
    await clock.advance(5)
    service = await sessions.update_enabling_service_status(
        "s1", "FileParser", {"status": "idle", "queue": {"length": 0}}, invocations=0
    )
    assert (service.invocations, service.status, service.details) == (
        13,
        "idle",
        {"queue": {"length": 0}},
    )
    assert service.last_used == "2026-01-01T00:00:05.000000Z"
    stored = (await sessions.get_session("s1")).orchestrator_context.enabling_services
    assert stored == {"FileParser": service}


async def test_the_services_of_a_workflow_make_its_delegation_chain(
    sessions: SessionManager,
) -> None:
    await sessions.track_orchestrator_workflow("s1", CONTENT, "w1")
    await sessions.track_orchestrator_workflow("s1", CONTENT, "w2")
    for service in ("FileParser", "DataAnalyzer", "FileParser"):
        await sessions.update_enabling_service_status("s1", service, workflow_id="w1")
    chain = await sessions.record_delegation("s1", "DataAnalyzer", "Charts", workflow_id="w1")
    context = (await sessions.get_session("s1")).orchestrator_context
    first, second = context.active_orchestrators
    assert first.delegation_chain == [CONTENT, "FileParser", "DataAnalyzer", "Charts"]
    assert first.enabling_services == ["FileParser", "DataAnalyzer"]
    assert second.delegation_chain == [CONTENT]
    assert context.enabling_services["FileParser"].invocations == 2
    assert context.workflow_delegation_chain == chain
    assert [(step.source, step.target) for step in chain] == [
        (CONTENT, "FileParser"),
        ("FileParser", "DataAnalyzer"),
        ("DataAnalyzer", "Charts"),
    ]


async def test_a_workflow_can_be_followed_by_its_id_alone(
    sessions: SessionManager, clock: FakeClock
) -> None:
    tracked = await sessions.track_workflow_state("s1", "w1", data={"a": 1})
    assert (tracked.status, tracked.tracked_at) == ("active", "2026-01-01T00:00:00.000000Z")
    await clock.advance(1)
    tracked = await sessions.track_workflow_state("s1", "w1", status="done", data={"b": 2})
    assert tracked.data == {"a": 1, "b": 2}
    assert tracked.tracked_at == "2026-01-01T00:00:00.000000Z"
    assert (await sessions.get_session("s1")).workflow_states == {"w1": tracked}


async def test_what_was_given_back_may_change_and_nothing_stored_does(
    sessions: SessionManager,
) -> None:
    workflow = await sessions.track_orchestrator_workflow("s1", CONTENT, "w1", progress={"a": [1]})
    service = await sessions.update_enabling_service_status("s1", "FileParser", {"a": [1]})
    [step] = await sessions.record_delegation("s1", "a", "b")
    tracked = await sessions.track_workflow_state("s1", "w1", data={"a": [1]})
    conversation = await sessions.update_conversation_orchestrator_context(
        "s1", "guide_agent", {"a": [1]}
    )
    updated = await sessions.update_session("s1", {"a": [1]})
    before = await sessions.touch_session("s1")
    for given in (
        workflow.progress,
        service.details,
        tracked.data,
        conversation.orchestrator_context,
        updated.state,
    ):
        given["a"].append(2)
    step.source = "changed"
    assert await sessions.touch_session("s1") == before


async def test_what_makes_no_sense_is_refused_by_name_and_changes_nothing(
    sessions: SessionManager,
) -> None:
    before = await sessions.get_session("s1")
    nonsense: list[Callable[[], Awaitable[object]]] = [
        lambda: sessions.track_orchestrator_workflow("s1", "", "w1"),
        lambda: sessions.track_orchestrator_workflow("s1", CONTENT, ""),
        lambda: sessions.track_orchestrator_workflow("s1", CONTENT, "w1", status=7),  # type: ignore[arg-type]
        lambda: sessions.update_enabling_service_status("s1", ""),
        lambda: sessions.update_enabling_service_status("s1", "FileParser", invocations=-1),
        lambda: sessions.record_delegation("s1", "", "b"),
        lambda: sessions.track_workflow_state("s1", ""),
        lambda: sessions.persist_session_state("s1", {}, ttl=-1),
        lambda: sessions.create_session(7),  # type: ignore[arg-type]
        lambda: sessions.get_session_history("s1", limit=0),
    ]
    for call in nonsense:
        with pytest.raises(StateValidationError):
            await call()
    with pytest.raises(InvalidKeyError):
        await sessions.persist_session_state("s1", {}, state_id="")
    assert await sessions.get_session("s1") == before


# -- states --------------------------------------------------------------------------------------


async def test_a_state_is_restored_as_it_was_persisted(
    sessions: SessionManager, clock: FakeClock
) -> None:
    stored = await sessions.persist_session_state(
        "s1",
        {"rows": 3},
        state_id="parsed",
        orchestrator=CONTENT,
        workflow_id="w1",
        delegation_chain=[CONTENT, "FileParser"],
        metadata={"backend": "any"},
    )
    assert await sessions.restore_session_state("s1", "parsed") == stored
    await clock.advance(1)
    await sessions.add_state_contribution("s1", "FileParser", "parsed_file_data", state_id="parsed")
    again = await sessions.persist_session_state("s1", {"rows": 4}, state_id="parsed")
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
    await sessions.persist_session_state("s1", {})
    await asyncio.gather(
        *(sessions.add_state_contribution("s1", f"Service{n}", n) for n in range(10))
    )
    state = await sessions.restore_session_state("s1")
    made = state.orchestrator_metadata.enabling_service_contributions
    assert sorted(each.contribution for each in made) == list(range(10))


async def test_a_state_that_is_stored_again_still_ends(
    sessions: SessionManager, files: StatePersistenceManager, clock: FakeClock
) -> None:
    await sessions.persist_session_state("s1", {"a": 1}, state_id="short", ttl=60)
    await clock.advance(50)
    await sessions.persist_session_state("s1", {"a": 2}, state_id="short", ttl=60)
    await sessions.persist_session_state("s1", {}, state_id="long")
    await clock.advance(59)
    assert [each.state_id for each in await sessions.list_session_states("s1")] == ["long", "short"]
    await clock.advance(1)
    with pytest.raises(StateNotFoundError):
        await sessions.restore_session_state("s1", "short")
    with pytest.raises(StateNotFoundError):
        await sessions.add_state_contribution("s1", "x", 1, state_id="short")
    assert [each.state_id for each in await sessions.list_session_states("s1")] == ["long"]
    await sessions.cleanup_expired_sessions()
    assert await files.keys("session_states") == [("s1", "long")]


async def test_a_state_that_is_not_there_is_said_so(sessions: SessionManager) -> None:
    with pytest.raises(StateNotFoundError, match="session_states/s1/nothing"):
        await sessions.restore_session_state("s1", "nothing")
    assert await sessions.delete_session_state("s1", "nothing") is False
    await sessions.persist_session_state("s1", {}, state_id="x")
    assert await sessions.delete_session_state("s1", "x") is True
    assert await sessions.list_session_states("s1") == []


async def test_the_states_of_two_sessions_have_nothing_to_do_with_each_other(
    sessions: SessionManager,
) -> None:
    await sessions.create_session()
    await sessions.persist_session_state("s1", {"of": 1})
    await sessions.persist_session_state("s2", {"of": 2})
    assert (await sessions.restore_session_state("s1")).state_data == {"of": 1}
    assert [each.state_data for each in await sessions.list_session_states("s2")] == [{"of": 2}]
