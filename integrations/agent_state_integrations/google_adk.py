"""A session service for Google's Agent Development Kit: a document and a log of events a session.

Needs the extra ``google-adk``. See ``docs/integrations/google-adk.md``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self

from agent_state import RevisionConflictError, SerializationError, StatePersistenceManager
from agent_state.access import StateAccess, StateLocation, as_segment, from_segment
from agent_state.codec import Group
from agent_state.errors import Key, needs_extra
from agent_state.protocols import Durability, JsonObject

with needs_extra("google-adk", "google"):
    from google.adk.errors._stale_session_error import StaleSessionError  # its only name
    from google.adk.errors.already_exists_error import AlreadyExistsError
    from google.adk.errors.session_not_found_error import SessionNotFoundError
    from google.adk.events.event import Event
    from google.adk.platform import time as platform_time
    from google.adk.platform import uuid as platform_uuid
    from google.adk.sessions import _session_util  # the SDK's own rules of the scopes
    from google.adk.sessions.base_session_service import (
        BaseSessionService,
        GetSessionConfig,
        ListSessionsResponse,
    )
    from google.adk.sessions.session import Session
    from google.adk.sessions.state import State

SESSION_KIND = "adk_sessions"
"""The kind of the sessions and of the logs of their events."""
APP_KIND, USER_KIND = "adk_app_states", "adk_user_states"
"""The kinds of the states that sessions share."""


class AgentStateSessionService(BaseSessionService):
    """Keeps ADK's sessions in a state directory.

    ``state``: a directory, an open ``StatePersistenceManager`` or a ``StateStore``; see
    ``agent_state.access.StateAccess``, also for ``exclusive`` and ``durability``.

    An event and the states that it changes are stored together or not at all. ``append_event``
    raises ``StaleSessionError`` when the session has changed since it was read, which is told by
    its revision, a number. An event that is stored already changes nothing.
    """

    def __init__(
        self,
        state: StateLocation,
        *,
        exclusive: bool = False,
        durability: Durability | None = None,
    ) -> None:
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

    # -- ADK's methods -----------------------------------------------------------------------------

    async def create_session(
        self,
        *,
        app_name: str,
        user_id: str,
        state: dict[str, Any] | None = None,
        session_id: str | None = None,
    ) -> Session:
        chosen = (session_id or "").strip() or platform_uuid.new_uuid()
        scopes = _session_util.extract_json_safe_state_delta(state or {})
        place = _SessionPlace(app_name, user_id, chosen)
        return await self._access.run(lambda m: _create(m, place, scopes))

    async def get_session(
        self,
        *,
        app_name: str,
        user_id: str,
        session_id: str,
        config: GetSessionConfig | None = None,
    ) -> Session | None:
        place = _SessionPlace(app_name, user_id, session_id.strip())
        return await self._access.run(lambda m: _load(m, place, config or GetSessionConfig()))

    async def list_sessions(
        self, *, app_name: str, user_id: str | None = None
    ) -> ListSessionsResponse:
        sessions = await self._access.run(lambda m: _listed(m, app_name, user_id))
        return ListSessionsResponse(sessions=sessions)

    async def delete_session(self, *, app_name: str, user_id: str, session_id: str) -> None:
        """Erase a session with its events; a no-op if there is none."""
        key = _SessionPlace(app_name, user_id, session_id.strip()).key
        await self._access.run(lambda m: m.erase(SESSION_KIND, key))

    async def get_user_state(self, *, app_name: str, user_id: str) -> dict[str, Any]:
        key = (as_segment(app_name), as_segment(user_id))
        return (await self._access.run(lambda m: _shared(m, USER_KIND, key)))[0]

    async def append_event(self, session: Session, event: Event) -> Event:
        """Store an event with the states that it changes; a partial one is not stored.

        Raises ``StaleSessionError`` and ``SessionNotFoundError``; then nothing has changed.
        """
        if event.partial:
            return event
        self._apply_temp_state(session, event)
        event = self._trim_temp_delta_state(event)
        body = json.loads(event.model_dump_json(exclude_none=True, by_alias=True))
        delta = _session_util.extract_json_safe_state_delta(
            event.actions.state_delta if event.actions else {}
        )
        if await self._access.run(lambda m: _append(m, session, event, body, delta)):
            self._commit_event_to_session(session, event)
        return event


class _SessionPlace:
    """The names of a session, and the keys of what is stored for it."""

    def __init__(self, app_name: str, user_id: str, session_id: str) -> None:
        self.app_name, self.user_id, self.session_id = app_name, user_id, session_id
        self.app: Key = (as_segment(app_name),)
        self.user: Key = (*self.app, as_segment(user_id))
        self.key: Key = (*self.user, as_segment(session_id))
        self.log: Key = (*self.key, "events")

    def session(
        self, body: JsonObject, revision: int, state: dict[str, Any], events: Sequence[Event]
    ) -> Session:
        """The session as ADK has it."""
        made = Session(
            app_name=self.app_name,
            user_id=self.user_id,
            id=self.session_id,
            state=state,
            events=[*events],
            last_update_time=body["last_update_time"],
        )
        made._storage_update_marker = str(revision)  # noqa: SLF001  # made for services
        return made


async def _create(
    manager: StatePersistenceManager, place: _SessionPlace, scopes: dict[str, dict[str, Any]]
) -> Session:
    body = {"last_update_time": platform_time.get_time(), **_stored(manager, scopes["session"])}
    while True:
        group = manager.new_group()
        app = await _change(manager, group, APP_KIND, place.app, scopes["app"])
        user = await _change(manager, group, USER_KIND, place.user, scopes["user"])
        group.save(SESSION_KIND, place.key, body, expected=0)
        try:
            revision = (await manager.commit(group))[-1]
        except RevisionConflictError as error:
            if await manager.load(SESSION_KIND, place.key) is None:
                continue  # a shared state was changed meanwhile
            raise AlreadyExistsError(
                f"Session with id {place.session_id} already exists."
            ) from error
        return place.session(body, revision, _merged(app, user, scopes["session"]), [])


async def _load(
    manager: StatePersistenceManager, place: _SessionPlace, config: GetSessionConfig
) -> Session | None:
    stored = await manager.load_with_revision(SESSION_KIND, place.key)
    if stored is None:
        return None
    body = stored.state.model_dump()
    events = [] if config.num_recent_events == 0 else await _events(manager, place, stored.revision)
    if config.num_recent_events is not None:
        events = events[-config.num_recent_events :] if config.num_recent_events else []
    if config.after_timestamp is not None:
        events = [each for each in events if each.timestamp >= config.after_timestamp]
    app, _ = await _shared(manager, APP_KIND, place.app)
    user, _ = await _shared(manager, USER_KIND, place.user)
    return place.session(body, stored.revision, _merged(app, user, _restored(body)), events)


async def _events(
    manager: StatePersistenceManager, place: _SessionPlace, revision: int
) -> list[Event]:
    """The events up to a revision of the session."""
    async with aclosing(manager.read_log(SESSION_KIND, place.log)) as records:
        return [
            Event.model_validate(_restored(entry.record))
            async for entry in records
            if entry.record["revision"] <= revision
        ]


async def _append(
    manager: StatePersistenceManager,
    session: Session,
    event: Event,
    body: JsonObject,
    delta: dict[str, dict[str, Any]],
) -> bool:
    """Store an event; False if it is stored already. Notes the new revision in the session."""
    place = _SessionPlace(session.app_name, session.user_id, session.id)
    async with manager.lock(SESSION_KIND, place.key):
        while True:
            stored = await manager.load_with_revision(SESSION_KIND, place.key)
            if stored is None:
                raise SessionNotFoundError(f"Session {session.id} not found.")
            before = stored.state.model_dump()
            known = _is_known(session, stored.revision, before)
            repeated = any(each.id == event.id for each in session.events)
            if (repeated or not known) and await _has(manager, place, body):
                return False
            if not known:
                raise StaleSessionError(
                    f"Session {session.id} has changed since it was read (revision "
                    f"{stored.revision}); read it again."
                )
            group = manager.new_group()
            await _change(manager, group, APP_KIND, place.app, delta["app"])
            await _change(manager, group, USER_KIND, place.user, delta["user"])
            state = {**_restored(before), **delta["session"]}
            after = {
                "events": before.get("events", 0) + 1,  # so that each event is a new revision
                "last_update_time": event.timestamp,
                **_stored(manager, state),
            }
            record = {"revision": stored.revision + 1, **_stored(manager, body)}
            group.append(SESSION_KIND, place.log, record)
            group.save(SESSION_KIND, place.key, after, expected=stored.revision)
            try:
                revision = (await manager.commit(group))[-1]
            except RevisionConflictError:
                continue  # a shared state was changed meanwhile
            session.last_update_time = event.timestamp
            session._storage_update_marker = str(revision)  # noqa: SLF001  # made for services
            return True


def _is_known(session: Session, revision: int, body: JsonObject) -> bool:
    """Whether a session is as it is stored; without a marker its time tells."""
    marker = session._storage_update_marker  # noqa: SLF001  # made for services
    if marker is not None:
        return bool(marker == str(revision))
    return bool(body["last_update_time"] <= session.last_update_time)


async def _has(manager: StatePersistenceManager, place: _SessionPlace, body: JsonObject) -> bool:
    """Whether this very event is stored."""
    async with aclosing(manager.read_log(SESSION_KIND, place.log)) as records:
        async for entry in records:
            if _restored(entry.record) == body:
                return True
    return False


async def _listed(
    manager: StatePersistenceManager, app_name: str, user_id: str | None
) -> list[Session]:
    app_key: Key = (as_segment(app_name),)
    app, _ = await _shared(manager, APP_KIND, app_key)
    users: dict[str, dict[str, Any]] = {}
    sessions = []
    prefix = app_key if user_id is None else (*app_key, as_segment(user_id))
    async for stored in manager.scan(SESSION_KIND, prefix):
        if len(stored.key) != 3:
            continue
        user, session_id = map(from_segment, stored.key[1:])
        if user not in users:
            users[user], _ = await _shared(manager, USER_KIND, stored.key[:2])
        body = stored.state.model_dump()
        state = _merged(app, users[user], _restored(body))
        place = _SessionPlace(app_name, user, session_id)
        sessions.append(place.session(body, stored.revision, state, []))
    return sorted(sessions, key=lambda each: (each.last_update_time, each.user_id, each.id))


async def _shared(
    manager: StatePersistenceManager, kind: str, key: Key
) -> tuple[dict[str, Any], int]:
    """A state that sessions share, and its revision."""
    stored = await manager.load_with_revision(kind, key)
    if stored is None:
        return {}, 0
    return _restored(stored.state.model_dump()), stored.revision


async def _change(
    manager: StatePersistenceManager, group: Group, kind: str, key: Key, delta: dict[str, Any]
) -> dict[str, Any]:
    """Add the change of a shared state to a group; the state with it."""
    before, revision = await _shared(manager, kind, key)
    if not delta:
        return before
    after = {**before, **delta}
    group.save(kind, key, _stored(manager, after), expected=revision)
    return after


def _stored(manager: StatePersistenceManager, value: dict[str, Any]) -> JsonObject:
    """A value as JSON; as a text of JSON if it has integers beyond 64 bits, infinity or NaN."""
    try:
        manager.serializer.dumps({"json": value})
    except SerializationError:
        return {"text": json.dumps(value)}
    return {"json": value}


def _restored(body: JsonObject) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(body["text"]) if "text" in body else body["json"]
    return value


def _merged(app: dict[str, Any], user: dict[str, Any], session: dict[str, Any]) -> dict[str, Any]:
    return {
        **session,
        **{State.APP_PREFIX + name: value for name, value in app.items()},
        **{State.USER_PREFIX + name: value for name, value in user.items()},
    }
