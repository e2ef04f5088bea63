"""Every store of ours keeps the one contract."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent_state import FileStateStore, MemoryStateStore, WALStateStore
from agent_state.protocols import StateStore
from agent_state.testing import StateStoreContract


class TestMemoryStore(StateStoreContract):
    def make_store(self, directory: Path) -> StateStore:  # it has none
        return MemoryStateStore(lock_timeout_seconds=self.lock_timeout_seconds)

    async def reopen(self, store: StateStore, directory: Path) -> StateStore:
        """Only the object remembers."""
        await store.close()
        await store.open()
        return store


class TestFileStoreFsync(StateStoreContract):
    durability = "fsync"

    def make_store(self, directory: Path) -> StateStore:
        return FileStateStore(
            directory, durability=self.durability, lock_timeout_seconds=self.lock_timeout_seconds
        )


class TestFileStoreOs(TestFileStoreFsync):
    durability = "os"


class TestJournaledStoreFsync(StateStoreContract):
    durability = "fsync"

    def make_store(self, directory: Path) -> StateStore:
        return WALStateStore(
            directory, durability=self.durability, lock_timeout_seconds=self.lock_timeout_seconds
        )


class TestJournaledStoreOs(TestJournaledStoreFsync):
    durability = "os"


def test_our_stores_are_stores(tmp_path: Path) -> None:
    for store in (MemoryStateStore(), FileStateStore(tmp_path), WALStateStore(tmp_path)):
        assert isinstance(store, StateStore)


def test_a_durability_that_is_no_word_of_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="durability"):
        FileStateStore(tmp_path, durability="fast")
