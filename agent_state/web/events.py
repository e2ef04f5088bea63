"""Live changes as server-sent events (the EventSource of the HTML standard, section 9.2).

    event: ready    the stream begins here; look at whatever you want to follow
    event: change   a document was saved: ``{"kind", "key", "revision", "outside"}``
    event: gone     a document was removed
    event: reset    something may have been missed (a restart, a gap): look again
    : …             a sign of life, every ``heartbeat`` seconds

Every event has an id, ``<server>-<number>``. A client that comes back with ``Last-Event-ID`` gets
what it has missed, as long as the server is the same and still has it. One listener on the store
fills one ring for all streams; a stream is no more than a place in the ring, so a slow client
costs nothing and loses, at worst, its place. Several changes of one document may come as one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass

from fastapi import Response
from starlette.types import Receive, Scope, Send

from agent_state.errors import AgentStateError
from agent_state.protocols import Notice, NoticeStream
from agent_state.storage.executor import shielded
from agent_state.web.problems import too_many

KEPT = 10_000
HEARTBEAT_SECONDS = 15.0
SEND_SECONDS = 30.0
STREAMS = 100
_BATCH = 256
_logger = logging.getLogger("agent_state.web")

Wanted = Callable[[Notice], bool]
Allowed = Callable[[], Awaitable[bool]]


@dataclass(frozen=True, slots=True)
class Numbered:
    """A notice and its place in the order of this server's."""

    number: int
    notice: Notice


class EventFeed:
    """The latest changes of a store, for any number of streams.

    ``keep``: so many changes are there for who comes back. ``heartbeat``: seconds between signs
    of life. ``streams``: so many at once. ``send_seconds``: how long a client may take none.
    """

    def __init__(
        self,
        watch: Callable[[], Awaitable[NoticeStream]],
        *,
        keep: int = KEPT,
        heartbeat: float = HEARTBEAT_SECONDS,
        streams: int = STREAMS,
        send_seconds: float = SEND_SECONDS,
    ) -> None:
        self._watch = watch
        self._server = secrets.token_hex(4)
        self._ring: deque[Numbered] = deque(maxlen=keep)
        self._last = 0
        self._news = asyncio.Event()
        self._listening: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._closed = False
        self._heartbeat = heartbeat
        self._free = streams
        self.send_seconds = send_seconds

    async def start(self) -> None:
        """Begin to listen to the store. Twice is a no-op."""
        async with self._starting:
            if self._listening is None and not self._closed:
                notices = await self._watch()
                self._listening = asyncio.create_task(
                    self._listen(notices), name="agent-state events"
                )

    async def aclose(self) -> None:
        """End all streams, and listen no more."""
        self._closed = True
        self._tell()
        task, self._listening = self._listening, None
        if task is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _listen(self, notices: NoticeStream) -> None:
        try:
            async with aclosing(notices):
                async for notice in notices:
                    self._last += 1
                    self._ring.append(Numbered(self._last, notice))
                    self._tell()
        except AgentStateError:
            _logger.exception("changes can no longer be followed")
        finally:
            self._closed = True  # nothing more is told, and a stream that hangs would hide it
            self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def stream(
        self, last_event_id: str | None, wanted: Wanted, allowed: Allowed
    ) -> AsyncGenerator[bytes, None]:
        """The events from now on, or from after the one that was seen last.

        ``allowed`` is asked at every sign of life; the stream ends when it says no.
        """
        at = self._place(last_event_id)
        if at is None:
            at = self._last
            yield self._event("reset" if last_event_id else "ready", at, {})
        now = asyncio.get_running_loop().time
        beat_at = now() + self._heartbeat
        while not self._closed:
            if now() >= beat_at:
                if not await allowed():
                    return
                # The id moves on though nothing was wanted, so that coming back is no gap.
                yield f": alive\nid: {self._server}-{at}\n\n".encode()
                beat_at = now() + self._heartbeat
            news, missed = self._news, self._last - at
            if missed > len(self._ring):
                at = self._last
                yield self._event("reset", at, {})
            elif missed:
                batch = self._latest(missed)
                at = batch[-1].number
                chunk = b"".join(self._told(one) for one in batch if wanted(one.notice))
                if chunk:
                    yield chunk
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(beat_at):
                        await news.wait()

    def _latest(self, count: int) -> list[Numbered]:
        """The first few of the ``count`` newest."""
        first = len(self._ring) - count
        return [self._ring[index] for index in range(first, min(first + _BATCH, len(self._ring)))]

    def _place(self, last_event_id: str | None) -> int | None:
        """The number that was seen last; None where it is not this server's, or too old."""
        server, _, digits = (last_event_id or "").rpartition("-")
        if server != self._server or not digits.isdecimal() or len(digits) > 18:
            return None
        number = int(digits)
        return number if self._last - len(self._ring) <= number <= self._last else None

    def _told(self, one: Numbered) -> bytes:
        notice = one.notice
        body = {
            "kind": notice.kind,
            "key": list(notice.key),
            "revision": notice.revision,
            "outside": notice.outside,
        }
        return self._event("gone" if notice.revision is None else "change", one.number, body)

    def _event(self, name: str, number: int, body: Mapping[str, object]) -> bytes:
        data = json.dumps(body, separators=(",", ":"))  # ASCII: no newline can be in it
        return f"event: {name}\nid: {self._server}-{number}\ndata: {data}\n\n".encode()

    def claim(self) -> bool:
        """Take one of the streams there may be; whether there was one."""
        if self._free <= 0 or self._closed:
            return False
        self._free -= 1
        return True

    def give_back(self) -> None:
        self._free += 1


class EventStream(Response):
    """One client's stream. It ends when the client goes, takes nothing, or the feed is closed."""

    media_type = "text/event-stream"

    def __init__(self, feed: EventFeed, chunks: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._feed = feed
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._feed.claim():
            await too_many("No further event stream can be opened now.")(scope, receive, send)
            return
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._feed.give_back()
            await shielded(_ended(sending, leaving))
        if not sending.cancelled():
            sending.result()

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async with aclosing(self._chunks) as chunks:
            async for chunk in chunks:
                try:
                    async with asyncio.timeout(self._feed.send_seconds):
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
                except TimeoutError:
                    return  # it takes nothing, not even an end; the server cuts the connection
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _ended(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
