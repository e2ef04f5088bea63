"""Brings logs to the mirror, record by record; their numbers say what is new."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import TypeVar

from redis.exceptions import ResponseError

from agent_state.errors import Key
from agent_state.protocols import LogRecord, StateStore
from agent_state.redis.mirror_layout import Index, Place
from agent_state.redis.mirror_side import MirrorSide
from agent_state.redis.mirror_trouble import is_not_ours
from agent_state.redis.mirror_waiting import Waiting

T = TypeVar("T")

BATCH_BYTES = 512 * 1024
RECORDS = 256


class LogFollower:
    """Knows which logs wait. ``is_damaged`` says whether a place was put aside, not deleted."""

    def __init__(
        self, store: StateStore, side: MirrorSide, is_damaged: Callable[[Place], bool]
    ) -> None:
        self._store = store
        self._side = side
        self._is_damaged = is_damaged
        self.waiting = Waiting()
        self.records = 0
        self.refused: dict[Place, str] = {}
        self._dropped: set[Place] = set()

    def changed(self, place: Place, now: float) -> None:
        """Something may have been appended."""
        self.refused.pop(place, None)
        self.waiting.add(place, now)

    def erased(self, kind: str, key: Key, index: Index, now: float) -> None:
        """These logs may be gone or begun anew."""
        for place in [place for place in index.logs if place[1][: len(key)] == key]:
            self._dropped.add(place)
            self.changed(place, now)

    async def compare(self, kind: str, index: Index, now: float) -> None:
        """Let those logs wait that do not end there as they do here."""
        here = {(kind, key) for key in await self._store.logs(kind)}
        for place in sorted(here | index.logs.keys()):
            if place not in here or await self._last(place) != index.logs.get(place, 0):
                self.waiting.add(place, now)

    async def follow(self, place: Place, since: float, known: Index) -> int:
        """Bring over what is new. Raises redis-py's errors; then the log waits on."""
        try:
            await self._bring(place, known)
        except BaseException as error:
            if isinstance(error, ResponseError) and is_not_ours(str(error)):
                self.refused[place] = str(error)
                return 1
            self.waiting.put_back({place: since})
            raise
        finally:
            self.waiting.done([place])
        return 1

    async def _bring(self, place: Place, known: Index) -> None:
        while True:
            after = known.logs.get(place, 0)
            records = [] if place in self._dropped else await self._records(place, after)
            if not records:
                if not await self._is_gone(place, after):
                    return
                await self._side.drop_log(place, known.mark)
                self._dropped.discard(place)
                known.logs.pop(place, None)
                continue
            moved = await self._side.append(place, known.mark, after, records)
            if moved is None:
                known.logs[place] = records[-1].seq
                self.records += len(records)
            else:
                known.logs[place] = moved

    async def _records(self, place: Place, after: int) -> list[LogRecord]:
        records, size = [], 0
        async with aclosing(each(self._store.read_log(*place, after=after))) as found:
            async for record in found:
                records.append(record)
                size += len(record.body)
                if len(records) == RECORDS or size > BATCH_BYTES:
                    break
        return records

    async def _is_gone(self, place: Place, after: int) -> bool:
        """Whether what is there is a log that we have no more; else it is followed to its end."""
        if place in self._dropped:
            return True
        last = await self._last(place) if after else 0
        if last >= after:
            self.refused.pop(place, None)
            return False
        if place[1] not in await self._store.logs(place[0]) and not self._is_damaged(place):
            return True
        # No save shortens a log: what is there may be the only whole copy.
        self.refused[place] = f"ends with {last} here, and with {after} there"
        return False

    async def _last(self, place: Place) -> int:
        """The number of a log's last record; 0 for none."""
        last = 0
        async for record in self._store.read_log(*place, last=1):
            last = record.seq
        return last


async def each(things: AsyncIterator[T]) -> AsyncGenerator[T, None]:
    """The same things, to be closed when they are no longer wanted."""
    async for thing in things:
        yield thing
