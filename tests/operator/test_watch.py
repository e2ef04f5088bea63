"""``agent-state watch``: what changes is said in words, at once, whichever store changes it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from agent_state import StatePersistenceManager
from agent_state.encryption import Keyring, MasterKeys, generate_master_key, parse_master_keys
from agent_state.storage import JournalFollower, checkpoint, wal
from agent_state.storage.directory import StateDirectory
from agent_state_integrations.operator.watch import Event, follow, in_lines
from tests.cli.commands import Call, assert_one_line_of_error
from tests.cli.test_json import check
from tests.deadlines import soon

_KEY = generate_master_key()
STORES = pytest.mark.parametrize("exclusive", [False, True], ids=["shared", "exclusive"])


class Watching:
    """The changes of a directory, one at a time."""

    def __init__(self, batches: Any) -> None:
        self._batches = batches
        self._events: list[Event] = []

    async def next(self) -> tuple[str, list[str]]:
        """Of the next change whose document it is, and what is said."""
        while not self._events:
            _, self._events = await soon(anext(self._batches))
        event = self._events.pop(0)
        return event.subject, event.words

    async def words(self) -> list[str]:
        return (await self.next())[1]


@asynccontextmanager
async def watching(state: Path, sealer: Keyring | None = None) -> AsyncIterator[Watching]:
    async with aclosing(follow(state, sealer)) as batches:
        assert (await soon(anext(batches)))[1] == []
        yield Watching(batches)


@asynccontextmanager
async def watch_process(state: Path, *args: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "agent_state", "watch", "--state", str(state), *args,
        stdout=-1, stderr=-1,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def line_of(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await soon(process.stdout.readline())).decode().rstrip("\n")


# -- what is said ------------------------------------------------------------------------------


@STORES
async def test_a_day_is_told_while_it_happens(state: Path, exclusive: bool) -> None:
    async with (
        StatePersistenceManager(state, exclusive=exclusive) as manager,
        watching(state) as seen,
    ):
        await manager.save_agent_state("zoe", {"agent_id": "zoe", "agent_type": "writer"})
        assert await seen.next() == ("zoe", ["created (writer)"])
        task = {"task_id": "t3", "agent_id": "alice", "name": "index", "status": "pending"}
        await manager.save("tasks", ("alice", "t3"), task)
        assert await seen.next() == ("alice", ["task t3 (index) queued"])
        await manager.save("tasks", ("alice", "t3"), {**task, "progress": {"read": 3}})
        [words] = await seen.words()
        assert words.startswith("task t3: progress ")
        failed = {**task, "status": "failed", "error": "KeyError: 'doc'"}
        await manager.save("tasks", ("alice", "t3"), failed)
        assert (await seen.words())[0].endswith("failed: KeyError: 'doc'")
        message = {"message_id": "m3", "from_agent": "zoe", "subject": "hello"}
        await manager.save("mail", ("alice", "m3"), message)
        assert await seen.words() == ["mail m3 from zoe (hello)"]
        await manager.save("mail", ("alice", "m3"), {**message, "status": "read"})
        assert await seen.words() == ["mail m3 read"]
        await manager.delete("sleep", "alice")
        assert await seen.words() == ["woke"]
        await manager.save("notes", "n", {"words": 3})
        assert await seen.next() == ("notes/n", ["created"])
        await manager.save("notes", "n", {"words": 4})
        assert await seen.words() == ["words 3 to 4"]
        await manager.delete("notes", "n")
        assert await seen.words() == ["removed"]


def test_the_changes_of_an_agent_are_one_line() -> None:
    at = "2026-12-01T11:05:09.000000Z"
    events = [
        Event(at, "agents", ("alice",), 2, ["idle to sleeping"]),
        Event(at, "sleep", ("alice",), 1, ["until 2026-12-01T14:00:00Z"]),
        Event(at, "tasks", ("alice", "t1"), 3, ["task t1 completed"]),
        Event(at, "notes", ("n",), 3, ["words 3 to 4"]),
        Event(at, "mail", ("alice", "m"), 1, ["mail m from bob"]),
    ]

    assert in_lines(events) == [
        (
            "11:05:09  alice: idle to sleeping until 2026-12-01T14:00:00Z; task t1 completed; "
            "mail m from bob"
        ),
        "11:05:09  notes/n: words 3 to 4",
    ]


async def test_a_change_is_told_before_the_owner_has_brought_it_to_its_file(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "WRITE_BACK_SECONDS", 3600.0)
    async with (
        StatePersistenceManager(state, exclusive=True) as manager,
        watching(state) as seen,
    ):
        for status in ("active", "waiting"):
            await manager.save_agent_state("zoe", {"agent_id": "zoe", "status": status})
        assert await seen.words() == ["created (no type)"]
        assert await seen.words() == ["active to waiting"]
        await manager.delete("agents", "zoe")
        assert await seen.words() == ["removed"]
        assert not (state / "agents/zoe.json").exists()


async def test_a_large_document_of_which_the_journal_has_the_edits_is_told(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "WRITE_BACK_SECONDS", 3600.0)
    note = {"text": "word " * 5000, "n": 0}
    async with StatePersistenceManager(state, exclusive=True) as manager:
        await manager.save("notes", "n", note)
        async with watching(state) as seen:
            for number in (1, 2):
                await manager.save("notes", "n", {**note, "n": number})
                assert await seen.next() == ("notes/n", [f"n {number - 1} to {number}"])


async def test_what_the_journal_held_before_is_no_change(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "WRITE_BACK_SECONDS", 3600.0)
    async with StatePersistenceManager(state, exclusive=True) as manager:
        await manager.save_agent_state("zoe", {"agent_id": "zoe", "status": "active"})
        async with watching(state) as seen:
            await manager.save_agent_state("zoe", {"agent_id": "zoe", "status": "waiting"})
            assert await seen.next() == ("zoe", ["active to waiting"])


async def test_a_hand_edit_its_damage_and_its_end_are_told(state: Path) -> None:
    file = state / "agents/alice.json"
    whole = file.read_text()
    async with watching(state) as seen:
        file.write_text(whole.replace("researcher", "writer"))
        assert await seen.next() == ("alice", ['agent_type "researcher" to "writer"'])
        file.write_text('{"agent_id": ')
        [words] = await seen.words()
        assert words.startswith("agents/alice: ")
        file.write_text(whole.replace("researcher", "writer"))
        assert await seen.words() == ["can be read again"]
        file.unlink()
        assert await seen.words() == ["removed"]


async def test_a_sealed_directory_is_told_with_its_keys(tmp_path: Path) -> None:
    keys = Keyring(tmp_path / "keys", MasterKeys(lambda: parse_master_keys(_KEY)))
    state = tmp_path / "state"
    async with StatePersistenceManager(state, exclusive=True, encryption=keys) as manager:
        await manager.save_agent_state("zoe", {"agent_id": "zoe", "status": "active"})
        async with watching(state, keys) as seen:
            await manager.save_agent_state("zoe", {"agent_id": "zoe", "status": "waiting"})
            assert await seen.next() == ("zoe", ["active to waiting"])


# -- the journal -------------------------------------------------------------------------------


async def test_half_a_record_is_read_when_it_is_whole(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with StatePersistenceManager(state, exclusive=True) as manager:
        await manager.save("notes", "a", {"n": 1})
        await manager.save("notes", "b", {"n": 1})
        [segment] = wal.segments(str(state / ".journal"))
        data = Path(segment).read_bytes()
    journal = tmp_path / "copy/.journal/00000001.jsonl"
    journal.parent.mkdir(parents=True)
    journal.write_bytes(data[:-5])
    follower = JournalFollower(StateDirectory(str(tmp_path / "copy"), sync=False, now=str))
    assert [key for (_, key), _ in follower.read()] == [("a",)]
    assert follower.read() == []
    journal.write_bytes(data)
    assert [key for (_, key), _ in follower.read()] == [("b",)]
    assert follower.over(("notes", ("b",)), None) is not None
    journal.unlink()
    assert follower.read() == []
    assert follower.over(("notes", ("b",)), None) is None


# -- the command -------------------------------------------------------------------------------


@STORES
async def test_json_has_a_line_for_each_change_and_ends_after_the_limit(
    state: Path, exclusive: bool
) -> None:
    async with (
        StatePersistenceManager(state, exclusive=exclusive) as manager,
        watch_process(state, "--json", "--limit", "2") as process,
    ):
        ready = json.loads(await line_of(process))
        assert (ready["event"], ready["state_dir"]) == ("ready", str(state))
        await manager.save_agent_state("Bob", {"agent_id": "Bob", "status": "idle"})
        changed = json.loads(await line_of(process))
        await manager.delete("tasks", ("alice", "t1"))
        gone = json.loads(await line_of(process))
        assert await soon(process.wait()) == 0
    for line in (ready, changed, gone):
        check("watch", line)
    assert {**changed, "at": ""} == {
        "event": "change", "at": "", "kind": "agents", "key": ["Bob"], "revision": 2,
        "words": ["stopped to idle"],
    }  # fmt: skip
    assert (gone["event"], gone["revision"]) == ("gone", None)
    assert gone["words"] == ["task t1 removed"]


async def test_of_one_agent_until_ctrl_c(state: Path) -> None:
    async with (
        StatePersistenceManager(state) as manager,
        watch_process(state, "alice") as process,
    ):
        assert await line_of(process) == f"{state}: no server owns it; Ctrl-C ends"
        await manager.save_agent_state("Bob", {"agent_id": "Bob", "status": "idle"})
        await manager.save("mail", ("alice", "m1"), {"message_id": "m1", "status": "read"})
        assert (await line_of(process))[8:] == "  alice: mail m1 read"
        process.send_signal(signal.SIGINT)
        _, errors = await soon(process.communicate())
    assert (process.returncode, errors) == (0, b"")


async def test_a_reader_that_has_gone_is_no_error(state: Path) -> None:
    reading, writing = os.pipe()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "agent_state", "watch", "--state", str(state),
        stdout=writing, stderr=-1,
    )  # fmt: skip
    os.close(writing)
    assert b"Ctrl-C" in await asyncio.to_thread(os.read, reading, 4096)
    os.close(reading)
    async with StatePersistenceManager(state) as manager:
        await manager.delete("agents", "Bob")
        _, errors = await soon(process.communicate())
    assert (process.returncode, errors) == (0, b"")


def test_a_missing_directory_is_misuse_and_is_not_made(call: Call, tmp_path: Path) -> None:
    called = call("watch", "--state", tmp_path / "misspelt")

    assert called.code == 2
    assert_one_line_of_error(called, "no such state directory")
    assert not (tmp_path / "misspelt").exists()


async def test_an_encrypted_directory_needs_its_keys(tmp_path: Path, call: Call) -> None:
    keys = Keyring(tmp_path / "keys", MasterKeys(lambda: parse_master_keys(_KEY)))
    async with StatePersistenceManager(tmp_path / "state", encryption=keys) as manager:
        await manager.save_agent_state("zoe", {"agent_id": "zoe"})

    called = await asyncio.to_thread(call, "watch", "--state", tmp_path / "state")

    assert called.code == 2
    assert_one_line_of_error(called, "--keyring")
