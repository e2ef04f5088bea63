"""Comparing, writing again, and bringing back: what the command line does with a mirror."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from agent_state import (
    MirrorError,
    StateCorruptedError,
    StateDirectoryInUseError,
    StateNotFoundError,
    StatePersistenceManager,
    StateValidationError,
)
from agent_state.codec import Codec, ModelStateValidator
from agent_state.redis.mirror_sync import pull, rebuild
from agent_state.storage.directory import read_instance
from tests.redis.mirrors import (
    caught_up,
    client,
    compare,
    mirror,
    mirror_client,
    mirrored,
    status,
    until,
)
from tests.redis.servers import RedisServer

NASTY = ("a/b", "%41", "/mark", "*", "{x}", "é", "Alice", "alice", "line\nbreak", "x" * 300)


async def _filled(server: RedisServer, folder: Path) -> None:
    async with mirrored(folder, server.url) as manager:
        for name in NASTY:
            await manager.save("notes", (name, "below"), {"n": name})
            await manager.save("notes", (name, "below"), {"n": name, "again": True})
        await manager.save("agents", "alice", {"agent_id": "alice", "mood": "good"})
        for number in range(300):
            await manager.append("events", ("a/b", "log"), {"n": number}, dedupe_key=f"d{number}")


def _files(folder: Path) -> dict[str, bytes]:
    """Every readable file, but for what the mirror says of itself."""
    found: Iterable[Path] = folder.rglob("*.json*")
    names = {path.relative_to(folder).as_posix(): path for path in found}
    return {
        name: path.read_bytes()
        for name, path in names.items()
        if not name.startswith(".") and name != "system/mirror.json"
    }


async def test_a_pulled_directory_is_the_same_to_the_byte(
    server: RedisServer, tmp_path: Path
) -> None:
    await _filled(server, tmp_path / "one")

    async with mirror_client(server.url) as mine:
        pulled = await pull(mine, str(tmp_path / "two"), Codec())

    assert (len(pulled.documents), pulled.logs) == (len(NASTY) + 1, ["events/a/b/log.jsonl"])
    assert _files(tmp_path / "two") == _files(tmp_path / "one")
    assert (await compare(server.url, tmp_path / "two")).ok
    # It is that instance now, and goes on from there.
    async with mirrored(tmp_path / "two", server.url) as manager:
        assert await manager.append("events", ("a/b", "log"), {"n": 1}, dedupe_key="d7") == 8
        assert await manager.save("notes", (NASTY[0], "below"), {"n": 3}) == 3
    assert (await compare(server.url, tmp_path / "two")).ok


async def test_pull_replaces_nothing_newer_or_edited(server: RedisServer, tmp_path: Path) -> None:
    folder = tmp_path / "state"
    async with mirrored(folder, server.url) as manager:
        for name in ("same", "newer", "edited", "older", "lost", "broken"):
            await manager.save("notes", name, {"n": 1})
        await manager.flush()
        before = (folder / "notes" / "older.json").read_bytes()
        await manager.save("notes", "older", {"n": 2})
    async with StatePersistenceManager(folder) as plain:
        await plain.save("notes", "newer", {"n": 2})
    notes = folder / "notes"
    (notes / "edited.json").write_text(
        (notes / "edited.json").read_text().replace('"n": 1', '"n": 9')
    )
    (notes / "older.json").write_bytes(before)
    (notes / "lost.json").unlink()
    (notes / "broken.json").write_text("{")

    async with mirror_client(server.url) as mine:
        pulled = await pull(mine, str(folder), Codec())

    assert sorted(pulled.documents) == ["notes/broken", "notes/lost", "notes/older"]
    assert sorted(pulled.left) == ["notes/edited", "notes/newer", "notes/same"]
    numbers = {path.stem: json.loads(path.read_text())["n"] for path in notes.glob("*.json")}
    assert numbers == {"same": 1, "newer": 2, "edited": 9, "older": 2, "lost": 1, "broken": 1}


async def test_pull_takes_nothing_that_is_not_valid(server: RedisServer, tmp_path: Path) -> None:
    async with mirrored(tmp_path / "one", server.url) as manager:
        for name in ("good", "cut", "foreign"):
            await manager.save("agents", name, {"agent_id": name})
    async with client(server.url) as redis:
        await redis.hset("app:state:{agents}:cut", "body", b'{"agent_id":"c')
        body = b'{"agent_id":7}'
        fields = {"body": body, "checksum": f"{crc32(body):08x}"}
        await redis.hset("app:state:{agents}:foreign", mapping=fields)

    async with mirror_client(server.url) as mine:
        pulled = await pull(mine, str(tmp_path / "two"), Codec())

    assert "agent_id" in pulled.refused["agents/foreign"]
    assert pulled.documents == ["agents/good"]
    assert set(pulled.refused) == {"agents/cut", "agents/foreign"}
    assert not (tmp_path / "two" / "agents" / "cut.json").exists()


async def test_pull_is_refused_where_it_could_mix(server: RedisServer, tmp_path: Path) -> None:
    await _filled(server, tmp_path / "one")
    async with StatePersistenceManager(tmp_path / "two") as other:
        await other.save("notes", "mine", {"n": 1})

    async with mirror_client(server.url) as mine:
        with pytest.raises(MirrorError, match="--take-over"):
            await pull(mine, str(tmp_path / "two"), Codec())
        async with StatePersistenceManager(tmp_path / "one", exclusive=True):
            with pytest.raises(StateDirectoryInUseError):
                await pull(mine, str(tmp_path / "one"), Codec())
        await pull(mine, str(tmp_path / "two"), Codec(), take_over=True)

    assert read_instance(str(tmp_path / "two")) == read_instance(str(tmp_path / "one"))
    assert (await compare(server.url, tmp_path / "two")).missing == ["notes/mine"]


async def test_rebuild_mends_what_verify_finds(server: RedisServer, tmp_path: Path) -> None:
    folder = tmp_path / "state"
    await _filled(server, folder)
    async with client(server.url) as redis:
        await redis.delete("app:state:{notes}:alice/below", "app:log:{events}:a%2fb/log")
        await redis.hset("app:state:{notes}:Alice/below", "checksum", "00000000")
        await redis.hset("app:state:{notes}:stranger", "body", "{}")
        await redis.hset("app:index:{notes}", "gone", "99 1 00000000")
        await redis.hdel("app:index:{notes}", "*/below")
        await redis.hset("app:index:{events}", "/log/a%2fb/log", "400")
    compared = await compare(server.url, folder)
    assert compared.missing == ["notes/*/below", "notes/alice/below"]
    assert compared.different == ["events/a/b/log.jsonl", "notes/Alice/below"]
    assert compared.extra == ["notes/gone"]
    async with client(server.url) as redis:
        await redis.hset("app:index:{events}", "/log/a%2fb/log", "300")  # the log itself is gone
    assert (await compare(server.url, folder)).missing[0] == "events/a/b/log.jsonl"

    async with mirror_client(server.url) as mine:
        rebuilt = await rebuild(mine, str(folder))

    assert (rebuilt.documents, rebuilt.records) == (len(NASTY) + 1, 300)
    assert (await compare(server.url, folder)).ok
    async with client(server.url) as redis:
        assert not await redis.exists("app:state:{notes}:stranger")
        assert await redis.xlen("app:log:{events}:a%2fb/log") == 300


async def test_rebuild_beside_a_running_server(server: RedisServer, tmp_path: Path) -> None:
    folder = tmp_path / "state"
    async with mirrored(folder, server.url) as manager:
        for number in range(100):
            await manager.save("notes", f"n{number}", {"n": number})
        await caught_up(manager)
        async with mirror_client(server.url) as mine:
            await rebuild(mine, str(folder))
        for number in range(50):
            await manager.save("notes", f"n{number}", {"n": -number})
        await until(lambda: status(manager).sent >= 150 - 1)
        await caught_up(manager)
        assert (await compare(server.url, folder)).ok


async def test_another_directory_is_taken_over_only_when_told(
    server: RedisServer, tmp_path: Path
) -> None:
    await _filled(server, tmp_path / "one")
    async with StatePersistenceManager(tmp_path / "two") as other:
        await other.save("notes", "mine", {"n": 1})
    async with mirror_client(server.url) as mine:
        with pytest.raises(MirrorError, match="another state directory"):
            await rebuild(mine, str(tmp_path / "two"))
        with pytest.raises(MirrorError, match="is the mirror of instance"):
            await compare(server.url, tmp_path / "two")
        with pytest.raises(StateNotFoundError):
            await rebuild(mine, str(tmp_path / "none"))
        await rebuild(mine, str(tmp_path / "two"), take_over=True)

    compared = await compare(server.url, tmp_path / "two")
    assert compared.ok
    assert (compared.documents, compared.logs) == (1, 0)


async def test_an_empty_directory_is_filled_at_open(server: RedisServer, tmp_path: Path) -> None:
    await _filled(server, tmp_path / "one")
    shutil.rmtree(tmp_path / "one")

    async with mirrored(tmp_path / "one", server.url, restores=True) as manager:
        loaded = await manager.load_agent_state("alice")
        count = len(await manager.keys("notes"))

    assert loaded is not None
    assert count == len(NASTY)
    assert (await compare(server.url, tmp_path / "one")).ok


async def test_an_empty_directory_opens_without_redis_and_spares_what_is_there(
    server: RedisServer, tmp_path: Path
) -> None:
    await _filled(server, tmp_path / "one")
    server.stop()
    settings: dict[str, Any] = {"restores": True, "timeout_seconds": 0.5}
    async with mirrored(tmp_path / "two", server.url, **settings) as manager:
        assert await manager.keys("notes") == []
        assert "nothing was restored" in manager.incidents()[0].what
        server.go_on()
        await until(lambda: status(manager).state == "collision")
    assert (await compare(server.url, tmp_path / "one")).ok


class _NumberedNotes(ModelStateValidator):
    """The user's own rule: the ``n`` of a note is a number."""

    def validate(self, kind: str, state: Mapping[str, Any]) -> None:
        super().validate(kind, state)
        if kind == "notes" and not isinstance(state.get("n"), int):
            raise StateValidationError("n must be a number", kind=kind)


