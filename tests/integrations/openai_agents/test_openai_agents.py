"""Sessions of the OpenAI Agents SDK in a state directory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from agents import Agent, Runner, Session, function_tool
from agents.memory.session_settings import SessionSettings
from agents.run import RunConfig
from agents.testing import ScriptedModel, assistant_message, function_call

from agent_state import MemoryStateStore, SerializationError, StatePersistenceManager
from agent_state.testing import FakeClock
from agent_state_integrations.openai_agents import (
    AgentStateSession,
    delete_session,
    list_sessions,
)
from tests.integrations.states import (
    HOSTILE,
    STATES,
    cancel_soon,
    kill_after_lines,
    run_at_once,
    state_of,
    writer,
)

QUIET = RunConfig(tracing_disabled=True)


def item(text: Any) -> Any:
    return {"role": "user", "content": text}


@pytest.fixture(params=STATES)
async def session(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[AgentStateSession]:
    async with state_of(request.param, tmp_path) as state, AgentStateSession(state, "s") as made:
        yield made


async def test_it_is_a_session(session: AgentStateSession) -> None:
    assert isinstance(session, Session)
    assert session.session_id == "s"


async def test_items_come_back_in_order(session: AgentStateSession) -> None:
    await session.add_items([item("a"), item({"nested": [1, None]})])
    await session.add_items([])
    await session.add_items([item("c")])

    assert await session.get_items() == [item("a"), item({"nested": [1, None]}), item("c")]
    assert await session.get_items(2) == [item({"nested": [1, None]}), item("c")]
    assert await session.get_items(0) == await session.get_items(-1) == []


async def test_popping(session: AgentStateSession) -> None:
    assert await session.pop_item() is None
    await session.add_items([item(n) for n in range(3)])
    assert await session.pop_item() == item(2)
    await session.add_items([item("new")])
    assert [await session.pop_item() for _ in range(4)] == [item("new"), item(1), item(0), None]
    await session.add_items([item("last")])

    assert await session.get_items() == await session.get_items(5) == [item("last")]


@pytest.mark.parametrize("limit", [1, 3, 100, 299, 1000])
async def test_a_limit_counts_what_was_not_popped(tmp_path: Path, limit: int) -> None:
    expected: list[Any] = []
    async with (
        StatePersistenceManager(tmp_path, exclusive=True) as manager,
        AgentStateSession(manager, "s") as session,
    ):
        for n in range(300):
            await session.add_items([item(n), item(-n)])
            expected += [item(n), item(-n)]
            for _ in range(3 if n % 10 == 0 else n % 2):
                popped = await session.pop_item()
                assert popped == (expected.pop() if expected else None)

        assert await session.get_items(limit) == expected[-limit:]
        assert await session.get_items() == expected


async def test_settings_limit_what_is_read(tmp_path: Path) -> None:
    async with AgentStateSession(tmp_path, "s", SessionSettings(limit=2)) as session:
        await session.add_items([item(n) for n in range(4)])

        assert await session.get_items() == [item(2), item(3)]
        assert await session.get_items(limit=None) == [item(2), item(3)]
        assert len(await session.get_items(3)) == 3


async def test_settings_are_given_as_fields_too(tmp_path: Path) -> None:
    async with AgentStateSession(tmp_path, "s", session_settings={"limit": 1}) as session:
        assert session.session_settings.resolve({"limit": 4}).limit == 4
        await session.add_items([item(1), item(2)])
        assert await session.get_items() == [item(2)]
    with pytest.raises(TypeError, match="limitt"):
        AgentStateSession(tmp_path, "s", session_settings={"limitt": 1})


async def test_clearing_leaves_nothing_on_the_disk(tmp_path: Path) -> None:
    async with AgentStateSession(tmp_path, "s") as session:
        await session.add_items([item("swordfish")])
        await session.clear_session()
        await session.clear_session()

        assert await session.get_items() == []
        await session.add_items([item("new")])
        assert await session.get_items() == [item("new")]
    assert not [
        path for path in tmp_path.rglob("*") if path.is_file() and b"swordfish" in path.read_bytes()
    ]


async def test_a_closed_session_refuses(tmp_path: Path) -> None:
    session = AgentStateSession(tmp_path, "s")
    await session.add_items([item("a")])
    await session.aclose()

    for call in (
        session.get_items(),
        session.get_items(0),
        session.add_items([]),
        session.pop_item(),
    ):
        with pytest.raises(RuntimeError, match="closed"):
            await call


async def test_what_is_not_json_is_refused_whole(session: AgentStateSession) -> None:
    with pytest.raises(SerializationError):
        await session.add_items([item("a"), item(object())])

    assert await session.get_items() == []


async def test_every_id_is_a_session_of_its_own(tmp_path: Path) -> None:
    for session_id in HOSTILE:
        async with AgentStateSession(tmp_path, session_id) as session:
            await session.add_items([item(session_id)])

    assert await list_sessions(tmp_path) == sorted(HOSTILE)
    for session_id in HOSTILE:
        async with AgentStateSession(tmp_path, session_id) as session:
            assert await session.get_items() == [item(session_id)]
    assert await delete_session(tmp_path, "..")
    assert not await delete_session(tmp_path, "..")
    assert len(await list_sessions(tmp_path)) == len(HOSTILE) - 1


async def test_metadata_is_kept_beside_the_items(session: AgentStateSession) -> None:
    assert await session.metadata() == {}
    await asyncio.gather(*(session.update_metadata(**{f"n{n}": n}) for n in range(8)))
    await session.clear_session()

    assert await session.metadata() == {f"n{n}": n for n in range(8)}


async def test_a_session_lives_as_long_as_it_should(fake_clock: FakeClock) -> None:
    manager = StatePersistenceManager(store=MemoryStateStore(clock=fake_clock), clock=fake_clock)
    session = AgentStateSession(manager, "s", ttl=60)
    await session.add_items([item("old")])
    await fake_clock.advance(59)
    await session.add_items([item("renewed")])
    await fake_clock.advance(59)
    assert len(await session.get_items()) == 2
    await fake_clock.advance(1)

    assert await session.get_items() == []
    await session.add_items([item("new")])
    assert await session.get_items() == [item("new")]
    with pytest.raises(ValueError, match="positive"):
        AgentStateSession(manager, "s", ttl=0)


async def test_an_interrupted_run_goes_on_in_another_process(tmp_path: Path) -> None:
    done = []

    @function_tool(needs_approval=True)
    def send(to: str) -> str:
        done.append(to)
        return "sent"

    def agent_with(*steps: Any) -> Agent[Any]:
        return Agent("clerk", model=ScriptedModel([*steps]), tools=[send])

    async with AgentStateSession(tmp_path, "s") as session:
        first = agent_with([function_call("send", json.dumps({"to": "ann"}), call_id="c1")])
        result = await Runner.run(first, "write to ann", session=session, run_config=QUIET)
        assert result.interruptions
        await session.save_run_state(result.to_state())

    async with AgentStateSession(tmp_path, "s") as session:
        second = agent_with([assistant_message("done")])
        state = await session.load_run_state(second)
        assert state is not None
        state.approve(state.get_interruptions()[0])
        result = await Runner.run(second, state, session=session, run_config=QUIET)
        assert result.final_output == "done"
        assert done == ["ann"]
        await session.delete_run_state()
        assert await session.load_run_state(second) is None
        kinds = [each.get("type", each.get("role")) for each in await session.get_items()]
    assert kinds == ["user", "function_call", "function_call_output", "message"]


def test_eight_processes_add_at_once(tmp_path: Path) -> None:
    run_at_once(
        writer(
            AgentStateSession,
            tmp_path,
            "s",
            times=10,
            body="""
