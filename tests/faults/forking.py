"""Processes made in a few milliseconds, since what they need is imported already."""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Coroutine
from multiprocessing.context import ForkServerContext
from typing import Any

from tests.faults.writing import ViolationError

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def forkserver() -> ForkServerContext:
    """Children are forked from a server that has imported everything, in a few milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "pytest", "tests.faults.storm"])
    return context


def in_child(work: Callable[[], Coroutine[Any, Any, object]]) -> None:
    """Run a coroutine in a forked process: the one that forks must have no threads.

    Raises the ``ViolationError`` that it raised.
    """
    reading, writing = os.pipe()

    def run() -> None:
        try:
            asyncio.run(work())
            os.write(writing, b"fine")
        except ViolationError as violation:
            os.write(writing, f"{violation.lost} {violation.unreadable} {violation}".encode())
        except BaseException:  # noqa: BLE001  # raised by the parent
            os.write(writing, f"0 0 {traceback.format_exc()}".encode())

    pid = fork(run)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(pid, 0)
    if said != "fine":
        lost, unreadable, what = said.split(" ", 2)
        raise ViolationError(what, lost=int(lost), unreadable=int(unreadable))


def fork(work: Callable[[], None]) -> int:
    """Run in a new process, which ends with its parent; its pid."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        die_with_parent()
        if os.getppid() == parent:
            work()
    finally:
        os._exit(0)


def die_with_parent() -> None:
    """Let the kernel kill this process when the one that forked it is no more."""
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
