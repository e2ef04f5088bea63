"""Which files the team reads, and how one is read."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from agent_state.demo.analysis import MARKDOWN, Analysis, analyse

MOST_FILES = 200
_MOST_BYTES = 1024 * 1024
_SKIPPED = {"__pycache__", "node_modules", "venv", "build", "dist"}


def text_files(folder: Path, without: Path) -> list[str]:
    """The folder's own text files, sorted, relative, with ``/``; none below ``without``.

    Own means what git would list, or, outside of git, what is neither hidden nor installed.
    Of more than 200, Markdown comes first.
    """
    found = []
    for path in _listed(folder):
        full = folder / path
        if without not in full.parents and _is_text(full):
            found.append(path)
    found.sort(key=lambda path: (not path.lower().endswith(MARKDOWN), path))
    return sorted(found[:MOST_FILES])


def read_and_analyse(folder: Path, path: str) -> Analysis:
    """Read one file and say what is in it."""
    text = (folder / path).read_bytes().decode("utf-8", "replace")
    return analyse(text, path, lambda target: (folder / target).exists())


def fingerprint(folder: Path, files: list[str]) -> dict[str, str]:
    """A digest of each file; the empty text for one that is gone."""
    return {path: _digest(folder / path) for path in files}


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def _listed(folder: Path) -> Iterator[str]:
    git = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(git, capture_output=True, check=False)  # noqa: S603  # no shell
    except OSError:  # there is no git
        yield from _walked(folder)
        return
    if done.returncode != 0:
        yield from _walked(folder)
        return
    for name in sorted(set(done.stdout.split(b"\0")) - {b""}):
        try:
            yield name.decode()
        except UnicodeDecodeError:
            continue  # such a name cannot be mailed


def _walked(folder: Path) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED and name[0] != "."]
        for name in names:
            path = os.path.relpath(os.path.join(parent, name), folder).replace(os.sep, "/")
            if name[0] != "." and path.isprintable():
                yield path


def _is_text(path: Path) -> bool:
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > _MOST_BYTES:
            return False
        data = path.read_bytes()
        data.decode()
    except (OSError, UnicodeDecodeError):
        return False
    return bool(data.strip()) and b"\0" not in data
