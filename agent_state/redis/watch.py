"""Notices of other stores' changes, from a capped stream that the commit script writes.

Every entry names the one before it. Where they do not follow one another (the stream was trimmed
while this process was away, or the server was emptied or replaced by one that has less), every
document is reported as changed. So no change is missed, however long the connection was lost.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

from agent_state.clock import Backoff
from agent_state.protocols import Notice
from agent_state.redis.client import FAILURES, PipelineBatcher, RedisLink
from agent_state.redis.keys import StoreKeys, key_of
from agent_state.redis.reader import StoreReader
from agent_state.storage.paths import is_kind
from agent_state.storage.watch import Broadcast

_PAGE_ENTRIES = 100
_logger = logging.getLogger("agent_state.redis")

Listing = set[tuple[str, str]]
"""Kind, and key as text, of each document."""


class NoticeReader:
    """Gives the notices of other stores' changes to ``listeners``. Starts with the first of them.

    ``connect`` makes a link for the reads that wait. ``was_unknown`` returns whether a batch
    of this store had an unknown outcome, so that its notices count as another's.
    """

    def __init__(
        self,
        keys: StoreKeys,
        writer: str,
        batcher: PipelineBatcher,
        reader: StoreReader,
        *,
        listeners: Broadcast,
        connect: Callable[[], RedisLink],
        was_unknown: Callable[[int], Awaitable[bool]],
    ) -> None:
        self._keys = keys
        self._writer = writer.encode()
        self._batcher = batcher
        self._reader = reader
        self._listeners = listeners
        self._connect = connect
        self._was_unknown = was_unknown
        self._position = b"0-0"
        self._known: Listing = set()
        self._missed = False
        """Whether notices were passed over, so that every document is to be reported."""
        self._starting = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Report the changes after this call. A second call does nothing.

        Raises ``StorageError``.
        """
        async with self._starting:
            if self._task is None:
                self._position = await self._newest()
                self._known = await self._listing()
                self._task = asyncio.create_task(self._follow(), name="agent-state redis notices")

    async def close(self) -> None:
        """Stop reading, and end every subscription."""
        self._listeners.end()
        # redis-py swallows a cancellation that arrives while it connects.
        while self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task], timeout=0.05)
        self._task = None

    async def _follow(self) -> None:
        link = self._connect()  # a link of its own, because its reads wait
        millis = max(1, int(link.timeout_seconds * 500))
        backoff = Backoff(0.05, 2.0)
        try:
            while True:
                try:
                    await self._follow_once(link, millis)
                    backoff.reset()
                except FAILURES as error:  # StorageError is an OSError
                    if not backoff.attempts:
                        _logger.warning("changes of others are not reported for now: %s", error)
                    await asyncio.sleep(backoff.pause())
                except Exception:  # a listener would wait for ever for notices that never come
                    _logger.exception("a notice cannot be read; every document is reported instead")
                    self._missed = True
                    await asyncio.sleep(backoff.pause())
        finally:
            await link.close()

    async def _follow_once(self, link: RedisLink, millis: int) -> None:
        if self._missed:
            await self._report_all()
            self._missed = False
        entries = await self._read(link, millis)
        if not entries and await self._newest() != self._position:
            entries = await self._read(link, 1)
            if not entries:
                await self._report_all()
        for entry_id, fields in entries:
            await self._report(entry_id, fields)

    async def _read(
        self, link: RedisLink, millis: int
    ) -> list[tuple[bytes, Mapping[bytes, bytes]]]:
        streams: Any = {self._keys.notices: self._position}
        reply: Any = await link.client.xread(streams, count=_PAGE_ENTRIES, block=millis)
        if not reply:
            return []
        if isinstance(reply, dict):  # the protocol's third version
            [(entries, *_)] = reply.values()
        else:
            [(_, entries)] = reply
        return list(entries)

    async def _newest(self) -> bytes:
        entries = await self._batcher.run("XREVRANGE", self._keys.notices, "+", "-", "COUNT", 1)
        return bytes(entries[0][0]) if entries else b"0-0"

    async def _report(self, entry_id: bytes, fields: Mapping[bytes, bytes]) -> None:
        missed = fields.get(b"before") != self._position
        ours = fields.get(b"writer") == self._writer
        number = fields.get(b"number", b"")
        if ours and number.isdigit():
            ours = not await self._was_unknown(int(number))
        for kind, revision, text in _changes(fields.get(b"changes", b"")):
            (self._known.add if revision else self._known.discard)((kind, text))
            key = key_of(text.encode())
            if key is not None and not ours:
                self._listeners.notify(Notice(kind, key, revision or None, outside=True))
        self._position = entry_id
        if missed:
            await self._report_all()

    async def _report_all(self) -> None:
        """Report every document as changed, and those that have disappeared as deleted."""
        _logger.warning("notices were lost; every document is reported as changed")
        position = await self._newest()
        now = await self._listing()
        for kind, text in now | self._known:
            key = key_of(text.encode())
            if key is not None:
                self._listeners.notify(
                    Notice(kind, key, 0 if (kind, text) in now else None, outside=True)
                )
        self._known, self._position = now, position

    async def _listing(self) -> Listing:
        listing: Listing = set()
        for kind in sorted(await self._batcher.run("SMEMBERS", self._keys.kinds)):
            if is_kind(kind.decode(errors="replace")):
                async for page in self._reader.members(self._keys.index(kind.decode())):
                    listing.update((kind.decode(), member.text) for member in page)
        return listing


def _changes(lines: bytes) -> Iterator[tuple[str, int, str]]:
    """Kind, revision (0: deleted) and key of each change."""
    for line in lines.decode(errors="replace").split("\n"):
        kind, _, rest = line.partition(" ")
        revision, _, text = rest.partition(" ")
        if is_kind(kind) and revision.isdecimal() and len(revision) <= 18 and text:
            yield kind, int(revision), text
