"""An event store for resumable MCP servers: the events of each day are one log."""

from __future__ import annotations

import re
from contextlib import aclosing
from datetime import datetime, timedelta
from types import TracebackType
from typing import Self

from mcp.server.streamable_http import EventCallback, EventMessage, EventStore
from mcp_types import JSONRPCMessage, jsonrpc_message_adapter

from agent_state import StatePersistenceManager
from agent_state.access import StateAccess, StateLocation
from agent_state.protocols import Durability, JsonObject

KIND = "mcp_events"
"""The kind of the logs of events; a key is a day."""
_EVENT_ID = re.compile(r"(\d{4}-\d{2}-\d{2})/(\d{1,18})")


class AgentStateEventStore(EventStore):
    """Keeps the events of an MCP server in a state directory, so that clients can resume.

    ``state``: a directory, an open ``StatePersistenceManager`` or a ``StateStore``; see
    ``agent_state.access.StateAccess``, also for ``exclusive`` and ``durability``. ``keep_days``:
    the days for which events are kept; with the first event of a day older ones are erased.

    An event's id is the day and its number. The SDK names streams within one session, so a server
    with several sessions gives each a store with a state directory, or a kind of ids, of its own.
    """

    def __init__(
        self,
        state: StateLocation,
        *,
        keep_days: int = 7,
        exclusive: bool = False,
        durability: Durability | None = None,
    ) -> None:
        if keep_days < 1:
            raise ValueError(f"events are kept for a day at least, not {keep_days}")
        self._access = StateAccess(state, exclusive=exclusive, durability=durability)
        self._keep = timedelta(days=keep_days)
        self._today = ""

    async def __aenter__(self) -> Self:
        await self._access.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close a directory that was opened here."""
        await self._access.close()

    async def store_event(self, stream_id: str, message: JSONRPCMessage | None) -> str:
        record: JsonObject = {"stream": stream_id}
        if message is not None:
            record["message"] = message.model_dump(by_alias=True, mode="json", exclude_unset=True)
        return await self._access.run(lambda m: self._store(m, record))

    async def replay_events_after(
        self, last_event_id: str, send_callback: EventCallback
    ) -> str | None:
        """Send what followed in the stream of an event; returns the stream, None if unknown."""
        found = _EVENT_ID.fullmatch(last_event_id)
        if found is None:
            return None
        day, number = found[1], int(found[2])
        stream, events = await self._access.run(lambda m: _events_after(m, day, number))
        for event_id, message in events:
            await send_callback(
                EventMessage(jsonrpc_message_adapter.validate_python(message), event_id)
            )
        return stream

    async def _store(self, manager: StatePersistenceManager, record: JsonObject) -> str:
        now = manager.clock.now()
        day = f"{now:%Y-%m-%d}"
        number = await manager.append(KIND, day, record)
        if day != self._today:
            await self._forget(manager, now)
            self._today = day
        return f"{day}/{number}"

    async def _forget(self, manager: StatePersistenceManager, now: datetime) -> None:
        oldest = f"{now - self._keep:%Y-%m-%d}"
        for key in await manager.store.logs(KIND):
            if key[0] < oldest:
                await manager.erase(KIND, key)


async def _events_after(
    manager: StatePersistenceManager, day: str, number: int
) -> tuple[str | None, list[tuple[str, JsonObject]]]:
    """The stream of an event, and the messages that followed in it."""
    stream: str | None = None
    events = []
    days = [key[0] for key in await manager.store.logs(KIND) if key[0] >= day]
    for each in days:
        after = number - 1 if each == day else 0
        async with aclosing(manager.read_log(KIND, each, after=after)) as records:
            async for entry in records:
                record = entry.record
                if each == day and entry.seq == number:
                    stream = record["stream"]
                elif stream is None:
                    return None, []
                elif record["stream"] == stream and "message" in record:
                    events.append((f"{each}/{entry.seq}", record["message"]))
    return stream, events
