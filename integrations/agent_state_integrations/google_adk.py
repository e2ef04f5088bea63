"""A session service for Google's Agent Development Kit: a document and a log of events a session.

Needs the extra ``google-adk``. See ``docs/integrations/google-adk.md``.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self
from weakref import WeakValueDictionary

import typer

from agent_state import (
    AgentStateError,
    MemoryStateStore,
    RevisionConflictError,
    SerializationError,
    StateNotFoundError,
    StatePersistenceManager,
    StateValidationError,
)
from agent_state.access import StateAccess, StateLocation, as_segment, from_segment
from agent_state.cli.options import STATE, DryRunOption, JsonOption, StateOption
from agent_state.cli.output import counted, show_import
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
        self._turns: WeakValueDictionary[Key, asyncio.Lock] = WeakValueDictionary()
        """Parallel branches share a ``Session``, and append to it one after another."""

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
        added = _AddedEvent.of(event)
        if await self._access.run(lambda m: self._append(m, session, added)):
            self._commit_event_to_session(session, event)
        return event

    async def _append(
        self, manager: StatePersistenceManager, session: Session, added: _AddedEvent
    ) -> bool:
        place = _SessionPlace(session.app_name, session.user_id, session.id)
        turn = self._turns.setdefault(place.key, asyncio.Lock())
        async with turn:
            return await _append(manager, place, session, added)


@dataclass(frozen=True, slots=True)
class _AddedEvent:
    """An event as it was when it was given."""

    event_id: str
    timestamp: float
    body: JsonObject
    delta: dict[str, dict[str, Any]]
    """What it changes, by scope."""

    @classmethod
    def of(cls, event: Event) -> _AddedEvent:
        changes = event.actions.state_delta if event.actions else {}
        delta = _session_util.extract_json_safe_state_delta(changes)
        return cls(event.id, event.timestamp, _event_body(event), delta)


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


def _event_body(event: Event) -> JsonObject:
    body: JsonObject = json.loads(event.model_dump_json(exclude_none=True, by_alias=True))
    return body


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
    manager: StatePersistenceManager, place: _SessionPlace, session: Session, added: _AddedEvent
) -> bool:
    """Store an event; False if it is stored already. Notes the new revision in the session."""
    while True:
        stored = await manager.load_with_revision(SESSION_KIND, place.key)
        if stored is None:
            raise SessionNotFoundError(f"Session {session.id} not found.")
        before = stored.state.model_dump()
        known = _is_known(session, stored.revision, before)
        repeated = any(each.id == added.event_id for each in session.events)
        if (repeated or not known) and await _has(manager, place, added.body):
            return False
        if not known:
            raise StaleSessionError(
                f"Session {session.id} has changed since it was read (revision "
                f"{stored.revision}); read it again."
            )
        group = manager.new_group()
        if added.delta["app"]:
            await _change(manager, group, APP_KIND, place.app, added.delta["app"])
        if added.delta["user"]:
            await _change(manager, group, USER_KIND, place.user, added.delta["user"])
        state = {**_restored(before), **added.delta["session"]}
        after = {
            "events": before.get("events", 0) + 1,  # so that each event is a new revision
            "last_update_time": added.timestamp,
            **_stored(manager, state),
        }
        record = {"revision": stored.revision + 1, **_stored(manager, added.body)}
        group.append(SESSION_KIND, place.log, record)
        group.save(SESSION_KIND, place.key, after, expected=stored.revision)
        try:
            revision = (await manager.commit(group))[-1]
        except RevisionConflictError:
            continue  # another was first: the session, or a shared state, has changed
        session.last_update_time = added.timestamp
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


# -- agent-state import adk ----------------------------------------------------------------------

_EVENTS_AT_ONCE = 500
"""Events of an imported session that are stored together."""


@dataclass(slots=True)
class AdkImport:
    """What was brought over from the database of a session service of ADK."""

    sessions: int = 0
    events: int = 0
    shared_states: int = 0
    """The states of apps and of users."""
    refused: dict[str, str] = field(default_factory=dict)
    """Sessions and shared states that could not be brought over whole, with the reason."""


@dataclass(frozen=True, slots=True)
class _SessionRow:
    """A session of a database."""

    place: _SessionPlace
    state: dict[str, Any]
    updated: float
    events: Sequence[str]


async def import_sessions(
    database: Path, state: StateLocation, *, dry_run: bool = False
) -> AdkImport:
    """Bring over the sessions of a SQLite database of ADK, and read them back.

    ``database``: that of a ``SqliteSessionService``, or of a ``DatabaseSessionService`` whose
    events are JSON. It is opened for reading only. Sessions and shared states that are stored here
    with another content are refused. ``dry_run``: only count. Raises ``StateNotFoundError`` for a
    file without the tables.
    """
    report = AdkImport()
    async with StateAccess(MemoryStateStore() if dry_run else state) as access:
        try:
            with closing(_opened(database)) as db:
                for kind, names, found in _shared_rows(db):
                    report.shared_states += 1
                    if not dry_run:
                        key = tuple(map(as_segment, names))
                        work = partial(_bring_shared, kind=kind, key=key, state=found)
                        await _noted(report, "/".join(names), access.run(work))
                for row in _session_rows(db):
                    report.sessions += 1
                    report.events += len(row.events)
                    if not dry_run:
                        name = "/".join((*map(from_segment, row.place.key),))
                        await _noted(report, name, access.run(partial(_bring_session, row=row)))
        except sqlite3.Error as error:
            raise StateNotFoundError(f"no sessions can be read: {error}", path=database) from error
    return report


def _opened(database: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)


async def _noted(report: AdkImport, name: str, work: Awaitable[None]) -> None:
    try:
        await work
    except (AgentStateError, ValueError) as error:
        report.refused[name] = str(error)


def _shared_rows(
    database: sqlite3.Connection,
) -> Iterator[tuple[str, tuple[str, ...], dict[str, Any]]]:
    for name, state in database.execute("SELECT app_name, state FROM app_states"):
        yield APP_KIND, (name,), json.loads(state)
    for name, user, state in database.execute("SELECT app_name, user_id, state FROM user_states"):
        yield USER_KIND, (name, user), json.loads(state)


def _session_rows(database: sqlite3.Connection) -> Iterator[_SessionRow]:
    query = "SELECT app_name, user_id, id, state, update_time FROM sessions ORDER BY 1, 2, 3"
    # In the order in which they were appended, not in that of their times.
    events = (
        "SELECT event_data FROM events WHERE app_name = ? AND user_id = ? AND session_id = ?"
        " ORDER BY rowid"
    )
    for *names, state, changed in database.execute(query):
        updated = changed
        if isinstance(changed, str):  # as SQLAlchemy writes it
            updated = datetime.fromisoformat(changed).replace(tzinfo=UTC).timestamp()
        found = [row for (row,) in database.execute(events, names)]
        yield _SessionRow(_SessionPlace(*names), json.loads(state), updated, found)


async def _bring_shared(
    manager: StatePersistenceManager, *, kind: str, key: Key, state: dict[str, Any]
) -> None:
    before, revision = await _shared(manager, kind, key)
    if not revision:
        await manager.save(kind, key, _stored(manager, state), expected=0)
        before, revision = await _shared(manager, kind, key)
    if _differ(before, state):
        raise StateValidationError("it is stored with another content", kind=kind, key=key)


async def _bring_session(manager: StatePersistenceManager, *, row: _SessionRow) -> None:
    """Store a session with its events: these first, as the document makes them valid."""
    place = row.place
    if place.session_id != place.session_id.strip():
        raise StateValidationError("an id with spaces around it cannot be found again")
    events = [Event.model_validate_json(each) for each in row.events]
    bodies = [_stored(manager, _event_body(event)) for event in events]
    async with manager.lock(SESSION_KIND, place.key):
        if await manager.load(SESSION_KIND, place.key) is None:
            await manager.erase(SESSION_KIND, place.key)  # what a run that was killed has left
            for start in range(0, len(bodies), _EVENTS_AT_ONCE):
                async with manager.group() as group:
                    for body in bodies[start : start + _EVENTS_AT_ONCE]:
                        group.append(SESSION_KIND, place.log, {"revision": 1, **body})
            document = {
                "events": len(events),
                "last_update_time": row.updated,
                **_stored(manager, row.state),
            }
            await manager.save(SESSION_KIND, place.key, document, expected=0)
    stored = await manager.load_with_revision(SESSION_KIND, place.key)
    found = await _events(manager, place, stored.revision) if stored is not None else []
    body = stored.state.model_dump() if stored is not None else {}
    if (
        [*map(_event_body, found)] != [*map(_event_body, events)]
        or body.get("last_update_time") != row.updated
        or _differ(_restored(body), row.state)
    ):
        raise StateValidationError("it is stored with another content")


def _differ(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two states are not the same JSON; NaN is itself."""
    return json.dumps(one, sort_keys=True) != json.dumps(other, sort_keys=True)


def import_adk(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A SQLite database of ADK.")],
    state: StateOption = STATE,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Bring over the sessions of a SqliteSessionService of Google ADK, and compare both sides.

    What is stored in --state already is not changed; a second run goes on with the first. Exit 1
    if a session could not be brought over whole.

    Example: agent-state import adk sessions.db --state state --dry-run
    """
    report = asyncio.run(import_sessions(file, state, dry_run=dry_run))
    what = f"{counted(report.sessions, 'session')} with {counted(report.events, 'event')}"
    raise typer.Exit(show_import(report, what, dry_run=dry_run, as_json=as_json))
