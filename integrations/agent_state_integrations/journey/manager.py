"""The emotional journey of a conversation: kept whole, resumed at once, exported for people."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from agent_state_integrations.journey.exporting import SessionExporting


class ConversationStateManager(SessionExporting):
    """Keeps conversations with the way they went: emotions, milestones, breakthroughs.

    ``manager``: an open ``StatePersistenceManager``, whose directory, clock and durability it
    uses. ``ttl_days``: a session expires so long after its last write or resume. ``vocabulary``:
    the application's own words for emotions and breakthroughs. ``window``: the most messages that
    a resume gives back. ``snapshot_every``: so many messages from one snapshot to the next; 0 for
    none. ``assistant_name``: who speaks in exports. ``cache``: a copy of live sessions elsewhere,
    such as ``RedisConversationCache``. ``new_id`` makes the ids, random UUIDs by default.
    A message with all that it brings about is one commit, and what has returned is durable.
    Used with ``async with``, or between ``open`` and ``close``; the manager stays the caller's.
    """

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def open(self) -> None:
        """Let the cache follow. Without a cache there is nothing to do."""
        if self.cache is not None:
            await self.cache.open(self)

    async def close(self) -> None:
        """Let the cache bring over what waits. Sessions off the record stay while this lives."""
        if self.cache is not None:
            await self.cache.close()
