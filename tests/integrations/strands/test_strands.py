"""Storage and sessions of Strands in a state directory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from strands.storage import Storage
from strands.types.exceptions import SessionException, StorageError
from strands.types.session import Session, SessionAgent, SessionMessage, SessionType

from agent_state import MemoryStateStore
from agent_state_integrations.strands import AgentStateSessionRepository, AgentStateStorage
from tests.integrations.states import (
    HOSTILE,
    STATES,
    cancel_soon,
    kill_after_lines,
    run_at_once,
    state_of,
    writer,
)
from tests.integrations.strands.test_older_strands import CountingModel, run_agent


@pytest.fixture(params=STATES)
async def storage(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[AgentStateStorage]:
    async with state_of(request.param, tmp_path) as state, AgentStateStorage(state) as made:
        yield made


@pytest.fixture(params=["directory", "memory"])
def repository(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[AgentStateSessionRepository]:
    state: Any = tmp_path if request.param == "directory" else MemoryStateStore()
    with AgentStateSessionRepository(state) as made:
        yield made


def message(number: int, text: Any = "hello") -> SessionMessage:
    return SessionMessage.from_message({"role": "user", "content": [{"text": text}]}, number)


def agent_of(agent_id: str = "a") -> SessionAgent:
    return SessionAgent(agent_id, state={"n": 1}, conversation_manager_state={}, _internal_state={})


async def test_values_come_back_byte_for_byte(storage: AgentStateStorage) -> None:
    assert isinstance(storage, Storage)
    values = {
        "a": b"\x00\xff",
        "a/b": b"text",
        "/c//d/": "ä\r\n".encode(),
        "e": b"",
        "f.json": b"{}",
    }
    for key, data in values.items():
        await storage.write(key, data)

    for key, data in values.items():
        assert await storage.read(key) == data
    assert await storage.list("") == ["a", "a/b", "c/d", "e", "f.json"]
    assert await storage.read("missing") is None
    await storage.delete("a")
    await storage.delete("a")
    assert await storage.read("a") is None
    assert await storage.read("a/b") == b"text"


async def test_listing_is_by_the_beginning_of_the_text(storage: AgentStateStorage) -> None:
    for key in ("b/1", "bb/1", "b/2", "c"):
        await storage.write(key, b"x")

    assert await storage.list("b") == ["b/1", "b/2", "bb/1"]
    assert await storage.list("b/") == ["b/1", "b/2"]
    assert await storage.list("/bb") == ["bb/1"]
    assert await storage.namespace("b").list("") == ["1", "2"]


@pytest.mark.parametrize("key", ["", "/", "a/../b", "a\\b", "x" * 5000])
async def test_a_key_that_is_none_is_refused(storage: AgentStateStorage, key: str) -> None:
    with pytest.raises(StorageError):
        await storage.write(key, b"x")


class EchoModel(CountingModel):
    """Answers with what it was told last."""

    def answer(self, messages: Any) -> str:
        return f"{len(messages)}: {messages[-1]['content'][0]['text']}"


@pytest.mark.parametrize("kind", ["repository", "snapshots"])
def test_an_agent_goes_on_in_another_process(kind: str, tmp_path: Path) -> None:
    assert str(run_agent(kind, tmp_path, EchoModel())("one")).strip() == "1: one"
    assert str(run_agent(kind, tmp_path, EchoModel())("two")).strip() == "3: two"


def test_messages(repository: AgentStateSessionRepository) -> None:
    repository.create_session(Session("s", SessionType.AGENT))
    with pytest.raises(SessionException, match="already exists"):
        repository.create_session(Session("s", SessionType.AGENT))
    with pytest.raises(SessionException):
        repository.list_messages("s", "a")
    repository.create_agent("s", agent_of())
    assert repository.list_messages("s", "a") == []
    for number in (0, 1, 2, 10):
        repository.create_message("s", "a", message(number, f"m{number}"))
    repository.create_message("s", "a", message(1, "again"))
    redacted = message(0, "redacted")
    created = repository.read_message("s", "a", 0).created_at  # type: ignore[union-attr]  # it is there
    repository.update_message("s", "a", redacted)

    def texts(**page: Any) -> list[str]:
        found = repository.list_messages("s", "a", **page)
        return [each.to_message()["content"][0]["text"] for each in found]

    assert texts() == ["redacted", "again", "m2", "m10"]
    assert texts(limit=2, offset=1) == ["again", "m2"]
    assert texts(limit=0) == []
    assert repository.read_message("s", "a", 0).created_at == created  # type: ignore[union-attr]  # as above
    assert repository.read_message("s", "a", 3) is None
    with pytest.raises(SessionException):
        repository.update_message("s", "a", message(3))
    with pytest.raises(ValueError, match="integer"):
        repository.read_message("s", "a", "1")  # type: ignore[arg-type]  # refused


def test_bytes_in_a_message_come_back(repository: AgentStateSessionRepository) -> None:
    content: Any = [{"image": {"format": "png", "source": {"bytes": b"\x00\xff"}}}]
    repository.create_message(
        "s", "a", SessionMessage.from_message({"role": "user", "content": content}, 0)
    )

    read = repository.read_message("s", "a", 0)
    assert read is not None
    assert read.to_message()["content"] == content


def test_agents_and_sessions(repository: AgentStateSessionRepository) -> None:
    assert repository.read_session("s") is None
    repository.create_session(Session("s", SessionType.AGENT))
    assert repository.read_session("s").session_id == "s"  # type: ignore[union-attr]  # it is there
    with pytest.raises(SessionException):
        repository.update_agent("s", agent_of())
    repository.create_agent("s", agent_of())
    created = repository.read_agent("s", "a").created_at  # type: ignore[union-attr]  # it is there
    changed = agent_of()
    changed.state["n"] = 2
    repository.update_agent("s", changed)
    read = repository.read_agent("s", "a")
    assert read is not None
    assert (read.state, read.created_at) == ({"n": 2}, created)
    repository.delete_session("s")
    assert repository.read_agent("s", "a") is None
    with pytest.raises(SessionException):
        repository.delete_session("s")


def test_multi_agents(repository: AgentStateSessionRepository) -> None:
    class Team:
        def __init__(self) -> None:
            self.id = "team"
            self.state = {"n": 1}

        def serialize_state(self) -> Any:
            return dict(self.state)

    team: Any = Team()
    assert repository.read_multi_agent("s", "team") is None
    with pytest.raises(SessionException):
        repository.update_multi_agent("s", team)
    repository.create_multi_agent("s", team)
    team.state = {"n": 2}
    repository.update_multi_agent("s", team)
    assert repository.read_multi_agent("s", "team") == {"n": 2}


def test_every_id_is_its_own(repository: AgentStateSessionRepository) -> None:
    for name in HOSTILE:
        repository.create_session(Session(name, SessionType.AGENT))
        repository.create_agent("s", agent_of(name))
        repository.create_message("s", name, message(0, name))

    for name in HOSTILE:
        assert repository.read_session(name).session_id == name  # type: ignore[union-attr]  # it is there
        [found] = repository.list_messages("s", name)
        assert found.to_message()["content"][0]["text"] == name


def test_eight_processes_write_at_once(tmp_path: Path) -> None:
    run_at_once(
        f"""