async def _invalid_in_redis(server: RedisServer, name: str) -> None:
    """A note in the mirror that is whole, and that the user's validator refuses."""
    body = b'{"n":"one"}'
    fields = {"body": body, "checksum": f"{crc32(body):08x}"}
    async with client(server.url) as redis:
        await redis.hset(f"app:state:{{notes}}:{name}", mapping=fields)


def _strict(folder: Path, url: str, *, exclusive: bool = True) -> StatePersistenceManager:
    return StatePersistenceManager(
        folder,
        exclusive=exclusive,
        mirror=mirror(url),
        mirror_restores=True,
        validator=_NumberedNotes(),
    )


@pytest.mark.parametrize("valid", [True, False])
async def test_a_document_is_restored_only_if_the_users_validator_accepts_it(
    server: RedisServer, tmp_path: Path, valid: bool, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "state"
    async with mirrored(folder, server.url) as manager:
        await manager.save("notes", "one", {"n": 1})
    if not valid:
        await _invalid_in_redis(server, "one")

    (folder / "notes" / "one.json").write_text("{ broken")

    # Shared: an exclusive store puts what is damaged aside as it opens.
    async with _strict(folder, server.url, exclusive=False) as manager:
        if valid:
            loaded = await manager.load("notes", "one")
            assert loaded is not None
            assert loaded.model_dump() == {"n": 1}
        else:
            with contextlib.suppress(StateCorruptedError):  # or the mirror has met it before
                assert await manager.load("notes", "one") is None
            await until(lambda: "n must be a number" in caplog.text)
        restored = [incident.key for incident in manager.incidents() if incident.restored]

    assert restored == ([("one",)] if valid else [])
    assert (folder / "notes" / "one.json").exists() == valid
    assert ("n must be a number" in caplog.text) != valid


async def test_an_empty_directory_is_filled_with_what_the_users_validator_accepts(
    server: RedisServer, tmp_path: Path
) -> None:
    folder = tmp_path / "state"
    async with mirrored(folder, server.url) as manager:
        for name in ("one", "two"):
            await manager.save("notes", name, {"n": 1})
    await _invalid_in_redis(server, "one")
    shutil.rmtree(folder)

    async with _strict(folder, server.url) as manager:
        assert await manager.keys("notes") == [("two",)]
        assert await manager.load("notes", "one") is None

    assert not (folder / "notes" / "one.json").exists()
