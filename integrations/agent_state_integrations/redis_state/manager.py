"""Conversations that outlive the process: save, load, delete, list."""

from __future__ import annotations

from agent_state.errors import SchemaTooNewError, StateCorruptedError
from agent_state_integrations.redis_state.attempts import Attempts
from agent_state_integrations.redis_state.keys import glob
from agent_state_integrations.redis_state.models import UniversalSession
from agent_state_integrations.redis_state.records import from_session, to_session


class RedisSessionManager(Attempts):
    """Keeps sessions in Redis under ``{prefix}session:<id>``, a day if not told otherwise."""

    async def save_session(
        self, session: UniversalSession, *, ttl_seconds: float | None = None
    ) -> bool:
        """Store the session as it is now, in place of any earlier one; whether that was done.

        ``ttl_seconds``: for this session alone, until it is saved again; None: the manager's.
        Of two processes that save one session, the last one wins. False, too, when it was not
        answered in time: it may be stored then, but not at any later time.
        """
        if not isinstance(session, UniversalSession):
            raise TypeError(f"a UniversalSession is asked for, not {type(session).__name__}")
        key = self._keys.session(session.id)
        return await self._put(_called(session.id), key, from_session(session), ttl_seconds)

    async def load_session(self, session_id: str) -> UniversalSession | None:
        """The session; None when there is none, or none that can be had now."""
        record = await self._get(_called(session_id), self._keys.session(session_id))
        try:
            return None if record is None else to_session(record)
        except (SchemaTooNewError, StateCorruptedError) as error:
            self._note(f"{_called(session_id)} is not loaded", error)
            return None

    async def delete_session(self, session_id: str) -> bool:
        """Whether there was such a session and it is gone now."""
        return await self._drop(_called(session_id), self._keys.session(session_id))

    async def list_sessions(self, pattern: str = "*") -> list[str]:
        """The ids that match a pattern of Redis's kind (``*``, ``?``, ``[a-z]``), sorted.

        ``escape_glob`` makes a pattern of an id.
        """
        matches = glob(pattern).match
        if not self.enabled:
            return []
        prefix = self._keys.sessions
        keys = await self._attempt("sessions are not listed", "hit", self._transport.keys(prefix))
        return [name for key in keys or () if matches(name := key.removeprefix(prefix))]


def _called(session_id: str) -> str:
    return f"session {session_id!r}"
