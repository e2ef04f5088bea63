"""What every adapter takes: a directory, an open manager, or a store."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from agent_state import MemoryStateStore, StatePersistenceManager

STATES = ("directory", "shared", "exclusive", "memory")
HOSTILE = ["", "..", "a/b", "a", "A", "con", "x" * 3000, "\u00e9", "e\u0301", "\0", "a.json", "a:b"]
"""Ids that are no file names; no two of them may meet."""


@asynccontextmanager
async def state_of(kind: str, directory: Path) -> AsyncIterator[Any]:
    """A directory, an open manager of shared or exclusive files, or a store in memory."""
    if kind == "directory":
        yield directory
    elif kind == "memory":
        yield MemoryStateStore()
    else:
        exclusive = kind == "exclusive"
        async with StatePersistenceManager(directory, exclusive=exclusive) as manager:
            yield manager


_WRITER = """
import asyncio, itertools, sys
from {module} import {name}
async def main():
    async with {name}{arguments} as it:
        for n in {numbers}:
{body}
            print(n, flush=True)
asyncio.run(main())
"""


def writer(adapter: type, *arguments: object, body: str, times: int | None = None) -> str:
    """A program that opens an adapter as ``it``, and runs ``body`` for each ``n``, and prints that.

    It does not end by itself unless it is given ``times``.
    """
    given = ", ".join(repr(os.fspath(x) if isinstance(x, Path) else x) for x in arguments)
    return _WRITER.format(
        module=adapter.__module__,
        name=adapter.__name__,
        arguments=f"({given})",
        numbers="itertools.count()" if times is None else f"range({times})",
        body=textwrap.indent(body.strip(), " " * 12),
    )


def kill_after_lines(program: str, count: int) -> list[str]:
    """Run a program until it has printed so many lines, kill it with SIGKILL; all its lines."""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(count)]
    os.kill(process.pid, signal.SIGKILL)
    lines += process.stdout.readlines()
    process.stdout.close()
    process.wait()
    return [line.rstrip("\n") for line in lines if line.endswith("\n")]


def run_at_once(program: str, count: int) -> None:
    """Run a program in so many processes at once, each with its number as its argument."""
    command, silent = [sys.executable, "-c", program], subprocess.DEVNULL
    processes = [subprocess.Popen([*command, str(n)], stdout=silent) for n in range(count)]
    assert [process.wait() for process in processes] == [0] * count


async def cancel_soon(work: Any) -> None:
    """Start a write and cancel it at once; it has been made, or not, when this returns."""
    writing = asyncio.create_task(work)
    await asyncio.sleep(0)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
