"""The content of a mirror in Redis, and the client that reads and writes it."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, NamedTuple
from zlib import crc32

from redis.exceptions import RedisError, ResponseError

from agent_state.errors import MirrorError, StateCorruptedError, StorageError, describe
from agent_state.protocols import Document, DocumentId, LogRecord
from agent_state.redis.client import SCAN_COUNT, Argument, RedisLink, Script, failure_kind
from agent_state.redis.keys import MirrorKeys, escape_glob, key_of, text_of

NOTICES_KEPT = 10_000
"""How many notices the stream of a kind keeps."""
GONE_SECONDS = 3600
"""How long a deletion is remembered; no command is under way for an hour."""

STATUS_DOCUMENT: DocumentId = ("system", ("mirror",))
"""The document of the mirror's own state, which alone is not mirrored."""

_ID, _WRITES, _LOG = "/mark", "/writes", "/log/"
"""Fields of an index that belong to no document: a document's text never begins with a slash."""

_PUT_SCRIPT = Script.load("mirror_put")
_LOG_SCRIPT = Script.load("mirror_log")
_INDEX_SCRIPT = Script.load("mirror_index")


class AnotherInstanceError(MirrorError):
    """The prefix holds the copy of another state directory."""


class IndexReplacedError(MirrorError):
    """The index of a kind is not the one that was read: it was deleted, or replaced."""


class IndexEntry(NamedTuple):
    """A document's entry in an index: its last write, and the version written then."""

    write: str
    """Counts the writes of the index; empty for a document that was never written."""
    revision: str
    """Empty: the document is deleted."""
    checksum: str

    @property
    def version(self) -> tuple[str, str]:
        return self.revision, self.checksum


NO_ENTRY = IndexEntry("", "", "")


class KindIndex(NamedTuple):
    """The index of one kind."""

    kind: str
    index_id: str
    """``<instance> <random>``: the owner, and the index among the owner's."""
    writes: int
    documents: dict[DocumentId, IndexEntry]
    logs: dict[DocumentId, int]
    """The number of each log's last record."""
    deleted: dict[str, str]
    """The fields of deleted documents, with their entries."""


class MirrorWrite(NamedTuple):
    """A document's new version (None: deleted), and the entry that it may replace."""

    target: DocumentId
    document: Document | None
    expected: IndexEntry


def version_of(document: Document | None) -> tuple[str, str]:
    """Revision and checksum: they differ for any two versions, edits by hand included."""
    if document is None:
        return "", ""
    return str(document.revision), f"{crc32(document.body):08x}"


def parse_entry(text: str) -> IndexEntry:
    """An entry as an index stores it; ``NO_ENTRY`` for an empty text."""
    if not text:
        return NO_ENTRY
    write, revision, rest = text.split(" ")
    return IndexEntry(write, "", "") if revision == "gone" else IndexEntry(write, revision, rest)


def describe_id(target: DocumentId, *, log: bool = False) -> str:
    """``agents/alice`` for messages; a log's ends in ``.jsonl`` as its file does."""
    return describe(*target) + (".jsonl" if log else "")


