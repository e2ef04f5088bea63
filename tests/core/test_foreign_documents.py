"""Documents as other programs write them: byte order marks, NULs, half surrogates, bad syntax."""

from __future__ import annotations

import codecs
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent_state import AsyncAgentSessionManager, StateCorruptedError, StatePersistenceManager
from agent_state.verify import verify
from tests.alice import GOOD
from tests.deadlines import until

EXCLUSIVE = pytest.mark.parametrize("exclusive", [False, True])


def document(kind: str, key: str) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = {
        "agents": {"agent_id": key, "status": "idle", "mood": "good"},
        "system": {"theme": "dark"},
        "sleep": {"agent_id": key, "is_sleeping": False},
    }
    return found[kind]


@EXCLUSIVE
@pytest.mark.parametrize("kind", ["agents", "system", "sleep"])
@pytest.mark.parametrize(
    "around",
    [
        lambda data: codecs.BOM_UTF8 + data,
        lambda data: b"\0" * 5 + data,
        lambda data: data + b"\0" * 7,
        lambda data: codecs.BOM_UTF8 + data.replace(b"\n", b"\r\n"),
        lambda data: data.decode().encode("utf-16"),
    ],
    ids=["bom", "nuls before", "nuls behind", "bom and crlf", "utf-16"],
)
async def test_what_an_editor_puts_around_a_document_is_skipped_and_gone_at_the_next_save(
    tmp_path: Path, exclusive: bool, kind: str, around: Any
) -> None:
    async with StatePersistenceManager(tmp_path, exclusive=True) as manager:
        await manager.save(kind, "alice", document(kind, "alice"))
    path = tmp_path / kind / "alice.json"
    written = json.loads(path.read_bytes())
    path.write_bytes(around(path.read_bytes()))
    os.utime(path, (1_000_000_000, 1_000_000_000))

    report = await verify(tmp_path)
    assert report.ok
    assert [finding.fault for finding in report.notices] == ["changed outside"]
    async with StatePersistenceManager(tmp_path, exclusive=exclusive) as manager:
        stored = await manager.load(kind, "alice")
        assert stored is not None
        assert await manager.keys(kind) == [("alice",)]
        await manager.save(kind, "alice", document(kind, "alice"))
        await manager.flush()
    saved = json.loads(path.read_text("utf-8"))
    assert {**saved, "_revision": 1, "_saved_at": ""} == {
        **written,
        "_revision": 1,
        "_saved_at": "",
    }
    assert (await verify(tmp_path)).notices == []


@EXCLUSIVE
@pytest.mark.parametrize(
    ("broken", "place"),
    [
        (b'{\n  "agent_id": "alice",\n  "mood" "bad"\n}\n', "line 3 column 10"),
        (b'{"agent_id": "alice",}\n', "line 1 column 21"),
        (b'{\n  "agent_id": "alice"\n', "line "),
    ],
)
async def test_a_syntax_error_is_told_with_file_line_and_column_and_kept_aside(
    tmp_path: Path,
    exclusive: bool,
    broken: bytes,
    place: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with StatePersistenceManager(tmp_path, exclusive=exclusive) as manager:
        await manager.save_agent_state("alice", GOOD)
        await manager.save_agent_state("alice", {**GOOD, "mood": "good"})
        await manager.flush()
        path = tmp_path / "agents/alice.json"
        with caplog.at_level(logging.WARNING, "agent_state"):
            path.write_bytes(broken)
            os.utime(path, (1, 1))  # nobody is writing it any more
            try:
                await manager.load_agent_state("alice")
            except StateCorruptedError:
                pytest.fail("an earlier version is kept")
        [told] = [each.getMessage() for each in caplog.records if "alice.json" in each.getMessage()]
        assert place in told
        assert "agents/alice.json" in told
        assert ".quarantine/agents/alice.json.1" in told
        assert (tmp_path / ".quarantine/agents/alice.json.1").read_bytes() == broken


@pytest.mark.parametrize(
    "edit",
    [lambda good: good[:-3] + b",}\n", lambda good: good[:-3], lambda _: b""],
    ids=["a comma", "cut off", "empty"],
)
@pytest.mark.parametrize("kind", ["agents", "tasks", "mail", "sleep"])
async def test_a_running_server_tells_a_syntax_error_within_a_second(
    tmp_path: Path, kind: str, edit: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    runtime = AsyncAgentSessionManager(tmp_path)
    async with runtime:
        await runtime.agents.create("alice", agent_type="nobody")
        await runtime.agents.create("bob", agent_type="nobody")
        task = await runtime.tasks.submit("alice", "work")
        message = await runtime.mail.send("bob", "alice", subject="hello")
        await runtime.agents.sleep("alice", seconds=3600)
        await runtime.manager.flush()
        name = {
            "agents": "alice",
            "sleep": "alice",
            "tasks": f"alice/{getattr(task, 'task_id', task)}",
            "mail": f"alice/{getattr(message, 'message_id', message)}",
        }[kind]
        path = tmp_path / kind / f"{name}.json"
        good = path.read_bytes()
        caplog.set_level(logging.WARNING, "agent_state")
        path.write_bytes(edit(good))

        def told() -> list[str]:
            return [
                each.getMessage()
                for each in caplog.records
                if f"{kind}/{name}.json" in each.getMessage() and "line " in each.getMessage()
            ]

        await until(told)
        assert "column" in told()[0]
        await until(lambda: path.exists() and path.read_bytes() == good)


@EXCLUSIVE
@pytest.mark.parametrize("saves", [1, 2])
@pytest.mark.parametrize("edit", ['{"agent_id": 5}', '{"agent_id": "alice",, }', "[]", ""])
async def test_an_edit_in_place_that_is_unusable_costs_nothing_that_was_acknowledged(
    tmp_path: Path, exclusive: bool, saves: int, edit: str
) -> None:
    """A document that had been saved once was gone: memory alone had it, and no snapshot."""
    async with StatePersistenceManager(tmp_path, exclusive=exclusive) as manager:
        for number in range(saves):
            await manager.save("agents", "alice", {**document("agents", "alice"), "n": number})
            await manager.flush()
        path = tmp_path / "agents/alice.json"
        path.write_text(edit)
        os.utime(path, (1_000_000_000, 1_000_000_000))  # nobody writes to it any more
        found = await manager.load("agents", "alice")
        assert found is not None
        assert found.model_dump()["n"] == saves - 1
        [incident] = manager.incidents()
        assert (tmp_path / str(incident.kept)).read_text() == edit

    async with StatePersistenceManager(tmp_path, exclusive=exclusive) as manager:
        assert await manager.load("agents", "alice") == found
