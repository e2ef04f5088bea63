"""Every store keeps its contract when what it stores is encrypted."""

from __future__ import annotations

from pathlib import Path

from agent_state import FileStateStore, MemoryStateStore, WALStateStore
from agent_state.encryption import Keyring, MasterKeys
from agent_state.protocols import StateStore
from agent_state.storage.sealed_store import SealedStateStore
from agent_state.testing import StateStoreContract

MASTER = b"m" * 32


def sealed(store: StateStore, directory: Path) -> SealedStateStore:
    folder = directory.parent / f"{directory.name} keys"
    return SealedStateStore(store, Keyring(folder, MasterKeys(lambda: [MASTER])))


class TestSealedMemoryStore(StateStoreContract):
    def make_store(self, directory: Path) -> StateStore:
        store = MemoryStateStore(lock_timeout_seconds=self.lock_timeout_seconds)
        return sealed(store, directory)

    async def reopen(self, store: StateStore, directory: Path) -> StateStore:
        """Only the object remembers."""
        await store.close()
        await store.open()
        return store


class TestSealedFileStore(StateStoreContract):
    durability = "fsync"

    def make_store(self, directory: Path) -> StateStore:
        timeout = self.lock_timeout_seconds
        store = FileStateStore(directory, durability=self.durability, lock_timeout_seconds=timeout)
        return sealed(store, directory)


class TestSealedWALStore(StateStoreContract):
    durability = "fsync"

    def make_store(self, directory: Path) -> StateStore:
        timeout = self.lock_timeout_seconds
        store = WALStateStore(directory, durability=self.durability, lock_timeout_seconds=timeout)
        return sealed(store, directory)
