"""Storage and sessions of Strands Agents, as readable files.

Needs the extra ``strands``. See ``docs/integrations/strands.md``.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from agent_state import (
    AgentStateError,
    MemoryStateStore,
    RevisionConflictError,
    StateNotFoundError,
    StatePersistenceManager,
)
from agent_state.access import StateAccess, StateLocation, Work, as_segment
from agent_state.cli.options import STATE, DryRunOption, JsonOption, StateOption
from agent_state.cli.output import counted, show_import
from agent_state.errors import Key, needs_extra
from agent_state.protocols import Durability, JsonObject

with needs_extra("strands", "strands"):
    from strands.session.session_repository import SessionRepository
    from strands.storage.storage import (
        Storage,
        _NamespacedStorage,
        _normalize_key,
        _normalize_prefix,
    )
    from strands.types.exceptions import SessionException, StorageError
    from strands.types.session import Session, SessionAgent, SessionMessage, decode_bytes_values

if TYPE_CHECKING:
    from strands.multiagent import MultiAgentBase

STORAGE_KIND = "strands_storage"
"""The kind of the values of a storage; a key is the storage's, cut at each ``/``."""
SESSION_KIND = "strands_sessions"
"""The kind of sessions, agents, multi-agents, and the logs of messages."""


class AgentStateStorage(Storage):
    """A storage of Strands, for its ``SnapshotSessionManager``, in a state directory.

    ``state``: a directory, an open ``StatePersistenceManager`` or a ``StateStore``; see
    ``agent_state.access.StateAccess``, also for ``exclusive`` and ``durability``.

    Text is stored as text, other bytes in base64. Raises ``StorageError``.
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

    async def write(self, key: str, data: bytes) -> None:
        document, body = _storage_key(key), _value_of(bytes(data))
        async with _as_storage_error(f"writing {key!r}"):
            await self._access.run(lambda m: m.save(STORAGE_KIND, document, body))

    async def read(self, key: str) -> bytes | None:
        document = _storage_key(key)
        async with _as_storage_error(f"reading {key!r}"):
            found = await self._access.run(lambda m: m.load(STORAGE_KIND, document))
        return _bytes_of(found.model_dump()) if found is not None else None

    async def delete(self, key: str) -> None:
        document = _storage_key(key)
        async with _as_storage_error(f"deleting {key!r}"):
            await self._access.run(lambda m: m.delete(STORAGE_KIND, document))

    async def list(self, query: str = "") -> Any:
        prefix = _normalize_prefix(query)
        folder = tuple(prefix.split("/")[:-1])
        async with _as_storage_error(f"listing {query!r}"):
            keys = await self._access.run(lambda m: m.keys(STORAGE_KIND, folder))
        return sorted(key for key in map("/".join, keys) if key.startswith(prefix))

    def namespace(self, prefix: str) -> _NamespacedStorage:
        """A view in which every key begins with ``prefix``."""
        return _NamespacedStorage(self, prefix)


class AgentStateSessionRepository(SessionRepository):
    """Sessions of Strands for its ``RepositorySessionManager``, in a state directory.

    ``state``, ``exclusive`` and ``durability``: as for ``AgentStateStorage``. The messages of an
    agent are one log; a message that is stored again replaces the one with its number. The
    methods block, and raise ``SessionException``.
    """

    def __init__(
        self,
        state: StateLocation,
        *,
        exclusive: bool = False,
        durability: Durability | None = None,
    ) -> None:
        self._access = StateAccess(state, exclusive=exclusive, durability=durability)

    def __enter__(self) -> Self:
        self._access.open_blocking()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close a directory that was opened here."""
        self._access.close_blocking()

    def create_session(self, session: Session, **kwargs: Any) -> Session:
        body, key = {"session": _plain(session.to_dict())}, _session_key(session.session_id)
        try:
            self._run(lambda m: m.save(SESSION_KIND, key, body, expected=0))
        except RevisionConflictError as error:
            raise SessionException(f"Session {session.session_id} already exists") from error
        return session

    def read_session(self, session_id: str, **kwargs: Any) -> Session | None:
        found = self._load(_session_key(session_id))
        return Session.from_dict(found["session"]) if found is not None else None

    def delete_session(self, session_id: str, **kwargs: Any) -> None:
        """Erase a session with its agents and messages."""
        key = _session_key(session_id)
        if not self._run(lambda m: m.erase(SESSION_KIND, key)):
            raise SessionException(f"Session {session_id} does not exist")

    def create_agent(self, session_id: str, session_agent: SessionAgent, **kwargs: Any) -> None:
        self._save(
            _agent_key(session_id, session_agent.agent_id),
            {"agent": _plain(session_agent.to_dict())},
        )

    def read_agent(self, session_id: str, agent_id: str, **kwargs: Any) -> SessionAgent | None:
        found = self._load(_agent_key(session_id, agent_id))
        return SessionAgent.from_dict(found["agent"]) if found is not None else None

    def update_agent(self, session_id: str, session_agent: SessionAgent, **kwargs: Any) -> None:
        before = self.read_agent(session_id, session_agent.agent_id)
        if before is None:
            raise SessionException(
                f"Agent {session_agent.agent_id} in session {session_id} does not exist"
            )
        session_agent.created_at = before.created_at
        self.create_agent(session_id, session_agent)

    def create_message(
        self, session_id: str, agent_id: str, session_message: SessionMessage, **kwargs: Any
    ) -> None:
        number = _checked_number(session_message.message_id)
        record = {"id": number, "message": _plain(session_message.to_dict())}
        log = _messages_key(session_id, agent_id)
        self._run(lambda m: m.append(SESSION_KIND, log, record))

    def read_message(
        self, session_id: str, agent_id: str, message_id: int, **kwargs: Any
    ) -> SessionMessage | None:
        log = _messages_key(session_id, agent_id)
        found = self._run(lambda m: _messages(m, log)).get(_checked_number(message_id))
        return _message(found) if found is not None else None

    def update_message(
        self, session_id: str, agent_id: str, session_message: SessionMessage, **kwargs: Any
    ) -> None:
        before = self.read_message(session_id, agent_id, session_message.message_id)
        if before is None:
            raise SessionException(f"Message {session_message.message_id} does not exist")
        session_message.created_at = before.created_at
        self.create_message(session_id, agent_id, session_message)

    def list_messages(
        self,
        session_id: str,
        agent_id: str,
        limit: int | None = None,
        offset: int = 0,
        **kwargs: Any,
    ) -> list[SessionMessage]:
        log = _messages_key(session_id, agent_id)
        found = self._run(lambda m: _messages(m, log))
        if not found and self._load(_agent_key(session_id, agent_id)) is None:
            raise SessionException(f"There is no agent {agent_id} in session {session_id}")
        numbers = sorted(found)[offset : None if limit is None else offset + limit]
        return [_message(found[number]) for number in numbers]

    def create_multi_agent(
        self, session_id: str, multi_agent: MultiAgentBase, **kwargs: Any
    ) -> None:
        body = {"multi_agent": _plain(multi_agent.serialize_state())}
        self._save(_multi_agent_key(session_id, multi_agent.id), body)

    def read_multi_agent(
        self, session_id: str, multi_agent_id: str, **kwargs: Any
    ) -> dict[str, Any] | None:
        found = self._load(_multi_agent_key(session_id, multi_agent_id))
        return found["multi_agent"] if found is not None else None

    def update_multi_agent(
        self, session_id: str, multi_agent: MultiAgentBase, **kwargs: Any
    ) -> None:
        if self.read_multi_agent(session_id, multi_agent.id) is None:
            raise SessionException(
                f"MultiAgent state {multi_agent.id} in session {session_id} does not exist"
            )
        self.create_multi_agent(session_id, multi_agent)

    def _run(self, work: Work[Any]) -> Any:
        with _as_session_error():
            return self._access.run_blocking(work)

    def _load(self, key: Key) -> JsonObject | None:
        found = self._run(lambda m: m.load(SESSION_KIND, key))
        return found.model_dump() if found is not None else None

    def _save(self, key: Key, body: JsonObject) -> None:
        self._run(lambda m: m.save(SESSION_KIND, key, body))


