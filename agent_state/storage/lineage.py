"""Which files the records of a journal build on.

The journal belongs to the directory, and not to a branch: between a kill and a restart git may
have put other files there. A record names the version that each of its changes builds on. A file
that is neither that version nor one that the journal made is foreign. It is kept, and so is every
file of the groups that the foreign one is in: an agent and its task come from one branch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from agent_state.errors import AgentStateError, StateCorruptedError
from agent_state.protocols import DocumentId, LogRecord
from agent_state.storage import fileio, logs, paths
from agent_state.storage.changes import (
    ResolvedAppend,
    ResolvedChange,
    ResolvedDelete,
    ResolvedPut,
    Superseded,
    id_of,
    version_name,
)
from agent_state.storage.directory import StateDirectory
from agent_state.storage.paths import DocumentPath

_REPLACED_MAX = 3
"""How often records are written anew because git has replaced the log meanwhile."""

FileId = tuple[DocumentId, str]
"""A document or a log, by the ending of its file."""


class Lineage:
    """The versions that records build on and make, and which places they change together."""

    def __init__(self) -> None:
        self._versions: dict[DocumentId, set[str] | None] = {}
        """The names that a document's file may have; None where a record names no base."""
        self._records: dict[DocumentId, list[LogRecord]] = {}
        self._ends: dict[DocumentId, str | None] = {}
        """By log, the name of the line before its first record."""
        self._group: dict[FileId, FileId] = {}

    def add(self, changes: Sequence[ResolvedChange | Superseded]) -> None:
        """Add a record; they are added in order."""
        places: list[FileId] = []
        for change in changes:
            place = id_of(change)
            if isinstance(change, ResolvedAppend):
                places.append((place, paths.LOG))
                self._records.setdefault(place, []).append(change.record)
                self._ends.setdefault(place, change.base)
                continue
            places.append((place, paths.DOCUMENT))
            if place not in self._versions:
                self._versions[place] = None if change.base is None else {change.base}
            names = self._versions[place]
            if names is not None:
                names.add(_name(change))
        for file in places[1:]:
            self._group[self._first(file)] = self._first(places[0])

    def _first(self, place: FileId) -> FileId:
        """The place that stands for all that are changed together with this one."""
        while (up := self._group.get(place, place)) != place:
            self._group[place] = self._group.get(up, up)
            place = up
        return place

    def foreign(self, directory: StateDirectory) -> dict[FileId, str]:
        """The places whose files are kept, each with the reason. Blocks."""
        reasons: dict[FileId, str] = {}
        found: dict[FileId, None] = {}
        for place in self._versions:
            if self._is_foreign(directory, place):
                found[place, paths.DOCUMENT] = None
        for place, records in self._records.items():
            if _is_foreign_log(directory, place, records, self._ends[place]):
                found[place, paths.LOG] = None
        for file in found:
            (kind, key), ending = file
            named = directory.tree.relative(directory.locate(kind, key, ending).path)
            reasons.setdefault(self._first(file), named)
        files: Iterable[FileId] = (
            *((place, paths.DOCUMENT) for place in self._versions),
            *((place, paths.LOG) for place in self._records),
        )
        return {
            file: "saved before the files were changed, by a checkout maybe: "
            f"{reasons[first]} is not the version that it was built on"
            for file in files
            if (first := self._first(file)) in reasons
        }

    def _is_foreign(self, directory: StateDirectory, place: DocumentId) -> bool:
        names = self._versions[place]
        if names is None:
            return False
        at = directory.locate(*place)
        try:
            stored = directory.documents.read(at)
        except StateCorruptedError:
            return False  # a power cut may have torn it; else it is quarantined
        except AgentStateError:
            return False  # whatever it is, the replay meets it again
        if stored is None:
            return "" not in names and directory.worktree.is_removed(at.path)
        return not stored.document.edited and version_name(stored.document) not in names


def _name(change: ResolvedPut | ResolvedDelete | Superseded) -> str:
    """The name of the version that a change makes."""
    if isinstance(change, ResolvedPut):
        return version_name(change.document)
    return change.name if isinstance(change, Superseded) else ""


