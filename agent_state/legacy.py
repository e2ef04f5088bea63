"""What this library's ancestors left: their files are read once and brought over.

Three layouts are known. The first ``StatePersistenceManager`` wrote ``agents/<session>.json``,
``tasks/<agent>_tasks.json`` and ``sleep/<agent>_sleep.json``; its plan had a session in the names
(``tasks/alice_tasks_123.json``), ``mail/mailboxes.json``, ``mail/mail_history.json`` and
``system/active_sessions.json``; and a person writes whole queues as ``tasks/alice.json``, with
the tasks in the lists.

All that is found is stored in one commit, together with the digests of the files, so that each
file is brought over once. What is stored already is left as it is. A file that cannot be brought
over whole is left where it is, and the report has the reason.
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from agent_state.clock import stamp
from agent_state.codec import Group
from agent_state.collection import COLLECTIONS, INLINE, MAILBOX, TASK_QUEUE, Collection
from agent_state.errors import AgentStateError, Key, StateValidationError
from agent_state.manager import StatePersistenceManager
from agent_state.protocols import JsonObject
from agent_state.storage import paths

LEDGER = "legacy_files"
"""The system document with the digests of the files that were brought over."""
KEPT = ".legacy"
"""Where a state directory keeps the ancestor's files that were in it."""

_METADATA = frozenset({"_checksum", "_saved_at", "_session_id", "_version"})
_FINISHED = frozenset({"completed_tasks"})
_PAST_MAIL = ("history", "mail_history")
_MAIL_FILES = {"mailboxes": "messages", "mail_history": "mail_history"}
_WRAPPERS = ("mailboxes", "mailbox", "messages", "mail_history", "history", "mail")
_NOUNS = {
    "agents": "agent",
    "tasks": "task",
    "sleep": "sleeper",
    "mail": "message",
    "system": "system document",
}
_NAMES = {
    "tasks": re.compile(r"(.+)_tasks(?:_.*)?"),
    "sleep": re.compile(r"(.+)_sleep(?:_.*)?"),
    "mail": re.compile(r"mailboxes|mail_history"),
}
"""How an ancestor named files of its own; a group is the agent."""


@dataclass(slots=True)
class LegacyReport:
    """What was brought over, as keys such as ``alice/t1``, and the files that were not."""

    agents: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    sleep: list[str] = field(default_factory=list)
    mail: list[str] = field(default_factory=list)
    system: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    """The files that were brought over."""
    known: list[str] = field(default_factory=list)
    """Files that were brought over before."""
    kept: dict[str, str] = field(default_factory=dict)
    """Files that were left where they are, with the reason."""
    dry_run: bool = False
    """Nothing was stored: this is what would have been."""

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report for a log or a terminal; empty when there was nothing."""
        counts = ((len(getattr(self, kind)), noun) for kind, noun in _NOUNS.items())
        found = ", ".join(_counted(count, noun) for count, noun in counts if count)
        files = _counted(len(self.files), "file")
        lines = [f"brought over {files} of an ancestor: {found or 'nothing new'}"]
        lines += [f"not brought over: {path}: {why}" for path, why in self.kept.items()]
        return lines if self.files or self.kept else []


@dataclass(frozen=True, slots=True)
class _LegacyFile:
    kind: str
    stem: str
    path: str
    """Below the ancestor's directory."""
    content: Any
    digest: str

    @property
    def body(self) -> JsonObject:
        """The content without the ancestor's metadata. Raises ``StateValidationError``."""
        if not isinstance(self.content, dict):
            raise StateValidationError(f"{self.path} is not an object")
        return {name: value for name, value in self.content.items() if name not in _METADATA}

    @property
    def is_named_by_agent(self) -> bool:
        """Whether this is the file of an agent under the agent's own id."""
        return self.kind == "agents" and self.content.get("agent_id", self.stem) == self.stem


async def import_legacy(
    manager: StatePersistenceManager, source: str | os.PathLike[str], *, dry_run: bool = False
) -> LegacyReport:
    """Bring over what an ancestor has left in ``source``, which may be the state directory itself.

    In the state directory only files with an ancestor's names are taken; afterwards they are in
    ``.legacy/``. Another directory is not changed. Raises ``StateValidationError`` when ``source``
    is no directory, and as ``StatePersistenceManager.commit``; then nothing is stored.
    """
    root = Path(source)
    inside = await asyncio.to_thread(_is_same, root, manager.state_dir)
    report = LegacyReport(dry_run=dry_run)
    files = [*await asyncio.to_thread(_read, root, inside=inside, report=report)]
    if not files:
        return report
    ledger = await manager.load("system", LEDGER)
    done: JsonObject = dict((ledger.model_extra or {}).get("files", {})) if ledger else {}
    taken = _Import(manager, report)
    for file in files:
        if file.digest in done:
            report.known.append(file.path)
        elif await taken.add_whole(file, inside=inside):
            done[file.digest] = {"at": stamp(manager.clock.now()), "path": file.path}
            report.files.append(file.path)
    if report.files and not dry_run:
        taken.end()
        taken.group.save("system", LEDGER, {"files": done})
        await manager.commit(taken.group)
    if inside and not dry_run:
        staying = {file.path for file in files if file.is_named_by_agent}
        over = [path for path in (*report.files, *report.known) if path not in staying]
        await asyncio.to_thread(_put_aside, root, over)
    return report


