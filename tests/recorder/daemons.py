"""Real daemons for tests, each a process of its own on free ports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from agent_state_integrations.recorder.network.client import RecorderClient
from agent_state_integrations.recorder.network.wire import Context, Socket, zmq

FREE = "tcp://127.0.0.1:*"
PROGRAM = """
import sys
from agent_state.cli.app import app, run
from agent_state_integrations.recorder.commands.daemon import daemon
app.command("a-daemon")(daemon)
sys.exit(run(["a-daemon", *sys.argv[1:]]))
"""


class Daemon:
    """One daemon on one state directory. It can be killed, and started again on its ports."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.state = folder / "state"
        self.spool = folder / "spool"
        self._errors = folder / "daemon.err"
        self._options = options
        self.endpoints: dict[str, str] = {}
        self.process: subprocess.Popen[str] | None = None

    @property
    def pull(self) -> str:
        return self.endpoints["pull"]

    @property
    def ack(self) -> str:
        return self.endpoints["ack"]

    def start(self, **options: Any) -> None:
        """Start it; returns when it listens. On the same ports as before, if there was one."""
        ports = [
            "--pull",
            self.endpoints.get("pull", FREE),
            "--ack",
            self.endpoints.get("ack", FREE),
        ]
        with self._errors.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, "--state", str(self.state), *ports, *self._options],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                **options,
            )
        assert self.process.stdout is not None
        words = self.process.stdout.readline().replace(",", " ").split()
        assert words, self.errors()
        places = [n for n, word in enumerate(words) if "://" in word]
        self.endpoints |= {words[n - 1]: words[n] for n in places}

    def client(self, **options: Any) -> RecorderClient:
        given: dict[str, Any] = {"spool_dir": self.spool, "timeout_seconds": 20.0, **options}
        return RecorderClient(self.pull, self.ack, **given)

    def kill(self) -> None:
        """SIGKILL."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        return self._end(signal.SIGTERM)

    def _end(self, number: int) -> int:
        if self.process is None:
            return 0
        self.process.send_signal(number)
        code = self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.process = None
        return code

    def errors(self) -> str:
        return self._errors.read_text()

    def records(self) -> list[dict[str, Any]]:
        """Everything that is recorded, in order."""
        return lines_of(self.state / "record" / "current.jsonl")

    def ids(self) -> list[str]:
        return [record["Id"] for record in self.records()]

    def dead_letters(self) -> list[dict[str, Any]]:
        return lines_of(self.state / "record" / "dead-letter.jsonl")


def lines_of(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    return [orjson.loads(line) for line in whole.split(b"\n") if line]


@contextmanager
def running(folder: Path, *options: str, **start: Any) -> Iterator[Daemon]:
    folder.mkdir(exist_ok=True)
    daemon = Daemon(folder, *options)
    daemon.start(**start)
    try:
        yield daemon
    finally:
        daemon.kill()


def run_python(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Another process that runs this code, with this package."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


class Sockets:
    """Plain sockets, as any program has them."""

    def __init__(self) -> None:
        self._context: Context = zmq.Context()
        self._made: list[Socket] = []

    def connect(self, kind: int, endpoint: str) -> Socket:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.RCVTIMEO, 20_000)
        socket.setsockopt(zmq.LINGER, 5_000)
        socket.connect(endpoint)
        self._made.append(socket)
        return socket

    def close(self) -> None:
        """Returns when everything that was sent is out."""
        for socket in self._made:
            socket.close()
        self._context.term()
