"""Sessions of Microsoft Agent Framework in a state directory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from agent_framework import AgentSession, Message, SessionStore, register_state_type

from agent_state import StatePersistenceManager
from agent_state_integrations.agent_framework import AgentStateSessionStore
from tests.integrations.states import (
    HOSTILE,
    STATES,
    cancel_soon,
    kill_after_lines,
    run_at_once,
    state_of,
    writer,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # it is experimental


@pytest.fixture(params=STATES)
async def sessions(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[AgentStateSessionStore]:
    async with state_of(request.param, tmp_path) as state, AgentStateSessionStore(state) as made:
        yield made


class Basket:
    """A type of the application, registered."""

    def __init__(self, things: list[str]) -> None:
        self.things = things

    def to_dict(self) -> dict[str, Any]:
        return {"things": self.things}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Basket:
        return cls(list(data["things"]))


register_state_type(Basket, type_id="tests.basket")


async def test_sessions(sessions: AgentStateSessionStore) -> None:
    assert isinstance(sessions, SessionStore)
    made = AgentSession(session_id="inner", service_session_id={"conversation": "c"})
    made.state = {"b": Basket(["x"]), "a": {"n": 2**70, "m": [Message("user", ["hi"])]}}
    assert await sessions.get("s") is None
    await sessions.set("s", made)
    made.state["b"].things.append("later")
    found = await sessions.get("s")
    assert found is not None
    assert (found.session_id, found.service_session_id) == ("inner", {"conversation": "c"})
    assert found.state["b"].things == ["x"]
    assert found.state["a"]["n"] == 2**70
    assert found.state["a"]["m"][0].text == "hi"
    assert [*found.state] == ["b", "a"]
    found.state["b"].things.append("mine")
    again = await sessions.get("s")
    assert again is not None
    assert again.state["b"].things == ["x"]

    await sessions.delete("s")
    await sessions.delete("s")
    assert await sessions.get("s") is None
    for wrong in ("", 7):
        with pytest.raises(ValueError, match="non-empty"):
            await sessions.get(wrong)


class Stranger:
    """A type of the application, not registered."""


class BadBasket(Basket):
    """Cannot be loaded."""

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BadBasket:
        raise KeyError(*data)


register_state_type(BadBasket, type_id="tests.bad_basket")


class MySession(AgentSession):
    """Would come back as another class."""


@pytest.mark.parametrize("value", [Stranger(), BadBasket([]), {1, 2}, b"x"])
async def test_a_session_that_could_not_be_loaded_is_refused(
    sessions: AgentStateSessionStore, value: Any
) -> None:
    await sessions.set("s", AgentSession(session_id="s"))
    made = AgentSession(session_id="s")
    made.state["x"] = value
    with pytest.raises((TypeError, ValueError)):
        await sessions.set("s", made)
    with pytest.raises(TypeError):
        await sessions.set("s", MySession(session_id="s"))

    found = await sessions.get("s")
    assert found is not None
    assert found.state == {}


async def test_every_id_is_a_session_of_its_own(tmp_path: Path) -> None:
    async with AgentStateSessionStore(tmp_path) as sessions:
        ids = [each for each in HOSTILE if each]
        for each in ids:
            await sessions.set(each, AgentSession(session_id=f"of {each}"))
        for each in ids:
            found = await sessions.get(each)
            assert found is not None
            assert found.session_id == f"of {each}"


def session_with(text: str) -> AgentSession:
    made = AgentSession(session_id="inner")
    made.state = {"texts": [text] * 300}
    return made


async def text_of(directory: Path, session_id: str) -> str:
    """The text of a session that is whole."""
    async with AgentStateSessionStore(directory) as sessions:
        found = await sessions.get(session_id)
    assert found is not None
    (text,) = {*found.state["texts"]}
    assert found.state["texts"] == [text] * 300
    return str(text)


def test_eight_processes_set_at_once(tmp_path: Path) -> None:
    run_at_once(
        writer(
            AgentStateSessionStore,
            tmp_path,
            times=5,
            body="""
from agent_framework import AgentSession
made = AgentSession(session_id="inner")
made.state = {"texts": [sys.argv[1]] * 300}
await it.set("same", made)
await it.set(f"of {sys.argv[1]}", made)
""",
        ),
        8,
    )
    assert asyncio.run(text_of(tmp_path, "same")) in "01234567"
    for n in range(8):
        assert asyncio.run(text_of(tmp_path, f"of {n}")) == str(n)


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    lines = kill_after_lines(
        writer(
            AgentStateSessionStore,
            tmp_path,
            body="""
from agent_framework import AgentSession
made = AgentSession(session_id="inner")
made.state = {"texts": [str(n)] * 300}
await it.set("s", made)
""",
        ),
        15,
    )
    assert int(asyncio.run(text_of(tmp_path, "s"))) in (int(lines[-1]), int(lines[-1]) + 1)


async def test_a_cancelled_set_is_whole(tmp_path: Path) -> None:
    async with AgentStateSessionStore(tmp_path) as sessions:
        await sessions.set("s", session_with("first"))
        await cancel_soon(sessions.set("s", session_with("second")))
        assert await text_of(tmp_path, "s") in ("first", "second")
        await sessions.set("s", session_with("third"))
        assert await text_of(tmp_path, "s") == "third"


@pytest.mark.long("10,000 sessions")
async def test_ten_thousand_sessions(tmp_path: Path) -> None:
    async with (
        StatePersistenceManager(tmp_path, exclusive=True) as manager,
        AgentStateSessionStore(manager) as sessions,
    ):
        for start in range(0, 10_000, 1_000):
            names = range(start, start + 1_000)
            await asyncio.gather(
                *(sessions.set(str(n), AgentSession(session_id=f"of {n}")) for n in names)
            )
        for n in (0, 5_000, 9_999):
            found = await sessions.get(str(n))
            assert found is not None
            assert found.session_id == f"of {n}"
