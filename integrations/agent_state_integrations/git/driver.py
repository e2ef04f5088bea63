"""git's merge driver: ``python -I -S driver.py BASE OURS THEIRS PATH STATE [PREFER]``.

It writes the merged version over OURS. Exit code 0: merged; 1: a conflict, which OURS holds as
valid JSON with our values, and which is listed on stderr and in a note below ``.runtime``. git
starts it once for each file, so it imports next to nothing: ``posix`` is a part of the interpreter,
and ``os`` a file.
"""

from __future__ import annotations

import posix
import sys

HERE = __file__.rpartition("/")[0] or "."


def main(base: str, ours: str, theirs: str, *where: str) -> int:
    """Merge one file; the exit code."""
    path, state, prefer = (*where, "completed")[:3]
    if HERE not in sys.path:
        sys.path.insert(0, HERE)
    merge_rules = __import__("merge_rules")  # beside this file; nothing is installed here

    note = f"{state}/.runtime/conflicts/{path.replace('%', '%25').replace('/', '%2f')}"
    # First: git takes a driver that died for one that left a conflict, with nothing in the file.
    _write_note(state, note, "the merge driver did not finish")
    try:
        outcome = merge_rules.merge(path, _read(base), _read(ours), _read(theirs), prefer=prefer)
    except merge_rules.UnmergeableError as error:
        _tell(state, note, path, [str(error)])
        return 1
    with open(ours, "wb") as file:  # noqa: PTH123  # ``pathlib`` takes longer than the merge
        file.write(outcome.data)
    for line in outcome.told:
        sys.stderr.write(f"{path}: {line}\n")
    if outcome.conflicts:
        _tell(state, note, path, outcome.conflicts)
        return 1
    try:  # noqa: SIM105  # ``contextlib`` takes longer to import than the merge takes
        posix.unlink(note)
    except FileNotFoundError:
        pass  # there is no state directory: in a bare repository
    return 0


def _tell(state: str, note: str, path: str, conflicts: list[str]) -> None:
    _write_note(state, note, "\n".join(conflicts))
    for line in conflicts:
        sys.stderr.write(f"{path}: CONFLICT {line}\n")


def _read(path: str) -> bytes:
    with open(path, "rb") as file:  # noqa: PTH123
        return file.read()


def _write_note(state: str, note: str, text: str) -> None:
    try:
        with open(note, "w", encoding="utf-8") as file:  # noqa: PTH123
            file.write(text + "\n")
    except FileNotFoundError:
        import os

        # In a bare repository there is no worktree to leave a note in.
        if os.path.isdir(state) or not os.path.isdir("refs"):  # noqa: PTH112
            os.makedirs(note.rpartition("/")[0], mode=0o700, exist_ok=True)  # noqa: PTH103
            _write_note(state, note, text)


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stderr.flush()
    # Everything is in its file: taking the interpreter down takes a sixth of its whole life.
    posix._exit(code)  # noqa: SLF001  # its public name, ``os._exit``, costs the import of ``os``
