"""Real processes whose system calls are traced, killed or failed by strace.

One process has imported everything and forks a child for each job; strace is attached to it, so
that nothing but the job itself runs under it. That process itself reads and writes its commands
by ``recv`` and ``send``, and forks and waits: calls that are never tampered with.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Self

import pytest

from agent_state import clock
from agent_state.errors import AgentStateError
from agent_state.manager import StatePersistenceManager
from tests.faults.attempts import attempt
from tests.faults.ledger import STORES, make_store
from tests.faults.operations import OPERATIONS

REPOSITORY = Path(__file__).parents[2]
SECONDS = 120.0

OPENING = ("openat",)
WRITING = ("write", "pwrite64", "writev", "ftruncate")
SYNCING = ("fsync", "fdatasync", "syncfs")
NAMING = (
    *("rename", "renameat", "renameat2", "link", "linkat"),
    *("unlink", "unlinkat", "rmdir", "mkdir", "mkdirat"),
)
LOCKING = ("flock", "fcntl")
TRACED = (*OPENING, *WRITING, *SYNCING, *NAMING, *LOCKING, "lseek", "close")

needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None, reason="strace is not installed (Debian package: strace)"
)


@contextlib.contextmanager
def memory_folder() -> Iterator[Path]:
    """A folder in memory, where there is one: thousands of directories are made in it."""
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=shared if shared.is_dir() else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


# -- the process that forks ----------------------------------------------------------------------

THEN = " then "
"""Between two operations that are done one after the other, with one store."""

FAILED = 3
"""How a child exits whose operation raised an error of ours."""


def serve(connection: socket.socket, prepare: Callable[[], object]) -> None:
    """Fork a child for each job that comes, and say how it ended."""
    _let_others_trace()
    prepare()
    deadline = time.monotonic() + SECONDS
    while threading.active_count() > 1:  # those of the watcher take their time
        assert time.monotonic() < deadline, "a process with threads should not fork"
        time.sleep(0.01)
    gc.collect()
    gc.freeze()
    connection.send(b"ready\n")
    waiting = b""
    while received := connection.recv(65536):
        *lines, waiting = (waiting + received).split(b"\n")
        for line in lines:
            child = os.fork()
            if child == 0:
                _be_child(json.loads(line))
            _, status = os.waitpid(child, 0)
            connection.send(f"{status}\n".encode())


def _let_others_trace() -> None:
    """Where only descendants may be traced (Yama), this says that everybody may."""
    set_ptracer, anybody = 0x59616D61, ctypes.c_ulong(-1)
    ctypes.CDLL(None).prctl(set_ptracer, anybody, 0, 0, 0)


def _be_child(job: list[str]) -> None:
    status = 1
    try:
        kind, name, root, ledger, salt = job
        _make_names_repeatable(salt)
        if THEN in name:
            asyncio.run(_perform_all(kind, name.split(THEN), root, ledger))
            status = 0
        else:
            wrong = attempt(kind, name, Path(root), Path(ledger))
            status = 0 if wrong is None else FAILED
    finally:
        os._exit(status)


def _make_names_repeatable(salt: str) -> None:
    """The same names of files in every run: strace is told by them where to strike."""
    numbers = count(1)

    def token_hex(size: int) -> str:
        return hashlib.sha256(f"{salt} {next(numbers)}".encode()).hexdigest()[: 2 * size]

    moments = count(1_800_000_000_000_000_000, 1_000_000)
    secrets.token_hex = token_hex  # type: ignore[assignment]  # sizes are always given
    times = SimpleNamespace(monotonic=time.monotonic, time_ns=lambda: next(moments))
    clock.time = times  # type: ignore[assignment, attr-defined]  # all that is used of it


async def _perform_all(kind: str, names: Sequence[str], root: str, ledger: str) -> None:
    store = make_store(kind, root)
    store.ledger = os.open(ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    async with StatePersistenceManager(store=store) as manager:
        for name in names:
            with contextlib.suppress(AgentStateError):  # nothing there to be put aside
                await OPERATIONS[name].run(manager)


def _warm_up() -> None:
    """What is imported when it is first needed is imported here."""
    for kind in STORES:
        for name in ("group", "cleanup", "runtime: a task"):
            folder = Path(tempfile.mkdtemp())
            with contextlib.suppress(AgentStateError):
                attempt(kind, name, folder / "state", folder / "ledger")
            shutil.rmtree(folder)


class Forking:
    """Such a process, seen from outside."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.tracing", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd=REPOSITORY,
                stderr=subprocess.DEVNULL,
            )
        ours.settimeout(SECONDS)
        self._socket = ours
        self._answers = ours.makefile("r")
        assert self._answers.readline() == "ready\n"

    def children(self) -> list[int]:
        """Who is at work now."""
        pid = self._process.pid
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]

    def close(self) -> None:
        self._answers.close()
        self._socket.close()
        self._process.wait(timeout=SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, kind: str, name: str, root: Path, ledger: Path, salt: str = "") -> int:
        """Let a child do it; how the child ended, as ``os.waitpid`` says it.

        ``salt``: with another one, the child's files have other names.
        """
        job = [kind, name, str(root), str(ledger), salt]
        self._socket.sendall(json.dumps(job).encode() + b"\n")
        return int(self._answers.readline())

    @contextlib.contextmanager
    def traced(self, output: Path, *options: str) -> Iterator[None]:
        """Whatever runs within is traced into that file, with these options of strace."""
        command = ["strace", "-f", "-qq", "-y", "-o", str(output), *options]
        pid = self._process.pid
        tracer = subprocess.Popen([*command, "-p", str(pid)], stderr=subprocess.PIPE)
        try:
            self._await_tracer(tracer, pid)
            yield
        finally:
            tracer.send_signal(signal.SIGINT)
            tracer.communicate(timeout=SECONDS)

    def _await_tracer(self, tracer: subprocess.Popen[bytes], pid: int) -> None:
        while f"TracerPid:\t{tracer.pid}\n" not in Path(f"/proc/{pid}/status").read_text():
            if tracer.poll() is not None:
                assert tracer.stderr is not None
                said = tracer.stderr.read().decode(errors="replace").strip()
                if "not permitted" in said:
                    pytest.skip("this system lets no process be traced (ptrace)")
                raise AssertionError(f"strace ended: {said}")
            time.sleep(0.0005)


