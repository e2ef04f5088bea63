"""The Model Context Protocol on agent_state: an event store, and a server over a state directory.

Needs the extra ``mcp``. See ``docs/integrations/mcp.md``.
"""

from __future__ import annotations

from agent_state.errors import needs_extra

with needs_extra("mcp", "mcp", "mcp_types"):
    from agent_state_integrations.mcp.directory_server import create_server
    from agent_state_integrations.mcp.event_store import AgentStateEventStore

__all__ = ["AgentStateEventStore", "create_server"]
