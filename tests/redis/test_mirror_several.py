"""The mirror on a Redis Cluster, and behind sentinels that fail over."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from agent_state.codec import Codec
from agent_state.redis.mirror_sync import pull, rebuild
from tests.redis.mirrors import caught_up, compare, mirror_client, mirrored, status, until
from tests.redis.servers import Guarded, ThreeNodes

pytestmark = pytest.mark.long("starts a cluster of three nodes, and sentinels")

KINDS = ("notes", "plans", "events", "others", "letters")


async def test_a_cluster_holds_a_mirror(cluster: ThreeNodes, tmp_path: Path) -> None:
    async with mirrored(tmp_path / "state", cluster.url, timeout_seconds=2.0) as manager:
        for number in range(100):
            kind = KINDS[number % 5]
            await manager.save(kind, f"n{number}", {"n": number})
            await manager.append(kind, "log", {"n": number})
        await caught_up(manager)
        await manager.delete("notes", "n0")
        await caught_up(manager)

    assert len({cluster.owner(f"app:index:{{{kind}}}").port for kind in KINDS}) > 1
    assert (await compare(cluster.url, tmp_path / "state")).ok
    async with mirror_client(cluster.url) as mine:
        pulled = await pull(mine, str(tmp_path / "other"), Codec())
        assert (len(pulled.documents), len(pulled.logs)) == (99, 5)
        await rebuild(mine, str(tmp_path / "state"))
    assert (await compare(cluster.url, tmp_path / "other")).ok


async def test_a_fail_over_loses_nothing_in_the_end(guarded: Guarded, tmp_path: Path) -> None:
    async with mirrored(tmp_path / "state", guarded.url) as manager:
        for number in range(50):
            await manager.save("notes", f"n{number}", {"n": number})
            await manager.append("events", "log", {"n": number})
        await caught_up(manager)
        guarded.master.kill()
        for number in range(50):
            await manager.save("notes", f"n{number}", {"n": -number})
            await manager.append("events", "log", {"n": -number})
        await until(lambda: status(manager).state != "following")
        await asyncio.to_thread(guarded.until_promoted)
        await caught_up(manager)
        assert (await compare(guarded.url, tmp_path / "state")).ok