def bring_records(
    directory: StateDirectory,
    at: DocumentPath,
    records: Sequence[LogRecord],
    bases: Mapping[int, str],
) -> Sequence[LogRecord]:
    """Append records that a log's file does not have yet; those that belong there.

    Those that followed another branch's log, where git has put this one since, go to the
    quarantine. ``bases`` as in ``Checkpointer.append``. Blocks.
    """
    seen, log = directory.documents.seen, directory.logs.writer(at)
    for _ in range(_REPLACED_MAX):
        found = fileio.stat_file(at.path) if bases else None
        if bases and (found is None or found != seen.get(at.path)):
            place = (at.kind, at.key)
            records, foreign = _split_foreign(directory, place, records, bases)
            keep_records(directory, place, foreign, "git has put another branch's log in its place")
        if not records:
            break
        directory.documents.make_parent(at)
        log.bring(records, sync=False)
        if not bases or log.unchanged():
            break  # else git has put another file there this moment
    if bases:
        seen.set(at.path, fileio.stat_file(at.path))
    return records


def keep_records(
    directory: StateDirectory, place: DocumentId, records: Iterable[LogRecord], reason: str
) -> None:
    """Keep records in the quarantine."""
    for record in records:
        directory.keep_out(ResolvedAppend(*place, record), reason)


def _split_foreign(
    directory: StateDirectory,
    place: DocumentId,
    records: Sequence[LogRecord],
    bases: Mapping[int, str],
) -> tuple[list[LogRecord], list[LogRecord]]:
    """The records that go on from a log as it is, and those that another branch's log followed."""
    ours, foreign = list[LogRecord](), list[LogRecord]()
    for chain in _split_chains(records, bases):
        base = bases.get(chain[0].seq)
        is_foreign = base is not None and _is_foreign_log(directory, place, chain, base)
        (foreign if is_foreign else ours).extend(chain)
    return ours, foreign


def _split_chains(
    records: Sequence[LogRecord], bases: Mapping[int, str]
) -> Iterator[Sequence[LogRecord]]:
    """Cut the records of a log where one does not follow the one before it."""
    begin = 0
    for at in range(1, len(records)):
        before, base = records[at - 1], bases.get(records[at].seq)
        if base not in (None, logs.line_checksum(before.seq, before.body)):
            yield records[begin:at]
            begin = at
    yield records[begin:]


def _is_foreign_log(
    directory: StateDirectory, place: DocumentId, records: Sequence[LogRecord], before: str | None
) -> bool:
    """Whether a log ends before the records begin, or has others that we wrote in their place.

    Or, in a worktree, before them: ``before`` names the line that the first one follows. Lines that
    others typed are no branch's: the records are brought in before them. Blocks.
    """
    at = directory.locate(*place, paths.LOG)
    wanted = {record.seq: record.body for record in records}
    first = min(wanted)
    if first != records[0].seq or not directory.worktree.is_there():
        before = None
    try:
        offset, _, end = logs.seek(at.path, after=max(first - 2, 0))
        if logs.last_seq(at.path) < first - 1:
            follows = before is not None and logs.end_name(at.path) == before
            return directory.worktree.is_there() and not follows
        return any(
            _is_another(line, wanted, first - 1, before)
            for line in logs.lines_from(at.path, offset, end)
        )
    except AgentStateError:
        return False


def _is_another(line: bytes, wanted: Mapping[int, bytes], last: int, before: str | None) -> bool:
    """Whether a line of ours has the number of a wanted record, and other contents.

    Or is the ``last`` one before them, and has another name.
    """
    try:
        record = logs.decode_line(line, 0)
    except StateCorruptedError:
        return False
    if record.seq == last and before is not None:
        differs = logs.line_checksum(record.seq, record.body) != before
    else:
        differs = record.seq in wanted and record.body != wanted[record.seq]
    return differs and logs.is_stamped(line, record)
