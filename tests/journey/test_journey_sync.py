"""Journeys without async: the same methods, on the thread of a manager or on one of their own."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from agent_state import AgentStateError
from agent_state.sync import SyncStatePersistenceManager
from agent_state_integrations.journey import ConversationStateManager
from agent_state_integrations.journey.citations import Citations
from agent_state_integrations.journey.export import Exports
from agent_state_integrations.journey.sync import (
    SyncCitations,
    SyncConversationStateManager,
    SyncExports,
)


@pytest.mark.parametrize(
    ("asynchronous", "blocking", "left_out"),
    [
        (ConversationStateManager, SyncConversationStateManager, set()),
        (Citations, SyncCitations, set()),
        (Exports, SyncExports, {"create"}),  # a stream of pieces; `text` has all of them
    ],
)
def test_every_method_is_here_with_its_parameters(
    asynchronous: type, blocking: type, left_out: set[str]
) -> None:
    public = {
        name for name, _ in inspect.getmembers(asynchronous, callable) if not name.startswith("_")
    }
    assert public - {name for name, _ in inspect.getmembers(blocking, callable)} == left_out
    for name in public - left_out - {"open", "close"}:
        theirs, ours = getattr(asynchronous, name), getattr(blocking, name)
        assert inspect.signature(theirs) == inspect.signature(ours)


def test_it_takes_the_options_of_the_asynchronous_one() -> None:
    theirs = {**inspect.signature(ConversationStateManager).parameters}
    del theirs["former"]  # arguments of the first design, which are refused by name
    ours = inspect.signature(SyncConversationStateManager).parameters
    assert [*theirs] == [*ours]
    assert [each.default for each in theirs.values()] == [each.default for each in ours.values()]


def talk(journeys: SyncConversationStateManager) -> None:
    session = journeys.initialize_session("ann")
    journeys.append_message("ann", session.session_id, {"role": "user", "content": "hello"})
    contents = [each.content for each in journeys.stream_messages("ann", session.session_id)]
    assert contents == ["hello"]
    text, _ = journeys.export_markdown("ann", session.session_id)
    assert "hello" in text
    assert [each.type for each in journeys.citations.all("ann", session.session_id)] == ["export"]


def test_a_journey_on_the_thread_of_a_manager(tmp_path: Path) -> None:
    with SyncStatePersistenceManager(tmp_path) as manager:
        with SyncConversationStateManager(manager) as journeys:
            talk(journeys)
        assert [key[0] for key in manager.keys("journeys")] == ["ann"]


def test_a_journey_with_a_manager_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    journeys = SyncConversationStateManager()
    with journeys:
        talk(journeys)
    with pytest.raises(AgentStateError, match="not open"):
        journeys.statistics()
