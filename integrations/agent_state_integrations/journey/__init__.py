"""Conversations with their emotional journey: milestones, breakthroughs, citations, exports."""

from __future__ import annotations

from agent_state_integrations.journey.export import Export, ExportFormat
from agent_state_integrations.journey.manager import ConversationStateManager
from agent_state_integrations.journey.models import (
    Breakthrough,
    Citation,
    CitationCheck,
    ContextSnapshot,
    EmotionalState,
    EmotionState,
    EmotionTransition,
    EmotionUpdate,
    JourneyMessage,
    JourneySummary,
    Milestone,
    ResumedSession,
    SessionExpiry,
    SessionHandle,
    SessionMetadata,
    SessionStats,
    TherapeuticCategory,
    Vocabulary,
)
from agent_state_integrations.journey.models import JourneyMessage as Message
from agent_state_integrations.journey.repository import ConversationCache

__all__ = [
    "Breakthrough",
    "Citation",
    "CitationCheck",
    "ContextSnapshot",
    "ConversationCache",
    "ConversationStateManager",
    "EmotionState",
    "EmotionTransition",
    "EmotionUpdate",
    "EmotionalState",
    "Export",
    "ExportFormat",
    "JourneyMessage",
    "JourneySummary",
    "Message",
    "Milestone",
    "ResumedSession",
    "SessionExpiry",
    "SessionHandle",
    "SessionMetadata",
    "SessionStats",
    "TherapeuticCategory",
    "Vocabulary",
]
