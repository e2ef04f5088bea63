"""The Model Context Protocol on agent_state: an event store for resumable servers.

Needs the extra ``mcp``. See ``docs/integrations/mcp.md``.
"""

from __future__ import annotations

from agent_state_integrations.mcp.event_store import AgentStateEventStore

__all__ = ["AgentStateEventStore"]
