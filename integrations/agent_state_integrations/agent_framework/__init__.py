"""Workflows, histories and sessions of Microsoft Agent Framework, and states of AutoGen.

Needs the extra ``agent-framework``. See ``docs/integrations/agent-framework.md``.
"""

from agent_state.errors import needs_extra

with needs_extra("agent-framework", "agent_framework"):
    from agent_state_integrations.agent_framework.checkpoints import AgentStateCheckpointStorage
    from agent_state_integrations.agent_framework.components import load_state, save_state
    from agent_state_integrations.agent_framework.history import AgentStateHistoryProvider
    from agent_state_integrations.agent_framework.sessions import AgentStateSessionStore

__all__ = [
    "AgentStateCheckpointStorage",
    "AgentStateHistoryProvider",
    "AgentStateSessionStore",
    "load_state",
    "save_state",
]
