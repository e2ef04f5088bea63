"""Runs one server after another: starts it, follows it, kills it at a random time."""

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

TIMEOUT_SECONDS = 60.0
_EARLY_SECONDS = (0.05, 0.8)
_EARLY_SHARE = 0.25
_LOG_LINES = 12


class KillTime(NamedTuple):
    """A kill: ``delay`` seconds after ``stored`` new ids were acknowledged.

    Without ``stored``: after the start of the server.
    """

    stored: int | None
    delay: float


@dataclass(slots=True)
class AcknowledgedIds:
    """The (agent, id) pairs that servers have reported, each after it was acknowledged."""

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
class ServerRun:
    """One run of a server. ``restored``: its restore report; None if it was killed before."""

    number: int
    pid: int
    restored: dict[str, Any] | None = None
    seconds: float = 0.0
    killed: bool = False
    tasks: int = 0
    """Tasks queued so far by this and all earlier runs; ``read``: the files read."""
    read: int = 0
    in_journal: int = 0
    """Changes in the journal after the kill; some of them are not in their files yet."""


def kill_times(kills: int, files: int, pause: float, random: Random) -> list[KillTime]:
    """The times of the kills. The first is during work; a later one may be during a restart."""
    total = 3 * files
    chosen = []
    for number in range(kills):
        low = total * (0.05 + 0.85 * number / kills)
        high = total * (0.05 + 0.85 * (number + 1) / kills)
        if number > 0 and random.random() < _EARLY_SHARE:
            chosen.append(KillTime(None, random.uniform(*_EARLY_SECONDS)))
        else:
            chosen.append(KillTime(round(random.uniform(low, high)), random.uniform(0.0, pause)))
    return chosen


class ServerProcess:
    """A server process and the events that it reports."""

    def __init__(self, job: Job, log: IO[bytes]) -> None:
        # -P: a module in the current folder must not be imported in place of ours.
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
        self._events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None  # noqa: S101  # asked for above
        for line in self._process.stdout:
            # The kill may have torn the last line; it counts as not reported.
            with contextlib.suppress(json.JSONDecodeError):
                self._events.put(json.loads(line))
        self._events.put(None)

    def next_event(self, timeout: float) -> dict[str, Any] | None:
        """The next event, None at the end. Raises ``queue.Empty`` after the timeout."""
        return self._events.get(timeout=max(0.0, timeout))

    def kill(self) -> None:
        """Send SIGKILL: no handler runs, and no buffer is flushed."""
        self._process.kill()

    def end(self) -> int:
        """Wait for the process to end, and close its pipes; its exit code."""
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
    if home not in sys.path[1:]:  # it was imported from the current folder
        paths.append(home)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


class ServerRuns:
    """The runs of one demo, until the work is done. ``stored``: the ids that they acknowledged."""

    def __init__(
        self, job: Job, log_path: Path, on_event: Callable[[ServerRun, AcknowledgedIds], None]
    ) -> None:
        self._job = job
        self._log_path = log_path
        self._on_event = on_event
        self._deadline = time.monotonic() + TIMEOUT_SECONDS
        self.stored = AcknowledgedIds()

    def run(self, plan: list[KillTime]) -> Iterator[ServerRun]:
        """Each run after its end; the last one ends without a kill, with the work done.

        Raises ``AgentStateError`` if a server fails without a kill, or is not done in time.
        """
        waiting = list(plan)
        number = 0
        while True:
            number += 1
            kill_time = waiting.pop(0) if waiting else None
            run = self._run_one(number, kill_time)
            yield run
            if not run.killed:
                return

    def _run_one(self, number: int, kill_time: KillTime | None) -> ServerRun:
        with self._log_path.open("ab") as log:
            server = ServerProcess(self._job, log)
        run = ServerRun(number, server.pid)
        began = time.monotonic()
        try:
            done = self._watch(server, run, kill_time, began)
        except BaseException:
            server.kill()
            server.end()
            raise
        code = server.end()
        run.seconds = time.monotonic() - began
        run.tasks, run.read = len(self.stored.tasks), len(self.stored.read)
        if not run.killed and (code != 0 or not done):
            raise AgentStateError(f"the server ended by itself, with code {code}: {self._log()}")
        return run

    def _watch(
        self, server: ServerProcess, run: ServerRun, kill_time: KillTime | None, began: float
    ) -> bool:
        """Follow a server to its end, and kill it at its time; whether its work was done."""
        done = False
        when = None
        if kill_time is not None and kill_time.stored is None:
            when = began + kill_time.delay
        while True:
            until = self._deadline if when is None or run.killed else when
            try:
                event = server.next_event(until - time.monotonic())
            except queue.Empty:
                if until == self._deadline:
                    raise AgentStateError(
                        f"the team is not done after {TIMEOUT_SECONDS:g} s: {self._log()}"
                    ) from None
                # It may have finished between its last event and the kill; then it was not killed.
                run.killed = not done
                server.kill()
                continue
            if event is None:
                return done
            done = done or event["event"] == "done"
            if event["event"] == "restored":
                run.restored = event["report"]
            self.stored.note(event)
            self._on_event(run, self.stored)
            reached = kill_time is not None and self.stored.total() >= (kill_time.stored or 0)
            if kill_time is not None and when is None and reached:
                when = time.monotonic() + kill_time.delay

    def _log(self) -> str:
        lines = self._log_path.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return " / ".join(lines) or "its log is empty"
