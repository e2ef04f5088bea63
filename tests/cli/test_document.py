"""docs/cli.md shows each command with its real output; here both are compared."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from datetime import UTC, datetime, timedelta
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import pytest

import agent_state.sessions  # noqa: F401  # a session's document has its schema, as a server writes it
from agent_state import StatePersistenceManager
from agent_state.cli.app import app, run
from agent_state.clock import stamp
from agent_state.runtime import mail as mail_rules
from agent_state.runtime import sleep as sleep_rules
from agent_state.runtime import transitions as task_rules
from agent_state.testing import FakeClock
from agent_state_integrations.recorder.writer import RecordWriter
from tests.cli.commands import commands_of

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
SECTIONS = dict(
    re.findall(
        r"^##+ `agent-state ([a-z-]+(?: [a-z-]+)*).*?`\n(.*?)(?=^##|\Z)",
        DOCUMENT,
        re.MULTILINE | re.DOTALL,
    )
)
# tests/redis/test_mirror_cli.py, tests/web and tests/record run the commands that need, or are, a
# server; tests/cli/test_tasks.py those that need tasks that died, test_encryption.py those of keys,
# tests/operator what does not end, and archives
SHOWN_BY_HAND = (
    "demo",
    "export",
    "git",
    "import archive",
    "keys",
    "mirror",
    "rekey",
    "serve",
    "record daemon",
    "tasks",
    "top",
    "watch",
)
SHOWN_ELSEWHERE = (
    "import agent-framework",
    "import key-value",
    "import langgraph",
    "import openai",
    "import strands",
    "mcp",
    "new-adapter",
)
"""Those that the pages of their packages show, and the tests of these run."""
BLOCKS = re.findall(r"^```console\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
SHOWN = [
    (number, command, output)
    for number, block in enumerate(BLOCKS)
    for command, output in re.findall(
        r"^\$ (.*?)\n(.*?)(?=^\$ |\Z)", block, re.MULTILINE | re.DOTALL
    )
    if command.startswith("agent-state ")
    and not re.sub(r"^agent-state (--\S+ \S+ )*", "", command).startswith(SHOWN_BY_HAND)
]
UNDONE = ("agents", "mail", "quarantine")
"""What blocks of these commands change is put back behind the block."""

DAMAGED = "# with a damaged file"


@pytest.fixture
async def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state that docs/cli.md looks at, below the current directory."""
    clock = FakeClock(datetime(2025, 3, 14, 9, 0, tzinfo=UTC))
    async with StatePersistenceManager(tmp_path / "state", clock=clock) as manager:
        memory = {"topic": "write-ahead logs", "words": 1834}
        alice = {
            "agent_id": "alice",
            "agent_type": "researcher",
            "context": {"working_memory": memory},
            "status": "active",
        }
        await manager.save_agent_state("alice", alice)
        bob = {"agent_id": "bob", "agent_type": "writer", "status": "sleeping"}
        await manager.save_agent_state("bob", bob)
        outline = task_rules.new_task("outline", "bob", "write an outline", {}, now=clock.now())
        outline = task_rules.claim(outline, "9f2c", clock.now())
        outline = task_rules.complete(outline, {"sections": 4}, clock.now())
        await manager.save("tasks", ("bob", "outline"), outline)
        await clock.advance(3600)
        papers = task_rules.new_task(
            "papers", "alice", "read papers", {}, now=clock.now(), priority="high"
        )
        papers = task_rules.claim(papers, "9f2c", clock.now())
        papers = papers.model_copy(update={"progress": {"read": 3}})
        await manager.save("tasks", ("alice", "papers"), papers)
        summary = task_rules.new_task("summary", "alice", "summarise", {}, now=clock.now())
        await manager.save("tasks", ("alice", "summary"), summary)
        question = mail_rules.new_message(
            "m1", "bob", "alice", subject="how far are you?", body="", now=clock.now()
        )
        await manager.save("mail", ("alice", "m1"), question)
        sleep = sleep_rules.fall_asleep(
            "bob", now=clock.now(), seconds=36000, wake_on=["mail_received"]
        )
        await manager.save_sleep_state("bob", sleep)
        await manager.append("system", "events", {"event": "system_event", "data": {"build": 12}})
        times = dict.fromkeys(("created_at", "updated_at", "last_activity"), stamp(clock.now()))
        session = {
            "session_id": "4f1c09ab",
            "user_id": "zoe",
            "status": "active",
            "ttl_seconds": 3600,
            "expires_at": stamp(clock.now() + timedelta(hours=1)),
            **times,
        }
        await manager.save("sessions", ("4f1c09ab",), session)
        talk = {"agent_type": "writer", "messages": [{"role": "user", "content": "hello"}]}
        await manager.save("conversations", ("4f1c09ab", "writer"), talk)
    await _record_a_conversation(tmp_path / "state")
    _leave_ancestor(tmp_path / "old")
    shutil.copytree(ROOT / "examples/recordings", tmp_path / "examples/recordings")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AGENT_STATE_DIR", raising=False)
    return tmp_path


