"""The calls of the first design of sessions: they work, or say what to write instead."""

from __future__ import annotations

import re

import pytest

from agent_state import StatePersistenceManager, StateValidationError
from agent_state.sessions import SessionManager
from agent_state_integrations.orchestration import SessionManagerService

CALLS = re.findall(
    r"[a-z_]+",
    "create_session get_session update_session destroy_session validate_session"
    " get_session_history cleanup_expired_sessions add_conversation_message"
    " get_conversation_history update_conversation_orchestrator_context track_workflow_state"
    " persist_session_state restore_session_state track_orchestrator_workflow"
    " get_orchestrator_state update_enabling_service_status",
)


@pytest.fixture
def service(manager: StatePersistenceManager) -> SessionManagerService:
    return SessionManagerService(SessionManager(manager))


async def test_a_conversation_is_a_plain_list_of_dicts(service: SessionManagerService) -> None:
    session = await service.create_session("ann", {"page": 1})
    session_id = session["session_id"]
    context = {"orchestrator": "ContentAnalysisOrchestrator", "workflow_id": "w"}
    for number in range(3):
        added = await service.add_conversation_message(
            session_id, "guide_agent", "user" if number % 2 == 0 else "assistant", f"text {number}",
            context if number else None,
        )  # fmt: skip
        assert (added["success"], added["message_count"]) == (True, number + 1)

    history = await service.get_conversation_history(session_id, "guide_agent")

    assert type(history) is list
    assert [each["content"] for each in history] == ["text 0", "text 1", "text 2"]
    assert [each.get("orchestrator_context") for each in history] == [None, context, context]
    assert session["session_token"]
    assert await service.get_conversation_history(session_id, "content_liaison") == []
    told = await service.update_conversation_orchestrator_context(
        session_id, "guide_agent", {"active_workflows": ["w"]}
    )
    assert told["active_workflows"] == ["w"]


async def test_a_workflow_is_tracked_by_one_mapping(service: SessionManagerService) -> None:
    session_id = (await service.create_session())["session_id"]
    data = {
        "workflow_id": "workflow_123",
        "status": "processing",
        "enabling_services": ["FileParser", "DataAnalyzer"],
        "file": "a.csv",
    }
    entry = await service.track_orchestrator_workflow(session_id, "AnyOrchestrator", data)
    await service.track_orchestrator_workflow(session_id, "AnyOrchestrator", {"workflow_id": "w2"})
    used = await service.update_enabling_service_status(session_id, "FileParser", {"status": "ok"})

    assert entry["orchestrator_name"] == "AnyOrchestrator"
    assert (entry["status"], entry["data"]) == ("processing", {"file": "a.csv"})
    assert entry["enabling_services"] == ["FileParser", "DataAnalyzer"]
    state = await service.get_orchestrator_state(session_id, "AnyOrchestrator")
    assert [each["workflow_id"] for each in state["workflows"]] == ["workflow_123", "w2"]
    assert state["status"] == "active"
    assert used["invocations"] == 1
    with pytest.raises(StateValidationError, match="workflow_id"):
        await service.track_orchestrator_workflow(session_id, "AnyOrchestrator", {"status": "x"})


async def test_a_session_is_changed_and_destroyed(service: SessionManagerService) -> None:
    session_id = (await service.create_session("ann"))["session_id"]
    await service.update_session(session_id, {"a": {"b": 1}})
    changed = await service.update_session(session_id, {"a": {"c": 2}})

    assert changed["state"] == {"a": {"b": 1, "c": 2}}
    assert (await service.get_session(session_id))["user_id"] == "ann"
    assert await service.destroy_session(session_id)
    assert not await service.destroy_session(session_id)


@pytest.mark.parametrize("name", CALLS)
def test_a_session_manager_says_what_to_write_instead(
    service: SessionManagerService, name: str
) -> None:
    with pytest.raises(AttributeError, match=rf"'{name}'; write sessions\.\w+"):
        getattr(service.sessions, name)
    assert not hasattr(service.sessions, "nonsense")
