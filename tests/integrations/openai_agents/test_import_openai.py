"""``agent-state import openai``: what an SQLiteSession has stored, in a state directory."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from agents import SQLiteSession

from agent_state.cli.app import run as main
from agent_state_integrations.openai_agents import AgentStateSession
from tests.integrations.states import HOSTILE

SESSIONS = [each for each in HOSTILE if each != "\0"]  # SQLite ends a text at NUL


def items(session: str, count: int = 3) -> list[Any]:
    return [
        {"role": "user", "content": f"{session[:9]} {n}", "b": 1, "a": None} for n in range(count)
    ]


async def _fill(database: Path) -> None:
    for session_id in SESSIONS:
        old = SQLiteSession(session_id, database)
        await old.add_items(items(session_id, 1200 if session_id == "con" else 3))
        old.close()


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "old.db"
    asyncio.run(_fill(path))
    return path


async def _read(state: Path, session_id: str) -> list[Any]:
    async with AgentStateSession(state, session_id) as session:
        return await session.get_items()


async def _add(state: Path, session_id: str, added: list[Any]) -> None:
    async with AgentStateSession(state, session_id) as session:
        await session.add_items(added)


def test_every_session_is_brought_over_once(
    database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"
    command = ["import", "openai", str(database), "--state", str(state)]

    assert main([*command, "--dry-run"]) == 0
    assert f"{len(SESSIONS)} sessions with" in capsys.readouterr().out
    assert not state.exists()
    asyncio.run(_add(state, "con", items("con", 100)))  # a run that was interrupted
    for _ in range(2):
        assert main([*command, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["sessions"], report["refused"]) == (len(SESSIONS), {})
    for session_id in SESSIONS:
        expected = items(session_id, 1200 if session_id == "con" else 3)
        assert asyncio.run(_read(state, session_id)) == expected


def test_what_differs_is_refused_and_what_is_no_json_is_counted(
    database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"
    asyncio.run(_add(state, "a", [{"content": "of this side"}]))
    with sqlite3.connect(database) as connection:
        query = "UPDATE agent_messages SET message_data = '{' WHERE session_id = 'A' AND id IN "
        connection.execute(f"{query} (SELECT max(id) FROM agent_messages WHERE session_id = 'A')")
    connection.close()

    assert main(["import", "openai", str(database), "--state", str(state)]) == 1
    said = capsys.readouterr()
    assert "1 row could not be read" in said.out
    assert "not brought over: a: session 'a' has other items already" in said.err
    assert asyncio.run(_read(state, "a")) == [{"content": "of this side"}]
    assert asyncio.run(_read(state, "A")) == items("A", 2)


def test_a_file_without_the_table_is_refused(
    database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ([str(tmp_path / "missing")], [str(database), "--table", 'x"; DROP TABLE y']):
        assert main(["import", "openai", *words, "--state", str(tmp_path / "state")]) == 2
        assert "no sessions can be read" in capsys.readouterr().err
    assert not (tmp_path / "missing").exists()
