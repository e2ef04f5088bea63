"""What ``ls`` and ``show`` know, read from a directory that may belong to a running server."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import Any

from agent_state.cli.output import Advance
from agent_state.codec import StoredState
from agent_state.collection import TASK_QUEUE
from agent_state.errors import (
    AgentStateError,
    InvalidKeyError,
    Key,
    SchemaTooNewError,
    StateCorruptedError,
    StateNotFoundError,
    describe,
)
from agent_state.manager import StatePersistenceManager
from agent_state.migrations import schema_of
from agent_state.models import SCHEMAS, OpenModel, SleepState
from agent_state.protocols import Incident
from agent_state.storage import ReadOnlyStateStore, paths

KINDS = ("agents", "tasks", "sleep", "mail", "system")
"""The kinds that every directory may have, in the order people ask for them."""

_LIST_STATUS = dict(zip(TASK_QUEUE.lists, ("pending", "in_progress", "completed"), strict=True))

COLUMNS: dict[str, tuple[str, ...]] = {
    "agents": ("agent_name", "agent_type", "status"),
    "tasks": ("name", "status", "priority", "attempts", "error"),
    "sleep": ("is_sleeping", "sleep_until", "wake_events", "reason"),
    "mail": ("from_agent", "subject", "priority", "status", "timestamp"),
}
"""The fields of a state that ``ls KIND`` shows."""


@dataclass(slots=True)
class Overview:
    """One agent, or what is filed under the id of an agent that is not stored itself."""

    agent_id: str
    stored: bool = False
    """There is an agent of this id, and it can be used."""
    status: str | None = None
    agent_type: str | None = None
    tasks: Counter[str] = field(default_factory=Counter)
    unread: int = 0
    asleep: bool = False
    asleep_until: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "tasks": dict(self.tasks)}


class Reader:
    """A state directory, open for reading only."""

    def __init__(self, store: ReadOnlyStateStore) -> None:
        self.store = store
        self.manager = StatePersistenceManager(store=store)
        self._met: list[Incident] = []

    async def owner(self) -> int | None:
        """The pid of the server that owns the directory; None when nobody does, or can tell."""
        try:
            return await self.store.look(lambda _: self.store.owner())
        except AgentStateError:
            return None  # a directory that we may read and not lock is still worth reading

    def unusable(self) -> list[Incident]:
        """What was met on the way and could not be used."""
        found = self.manager.incidents()
        known = {(incident.kind, incident.key) for incident in found}
        return found + [one for one in self._met if (one.kind, one.key) not in known]

    async def kinds(self) -> list[str]:
        """All kinds there are, the known ones first and always."""
        found = [kind for kind in await self.store.kinds() if kind not in KINDS and _is_kind(kind)]
        return [*KINDS, *found]

    # -- ls --------------------------------------------------------------------------------

    async def overview(self, advance: Advance) -> list[Overview]:
        """Every agent with its tasks, mail and sleep, by id."""
        kinds = ("agents", "tasks", "mail", "sleep")
        total = sum([len(await self.store.keys(kind)) for kind in kinds])
        found: dict[str, Overview] = {}
        placed: dict[Key, str] = {}
        unplaced: list[Key] = []
        done = 0
        for kind in kinds:
            async for loaded in self.manager.scan(kind):
                agent = found.setdefault(loaded.key[0], Overview(loaded.key[0]))
                if kind == "tasks" and len(loaded.key) == 1:
                    placed.update(_places(loaded))
                elif kind == "tasks" and not _word(loaded.state, "status"):
                    unplaced.append(loaded.key)
                else:
                    _count(agent, kind, loaded)
                done += 1
                advance(done, total)
        for key in unplaced:
            found[key[0]].tasks[placed.get(key, "pending")] += 1
        return [found[agent_id] for agent_id in sorted(found)]

    async def documents(self, kind: str, advance: Advance) -> list[dict[str, Any]]:
        """Every document of a kind, with the fields of ``COLUMNS``."""
        total = len(await self.store.keys(kind))
        rows = []
        async for loaded in self.manager.scan(kind):
            shown = {name: getattr(loaded.state, name, None) for name in COLUMNS.get(kind, ())}
            rows.append({**_meta(kind, loaded), **shown})
            advance(len(rows), total)
        return sorted(rows, key=lambda row: row["key"])

    async def logs(self, kind: str) -> list[dict[str, Any]]:
        """Every log of a kind, with the number of its last record."""
        rows = []
        for key in await self.store.logs(kind):
            last = [record async for record in self.store.read_log(kind, key, last=1)]
            path = paths.relative(kind, key, paths.LOG)
            rows.append({"key": key, "path": path, "last": last[-1].seq if last else 0})
        return rows

    # -- show ------------------------------------------------------------------------------

    async def agent(self, agent_id: str) -> dict[str, Any] | None:
        """All that is filed under an agent's id; None when nothing is."""
        found: dict[str, Any] = {"agent_id": agent_id, "agent": None, "sleep": None}
        for name, kind in (("agent", "agents"), ("sleep", "sleep")):
            loaded = await self._usable(kind, (agent_id,))
            found[name] = whole(kind, loaded) if loaded else None
        for kind in ("tasks", "mail"):
            scanned = [loaded async for loaded in self.manager.scan(kind, agent_id)]
            scanned.sort(key=lambda one: (_word(one.state, "created_at", "timestamp"), one.key))
            found[kind] = [whole(kind, loaded) for loaded in scanned]
        mine = [(kind, key) for kind in KINDS for key in await self.store.logs(kind, (agent_id,))]
        found["logs"] = [paths.relative(kind, key, paths.LOG) for kind, key in mine]
        nothing = not any(found[name] for name in ("agent", "sleep", "tasks", "mail", "logs"))
        return None if nothing and not self.unusable() else found

    async def _usable(self, kind: str, key: Key) -> StoredState | None:
        """The document; None when there is none, or none that can be used."""
        try:
            return await self.manager.load_with_revision(kind, key)
        except (StateCorruptedError, SchemaTooNewError) as error:
            path = paths.relative(kind, key, paths.DOCUMENT)
            self._met.append(Incident(error.message, kind, key, path))
            return None

    async def place(self, ident: str) -> tuple[str, Key, bool]:
        """What ``tasks/alice/42``, or a file's path below the directory, names; whether a log.

        Raises ``StateNotFoundError``.
        """
        kind, _, rest = ident.partition("/")
        if rest and _is_kind(kind):
            for key in await self.store.keys(kind):
                if rest in (
                    "/".join(key),
                    paths.relative(kind, key, paths.DOCUMENT)[len(kind) + 1 :],
                ):
                    return kind, key, False
            for key in await self.store.logs(kind):
                if rest in ("/".join(key), paths.relative(kind, key, paths.LOG)[len(kind) + 1 :]):
                    return kind, key, True
        raise StateNotFoundError(f"nothing is stored under {ident!r:.200}", path=self.store.root)

    async def read(self, kind: str, key: Key) -> dict[str, Any]:
        """One document. Raises as ``StatePersistenceManager.read`` does."""
        loaded = await self.manager.load_with_revision(kind, key)
        if loaded is None:
            raise StateNotFoundError(kind=kind, key=key)
        return whole(kind, loaded)

    async def tail(self, kind: str, key: Key, last: int) -> list[dict[str, Any]]:
        """The newest records of a log."""
        entries = self.manager.read_log(kind, key, last=last)
        return [asdict(entry) async for entry in entries]


