"""Which number a message has, by its id. The log is the truth; this is read from it."""

from __future__ import annotations

from collections import OrderedDict

from agent_state.errors import Key
from agent_state.manager import StatePersistenceManager
from agent_state_integrations.journey.models import KIND

_IDS = 200_000


class _Known:
    __slots__ = ("ids", "upto")

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}
        self.upto = 0


class MessageIndex:
    """The ids of sessions lately asked about, some 200,000 in all; what is dropped is read again.

    The first question about a session reads its log, a later one what was added since.
    """

    def __init__(self) -> None:
        self._sessions: OrderedDict[Key, _Known] = OrderedDict()

    async def find(
        self, files: StatePersistenceManager, key: Key, message_id: str, count: int
    ) -> int | None:
        """The number of the message in the log, which holds ``count`` of them or more."""
        known = self._sessions.setdefault(key, _Known())
        self._sessions.move_to_end(key)
        if message_id not in known.ids and len(known.ids) < count:
            async for entry in files.read_log(KIND, (*key, "messages"), after=known.upto):
                known.ids[str(entry.record.get("message_id"))] = entry.seq
                known.upto = max(known.upto, entry.seq)
            self._drop_oldest()
        return known.ids.get(message_id)

    def note(self, key: Key, message_id: str, seq: int) -> None:
        """A message was stored under this number, which need not be read then."""
        known = self._sessions.get(key)
        if known is not None and known.upto == seq - 1:
            known.ids[message_id] = known.upto = seq

    def forget(self, key: Key) -> None:
        """The session is gone."""
        self._sessions.pop(key, None)

    def _drop_oldest(self) -> None:
        held = sum(len(known.ids) for known in self._sessions.values())
        while held > _IDS and len(self._sessions) > 1:
            _, known = self._sessions.popitem(last=False)
            held -= len(known.ids)
