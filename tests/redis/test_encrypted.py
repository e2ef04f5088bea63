"""What is encrypted at rest is encrypted in Redis too, in a store and in a mirror."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from agent_state import StatePersistenceManager
from agent_state.encryption import Keyring, MasterKeys
from agent_state.errors import EncryptionKeyError, ErasedKeyError
from agent_state.protocols import StateStore
from agent_state.redis import RedisStateStore
from agent_state.storage.sealed_store import SealedStateStore
from agent_state.testing import StateStoreContract
from tests.redis.mirrors import caught_up, client, compare, mirror
from tests.redis.servers import RedisServer

SECRET = "Rumpelstilzchen"


def ring(folder: Path) -> Keyring:
    return Keyring(folder / "keys", MasterKeys(lambda: [b"o" * 32]))


async def readable(url: str) -> list[bytes]:
    """The keys in Redis whose value has the secret."""
    async with client(url) as redis:
        return [key async for key in redis.scan_iter(count=1000) if await _has_secret(redis, key)]


async def _has_secret(redis: Any, key: bytes) -> bool:
    kind = await redis.type(key)
    value: object = None
    if kind == b"hash":
        value = await redis.hgetall(key)
    elif kind == b"stream":
        value = await redis.xrange(key)
    return SECRET in repr(value) or SECRET.encode() in (await redis.dump(key) or b"")


async def fill(manager: StatePersistenceManager, name: str) -> None:
    await manager.save_agent_state(name, {"agent_id": name, "context": {"secret": SECRET}})
    await manager.append("notes", name, {"text": SECRET}, dedupe_key="d1")


class TestSealedRedisStore(StateStoreContract):
    @pytest.fixture(autouse=True)
    def _server(self, server: RedisServer) -> None:
        self.url = server.url

    def make_store(self, directory: Path) -> StateStore:
        store = RedisStateStore(
            self.url,
            prefix=f"{directory}:",
            timeout_seconds=10.0,
            lock_timeout_seconds=self.lock_timeout_seconds,
        )
        return SealedStateStore(store, ring(directory.parent))


async def test_a_store_in_redis_has_ciphertext_and_refuses_who_has_no_key(
    server: RedisServer, tmp_path: Path
) -> None:
    def store() -> RedisStateStore:
        return RedisStateStore(server.url, prefix="app:", timeout_seconds=10.0)

    async with StatePersistenceManager(store=store(), encryption=ring(tmp_path)) as manager:
        for name in ("alice", "bob"):
            await fill(manager, name)
            await fill(manager, name)
    assert await readable(server.url) == []
    with pytest.raises(EncryptionKeyError):
        await StatePersistenceManager(store=store()).open()
    with pytest.raises(EncryptionKeyError):
        await StatePersistenceManager(store=store(), encryption=ring(tmp_path / "other")).open()

    ring(tmp_path).erase("alice")
    async with StatePersistenceManager(store=store(), encryption=ring(tmp_path)) as manager:
        with pytest.raises(ErasedKeyError):
            await manager.load_agent_state("alice")
        loaded = await manager.load_with_revision("agents", "bob")
        assert loaded is not None
        assert loaded.revision == 1
        found = [entry.record["text"] async for entry in manager.read_log("notes", "bob")]
        assert found == [SECRET]


@pytest.mark.parametrize("exclusive", [False, True], ids=["shared", "exclusive"])
async def test_a_mirror_has_ciphertext_and_restores_it(
    server: RedisServer, tmp_path: Path, exclusive: bool
) -> None:
    root = tmp_path / "state"

    def mirrored() -> StatePersistenceManager:
        return StatePersistenceManager(
            root,
            exclusive=exclusive,
            mirror=mirror(server.url),
            mirror_restores=True,
            encryption=ring(tmp_path),
        )

    async with mirrored() as manager:
        await fill(manager, "alice")
        await fill(manager, "bob")
        await manager.flush()
        await caught_up(manager)
    assert await readable(server.url) == []
    assert (await compare(server.url, root)).ok

    (root / "agents/alice.json").write_text("{")
    async with mirrored() as manager:
        alice = await manager.load_agent_state("alice")
        assert alice is not None
        assert alice.model_dump()["context"] == {"secret": SECRET}
        await caught_up(manager)

    shutil.rmtree(root)
    ring(tmp_path).erase("bob")
    async with mirrored() as manager:
        assert (await manager.load_agent_state("alice")) is not None
        found = [entry.record["text"] async for entry in manager.read_log("notes", "alice")]
        assert found == [SECRET]
        assert [each.key async for each in manager.scan("agents")] == [("alice",)]
    assert await readable(server.url) == []
