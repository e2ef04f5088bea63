"""Which message an idempotency key stands for. The log is the truth; this is read from it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from agent_state.errors import Key
from agent_state.manager import StatePersistenceManager
from agent_state.sessions.models import CONVERSATIONS

_MOST = 200_000


class _Known:
    __slots__ = ("keys", "seen", "upto")

    def __init__(self) -> None:
        self.keys: dict[str, int] = {}
        self.seen = 0
        self.upto = 0


class MessageKeys:
    """The keys of conversations lately asked about, some 200,000 in all; others are read again.

    The first question about a conversation reads its log, a later one only what other processes
    have added since. A message without a key asks nothing, and costs nothing here.
    """

    def __init__(self) -> None:
        self._conversations: OrderedDict[Key, _Known] = OrderedDict()

    async def find(
        self, manager: StatePersistenceManager, place: Key, key: str, count: int
    ) -> int | None:
        """The number of the message with this key, in a log that holds ``count`` messages."""
        known = self._conversations.setdefault(place, _Known())
        self._conversations.move_to_end(place)
        if known.seen != count:
            async for entry in manager.read_log(CONVERSATIONS, place, after=known.upto):
                own = entry.record.get("idempotency_key")
                if isinstance(own, str):
                    known.keys.setdefault(own, entry.seq)
                known.seen += 1
                known.upto = entry.seq
            self._drop_oldest()
        return known.keys.get(key)

    def added(self, place: Key, before: int, messages: Mapping[int, str | None]) -> None:
        """A conversation of ``before`` messages has these as well: number and key, in order."""
        known = self._conversations.get(place)
        if known is None or known.seen != before:
            return  # the next question reads them
        for seq, key in messages.items():
            if key is not None:
                known.keys.setdefault(key, seq)
            known.seen += 1
            known.upto = seq

    def forget(self, session_id: str) -> None:
        """The session is gone."""
        for place in [place for place in self._conversations if place[0] == session_id]:
            del self._conversations[place]

    def _drop_oldest(self) -> None:
        held = sum(len(known.keys) for known in self._conversations.values())
        while held > _MOST and len(self._conversations) > 1:
            _, known = self._conversations.popitem(last=False)
            held -= len(known.keys)
