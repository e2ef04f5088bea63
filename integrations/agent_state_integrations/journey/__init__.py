"""Conversations with the way they went: emotions, milestones, breakthroughs, exports."""

from __future__ import annotations

from agent_state_integrations.journey.exporting import Export
from agent_state_integrations.journey.manager import ConversationStateManager
from agent_state_integrations.journey.models import (
    Breakthrough,
    Citation,
    CitationCheck,
    ContextSnapshot,
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
)
from agent_state_integrations.journey.parts import ConversationCache
from agent_state_integrations.journey.vocabulary import (
    EmotionalState,
    TherapeuticCategory,
    Vocabulary,
)

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
    "JourneyMessage",
    "JourneySummary",
    "Milestone",
    "ResumedSession",
    "SessionExpiry",
    "SessionHandle",
    "SessionMetadata",
    "SessionStats",
    "TherapeuticCategory",
    "Vocabulary",
]
