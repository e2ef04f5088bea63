"""The walk of a newcomer: the servers of docs/runtime.md, killed, deployed, and put right."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agent_state import (
    AgentRuntime,
    RateLimit,
    RetryPolicy,
    TaskContext,
    TaskFilter,
)
from agent_state.runtime import AgentService, MailService, TaskService
from agent_state.runtime.handlers import HandlerOptions
from tests.deadlines import until

PAGE = (Path(__file__).parents[2] / "docs" / "runtime.md").read_text(encoding="utf-8")
_, _, _REST = PAGE.partition("## A server, step by step")
TUTORIAL, _, _ = _REST.partition("\n## ")
BLOCKS = dict(re.findall(r"^```python\n# (.*?)\n(.*?)^```", TUTORIAL, re.MULTILINE | re.DOTALL))
COMMANDS = {
    line.partition("#")[0].strip()
    for text in re.findall(r"^```sh\n(.*?)^```", TUTORIAL, re.MULTILINE | re.DOTALL)
    for line in text.splitlines()
}

OFFICE = Path(__file__).with_name("office.py").read_text(encoding="utf-8")
"""A server with every option that the page names."""


class Newcomer:
    """Who has the page, an empty directory, and two shells."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "server.log"

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, encoding="utf-8")

    @contextmanager
    def serving(self, *texts: str) -> Iterator[subprocess.Popen[bytes]]:
        """The server in its shell; its log is in a file."""
        with self.log.open("wb") as log:
            server = subprocess.Popen(
                [sys.executable, "server.py", *texts], cwd=self.folder, stderr=log
            )
        try:
            yield server
        finally:
            if server.poll() is None:
                server.send_signal(signal.SIGTERM)
            server.wait(60)

    def run(self, command: str) -> Any:
        """What a command answers, as JSON."""
        program = [
            sys.executable,
            "-m",
            *shlex.split(command.replace("agent-state", "agent_state")),
        ]
        done = subprocess.run(
            [*program, "--json"], cwd=self.folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def follow(self, command: str) -> Any:
        """What a command of the tutorial answers, as JSON."""
        assert command in COMMANDS
        return self.run(command)

    def diary(self) -> list[str]:
        """The lines that the second server has written."""
        diary = self.folder / "diary"
        return diary.read_text().splitlines() if diary.exists() else []

    def tasks(self, agent: str = "ann") -> list[dict[str, Any]]:
        """The files of the tasks, oldest first."""
        files = (self.folder / "state" / "tasks" / agent).glob("*.json")
        found = [json.loads(path.read_text()) for path in files]
        return sorted(found, key=lambda task: task["created_at"])

    async def sees(self, condition: Callable[[list[dict[str, Any]]], object]) -> None:
        """Look at the files until they are so."""
        await until(lambda: bool(self.tasks()) and bool(condition(self.tasks())))


def waits_for_the_model(tasks: list[dict[str, Any]]) -> bool:
    steps = tasks[-1].get("steps", {})
    return steps.get("count", {}).get("result") is not None and "ask" in steps


@pytest.mark.timeout(900)
@pytest.mark.long("starts a server five times, and a command line some more")
async def test_the_server_of_the_tutorial_does_what_the_page_says(tmp_path: Path) -> None:
    newcomer = Newcomer(tmp_path)
    handlers = BLOCKS["handlers.py"]
    newcomer.write("handlers.py", handlers)
    newcomer.write("server.py", BLOCKS["server.py"])

    with newcomer.serving("Agents must not forget") as server:
        await newcomer.sees(waits_for_the_model)
        [task] = newcomer.follow("agent-state tasks ls")
        assert (task["name"], task["status"]) == ("summarise", "in_progress")
        assert newcomer.tasks()[0]["steps"]["count"]["result"] == 4
        assert newcomer.tasks()[0]["steps"]["ask"]["status"] == "started"
        server.kill()

    newcomer.write("answer", "about memory\n")
    with newcomer.serving():
        await newcomer.sees(lambda tasks: tasks[0]["status"] == "completed")
        assert "1 of them re-queued" in newcomer.log.read_text()
        [task] = newcomer.follow("agent-state tasks ls")
        assert (task["attempts"], task["status"]) == (2, "completed")
        assert newcomer.tasks()[0]["result"] == "4 words, about memory"
        assert '"summaries": 1' in json.dumps(newcomer.follow("agent-state show ann"))

    (tmp_path / "answer").unlink()
    with newcomer.serving("Nor must servers") as server:
        await newcomer.sees(lambda tasks: len(tasks) == 2 and waits_for_the_model(tasks))
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    assert newcomer.tasks()[1]["status"] == "pending"

    renamed = BLOCKS["handlers.py, in the place of Article and summarise"]
    newcomer.write("handlers.py", handlers + renamed)
    with newcomer.serving():
        await newcomer.sees(lambda tasks: tasks[1]["status"] == "dead")
        [dead] = newcomer.follow("agent-state tasks ls --dead")
        assert "InvalidPayloadError" in dead["error"]
        assert "doc: Field required" in dead["error"]
        log = newcomer.log.read_text()
        assert "ERROR" in log
        assert "doc: Field required" in log

    migrated = BLOCKS["handlers.py, in the place of summarise"]
    newcomer.write("handlers.py", handlers + renamed + migrated)
    with newcomer.serving():
        newcomer.follow("agent-state tasks retry --dead")
        await newcomer.sees(lambda tasks: tasks[1]["status"] == "completed")
        assert newcomer.follow("agent-state tasks ls --dead") == []
        assert newcomer.tasks()[1]["result"] == "3 words"


@pytest.mark.timeout(900)
@pytest.mark.long("starts a server twice, and a command line some more")
async def test_every_option_of_the_page_does_in_a_server_what_it_says(tmp_path: Path) -> None:
    newcomer = Newcomer(tmp_path)
    newcomer.write("server.py", OFFICE)

    def noted(*lines: str) -> bool:
        return all(line in newcomer.diary() for line in lines)

    def status(command: str) -> list[str]:
        return [task["status"] for task in newcomer.run(f"agent-state tasks ls {command}")]

    with newcomer.serving() as server:
        await until(lambda: noted("restored: 4", "mail: an invoice", "a digest for dora"))
        await until(lambda: noted("the third call is late"))
        await until(lambda: "has run for" in newcomer.log.read_text())
        assert "in until_there_is" in newcomer.log.read_text()  # where it waits
        newcomer.write("signature", "")
        await until(lambda: noted("dead: refuse", "dead: hang", "low", "watched: refuse dead"))
        diary = newcomer.diary()
        assert diary.index("high") < diary.index("low")
        assert diary.count("failed: hang TimeoutError") == 2
        assert diary.count("failed: refuse PermissionError") == 1
        stamps = [line.partition(":") for line in diary if "stamp" in line or "back" in line]
        assert [what for what, _, _ in stamps] == ["takes the stamp", "gives it back"] * 4
        assert "ignores its cancellation" in newcomer.log.read_text()
        await until(lambda: any(task.get("result") for task in newcomer.tasks("bob")))
        [report] = newcomer.run("agent-state tasks ls --name report --agent bob")
        assert (report["result"], report["attempts"]) == ("Dear Ann (en)", 1)
        assert '"sleeping"' in json.dumps(newcomer.run("agent-state show dora"))
        server.kill()
    # Nobody runs, so this is queued without the handler: of version 1, which is migrated.
    queued = newcomer.run('agent-state tasks submit bob write --payload \'{"text": "Hello"}\'')
    ident = queued["task"]["task_id"]

    def result() -> Any:
        return newcomer.run(f"agent-state tasks show {ident}")["task"].get("result")

    with newcomer.serving() as server:
        await until(lambda: newcomer.diary().count("restored: 4") == 2)
        assert newcomer.diary().count("calls") == 2  # what was used before the kill counts
        await until(lambda: newcomer.diary().count("the third call is late") == 2)
        assert status("--name call --oldest") == ["completed", "completed", "pending"]
        newcomer.run("agent-state mail send dora hello")
        await until(lambda: noted("wakes, cheerful"))

        await until(lambda: result() == "Hello (en)")

        dead = "--dead --error expired --older-than 0s --newer-than 30d"
        counted = newcomer.run(f"agent-state tasks retry {dead} --dry-run")
        assert (counted["matched"], counted["changed"]) == (1, 0)
        assert newcomer.run(f"agent-state tasks retry {dead}")["changed"] == 1
        await until(lambda: newcomer.diary().count("failed: refuse PermissionError") == 2)
        await until(lambda: status("--name refuse") == ["dead"])
        assert newcomer.run("agent-state tasks cancel --name call")["changed"] == 1
        assert (
            newcomer.run("agent-state tasks delete --status cancelled --name call")["changed"] == 1
        )
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    assert status("--dead --name hang") == ["dead"]  # it is kept


def options() -> set[str]:
    """The names of what can be given to handlers, tasks, agents and a runtime."""
    calls = (
        AgentRuntime, AgentRuntime.task, AgentRuntime.schedule, RetryPolicy, RateLimit,
        AgentService.create, AgentService.sleep, MailService.send, MailService.reply,
        TaskService.submit, TaskService.result, TaskService.search, TaskService.retry_all,
        TaskContext.submit, TaskContext.result, TaskContext.results, TaskContext.sleep,
        TaskContext.take, TaskContext.send_mail, TaskContext.reply,
    )  # fmt: skip
    given = {
        each.name
        for call in calls
        for each in inspect.signature(call).parameters.values()
        if each.kind is each.KEYWORD_ONLY or each.default is not each.empty
    }
    internal = {"sender", "sent_by"}
    return (
        given | HandlerOptions.__annotations__.keys() | TaskFilter.model_fields.keys()
    ) - internal


def keywords(program: str) -> set[str]:
    """The names of the arguments that a program gives."""
    calls = [node for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Call)]
    return {str(keyword.arg) for call in calls for keyword in call.keywords}


def test_every_option_that_the_page_names_is_used_in_a_program_that_is_run() -> None:
    prose = re.sub(r"^```.*?^```", "", PAGE, flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", prose)))) & options()
    programs = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    parts = [each for each in programs if each.startswith("async for")]  # of a program
    used = set[str]().union(*map(keywords, [OFFICE, *(set(programs) - {*parts})]))
    walk = Path(__file__).read_text(encoding="utf-8")
    used |= {name for name in TaskFilter.model_fields if f"--{name.split('_')[0]}" in walk}

    assert HandlerOptions.__annotations__.keys() <= named
    assert named - used == set()
    assert (
        set(re.findall(r"--[a-z]+[a-z-]*", PAGE)) - set(re.findall(r"--[a-z]+[a-z-]*", walk))
        == set()
    )