async def _messages(manager: StatePersistenceManager, log: Key) -> dict[int, JsonObject]:
    """The newest version of each message."""
    async with aclosing(manager.read_log(SESSION_KIND, log)) as records:
        return {record.record["id"]: record.record["message"] async for record in records}


_MESSAGE_FIELDS = frozenset(each.name for each in fields(SessionMessage))


def _message(body: JsonObject) -> SessionMessage:
    """As ``SessionMessage.from_dict``, which inspects its signature once for each field."""
    known = {name: value for name, value in body.items() if name in _MESSAGE_FIELDS}
    for name in ("message", "redact_message"):
        known[name] = decode_bytes_values(known.get(name))
    return SessionMessage(**known)


def _plain(value: Any) -> Any:
    """The value as Strands' own files have it: an enum is its text. Raises ``TypeError``."""
    return json.loads(json.dumps(value))


def _session_key(session_id: str) -> Key:
    return (as_segment(session_id),)


def _agent_key(session_id: str, agent_id: str) -> Key:
    return (*_session_key(session_id), "agents", as_segment(agent_id))


def _messages_key(session_id: str, agent_id: str) -> Key:
    return (*_agent_key(session_id, agent_id), "messages")


def _multi_agent_key(session_id: str, multi_agent_id: str) -> Key:
    return (*_session_key(session_id), "multi_agents", as_segment(multi_agent_id))


def _checked_number(message_id: int) -> int:
    if not isinstance(message_id, int):
        raise ValueError(f"message_id=<{message_id}> | message id must be an integer")  # noqa: TRY004  # as Strands
    return message_id


