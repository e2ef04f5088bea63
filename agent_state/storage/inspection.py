"""Looking at the bytes of a directory without touching them.

Logs line by line, what waits in the journal, what was put aside, what does not belong there.
Everything here blocks, takes no lock, and may meet a file that is being written this moment.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from agent_state.errors import (
    AgentStateError,
    InvalidKeyError,
    Key,
    StateCorruptedError,
    storage_error,
)
from agent_state.serializers import canonical, parse_object
from agent_state.storage import atomic, envelope, intents, journal, logs, paths, syscalls
from agent_state.storage.directory import JOURNAL, StateDirectory
from agent_state.storage.keeping import QUARANTINE

_CHUNK = 1 << 20
_NAMED = 10
"""So many line numbers are named of each kind of damage; the rest is only counted."""
_TORN_MAX = 1 << 20


@dataclass(slots=True)
class Lines:
    """Lines of one log that have something in common."""

    count: int = 0
    first: list[int] = field(default_factory=list)
    """The numbers of the first few, counted from 1."""

    def add(self, number: int) -> None:
        self.count += 1
        if len(self.first) < _NAMED:
            self.first.append(number)

    def __bool__(self) -> bool:
        return self.count > 0

    def __str__(self) -> str:
        named = ", ".join(str(number) for number in self.first)
        more = ", …" if self.count > len(self.first) else ""
        return f"line{'s' if self.count > 1 else ''} {named}{more}"


@dataclass(slots=True)
class LogCheck:
    """What a log holds, line by line."""

    records: int = 0
    unreadable: Lines = field(default_factory=Lines)
    changed: Lines = field(default_factory=Lines)
    """The checksum does not fit: a person, or another program, wrote the line."""
    disordered: Lines = field(default_factory=Lines)
    """The number is not above that of the line before."""
    gaps: Lines = field(default_factory=Lines)
    """A number was left out before this line, as an append that failed does."""
    torn: int = 0
    """Bytes after the last whole line that are no record; they were never acknowledged."""
    unended: bool = False
    """The last record lacks its newline; the next append adds it."""


def check_log(path: str) -> LogCheck:
    """Every line of a log, read in pieces. Raises ``StorageError``, ``StateCorruptedError``."""
    check = LogCheck()
    previous, number, rest = 0, 0, b""
    for chunk in _chunks(path):
        lines, rest = logs.split(chunk, rest)
        for line in lines:
            number += 1
            previous = _check_line(line, number, previous, check)
    if rest:
        try:
            parse_object(rest)
            check.unended = True
        except StateCorruptedError:
            check.torn = len(rest)
    return check


def _check_line(line: bytes, number: int, previous: int, check: LogCheck) -> int:
    try:
        content = parse_object(line)
    except StateCorruptedError:
        check.unreadable.add(number)
        return previous
    check.records += 1
    stated, seq = content.get("_crc"), content.get("_seq")
    if type(seq) is not int or seq <= 0:
        seq = previous + 1
    for name in logs.RESERVED:
        content.pop(name, None)
    if stated != logs.line_checksum(seq, canonical(content)):
        check.changed.add(number)
    if seq <= previous:
        check.disordered.add(number)
    elif seq > previous + 1 and not check.unreadable:
        check.gaps.add(number)
    return max(previous, seq)


def _chunks(path: str) -> Iterator[bytes]:
    try:
        fd = syscalls.open(path, syscalls.READ)
    except FileNotFoundError:
        return
    except OSError as error:
        raise storage_error(error, "opening a log", path=path) from error
    try:
        while chunk := syscalls.read(fd, _CHUNK):
            yield chunk
    except OSError as error:
        raise storage_error(error, "reading a log", path=path) from error
    finally:
        syscalls.close(fd)


@dataclass(slots=True)
class JournalCheck:
    """What waits in ``.journal/`` for the next start, or for its turn in a running server."""

    segments: int = 0
    records: int = 0
    changes: int = 0
    intents: int = 0
    """Groups that were recorded and not yet seen through."""
    torn: int = 0
    """Bytes at the ends that are no whole record; they were never acknowledged."""
    damaged: list[tuple[str, str]] = field(default_factory=list)
    """Relative path and reason."""


def check_journal(directory: StateDirectory) -> JournalCheck:
    """Segments and intents, read back."""
    check = JournalCheck()
    for path in journal.segments(f"{directory.root}/{JOURNAL}"):
        relative = directory.relative(path)
        try:
            segment = journal.read_segment(path)
        except AgentStateError as error:
            check.damaged.append((relative, error.message))
            continue
        check.segments += 1
        check.records += len(segment.records)
        check.changes += sum(len(record) for record in segment.records)
        check.torn += segment.torn
        if segment.damaged:
            reason = f"{segment.damaged} records cannot be read"
            check.damaged.append((relative, reason))
    for intent in intents.recorded(directory):
        if intent.damage:
            check.damaged.append((directory.relative(intent.path), intent.damage))
        elif intent.done:
            check.intents += 1
        else:  # torn: nothing of it was begun
            stamp = atomic.stat_file(intent.path)
            check.torn += stamp.size if stamp is not None else 0
    return check


@dataclass(frozen=True, slots=True)
class Kept:
    """One file that was put aside, and why. Paths are relative to the state directory."""

    path: str
    was: str | None
    reason: str
    at: str | None
    kind: str | None = None
    key: Key = ()


def quarantined(directory: StateDirectory) -> list[Kept]:
    """Everything in ``.quarantine/``, by path."""
    found = []
    suffix = ".reason.json"
    names = list(_files(f"{directory.root}/{QUARANTINE}"))
    known = set(names)
    for path in sorted(names):
        if atomic.TEMPORARY in path:
            continue
        if not path.endswith(suffix):
            if path + suffix not in known:
                kept = directory.relative(path)
                found.append(Kept(kept, None, "no reason is beside it", None))
            continue
        kept = path.removesuffix(suffix)
        note = _note(path)
        reason = str(note.get("reason") or "its reason cannot be read")
        if kept not in known:
            reason += " (announced, but the file was never put aside)"
        key = note.get("key")
        found.append(
            Kept(
                directory.relative(kept),
                _text(note.get("was")),
                reason,
                _text(note.get("at")),
                _text(note.get("kind")),
                tuple(str(part) for part in key) if isinstance(key, list) else (),
            )
        )
    return found


def _note(path: str) -> dict[str, Any]:
    try:
        found = atomic.read_file(path, limit=_TORN_MAX)
        return parse_object(found[0]) if found else {}
    except AgentStateError:
        return {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def temporaries(directory: StateDirectory) -> list[str]:
    """Temporary files, relative: what a dead writer left, or a live one is writing."""
    found = (
        directory.relative(path)
        for path in _files(directory.root)
        if os.path.basename(path).startswith(atomic.TEMPORARY)
    )
    return sorted(found)


class Stranger(NamedTuple):
    """Something among the documents that is none. ``hides``: documents may stand behind it."""

    path: str
    why: str
    hides: bool


def strangers(directory: StateDirectory) -> list[Stranger]:
    """What stands among the documents and is none, by relative path.

    Hidden files and files beside the kinds' folders (a README, say) are a person's own.
    """
    found: list[Stranger] = []
    for kind in directory.kinds():
        try:
            paths.check_kind(kind)
        except InvalidKeyError as error:
            found.append(Stranger(kind, error.message, hides=False))
            continue
        found.extend(_strangers(directory, f"{directory.root}/{kind}"))
    return sorted(found)


def _strangers(directory: StateDirectory, folder: str) -> Iterator[Stranger]:
    with syscalls.scandir(folder) as scan:
        entries = list(scan)
    for entry in entries:
        name = entry.name
        if name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _strangers(directory, entry.path)
        elif not name.endswith((paths.DOCUMENT, paths.LOG)):
            link = entry.is_symlink()
            why = "a symlink, which is not followed" if link else "neither a document nor a log"
            yield Stranger(directory.relative(entry.path), why, link)


def earlier_revision(directory: StateDirectory, kind: str, key: Key) -> int | None:
    """The revision of a document's snapshot, if there is a good one."""
    data = directory.snapshots.bytes_of(directory.path(kind, key))
    if data is None:
        return None
    try:
        return envelope.decode_document(kind, key, data)[0].revision
    except StateCorruptedError:
        return None


def _files(folder: str) -> Iterator[str]:
    for parent, _, names in os.walk(folder):
        for name in names:
            yield f"{parent}/{name}".replace(os.sep, "/")
