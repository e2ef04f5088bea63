"""LangGraph on agent_state: a checkpoint saver and a store, kept as readable files.

Needs the extra ``langgraph``. See ``docs/integrations/langgraph.md``.
"""

from __future__ import annotations

from agent_state.errors import needs_extra

with needs_extra("langgraph", "langgraph", "langchain_core"):
    from agent_state_integrations.langgraph.migration import import_checkpoints
    from agent_state_integrations.langgraph.saver import AgentStateSaver
    from agent_state_integrations.langgraph.store import AgentStateStore
    from agent_state_integrations.langgraph.thread import CheckpointConflictError

__all__ = ["AgentStateSaver", "AgentStateStore", "CheckpointConflictError", "import_checkpoints"]