# -- what strace writes ----------------------------------------------------------------------------

_LINE = re.compile(
    r"(\d+) +(?:(?P<name>[\w?]+)\((?P<args>.*)|<\.\.\. (?P<resumed>[\w?]+) resumed>(?P<rest>.*)"
    r"|\+\+\+ (?P<end>.*) \+\+\+|--- .*)"
)
_UNFINISHED = re.compile(r"\s*<unfinished \.\.\.>$")
_RESULT = re.compile(r"\s*\)\s+= (-?\d+|\?|0x[0-9a-f]+)(<[^>]*>)?.*$")
_ESCAPE = re.compile(r"\\x([0-9a-f]{2})")
_STRING = re.compile(r'"([^"]*)"')
_DESCRIPTOR = re.compile(r"(\d+)<([^>]*)>")


@dataclass
class Call:
    """One system call. ``began`` and ``ended`` count lines; ``result`` is None if it has none.

    ``last``: the process was killed when it was about to make it.
    """

    thread: int
    name: str
    args: str
    began: int
    ended: int = -1
    result: int | None = None
    last: bool = False

    @property
    def strings(self) -> list[bytes]:
        """The arguments in quotes: paths, and what is written."""
        return [unescaped(text) for text in _STRING.findall(self.args)]

    @property
    def descriptor(self) -> tuple[int, str]:
        """The first argument, if that is a descriptor, and the path it stands for."""
        found = _DESCRIPTOR.match(self.args)
        assert found is not None, self
        return int(found[1]), os.fsdecode(unescaped(found[2]))

    @property
    def paths(self) -> list[str]:
        """Which files it is about."""
        if self.name in NAMING or self.name in OPENING:
            return [os.fsdecode(text) for text in self.strings]
        found = _DESCRIPTOR.match(self.args)
        return [] if found is None else [os.fsdecode(unescaped(found[2]))]


def unescaped(text: str) -> bytes:
    if "\\" not in text:
        return text.encode()
    if len(text) % 4 == 0 and text.count("\\x") * 4 == len(text):
        return bytes.fromhex(text.replace("\\x", ""))
    return _ESCAPE.sub(lambda hexed: chr(int(hexed[1], 16)), text).encode("latin-1")


def read_trace(output: Path) -> list[Call]:
    """All calls, in the order in which they began."""
    calls: list[Call] = []
    open_calls: dict[int, Call] = {}
    for number, line in enumerate(output.read_text(errors="surrogateescape").splitlines()):
        found = _LINE.fullmatch(line)
        assert found is not None, f"strace wrote {line[:200]!r}"
        thread = int(found[1])
        if found["name"]:
            args = found["args"]
            call = Call(thread, found["name"], args, number)
            calls.append(call)
            if _UNFINISHED.search(args):
                call.args = _UNFINISHED.sub("", args)
                open_calls[thread] = call
            else:
                _end(call, args, number)
        elif found["resumed"]:
            call = open_calls.pop(thread)
            _end(call, call.args + found["rest"], number)
    return calls


def _end(call: Call, text: str, number: int) -> None:
    result = _RESULT.search(text)
    if result is None:
        call.args = text
        return
    call.args = text[: result.start()]
    call.last = result[1] == "?"
    if not call.last:
        call.ended, call.result = number, int(result[1], 0)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), _warm_up)
