"""``agent-state mirror``, as docs/cli.md shows it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from agent_state.storage.directory import read_instance
from tests.cli.commands import Call
from tests.redis.mirrors import client, mirrored
from tests.redis.servers import RedisServer

DOCUMENT = (Path(__file__).parents[2] / "docs/cli.md").read_text(encoding="utf-8")
SHOWN = re.findall(
    r"^\$ (agent-state mirror .*?)\n(.*?)(?=^\$ |^```)", DOCUMENT, re.MULTILINE | re.DOTALL
)


@pytest.fixture
async def there(server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory and its mirror, below the current directory."""
    async with mirrored(tmp_path / "state", server.url) as manager:
        await manager.save_agent_state("alice", {"agent_id": "alice"})
        await manager.save_agent_state("bob", {"agent_id": "bob"})
        await manager.save("notes", "one", {"n": 1})
        for number in range(2):
            await manager.append("events", "log", {"n": number})
    monkeypatch.setenv("AGENT_STATE_REDIS", server.url)
    monkeypatch.delenv("AGENT_STATE_DIR", raising=False)
    monkeypatch.delenv("AGENT_STATE_REDIS_PREFIX", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_document_shows_what_is_printed(there: Path, call: Call) -> None:
    assert len(SHOWN) == 3
    for command, output in SHOWN:
        called = call(*shlex.split(command)[1:])
        assert (called.code, called.out) == (0, output), command


def test_a_difference_is_exit_code_one(
    there: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    (there / "state/notes/one.json").unlink()
    monkeypatch.setenv("AGENT_STATE_REDIS_PREFIX", "app:")

    called = call("mirror", "verify")
    as_json = call("mirror", "verify", "--json")

    assert called.code == as_json.code == 1
    assert "only in the mirror: 1 (notes/one)" in called.out
    assert json.loads(as_json.out)["extra"] == ["notes/one"]
    assert call("mirror", "pull").code == 0
    assert call("mirror", "verify").code == 0


def test_status_shows_both_sides(there: Path, call: Call, server: RedisServer) -> None:
    called = call("mirror", "status", "--prefix", "app:")
    as_json = json.loads(call("mirror", "status", "--prefix", "app:", "--json").out)

    ident = read_instance(str(there / "state"))
    assert called.code == 0
    assert "closed since" in called.out
    assert f"in Redis: instance {ident}" in called.out
    assert "agents: 2 documents, 0 logs" in called.out
    assert as_json["redis"]["kinds"]["events"] == {"documents": 0, "logs": 1}
    assert as_json["server"]["sent"] == 3
    server.kill()
    away = call("mirror", "status", "--prefix", "app:")
    assert away.code == 1
    assert "ConnectionError" in away.out


def test_what_cannot_be_done_is_exit_code_two(there: Path, call: Call, server: RedisServer) -> None:
    (there / "other").mkdir()
    (there / "other/notes").mkdir()
    another = ("--prefix", "app:", "--state", "other")

    for command in ("pull", "rebuild", "verify"):
        called = call("mirror", command, *another)
        assert (called.code, called.out) == (2, "")
        assert "is the mirror of" in called.err
    assert call("mirror", "verify", "--redis", "nothing", "--prefix", "app:").code == 2
    server.kill()
    for command in ("pull", "rebuild", "verify"):
        called = call("mirror", command, "--prefix", "app:")
        assert called.code == 2
        assert "ConnectionError" in called.err


@pytest.fixture
async def damaged_mirror(there: Path, server: RedisServer) -> Path:
    async with client(server.url) as redis:
        await redis.hset("app:state:{agents}:bob", "body", b'{"agent_id":"b')
    return there


def test_pull_reports_what_it_could_not_use_and_exits_with_1(
    damaged_mirror: Path, call: Call
) -> None:
    called = call("mirror", "pull", "--prefix", "app:", "--state", damaged_mirror / "elsewhere")

    assert called.code == 1
    assert "not usable: agents/bob" in called.out
    assert (damaged_mirror / "elsewhere/agents/alice.json").exists()
    assert not (damaged_mirror / "elsewhere/agents/bob.json").exists()
