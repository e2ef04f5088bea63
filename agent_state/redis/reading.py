"""What is stored, as documents and records, a page at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from agent_state.errors import Key, StateCorruptedError
from agent_state.protocols import Document, LogRecord
from agent_state.redis.keys import Names, below, key_of
from agent_state.redis.link import Lane
from agent_state.serializers import canonical_json, check_strict_json, parse_object
from agent_state.storage.document import MAX_REVISION, checksum

FIELDS = ("body", "revision", "saved_at", "schema", "checksum")
PAGE_KEYS = 1000
_PAGE_RECORDS = 64
_LEAST, _MOST = 1, 128
_PAGE_BYTES = 4 * 1024 * 1024

Found = Sequence[bytes | None]


class Member(NamedTuple):
    """A key in an index, as it is there and as it is meant."""

    text: str
    key: Key


async def members(lane: Lane, index: str, prefix: Key) -> AsyncIterator[list[Member]]:
    """The keys below a prefix, in pages; what is no key of ours is left out."""
    low, high = below(prefix)
    while True:
        page = await lane.run("ZRANGEBYLEX", index, low, high, "LIMIT", 0, PAGE_KEYS)
        yield [Member(text.decode(), key) for text in page if (key := key_of(text)) is not None]
        if len(page) < PAGE_KEYS:
            return
        low = b"(" + page[-1]


async def found(lane: Lane, names: Names, kind: str, text: str) -> Found:
    """The fields of a document as they are stored, each None where it is not."""
    fields: Found = await lane.run("HMGET", names.document(kind, text), *FIELDS)
    return fields


async def pages(
    lane: Lane, names: Names, kind: str, listed: Sequence[Member]
) -> AsyncIterator[tuple[Member, Found | Exception]]:
    """The documents of these keys, so many at once as some megabytes hold."""
    start, at_once = 0, 16
    while start < len(listed):
        page = listed[start : start + at_once]
        start += at_once
        replies = await asyncio.gather(
            *(found(lane, names, kind, member.text) for member in page), return_exceptions=True
        )
        size = 0
        for member, reply in zip(page, replies, strict=True):
            if isinstance(reply, BaseException):
                if not isinstance(reply, Exception):
                    raise reply
                yield member, reply
            else:
                size += len(reply[0] or b"")
                yield member, reply
        if size > _PAGE_BYTES:
            at_once = max(_LEAST, at_once // 2)
        elif size < _PAGE_BYTES // 4:
            at_once = min(_MOST, at_once * 2)


def document_of(kind: str, key: Key, fields: Found) -> Document | None:
    """What the fields say; None when there is no document.

    A body that its checksum does not fit was written by somebody else, and is used all the same.
    Raises ``StateCorruptedError`` when it is no JSON object.
    """
    body, revision, saved_at, schema, stated = fields
    if body is None:
        return None
    edited = (stated or b"").decode(errors="replace") != checksum(body)
    if edited:
        given = body
        try:
            body = canonical_json(parse_object(given))
            check_strict_json(given)
        except StateCorruptedError as error:
            raise StateCorruptedError(error.message, kind=kind, key=key) from error
    return Document(kind, key, body, _revision(revision), _text(saved_at), _text(schema), edited)


def _revision(value: bytes | None) -> int:
    if value is not None and value.isdigit() and 0 < int(value) <= min(MAX_REVISION, 2**53 - 1):
        return int(value)
    return 1


def _text(value: bytes | None) -> str:
    return (value or b"").decode(errors="replace")


async def last_seq(lane: Lane, log: str) -> int:
    """The number of a log's last record; 0 for none."""
    entries = await lane.run("XREVRANGE", log, "+", "-", "COUNT", 1)
    return int(entries[0][0].split(b"-")[0]) if entries else 0


async def records(lane: Lane, log: str, after: int) -> AsyncIterator[LogRecord | tuple[int, str]]:
    """The records with higher numbers; for one that cannot be read, its number and why."""
    while True:
        start = f"{after + 1}-0"
        page = await lane.run("XRANGE", log, start, "+", "COUNT", _PAGE_RECORDS)
        for ident, fields in page:
            after = int(ident.split(b"-")[0])
            yield _record(after, fields)
        if len(page) < _PAGE_RECORDS:
            return


def _record(seq: int, fields: dict[bytes, bytes]) -> LogRecord | tuple[int, str]:
    body = fields.get(b"body", b"")
    if fields.get(b"checksum", b"").decode(errors="replace") != checksum(body):
        try:
            body = canonical_json(parse_object(body))
        except StateCorruptedError as error:
            return seq, error.message
    dedupe_key = fields.get(b"dedupe")
    try:
        return LogRecord(seq, body, None if dedupe_key is None else dedupe_key.decode())
    except UnicodeDecodeError:
        return seq, "its dedupe id is no text"
