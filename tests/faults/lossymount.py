"""A lossy file system that is mounted, and the process that serves it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SERVER = Path(__file__).with_name("lossyfs.py")
HONEST: dict[str, Any] = {
    "fail_at": 0,
    "fail_call": "",
    "lies": "",
    "slow": 0.0,
    "short": 0,
    "room": -1,
    "links": True,
}
WAYS = ("all", "metadata", "some")
"""What a cut takes: all that was not synced, only data, or some of it in any order."""


class Lossy:
    """The mounted file system. Trees are its top folders; each has a name of its own."""

    def __init__(self, root: Path, server: subprocess.Popen[str]) -> None:
        self.root = root
        self._server = server
        self._number = 0

    def _tell(self, do: str, *args: object, **values: object) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        line = {"do": do, "args": args, "values": values}
        self._server.stdin.write(json.dumps(line) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, "the file system's process is gone"
        return json.loads(answer)

    def set(self, **values: object) -> None:
        """What goes wrong from now on."""
        self._tell("set", **values)

    def heal(self) -> None:
        """From now on nothing does."""
        self.set(**HONEST)

    def counts(self) -> dict[str, int]:
        """The calls since this was last asked."""
        counts: dict[str, int] = self._tell("counts")
        return counts

    def template(self, name: str, origin: Path) -> None:
        """Copy a directory there, to be copied from, all of it on the disk."""
        if origin.exists():
            shutil.copytree(origin, self.root / name)
            self._tell("settle", name)

    def tree(self, template: str) -> Path:
        """A fresh copy of a template; nothing is there if that was nothing."""
        to = self._fresh()
        self._tell("copy", template, to.name)
        return to

    def cut(self, tree: Path, how: str = "all", seed: int = 0) -> Path:
        """The power is cut: what is left of a tree."""
        to = self._fresh()
        self._tell("cut", tree.name, to.name, how, seed)
        return to

    def remove(self, *trees: Path) -> None:
        for tree in trees:
            self._tell("remove", tree.name)

    def _fresh(self) -> Path:
        # Never the same name twice: the kernel may remember what it led to.
        self._number += 1
        return self.root / f"tree-{self._number}"


def why_not() -> str | None:
    """What is missing for a mount."""
    if importlib.util.find_spec("mfusepy") is None:
        return "needs the package mfusepy (pip install 'agent-state[faults]')"
    if shutil.which("fusermount3") is None:
        return "needs fusermount3 (apt install fuse3)"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "needs /dev/fuse to be there, and readable and writable"
    return None


@contextmanager
def mounted(folder: Path, *, folds: bool = False) -> Iterator[Lossy]:
    """A lossy file system in that folder, which is made; unmounted at the end, whatever happens.

    ``folds``: names are told apart as on a Mac. Skips the test where it cannot be mounted.
    """
    if (missing := why_not()) is not None:
        pytest.skip(missing)
    folder.mkdir()
    log = folder.with_suffix(".log")
    caches = [] if folds else ["caches"]  # the kernel's memory of names would not fold
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            [sys.executable, str(SERVER), str(folder), *caches],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as server,
    ):
        try:
            deadline = time.monotonic() + 60
            while not folder.is_mount():
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline, "not mounted within 30 s"
                time.sleep(0.01)
            lossy = Lossy(folder, server)
            lossy.set(folds=folds)
            yield lossy
        finally:
            subprocess.run(["fusermount3", "-u", "-z", str(folder)], check=False)
            server.kill()
