"""A store for py-key-value, which reaches FastMCP: each entry is one JSON document.

Needs the extra ``key-value``. See ``docs/integrations/key-value.md``.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, SupportsFloat

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
from agent_state.cli.output import counted, print_line, show_import
from agent_state.clock import instant, stamp
from agent_state.errors import Key, needs_extra
from agent_state.protocols import Durability, JsonObject

with needs_extra("key-value", "key_value"):
    from key_value.aio._utils.sanitization import HybridSanitizationStrategy
    from key_value.aio._utils.sanitize import ALPHANUMERIC_CHARACTERS
    from key_value.aio._utils.serialization import BasicSerializationAdapter
    from key_value.aio._utils.time_to_live import prepare_entry_timestamps  # no public one
    from key_value.aio.errors import KeyValueOperationError as KeyValueError
    from key_value.aio.errors import SerializationError as KeyValueSerializationError
    from key_value.aio.stores.base import (
        BaseContextManagerStore,
        BaseCullStore,
        BaseDestroyCollectionStore,
        BaseDestroyStore,
        BaseEnumerateCollectionsStore,
        BaseEnumerateKeysStore,
        ManagedEntry,
    )

KIND = "key_values"
"""The kind of the entries; a key is the collection and the entry's key."""
_MOST_LISTED = 10_000
_ENTRIES = BasicSerializationAdapter()
_KEY_NAMES = HybridSanitizationStrategy(250, ALPHANUMERIC_CHARACTERS + "_")
"""As ``FileTreeV1KeySanitizationStrategy`` names files; that one needs what writes them, too."""
_NO_KEY = re.compile(r"S_(?:.*-[0-9a-f]{8}|.{200,})")


class AgentStateKeyValueStore(
    BaseContextManagerStore,
    BaseCullStore,
    BaseDestroyCollectionStore,
    BaseDestroyStore,
    BaseEnumerateCollectionsStore,
    BaseEnumerateKeysStore,
):
    """Keeps the entries of py-key-value in a state directory.

    ``state``: a directory, an open ``StatePersistenceManager`` or a ``StateStore``; see
    ``agent_state.access.StateAccess``, also for ``exclusive`` and ``durability``.
    ``default_collection``: as for every store of py-key-value.

    Any text is a key and a collection. ``put_many`` stores all entries or none. An entry that has
    expired is never returned, and ``cull`` removes such entries from the disk.
    """

    def __init__(
        self,
        state: StateLocation,
        *,
        default_collection: str | None = None,
        exclusive: bool = False,
        durability: Durability | None = None,
        **settings: Any,
    ) -> None:
        self._access = StateAccess(state, exclusive=exclusive, durability=durability)
        super().__init__(
            default_collection=default_collection,
            client_provided_by_user=False,
            stable_api=True,
            **settings,
        )

    async def _setup(self) -> None:
        await self._access.open()
        self._exit_stack.push_async_callback(self._access.close)

    async def put_if_absent(
        self,
        key: str,
        value: Mapping[str, Any],
        *,
        collection: str | None = None,
        ttl: SupportsFloat | None = None,
    ) -> bool:
        """Put an entry unless there is one that has not expired; whether it was put.

        Of any number of tasks and processes one is told True.
        """
        collection = collection or self.default_collection
        await self.setup_collection(collection=collection)
        created, _, expires = prepare_entry_timestamps(ttl=ttl)
        body = _body(ManagedEntry(value=value, created_at=created, expires_at=expires))
        document = _document_key(collection, key)
        try:
            return await self._access.run(lambda m: _put_if_absent(m, document, body))
        except SerializationError as error:
            raise KeyValueSerializationError(str(error)) from error

    async def _get_managed_entry(self, *, collection: str, key: str) -> ManagedEntry | None:
        document = _document_key(collection, key)
        found = await self._access.run(lambda m: m.load(KIND, document))
        return _entry(found.model_dump()) if found is not None else None

    async def _put_managed_entry(
        self, *, collection: str, key: str, managed_entry: ManagedEntry
    ) -> None:
        await self._put(collection, [(key, managed_entry)])

    async def _put_managed_entries(
        self,
        *,
        collection: str,
        keys: Sequence[str],
        managed_entries: Sequence[ManagedEntry],
        ttl: float | None,
        created_at: datetime,
        expires_at: datetime | None,
    ) -> None:
        await self._put(collection, [*zip(keys, managed_entries, strict=True)])

    async def _put(self, collection: str, entries: Sequence[tuple[str, ManagedEntry]]) -> None:
        bodies = {_document_key(collection, key): _body(entry) for key, entry in entries}

        async def save(manager: StatePersistenceManager) -> None:
            async with manager.group() as group:
                for key, body in bodies.items():
                    group.save(KIND, key, body)

        try:
            await self._access.run(save)
        except SerializationError as error:
            raise KeyValueSerializationError(str(error)) from error

    async def _delete_managed_entry(self, *, key: str, collection: str) -> bool:
        document = _document_key(collection, key)
        return await self._access.run(lambda m: m.delete(KIND, document))

    async def _get_collection_keys(self, *, collection: str, limit: int | None = None) -> list[str]:
        prefix = as_segment(collection)
        keys = await self._access.run(lambda m: m.keys(KIND, prefix))
        return [from_segment(key[1]) for key in keys if len(key) == 2][: limit or _MOST_LISTED]

    async def _get_collection_names(self, *, limit: int | None = None) -> list[str]:
        keys = await self._access.run(lambda m: m.keys(KIND))
        return sorted({from_segment(key[0]) for key in keys})[: limit or _MOST_LISTED]

    async def _delete_collection(self, *, collection: str) -> bool:
        prefix = (as_segment(collection),)
        return await self._access.run(lambda m: m.erase(KIND, prefix)) > 0

    async def _delete_store(self) -> bool:
        for collection in await self._get_collection_names():
            await self._delete_collection(collection=collection)
        return True

    async def _cull(self) -> None:
        await self._access.run(_remove_expired)