def _leave_ancestor(root: Path) -> None:
    """What the first manager wrote of an agent called carol."""
    for name, body in {
        "agents/carol.json": {"agent_id": "carol", "status": "waiting", "_version": "1.0"},
        "tasks/carol_tasks.json": {
            "agent_id": "carol",
            "pending_tasks": [{"id": "t1", "type": "analysis"}, {"id": "t2"}],
            "_version": "1.0",
        },
        "tasks/dave_tasks.json": {"agent_id": "dave", "pending_tasks": "t3", "_version": "1.0"},
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(body))


async def _record_a_conversation(state: Path) -> None:
    """What alice and bob said to each other; a day later the live log became a segment."""
    clock = FakeClock(datetime(2025, 3, 14, 9, 30, tzinfo=UTC))

    def say(number: int, speaker: str, context: str, content: str) -> dict[str, str]:
        return {
            "message_id": f"m{number}",
            "sender_id": speaker,
            "context_id": context,
            "content": content,
        }

    with RecordWriter(state, clock=clock) as writer:
        question = say(1, "alice", "storage", "Where should the search index be kept?")
        writer.write([question])
        await clock.advance(40)
        writer.write([question])  # a repeat: it is not recorded
        proposal = "I propose an architecture with one SQLite file per agent."
        writer.write([say(2, "bob", "storage", proposal)])
        await clock.advance(75)
        writer.write([say(3, "alice", "storage", "Agreed. Decision: SQLite, one file per agent.")])
        await clock.advance(5)
        writer.write([b"not a message"], source="tcp://127.0.0.1:5557")
        writer.checkpoint("decided")
        await clock.advance(86400)
        writer.write([say(4, "bob", "index", "Index deployed to postgres://bob:hunter2@db")])
        await clock.advance(20)
        blocked = "Tests fail: the index is empty. Blocked until the build is done."
        writer.write([say(5, "alice", "index", blocked)])
        await clock.advance(300)
        writer.write([say(6, "bob", "index", "Fixed: the build is done and all tests pass.")])


COMMANDS = dict(commands_of(app))


def test_every_command_and_option_is_documented() -> None:
    absent = {path[0] for path, _ in commands_of(app, absent=True) if len(path) == 1}
    found = {name for name in SECTIONS if " " not in name}
    assert found == {path[0] for path in COMMANDS} | absent
    for path, command in COMMANDS.items():
        words = [" ".join(path[:length]) for length in range(1, len(path) + 1)]
        section = "".join(SECTIONS.get(name, "") for name in words)
        assert words[-1] in SECTIONS or re.search(rf"`{words[-1]}[` ]", section), words[-1]
        for parameter in command.params:
            option = parameter.opts[0]
            if option.startswith("-"):
                assert re.search(rf"`{option}[` ]", section), f"{words[-1]} {option}"


def test_every_command_is_shown_with_its_output() -> None:
    elsewhere = (*SHOWN_BY_HAND, *SHOWN_ELSEWHERE)
    run_here = {" ".join(path) for path in COMMANDS if not " ".join(path).startswith(elsewhere)}

    for words in run_here:
        assert any(f"{command} ".startswith(f"agent-state {words} ") for _, command, _ in SHOWN), (
            words
        )
    for words in SHOWN_BY_HAND:
        assert re.search(rf"^\$ agent-state .*\b{words}", SECTIONS[words], re.MULTILINE), words


def _comparable(text: str, here: Path) -> list[str]:
    text = text.replace(str(here), "/srv/app")
    text = re.sub(r"\d+\.\d+ s\b", "0.00 s", text)
    text = re.sub(r"since \d+ d\b", "since 600 d", text)
    text = re.sub(r"\d+\.\d KiB in \d+ files", "9.9 KiB in 99 files", text)
    text = re.sub(r"20(?:2[6-9]|[3-9]\d)-\d\d-\d\dT[\d:]{8}Z", "2026-12-01T07:00:00Z", text)
    text = re.sub(r"\b[0-9a-f]{12}-[0-9a-f]{10}\b", "01a22f278d84-234f2a1cf9", text)
    text = re.sub(r"analytics_report_\d{8}_\d{6}", "analytics_report_20250316_090000", text)
    text = re.sub(r"\d{8}-\d{6}-\d{6}_friday", "20250314-120000-000000_friday", text)
    return [line.rstrip() for line in text.strip().splitlines() if line.strip()]


def test_the_document_shows_what_the_commands_print(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    state, before = directory / "state", directory / "before"
    assert SHOWN
    for _, block in groupby(SHOWN, key=itemgetter(0)):
        shutil.copytree(state, before)
        for _, command, output in block:
            alice = state / "agents/alice.json"
            whole = alice.read_bytes()
            if command.endswith(DAMAGED):
                alice.write_bytes(whole[:40])

            run(shlex.split(command.removesuffix(DAMAGED))[1:])

            if command.endswith(DAMAGED):
                alice.write_bytes(whole)
            printed = capsys.readouterr()
            assert _comparable(printed.out + printed.err, directory) == _comparable(
                output, directory
            ), command
        if command.removeprefix("agent-state ").startswith(UNDONE):
            shutil.rmtree(state)
            before.rename(state)
        else:
            shutil.rmtree(before)
