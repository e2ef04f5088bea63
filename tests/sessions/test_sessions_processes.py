"""Several processes write to one session: no message, no count and no end is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from agent_state import StatePersistenceManager
from agent_state.sessions import SessionManager, SessionNotFoundError
from agent_state_integrations.orchestration import context_of
from tests.sessions.managers import session_manager

_WRITER = """
import asyncio, sys
from agent_state import StatePersistenceManager
from agent_state.sessions import SessionManager, SessionNotFoundError
from agent_state_integrations.orchestration import Orchestration

async def main(directory, name, rounds, renew_interval_seconds):
    async with StatePersistenceManager(directory) as files:
        sessions = SessionManager(files, renew_interval_seconds=renew_interval_seconds)
        orchestration = Orchestration(sessions)

        async def one(number):
            await sessions.conversations.add("s1", "guide_agent", "user", f"{name}-{number}")
            await sessions.conversations.add(
                "s1", "guide_agent", "user", name, dedupe_key=f"shared-{number}"
            )
            await orchestration.report_service("s1", "FileParser")
            await sessions.update("s1", {name: {str(number): True}})

        print("ready", flush=True)
        sys.stdin.readline()
        for number in range(rounds):
            try:
                await asyncio.gather(one(2 * number), one(2 * number + 1))
            except SessionNotFoundError:
                print("refused", flush=True)
                return

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])))
"""


def start(
    directory: Path, name: str, rounds: int, renew_interval_seconds: float
) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            _WRITER,
            str(directory),
            name,
            str(rounds),
            str(renew_interval_seconds),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


async def new_session(directory: Path) -> None:
    async with StatePersistenceManager(directory) as files:
        await session_manager(files).create("ann")


@pytest.mark.long("two processes write to one session")
@pytest.mark.parametrize("renew_interval_seconds", [0, 1])
async def test_no_update_of_two_processes_is_lost(
    tmp_path: Path, renew_interval_seconds: float
) -> None:
    await new_session(tmp_path)
    writers = [start(tmp_path, name, 6, renew_interval_seconds) for name in ("left", "right")]
    for writer in writers:
        go(writer)
    for writer in writers:
        assert writer.communicate(timeout=100)[0] == ""
        assert writer.returncode == 0
    async with StatePersistenceManager(tmp_path) as files:
        sessions = SessionManager(files)
        page = await sessions.conversations.page("s1", "guide_agent", limit=1000)
        session = await sessions.get("s1")
    said = [message.content for message in page.messages]
    own = [f"{name}-{number}" for name in ("left", "right") for number in range(12)]
    assert sorted(each for each in said if each in own) == sorted(own)
    keys = [message.dedupe_key for message in page.messages if message.dedupe_key]
    assert sorted(keys) == sorted(f"shared-{number}" for number in range(12))
    assert [message.seq for message in page.messages] == list(range(1, 37))
    assert page.message_count == 36
    assert context_of(session).enabling_services["FileParser"].invocations == 24
    each = {str(number): True for number in range(12)}
    assert session.state == {"left": each, "right": each}


@pytest.mark.parametrize("renew_interval_seconds", [0, 1])
async def test_a_session_destroyed_by_one_process_is_not_brought_back_by_another(
    tmp_path: Path, renew_interval_seconds: float
) -> None:
    await new_session(tmp_path)
    writer = start(tmp_path, "writer", 100_000, renew_interval_seconds)
    go(writer)
    async with StatePersistenceManager(tmp_path) as files:
        sessions = SessionManager(files)
        while (await sessions.conversations.page("s1", "guide_agent", limit=1)).message_count < 5:
            pass
        assert await sessions.destroy("s1") is True
        assert writer.communicate(timeout=100)[0] == "refused\n"
        assert writer.returncode == 0
        with pytest.raises(SessionNotFoundError):
            await sessions.get("s1")
        for kind in ("sessions", "conversations", "session_states", "session_users"):
            assert await files.keys(kind) == []
            assert await files.store.logs(kind) == []
