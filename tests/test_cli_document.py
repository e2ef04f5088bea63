"""docs/cli.md shows each command with its real output; here both are compared."""

from __future__ import annotations

import re
import shlex
from datetime import UTC, datetime
from pathlib import Path

import pytest
import typer

from agent_state import StatePersistenceManager
from agent_state import mail as mail_rules
from agent_state import sleep as sleep_rules
from agent_state import tasks as task_rules
from agent_state.cli.app import app, run
from agent_state.testing import FakeClock

DOCUMENT = (Path(__file__).parent.parent / "docs/cli.md").read_text(encoding="utf-8")
SECTIONS = dict(
    re.findall(r"^## `agent-state (\w+).*?`\n(.*?)(?=^## |\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)
)
SHOWN = [
    (command, output)
    for block in re.findall(r"^```console\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
    for command, output in re.findall(
        r"^\$ (.*?)\n(.*?)(?=^\$ |\Z)", block, re.MULTILINE | re.DOTALL
    )
    if command.startswith("agent-state ")
    and not command.startswith(("agent-state demo", "agent-state mirror", "agent-state serve"))
]

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
        outline = task_rules.claim(outline, "9f2c", clock.now(), 60)
        outline = task_rules.complete(outline, {"sections": 4}, clock.now())
        await manager.save("tasks", ("bob", "outline"), outline)
        await clock.advance(3600)
        papers = task_rules.new_task(
            "papers", "alice", "read papers", {}, now=clock.now(), priority="high"
        )
        papers = task_rules.claim(papers, "9f2c", clock.now(), 60)
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
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AGENT_STATE_DIR", raising=False)
    return tmp_path


def test_every_command_and_option_is_documented() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]

    assert set(commands) == set(SECTIONS)
    for name, command in commands.items():
        for part in getattr(command, "commands", {name: command}).values():
            for parameter in part.params:
                option = parameter.opts[0]
                if option.startswith("-"):
                    assert f"`{option}" in SECTIONS[name], f"{name} {option}"


def test_every_command_is_shown_with_its_output() -> None:
    shown = {command.split()[1] for command, _ in SHOWN}

    # tests/redis/test_mirror_cli.py and tests/web run the commands that need, or are, a server
    assert shown == set(SECTIONS) - {"demo", "mirror", "serve"}
    assert "$ agent-state demo" in SECTIONS["demo"]


def _comparable(text: str, here: Path) -> list[str]:
    text = text.replace(str(here), "/srv/app")
    text = re.sub(r"\d+\.\d+ s\b", "0.00 s", text)
    return [line.rstrip() for line in text.strip().splitlines() if line.strip()]


def test_the_document_shows_what_the_commands_print(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert SHOWN
    for command, output in SHOWN:
        alice = directory / "state/agents/alice.json"
        whole = alice.read_bytes()
        if command.endswith(DAMAGED):
            alice.write_bytes(whole[:40])

        run(shlex.split(command.removesuffix(DAMAGED))[1:])

        alice.write_bytes(whole)

        printed = capsys.readouterr()
        assert _comparable(printed.out + printed.err, directory) == _comparable(
            output, directory
        ), command