async def expand_collection(manager: StatePersistenceManager, kind: str, agent_id: str) -> bool:
    """Store each item that a queue or a mailbox holds itself as a document of its own.

    Returns whether there was one. Raises as ``StatePersistenceManager.save``.
    """
    collection = COLLECTIONS[kind]
    async with manager.lock(kind, agent_id):
        header = await manager.load(kind, agent_id)
        if header is None:
            return False
        body = header.model_dump()
        if not any(True for _ in inline_items(collection, body)):
            return False
        taken = _Import(manager, LegacyReport())
        await taken.add_collection(collection, agent_id, body, replace=True)
        taken.end()
        await manager.commit(taken.group)
    return True


def inline_items(collection: Collection, header: Mapping[str, Any]) -> Iterator[JsonObject]:
    """The items that a header holds itself."""
    for name in collection.lists:
        entries = header.get(name)
        for entry in entries if isinstance(entries, list) else ():
            item = collection.inline_item(entry)
            if item is not None:
                yield item


# -- reading ---------------------------------------------------------------------------------


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _is_same(root: Path, other: str | None) -> bool:
    if not root.is_dir():
        raise StateValidationError(f"there is no directory {root}", path=str(root))
    return other is not None and root.samefile(other)


def _read(root: Path, *, inside: bool, report: LegacyReport) -> Iterator[_LegacyFile]:
    """The ancestor's files, agents last: their sleep and queue are used where no file has them."""
    if inside:
        found = {kind: _named(root / kind, pattern) for kind, pattern in _NAMES.items()}
        if not any(found.values()):  # as almost always
            return
        found["agents"] = _named(root / "agents")  # what is in `system` is used as it is
    else:
        found = {kind: _named(root / kind) for kind in _NOUNS}
    for kind in ("tasks", "sleep", "mail", "system", "agents"):
        for path in found.get(kind, ()):
            name = f"{kind}/{path.name}"
            try:
                data = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
                content = json.loads(data.decode("utf-8-sig"))
            except (OSError, ValueError, RecursionError) as error:
                report.kept[name] = f"it cannot be read: {error}"
                continue
            own = isinstance(content, dict) and "_schema" in content
            if own or (inside and not _is_ancestors(kind, _written(path.stem), content)):
                if not inside:
                    report.kept[name] = "it is this library's own format"
                continue
            yield _LegacyFile(kind, _written(path.stem), name, content, sha256(data).hexdigest())


def _named(folder: Path, pattern: re.Pattern[str] = re.compile(".+")) -> list[Path]:
    """The documents of a folder whose names have that form, sorted."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    stems = (name.removesuffix(".json") for name in names if name.endswith(".json"))
    return [
        folder / f"{stem}.json"
        for stem in stems
        if pattern.fullmatch(_written(stem)) and not stem.startswith(".")
    ]


def _written(stem: str) -> str:
    """The name as the ancestor wrote it: a store encodes capitals when it finds them."""
    return paths.decode(stem) or stem


def _is_ancestors(kind: str, stem: str, content: Any) -> bool:
    """Whether a file in a state directory is an ancestor's, and not one that a person wrote."""
    if kind == "mail":
        return True
    if not isinstance(content, dict):
        return False
    named = content.get("agent_id")
    if kind == "agents":
        return "_version" in content and isinstance(named, str)
    if isinstance(named, str) and named:
        suffix = "_tasks" if kind == "tasks" else "_sleep"
        return stem != named and stem.startswith(f"{named}{suffix}")
    return "_version" in content


def _put_aside(root: Path, files: Iterable[str]) -> None:
    for name in files:
        target = root / KEPT / name
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        number = 1
        while target.exists():
            number += 1
            target = target.with_name(f"{target.name}.{number}")
        if (root / name).exists():
            (root / name).rename(target)


# -- bringing over ---------------------------------------------------------------------------


