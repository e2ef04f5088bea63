"""A witness of every commit, and what has to be stored because of it.

A witnessed store writes a line to its ledger before a commit is handed over and one after it
has ended; the ledger is outside the state directory and survives the process. Whoever reads
it afterwards knows all that was acknowledged, all that failed, and what was under way, and so
every state that the directory may be in: each commit whole, none of the acknowledged missing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, count
from pathlib import Path
from typing import Any, NamedTuple

from agent_state.errors import AgentStateError, Key
from agent_state.protocols import Append, Change, Check, Delete, Document, Put, StateStore
from agent_state.storage import FileStateStore, WALStateStore
from agent_state.storage.directory import JOURNAL, LOCKS
from agent_state.storage.fileio import TEMPORARY
from agent_state.storage.locks import WRITERS
from agent_state.storage.quarantine import QUARANTINE
from agent_state.storage.sealed_store import MARKER, SealedStateStore
from tests.faults.keyrings import make_keyring
from tests.faults.tally import Tally

Place = tuple[str, Key]

# -- writing it --------------------------------------------------------------------------------


class _Witnessed:
    """Placed before a store: tells the ledger of each commit."""

    ledger = -1
    """A descriptor opened for appending; each line is one write, so a kill tears none."""
    _number = count(1)

    def _tell(self, **line: Any) -> None:
        if self.ledger >= 0:
            os.write(self.ledger, json.dumps(line).encode() + b"\n")

    async def commit(self: Any, changes: Sequence[Change]) -> list[int]:
        number = next(self._number)
        self._tell(begun=number, changes=[_plain(change) for change in _made(changes)])
        try:
            numbers: list[int] = await super().commit(changes)  # type: ignore[misc]  # a mixin's
        except AgentStateError as error:
            self._tell(failed=number, error=type(error).__name__)
            raise
        pairs = zip(changes, numbers, strict=True)
        told = [number for change, number in pairs if not isinstance(change, Check)]
        self._tell(acknowledged=number, numbers=told)
        return numbers

    async def erase(self: Any, kind: str, key: Key) -> int:
        """Each document and log for itself: an erasure cut short has removed some of them."""
        places: dict[str, list[Key]] = {
            "delete": await super().keys(kind),  # type: ignore[misc]  # a mixin's
            "erase": await super().logs(kind),  # type: ignore[misc]  # a mixin's
        }
        begun = []
        for op, keys in places.items():
            for place in keys:
                if place[: len(key)] == key:
                    begun.append(next(self._number))
                    change = {"op": op, "kind": kind, "key": place}
                    self._tell(begun=begun[-1], changes=[change])
        try:
            removed: int = await super().erase(kind, key)  # type: ignore[misc]
        except AgentStateError:
            for number in begun:
                self._tell(failed=number, error="DurabilityUnknownError")
            raise
        assert removed == len(begun)
        for number in begun:
            self._tell(acknowledged=number, numbers=[0])
        return removed

    async def quarantine(
        self: Any, kind: str, key: Key, reason: str, *, version: Document | None = None
    ) -> Document | None:
        number = next(self._number)
        self._tell(begun=number, changes=[{"op": "aside", "kind": kind, "key": key}])
        try:
            found: Document | None = await super().quarantine(  # type: ignore[misc]
                kind, key, reason, version=version
            )
        except AgentStateError:
            self._tell(failed=number, error="DurabilityUnknownError")
            raise
        self._tell(acknowledged=number, numbers=[0])
        return found


class WitnessedFileStore(_Witnessed, FileStateStore):
    """The shared store, witnessed."""


class WitnessedJournalStore(_Witnessed, WALStateStore):
    """The exclusive store, witnessed."""


class WitnessedEncryption(_Witnessed, SealedStateStore):
    """An encrypted store, witnessed above the encryption: the ledger has what is to be read."""


STORES: dict[str, type[WitnessedFileStore | WitnessedJournalStore]] = {
    "shared": WitnessedFileStore,
    "exclusive": WitnessedJournalStore,
}
_ENCRYPTED = ", encrypted"


def encrypted(name: str) -> str:
    """The name of the encrypted one among stores, or scenes."""
    return f"{name}{_ENCRYPTED}"


ALL_STORES = [*STORES, *map(encrypted, STORES)]


def is_encrypted(kind: str) -> bool:
    return kind.endswith(_ENCRYPTED)


def make_store(
    kind: str, root: str | os.PathLike[str]
) -> WitnessedFileStore | WitnessedJournalStore | WitnessedEncryption:
    """A store of one of ``ALL_STORES``."""
    if not is_encrypted(kind):
        return STORES[kind](root)
    plain = {"shared": FileStateStore, "exclusive": WALStateStore}[kind.removesuffix(_ENCRYPTED)]
    return WitnessedEncryption(plain(root), make_keyring())


def _made(changes: Sequence[Change]) -> list[Put | Delete | Append]:
    return [change for change in changes if not isinstance(change, Check)]


def _plain(change: Put | Delete | Append) -> dict[str, Any]:
    plain: dict[str, Any] = {"kind": change.kind, "key": change.key}
    if isinstance(change, Delete):
        return {"op": "delete", **plain}
    plain["body"] = change.body.decode()
    if isinstance(change, Append):
        return {"op": "append", **plain, "dedupe_id": change.dedupe_key}
    return {"op": "put", **plain, "schema": change.schema}


# -- what it means -----------------------------------------------------------------------------


class Stored(NamedTuple):
    """A document as the ledger knows it. ``revision`` is None where nobody was told it."""

    body: str
    revision: int | None


@dataclass(frozen=True)
class Held:
    """All documents and logs, as they are or as they must be."""

    documents: Mapping[Place, Stored] = field(default_factory=dict)
    logs: Mapping[Place, tuple[tuple[str, str | None], ...]] = field(default_factory=dict)
    unreadable: int = 0
    damage: str = ""
    """What could not be read, in words."""

    def covers(self, found: Held) -> bool:
        """Whether ``found`` is this, but for revisions that nobody was told."""
        if dict(self.logs) != dict(found.logs) or self.documents.keys() != found.documents.keys():
            return False
        return all(
            stored.body == found.documents[place].body
            and stored.revision in (None, found.documents[place].revision)
            for place, stored in self.documents.items()
        )

    def difference(self, found: Held) -> str:
        """Where the two differ, to be read by a person."""
        lines = []
        for name, ours, theirs in (
            ("document", self.documents, found.documents),
            ("log", self.logs, found.logs),
        ):
            for place in sorted({*ours, *theirs}):
                if ours.get(place) != theirs.get(place):
                    expected, there = str(ours.get(place)), str(theirs.get(place))
                    lines.append(f"{name} {place}: expected {expected:.200}, found {there:.200}")
        return "\n".join(lines)


@dataclass
class Commit:
    """One commit of the ledger. ``numbers`` is None until it was acknowledged."""

    changes: list[dict[str, Any]]
    numbers: list[int] | None = None
    failed: bool = False

    def on(self, held: Held) -> Held:
        """What is stored after it."""
        documents, logs = dict(held.documents), dict(held.logs)
        for index, change in enumerate(self.changes):
            place = (change["kind"], tuple(change["key"]))
            number = self.numbers[index] if self.numbers is not None else None
            if change["op"] == "put":
                documents[place] = Stored(change["body"], number)
            elif change["op"] == "append":
                dedupe_key, records = change["dedupe_id"], logs.get(place, ())
                if dedupe_key is None or all(known != dedupe_key for _, known in records):
                    logs[place] = (*records, (change["body"], dedupe_key))
            elif change["op"] == "erase":
                logs.pop(place, None)
            else:
                documents.pop(place, None)
        return replace(held, documents=documents, logs=logs)


class Ledger:
    """A ledger read back."""

    def __init__(self, path: Path) -> None:
        self.acknowledged = 0
        """Changes whose caller was told."""
        self.errors: list[str] = []
        begun: dict[int, Commit] = {}
        ended: list[Commit] = []
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        for line in map(json.loads, lines):
            if "begun" in line:
                begun[line["begun"]] = Commit(line["changes"])
            elif "acknowledged" in line:
                commit = begun.pop(line["acknowledged"])
                commit.numbers = line["numbers"]
                self.acknowledged += len(commit.changes)
                ended.append(commit)
            else:
                commit = begun.pop(line["failed"])
                self.errors.append(line["error"])
                if line["error"] == "DurabilityUnknownError":
                    ended.append(commit)  # neither acknowledged nor refused
        self.commits = [*ended, *begun.values()]

    def possible(self, before: Held) -> list[Held]:
        """Every state that may be found, the one with nothing but the acknowledged first."""
        fsync_failed = [commit for commit in self.commits if commit.numbers is None]
        assert len(fsync_failed) <= 12, "too many commits at once to tell what may be stored"
        found = []
        for size in range(len(fsync_failed) + 1):
            for happened in combinations(fsync_failed, size):
                held = before
                for commit in self.commits:
                    if commit.numbers is not None or any(commit is one for one in happened):
                        held = commit.on(held)
                found.append(held)
        return found

    def judge(self, before: Held, found: Held, tally: Tally, about: object) -> None:
        """Count what was acknowledged, lost and unreadable; fail the test if anything was."""
        tally.acknowledged += self.acknowledged
        tally.unreadable += found.unreadable
        assert not found.unreadable, f"{about}: unreadable: {found.damage}"
        possible = self.possible(before)
        if any(held.covers(found) for held in possible):
            return
        tally.lost += 1
        raise AssertionError(f"{about}: lost or torn\n{possible[0].difference(found)}")


# -- looking -----------------------------------------------------------------------------------

KINDS = ("agents", "conversations", "mail", "notes", "sleep", "system", "tasks")


async def look(store: StateStore) -> Held:
    """Everything that an open store holds. A torn tail, which nobody was told of, is no damage."""
    documents, logs = {}, {}
    for kind in KINDS:
        async for document in store.scan(kind):
            place = (kind, document.key)
            if place == MARKER:
                continue  # no caller has saved it
            documents[place] = Stored(document.body.decode(), document.revision)
        for key in await store.logs(kind):
            records = [record async for record in store.read_log(kind, key)]
            if records:
                logs[kind, key] = tuple((r.body.decode(), r.dedupe_key) for r in records)
    damage = [incident for incident in store.incidents() if "torn" not in incident.what]
    return Held(documents, logs, len(damage), "; ".join(map(str, damage)))


def leftovers(root: Path) -> list[Path]:
    """What a closed directory must not hold: temporaries, journals, intents, writers' locks."""
    left = list(root.rglob(f"{TEMPORARY}*"))
    for folder in (root / JOURNAL, root / LOCKS / WRITERS):
        if folder.is_dir():
            left += folder.glob("[!.]*")
    return left


def put_aside(root: Path) -> list[Path]:
    """The files in quarantine, but for their reasons."""
    folder = root / QUARANTINE
    return [
        path
        for path in folder.rglob("[!.]*")
        if path.is_file() and not path.name.endswith(".reason.json")
    ]
