"""Checks the bytes of a directory without changing them: logs, the journal, unknown files.

Everything here blocks, takes no lock, and may read a file that is being written.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import NamedTuple

from agent_state.errors import AgentStateError, Key, StateCorruptedError
from agent_state.serializers import canonical_json, parse_line
from agent_state.storage import fileio, group_writer, logs, paths, wal
from agent_state.storage.directory import StateDirectory
from agent_state.storage.document import decode_document

_NAMED = 10
"""So many line numbers are named of each kind of damage; the rest is only counted."""
_TORN_MAX = 1 << 20
_NOT_FOLLOWED = "a symlink, which is not followed"


@dataclass(slots=True)
class LineNumbers:
    """LineNumbers of one log that have something in common."""

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
    """The contents of a log, counted line by line."""

    records: int = 0
    unreadable: LineNumbers = field(default_factory=LineNumbers)
    changed: LineNumbers = field(default_factory=LineNumbers)
    """The checksum does not fit: a person, or another program, wrote the line."""
    disordered: LineNumbers = field(default_factory=LineNumbers)
    """The number is not above that of the line before."""
    gaps: LineNumbers = field(default_factory=LineNumbers)
    """A number was left out before this line, as an append that failed does."""
    torn: int = 0
    """Bytes after the last complete line that are not a record; never acknowledged."""
    unended: bool = False
    """The last record lacks its newline; the next append adds it."""


def check_log(path: str, *, goes_on: bool = False) -> LogCheck:
    """Every line of a log, read in pieces. Raises ``StorageError``, ``StateCorruptedError``.

    ``goes_on``: its numbers go on from those of another file, so the first may be any.
    """
    check = LogCheck()
    previous, number, splitter = 0, 0, logs.Splitter()
    for chunk in fileio.read_pieces(path):
        for line in splitter.feed(chunk):
            number += 1
            previous = _check_line(line, number, previous, check)
    if goes_on and check.gaps.first[:1] == [1]:
        check.gaps.count -= 1
        del check.gaps.first[0]
    if splitter.unended:
        check.unended = logs.is_whole(splitter.rest())
        if check.unended:
            _check_line(splitter.rest(), number + 1, previous, check)
        else:
            check.torn = splitter.unended
    return check


def _check_line(line: bytes, number: int, previous: int, check: LogCheck) -> int:
    try:
        content = parse_line(line)
    except StateCorruptedError:
        found = check.unreadable if line.strip() else check.changed
        found.add(number)
        return previous
    stated, seq = content.get("_crc"), content.get("_seq")
    if not logs.is_seq(seq):
        seq = previous + 1
    for name in logs.RESERVED:
        content.pop(name, None)
    try:
        body = canonical_json(content)
    except StateCorruptedError:
        check.unreadable.add(number)
        return previous
    check.records += 1
    if stated != logs.line_checksum(seq, body) or not line.startswith(b"{"):
        check.changed.add(number)
    if seq <= previous:
        check.disordered.add(number)
    elif seq > previous + 1 and not check.unreadable:
        check.gaps.add(number)
    return seq if seq > previous else previous + 1


@dataclass(slots=True)
class JournalCheck:
    """The contents of ``.journal/``: changes to be written back, and unfinished groups."""

    segments: int = 0
    records: int = 0
    changes: int = 0
    intents: int = 0
    """Groups that were recorded and not yet seen through."""
    torn: int = 0
    """Bytes at the ends that are not a complete record; never acknowledged."""
    damaged: list[tuple[str, str]] = field(default_factory=list)
    """Relative path and reason."""


def check_journal(directory: StateDirectory) -> JournalCheck:
    """Segments and intents, read back."""
    check = JournalCheck()
    for path in wal.segments(directory.journal):
        relative = directory.tree.relative(path)
        try:
            segment = wal.read_segment(path)
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
    for intent in group_writer.read_records(directory):
        if intent.damage:
            check.damaged.append((directory.tree.relative(intent.path), intent.damage))
        elif intent.changes:
            check.intents += 1
        else:  # torn: nothing of it was begun
            stamp = fileio.stat_file(intent.path)
            check.torn += stamp.size if stamp is not None else 0
    return check


def temporaries(directory: StateDirectory) -> list[str]:
    """Temporary files, relative: what a dead writer left, or a live one is writing."""
    found = (
        directory.tree.relative(entry.path)
        for entry in directory.tree.walk(directory.root, hidden=True)
        if entry.name.startswith(fileio.TEMPORARY)
    )
    return sorted(found)


class UnknownFile(NamedTuple):
    """An entry among the documents that is not one. ``hides``: documents may be behind it."""

    path: str
    why: str
    hides: bool


def unknown_files(directory: StateDirectory) -> list[UnknownFile]:
    """The entries among the documents that are not documents, by relative path.

    Hidden files, and files next to the folders of kinds (a README), belong to the user.
    """
    found: list[UnknownFile] = []
    found.extend(
        UnknownFile(entry.name, _NOT_FOLLOWED, hides=paths.is_kind(entry.name))
        for entry in directory.tree.entries(directory.root)
        if entry.is_symlink() and not entry.name.startswith(".")
    )
    for kind in directory.tree.folders():
        if kind in paths.RECORDED:
            continue
        if not paths.is_kind(kind):
            found.append(UnknownFile(kind, "no kind has this name", hides=False))
            continue
        found.extend(
            _unknown_file(directory, entry)
            for entry in directory.tree.walk(f"{directory.root}/{kind}")
            if not entry.name.endswith((paths.DOCUMENT, paths.LOG))
        )
    return sorted(found)


def _unknown_file(directory: StateDirectory, entry: os.DirEntry[str]) -> UnknownFile:
    link = entry.is_symlink()
    why = _NOT_FOLLOWED if link else "neither a document nor a log"
    return UnknownFile(directory.tree.relative(entry.path), why, link)


def earlier_revision(directory: StateDirectory, kind: str, key: Key) -> int | None:
    """The revision of a document's snapshot, if there is a good one."""
    data = directory.documents.snapshots.bytes_of(directory.tree.path(kind, key))
    if data is None:
        return None
    try:
        return decode_document(kind, key, data)[0].revision
    except StateCorruptedError:
        return None
