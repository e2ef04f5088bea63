"""Run a test as a user without privileges, also when root runs the suite."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def as_nobody(*paths: Path) -> Iterator[None]:
    """Run the block as the user `nobody`, who owns ``paths``; a no-op unless root runs it."""
    root = os.geteuid() == 0
    if root:
        for path in paths:
            for each in (path, *path.rglob("*")):
                os.chown(each, 65534, 65534, follow_symlinks=False)
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@contextmanager
def reachable_folder() -> Iterator[Path]:
    """A directory that every user can enter, unlike pytest's ``tmp_path``; removed at the end."""
    path = Path(tempfile.mkdtemp(prefix="agent-state-"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        for each in (path, *path.rglob("*")):
            if not each.is_symlink():
                each.chmod(0o700)
        shutil.rmtree(path)
