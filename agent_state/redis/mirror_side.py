"""The mirror's side: what is in Redis, read and written. Raises redis-py's errors."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from hashlib import sha1
from importlib.resources import files
from typing import Any, NamedTuple
from zlib import crc32

from redis.asyncio import Redis
from redis.exceptions import NoScriptError

from agent_state.errors import MirrorError, StateCorruptedError
from agent_state.protocols import Document, LogRecord
from agent_state.redis.client import without_password
from agent_state.redis.mirror_layout import (
    LOG,
    MARK,
    NOTHING,
    WRITES,
    Entry,
    Index,
    Names,
    Place,
    entry_of,
    field_of,
    take_in,
    version_of,
)
from agent_state.redis.mirror_trouble import is_not_ours
from agent_state.redis.scripts import Script

NOTICES_KEPT = 10_000
GONE_SECONDS = 3600
"""What is gone is remembered so long: no command is under way for an hour."""
_SCANNED = 1000


def _script(name: str) -> Script:
    text = files("agent_state.redis").joinpath("lua", f"{name}.lua").read_text("utf-8")
    return Script(text, sha1(text.encode(), usedforsecurity=False).hexdigest())


_PUT, _APPEND = _script("mirror_put"), _script("mirror_append")
_CLAIM, _FORGET = _script("mirror_claim"), _script("mirror_forget")
_DROP = _script("mirror_drop")


class AnotherInstanceError(MirrorError):
    """What is under this prefix is the copy of another state directory."""


class MarkChangedError(Exception):
    """The index of a kind is not the one that was read: it is gone, or was begun anew."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


class Version(NamedTuple):
    """A document as it is now (None: gone), and what Redis must still hold for it to go there."""

    place: Place
    document: Document | None
    over: Entry


