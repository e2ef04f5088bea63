"""A change of a session while it is made, and which sessions were changed just now."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from agent_state.clock import instant, later
from agent_state.codec import Group
from agent_state.protocols import Change
from agent_state.sessions.models import HISTORY, LIVES, SESSIONS, SessionLife, StoredSession

_MOST = 4096


@dataclass(slots=True)
class Draft:
    """A change of one session while it is made: its document, and what goes with it."""

    session: StoredSession
    revision: int
    group: Group
    now: datetime
    time: str
    """``now``, as it is stored."""
    nothing: bool = False
    """Nothing is to be written after all."""
    numbers: list[int] = field(default_factory=list)
    """What the commit returned for the changes of the group, in order."""

    def tell(self, event: str, **facts: Any) -> None:
        """Add to the session's history."""
        told = {name: fact for name, fact in facts.items() if fact is not None}
        record = {"event": event, "at": self.time, **told}
        self.group.append(SESSIONS, (self.session.session_id, HISTORY), record)


@dataclass(frozen=True, slots=True)
class Fresh:
    """A session that was renewed here so lately that a message need not renew it."""

    until: datetime
    """Until then it neither expires nor has to be renewed."""
    agent_types: frozenset[str]
    """The conversations that have begun."""
    alive: Change
    """Changes nothing, and fails when the session is destroyed."""


class FreshSessions:
    """The sessions that were renewed here last, some thousands; none with ``renew_every`` 0."""

    def __init__(self, renew_every: float) -> None:
        self._renew_every = renew_every
        self._fresh: OrderedDict[str, Fresh] = OrderedDict()

    def renewed(self, session: StoredSession, now: datetime, group: Group) -> None:
        """The session was renewed just now. ``group`` is an empty one."""
        if not self._renew_every:
            return
        group.save(
            LIVES, session.session_id, SessionLife(session_id=session.session_id), expected=1
        )
        until = later(now, min(self._renew_every, session.ttl_seconds / 100))
        self._fresh[session.session_id] = Fresh(
            min(until, instant(session.expires_at)),
            frozenset(session.conversations),
            group.changes[0],
        )
        if len(self._fresh) > _MOST:
            self._fresh.popitem(last=False)

    def find(self, session_id: str, agent_type: str, now: datetime) -> Fresh | None:
        """The session, if a message may go to this conversation and leave it as it is."""
        fresh = self._fresh.get(session_id)
        if fresh is None or agent_type not in fresh.agent_types or now >= fresh.until:
            return None
        return fresh

    def forget(self, session_id: str) -> None:
        """It is destroyed."""
        self._fresh.pop(session_id, None)
