"""The journeys of a served state: the application's manager, or one with default settings.

An application that wants its own settings gives its ``ConversationStateManager`` to the backend:
``LiveBackend(manager=manager, services=[journeys])``.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends

from agent_state.web import StateView
from agent_state.web.backend import BackendDep
from agent_state_integrations.journey.manager import ConversationStateManager


def journeys_of(view: StateView) -> ConversationStateManager:
    """The journeys that a request reads or changes."""
    return view.service(ConversationStateManager)


async def _writable(backend: BackendDep) -> ConversationStateManager:
    return journeys_of(backend.writable())


WritableJourneys = Annotated[ConversationStateManager, Depends(_writable)]
