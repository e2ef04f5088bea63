"""Live changes as server-sent events (the EventSource of the HTML standard, section 9.2).

    event: ready    the stream begins; read the documents that you want to follow
    event: change   a document was saved: ``{"kind", "key", "revision", "outside"}``
    event: gone     a document was removed
    event: reset    events may have been missed (a restart, a gap): read the documents again
    : alive         a heartbeat

Every event has an id, ``<server>-<number>``. A client that reconnects with ``Last-Event-ID``
receives the events since then, if the server was not restarted and still has them. One listener
on the store fills one ring buffer for all streams; a stream is only a position in the ring, so a
slow client costs nothing and loses, at worst, its position. Several changes of one document may
arrive as one event.
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
from itertools import islice
from typing import Any

from fastapi import Response
from starlette.types import Receive, Scope, Send

from agent_state.clock import Backoff
from agent_state.protocols import Notice, NoticeStream
from agent_state.storage.executor import end_task, shielded
from agent_state.web.answers import to_answer
from agent_state.web.problems import too_many

_BATCH = 256
_logger = logging.getLogger("agent_state.web")

Wanted = Callable[[Notice], bool]
Allowed = Callable[[], Awaitable[bool]]
Content = Callable[[Notice], Awaitable[object]]
"""The document that a notice is about, as it is answered; None if it cannot be read."""


@dataclass(frozen=True, slots=True)
class EventSettings:
    """The limits of the event streams of one application."""

    kept_events: int = 10_000
    """The latest events, kept for clients that reconnect."""
    heartbeat_seconds: float = 15.0
    """The time between two heartbeats of a stream; each checks that the client may still read."""
    max_streams: int = 100
    """Streams that may be open at once; a further one is answered with 503."""
    send_timeout_seconds: float = 30.0
    """A client that accepts no data for this long is disconnected."""


@dataclass(frozen=True, slots=True)
class NumberedNotice:
    """A notice and its number in the order of this server."""

    number: int
    notice: Notice


class EventFeed:
    """The latest changes of a store, for any number of streams."""

    def __init__(
        self, watch: Callable[[], Awaitable[NoticeStream]], settings: EventSettings
    ) -> None:
        self.settings = settings
        self._watch = watch
        self._server = secrets.token_hex(4)
        self._ring: deque[NumberedNotice] = deque(maxlen=settings.kept_events)
        self._last = 0
        self._news = asyncio.Event()
        self._listening: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._closed = False
        self._free_streams = settings.max_streams

    async def start(self) -> None:
        """Begin to listen to the store. A second call is a no-op."""
        async with self._starting:
            if self._listening is None and not self._closed:
                notices = await self._watch()
                self._listening = asyncio.create_task(
                    self._listen(notices), name="agent-state events"
                )

    async def aclose(self) -> None:
        """End all streams, and stop listening to the store."""
        self._closed = True
        self._wake_streams()
        task, self._listening = self._listening, None
        if task is not None:
            await end_task(task)

    async def _listen(self, notices: NoticeStream) -> None:
        """Follow the store until it is closed; an error is logged, and begins anew with a gap."""
        backoff = Backoff(0.1, 10.0)
        try:
            while True:
                try:
                    async with aclosing(notices):
                        async for notice in notices:
                            self._last += 1
                            self._ring.append(NumberedNotice(self._last, notice))
                            self._wake_streams()
                            backoff.reset()
                    return
                except Exception:  # ending would be silent: the streams would wait for ever
                    _logger.exception("changes cannot be followed; trying again")
                    notices = await self._watch_again(backoff)
                    self._ring.clear()
                    self._last += 1  # who was there is behind, and what was kept is gone: a reset
                    self._wake_streams()
        finally:
            self._closed = True  # no event follows; a stream that stayed open would hide that
            self._wake_streams()

    async def _watch_again(self, backoff: Backoff) -> NoticeStream:
        while True:
            await asyncio.sleep(backoff.pause())
            try:
                return await self._watch()
            except Exception as error:  # noqa: BLE001  # as above; the first one was logged whole
                _logger.warning("changes cannot be followed yet: %s", error)

    def _wake_streams(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def stream(
        self,
        last_event_id: str | None,
        wanted: Wanted,
        allowed: Allowed,
        content: Content | None = None,
    ) -> AsyncGenerator[bytes, None]:
        """The events from now on, or those after ``last_event_id``.

        ``allowed`` is awaited at every heartbeat; the stream ends once it returns False.
        ``content``: each change has the document, as it is when the event is sent.
        """
        at = self._position(last_event_id)
        if at is None:
            at = self._last
            yield self._event("reset" if last_event_id else "ready", at, {})
        now = asyncio.get_running_loop().time
        beat_at = now() + self.settings.heartbeat_seconds
        while not self._closed:
            if now() >= beat_at:
                if not await allowed():
                    return
                # The id advances even if no event was wanted, so that a reconnect finds no gap.
                yield f": alive\nid: {self.id_of(at)}\n\n".encode()
                beat_at = now() + self.settings.heartbeat_seconds
            news, missed = self._news, self._last - at
            if missed > len(self._ring):
                at = self._last
                yield self._event("reset", at, {})
            elif missed:
                batch = self._latest(missed)
                at = batch[-1].number
                events = [
                    await self._change_event(one, content) for one in batch if wanted(one.notice)
                ]
                chunk = b"".join(events)
                if chunk:
                    yield chunk
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(beat_at):
                        await news.wait()

    def id_of(self, number: int) -> str:
        """The id of the event of this number."""
        return f"{self._server}-{number}"

    @property
    def last_id(self) -> str:
        """The id of the last event; a stream from there has all that follows."""
        return self.id_of(self._last)

    def newest(self, count: int) -> list[NumberedNotice]:
        """The newest notices, the last one first."""
        return [*islice(reversed(self._ring), count)]

    def _latest(self, count: int) -> list[NumberedNotice]:
        """The first batch of the ``count`` newest notices."""
        first = len(self._ring) - count
        return [self._ring[index] for index in range(first, min(first + _BATCH, len(self._ring)))]

    def _position(self, last_event_id: str | None) -> int | None:
        """The number of the last event; None for another server's, or one no longer kept."""
        server, _, digits = (last_event_id or "").rpartition("-")
        if server != self._server or not digits.isdecimal() or len(digits) > 18:
            return None
        number = int(digits)
        return number if self._last - len(self._ring) <= number <= self._last else None

    async def _change_event(self, one: NumberedNotice, content: Content | None) -> bytes:
        notice = one.notice
        body: dict[str, object] = {
            "kind": notice.kind,
            "key": list(notice.key),
            "revision": notice.revision,
            "outside": notice.outside,
        }
        if content is not None and notice.revision is not None:
            body["document"] = to_answer(await content(notice))
        return self._event("gone" if notice.revision is None else "change", one.number, body)

    def _event(self, name: str, number: int, body: Mapping[str, object]) -> bytes:
        data = json.dumps(body, separators=(",", ":"))  # ASCII: no newline can be in it
        return f"event: {name}\nid: {self.id_of(number)}\ndata: {data}\n\n".encode()

    def claim(self) -> bool:
        """Count one more open stream; False if there are too many, or the feed is closed."""
        if self._free_streams <= 0 or self._closed:
            return False
        self._free_streams -= 1
        return True

    def release(self) -> None:
        """Count one open stream less."""
        self._free_streams += 1


