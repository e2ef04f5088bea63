"""``agent-state new-adapter``: the beginning of an adapter, with the tests that each one needs.

See ``docs/integrations/write-your-own.md``.
"""

from __future__ import annotations

from agent_state_integrations.new_adapter.command import new_adapter
from agent_state_integrations.new_adapter.contract import AdapterContract

__all__ = ["AdapterContract", "new_adapter"]