class MirrorClient:
    """Reads and writes one mirror in Redis. Every method raises ``StorageError``.

    ``url`` is read by ``connect``. ``ttl_seconds``: by kind, how long a key lasts after its last
    write. ``index_seconds``: how long at least an index with such a TTL lasts after a mirror has
    looked at it. Raises ``ValueError`` for an invalid URL or prefix.
    """

    def __init__(
        self,
        url: str,
        prefix: str = "",
        *,
        timeout_seconds: float = 1.0,
        ttl_seconds: Mapping[str, float] | None = None,
        index_seconds: float = 100.0,
    ) -> None:
        self._keys = MirrorKeys(prefix)
        # A follower retries with its own back-off and reports each failure.
        self._link = RedisLink(
            url, anchor=self._keys.owner, timeout_seconds=timeout_seconds, retries=0
        )
        self.name = f"{prefix!r} at {self._link.url}" if prefix else self._link.url
        """The mirror's prefix and server, for messages."""
        self._ttl_ms = {kind: int(seconds * 1000) for kind, seconds in (ttl_seconds or {}).items()}
        self._index_ttl_ms = int(index_seconds * 1000)

    async def close(self) -> None:
        """Close every connection; the next command makes a new one."""
        await self._link.close()

    # -- ownership -------------------------------------------------------------------------

    async def owner(self) -> str | None:
        """The instance whose copy this is; None before the first mirroring."""
        found = await self._link.run("HGET", self._keys.owner, "instance")
        return None if found is None else str(found, "utf-8")

    async def claim(self, instance: str, *, take_over: bool = False) -> None:
        """Make this the copy of an instance. Raises ``AnotherInstanceError``."""
        if take_over:
            await self._link.run("HSET", self._keys.owner, "instance", instance)
            return
        owner = await self.owner()
        if owner is None:
            await self._link.run("HSETNX", self._keys.owner, "instance", instance)
            owner = await self.owner()
        if owner is not None and owner != instance:
            raise AnotherInstanceError(
                f"{self.name} is the mirror of another state directory (instance {owner}, this "
                f"one is {instance}): choose another prefix, or take it over with "
                "'agent-state mirror rebuild --take-over'"
            )

    async def kinds(self) -> list[str]:
        """The kinds that have been mirrored."""
        return sorted(await self._ttl_by_kind())

    async def adopt_ttl(self) -> None:
        """Use the TTLs that the mirror's writer has stored."""
        self._ttl_ms |= {kind: ttl for kind, ttl in (await self._ttl_by_kind()).items() if ttl}

    async def _ttl_by_kind(self) -> dict[str, int]:
        fields = await self._link.run("HGETALL", self._keys.owner)
        return {
            field.removeprefix(b"kind:").decode(): int(ttl)
            for field, ttl in fields.items()
            if field.startswith(b"kind:")
        }

    async def server(self) -> str:
        """The id of the server's run; empty in a cluster, where several servers answer."""
        if self._link.is_cluster:
            return ""
        info = await self._link.run("INFO", "server")
        return str(info.get("run_id", ""))

    def expires(self, kind: str) -> bool:
        """Whether keys of the kind have a TTL."""
        return kind in self._ttl_ms

    # -- indexes ---------------------------------------------------------------------------

    async def load(self, kind: str, instance: str, *, replace: bool = False) -> KindIndex:
        """The index of a kind, created if missing.

        ``replace``: the index is replaced by an empty one. Raises ``AnotherInstanceError``.
        """
        keys, ttl = self._keys, str(self._ttl_ms.get(kind, 0)).encode()
        # Read before writing: a Redis that is full or read-only still answers.
        if await self._link.run("HGET", keys.owner, f"kind:{kind}") != ttl:
            await self._link.run("HSET", keys.owner, f"kind:{kind}", ttl)
        found = await self._script(
            _INDEX_SCRIPT,
            [keys.index(kind), keys.changes(kind)],
            ["claim", f"{instance} {secrets.token_hex(6)}", "1" if replace else ""],
        )
        index_id = found.decode()
        if index_id.partition(" ")[0] != instance:
            raise AnotherInstanceError(f"{self.name}: the index of {kind} is another instance's")
        return await self.read_index(kind, index_id)

    async def read_index(self, kind: str, index_id: str = "") -> KindIndex:
        """The index of a kind; empty if it is missing."""
        index, cursor = KindIndex(kind, index_id, 0, {}, {}, {}), 0
        while True:
            cursor, fields = await self._link.run(
                "HSCAN", self._keys.index(kind), cursor, "COUNT", SCAN_COUNT
            )
            index = _with_fields(index, fields)
            if not cursor:
                return index

    async def index_version(self, kind: str) -> tuple[str, int]:
        """The id and the number of writes of an index; renews its TTL."""
        index = self._keys.index(kind)
        index_id, writes = await self._link.run("HMGET", index, _ID, _WRITES)
        if kind in self._ttl_ms and index_id is not None:
            await self._link.run("PEXPIRE", index, self._index_lifetime_ms(kind))
        return (index_id or b"").decode(), int(writes or 0)

    async def entries(self, targets: Sequence[DocumentId]) -> list[IndexEntry]:
        """The entries of documents of one kind, now."""
        index = self._keys.index(targets[0][0])
        found = await self._link.run("HMGET", index, *(text_of(*target) for target in targets))
        return [parse_entry(text.decode()) if text else NO_ENTRY for text in found]

    async def forget(self, kind: str, deleted: Mapping[str, str]) -> None:
        """Remove the entries of documents that were deleted long ago."""
        fields = list(deleted.items())
        for start in range(0, len(fields), SCAN_COUNT):
            pairs = [text for pair in fields[start : start + SCAN_COUNT] for text in pair]
            await self._script(
                _INDEX_SCRIPT, [self._keys.index(kind)], ["forget", GONE_SECONDS, *pairs]
            )

    # -- writing ---------------------------------------------------------------------------

    async def put(self, kind: str, index_id: str, writes: Sequence[MirrorWrite]) -> list[str]:
        """Write documents of one kind; a reply ``ok …``, ``moved …`` or ``error …`` for each.

        Raises ``IndexReplacedError``; then nothing was written.
        """
        keys = [self._keys.index(kind), self._keys.changes(kind)]
        ttl = self._ttl_ms.get(kind, 0)
        arguments: list[Argument] = [index_id, ttl, self._index_lifetime_ms(kind), NOTICES_KEPT]
        for target, document, expected in writes:
            field = text_of(*target)
            keys.append(self._keys.document(kind, field))
            arguments += [field, expected.write, *version_of(document)]
            if document is None:
                arguments += ["", "", ""]
            else:
                arguments += [document.saved_at, document.schema, document.body]
        first, *replies = await self._script(_PUT_SCRIPT, keys, arguments)
        if first == b"mark":
            raise IndexReplacedError(f"{self.name}: the index of {kind} was replaced")
        return [reply.decode("utf-8", "replace") for reply in replies]

    def refusal(self, reply: str) -> StorageError:
        """The typed error of a reply ``error …`` of ``put``."""
        cause = ResponseError(reply.removeprefix("error "))
        error = self._link.error(cause, "mirroring")
        error.__cause__ = cause
        return error

    async def append(
        self, target: DocumentId, index_id: str, after: int, records: Sequence[LogRecord]
    ) -> int | None:
        """Add records to a log whose last record is ``after``; None, or its other last record.

        Raises ``IndexReplacedError``.
        """
        kind, field = target[0], text_of(*target)
        arguments: list[Argument] = [
            *("append", index_id, _LOG + field),
            self._ttl_ms.get(kind, 0),
            self._index_lifetime_ms(kind),
            after,
        ]
        for record in records:
            dedupe = "" if record.dedupe_key is None else f"={record.dedupe_key}"
            arguments += [record.seq, record.body, dedupe]
        keys = [self._keys.index(kind), self._keys.log(kind, field)]
        word, last = await self._script(_LOG_SCRIPT, keys, arguments)
        if word == b"mark":
            raise IndexReplacedError(f"{self.name}: the index of {kind} was replaced")
        return None if word == b"ok" else int(last)

    async def drop_log(self, target: DocumentId, index_id: str) -> None:
        """Remove a log. Raises ``IndexReplacedError``."""
        kind, field = target[0], text_of(*target)
        keys = [self._keys.index(kind), self._keys.log(kind, field)]
        word, _ = await self._script(_LOG_SCRIPT, keys, ["drop", index_id, _LOG + field])
        if word == b"mark":
            raise IndexReplacedError(f"{self.name}: the index of {kind} was replaced")

    async def sweep(self, index: KindIndex) -> int:
        """Remove the keys of a kind that its index does not list; returns their number."""
        keys, kind, removed = self._keys, index.kind, 0
        known = {
            keys.document(kind, text_of(*target))
            for target, entry in index.documents.items()
            if entry.revision
        }
        known |= {keys.log(kind, text_of(*target)) for target in index.logs}
        near = keys.index(kind)
        for prefix, of_type in ((keys.document(kind, ""), "HASH"), (keys.log(kind, ""), "STREAM")):
            pattern = f"{escape_glob(prefix)}*"
            async for page in self._link.scan(pattern, near=near, of_type=of_type):
                for key in page:
                    if key.decode("utf-8", "replace") not in known:
                        removed += await self._link.run("DEL", key)
        return removed

    def _index_lifetime_ms(self, kind: str) -> int:
        """An index lasts as long as its documents, and as long as a mirror looks at it."""
        return max(self._ttl_ms.get(kind, 0), self._index_ttl_ms)

    async def _script(
        self, script: Script, keys: Sequence[str], arguments: Sequence[Argument]
    ) -> Any:
        return await self._link.run(*script.call(keys, arguments), doing="mirroring")

    # -- reading back ----------------------------------------------------------------------

    async def get(self, target: DocumentId) -> Document | None:
        """The mirrored version. Raises ``StateCorruptedError`` if it is not as it was written."""
        key = self._keys.document(target[0], text_of(*target))
        return _document(target, await self._link.run("HGETALL", key))

    async def versions(self, targets: Sequence[DocumentId]) -> list[tuple[str, str] | None]:
        """The versions of documents of one kind, as their own keys have them.

        None for a missing key, and for a key of another type.
        """
        commands = [
            ("HMGET", self._keys.document(target[0], text_of(*target)), "revision", "checksum")
            for target in targets
        ]
        return [
            (reply[0].decode(), (reply[1] or b"").decode()) if reply and reply[0] else None
            for reply in await self._replies(commands)
        ]

    async def ends(self, targets: Sequence[DocumentId]) -> list[int | None]:
        """The number of the last record of each log of one kind; None for a missing log."""
        commands = [
            ("XREVRANGE", self._keys.log(target[0], text_of(*target)), "+", "-", "COUNT", 1)
            for target in targets
        ]
        return [
            int(reply[0][0].partition(b"-")[0]) if reply else None
            for reply in await self._replies(commands)
        ]

    async def _replies(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The replies; None for a key of another type, which is not the mirror's."""
        replies = await self._link.exchange(commands, "reading")
        for index, reply in enumerate(replies):
            if isinstance(reply, RedisError):
                if failure_kind(reply) != "wrong-type":
                    raise self._link.error(reply, "reading") from reply
                replies[index] = None
        return replies

    async def read_log(self, target: DocumentId, after: int = 0) -> AsyncIterator[LogRecord]:
        """The mirrored records with a number above ``after``."""
        key = self._keys.log(target[0], text_of(*target))
        while True:
            start = f"({after}-{2**64 - 1}"
            page = await self._link.run("XRANGE", key, start, "+", "COUNT", SCAN_COUNT)
            for entry_id, fields in page:
                after = int(entry_id.partition(b"-")[0])
                dedupe_key = fields.get(b"dedupe_id")
                name = None if dedupe_key is None else dedupe_key.decode()
                yield LogRecord(after, fields[b"body"], name)
            if len(page) < SCAN_COUNT:
                return


def _with_fields(index: KindIndex, fields: Mapping[bytes, bytes]) -> KindIndex:
    """The index with some more of its fields. Fields of another program are left out."""
    kind = index.kind
    for name, value in fields.items():
        if name == _WRITES.encode():
            index = index._replace(writes=int(value))
        elif name.startswith(_LOG.encode()):
            if (key := key_of(name.removeprefix(_LOG.encode()))) is not None:
                index.logs[kind, key] = int(value)
        elif name != _ID.encode() and (key := key_of(name)) is not None:
            text = value.decode()
            index.documents[kind, key] = entry = parse_entry(text)
            if not entry.revision:
                index.deleted[name.decode()] = text
    return index


def _document(target: DocumentId, fields: Mapping[bytes, bytes]) -> Document | None:
    if not fields:
        return None
    kind, key = target
    try:
        body = fields[b"body"]
        document = Document(
            kind,
            key,
            body,
            int(fields[b"revision"]),
            fields[b"saved_at"].decode(),
            fields[b"schema"].decode(),
        )
        intact = fields[b"checksum"].decode() == f"{crc32(body):08x}"
    except (KeyError, ValueError) as error:
        raise StateCorruptedError(
            f"the mirror's copy is not a document: {error!r}", kind=kind, key=key
        ) from error
    if not intact:
        raise StateCorruptedError(
            "the mirror's copy does not match its checksum", kind=kind, key=key
        )
    return document
