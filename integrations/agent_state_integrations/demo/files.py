"""The files that the team reads."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from agent_state_integrations.demo.analysis import MARKDOWN, Analysis, analyse

MOST_FILES = 200
_MOST_BYTES = 1024 * 1024
_MOST_LISTED = 20_000
_SKIPPED = {"__pycache__", "node_modules", "venv", "build", "dist"}


def text_files(folder: Path, without: Path) -> list[str]:
    """The folder's own text files, sorted, as relative paths with ``/``; none below ``without``.

    They are the files that git lists; outside of git, those that are neither hidden nor installed.
    If there are more than 200, Markdown files are preferred.
    """
    candidates = list(islice(_listed(folder), _MOST_LISTED))
    candidates.sort(key=lambda path: (not path.lower().endswith(MARKDOWN), path))
    found = (
        path
        for path in candidates
        if without not in (folder / path).parents and _is_text(folder / path)
    )
    return sorted(islice(found, MOST_FILES))


def read_and_analyse(folder: Path, path: str) -> Analysis:
    """Read and analyse one file. A file that was removed counts as empty."""
    try:
        text = (folder / path).read_bytes().decode("utf-8", "replace")
    except FileNotFoundError:
        text = ""  # the proof reports that the folder has changed
    return analyse(text, path, lambda target: (folder / target).exists())


def fingerprint(folder: Path, files: list[str]) -> dict[str, str]:
    """A digest of each file; the empty text for a missing one."""
    return {path: _digest(folder / path) for path in files}


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def _listed(folder: Path) -> Iterator[str]:
    names = _known_to_git(folder)
    if not names:  # no git, no repository, or an ignored folder
        yield from _walked(folder)
    for name in names:
        with contextlib.suppress(UnicodeDecodeError):  # a message cannot hold such a name
            yield name.decode()


def _known_to_git(folder: Path) -> list[bytes]:
    git = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(git, capture_output=True, check=False)  # noqa: S603  # no shell
    except OSError:
        return []
    return sorted(set(done.stdout.split(b"\0")) - {b""}) if done.returncode == 0 else []


def _walked(folder: Path) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED and name[0] != ".")
        for name in sorted(names):
            path = Path(parent, name).relative_to(folder).as_posix()
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
