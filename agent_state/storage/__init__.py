"""How bytes get to the disk, by key. Nothing here has heard of an agent."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agent_state.storage.file_store import FileStateStore
    from agent_state.storage.memory_store import MemoryStateStore
    from agent_state.storage.readonly_store import JournalFollower, ReadOnlyStateStore
    from agent_state.storage.wal_store import WALStateStore

__all__ = [
    "FileStateStore",
    "JournalFollower",
    "MemoryStateStore",
    "ReadOnlyStateStore",
    "WALStateStore",
]

_HOMES = {
    "FileStateStore": "file_store",
    "JournalFollower": "readonly_store",
    "MemoryStateStore": "memory_store",
    "ReadOnlyStateStore": "readonly_store",
    "WALStateStore": "wal_store",
}


def __getattr__(name: str) -> Any:
    """Import a store when it is used first: a reader of one file needs none of them."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
