"""The commands by noun: what they list and show, and what they change on a directory at rest."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

from agent_state import AgentRuntime, StatePersistenceManager, Task, TaskContext
from agent_state.cli.app import app
from tests.cli.commands import Call, assert_one_line_of_error, commands_of
from tests.deadlines import until

NOUNS = ("agents", "tasks", "mail", "sleep", "sessions", "conversations", "logs", "quarantine")


def document(state: Path, path: str) -> Any:
    return json.loads((state / path).read_text())


# -- every command -----------------------------------------------------------------------------


COMMANDS = dict(commands_of(app))


@pytest.mark.parametrize("noun", NOUNS)
def test_every_noun_lists_and_shows(noun: str) -> None:
    assert {(noun, "ls"), (noun, "show")} <= COMMANDS.keys()


@pytest.mark.parametrize(
    "path",
    [path for path in COMMANDS if path[0] != "git"],  # docs/cli.md has the examples of git
    ids=" ".join,
)
def test_every_command_has_an_example_that_its_parser_takes(path: tuple[str, ...]) -> None:
    command = COMMANDS[path]
    words = " ".join(path)

    [example] = re.findall(r"^Example: agent-state (.+)$", command.help or "", re.MULTILINE)

    assert example == words or example.startswith(f"{words} ")
    known = {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
    for option in re.findall(r"(?<!\S)--[a-z-]+", example):
        assert option in known, option


def test_one_word_is_one_option_everywhere() -> None:
    """An option of several commands has one short form and one sort of value in all of them."""
    found: dict[str, set[object]] = {}
    for command in COMMANDS.values():
        for each in command.params:
            if each.param_type_name == "option":
                for name in each.opts:
                    found.setdefault(name, set()).add((each.is_flag, tuple(each.opts)))

    assert {name: kinds for name, kinds in found.items() if len(kinds) > 1} == {}
    assert "--last" not in found


def test_completion_is_an_option_of_the_whole_command_alone(call: Call) -> None:
    assert "--install-completion" in call("--help").out
    for noun in NOUNS:
        assert "--install-completion" not in call(noun, "--help").out


@pytest.mark.parametrize(
    "path",
    [path for path in COMMANDS if path[0] in NOUNS and path[-1] in {"ls", "show"}],
    ids=" ".join,
)
def test_a_command_that_looks_makes_no_directory(
    path: tuple[str, ...], call: Call, tmp_path: Path
) -> None:
    missing = tmp_path / "misspelt"
    arguments = ["x"] if path[-1] == "show" else []

    called = call(*path, *arguments, "--state", missing)

    assert called.code == 2
    assert_one_line_of_error(called, "no such state directory")
    assert not missing.exists()


@pytest.fixture
async def talked(state: Path) -> Path:
    """A directory with a session and a conversation, too."""
    async with StatePersistenceManager(state) as manager:
        when = "2026-11-01T09:00:00Z"
        times = dict.fromkeys(("created_at", "updated_at", "last_activity", "expires_at"), when)
        session = {"session_id": "s1", "user_id": "zoe", "ttl_seconds": 60, **times}
        await manager.save("sessions", ("s1",), session)
        await manager.save("conversations", ("s1", "writer"), {"agent_type": "writer"})
    return state


# -- looking -----------------------------------------------------------------------------------


def test_agents_are_listed_and_shown_as_without_the_noun(state: Path, call: Call) -> None:
    for options in ((), ("--json",)):
        listed = call("agents", "ls", "--state", state, *options)
        shown = call("agents", "show", "alice", "--state", state, *options)
        assert (listed.code, shown.code) == (0, 0)
        assert listed.out == call("ls", "--state", state, *options).out
        assert shown.out == call("show", "alice", "--state", state, *options).out


@pytest.mark.parametrize(
    ("noun", "listed", "ident", "field"),
    [
        ("mail", ["alice/m1", "alice/m2"], "alice/m1", ("subject", "hi")),
        ("sleep", ["alice"], "alice", ("agent_id", "alice")),
        ("sessions", ["s1"], "s1", ("user_id", "zoe")),
        ("conversations", ["s1/writer"], "s1/writer", ("agent_type", "writer")),
    ],
)
def test_documents_are_listed_and_shown_by_their_noun(
    talked: Path, call: Call, noun: str, listed: list[str], ident: str, field: tuple[str, str]
) -> None:
    state = talked
    table = call(noun, "ls", "--state", state)
    found = call(noun, "ls", "--state", state, "--json").json()
    first = call(noun, "ls", "--state", state, "--json", "--limit", 1).json()
    shown = call(noun, "show", ident, "--state", state, "--json").json()

    assert table.out.startswith(f"{noun}: {len(listed)} document")
    assert ["/".join(each["key"]) for each in found["documents"]] == listed
    assert ["/".join(each["key"]) for each in first["documents"]] == listed[:1]
    assert (found["kind"], shown["path"].split("/")[0]) == (noun, noun)
    assert shown["state"][field[0]] == field[1]
    assert f'"{field[0]}": "{field[1]}"' in call(noun, "show", ident, "--state", state).out


def test_a_noun_of_which_there_is_nothing_is_empty_and_no_error(state: Path, call: Call) -> None:
    called = call("sessions", "ls", "--state", state)

    assert (called.code, called.err) == (0, "")
    assert called.out == "sessions: 0 documents, 0 logs\n"
    assert_one_line_of_error(call("sessions", "show", "s1", "--state", state), "sessions/s1")


def test_logs_of_all_kinds_are_listed_and_their_newest_records_shown(
    state: Path, call: Call
) -> None:
    table = call("logs", "ls", "--state", state)
    listed = call("logs", "ls", "--state", state, "--json").json()
    shown = call("logs", "show", "system/events", "--limit", 2, "--state", state, "--json").json()

    assert re.search(r"system +events +30 +system/events.jsonl", table.out)
    assert [(log["kind"], log["key"], log["last"]) for log in listed["logs"]] == [
        ("system", ["events"], 30)
    ]
    assert [(each["seq"], each["record"]["number"]) for each in shown["records"]] == [
        (29, 28),
        (30, 29),
    ]
    assert '"number": 29' in call("logs", "show", "system/events", "--state", state).out


def test_a_document_is_no_log(state: Path, call: Call) -> None:
    called = call("logs", "show", "agents/alice", "--state", state)

    assert called.code == 2
    assert_one_line_of_error(called, "is a document, and no log")


# -- agents, at rest ----------------------------------------------------------------------------


def test_a_sleeper_is_woken(state: Path, call: Call) -> None:
    woken = call("agents", "wake", "alice", "Bob", "--state", state)

    assert (woken.code, woken.out) == (0, "1 agent woken\nBob was awake before\n")
    assert not (state / "sleep/alice.json").exists()
    again = call("agents", "wake", "alice", "--state", state, "--json").json()
    assert again == {"changed": [], "unchanged": ["alice"], "refused": {}}


def test_agents_are_stopped_and_started_and_what_cannot_be_is_said(state: Path, call: Call) -> None:
    stopped = call("agents", "stop", "alice", "Bob", "nobody", "--state", state)

    assert (stopped.code, stopped.out) == (1, "1 agent stopped\nBob was stopped before\n")
    assert stopped.err == "agent-state: not stopped: nobody: no such agent\n"
    assert document(state, "agents/alice.json")["status"] == "stopped"
    started = call("agents", "start", "alice", "--state", state, "--json")
    assert (started.code, started.json()["changed"]) == (0, ["alice"])
    assert document(state, "agents/alice.json")["status"] == "idle"


async def test_an_agent_that_was_stopped_at_rest_does_no_task_until_it_is_started(
    tmp_path: Path, call: Call
) -> None:
    state, done = tmp_path / "state", []

    def made() -> AgentRuntime:
        runtime = AgentRuntime(state)

        @runtime.handler("reader")
        async def read(_ctx: TaskContext, task: Task) -> None:
            done.append(task.agent_id)

        return runtime

    async def called(*args: str) -> None:
        assert (await asyncio.to_thread(call, *args, "--state", state)).code == 0

    async with made() as runtime:
        await runtime.agents.create("ann", agent_type="reader")
        await runtime.agents.create("bob", agent_type="reader")
    await called("agents", "stop", "ann")
    await called("tasks", "submit", "ann", "read")
    await called("tasks", "submit", "bob", "read")
    async with made():
        await until(lambda: done)
    assert done == ["bob"]
    await called("agents", "start", "ann")
    async with made():
        await until(lambda: len(done) == 2)
    assert done == ["bob", "ann"]


# -- mail and tasks, at rest --------------------------------------------------------------------


def test_a_message_is_sent(state: Path, call: Call) -> None:
    sent = call("mail", "send", "Bob", "figures", "--body", "see them", "--state", state)

    path = sent.out.removeprefix("sent: ").strip()
    [file] = (state / "mail").glob("*ob/*.json")
    stored = json.loads(file.read_text())
    assert path == f"mail/Bob/{stored['message_id']}"
    assert (stored["from_agent"], stored["subject"], stored["body"], stored["status"]) == (
        "operator", "figures", "see them", "unread",
    )  # fmt: skip
    options = ("--json-body", "--from", "alice", "--priority", "urgent", "--json")
    report = call(
        "mail", "send", "Bob", "more", "--body", '{"n": [1]}', *options, "--state", state
    ).json()
    message = report["message"]
    assert (message["body"], message["from_agent"]) == ({"n": [1]}, "alice")
    assert message["priority"] == "urgent"


def test_a_message_to_nobody_is_kept_and_said(state: Path, call: Call) -> None:
    for options in ((), ("--json",)):
        sent = call("mail", "send", "alise", "figures", *options, "--state", state)
        assert sent.code == 0
        assert "'alise', an agent that does not exist" in sent.err
        assert "alice" in sent.err
    assert len([*(state / "mail" / "alise").glob("*.json")]) == 2
    assert call("mail", "send", "alice", "figures", "--state", state).err == ""


def test_a_task_is_queued(state: Path, call: Call) -> None:
    queued = call(
        "tasks", "submit", "alice", "index", "--payload", '{"doc": "two words"}',
        "--priority", "high", "--delay", "5m", "--max-attempts", 7, "--state", state, "--json",
    )  # fmt: skip

    task = queued.json()["task"]
    stored = document(state, f"tasks/alice/{task['task_id']}.json")
    assert (stored["name"], stored["payload"], stored["status"]) == (
        "index", {"doc": "two words"}, "pending",
    )  # fmt: skip
    assert (stored["priority"], stored["max_attempts"]) == ("high", 7)
    assert stored["not_before"] > stored["created_at"]
    assert call("tasks", "submit", "alice", "x", "--state", state).out.startswith(
        "queued: tasks/alice/"
    )


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("tasks", "submit", "alise", "x"), "no such agent"),
        (("tasks", "submit", "alice", "x", "--payload", "{"), "--payload: not JSON"),
        (("tasks", "submit", "alice", "x", "--payload", "[1]"), "payload"),
        (("tasks", "submit", "alice", "x", "--priority", "highest"), "priority"),
        (("tasks", "submit", "alice", "x", "--delay", "soon"), "is not a time such as"),
        (("mail", "send", "Bob", "s", "--body", "x", "--json-body"), "--body: not JSON"),
        (("mail", "send", "Bob", "s", "--priority", "7"), "priority"),
        (("agents", "wake"), "Missing argument"),
    ],
)
def test_what_cannot_be_stored_is_refused_and_nothing_is(
    state: Path, call: Call, args: tuple[str, ...], said: str
) -> None:
    before = sorted(path for path in state.rglob("*.json"))

    called = call(*args, "--state", state)

    assert called.code == 2
    assert_one_line_of_error(called, said)
    assert sorted(path for path in state.rglob("*.json")) == before


@pytest.mark.parametrize(
    "args",
    [
        ("agents", "wake", "alice"),
        ("mail", "send", "alice", "hi"),
        ("tasks", "submit", "alice", "x"),
        ("quarantine", "drop", "x"),
    ],
)
def test_a_command_that_changes_makes_no_directory(
    tmp_path: Path, call: Call, args: tuple[str, ...]
) -> None:
    called = call(*args, "--state", tmp_path / "misspelt")

    assert called.code == 2
    assert_one_line_of_error(called, "no such state directory")
    assert not (tmp_path / "misspelt").exists()
