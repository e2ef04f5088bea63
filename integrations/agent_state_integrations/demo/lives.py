"""One server after the other: started, watched, killed at a random moment, started again."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import IO, Any, NamedTuple

import agent_state
from agent_state.errors import AgentStateError
from agent_state_integrations.demo.team import Job

PATIENCE_SECONDS = 60.0
_EARLY_SECONDS = (0.05, 0.8)
_EARLY_SHARE = 0.25
_LOG_LINES = 12


class Moment(NamedTuple):
    """When to kill: so many seconds after so many new things were stored, or after the start."""

    stored: int | None
    delay: float


@dataclass(slots=True)
class Stored:
    """What servers have said they stored, by kind: (whose, id). They say it after the ack."""

    tasks: set[tuple[str, str]] = field(default_factory=set)
    mail: set[tuple[str, str]] = field(default_factory=set)
    read: set[tuple[str, str]] = field(default_factory=set)

    def note(self, event: dict[str, Any]) -> None:
        if event["event"] == "task":
            self.tasks.add((event["agent"], event["id"]))
        elif event["event"] in ("mail", "read"):
            self.mail.add((event["to"], event["id"]))
            if event["event"] == "read":
                self.read.add((event["to"], event["id"]))

    def total(self) -> int:
        return len(self.tasks) + len(self.mail)


@dataclass(slots=True)
class Life:
    """One server from its start to its end. ``restored``: its report; None if it never came."""

    number: int
    pid: int
    restored: dict[str, Any] | None = None
    seconds: float = 0.0
    killed: bool = False
    tasks: int = 0
    """Queued so far, by this and all earlier servers; the same for ``read``."""
    read: int = 0
    in_journal: int = 0
    """Changes in the journal when it was killed; not all of them were in their files."""


def moments(kills: int, files: int, pause: float, random: Random) -> list[Moment]:
    """When to kill. The first is in the middle of work; a later one may hit the restart itself."""
    total = 3 * files
    chosen = []
    for number in range(kills):
        low = total * (0.05 + 0.85 * number / kills)
        high = total * (0.05 + 0.85 * (number + 1) / kills)
        if number > 0 and random.random() < _EARLY_SHARE:
            chosen.append(Moment(None, random.uniform(*_EARLY_SECONDS)))
        else:
            chosen.append(Moment(round(random.uniform(low, high)), random.uniform(0.0, pause)))
    return chosen


class Server:
    """A server process and what it says."""

    def __init__(self, job: Job, log: IO[bytes]) -> None:
        # -P: modules in the folder that happens to be the current one are not ours to run.
        command = [sys.executable, "-P", "-m", "agent_state_integrations.demo.server"]
        for name in ("folder", "state", "report", "pause"):
            command += [f"--{name}", str(getattr(job, name))]
        self._process = subprocess.Popen(  # noqa: S603  # our own program, no shell
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=_environment(),
        )
        self.pid = self._process.pid
        self._said: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None  # noqa: S101  # asked for above
        for line in self._process.stdout:
            # The kill may have torn the last line; what it says counts as never said.
            with contextlib.suppress(json.JSONDecodeError):
                self._said.put(json.loads(line))
        self._said.put(None)

    def hear(self, timeout: float) -> dict[str, Any] | None:
        """The next event, None at the end. Raises ``queue.Empty`` when nothing was said."""
        return self._said.get(timeout=max(0.0, timeout))

    def kill(self) -> None:
        """SIGKILL: no handler runs, no buffer is flushed, nothing is said good-bye to."""
        self._process.kill()

    def end(self) -> int:
        """Wait for the process and let go of it; its exit code."""
        code = self._process.wait()
        self._listener.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        return code


def _environment() -> dict[str, str]:
    """The environment in which the server finds the same library as this process did."""
    home = str(Path(agent_state.__file__).parent.parent)
    paths = [path for path in (os.environ.get("PYTHONPATH"),) if path]
    if home not in sys.path[1:]:  # found by way of the current folder
        paths.append(home)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


class Lives:
    """All servers of one run. ``stored`` is what they have acknowledged together."""

    def __init__(self, job: Job, log_path: Path, tell: Callable[[Life, Stored], None]) -> None:
        self._job = job
        self._log_path = log_path
        self._tell = tell
        self._deadline = time.monotonic() + PATIENCE_SECONDS
        self.stored = Stored()

    def run(self, plan: list[Moment]) -> Iterator[Life]:
        """Each life as it ends; the last one ends by itself, with the work done.

        Raises ``AgentStateError`` when a server fails by itself, or takes for ever.
        """
        waiting = list(plan)
        number = 0
        while True:
            number += 1
            moment = waiting.pop(0) if waiting else None
            life = self._live(number, moment)
            yield life
            if not life.killed:
                return

    def _live(self, number: int, moment: Moment | None) -> Life:
        with self._log_path.open("ab") as log:
            server = Server(self._job, log)
        life = Life(number, server.pid)
        began = time.monotonic()
        try:
            done = self._watch(server, life, moment, began)
        except BaseException:
            server.kill()
            server.end()
            raise
        code = server.end()
        life.seconds = time.monotonic() - began
        life.tasks, life.read = len(self.stored.tasks), len(self.stored.read)
        if not life.killed and (code != 0 or not done):
            raise AgentStateError(f"the server ended by itself, with code {code}: {self._log()}")
        return life

    def _watch(self, server: Server, life: Life, moment: Moment | None, began: float) -> bool:
        """Follow a server to its end, and kill it when its moment has come; whether it was done."""
        done = False
        when = None
        if moment is not None and moment.stored is None:
            when = began + moment.delay
        while True:
            until = self._deadline if when is None or life.killed else when
            try:
                event = server.hear(until - time.monotonic())
            except queue.Empty:
                if until == self._deadline:
                    raise AgentStateError(
                        f"the team is not done after {PATIENCE_SECONDS:g} s: {self._log()}"
                    ) from None
                # Between the last word and the kill it may have finished; then nothing is killed.
                life.killed = not done
                server.kill()
                continue
            if event is None:
                return done
            done = done or event["event"] == "done"
            if event["event"] == "restored":
                life.restored = event["report"]
            self.stored.note(event)
            self._tell(life, self.stored)
            reached = moment is not None and self.stored.total() >= (moment.stored or 0)
            if moment is not None and when is None and reached:
                when = time.monotonic() + moment.delay

    def _log(self) -> str:
        lines = self._log_path.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return " / ".join(lines) or "it said nothing"
