"""Reads documents, logs and listings of a store, a page at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from agent_state.errors import Key, StateCorruptedError
from agent_state.protocols import Document, LogRecord
from agent_state.redis.client import PipelineBatcher
from agent_state.redis.keys import StoreKeys, below, key_of
from agent_state.serializers import canonical_json, check_strict_json, parse_object
from agent_state.storage.document import MAX_REVISION, checksum

_FIELDS = ("body", "revision", "saved_at", "schema", "checksum")
_KEYS_PER_PAGE = 1000
_RECORDS_PER_PAGE = 64
_BYTES_PER_PAGE = 4 * 1024 * 1024
_FIRST_DOCUMENTS, _MOST_DOCUMENTS = 16, 128

Fields = Sequence[bytes | None]
"""The stored fields of a document, in the order of ``_FIELDS``; None for a missing one."""


class Member(NamedTuple):
    """A key in an index: as text, and decoded."""

    text: str
    key: Key


class StoreReader:
    """Reads one store. Every method raises ``StorageError``."""

    def __init__(self, batcher: PipelineBatcher, keys: StoreKeys) -> None:
        self._batcher = batcher
        self._keys = keys

    async def members(self, index: str, prefix: Key = ()) -> AsyncIterator[list[Member]]:
        """The keys of an index below a prefix, in pages. Texts that are not keys are left out."""
        low, high = below(prefix)
        while True:
            page = await self._batcher.run(
                "ZRANGEBYLEX", index, low, high, "LIMIT", 0, _KEYS_PER_PAGE
            )
            yield [Member(text.decode(), key) for text in page if (key := key_of(text)) is not None]
            if len(page) < _KEYS_PER_PAGE:
                return
            low = b"(" + page[-1]

    async def members_from(self, index: str, text: str, key: Key) -> list[Member]:
        """The key itself, if the index has it, and the keys below it."""
        found = [member async for page in self.members(index, key) for member in page]
        if await self._batcher.run("ZSCORE", index, text) is not None:
            found.append(Member(text, key))
        return found

    async def fields(self, kind: str, text: str) -> Fields:
        """The fields of a document as they are stored."""
        fields: Fields = await self._batcher.run("HMGET", self._keys.document(kind, text), *_FIELDS)
        return fields

    async def all_fields(
        self, kind: str, listed: Sequence[Member]
    ) -> AsyncIterator[tuple[Member, Fields | Exception]]:
        """The fields, or the error, of each listed document; a few megabytes are read at a time."""
        start, count = 0, _FIRST_DOCUMENTS
        while start < len(listed):
            page = listed[start : start + count]
            start += count
            replies = await asyncio.gather(
                *(self.fields(kind, member.text) for member in page), return_exceptions=True
            )
            size = 0
            for member, reply in zip(page, replies, strict=True):
                if isinstance(reply, Exception):
                    yield member, reply
                elif isinstance(reply, BaseException):
                    raise reply
                else:
                    size += len(reply[0] or b"")
                    yield member, reply
            if size > _BYTES_PER_PAGE:
                count = max(1, count // 2)
            elif size < _BYTES_PER_PAGE // 4:
                count = min(_MOST_DOCUMENTS, count * 2)

    async def last_seq(self, log: str) -> int:
        """The number of a log's last record; 0 for an empty or missing log."""
        entries = await self._batcher.run("XREVRANGE", log, "+", "-", "COUNT", 1)
        return int(entries[0][0].split(b"-")[0]) if entries else 0

    async def records(self, log: str, after: int) -> AsyncIterator[LogRecord | tuple[int, str]]:
        """The records numbered above ``after``; an unreadable one as its number and the reason."""
        while True:
            start = f"{after + 1}-0"
            page = await self._batcher.run("XRANGE", log, start, "+", "COUNT", _RECORDS_PER_PAGE)
            for entry_id, fields in page:
                after = int(entry_id.split(b"-")[0])
                yield _record(after, fields)
            if len(page) < _RECORDS_PER_PAGE:
                return


def document_of(kind: str, key: Key, fields: Fields) -> Document | None:
    """The document in these fields; None if it is missing.

    A body that does not match its checksum was written by another program, and is accepted.
    Raises ``StateCorruptedError`` if it is not a JSON object.
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
        return seq, "its dedupe key is not text"
