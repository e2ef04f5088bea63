"""Reads the documents and logs of a directory, which a running server may own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict
from os import PathLike
from typing import Any

from agent_state.cli.options import given_keyring
from agent_state.cli.output import Advance, did_you_mean
from agent_state.clock import sort_text
from agent_state.codec import StoredState
from agent_state.errors import (
    AgentStateError,
    InvalidKeyError,
    Key,
    SchemaTooNewError,
    StateCorruptedError,
    StateNotFoundError,
    UnmergedStateError,
    describe,
)
from agent_state.manager import StatePersistenceManager
from agent_state.migrations import schema_of
from agent_state.models import SCHEMAS, OpenModel
from agent_state.protocols import Incident
from agent_state.storage import ReadOnlyStateStore, paths

KINDS = ("agents", "tasks", "sleep", "mail", "system")
"""The kinds that every directory may have, in the order in which they are listed."""

COLUMNS: dict[str, tuple[str, ...]] = {
    "agents": ("agent_name", "agent_type", "status"),
    "tasks": ("name", "status", "priority", "attempts", "error"),
    "sleep": ("is_sleeping", "sleep_until", "wake_events", "reason"),
    "mail": ("from_agent", "subject", "priority", "status", "timestamp"),
    "sessions": ("user_id", "status", "last_activity", "expires_at"),
}
"""The fields of a state that ``ls KIND`` shows."""


class Inspector:
    """A state directory, open for reading only."""

    def __init__(self, store: ReadOnlyStateStore) -> None:
        self.store = store
        self.manager = StatePersistenceManager(store=store, encryption=given_keyring())
        self._noted: list[Incident] = []

    async def owner(self) -> int | None:
        """The pid of the server that owns the directory; None without one, or if unknown."""
        try:
            return await self.store.look(lambda _: self.store.owner())
        except AgentStateError:
            return None  # no permission to try the lock; reading may still work

    def unusable(self) -> list[Incident]:
        """The documents and logs so far that could not be used."""
        found = self.manager.incidents()
        known = {(incident.kind, incident.key) for incident in found}
        return found + [one for one in self._noted if (one.kind, one.key) not in known]

    async def kinds(self) -> list[str]:
        """The kinds of ``KINDS``, then the other kinds of the directory."""
        found = [kind for kind in await self.store.kinds() if kind not in KINDS and _is_kind(kind)]
        return [*KINDS, *found]

    # -- ls --------------------------------------------------------------------------------

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
        """The documents and logs under an agent's id; None if there are none."""
        found: dict[str, Any] = {"agent_id": agent_id, "agent": None, "sleep": None}
        for name, kind in (("agent", "agents"), ("sleep", "sleep")):
            loaded = await self._usable(kind, (agent_id,))
            found[name] = as_dict(kind, loaded) if loaded else None
        for kind in ("tasks", "mail"):
            scanned = [loaded async for loaded in self.manager.scan(kind, agent_id)]
            scanned.sort(key=lambda one: (_time(one.state), one.key))
            found[kind] = [as_dict(kind, loaded) for loaded in scanned]
        mine = [(kind, key) for kind in KINDS for key in await self.store.logs(kind, (agent_id,))]
        found["logs"] = [paths.relative(kind, key, paths.LOG) for kind, key in mine]
        nothing = not any(found[name] for name in ("agent", "sleep", "tasks", "mail", "logs"))
        return None if nothing and not self.unusable() else found

    async def _usable(self, kind: str, key: Key) -> StoredState | None:
        """The document; None if it is missing, or cannot be used."""
        try:
            return await self.manager.load_with_revision(kind, key)
        except (StateCorruptedError, SchemaTooNewError, UnmergedStateError) as error:
            path = paths.relative(kind, key, paths.DOCUMENT)
            self._noted.append(Incident(error.message, kind, key, path))
            return None

    async def locate(self, ident: str) -> tuple[str, Key, bool]:
        """Kind and key of ``tasks/alice/42``, or of a file's path in the directory; True for a log.

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
        hint = did_you_mean(ident, await self._idents(kind))
        message = f"nothing is stored under {ident!r:.200}{hint}"
        raise StateNotFoundError(message, path=self.store.root)

    async def _idents(self, kind: str) -> list[str]:
        """The ids that may have been meant: those of a kind, or of agents."""
        kinds = [kind] if _is_kind(kind) and kind in await self.store.kinds() else []
        found = ["/".join((kind, *key)) for kind in kinds for key in await self.store.keys(kind)]
        return found or ["/".join(key) for key in await self.store.keys("agents")]

    async def document(self, kind: str, key: Key) -> dict[str, Any]:
        """One document.

        Raises ``StateNotFoundError``, and the errors of ``load_with_revision``.
        """
        loaded = await self.manager.load_with_revision(kind, key)
        if loaded is None:
            raise StateNotFoundError(kind=kind, key=key)
        return as_dict(kind, loaded)

    async def tail(self, kind: str, key: Key, last: int) -> list[dict[str, Any]]:
        """The newest records of a log."""
        entries = self.manager.read_log(kind, key, last=last)
        return [asdict(entry) async for entry in entries]


@asynccontextmanager
async def open_inspector(state_dir: str | PathLike[str]) -> AsyncIterator[Inspector]:
    """Open a directory for reading. Raises ``StateNotFoundError`` if it is missing."""
    store = ReadOnlyStateStore(state_dir)
    await store.open()
    try:
        yield Inspector(store)
    finally:
        await store.close()


def as_dict(kind: str, loaded: StoredState) -> dict[str, Any]:
    """A document with its metadata and its state."""
    return {**_meta(kind, loaded), "state": loaded.state.model_dump()}


def field_value(document: Mapping[str, Any], name: str) -> object:
    """A field of a state; the default of its model if it was never set."""
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


def _time(state: OpenModel) -> str:
    """A text by which tasks and messages sort in time."""
    times = (getattr(state, name, None) for name in ("created_at", "timestamp"))
    return next(filter(None, map(sort_text, times)), "")


def _is_kind(kind: str) -> bool:
    try:
        paths.check_kind(kind)
    except InvalidKeyError:
        return False
    return True