@asynccontextmanager
async def reading(state_dir: str | PathLike[str]) -> AsyncIterator[Reader]:
    """Open a directory for reading. Raises ``StateNotFoundError`` when there is none."""
    store = ReadOnlyStateStore(state_dir)
    await store.open()
    try:
        yield Reader(store)
    finally:
        await store.close()


def whole(kind: str, loaded: StoredState) -> dict[str, Any]:
    """A document with its metadata and its state."""
    return {**_meta(kind, loaded), "state": loaded.state.model_dump()}


def value(document: Mapping[str, Any], name: str) -> object:
    """A field of a state, or what stands for it when it was never set."""
    state: dict[str, Any] = document["state"]
    model = SCHEMAS.get(document["schema"].partition("/")[0])
    field_ = model.model_fields.get(name) if model else None
    default = field_.get_default(call_default_factory=True) if field_ else None
    return state.get(name, default)


def _meta(kind: str, loaded: StoredState) -> dict[str, Any]:
    return {
        "id": describe(kind, loaded.key),
        "key": loaded.key,
        "path": paths.relative(kind, loaded.key, paths.DOCUMENT),
        "revision": loaded.revision,
        "saved_at": loaded.saved_at,
        "schema": schema_of(loaded.schema),
        "changed_outside": loaded.edited,
    }


def _count(agent: Overview, kind: str, loaded: StoredState) -> None:
    state = loaded.state
    if kind == "agents":
        agent.stored = True
        agent.status = _word(state, "status") or None
        agent.agent_type = _word(state, "agent_type") or None
    elif kind == "tasks":
        agent.tasks[_word(state, "status")] += 1
    elif kind == "mail":
        agent.unread += len(loaded.key) == 2 and _word(state, "status").lower() == "unread"
    elif isinstance(state, SleepState):
        agent.asleep = state.is_sleeping
        agent.asleep_until = state.sleep_until if state.is_sleeping else None


def _places(loaded: StoredState) -> dict[Key, str]:
    """Where a queue that was saved as a whole says its tasks stand."""
    body = loaded.state.model_dump()
    return {
        (loaded.key[0], ident): status
        for name, status in _LIST_STATUS.items()
        for ident in body.get(name, ())
        if isinstance(ident, str)
    }


def _word(state: OpenModel, *names: str) -> str:
    """The first of these fields that is text."""
    for name in names:
        value = getattr(state, name, None)
        if isinstance(value, str):
            return value
    return ""


def _is_kind(kind: str) -> bool:
    try:
        paths.check_kind(kind)
    except InvalidKeyError:
        return False
    return True