class _Import:
    """Collects the changes of one import."""

    def __init__(self, manager: StatePersistenceManager, report: LegacyReport) -> None:
        self._manager = manager
        self._report = report
        self._headers: dict[tuple[str, str], JsonObject] = {}
        """The header of each queue and mailbox that changes."""
        self._added: dict[tuple[str, Key], JsonObject] = {}
        self.group: Group = manager.new_group()

    async def add_whole(self, file: _LegacyFile, *, inside: bool) -> bool:
        """Add the changes that a file needs, or none of them, and the reason to the report."""
        count = len(self.group.changes)
        before = copy.deepcopy((self._headers, self._added, self._report))
        try:
            await self._add(file, inside=inside)
        except AgentStateError as error:
            del self.group.changes[count:]
            self._headers, self._added, report = before
            for kind in _NOUNS:
                setattr(self._report, kind, getattr(report, kind))
            self._report.kept[file.path] = error.message
            return False
        return True

    async def _add(self, file: _LegacyFile, *, inside: bool) -> None:
        if file.kind == "mail":
            for agent_id, mailbox in _mailboxes(file).items():
                await self.add_collection(MAILBOX, agent_id, mailbox)
        elif file.kind == "system":
            content = file.content
            body = file.body if isinstance(content, dict) else {file.stem: content}
            await self._add_document("system", file.stem, body)
        elif file.kind == "agents":
            await self._add_agent(file, inside=inside)
        else:
            body = file.body
            owner = _owner(file, body)
            if file.kind == "tasks":
                await self.add_collection(TASK_QUEUE, owner, body)
            else:
                await self._add_document("sleep", owner, {**body, "agent_id": owner})

    async def _add_agent(self, file: _LegacyFile, *, inside: bool) -> None:
        body = file.body
        agent_id = body.get("agent_id")
        if not isinstance(agent_id, str) or not agent_id:
            agent_id = body["agent_id"] = file.stem
        queue, sleep = body.get("task_queue"), body.get("sleep_state")
        if isinstance(queue, dict) and ("tasks", agent_id) not in self._headers:
            await self.add_collection(TASK_QUEUE, agent_id, _queue_of(queue))
        if isinstance(sleep, dict) and sleep.get("is_sleeping") is True:
            await self._add_document("sleep", agent_id, {**sleep, "agent_id": agent_id})
        if file.is_named_by_agent and inside:
            return  # it is used where it is
        if file.stem != agent_id:
            body["metadata"] = {**_mapping(body.get("metadata")), "session_id": file.stem}
        if not await self._add_document("agents", agent_id, body):
            # An older session of the same agent is an agent of its own.
            await self._add_document("agents", file.stem, body)

    async def _add_document(self, kind: str, name: str, body: JsonObject) -> bool:
        """Add a document unless there is one; whether the body is stored under that name."""
        place = (kind, (name,))
        if place in self._added:
            return self._added[place] == body
        if await self._manager.load(kind, name) is not None:
            return False
        self.group.save(kind, name, body, expected=0)
        self._added[place] = body
        getattr(self._report, kind).append(name)
        return True

    async def add_collection(
        self,
        collection: Collection,
        agent_id: str,
        given: Mapping[str, Any],
        *,
        replace: bool = False,
    ) -> None:
        """Add the items of a queue or a mailbox, and name them in its header.

        ``replace``: the lists are the whole header, not further ones.
        """
        header = await self._header(collection, agent_id, empty=replace)
        before = {each for name in collection.lists for each in _ids(header.get(name))}
        for name, value in given.items():
            if name not in collection.lists:
                header.setdefault(name, value)
        for name in collection.lists:
            entries = given.get(name)
            if entries is None:
                continue
            if not isinstance(entries, list):
                raise StateValidationError(f"{name} is not a list", kind=collection.schema)
            listed = header.setdefault(name, [])
            for index, entry in enumerate(entries):
                named = await self._add_item(collection, agent_id, name, index, entry)
                if not isinstance(named, str) or named not in before:
                    listed.append(named)
        # A header that cannot be stored is refused now, with its file.
        self._manager.new_group().put(
            collection.kind, (agent_id,), header, schema=collection.schema
        )

    async def _add_item(
        self, collection: Collection, agent_id: str, name: str, index: int, entry: Any
    ) -> Any:
        """What the header holds for an entry: the id of an item, or the entry itself."""
        item = collection.inline_item(entry)
        if item is None:
            if isinstance(entry, str) and await self._known(collection, (agent_id, entry)):
                return entry
            return entry if isinstance(entry, dict) else {INLINE: entry}
        item_id = collection.id_of(item) or f"{name}-{index:04d}"
        key = (agent_id, item_id)
        known = await self._known(collection, key)
        if known is not None:
            return item_id if known == item else {INLINE: item}
        self._put(collection, key, item, past=name in (*_FINISHED, *_PAST_MAIL))
        self._added[collection.kind, key] = item
        getattr(self._report, collection.kind).append("/".join(key))
        return item_id

    def _put(self, collection: Collection, key: Key, item: JsonObject, *, past: bool) -> None:
        """Store an item as work or mail of ours if it is one; else as another program's."""
        kind = collection.kind
        schemas = [kind, collection.item_schema]
        if past and "status" not in item and collection is MAILBOX:
            item = {**item, "status": "archived"}
        elif past:
            del schemas[0]  # it is done: nobody must do it again
        for schema in schemas:
            try:
                self.group.put(kind, key, item, schema=schema, expected=0)
                return
            except StateValidationError:
                if schema == schemas[-1]:
                    raise

    async def _known(self, collection: Collection, key: Key) -> JsonObject | None:
        """The item that is stored under a key, or is going to be; None without one."""
        if (collection.kind, key) in self._added:
            return self._added[collection.kind, key]
        document = await self._manager.store.get(collection.kind, key)
        return None if document is None else self._manager.serializer.loads(document.body)

    async def _header(self, collection: Collection, agent_id: str, *, empty: bool) -> JsonObject:
        place = (collection.kind, agent_id)
        if place not in self._headers:
            stored = None if empty else await self._manager.load(*place)
            self._headers[place] = {"agent_id": agent_id} if stored is None else stored.model_dump()
        return self._headers[place]

    def end(self) -> None:
        """Add the headers of the queues and mailboxes that changed."""
        for (kind, agent_id), header in self._headers.items():
            schema = COLLECTIONS[kind].schema
            self.group.put(kind, (agent_id,), {**header, "agent_id": agent_id}, schema=schema)


