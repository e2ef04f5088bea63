"""The journeys of a served directory: one manager for each view of the state."""

from __future__ import annotations

from typing import Annotated
from weakref import WeakKeyDictionary

from fastapi import Depends

from agent_state.manager import StatePersistenceManager
from agent_state.web.backend import Serving
from agent_state_integrations.journey.manager import ConversationStateManager

_managers: WeakKeyDictionary[StatePersistenceManager, ConversationStateManager] = (
    WeakKeyDictionary()
)


def journeys_of(manager: StatePersistenceManager) -> ConversationStateManager:
    """The journeys stored by this manager; made when they are first asked for."""
    found = _managers.get(manager)
    if found is None:
        found = _managers[manager] = ConversationStateManager(manager)
    return found


def serve_with(manager: StatePersistenceManager, journeys: ConversationStateManager) -> None:
    """Serve these journeys, with their own settings, wherever ``manager`` is served."""
    _managers[manager] = journeys


async def _writable(backend: Serving) -> ConversationStateManager:
    return journeys_of(backend.changing().manager)


WritableJourneys = Annotated[ConversationStateManager, Depends(_writable)]
