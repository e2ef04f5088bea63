"""Every agent of a directory with its tasks, mail and sleep, read without threads and models.

A document whose checksum fits was validated when this library wrote it, so that reading it is
enough. Only the others, such as hand edits, and what the journal holds, are loaded in full. So
``agent-state ls`` starts at once, and reads about as fast as the disk.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from agent_state.clock import SystemClock, sort_text, stamp
from agent_state.errors import (
    AgentStateError,
    EncryptionKeyError,
    Key,
    StateCorruptedError,
    StateNotFoundError,
)
from agent_state.migrations import VERSIONS, parse_schema
from agent_state.protocols import BodySealer, Document, Incident, JsonObject
from agent_state.storage import fileio, paths
from agent_state.storage.document import SEALED, decode_document, unedited_content
from agent_state.storage.tree import DocumentTree
from agent_state.storage.worktree import Worktree

if TYPE_CHECKING:
    from agent_state.codec import Codec
    from agent_state.storage.changes import Overlay
    from agent_state.storage.inspection import JournalCheck
    from agent_state.storage.quarantine import QuarantinedFile
    from agent_state.storage.readonly_store import ReadOnlyStateStore

KINDS = ("agents", "tasks", "mail", "sleep")
"""The kinds that tell what an agent is, has to do, was sent, and waits for."""
WAITING = frozenset({"pending", "failed"})
"""The states of a task that waits for an attempt."""

_STATUS = {"agents": "idle", "tasks": "pending", "mail": "unread"}
"""The status of a state that does not say it, by its schema, as its model has it."""
_LISTS = {
    "pending_tasks": "pending",
    "in_progress_tasks": "in_progress",
    "completed_tasks": "completed",
}
"""The status of a task that does not say it, by the list of its queue."""

Advance = Callable[[int, int], None]
"""Called with the amount that is done and the total amount."""


class PlainDocument(NamedTuple):
    """A document as it is stored."""

    key: Key
    schema: str
    """The name of its schema, without the version."""
    body: JsonObject
    """Its own fields; the reserved ones may be among them."""


class PlainReader:
    """The documents of a directory, which a running server may own. Everything here blocks.

    ``sealer``: what its manager was given as ``encryption``. Raises ``StateNotFoundError`` when the
    directory is missing, ``EncryptionKeyError`` when it is encrypted with other keys.
    """

    def __init__(self, state_dir: str | os.PathLike[str], sealer: BodySealer | None = None) -> None:
        self.root = paths.resolve_root(state_dir)
        if not os.path.isdir(self.root):  # noqa: PTH112  # as text, as everywhere below
            raise StateNotFoundError("there is no such state directory", path=self.root)
        self._tree = DocumentTree(self.root)
        self.incidents = self._tree.incidents
        """The documents so far that could not be used."""
        self._overlay = self._read_journal()
        self._worktree = Worktree(self.root)
        self._worktree.refresh()
        for at in sorted(self._worktree.unmerged):
            self._report(self._worktree.conflict(at) or "", at, *self._tree.id_of_path(at) or ())
        self._sealer = sealer
        self._check_keys()

    def _check_keys(self) -> None:
        marker = self.document("system", ("encryption",))
        if marker is not None:
            if self._sealer is None:
                raise EncryptionKeyError("the state is encrypted: give its keyring (--keyring)")
            from agent_state.storage.sealed_store import check_keyring  # encrypted ones alone

            check_keyring(marker, self._sealer.ident)

    def owner(self) -> int | None:
        """The pid of the server that owns the directory; None without one, or if unknown."""
        from agent_state.storage import locks  # it loads what only takes locks

        try:
            return locks.owner_of(f"{self.root}/.locks")
        except AgentStateError:
            return None  # no permission to try the lock; reading may still work

    def is_served(self) -> bool:
        """Whether a process owns the directory, or a runtime that shares it is alive."""
        if self.owner() is not None:
            return True
        now = stamp(SystemClock().now())
        heartbeats = [
            self._load("system", key, path)
            for path, key in self._tree.files("system", ("runtimes",))
        ]
        return any(
            sort_text(each.body.get("expires_at")) > now for each in heartbeats if each is not None
        )

    def kept_aside(self) -> list[QuarantinedFile]:
        """The files in the quarantine, the newest first."""
        from agent_state.storage.quarantine import quarantined

        found = quarantined(self._tree)
        return sorted(found, key=lambda kept: (kept.at or "", kept.path), reverse=True)

    def journal(self) -> JournalCheck | None:
        """What waits in the journal; None for nothing."""
        if self._overlay is None:
            return None
        from agent_state.storage.directory import StateDirectory
        from agent_state.storage.inspection import check_journal

        return check_journal(StateDirectory(self.root, sync=False, now=str))

    def kinds(self) -> list[str]:
        """The kinds that have a folder, or will have one after a restart."""
        newer = {kind for kind, _ in self._overlay.documents} if self._overlay else set()
        return sorted({*self._tree.kinds(), *newer})

    def documents(self, kind: str) -> Iterator[PlainDocument]:
        """The usable documents of a kind, in no order; ``incidents`` has the others."""
        changes = self._overlay.documents if self._overlay is not None else {}
        met = set()
        for path, key in self._tree.files(kind):
            found = None
            if changes and (kind, key) in changes:
                met.add(key)
            elif path not in self._worktree.unmerged:
                found = _read_unedited(path, key)
            found = found or self._load(kind, key, path)
            if found is not None:
                yield found
        for changed, key in list(changes):
            if changed == kind and key not in met:
                found = self._load(kind, key, self._tree.path(kind, key))
                if found is not None:
                    yield found

    def count(self, kind: str) -> tuple[int, int]:
        """How many documents and logs of a kind have a file."""
        endings = (paths.DOCUMENT, paths.LOG)
        documents, logs = (sum(1 for _ in self._tree.files(kind, (), each)) for each in endings)
        return documents, logs

    def document(self, kind: str, key: Key) -> JsonObject | None:
        """The body of one document; None if it is missing or cannot be used."""
        found = self._load(kind, key, self._tree.path(kind, key))
        return found.body if found is not None else None

    def _read_journal(self) -> Overlay | None:
        """The changes that are in no file yet; None without any."""
        folder = f"{self.root}/.journal"
        files = (fileio.stat_file(f"{folder}/{name}") for name in fileio.list_folder(folder))
        if not any(stat.size for stat in files if stat):
            return None
        self._take_incidents()
        return self._store.overlay

    @cached_property
    def _codec(self) -> Codec:
        from agent_state.codec import Codec  # with the models, which few documents need

        return Codec()

    def _load(self, kind: str, key: Key, path: str) -> PlainDocument | None:
        """Load a document as a restart would; None, and reported, if it is unusable.

        An agent has not the conversation that a log has.
        """
        from agent_state.conversation_log import without_log

        try:
            stored = self._stored(kind, key, path)
            if stored is None:
                return None
            if SEALED.encode() in stored.body:
                stored = replace(stored, body=self._opened(stored))
            stored = without_log(stored)
            return PlainDocument(key, self._codec.load(stored).schema, self._codec.body(stored))
        except AgentStateError as error:
            self._report(error.message, path, kind, key)
            return None

    def _opened(self, stored: Document) -> bytes:
        from agent_state.storage.sealed_store import is_sealed, unseal

        if not is_sealed(stored.body):
            return stored.body
        if self._sealer is None:
            raise EncryptionKeyError("it is encrypted: give its keyring (--keyring)")
        return unseal(self._sealer, (stored.kind, stored.key), stored.body)

    def _stored(self, kind: str, key: Key, path: str) -> Document | None:
        if self._overlay is None and path not in self._worktree.unmerged:
            found = fileio.read_file(path)
            with contextlib.suppress(StateCorruptedError):  # the store says what is wrong
                return decode_document(kind, key, found[0])[0] if found is not None else None
        try:
            return self._store.read(paths.locate(self.root, kind, key))
        finally:
            self._take_incidents()

    @cached_property
    def _store(self) -> ReadOnlyStateStore:
        from agent_state.storage.readonly_store import ReadOnlyStateStore

        store = ReadOnlyStateStore(self.root)
        store.prepare()
        return store

    def _take_incidents(self) -> None:
        self.incidents += [one for one in self._store.incidents() if one not in self.incidents]

    def _report(
        self, what: str, path: str | None, kind: str | None = None, key: Key | None = None
    ) -> None:
        relative = self._tree.relative(path) if path else None
        incident = Incident(what, kind, key, relative)
        if incident not in self.incidents:
            self.incidents.append(incident)


def _read_unedited(path: str, key: Key) -> PlainDocument | None:
    """A document in the current version of its schema that nobody has edited; else None."""
    try:
        found = fileio.read_file(path)
        body = unedited_content(found[0]) if found is not None else None
        if body is None or "_id" in body or SEALED in body:
            return None
        name, version = parse_schema(body["_schema"])
    except (AgentStateError, KeyError, TypeError, AttributeError):
        return None  # loading it in full says what is wrong
    return PlainDocument(key, name, body) if version == VERSIONS.get(name, 1) else None


@dataclass(slots=True)
class AgentOverview:
    """One agent; or the tasks, mail and sleep under an id whose agent is not stored."""

    agent_id: str
    stored: bool = False
    """The agent's own document exists, and is valid."""
    status: str | None = None
    agent_type: str | None = None
    tasks: dict[str, int] = field(default_factory=dict)
    """The number of tasks in each state."""
    oldest_due: str | None = None
    """Since when the task has been due that waits longest; None without one."""
    unread: int = 0
    asleep: bool = False
    asleep_until: str | None = None

    def add(self, kind: str, document: PlainDocument) -> None:
        """Count one document of the agent."""
        body = document.body
        status = _text(body.get("status", _STATUS.get(document.schema, "")))
        if kind == "agents":
            self.stored = True
            self.status = status or None
            self.agent_type = _text(body.get("agent_type")) or None
        elif kind == "tasks":
            self.add_task(status, body)
        elif kind == "mail":
            self.unread += status.lower() == "unread"
        else:
            self.asleep = bool(body.get("is_sleeping", True))
            self.asleep_until = (
                (sort_text(body.get("sleep_until")) or None) if self.asleep else None
            )

    def add_task(self, status: str, body: JsonObject) -> None:
        """Count one task of that status."""
        self.tasks[status] = self.tasks.get(status, 0) + 1
        if status in WAITING:
            due = sort_text(body.get("not_before") or body.get("created_at"))
            if due[:1].isdigit() and (self.oldest_due is None or due < self.oldest_due):
                self.oldest_due = due


