"""The workflows behind a session, the services they use, and who handed work to whom."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from agent_state import StatePersistenceManager
from agent_state.errors import StateValidationError
from agent_state.sessions import SessionManager
from agent_state.testing import FakeClock
from agent_state_integrations.orchestration import (
    AGENT_TYPES,
    ORCHESTRATORS,
    Orchestration,
    UnknownOrchestratorError,
    preset,
)
from tests.sessions.managers import opened, session_manager

CONTENT = "ContentAnalysisOrchestrator"


@pytest.fixture
async def sessions(files: StatePersistenceManager) -> SessionManager:
    made = session_manager(files)
    await made.create("ann")
    return made


@pytest.fixture
def orchestration(sessions: SessionManager) -> Orchestration:
    return Orchestration(sessions)


# -- workflows -----------------------------------------------------------------------------------


async def test_a_second_workflow_of_an_orchestrator_stands_beside_the_first(
    orchestration: Orchestration, clock: FakeClock
) -> None:
    await orchestration.track("s1", CONTENT, "w1", status="processing")
    await clock.advance(1)
    await orchestration.track("s1", CONTENT, "w2")
    state = await orchestration.state("s1", CONTENT)
    assert [(each.workflow_id, each.status) for each in state.workflows] == [
        ("w1", "processing"),
        ("w2", "active"),
    ]
    await clock.advance(1)
    await orchestration.track("s1", CONTENT, "w1", status="completed")
    context = await orchestration.context("s1")
    assert [each.workflow_id for each in context.active_orchestrators] == ["w2"]
    assert [each.workflow_id for each in context.finished_orchestrators] == ["w1"]
    assert (await orchestration.state("s1", CONTENT)).status == "completed"


async def test_a_workflow_keeps_its_start_and_merges_its_progress(
    orchestration: Orchestration, clock: FakeClock
) -> None:
    await orchestration.track(
        "s1", CONTENT, "w1", progress={"of": 3, "files": {"a": "read"}}, data={"kind": "csv"}
    )
    await clock.advance(60)
    workflow = await orchestration.track(
        "s1", CONTENT, "w1", status="processing", progress={"done": 1, "files": {"b": "read"}}
    )
    assert workflow.progress == {"of": 3, "done": 1, "files": {"a": "read", "b": "read"}}
    assert workflow.data == {"kind": "csv"}
    assert workflow.started_at == "2026-01-01T00:00:00.000000Z"
    assert workflow.updated_at == "2026-01-01T00:01:00.000000Z"
    assert workflow.finished_at is None


async def test_workflows_reported_at_once_are_all_there(
    orchestration: Orchestration,
) -> None:
    await asyncio.gather(
        *(orchestration.track("s1", CONTENT, f"w{number}") for number in range(20))
    )
    assert len((await orchestration.state("s1", CONTENT)).workflows) == 20


async def test_each_registered_orchestrator_has_a_state_and_any_other_that_works(
    sessions: SessionManager, orchestration: Orchestration
) -> None:
    await orchestration.track("s1", CONTENT, "w1", status="processing")
    await orchestration.track("s1", "Weather", "w2", status="failed")
    session = await sessions.get("s1")
    assert orchestration.states(session) == {CONTENT: "processing", "Weather": "failed"}
    preset(sessions)
    session = await sessions.get("s1")
    assert orchestration.states(session) == {
        "ContentAnalysisOrchestrator": "processing",
        "InsightsOrchestrator": "not_started",
        "OperationsOrchestrator": "not_started",
        "BusinessOutcomesOrchestrator": "not_started",
        "Weather": "failed",
    }
    assert (session.model_extra or {})["orchestrator_states"] == orchestration.states(session)
    unknown = await orchestration.state("s1", "InsightsOrchestrator")
    assert (unknown.status, unknown.workflows) == ("not_started", [])


async def test_any_orchestrator_is_accepted_until_the_application_registers_its_own(
    sessions: SessionManager, orchestration: Orchestration
) -> None:
    await orchestration.track("s1", "Weather", "w1")
    orchestration.orchestrators.register("Tides")
    await orchestration.track("s1", "Tides", "w2")
    with pytest.raises(UnknownOrchestratorError, match="Weather"):
        await orchestration.track("s1", "Weather", "w1", status="completed")
    assert (await orchestration.state("s1", "Weather")).status == "active"
    with pytest.raises(UnknownOrchestratorError):
        orchestration.orchestrators.register("")


async def test_the_preset_has_the_agents_and_orchestrators_of_a_consultancy(
    sessions: SessionManager,
) -> None:
    first = preset(sessions)
    assert preset(sessions) is first
    assert Orchestration.of(sessions) is first
    assert tuple(first.orchestrators) == ORCHESTRATORS
    session = (await sessions.create()).session
    assert set(AGENT_TYPES) <= session.conversations.keys()


async def test_the_document_keeps_the_latest_finished_ones_and_the_history_all(
    sessions: SessionManager, orchestration: Orchestration
) -> None:
    for number in range(25):
        await orchestration.track("s1", CONTENT, f"w{number}", status="completed")
    context = await orchestration.context("s1")
    assert len(context.finished_orchestrators) == 20
    assert context.finished_orchestrators[0].workflow_id == "w5"
    history = await sessions.history("s1")
    assert sum(event.event == "workflow" for event in history.events) == 25


# -- services ------------------------------------------------------------------------------------


async def test_each_use_of_a_service_is_counted_with_its_time(
    orchestration: Orchestration, clock: FakeClock
) -> None:
    await asyncio.gather(*(orchestration.report_service("s1", "FileParser") for _ in range(10)))
    await clock.advance(5)
    await orchestration.report_service("s1", "FileParser", "busy", invocations=3)
    await clock.advance(5)
    service = await orchestration.report_service(
        "s1", "FileParser", {"status": "idle", "queue": {"length": 0}}, invocations=0
    )
    assert (service.invocations, service.status, service.details) == (
        13,
        "idle",
        {"queue": {"length": 0}},
    )
    assert service.last_used == "2026-01-01T00:00:05.000000Z"
    stored = (await orchestration.context("s1")).enabling_services
    assert stored == {"FileParser": service}


async def test_the_services_of_a_workflow_make_its_delegation_chain(
    orchestration: Orchestration,
) -> None:
    await orchestration.track("s1", CONTENT, "w1")
    await orchestration.track("s1", CONTENT, "w2")
    for service in ("FileParser", "DataAnalyzer", "FileParser"):
        await orchestration.report_service("s1", service, workflow_id="w1")
    chain = await orchestration.delegate("s1", "DataAnalyzer", "Charts", workflow_id="w1")
    context = await orchestration.context("s1")
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


async def test_what_was_given_back_may_change_and_nothing_stored_does(
    sessions: SessionManager, orchestration: Orchestration
) -> None:
    workflow = await orchestration.track("s1", CONTENT, "w1", progress={"a": [1]})
    service = await orchestration.report_service("s1", "FileParser", {"a": [1]})
    [step] = await orchestration.delegate("s1", "a", "b")
    before = await sessions.renew("s1")
    for given in (workflow.progress, service.details):
        given["a"].append(2)
    step.source = "changed"
    assert await sessions.renew("s1") == before


async def test_what_makes_no_sense_is_refused_by_name_and_changes_nothing(
    sessions: SessionManager, orchestration: Orchestration
) -> None:
    before = await sessions.get("s1")
    nonsense: list[Callable[[], Awaitable[object]]] = [
        lambda: orchestration.track("s1", "", "w1"),
        lambda: orchestration.track("s1", CONTENT, ""),
        lambda: orchestration.track("s1", CONTENT, "w1", status=7),  # type: ignore[arg-type]
        lambda: orchestration.report_service("s1", ""),
        lambda: orchestration.report_service("s1", "FileParser", invocations=-1),
        lambda: orchestration.delegate("s1", "", "b"),
    ]
    for call in nonsense:
        with pytest.raises(StateValidationError):
            await call()
    assert await sessions.get("s1") == before


# -- what is bounded -----------------------------------------------------------------------------


async def test_the_delegation_chain_in_the_document_is_bounded_and_the_history_has_all(
    sessions: SessionManager, orchestration: Orchestration
) -> None:
    chain = []
    for number in range(105):
        chain = await orchestration.delegate("s1", f"a{number}", f"a{number + 1}")
    stored = (await orchestration.context("s1")).workflow_delegation_chain
    assert stored == chain
    assert [step.source for step in stored] == [f"a{number}" for number in range(5, 105)]
    history = await sessions.history("s1", limit=1000)
    assert sum(event.event == "delegation" for event in history.events) == 105


async def test_services_that_join_a_workflow_do_not_grow_the_chain_without_bound(
    orchestration: Orchestration,
) -> None:
    await orchestration.track("s1", CONTENT, "w1")
    for number in range(102):
        await orchestration.report_service("s1", f"service{number}", workflow_id="w1")
    steps = (await orchestration.context("s1")).workflow_delegation_chain
    assert [step.target for step in steps] == [f"service{number}" for number in range(2, 102)]


# -- on disk -------------------------------------------------------------------------------------


async def test_the_context_is_in_the_session_document_and_survives_without_the_orchestration(
    tmp_path: Path, clock: FakeClock
) -> None:
    async with opened("shared", tmp_path, clock) as files:
        sessions = session_manager(files)
        await sessions.create("ann")
        await Orchestration(sessions).track("s1", CONTENT, "w1", status="processing")
    path = tmp_path / "sessions/s1.json"
    before = json.loads(path.read_text())["orchestrator_context"]
    async with opened("shared", tmp_path, clock) as files:
        sessions = session_manager(files)  # this application has no orchestration
        await sessions.update("s1", {"a": 1})
        assert json.loads(path.read_text())["orchestrator_context"] == before
        assert (await Orchestration(sessions).state("s1", CONTENT)).status == "processing"


async def test_a_hand_edit_that_makes_the_context_invalid_is_quarantined(
    tmp_path: Path, clock: FakeClock
) -> None:
    async with opened("shared", tmp_path, clock) as files:
        sessions = session_manager(files)
        orchestration = Orchestration(sessions)
        await sessions.create("ann")
        await orchestration.track("s1", CONTENT, "w1")
        path = tmp_path / "sessions/s1.json"
        document = json.loads(path.read_text())
        document["orchestrator_context"]["active_orchestrators"] = "none of them"
        path.write_text(json.dumps(document))
        session = await sessions.get("s1")  # the document as it was before the edit
        assert orchestration.states(session) == {CONTENT: "active"}
        [incident] = files.incidents()
        assert "orchestrator_context.active_orchestrators" in incident.what
        assert "none of them" not in incident.what
        assert incident.restored
    assert list((tmp_path / ".quarantine").iterdir())