class MirrorSide:
    """One mirror in Redis.

    ``ttl``: for each kind, seconds after its last write until a key goes. ``keeps``: seconds that
    an index with a TTL lives at least, as long as somebody looks at it.
    """

    def __init__(
        self, client: Redis, url: str, prefix: str, ttl: Mapping[str, float], keeps: float
    ) -> None:
        # What redis-py says of its replies changes with its version, and knows no bytes.
        self.client: Any = client
        self.names = Names(prefix)
        self.where = f"{prefix!r} at {without_password(url)}" if prefix else without_password(url)
        self._ttl = {kind: int(seconds * 1000) for kind, seconds in ttl.items()}
        self._index_ttl = int(keeps * 1000)

    # -- whose it is -----------------------------------------------------------------------

    async def owner(self) -> str | None:
        """The instance whose copy this is; None when there is none."""
        found = await self.client.hget(self.names.mirror, "instance")
        return None if found is None else str(found, "utf-8")

    async def claim(self, instance: str, *, take_over: bool = False) -> None:
        """Make this the copy of an instance. Raises ``AnotherInstanceError``."""
        if take_over:
            await self.client.hset(self.names.mirror, "instance", instance)
            return
        owner = await self.owner()
        if owner is None:
            await self.client.hsetnx(self.names.mirror, "instance", instance)
            owner = await self.owner()
        if owner is not None and owner != instance:
            raise AnotherInstanceError(
                f"{self.where} is the mirror of another state directory (instance {owner}, this "
                f"one is {instance}): choose another prefix, or take it over with "
                "'agent-state mirror rebuild --take-over'"
            )

    async def kinds(self) -> list[str]:
        """The kinds that have been mirrored."""
        fields = await self.client.hkeys(self.names.mirror)
        return sorted(
            field.removeprefix(b"kind:").decode() for field in fields if field.startswith(b"kind:")
        )

    async def adopt_ttl(self) -> None:
        """Let everything live as long as whoever wrote it said."""
        fields = await self.client.hgetall(self.names.mirror)
        for field, ttl in fields.items():
            if field.startswith(b"kind:") and int(ttl):
                self._ttl[field.removeprefix(b"kind:").decode()] = int(ttl)

    async def server(self) -> str:
        """Which run of which server answers; empty where many do, as in a cluster."""
        info = await self.client.info("server")
        return str(info.get("run_id", ""))

    def expires(self, kind: str) -> bool:
        """Whether what is mirrored of a kind goes after some time."""
        return kind in self._ttl

    # -- indexes ---------------------------------------------------------------------------

    async def load(self, kind: str, instance: str, *, anew: bool = False) -> Index:
        """What Redis has of a kind; its index is begun if there is none, or with ``anew``.

        Raises ``AnotherInstanceError``.
        """
        names, ttl = self.names, str(self._ttl.get(kind, 0)).encode()
        # Asked first: a Redis that is full or read-only still answers.
        if await self.client.hget(names.mirror, f"kind:{kind}") != ttl:
            await self.client.hset(names.mirror, f"kind:{kind}", ttl)
        mark = await self._run(
            _CLAIM,
            [names.index(kind), names.changes(kind)],
            [f"{instance} {secrets.token_hex(6)}", "1" if anew else ""],
        )
        text = mark.decode()
        if text.partition(" ")[0] != instance:
            raise AnotherInstanceError(f"{self.where}: the index of {kind} is another instance's")
        return await self.read_index(kind, text)

    async def read_index(self, kind: str, mark: str = "") -> Index:
        """What Redis says it has of a kind."""
        index, cursor = Index(mark, 0, {}, {}, {}), 0
        while True:
            cursor, part = await self.client.hscan(self.names.index(kind), cursor, count=_SCANNED)
            index = take_in(index, kind, part)
            if not cursor:
                return index

    async def glance(self, kind: str) -> tuple[str, int]:
        """The mark of an index and how many writes it has seen; keeps it from going by its TTL."""
        index = self.names.index(kind)
        mark, writes = await self.client.hmget(index, [MARK, WRITES])
        if kind in self._ttl and mark is not None:
            await self.client.pexpire(index, self._lasting(kind))
        return (mark or b"").decode(), int(writes or 0)

    async def entries(self, places: Sequence[Place]) -> list[Entry]:
        """What the index says of these documents of one kind, now."""
        index = self.names.index(places[0][0])
        found = await self.client.hmget(index, [field_of(place) for place in places])
        return [entry_of(text.decode()) if text else NOTHING for text in found]

    async def forget(self, kind: str, gone: Mapping[str, str]) -> None:
        """Forget what has been gone for long."""
        fields = list(gone.items())
        for start in range(0, len(fields), _SCANNED):
            pairs = [text for pair in fields[start : start + _SCANNED] for text in pair]
            await self._run(_FORGET, [self.names.index(kind)], [GONE_SECONDS, *pairs])

    # -- writing ---------------------------------------------------------------------------

    async def put(self, kind: str, mark: str, versions: Sequence[Version]) -> list[str]:
        """Bring documents of one kind up to date; for each ``ok …``, ``moved …``, ``error …``.

        Raises ``MarkChangedError``; then nothing was written.
        """
        names = self.names
        keys = [names.index(kind), names.changes(kind)]
        ttl = self._ttl.get(kind, 0)
        arguments: list[str | bytes | int] = [mark, ttl, self._lasting(kind), NOTICES_KEPT]
        for place, document, over in versions:
            field = field_of(place)
            keys.append(names.document(kind, field))
            arguments += [field, over.write, *version_of(document)]
            if document is None:
                arguments += ["", "", ""]
            else:
                arguments += [document.saved_at, document.schema, document.body]
        first, *replies = await self._run(_PUT, keys, arguments)
        if first == b"mark":
            raise MarkChangedError(kind)
        return [reply.decode("utf-8", "replace") for reply in replies]

    async def append(
        self, place: Place, mark: str, after: int, records: Sequence[LogRecord]
    ) -> int | None:
        """Add records to a log that ends with ``after`` there; None when it does, else its end.

        Raises ``MarkChangedError``.
        """
        kind, field = place[0], field_of(place)
        arguments: list[str | bytes | int] = [
            mark,
            self._ttl.get(kind, 0),
            self._lasting(kind),
            LOG + field,
            after,
        ]
        for record in records:
            ident = "" if record.dedupe_key is None else f"={record.dedupe_key}"
            arguments += [record.seq, record.body, ident]
        keys = [self.names.index(kind), self.names.log(kind, field)]
        word, last = await self._run(_APPEND, keys, arguments)
        if word == b"mark":
            raise MarkChangedError(kind)
        return None if word == b"ok" else int(last)

    async def drop_log(self, place: Place, mark: str) -> None:
        """Remove a log. Raises ``MarkChangedError``."""
        kind, field = place[0], field_of(place)
        keys = [self.names.index(kind), self.names.log(kind, field)]
        if await self._run(_DROP, keys, [mark, LOG + field]) == b"mark":
            raise MarkChangedError(kind)

    def _lasting(self, kind: str) -> int:
        """How long an index lives, in ms: as long as its documents, and while anybody looks."""
        return max(self._ttl.get(kind, 0), self._index_ttl)

    async def _run(
        self, script: Script, keys: Sequence[str], arguments: Iterable[str | bytes | int]
    ) -> Any:
        listed = [*keys, *arguments]
        try:
            return await self.client.evalsha(script.sha, len(keys), *listed)
        except NoScriptError:
            return await self.client.eval(script.text, len(keys), *listed)

    # -- reading back ----------------------------------------------------------------------

    async def get(self, place: Place) -> Document | None:
        """The mirrored version. Raises ``StateCorruptedError`` when it is not as it was written."""
        key = self.names.document(place[0], field_of(place))
        return _document(place, await self.client.hgetall(key))

    async def versions(self, places: Sequence[Place]) -> list[tuple[str, str]]:
        """The versions of these documents of one kind, as their own keys say it.

        Two empty texts where there is none, or a key that is somebody else's.
        """
        async with self.client.pipeline(transaction=False) as pipeline:
            for place in places:
                pipeline.hmget(self.names.document(place[0], field_of(place)), _VERSION)
            replies = await pipeline.execute(raise_on_error=False)
        return [_own_version(reply) for reply in replies]

    async def ends(self, places: Sequence[Place]) -> list[int]:
        """The number of the last record of each of these logs of one kind; 0 for none."""
        async with self.client.pipeline(transaction=False) as pipeline:
            for place in places:
                pipeline.xrevrange(self.names.log(place[0], field_of(place)), count=1)
            replies = await pipeline.execute(raise_on_error=False)
        for reply in replies:
            if isinstance(reply, Exception) and not is_not_ours(str(reply)):
                raise reply
        return [
            int(reply[0][0].partition(b"-")[0]) if isinstance(reply, list) and reply else 0
            for reply in replies
        ]

    async def read_log(self, place: Place, after: int = 0) -> AsyncIterator[LogRecord]:
        """The mirrored records with a number above ``after``."""
        key = self.names.log(place[0], field_of(place))
        while True:
            found = await self.client.xrange(key, f"({after}-{2**64 - 1}", "+", count=_SCANNED)
            for ident, fields in found:
                after = int(ident.partition(b"-")[0])
                dedupe_key = fields.get(b"dedupe_id")
                name = None if dedupe_key is None else dedupe_key.decode()
                yield LogRecord(after, fields[b"body"], name)
            if len(found) < _SCANNED:
                return

    async def sweep(self, kind: str, index: Index) -> int:
        """Remove the keys of a kind that its index does not know; how many."""
        names, removed = self.names, 0
        known = {
            names.document(kind, field_of(p)) for p, e in index.documents.items() if e.revision
        }
        known |= {names.log(kind, field_of(place)) for place in index.logs}
        for pattern, of in ((names.document(kind, ""), "HASH"), (names.log(kind, ""), "STREAM")):
            match = f"{_literal(pattern)}*"
            async for key in self.client.scan_iter(match, count=_SCANNED, _type=of):
                if key.decode("utf-8", "replace") not in known:
                    removed += await self.client.delete(key)
        return removed


_VERSION = ["revision", "checksum"]


def _own_version(reply: Exception | Sequence[bytes | None]) -> tuple[str, str]:
    if not isinstance(reply, Exception):
        revision, checksum = reply
        return (revision or b"").decode(), (checksum or b"").decode()
    if is_not_ours(str(reply)):
        return "", ""
    raise reply


def _literal(text: str) -> str:
    """A pattern that matches this text alone."""
    return "".join(f"\\{letter}" if letter in "*?[]\\^" else letter for letter in text)


def _document(place: Place, fields: Mapping[bytes, bytes]) -> Document | None:
    if not fields:
        return None
    try:
        body = fields[b"body"]
        document = Document(
            *place,
            body,
            int(fields[b"revision"]),
            fields[b"saved_at"].decode(),
            fields[b"schema"].decode(),
        )
        whole = fields[b"checksum"].decode() == f"{crc32(body):08x}"
    except (KeyError, ValueError) as error:
        raise StateCorruptedError(
            f"the mirror holds no document: {error!r}", kind=place[0], key=place[1]
        ) from error
    if not whole:
        raise StateCorruptedError(
            "its checksum in the mirror does not fit", kind=place[0], key=place[1]
        )
    return document
