"""Earlier versions of documents, read from their files, and what ``.quarantine/`` holds of them.

A quarantined file is put back through the manager that may write, as a new revision: it is
validated first, and the version that is stored now stays in the snapshots.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import NamedTuple

from agent_state.codec import Codec, StoredState
from agent_state.errors import (
    Key,
    SchemaTooNewError,
    StateCorruptedError,
    StateNotFoundError,
    StateValidationError,
)
from agent_state.manager import StatePersistenceManager
from agent_state.protocols import Document, JsonObject
from agent_state.storage import fileio, paths
from agent_state.storage.document import decode_document
from agent_state.storage.quarantine import REASON, QuarantinedFile, quarantined
from agent_state.storage.sealed_store import unseal
from agent_state.storage.tree import DocumentTree


def find_kept(root: str, name: str) -> QuarantinedFile:
    """The quarantined file of that path, or the one that was at that path. Blocks.

    Raises ``StateNotFoundError``, and ``StateValidationError`` when several were there.
    """
    kept = quarantined(DocumentTree(root))
    found = [each for each in kept if each.path == name]
    found = found or [each for each in kept if name in (each.was, each.path.partition("/")[2])]
    if not found:
        raise StateNotFoundError(f"nothing was set aside as {name!r:.200}", path=root)
    if len(found) > 1:
        which = ", ".join(each.path for each in found)
        raise StateValidationError(f"several files were set aside from there: {which}")
    return found[0]


class EarlierVersion(NamedTuple):
    """A document as a file has it that is not where the document is stored."""

    kind: str
    loaded: StoredState
    body: JsonObject
    """As it is stored, in the current schema."""


async def read_version(
    manager: StatePersistenceManager, kind: str, key: Key, data: bytes
) -> EarlierVersion:
    """Decode, decrypt and validate the file of a document.

    Raises as ``StatePersistenceManager.whole``, and as it loads a document.
    """
    codec = Codec(manager.serializer, manager.validator)

    def decode() -> Document:
        document, _ = decode_document(kind, key, data)
        if manager.encryption is not None:
            body = unseal(manager.encryption, (kind, key), document.body)
            document = replace(document, body=body)
        codec.check(document)
        return document

    document = await manager.whole(await asyncio.to_thread(decode))
    return EarlierVersion(kind, codec.load(document), codec.body(document))


async def put_back(manager: StatePersistenceManager, name: str) -> tuple[str, Key, int]:
    """Store a quarantined document again, and remove it from there: kind, key and revision.

    Raises as ``find_kept``, and ``StateValidationError`` for a file that is no document, or is
    still not usable; it then stays where it is, to be mended there.
    """
    root = _root(manager)
    kept = await asyncio.to_thread(find_kept, root, name)
    if kept.kind is None or not kept.key or not (kept.was or "").endswith(paths.DOCUMENT):
        raise StateValidationError(f"{kept.path} is no document; only documents are put back")
    found = await asyncio.to_thread(fileio.read_file, f"{root}/{kept.path}")
    if found is None:
        raise StateNotFoundError("the file is gone", path=kept.path)
    try:
        version = await read_version(manager, kept.kind, kept.key, found[0])
    except (StateCorruptedError, StateValidationError, SchemaTooNewError) as error:
        message = f"{kept.path} is still not usable, mend it there: {error.message}"
        raise StateValidationError(message) from error
    group = manager.new_group()
    group.put(kept.kind, kept.key, version.body, schema=version.loaded.schema)
    [revision] = await manager.commit(group)
    await asyncio.to_thread(_remove, root, kept)
    return kept.kind, kept.key, revision


async def drop(manager: StatePersistenceManager, name: str) -> None:
    """Remove a quarantined file and its reason for good. Raises as ``find_kept``."""
    root = _root(manager)
    await asyncio.to_thread(lambda: _remove(root, find_kept(root, name)))


def _root(manager: StatePersistenceManager) -> str:
    if manager.state_dir is None:
        raise StateNotFoundError("the store has no directory, and so no quarantine")
    return paths.resolve_root(manager.state_dir)


def _remove(root: str, kept: QuarantinedFile) -> None:
    # A reason without its file says that the file was never moved; the other way round is a riddle.
    fileio.remove_file(f"{root}/{kept.path}", sync=False)
    fileio.remove_file(f"{root}/{kept.path}{REASON}", sync=True)
