"""The list of keys for tools that cannot list: each instance writes an index of its own.

An instance writes no other's index, so no race between processes loses an entry. The names of the
instances are one shared record, written by reading it, adding to it, and reading it again: two
instances that start at once may lose a name, and the next save of that instance adds it again.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Protocol

from agent_state.clock import Clock, stamp
from agent_state.errors import StateCorruptedError
from agent_state.protocols import JsonObject
from agent_state.serializers import JSONStateSerializer
from agent_state_integrations.redis_state.keys import Keys

FORGOTTEN_AFTER = timedelta(hours=1)

_logger = logging.getLogger("agent_state.redis_state")
_serializer = JSONStateSerializer()


class KeyValueTools(Protocol):
    """The two tools of a coaia server. Both raise ``TransportError``."""

    async def fetch(self, key: str) -> str | None:
        """The text under the key; None for a missing key."""

    async def tash(self, key: str, text: str) -> None:
        """Store the text under the key."""


class InstanceIndex:
    """The keys that this instance wrote, and those of the others.

    ``add``, ``remove`` and ``forget`` are for one caller at a time.
    """

    def __init__(self, tools: KeyValueTools, keys: Keys, instance: str, clock: Clock) -> None:
        self._tools = tools
        self._keys = keys
        self.instance = instance
        self._clock = clock
        self._own: set[str] | None = None

    async def add(self, key: str) -> None:
        """List the key. An index that was deleted is written again."""
        own = await self._loaded()
        if key not in own:
            await self._write(own | {key})
        if self.instance in await self._instances():
            return
        await self._write(own | {key})
        for _ in range(3):
            await self._write_instances(await self._instances() | {self.instance})
            if self.instance in await self._instances():
                return

    async def remove(self, keys: set[str]) -> None:
        """Remove those of these keys that are this instance's."""
        own = await self._loaded()
        if own & keys:
            await self._write(own - keys)

    async def all(self) -> dict[str, set[str]]:
        """The keys of every instance, by its name."""
        names = sorted(await self._instances() | {self.instance})
        return {name: _texts(await self._record(self._keys.index_of(name))) for name in names}

    async def forget(self, names: set[str]) -> None:
        """Remove these instances, which have no keys left, if they wrote nothing for an hour.

        A living one adds itself again with its next save.
        """
        latest = stamp(self._clock.now() - FORGOTTEN_AFTER)
        old = set()
        for name in names - {self.instance}:
            saved_at = (await self._record(self._keys.index_of(name))).get("_saved_at")
            if not isinstance(saved_at, str) or saved_at < latest:
                old.add(name)
        if old:
            await self._write_instances(await self._instances() - old)

    async def _loaded(self) -> set[str]:
        if self._own is None:
            self._own = _texts(await self._record(self._keys.index_of(self.instance)))
        return self._own

    async def _write(self, own: set[str]) -> None:
        await self._put(self._keys.index_of(self.instance), own)
        self._own = own

    async def _instances(self) -> set[str]:
        return _texts(await self._record(self._keys.index))

    async def _write_instances(self, names: set[str]) -> None:
        await self._put(self._keys.index, names)

    async def _put(self, key: str, texts: set[str]) -> None:
        record = {"_saved_at": stamp(self._clock.now()), "holds": sorted(texts)}
        await self._tools.tash(key, _serializer.dumps(record).decode())

    async def _record(self, key: str) -> JsonObject:
        text = await self._tools.fetch(key)
        if text is None:
            return {}
        try:
            return _serializer.loads(text.encode())
        except StateCorruptedError as error:  # its instance writes it again
            _logger.error("%s cannot be read: %s", key, error)  # noqa: TRY400  # no trace needed
            return {}


def _texts(record: JsonObject) -> set[str]:
    held = record.get("holds")
    return {each for each in held if isinstance(each, str)} if isinstance(held, list) else set()
