"""The walk of a newcomer: the server of docs/runtime.md, killed, deployed, and put right."""

from __future__ import annotations

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

pytestmark = pytest.mark.long("starts a server five times, and a command line some more")


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
        """What a command of the page answers, as JSON."""
        assert command in COMMANDS
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

    def tasks(self) -> list[dict[str, Any]]:
        """The files of the tasks, oldest first."""
        files = (self.folder / "state" / "tasks" / "ann").glob("*.json")
        found = [json.loads(path.read_text()) for path in files]
        return sorted(found, key=lambda task: task["created_at"])

    async def sees(self, condition: Callable[[list[dict[str, Any]]], object]) -> None:
        """Look at the files until they are so."""
        await until(lambda: bool(self.tasks()) and bool(condition(self.tasks())))


def waits_for_the_model(tasks: list[dict[str, Any]]) -> bool:
    steps = tasks[-1].get("steps", {})
    return steps.get("count", {}).get("result") is not None and "ask" in steps


async def test_the_server_of_the_tutorial_does_what_the_page_says(tmp_path: Path) -> None:
    newcomer = Newcomer(tmp_path)
    handlers = BLOCKS["handlers.py"]
    newcomer.write("handlers.py", handlers)
    newcomer.write("server.py", BLOCKS["server.py"])

    with newcomer.serving("Agents must not forget") as server:
        await newcomer.sees(waits_for_the_model)
        [task] = newcomer.run("agent-state tasks ls")
        assert (task["name"], task["status"]) == ("summarise", "in_progress")
        assert newcomer.tasks()[0]["steps"]["count"]["result"] == 4
        assert newcomer.tasks()[0]["steps"]["ask"]["status"] == "started"
        server.kill()

    newcomer.write("answer", "about memory\n")
    with newcomer.serving():
        await newcomer.sees(lambda tasks: tasks[0]["status"] == "completed")
        assert "1 of them re-queued" in newcomer.log.read_text()
        [task] = newcomer.run("agent-state tasks ls")
        assert (task["attempts"], task["status"]) == (2, "completed")
        assert newcomer.tasks()[0]["result"] == "4 words, about memory"
        assert '"summaries": 1' in json.dumps(newcomer.run("agent-state show ann"))

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
        [dead] = newcomer.run("agent-state tasks ls --dead")
        assert "InvalidPayloadError" in dead["error"]
        assert "doc: Field required" in dead["error"]
        log = newcomer.log.read_text()
        assert "ERROR" in log
        assert "doc: Field required" in log

    migrated = BLOCKS["handlers.py, in the place of summarise"]
    newcomer.write("handlers.py", handlers + renamed + migrated)
    with newcomer.serving():
        newcomer.run("agent-state tasks retry --dead")
        await newcomer.sees(lambda tasks: tasks[1]["status"] == "completed")
        assert newcomer.run("agent-state tasks ls --dead") == []
        assert newcomer.tasks()[1]["result"] == "3 words"
