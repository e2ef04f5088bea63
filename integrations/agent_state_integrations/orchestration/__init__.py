"""Orchestrators behind sessions: workflows, enabling services, delegation chains, a preset."""

from agent_state_integrations.orchestration.models import (
    Delegation,
    EnablingService,
    OrchestratorContext,
    OrchestratorState,
    OrchestratorWorkflow,
    UnknownOrchestratorError,
)
from agent_state_integrations.orchestration.orchestration import Orchestration, context_of
from agent_state_integrations.orchestration.presets import AGENT_TYPES, ORCHESTRATORS, preset
from agent_state_integrations.orchestration.service import SessionManagerService

__all__ = [
    "AGENT_TYPES",
    "ORCHESTRATORS",
    "Delegation",
    "EnablingService",
    "Orchestration",
    "OrchestratorContext",
    "OrchestratorState",
    "OrchestratorWorkflow",
    "SessionManagerService",
    "UnknownOrchestratorError",
    "context_of",
    "preset",
]
