"""Records of the write-ahead log that hold what has changed in a large document.

A segment has each document whole first. After that a record may have a patch: the edits that
make the new body of the one before it in the same segment. So a segment needs no other, and no
file. Both versions are named by revision and CRC-32, and the body that the edits make is the saved
one byte for byte. Edits are of bytes, and know nothing of JSON: a body need not be parsed for them.

Where a record cannot be read, later patches of its documents cannot either, up to the next whole
version. So a document is whole again after ``MOST_PATCHES``, and when its patches are as long as
its body together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from zlib import crc32

from agent_state.errors import StateCorruptedError
from agent_state.protocols import Document, DocumentId
from agent_state.storage.changes import (
    BodyPatch,
    Edit,
    ResolvedAppend,
    ResolvedChange,
    ResolvedPut,
    Superseded,
    canonical_body,
    encode_changes,
    id_of,
    version_name,
)
from agent_state.storage.document import SEALED
from agent_state.storage.lru_cache import LRUCache

MIN_BODY = 4096
"""A shorter body is written whole: the edits of it would hardly be shorter with their head."""
MOST_PATCHES = 100
"""So many patches of a document in a row, at most."""

_MOST_EDITS = 64
_EDIT_BYTES = 16
"""What an edit takes besides its text, about."""
_MOST_SHARE = 4
"""A patch has at most this part of the body."""
_MAX_BYTES = 64 * 1024 * 1024
_MAX_DOCUMENTS = 10_000
_PROBE = 32
_WINDOW = 64 * 1024
_MAX_WINDOW = 4 * 1024 * 1024
_MAX_COMPARED = 1024 * 1024
_MOST_SEARCHED = 4
"""So many times its length a body is searched for what it has in common with the one before."""
_SEALED_START = b'{"%b":' % SEALED.encode()
"""An encrypted body has nothing in common with the one before."""


# -- writing ---------------------------------------------------------------------------------


@dataclass(slots=True)
class _Written:
    """The last version of a document in the segment; what it took since the last whole one."""

    document: Document
    crc: int
    patches: int = 0
    size: int = 0


class PatchEncoder:
    """Encodes the records of one segment, in the order in which they are written."""

    def __init__(self) -> None:
        self._written: LRUCache[DocumentId, _Written] = LRUCache(_MAX_DOCUMENTS, _MAX_BYTES)
        self.body_bytes = 0
        """The bytes of all bodies that were given, also where a patch was written."""

    def clear(self) -> None:
        """Begin another segment; or what was encoded last may not be in this one."""
        self._written = LRUCache(_MAX_DOCUMENTS, _MAX_BYTES)

    def encode(self, changes: Sequence[ResolvedChange]) -> bytes:
        """``encode_changes``, with patches where they are much shorter."""
        return encode_changes([*map(self._shorten, changes)])

    def _shorten(self, change: ResolvedChange) -> ResolvedChange | BodyPatch:
        if isinstance(change, ResolvedAppend):
            return change
        body = change.document.body if isinstance(change, ResolvedPut) else b""
        self.body_bytes += len(body)
        if len(body) < MIN_BODY and not self._written:
            return change
        place = id_of(change)
        if not isinstance(change, ResolvedPut):
            self._written.drop(place)
            return change
        document = change.document
        if len(body) < MIN_BODY or body.startswith(_SEALED_START):
            self._written.drop(place)
            return change
        new, last = _Written(document, crc32(body)), self._written.get(place)
        patch = None
        if last is not None and last.patches < MOST_PATCHES:
            edits = find_edits(last.document.body, body, len(body) // _MOST_SHARE)
            if edits is not None:
                new.patches, new.size = last.patches + 1, last.size + sum(map(_size, edits))
                if new.size <= len(body):
                    of = (last.document.revision, last.crc)
                    patch = BodyPatch(document, change.meta, change.base, of, new.crc, edits)
                else:
                    new.patches = new.size = 0
        self._written.set(place, new, len(body))
        return patch or change


def _size(edit: Edit) -> int:
    return len(edit[2]) + _EDIT_BYTES


# -- reading ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Patched:
    """A patch whose result has been checked; the body is made again when it is asked for."""

    patch: BodyPatch
    previous: ResolvedPut | Patched

    def put(self) -> ResolvedPut:
        """The whole version. Raises ``StateCorruptedError`` when it is no body of a document."""
        edits, version = [], self.previous
        while isinstance(version, Patched):
            edits.append(version.patch.edits)
            version = version.previous
        body = version.document.body
        for each in (*reversed(edits), self.patch.edits):
            body = apply_edits(body, each)
        if canonical_body(body) != body:
            raise StateCorruptedError("what a journal record makes of a document is none")
        return ResolvedPut(
            replace(self.patch.document, body=body), self.patch.meta, self.patch.base
        )

    def superseded(self) -> Superseded:
        """The version without its body."""
        document = self.patch.document
        return Superseded(document.kind, document.key, version_name(document), self.patch.base)


class SegmentVersions:
    """Makes the records of a segment whole, as they are read in order."""

    def __init__(self) -> None:
        self._newest: dict[DocumentId, tuple[ResolvedPut | Patched, bytes]] = {}

    def take(self, changes: Sequence[ResolvedChange | BodyPatch]) -> list[ResolvedChange | Patched]:
        """The changes of a record, each patch with the version that it was made from.

        Raises ``StateCorruptedError`` for a patch of another version than the one that was read.
        The other changes of its record are taken for what later patches are made from.
        """
        taken: list[ResolvedChange | Patched] = []
        missing: StateCorruptedError | None = None
        for change in changes:
            if isinstance(change, BodyPatch):
                try:
                    taken.append(self._apply(change))
                except StateCorruptedError as error:
                    missing = error
                continue
            taken.append(change)
            if isinstance(change, ResolvedPut):
                self._newest[id_of(change)] = change, change.document.body
            elif not isinstance(change, ResolvedAppend):
                self._newest.pop(id_of(change), None)
        if missing is not None:
            raise missing
        return taken

    def _apply(self, patch: BodyPatch) -> Patched:
        place = (patch.document.kind, patch.document.key)
        version, body = self._newest.get(place, (None, b""))
        revision = 0
        if version is not None:
            whole = version if isinstance(version, ResolvedPut) else version.patch
            revision = whole.document.revision
        if version is None or (revision, crc32(body)) != patch.of:
            raise StateCorruptedError("a journal record changes a version that is not there")
        body = apply_edits(body, patch.edits)
        if crc32(body) != patch.crc:
            raise StateCorruptedError("the checksum of a version in the journal does not fit")
        patched = Patched(patch, version)
        self._newest[place] = patched, body
        return patched


def make_whole(
    records: Sequence[Sequence[ResolvedChange | Patched]],
) -> tuple[list[list[ResolvedChange | Superseded]], int]:
    """The records with the last version of each document whole, and no other that was patched.

    Also how many versions were no documents, which only a forged record makes.
    """
    found: set[DocumentId] = set()
    forged = 0

    def resolved(change: ResolvedChange | Patched) -> ResolvedChange | Superseded:
        nonlocal forged
        if isinstance(change, ResolvedAppend):
            return change
        if not isinstance(change, Patched):
            found.add(id_of(change))
            return change
        place = (change.patch.document.kind, change.patch.document.key)
        if place in found:
            return change.superseded()
        try:
            put = change.put()
        except StateCorruptedError:
            forged += 1
            return change.superseded()
        found.add(place)
        return put

    whole = [[resolved(change) for change in reversed(record)][::-1] for record in records[::-1]]
    return whole[::-1], forged


# -- edits -----------------------------------------------------------------------------------


def find_edits(old: bytes, new: bytes, most: int) -> list[Edit] | None:
    """The edits that make ``new`` of ``old``, in order; None if they have over ``most`` bytes.

    What both have in common is looked for at growing distances, so that the edits need not be the
    shortest ones; what they make is always ``new``.
    """
    pair = _Pair(old, new)
    edits: list[Edit] = []
    at = to = pair.common_from(0, 0)
    pair.cut_end(at)
    size = 0
    while at < pair.old_end or to < pair.new_end:
        while _is_within_character(new, to):
            at, to = at - 1, to - 1
        next_at, next_to = pair.next_common(at, to)
        size += next_to - to + _EDIT_BYTES
        if size > most or len(edits) == _MOST_EDITS:
            return None
        try:
            edits.append((at, next_at - at, new[to:next_to].decode()))
        except UnicodeDecodeError:
            return None  # no JSON, by a serializer of one's own
        same = pair.common_from(next_at, next_to)
        at, to = next_at + same, next_to + same
    return edits


def apply_edits(old: bytes, edits: Sequence[Edit]) -> bytes:
    """The body that edits make. Raises ``StateCorruptedError`` when they do not fit."""
    parts: list[bytes] = []
    done = 0
    for at, removed, added in edits:
        if not done <= at <= at + removed <= len(old):
            raise StateCorruptedError("an edit in the journal is outside of its document")
        parts += (old[done:at], added.encode())
        done = at + removed
    parts.append(old[done:])
    return b"".join(parts)


class _Pair:
    """Two bodies, compared at an offset of each; what they have in common at the end is cut off."""

    def __init__(self, old: bytes, new: bytes) -> None:
        self._old, self._new = old, new
        self.old_end, self.new_end = len(old), len(new)
        self._searchable = _MOST_SEARCHED * len(new) + _WINDOW

    def cut_end(self, start: int) -> None:
        """Cut off the common end, down to ``start`` at most."""
        same = self._common_before(self.old_end, self.new_end, start, start)
        self.old_end, self.new_end = self.old_end - same, self.new_end - same
        while _is_within_character(self._new, self.new_end):
            self.old_end, self.new_end = self.old_end + 1, self.new_end + 1

    def common_from(self, at: int, to: int) -> int:
        """How many bytes from these offsets on are the same."""
        old, new = self._old, self._new

        def same(first: int, end: int) -> bool:
            return old[at + first : at + end] == new[to + first : to + end]

        return _longest(min(self.old_end - at, self.new_end - to), same)

    def _common_before(self, at: int, to: int, old_start: int, new_start: int) -> int:
        """How many bytes before these offsets, and not before the starts, are the same."""
        old, new = self._old, self._new

        def same(first: int, end: int) -> bool:
            return old[at - end : at - first] == new[to - end : to - first]

        return _longest(min(at - old_start, to - new_start), same)

    def next_common(self, at: int, to: int) -> tuple[int, int]:
        """The next offsets from which both are the same for a while; else the ends."""
        for probed in self._probes(at):
            window = min(_WINDOW + 4 * (probed - at), _MAX_WINDOW, self._searchable)
            until = min(to + window, self.new_end)
            found = self._new.find(self._old[probed : probed + _PROBE], to, until)
            self._searchable -= (found if found >= 0 else until) - to
            if found >= 0:
                same = self._common_before(probed, found, at, to)
                next_at, next_to = probed - same, found - same
                while _is_within_character(self._new, next_to):
                    next_at, next_to = next_at + 1, next_to + 1
                return next_at, next_to
            if self._searchable <= 0:
                break
        return self.old_end, self.new_end

    def _probes(self, at: int) -> Iterator[int]:
        distance = 0
        while at + distance + _PROBE <= self.old_end:
            yield at + distance
            distance = 2 * distance or _PROBE


def _is_within_character(text: bytes, at: int) -> bool:
    return at < len(text) and text[at] & 0xC0 == 0x80


def _longest(most: int, same: Callable[[int, int], bool]) -> int:
    """How far, up to ``most``, all is the same; ``same(first, end)`` says it of a part."""
    done, size = 0, min(64, most)
    while size and same(done, done + size):
        done += size
        size = min(4 * size, _MAX_COMPARED, most - done)
    while size > 1:  # there is a difference in the next `size` bytes
        half = size // 2
        if same(done, done + half):
            done, size = done + half, size - half
        else:
            size = half
    return done
