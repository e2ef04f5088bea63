"""States of AutoGen's components in a state directory."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from agent_state import SerializationError, StatePersistenceManager
from agent_state_integrations.agent_framework import load_state, save_state
from tests.integrations.autogen.test_older_autogen import new_team
from tests.integrations.states import (
    HOSTILE,
    STATES,
    cancel_soon,
    kill_after_lines,
    run_at_once,
    state_of,
)


class Box:
    """A component that is its state."""

    def __init__(self, content: Any = None) -> None:
        self.content = content

    async def save_state(self) -> Mapping[str, Any]:
        return self.content  # type: ignore[no-any-return]  # what the test gave

    async def load_state(self, state: Mapping[str, Any], /) -> None:
        self.content = state


@pytest.mark.parametrize("kind", STATES)
async def test_a_team_goes_on(kind: str, tmp_path: Path) -> None:
    async with state_of(kind, tmp_path) as state:
        for task in range(3):
            team = new_team()
            assert await load_state(state, "team", team) is (task > 0)
            result = await team.run(task=str(task))
            assert result.messages[-1].content == str(task + 1)
            await save_state(state, "team", team)
            before = await team.save_state()
            other = new_team()
            await load_state(state, "team", other)
            assert await other.save_state() == before


async def test_every_name_is_a_state_of_its_own(tmp_path: Path) -> None:
    for name in HOSTILE:
        await save_state(tmp_path, name, Box({"name": name}))
    for name in HOSTILE:
        box = Box()
        assert await load_state(tmp_path, name, box)
        assert box.content == {"name": name}


async def test_what_could_not_be_loaded_is_refused(tmp_path: Path) -> None:
    await save_state(tmp_path, "a", Box({"n": 1}))
    with pytest.raises(SerializationError):
        await save_state(tmp_path, "a", Box({"n": print}))
    with pytest.raises(SerializationError):
        await save_state(tmp_path, "a", Box({"n": Box()}))

    box = Box()
    assert await load_state(tmp_path, "a", box)
    assert box.content == {"n": 1}


async def test_a_cancelled_save_is_whole(tmp_path: Path) -> None:
    await save_state(tmp_path, "a", Box({"n": 1}))
    await cancel_soon(save_state(tmp_path, "a", Box({"n": 2})))
    box = Box()
    assert await load_state(tmp_path, "a", box)
    assert box.content in ({"n": 1}, {"n": 2})


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    lines = kill_after_lines(
        f"""
import asyncio, itertools
from agent_state_integrations.agent_framework import save_state
async def main():
    class Box:
        async def save_state(self):
            return {{"n": n, "again": [n] * 500}}
    for n in itertools.count():
        await save_state({str(tmp_path)!r}, "team", Box())
        print(n, flush=True)
asyncio.run(main())
""",
        15,
    )
    box = Box()
    assert asyncio.run(load_state(tmp_path, "team", box))
    assert box.content["n"] >= int(lines[-1])
    assert box.content["again"] == [box.content["n"]] * 500


@pytest.mark.long("10,000 states")
async def test_ten_thousand_states(tmp_path: Path) -> None:
    async with StatePersistenceManager(tmp_path, exclusive=True) as manager:
        for start in range(0, 10_000, 1_000):
            names = range(start, start + 1_000)
            await asyncio.gather(*(save_state(manager, str(n), Box({"n": n})) for n in names))
        for n in (0, 5_000, 9_999):
            box = Box()
            assert await load_state(manager, str(n), box)
            assert box.content == {"n": n}


def test_eight_processes_save_at_once(tmp_path: Path) -> None:
    run_at_once(
        f"""
import asyncio, sys
from agent_state_integrations.agent_framework import save_state
class Box:
    async def save_state(self):
        return {{"by": [sys.argv[1]] * 100}}
async def main():
    for n in range(5):
        await save_state({str(tmp_path)!r}, "same", Box())
asyncio.run(main())
""",
        8,
    )
    box = Box()
    assert asyncio.run(load_state(tmp_path, "same", box))
    assert len(box.content["by"]) == 100
    assert len({*box.content["by"]}) == 1
