"""The store on a Redis Cluster of three nodes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_state.errors import StorageError
from agent_state.protocols import StateStore
from agent_state.redis import RedisStateStore
from agent_state.redis.keys import StoreKeys
from agent_state.testing import StateStoreContract
from agent_state.testing.contract_base import append, content_of, put, records_of
from tests.redis.servers import RedisServer, ThreeNodes
from tests.redis.stores import until_told

pytestmark = pytest.mark.long("starts a cluster of three nodes")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreeNodes]:
    cluster = ThreeNodes(tmp_path_factory.mktemp("cluster"))
    cluster.start()
    yield cluster
    cluster.kill()


class TestRedisStoreOnACluster(StateStoreContract):
    @pytest.fixture(autouse=True)
    def _cluster(self, running: ThreeNodes) -> None:
        self.url = running.url

    def make_store(self, directory: Path) -> StateStore:
        """Each test has a directory, and so a prefix, of its own."""
        return RedisStateStore(
            self.url,
            prefix=f"{directory}:",
            timeout_seconds=10.0,
            lock_timeout_seconds=self.lock_timeout_seconds,
        )


async def test_stores_with_different_prefixes_spread_over_the_nodes(running: ThreeNodes) -> None:
    owners = set()
    for n in range(12):
        store = RedisStateStore(running.url, prefix=f"spread-{n}:")
        await store.open()
        await store.commit([put("a", {"n": n}), put("b", {"n": n}), append("log", {"n": n})])
        assert await content_of(store, "a") == {"n": n}
        owners.add(running.owner(StoreKeys(f"spread-{n}:").notices).port)
        await store.close()
    assert owners == {node.port for node in running.nodes}


async def test_a_store_follows_its_slot_to_another_node(running: ThreeNodes) -> None:
    store = RedisStateStore(running.url, prefix="moving:")
    await store.open()
    await store.commit([put("a", {"n": 1}), append("log", {"n": 1})])
    notices = await store.watch()
    old = running.owner(StoreKeys("moving:").notices)
    new = next(node for node in running.nodes if node is not old)

    move_slot(running, StoreKeys("moving:").notices, old, new)

    await store.commit([put("a", {"n": 2}, expected=1), append("log", {"n": 2})])
    assert await content_of(store, "a") == {"n": 2}
    assert [record.seq for record in await records_of(store, "log")] == [1, 2]
    other = RedisStateStore(running.url, prefix="moving:")
    await other.open()
    await other.commit([put("theirs", {})])
    assert [notice.outside for notice in await until_told(notices, ("theirs",))][-1]
    await other.close()
    await store.close()
    move_slot(running, StoreKeys("moving:").notices, new, old)


def move_slot(cluster: ThreeNodes, key: str, old: RedisServer, new: RedisServer) -> None:
    """As ``redis-cli --cluster reshard`` does it."""
    slot = old.ask("cluster", "keyslot", key)
    ids = {node.port: node.ask("cluster", "myid") for node in (old, new)}
    new.ask("cluster", "setslot", slot, "importing", ids[old.port])
    old.ask("cluster", "setslot", slot, "migrating", ids[new.port])
    while keys := old.ask("cluster", "getkeysinslot", slot, "100").splitlines():
        old.ask("migrate", "127.0.0.1", str(new.port), "", "0", "5000", "keys", *keys)
    for node in (new, old, *cluster.nodes):
        node.ask("cluster", "setslot", slot, "node", ids[new.port])


async def test_the_loss_of_the_stores_node_is_a_typed_error(tmp_path: Path) -> None:
    cluster = ThreeNodes(tmp_path / "own")
    cluster.start()
    try:
        store = RedisStateStore(cluster.url, prefix="lost:")
        await store.open()
        await store.commit([put("a", {"n": 1})])
        owner = cluster.owner(StoreKeys("lost:").notices)
        owner.kill()
        with pytest.raises(StorageError):
            await store.commit([put("a", {"n": 2})])
        with pytest.raises(StorageError):
            await store.get("notes", ("a",))
        await store.close()
    finally:
        cluster.kill()