def _event_schema(name: str, about: str, data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "description": about,
        "required": ["event", "data"],
        "properties": {
            "event": {"type": "string", "const": name},
            "id": {"type": "string", "description": "The `Last-Event-ID` to go on from here."},
            "data": data,
        },
        "additionalProperties": False,
    }


_NOTHING = {"type": "object", "additionalProperties": False}
_DOCUMENT = {
    "type": "object",
    "required": ["kind", "key", "revision", "outside"],
    "properties": {
        "kind": {"type": "string", "description": "The kind of the document, such as `tasks`."},
        "key": {"type": "array", "items": {"type": "string"}},
        "revision": {
            "type": ["integer", "null"],
            "description": "The revision now: 0 if it is not known, null once it is removed.",
        },
        "outside": {
            "type": "boolean",
            "description": "Another process, or a person, made the change.",
        },
        "document": {
            "description": "With `include=body`: the document now, as GET answers it; null if it "
            "cannot be read.",
        },
    },
    "additionalProperties": False,
}
EVENT_SCHEMAS: dict[str, Any] = {
    "ReadyEvent": _event_schema(
        "ready", "The stream begins: read the documents that you want to follow.", _NOTHING
    ),
    "ChangeEvent": _event_schema("change", "A document was saved.", _DOCUMENT),
    "GoneEvent": _event_schema("gone", "A document was removed.", _DOCUMENT),
    "ResetEvent": _event_schema(
        "reset", "Events may have been missed: read the documents again.", _NOTHING
    ),
    "ServerEvent": {
        "description": "One server-sent event, with its `data` parsed.",
        "oneOf": [
            {"$ref": f"#/components/schemas/{name}"}
            for name in ("ReadyEvent", "ChangeEvent", "GoneEvent", "ResetEvent")
        ],
        # Without the mapping the values of `event` would be the names of the schemas.
        "discriminator": {
            "propertyName": "event",
            "mapping": {
                name: f"#/components/schemas/{name.title()}Event"
                for name in ("ready", "change", "gone", "reset")
            },
        },
    },
}
"""The schemas of events, for the OpenAPI document."""

SSE: dict[str, Any] = {
    "description": "Server-sent events: `ready`, `change`, `gone`, `reset`.",
    "content": {
        "text/event-stream": {
            "schema": {
                "type": "string",
                "contentMediaType": "text/event-stream",
                "contentSchema": {"$ref": "#/components/schemas/ServerEvent"},
            }
        }
    },
}
"""The OpenAPI response of an event stream."""


class EventStream(Response):
    """The stream of one client.

    It ends when the client disconnects or accepts no data, or when the feed is closed.
    """

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
        leaving = asyncio.create_task(_until_disconnect(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._feed.release()
            await shielded(_ended(sending, leaving))
        if not sending.cancelled():
            sending.result()

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async with aclosing(self._chunks) as chunks:
            async for chunk in chunks:
                try:
                    async with asyncio.timeout(self._feed.settings.send_timeout_seconds):
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
                except TimeoutError:
                    return  # the client accepts nothing; the server cuts the connection
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _ended(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def open_stream(
    feed: EventFeed,
    last_event_id: str | None,
    wanted: Wanted,
    allowed: Allowed,
    content: Content | None = None,
) -> EventStream:
    """A stream of the feed's events; see ``EventFeed.stream``."""
    await feed.start()
    return EventStream(feed, feed.stream(last_event_id, wanted, allowed, content))
