"""A session store for the agents of Microsoft Agent Framework: one document for each session."""

from __future__ import annotations

import warnings
from types import TracebackType
from typing import Any, Self

from agent_framework import AgentSession, SessionStore

from agent_state.access import StateAccess, StateLocation, as_segment
from agent_state.errors import Key
from agent_state.protocols import Durability, JsonObject
from agent_state_integrations.agent_framework.values import TypedJsonCodec

KIND = "agent_framework_sessions"
"""The kind of sessions: a document for each id."""
_VERSION = "1.0"
_CODEC = TypedJsonCodec()
"""Only for the order of keys and for numbers that JSON has not."""


with warnings.catch_warnings():
    # The class is experimental. Who imports this package has not used it yet.
    warnings.simplefilter("ignore")

    class AgentStateSessionStore(SessionStore):
        """Keeps sessions of agents in a state directory.

        ``state``: a directory, an open ``StatePersistenceManager`` or a ``StateStore``; see
        ``agent_state.access.StateAccess``, also for ``exclusive`` and ``durability``.

        Values of the application in ``session.state`` need ``register_state_type``, as for the
        framework's ``FileSessionStore``. ``TypeError``: a value is neither registered nor JSON;
        ``ValueError``: it could not be loaded again, or what is stored cannot.
        """

        def __init__(
            self,
            state: StateLocation,
            *,
            exclusive: bool = False,
            durability: Durability | None = None,
        ) -> None:
            super().__init__()
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

        async def get(self, session_id: str) -> AgentSession | None:
            """A copy of the session that is stored under an id; None if there is none."""
            key = _key(session_id)
            found = await self._access.run(lambda m: m.load(KIND, key))
            return _session_of(session_id, found.model_dump()) if found is not None else None

        async def set(self, session_id: str, session: AgentSession) -> None:
            """Store a session under an id, in place of the one before."""
            key, body = _key(session_id), _body_of(session)
            _session_of(session_id, body)
            await self._access.run(lambda m: m.save(KIND, key, body))

        async def delete(self, session_id: str) -> None:
            """Erase the session that is stored under an id; a no-op if there is none."""
            key = _key(session_id)
            await self._access.run(lambda m: m.erase(KIND, key))


def _key(session_id: str) -> Key:
    SessionStore.validate_session_id(session_id)
    return (as_segment(session_id),)


def _body_of(session: AgentSession) -> JsonObject:
    if type(session) is not AgentSession:
        raise TypeError(f"a {type(session).__name__} would come back as an AgentSession")
    with warnings.catch_warnings():
        # What it warns of, a value that no store can restore, is refused below.
        warnings.simplefilter("ignore", RuntimeWarning)
        fields: dict[str, Any] = session.to_dict()
    service = fields["service_session_id"]
    if service is not None and not isinstance(service, str):
        fields["service_session_id"] = dict(service)
    _check_json(fields, "session")
    return {"version": _VERSION, "session": _CODEC.encode(fields)}


def _check_json(value: Any, path: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _check_json(item, f"{path}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_json(item, f"{path}[{index}]")
    elif value is not None and type(value) not in (bool, int, float, str):
        raise TypeError(
            f"{path} is a {type(value).__name__}, which is not JSON: see register_state_type"
        )


def _session_of(session_id: str, body: JsonObject) -> AgentSession:
    if body["version"] != _VERSION:
        raise ValueError(
            f"the session {session_id!r} was stored by a newer version ({body['version']!r})"
        )
    try:
        return AgentSession.from_dict(_CODEC.decode(body["session"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"the session {session_id!r} cannot be loaded: {error}") from error
