"""How bytes get to the disk, by key. Nothing here has heard of an agent."""

from __future__ import annotations

from agent_state.storage.files import FileStateStore
from agent_state.storage.journaled import WALStateStore
from agent_state.storage.memory import MemoryStateStore
from agent_state.storage.readonly import ReadOnlyStateStore

__all__ = ["FileStateStore", "MemoryStateStore", "ReadOnlyStateStore", "WALStateStore"]
