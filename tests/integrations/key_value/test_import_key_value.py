"""``agent-state import key-value``: what a FileTreeStore has, in a state directory."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from agent_state.cli.app import run as main
from agent_state_integrations.key_value import AgentStateKeyValueStore

filetree = pytest.importorskip("key_value.aio.stores.filetree", reason="it needs [filetree]")

KEYS = ["plain", "with-dash", "a:b", "A", "con", "ü", "x" * 300]
COLLECTIONS = ["one", "c:d"]


def store_of(folder: Path, *, safe: bool) -> Any:
    if not safe:
        return filetree.FileTreeStore(data_directory=folder)
    return filetree.FileTreeStore(
        data_directory=folder,
        key_sanitization_strategy=filetree.FileTreeV1KeySanitizationStrategy(folder),
        collection_sanitization_strategy=filetree.FileTreeV1CollectionSanitizationStrategy(folder),
    )


async def fill(folder: Path, *, safe: bool) -> None:
    folder.mkdir()
    store = store_of(folder, safe=safe)
    for collection in COLLECTIONS:
        for n, key in enumerate(KEYS):
            if safe or len(key) < 250:
                value = {"key": key, "in": collection, "b": [1, None], "a": 2.5}
                await store.put(key, value, collection=collection, ttl=9_000 if n % 2 else None)
    await store.put("gone", {"n": 1}, collection="one", ttl=1e-6)


async def compare(folder: Path, state: Path, *, safe: bool) -> None:
    """Both sides are read, each with its own class."""
    old = store_of(folder, safe=safe)
    keys = sorted(key for key in KEYS if safe or len(key) < 250)
    async with AgentStateKeyValueStore(state) as new:
        for collection in COLLECTIONS:
            assert sorted(await new.keys(collection=collection)) == keys
            for key in keys:
                value, left = await old.ttl(key, collection=collection)
                found, ours = await new.ttl(key, collection=collection)
                assert found == value
                assert value["key"] == key
                assert (ours is None) == (left is None)
                assert ours is None or abs(ours - left) < 60


@pytest.mark.parametrize("safe", [True, False])
def test_every_entry_is_brought_over_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], *, safe: bool
) -> None:
    folder, state, keys = tmp_path / "old", tmp_path / "state", tmp_path / "keys.txt"
    asyncio.run(fill(folder, safe=safe))
    keys.write_text("\n".join(["nobody's", *KEYS]))
    before = {path: path.read_bytes() for path in folder.rglob("*.json")}
    command = ["import", "key-value", str(folder), "--state", str(state)]
    if safe:
        command += ["--keys", str(keys)]
    count = len(COLLECTIONS) * (len(KEYS) if safe else len(KEYS) - 1)

    assert main([*command, "--dry-run"]) == 0
    assert f"{count} entries in 2 collections would be" in capsys.readouterr().out
    assert not state.exists()
    for _ in range(2):
        assert main([*command, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report == {"collections": 2, "entries": count, "expired": 1, "refused": {}}
    asyncio.run(compare(folder, state, safe=safe))
    assert {path: path.read_bytes() for path in folder.rglob("*.json")} == before


def test_what_cannot_be_brought_over_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, state = tmp_path / "old", tmp_path / "state"
    asyncio.run(fill(folder, safe=True))
    (folder / "one" / "con.json").write_text('{"value": ')

    async def begin() -> None:
        async with AgentStateKeyValueStore(state) as new:
            await new.put("plain", {"of": "this side"}, collection="one")

    asyncio.run(begin())
    keys = tmp_path / "keys.txt"
    keys.write_text("\n".join(["a:b", "x" * 300, "x" * 301]))  # the last two have one file
    command = ["import", "key-value", str(folder), "--state", str(state), "--keys", str(keys)]
    assert main([*command, "--json"]) == 1
    refused = json.loads(capsys.readouterr().out)["refused"]
    assert "another content" in refused.pop("one/plain.json")
    assert "one/con.json" in refused
    del refused["one/con.json"]
    reasons = sorted(refused.values())
    assert reasons == sorted(
        f"the file does not have its key, and {count} of the named could be it"
        for count in (0, 0, 2) * len(COLLECTIONS)  # with-dash, ü, the long ones
    )


def test_a_directory_of_no_store_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        command = ["import", "key-value", str(folder), "--state", str(tmp_path / "state")]
        assert main(command) == 2
        assert "no FileTreeStore has written here" in capsys.readouterr().err
