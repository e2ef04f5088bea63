"""How bytes get to the disk, by key. Nothing here has heard of an agent."""

from __future__ import annotations

from agent_state.storage.file_store import FileStateStore
from agent_state.storage.memory_store import MemoryStateStore
from agent_state.storage.readonly_store import ReadOnlyStateStore
from agent_state.storage.wal_store import WALStateStore

__all__ = ["FileStateStore", "MemoryStateStore", "ReadOnlyStateStore", "WALStateStore"]
