"""Notices of what others change, from a capped stream that the commit script writes.

Every entry names the one before it. Where they do not follow one another (too many came while we
were away, the server was emptied, or another one took over that has less), everything is looked
at again. So nothing is missed, however long the connection was gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

from agent_state.clock import Backoff
from agent_state.errors import StorageError
from agent_state.protocols import Notice
from agent_state.redis.client import FAILURES
from agent_state.redis.keys import Names, key_of
from agent_state.redis.link import Lane, Link
from agent_state.redis.reading import members
from agent_state.storage.paths import is_kind
from agent_state.storage.watch import Broadcast

_logger = logging.getLogger("agent_state.redis")
_PAGE = 100
_LONGEST_PAUSE = 2.0

Seen = set[tuple[str, str]]


class Following(Broadcast):
    """Tells everyone who listens what others change. Begins with the first listener."""

    def __init__(
        self,
        names: Names,
        writer: str,
        lane: Lane,
        connect: Callable[[], Link],
        *,
        was_doubtful: Callable[[int], Awaitable[bool]],
    ) -> None:
        super().__init__()
        self._names = names
        self._writer = writer.encode()
        self._lane = lane
        self._connect = connect
        self._was_doubtful = was_doubtful
        self._position = b"0-0"
        self._seen: Seen = set()
        self._starting = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Changes after this are told. Twice is a no-op. Raises ``StorageError``."""
        async with self._starting:
            if self._task is None:
                self._position = await self._newest()
                self._seen = await self._listing()
                self._task = asyncio.create_task(self._follow(), name="agent-state redis notices")
                self._task.add_done_callback(self._ended)

    async def close(self) -> None:
        """Nobody is told anything any more."""
        self.end()
        # redis-py swallows a cancellation that meets it while it connects.
        while self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task], timeout=0.05)
        self._task = None

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _logger.error("changes of others are not told any more", exc_info=error)
            self.end()  # who listens is not left waiting for what never comes

    async def _follow(self) -> None:
        link = self._connect()  # a connection of its own: it waits for what comes
        millis = max(1, int(link.timeout * 500))
        backoff = Backoff(0.05, _LONGEST_PAUSE)
        try:
            while True:
                try:
                    entries = await self._read(link, millis)
                    if not entries and await self._newest() != self._position:
                        entries = await self._read(link, 1)
                        if not entries:
                            await self._look_again()
                    for ident, fields in entries:
                        await self._take(ident, fields)
                    backoff.reset()
                except (*FAILURES, StorageError) as error:
                    if not backoff.attempts:
                        _logger.warning("changes of others are not told for now: %s", error)
                    await asyncio.sleep(backoff.pause())
        finally:
            await link.close()

    async def _read(self, link: Link, millis: int) -> list[tuple[bytes, Mapping[bytes, bytes]]]:
        streams: Any = {self._names.notices: self._position}
        reply: Any = await link.client.xread(streams, count=_PAGE, block=millis)
        if not reply:
            return []
        if isinstance(reply, dict):  # as the third version of the protocol has it
            [(entries, *_)] = reply.values()
        else:
            [(_, entries)] = reply
        return list(entries)

    async def _newest(self) -> bytes:
        entries = await self._lane.run("XREVRANGE", self._names.notices, "+", "-", "COUNT", 1)
        return bytes(entries[0][0]) if entries else b"0-0"

    async def _take(self, ident: bytes, fields: Mapping[bytes, bytes]) -> None:
        lost = fields.get(b"before") != self._position
        ours = fields.get(b"writer") == self._writer
        number = fields.get(b"number", b"")
        if ours and number.isdigit():
            ours = not await self._was_doubtful(int(number))
        for kind, revision, text in _changes(fields.get(b"changes", b"")):
            (self._seen.add if revision else self._seen.discard)((kind, text))
            key = key_of(text.encode())
            if key is not None and not ours:
                self.notify(Notice(kind, key, revision or None, outside=True))
        self._position = ident
        if lost:
            await self._look_again()

    async def _look_again(self) -> None:
        """Tell of everything there is, and of what was there and is no more."""
        _logger.warning("notices were lost; everything is told anew")
        position = await self._newest()
        now = await self._listing()
        for kind, text in now | self._seen:
            key = key_of(text.encode())
            if key is not None:
                self.notify(Notice(kind, key, 0 if (kind, text) in now else None, outside=True))
        self._seen, self._position = now, position

    async def _listing(self) -> Seen:
        listing: Seen = set()
        for kind in sorted(await self._lane.run("SMEMBERS", self._names.kinds)):
            if is_kind(kind.decode(errors="replace")):
                index = self._names.index(kind.decode())
                async for page in members(self._lane, index, ()):
                    listing.update((kind.decode(), member.text) for member in page)
        return listing


def _changes(lines: bytes) -> Iterator[tuple[str, int, str]]:
    """Kind, revision (0 when it is gone) and key of each change."""
    for line in lines.decode(errors="replace").split("\n"):
        kind, _, rest = line.partition(" ")
        revision, _, text = rest.partition(" ")
        if is_kind(kind) and revision.isdigit() and text:
            yield kind, int(revision), text