def read_agents(
    reader: PlainReader, advance: Advance = lambda _done, _total: None
) -> list[AgentOverview]:
    """Every agent with its tasks, mail and sleep, by id."""
    found: dict[str, AgentOverview] = {}
    listed: dict[Key, str] = {}
    unlisted: list[PlainDocument] = []
    done = 0
    for kind in KINDS:
        for document in reader.documents(kind):
            agent_id = document.key[0]
            agent = found.get(agent_id)
            if agent is None:
                agent = found[agent_id] = AgentOverview(agent_id)
            if document.schema == "task_queues":
                listed.update(_listed_statuses(document))
            elif kind == "tasks" and _is_listed(document):
                unlisted.append(document)
            elif document.schema != "mailboxes":
                agent.add(kind, document)
            done += 1
            if not done % 256:
                advance(done, 0)
    for document in unlisted:
        found[document.key[0]].add_task(listed.get(document.key, "pending"), document.body)
    return [found[agent_id] for agent_id in sorted(found)]


def _is_listed(document: PlainDocument) -> bool:
    """Whether a task says nothing about its status, which the lists of its queue then say."""
    return not _text(document.body.get("status", _STATUS.get(document.schema, "")))


def _listed_statuses(document: PlainDocument) -> dict[Key, str]:
    """The statuses of the tasks in a queue that was saved as one document."""
    return {
        (document.key[0], ident): status
        for name, status in _LISTS.items()
        for ident in document.body.get(name, ())
        if isinstance(ident, str)
    }


def _text(value: object) -> str:
    """The field if it is text; else the empty text."""
    return value if isinstance(value, str) else ""
