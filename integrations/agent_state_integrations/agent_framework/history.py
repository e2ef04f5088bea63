"""A history provider for the agents of Microsoft Agent Framework: a log for each session."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, ClassVar, Self

from agent_framework import HistoryProvider, Message
from agent_framework._sessions import filter_new_messages

from agent_state import StatePersistenceManager
from agent_state.access import StateAccess, StateLocation, as_segment
from agent_state.errors import Key
from agent_state.protocols import Durability, JsonObject

KIND = "agent_framework_history"
"""The kind of the logs of messages, one for each session and source id."""


class AgentStateHistoryProvider(HistoryProvider):
    """Keeps the messages of sessions in a state directory.

    ``state``: a directory, an open ``StatePersistenceManager`` or a ``StateStore``; see
    ``agent_state.access.StateAccess``, also for ``exclusive`` and ``durability``. The rest is as
    for the framework's ``FileHistoryProvider``. Providers with different ``source_id`` share
    nothing.

    A run that is stored again, or a transcript from its beginning, adds the messages that the
    session does not have, by the framework's own rule. The messages of one call are stored
    together or not at all. ``SerializationError``: a message is not JSON, ``ValueError``: it could
    not be loaded again.
    """

    DEFAULT_SOURCE_ID: ClassVar[str] = "agent_state"

    def __init__(
        self,
        state: StateLocation,
        *,
        source_id: str = DEFAULT_SOURCE_ID,
        load_messages: bool = True,
        store_inputs: bool = True,
        store_context_messages: bool = False,
        store_context_from: set[str] | None = None,
        store_outputs: bool = True,
        skip_excluded: bool = False,
        exclusive: bool = False,
        durability: Durability | None = None,
    ) -> None:
        super().__init__(
            source_id,
            load_messages=load_messages,
            store_inputs=store_inputs,
            store_context_messages=store_context_messages,
            store_context_from=store_context_from,
            store_outputs=store_outputs,
        )
        self.skip_excluded = skip_excluded
        self._access = StateAccess(state, exclusive=exclusive, durability=durability)

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

    async def get_messages(
        self, session_id: str | None, *, state: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Message]:
        """The messages of a session in order, copies. ``session_id=None`` is a session too."""
        log = self._log(session_id)
        found = await self._access.run(lambda m: _messages(m, log))
        messages = [Message.from_dict(each) for each in found]
        if self.skip_excluded:
            return [each for each in messages if not each.additional_properties.get("_excluded")]
        return messages

    async def save_messages(
        self,
        session_id: str | None,
        messages: Sequence[Message],
        *,
        state: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the messages that the session does not have."""
        incoming = list(messages)
        for each in incoming:
            Message.from_dict(each.to_dict())
        if incoming:
            log = self._log(session_id)
            await self._access.run(lambda m: _add(m, log, incoming))

    async def delete_messages(self, session_id: str | None) -> bool:
        """Erase the messages of a session; False if there are none."""
        log = self._log(session_id)
        return await self._access.run(lambda m: _erase(m, log))

    def _log(self, session_id: str | None) -> Key:
        source = as_segment(self.source_id)
        if session_id is None:
            return ("without_session", source)
        return ("sessions", as_segment(session_id), source)


async def _add(manager: StatePersistenceManager, log: Key, incoming: list[Message]) -> None:
    async with manager.lock(KIND, log):
        # One more than arrive: then the framework's rule sees that the history is no
        # beginning of them, and looks at the end of it, which is all that it needs.
        stored = await _messages(manager, log, last=len(incoming) + 1)
        new = filter_new_messages([Message.from_dict(each) for each in stored], incoming)
        group = manager.new_group()
        for each in new:
            group.append(KIND, log, each.to_dict())
        if new:
            await manager.commit(group)


async def _messages(
    manager: StatePersistenceManager, log: Key, *, last: int | None = None
) -> list[JsonObject]:
    async with aclosing(manager.read_log(KIND, log, last=last)) as records:
        return [entry.record async for entry in records]


async def _erase(manager: StatePersistenceManager, log: Key) -> bool:
    return await manager.erase(KIND, log) > 0
