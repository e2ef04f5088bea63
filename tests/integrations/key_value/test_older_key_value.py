"""Entries that older versions have put."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agent_state_integrations.key_value import AgentStateKeyValueStore
from tests.integrations.older import OlderState, check, name_of, older_states

VERSIONS = ("py-key-value-aio",)


async def write(directory: Path, turn: int) -> None:
    async with AgentStateKeyValueStore(directory) as store:
        await store.put("both", {"turn": turn, "ü": [1.5, None, {"b": 1, "a": True}]})
        await store.put(f"a/{turn}", {"n": turn}, collection="of users", ttl=10**9)
        await store.put_many(["", "x" * 300], [{"n": 1}, {"n": 2}], collection=f"many {turn}")
        await store.put("gone", {"n": turn}, ttl=0.001)


async def read(directory: Path) -> Any:
    async with AgentStateKeyValueStore(directory) as store:
        found: dict[str, Any] = {}
        for collection in sorted(await store.collections()):
            keys = [key for key in sorted(await store.keys(collection)) if key != "gone"]
            found[collection] = {}
            for key in keys:
                value, left = await store.ttl(key, collection=collection)
                found[collection][key] = [value, left is not None]
        return found


@pytest.mark.parametrize("older", older_states("key_value"), ids=name_of)
async def test_entries_of_an_older_version_are_read_and_replaced(
    older: OlderState, tmp_path: Path
) -> None:
    await check(older, tmp_path, write, read)
    async with AgentStateKeyValueStore(tmp_path / "older") as store:
        assert await store.get("both") == {"turn": 2, "ü": [1.5, None, {"b": 1, "a": True}]}
        assert await store.get("gone") is None