texts = [f"{sys.argv[1]}-{n}-{half}" for half in "ab"]
await it.add_items([{"role": "user", "content": text} for text in texts])
""",
        ),
        8,
    )

    async def read() -> list[Any]:
        async with AgentStateSession(tmp_path, "s") as session:
            return await session.get_items()

    texts = [each["content"] for each in asyncio.run(read())]
    assert len({*texts}) == len(texts) == 160
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    assert all(one[:-1] == other[:-1] for one, other in pairs)


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    lines = kill_after_lines(
        writer(
            AgentStateSession,
            tmp_path,
            "s",
            body='await it.add_items([{"content": n}, {"content": -n}])',
        ),
        20,
    )

    async def read() -> list[Any]:
        async with AgentStateSession(tmp_path, "s") as session:
            return await session.get_items()

    numbers = [each["content"] for each in asyncio.run(read())]
    expected = [sign * n for n in range(len(numbers) // 2) for sign in (1, -1)]
    assert numbers == expected
    assert len(numbers) // 2 in (len(lines), len(lines) + 1)


async def test_a_cancelled_add_is_whole(tmp_path: Path) -> None:
    async with AgentStateSession(tmp_path, "s") as session:
        await session.get_items()
        await cancel_soon(session.add_items([item("a"), item("b")]))
        assert await session.get_items() in ([], [item("a"), item("b")])
        await session.add_items([item("c")])
        assert (await session.get_items())[-1] == item("c")


async def test_ten_thousand_items(tmp_path: Path) -> None:
    async with AgentStateSession(tmp_path, "s") as session:
        for start in range(0, 10_000, 100):
            await session.add_items([item(n) for n in range(start, start + 100)])

        assert await session.get_items(2) == [item(9_998), item(9_999)]
        assert len(await session.get_items()) == 10_000
