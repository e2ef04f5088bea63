"""Summarizes the parts of a log in child processes, which read and write JSON lines.

``concurrent.futures`` does not fit: a spawned worker runs the caller's main module again, and does
not start at all if that came from standard input. A child here imports only this library.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any, BinaryIO, Self

import orjson

from agent_state.clock import instant, stamp
from agent_state.errors import AgentStateError, storage_error
from agent_state.storage import logs
from agent_state_integrations.recorder import formats
from agent_state_integrations.recorder.analytics.summary import LARGEST, LogSummary
from agent_state_integrations.recorder.analytics.summary_builder import SummaryBuilder
from agent_state_integrations.recorder.copies import LEFT_OUT, CopyIndex
from agent_state_integrations.recorder.formats import PIECE, AnyFormat
from agent_state_integrations.recorder.lines import LineParser, SkippedLines, uncollected
from agent_state_integrations.recorder.rules import Rules, rules_of

_AHEAD = 2
"""Parts that each child is given, so that it has the next one when it is done."""
_MOST = 64
"""Parts under way at most: summaries that wait for an earlier one."""
PROGRAM = f"from {__name__} import work; work()"
"""The program of a child process."""


@dataclass(frozen=True, slots=True)
class LogPart:
    """A part of a log: a file, or of a plain file the lines that begin in a range of its bytes."""

    number: int
    path: Path
    format: AnyFormat
    received: datetime
    """The time for lines that name none."""
    file: BinaryIO | None = None
    """The open file, which may be renamed or removed in the meantime. Closed when done."""
    start: int = 0
    end: int = 0
    """0: all of the file."""
    copies: CopyIndex | None = None
    """Where there are copies in it: it is summed up in this process."""

    def inode(self) -> int:
        return 0 if self.file is None else os.fstat(self.file.fileno()).st_ino

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def summarize_part(part: LogPart, rules: Rules, limit: int = LARGEST) -> LogSummary:
    """The summary of a part. Raises as ``formats.batches``."""
    fold = SummaryBuilder(
        rules, LineParser(part.path, part.received, SkippedLines()), part.number, limit
    )
    file = part.file or formats.open_file(part.path)
    if part.end:
        found = formats.split(_pieces(file.fileno(), part))
    else:
        found = formats.batches(file, part.path, part.format)
    if part.copies is not None:
        found = part.copies.without_copies(part.path, found)
    with uncollected():
        for batch in found:
            fold.add([line for line in batch if line is not LEFT_OUT] if part.copies else batch)
    return fold.summary


def _pieces(fd: int, part: LogPart) -> Iterator[bytes]:
    try:
        for offset in range(part.start, part.end, PIECE):
            yield logs.pread(fd, offset, min(PIECE, part.end - offset))
    except OSError as error:
        raise storage_error(error, "reading a log", path=part.path) from error


def summarise(parts: Iterable[LogPart], rules: Rules, workers: int) -> LogSummary:
    """The summary of all parts, merged in their order. ``workers``: this process, and children.

    Only so many parts are under way that memory does not grow with their number. A part whose
    child died is done here, again.
    """
    total = LogSummary()
    children = workers - 1 if sys.executable else 0
    under_way: deque[tuple[LogPart, Future[LogSummary]]] = deque()
    with _WorkerPool(children, rules) as crew, ThreadPoolExecutor(max(1, children)) as threads:
        try:
            for part in parts:
                limit = total.sample.limit
                busy = sum(not future.done() for _, future in under_way)
                if busy < children * _AHEAD and part.copies is None:
                    under_way.append((part, threads.submit(crew.sum_up, part, limit)))
                    continue
                done: Future[LogSummary] = Future()
                under_way.append((part, done))
                done.set_result(summarize_part(part, rules, limit))
                while under_way and (len(under_way) > _MOST or under_way[0][1].done()):
                    _merge_next(under_way, total)
            while under_way:
                _merge_next(under_way, total)
        finally:
            for part, future in under_way:
                if not future.cancel():
                    wait([future])
                part.close()
    return total


def _merge_next(under_way: deque[tuple[LogPart, Future[LogSummary]]], total: LogSummary) -> None:
    part, future = under_way.popleft()
    try:
        total.merge(future.result())
    finally:
        part.close()


class _WorkerPool:
    """The children. Each is started when there is work for it, and does one part at a time."""

    def __init__(self, size: int, rules: Rules) -> None:
        self._rules = rules
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes] | None] = queue.SimpleQueue()
        self._children: list[subprocess.Popen[bytes]] = []
        for _ in range(size):
            self._idle.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()
            child.kill()
            child.wait()

    def sum_up(self, part: LogPart, limit: int) -> LogSummary:
        """The summary of a part, made by a child."""
        child = self._idle.get()
        try:
            if child is None or child.poll() is not None:
                child = self._started()
            answer = _request(child, part, limit)
        finally:
            self._idle.put(child)
        if answer is None:
            return summarize_part(part, self._rules, limit)
        return LogSummary.from_object(answer)

    def _started(self) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(  # noqa: S603  # this Python, and a module of ours
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self._children.append(child)
        _write(child.stdin, self._rules.content)
        return child


def _request(child: subprocess.Popen[bytes], part: LogPart, limit: int) -> dict[str, Any] | None:
    """The child's answer; None when it has none: the file is another, an error, or it died."""
    question = {
        "number": part.number,
        "path": str(part.path),
        "format": part.format,
        "received": stamp(part.received),
        "inode": part.inode(),
        "limit": limit,
        "range": [part.start, part.end] if part.end else None,
    }
    try:
        _write(child.stdin, question)
        answer = child.stdout.readline() if child.stdout is not None else b""
        return dict(orjson.loads(answer)) if answer not in (b"", b"null\n") else None
    except (OSError, orjson.JSONDecodeError):
        child.kill()
        return None


def _write(pipe: IO[bytes] | None, value: object) -> None:
    if pipe is not None:
        pipe.write(orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE))
        pipe.flush()


def _answer(question: dict[str, Any], rules: Rules) -> dict[str, Any] | None:
    """The requested summary; None on an error, which the parent finds again and raises."""
    path, kind = Path(question["path"]), question["format"]
    number, received = question["number"], instant(question["received"])
    limit = question["limit"]
    with suppress(AgentStateError, OSError):
        if question["range"] is None:
            return summarize_part(LogPart(number, path, kind, received), rules, limit).to_object()
        with formats.open_file(path) as file:
            part = LogPart(number, path, kind, received, file, *question["range"])
            if part.inode() == question["inode"]:
                return summarize_part(part, rules, limit).to_object()
    return None


def work() -> None:
    """The main function of a child: answer requests until its input ends."""
    with suppress(BrokenPipeError, KeyboardInterrupt):
        rules = rules_of(orjson.loads(sys.stdin.buffer.readline()))
        for question in iter(sys.stdin.buffer.readline, b""):
            _write(sys.stdout.buffer, _answer(orjson.loads(question), rules))