import sys
from strands.types.session import SessionMessage
from agent_state_integrations.strands import AgentStateSessionRepository
with AgentStateSessionRepository({str(tmp_path)!r}) as repository:
    for n in range(10):
        number = int(sys.argv[1]) * 10 + n
        content = {{"role": "user", "content": [{{"text": str(number)}}]}}
        repository.create_message("s", "a", SessionMessage.from_message(content, number))
""",
        8,
    )

    with AgentStateSessionRepository(tmp_path) as repository:
        numbers = [each.message_id for each in repository.list_messages("s", "a")]
    assert numbers == [*range(80)]


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    lines = kill_after_lines(
        writer(
            AgentStateStorage,
            tmp_path,
            body='await it.write("k", str(n).encode() * 1000)',
        ),
        15,
    )

    async def read() -> bytes:
        async with AgentStateStorage(tmp_path) as storage:
            return await storage.read("k") or b""

    data = asyncio.run(read())
    number = data[: len(data) // 1000]
    assert data == number * 1000
    assert int(number) >= int(lines[-1])


async def test_a_cancelled_write_is_whole(tmp_path: Path) -> None:
    async with AgentStateStorage(tmp_path) as storage:
        await storage.write("k", b"old")
        await cancel_soon(storage.write("k", b"new"))

        assert await storage.read("k") in (b"old", b"new")


async def test_ten_thousand_values(tmp_path: Path) -> None:
    async with state_of("exclusive", tmp_path) as state:
        storage = AgentStateStorage(state)
        for start in range(0, 10_000, 500):
            some = (storage.write(f"k/{n}", b"x") for n in range(start, start + 500))
            await asyncio.gather(*some)

        assert len(await storage.list("k/")) == 10_000