def _owner(file: _LegacyFile, body: JsonObject) -> str:
    named = body.get("agent_id")
    if isinstance(named, str) and named:
        return named
    found = _NAMES[file.kind].fullmatch(file.stem)
    return found[1] if found else file.stem


def _ids(entries: Any) -> list[str]:
    return [entry for entry in entries or () if isinstance(entry, str)]


def _mapping(value: Any) -> JsonObject:
    return value if isinstance(value, dict) else {}


def _queue_of(queue: JsonObject) -> JsonObject:
    """The queue inside of an agent; a task that ran when it was saved is to be done again."""
    current = queue.get("current_task")
    running = [current] if isinstance(current, dict) else []
    pending = queue.get("pending_tasks")
    lists: JsonObject = {"pending_tasks": pending if isinstance(pending, list) else []}
    return {**lists, **({"in_progress_tasks": running} if running else {})}


def _mailboxes(file: _LegacyFile) -> dict[str, JsonObject]:
    """The mailboxes in one file, by agent. Raises ``StateValidationError``."""
    name = _MAIL_FILES.get(file.stem, "messages")
    content = file.body if isinstance(file.content, dict) else file.content
    if isinstance(content, dict) and "agent_id" in content:
        return {str(content["agent_id"]): content}
    if file.stem not in _MAIL_FILES and isinstance(content, dict):
        return {file.stem: content}
    wrapped = [key for key in _WRAPPERS if isinstance(content, dict) and key in content]
    if len(wrapped) == 1 and len(content) == 1:
        content = content[wrapped[0]]
    found: dict[str, JsonObject] = {}
    for agent_id, given in _by_agent(content, file.path):
        if isinstance(given, dict) and "to_agent" not in given:
            if not any(each in given for each in MAILBOX.lists):
                raise StateValidationError(f"{file.path}: {agent_id!r:.80} has no messages")
            mailbox = found.setdefault(agent_id, {})
            mailbox.update({**given, **mailbox})
        else:
            messages = given if isinstance(given, list) else [given]
            found.setdefault(agent_id, {}).setdefault(name, []).extend(messages)
    return found


def _by_agent(content: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(content, list):
        for message in content:
            recipient = message.get("to_agent") if isinstance(message, dict) else None
            if not isinstance(recipient, str) or not recipient:
                raise StateValidationError(f"{path}: a message names no recipient")
            yield recipient, message
        return
    for name, given in _mapping(content).items():
        if not isinstance(given, dict | list):
            raise StateValidationError(f"{path}: {name!r:.80} is neither a mailbox nor messages")
        recipient = given.get("to_agent") if isinstance(given, dict) else None
        yield (recipient if isinstance(recipient, str) else name), given