async def _put_if_absent(manager: StatePersistenceManager, key: Key, body: JsonObject) -> bool:
    stored = await manager.load_with_revision(KIND, key)
    if stored is not None and not _entry(stored.state.model_dump()).is_expired:
        return False
    try:
        await manager.save(KIND, key, body, expected=stored.revision if stored else 0)
    except RevisionConflictError:
        return False  # another was first
    return True


async def _remove_expired(manager: StatePersistenceManager) -> None:
    async for stored in manager.scan(KIND):
        if _entry(stored.state.model_dump()).is_expired:
            try:
                await manager.delete(KIND, stored.key, expected=stored.revision)
            except RevisionConflictError:
                continue  # it was put again


def _document_key(collection: str, key: str) -> Key:
    return (as_segment(collection), as_segment(key))


def _body(entry: ManagedEntry) -> JsonObject:
    body: JsonObject = {"value": dict(entry.value)}
    if entry.created_at is not None:
        body["created_at"] = stamp(entry.created_at)
    if entry.expires_at is not None:
        body["expires_at"] = stamp(entry.expires_at)
    return body


def _entry(body: JsonObject) -> ManagedEntry:
    created, expires = body.get("created_at"), body.get("expires_at")
    return ManagedEntry(
        value=body["value"],
        created_at=instant(created) if created else None,
        expires_at=instant(expires) if expires else None,
    )


# -- agent-state import key-value ----------------------------------------------------------------


@dataclass(slots=True)
class EntryImport:
    """What was brought over from the files of ``FileTreeStore``."""

    collections: int = 0
    entries: int = 0
    expired: int = 0
    """Entries whose time was over, which are left out."""
    refused: dict[str, str] = field(default_factory=dict)
    """Files that could not be brought over, with the reason."""


async def import_entries(
    directory: Path, state: StateLocation, *, keys: Iterable[str] = ()
) -> EntryImport:
    """Bring over the entries of a ``FileTreeStore``, and read them back.

    Its files have no keys: the name of a file is the key, or, with the store's sanitization, what
    is left of it and a hash. ``keys``: keys that such names may stand for; without its key an
    entry is refused, as is one that is stored here with another content. Raises
    ``StateNotFoundError`` for a directory that no store has written.
    """
    report = EntryImport()
    named: defaultdict[str, set[str]] = defaultdict(set)
    for key in keys:
        named[_KEY_NAMES.sanitize(key)].add(key)
    async with StateAccess(state) as access:
        for collection, files in await asyncio.to_thread(_collections, directory):
            report.collections += 1
            for path in files:
                where = f"{path.parent.name}/{path.name}"
                try:
                    entry = _ENTRIES.load_json(path.read_text(encoding="utf-8"))
                    if entry.is_expired:
                        report.expired += 1
                        continue
                    document = _document_key(collection, _key_of(path.stem, named))
                    await access.run(partial(_bring, key=document, body=_body(entry)))
                    report.entries += 1
                except (AgentStateError, KeyValueError, OSError, ValueError) as error:
                    report.refused[where] = str(error)
    return report


def _key_of(name: str, named: Mapping[str, Collection[str]]) -> str:
    keys = named.get(name, () if _NO_KEY.fullmatch(name) else (name,))
    if len(keys) != 1:
        raise ValueError(
            f"the file does not have its key, and {len(keys)} of the named could be it"
        )
    return next(iter(keys))


async def _bring(manager: StatePersistenceManager, key: Key, body: JsonObject) -> None:
    if await manager.load(KIND, key) is None:
        await manager.save(KIND, key, body, expected=0)
    found = await manager.load(KIND, key)
    if found is None or found.model_dump() != body:
        raise StateValidationError("this entry is stored here with another content")


def _collections(directory: Path) -> list[tuple[str, list[Path]]]:
    """The collections with their files, as the store's ``-info.json`` name them."""
    found = []
    for info in sorted(directory.glob("*-info.json")):
        name = json.loads(info.read_text(encoding="utf-8"))["collection"]
        folder = directory / info.name.removesuffix("-info.json")
        found.append((name, sorted(folder.glob("*.json"))))
    if not found:
        raise StateNotFoundError("no FileTreeStore has written here", path=directory)
    return found


def import_key_value(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The data_directory of a FileTreeStore.")
    ],
    state: StateOption = STATE,
    keys: Annotated[
        Path | None,
        typer.Option("--keys", help="A file with a key in each line.", show_default=False),
    ] = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Bring over the entries of a FileTreeStore of py-key-value, and compare both sides.

    A key that was no name of a file is not in the store: give it with --keys. What is stored in
    --state already is not changed. Exit 1 if an entry could not be brought over.

    Example: agent-state import key-value cache --keys keys.txt --dry-run
    """
    named = keys.read_text(encoding="utf-8").splitlines() if keys is not None else []
    target = MemoryStateStore() if dry_run else state
    report = asyncio.run(import_entries(directory, target, keys=named))
    what = " in ".join(
        (
            f"{report.entries:,} entr{'y' if report.entries == 1 else 'ies'}",
            counted(report.collections, "collection"),
        )
    )
    if report.expired and not as_json:
        print_line(f"{report.expired:,} had expired, and are left out")
    raise typer.Exit(show_import(report, what, dry_run=dry_run, as_json=as_json))
