"""The agent types and orchestrators of a consultancy's assistant, as one application names them."""

from __future__ import annotations

from agent_state.sessions import SessionManager
from agent_state_integrations.orchestration.orchestration import Orchestration

AGENT_TYPES = (
    "guide_agent",
    "content_liaison",
    "insights_liaison",
    "operations_liaison",
    "business_outcomes_liaison",
)
ORCHESTRATORS = (
    "ContentAnalysisOrchestrator",
    "InsightsOrchestrator",
    "OperationsOrchestrator",
    "BusinessOutcomesOrchestrator",
)


def preset(sessions: SessionManager) -> Orchestration:
    """Register ``AGENT_TYPES`` and ``ORCHESTRATORS``; the orchestration of these sessions.

    Names that are registered already stay, and more can be registered afterwards.
    """
    sessions.agent_types.register(*AGENT_TYPES)
    orchestration = Orchestration.of(sessions)
    orchestration.orchestrators.register(*ORCHESTRATORS)
    return orchestration