def _storage_key(key: str) -> Key:
    return tuple(_normalize_key(key).split("/"))


def _value_of(data: bytes) -> JsonObject:
    try:
        return {"text": data.decode()}
    except UnicodeDecodeError:
        return {"base64": b64encode(data).decode()}


def _bytes_of(body: JsonObject) -> bytes:
    return body["text"].encode() if "text" in body else b64decode(body["base64"])


@asynccontextmanager
async def _as_storage_error(doing: str) -> AsyncIterator[None]:
    try:
        yield
    except AgentStateError as error:
        raise StorageError(f"{doing}: {error}") from error


@contextmanager
def _as_session_error() -> Iterator[None]:
    try:
        yield
    except RevisionConflictError:
        raise
    except AgentStateError as error:
        raise SessionException(str(error)) from error


# -- agent-state import strands ------------------------------------------------------------------


@dataclass(slots=True)
class SessionImport:
    """What was brought over from the files of ``FileSessionManager``."""

    sessions: int = 0
    agents: int = 0
    messages: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    """Sessions that could not be brought over whole, with the reason."""


@dataclass(frozen=True, slots=True)
class _StoredMultiAgent:
    """A multi-agent of which only the stored state is known."""

    id: str
    state: JsonObject

    def serialize_state(self) -> JsonObject:
        return self.state


def import_sessions(
    directory: Path, repository: AgentStateSessionRepository, *, dry_run: bool = False
) -> SessionImport:
    """Bring over the sessions that ``FileSessionManager`` has stored below a directory.

    Each document is read back and compared with its file. What is stored already and is the same
    stays, so a second run goes on with the first; what is stored with another content is refused.
    ``dry_run``: only count.
    """
    report = SessionImport()
    for folder in sorted(directory.glob("session_*")):
        try:
            _import_session(folder, repository, report, dry_run)
        except (
            AttributeError,
            KeyError,
            OSError,
            SessionException,
            TypeError,
            ValueError,
        ) as error:
            report.refused[folder.name] = f"{type(error).__name__}: {error}"
    return report


def _import_session(
    folder: Path, repository: AgentStateSessionRepository, report: SessionImport, dry_run: bool
) -> None:
    session = Session.from_dict(_read_json(folder / "session.json"))
    name = session.session_id

    def bring(made: Any, stored: Callable[[], Any], store: Callable[[], object]) -> None:
        if dry_run:
            return
        if (found := stored()) is None:
            store()
            found = stored()
        if found != made:
            raise SessionException(f"{made!r:.120} is stored as {found!r:.120}")

    known = partial(repository.read_session, name)
    bring(session, known, partial(repository.create_session, session))
    for path in sorted(folder.glob("agents/agent_*")):
        agent = SessionAgent.from_dict(_read_json(path / "agent.json"))
        known_agent = partial(repository.read_agent, name, agent.agent_id)
        bring(agent, known_agent, partial(repository.create_agent, name, agent))
        report.agents += 1
        report.messages += _import_messages(path, repository, name, agent.agent_id, dry_run)
    for path in sorted(folder.glob("multi_agents/multi_agent_*")):
        body = _read_json(path / "multi_agent.json")
        multi: Any = _StoredMultiAgent(path.name.removeprefix("multi_agent_"), body)
        known_multi = partial(repository.read_multi_agent, name, multi.id)
        bring(body, known_multi, partial(repository.create_multi_agent, name, multi))
    report.sessions += 1


def _import_messages(
    folder: Path, repository: AgentStateSessionRepository, session: str, agent: str, dry_run: bool
) -> int:
    found = [
        SessionMessage.from_dict(_read_json(path))
        for path in folder.glob("messages/message_*.json")
    ]
    found.sort(key=lambda each: each.message_id)
    if dry_run:
        return len(found)
    known = {each.message_id: each for each in repository.list_messages(session, agent)}
    for message in found:
        if message.message_id not in known:
            repository.create_message(session, agent, message)
    known = {each.message_id: each for each in repository.list_messages(session, agent)}
    for message in found:
        if known[message.message_id].to_dict() != message.to_dict():
            raise SessionException(f"message {message.message_id} is stored with another content")
    return len(found)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def import_strands(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The storage_dir of a FileSessionManager.")
    ],
    state: StateOption = STATE,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Bring over the sessions of a FileSessionManager of Strands, and compare both sides.

    What is stored in --state already is not changed; a second run goes on with the first. Exit 1
    if a session could not be brought over whole.

    Example: agent-state import strands sessions --state state --dry-run
    """
    if not directory.is_dir():
        raise StateNotFoundError("there is no such directory", path=directory)
    with AgentStateSessionRepository(MemoryStateStore() if dry_run else state) as repository:
        report = import_sessions(directory, repository, dry_run=dry_run)
    what = f"{counted(report.sessions, 'session')} with {counted(report.messages, 'message')}"
    raise typer.Exit(show_import(report, what, dry_run=dry_run, as_json=as_json))
