"""What a commit will do, worked out before anything is touched; the same for every store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from agent_state.errors import Key, RevisionConflictError, SchemaTooNewError
from agent_state.migrations import parse_schema
from agent_state.protocols import Append, Change, Delete, Document, LogRecord, Notice, Put
from agent_state.storage.records import AppendDone, DeleteDone, Done, PutDone


class Version(Protocol):
    """A stored document with its further reserved keys."""

    @property
    def document(self) -> Document: ...
    @property
    def meta(self) -> Mapping[str, str]: ...


class Base(Protocol):
    """What a store holds before the commit."""

    def current(self, kind: str, key: Key) -> Version | None:
        """The stored document."""

    def floor(self, kind: str, key: Key) -> int:
        """The highest revision that may not be given again; 0 when the stored one says it all."""

    def last_seq(self, kind: str, key: Key) -> int:
        """The last sequence number of a log; 0 for none."""

    def find(self, kind: str, key: Key, dedupe_key: str) -> int | None:
        """The number of the record with this id."""


def plan(changes: Sequence[Change], base: Base, now: str) -> tuple[list[int], list[Done]]:
    """The number to return for each change, and what is to be done, in its final form.

    A later change of the same document builds on the earlier one. Raises
    ``RevisionConflictError``, and ``SchemaTooNewError`` for a put over a newer schema.
    """
    numbers: list[int] = []
    done: list[Done] = []
    versions: dict[tuple[str, Key], Version | None] = {}
    floors: dict[tuple[str, Key], int] = {}
    ends: dict[tuple[str, Key], int] = {}
    ids: dict[tuple[str, Key, str], int] = {}
    for change in changes:
        place = (change.kind, change.key)
        if isinstance(change, Append):
            if change.dedupe_key is not None:
                known = ids.get((*place, change.dedupe_key)) or base.find(*place, change.dedupe_key)
                if known is not None:
                    numbers.append(known)
                    continue
            seq = (ends[place] if place in ends else base.last_seq(*place)) + 1
            ends[place] = seq
            if change.dedupe_key is not None:
                ids[*place, change.dedupe_key] = seq
            numbers.append(seq)
            done.append(AppendDone(*place, LogRecord(seq, change.body, change.dedupe_key)))
            continue
        version = versions[place] if place in versions else base.current(*place)
        document = version.document if version is not None else None
        actual = document.revision if document is not None else 0
        if change.expected is not None and change.expected != actual:
            raise RevisionConflictError(
                expected=change.expected, actual=actual, kind=change.kind, key=change.key
            )
        if isinstance(change, Delete):
            numbers.append(actual)
            if document is not None:
                done.append(DeleteDone(*place, actual))
                versions[place], floors[place] = None, actual
            continue
        if document is not None and document.schema != change.schema:
            _refuse_older(change, document)
        if version is not None and _unchanged(change, version):
            numbers.append(actual)
            continue
        floor = max(actual, floors.get(place, 0), base.floor(*place))
        put = PutDone(
            Document(change.kind, change.key, change.body, floor + 1, now, change.schema),
            dict(change.meta) if change.meta else {},
        )
        numbers.append(floor + 1)
        done.append(put)
        versions[place] = put
    return numbers, done


def _refuse_older(change: Put, document: Document) -> None:
    """What a newer version of the library has written is not for us to replace."""
    if not document.schema:
        return
    ours, number = parse_schema(change.schema)
    theirs, newer = parse_schema(document.schema)
    if ours == theirs and newer > number:
        raise SchemaTooNewError(
            f"{document.schema} is stored, and would be replaced by {change.schema}",
            kind=change.kind,
            key=change.key,
        )


def _unchanged(change: Put, version: Version) -> bool:
    document = version.document
    return (
        document.body == change.body
        and document.schema == change.schema
        and not document.edited
        and version.meta == change.meta
    )


def notice_of(change: Done) -> Notice | None:
    """What watchers are told about a change of a document; nothing about logs."""
    if isinstance(change, PutDone):
        document = change.document
        return Notice(document.kind, document.key, document.revision)
    if isinstance(change, DeleteDone):
        return Notice(change.kind, change.key, None)
    return None
