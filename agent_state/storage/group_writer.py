"""Writes groups of changes to the shared store, atomically, with a redo record.

The new files are staged first, so that a full disk is met before anything has changed. Then one
fsynced redo record (``.journal/intent-*.jsonl``) holds all changes; from there the group goes
forward. The writer holds the locks of all its documents until the record is removed: a process
that holds one of these locks and still finds the record knows that its writer is dead, and
completes it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import lru_cache, partial
from typing import NamedTuple

from agent_state.errors import (
    AgentStateError,
    DurabilityUnknownError,
    LockTimeoutError,
    StateCorruptedError,
    UnmergedStateError,
    storage_error,
)
from agent_state.protocols import DocumentId
from agent_state.storage import fileio, paths, syscalls
from agent_state.storage.changes import (
    Record,
    ResolvedAppend,
    ResolvedChange,
    ResolvedDelete,
    ResolvedPut,
    decode_record,
    encode_changes,
    frame,
    id_of,
)
from agent_state.storage.directory import StateDirectory
from agent_state.storage.document_files import StagedFile, StoredDocument
from agent_state.storage.document_locks import DocumentLocks, Wanted, conflict, locks_of
from agent_state.storage.fileio import PendingSync, Stamp
from agent_state.storage.lineage import Lineage
from agent_state.storage.log_writer import LogWriter
from agent_state.storage.paths import DocumentPath

_RECORD_PREFIX = "intent-"
ENDINGS = {ResolvedPut: paths.DOCUMENT, ResolvedDelete: paths.DOCUMENT, ResolvedAppend: paths.LOG}


def write_group(
    directory: StateDirectory,
    changes: Sequence[ResolvedChange],
    places: Sequence[DocumentPath],
    base_stamps: dict[DocumentPath, Stamp | None],
    checked: Sequence[DocumentId] = (),
) -> None:
    """Make all changes or none. The caller holds the locks of all ``places``, one for each change.

    ``base_stamps``: the version of each document's file that the changes build on. ``checked``:
    documents that the group relies on, whose locks the caller holds too. Whoever changes one of
    them after a crash completes the group first. Raises
    ``StorageError`` when nothing was changed, ``DurabilityUnknownError`` when the group is
    recorded and the next writer will complete it.
    """
    staged: list[StagedFile] = []
    appended: list[tuple[LogWriter, int]] = []
    record = f"{directory.journal}/{_RECORD_PREFIX}{secrets.token_hex(8)}.jsonl"
    try:
        for change, at in zip(changes, places, strict=True):
            if isinstance(change, ResolvedPut):
                document, base = change.document, base_stamps[at]
                file = directory.documents.stage(
                    at, document, change.meta, base, verified=True, finish=True
                )
                staged.append(file)
                base_stamps[at] = file.stamp  # a later change of the document replaces this one
        _write_record(record, frame(encode_changes(changes, checked)), sync=directory.sync)
        for change, at in zip(changes, places, strict=True):
            if isinstance(change, ResolvedAppend):
                log = directory.logs.writer(at)
                directory.documents.make_parent(at)
                appended.append((log, log.tail().size))  # an append that fails may have happened
                log.append([change.record], sync=directory.sync)
    except BaseException as error:
        _undo(record, staged, appended, error, sync=directory.sync)
        raise
    try:
        _apply(directory, changes, places, staged)
        _remove_record(record, sync=directory.sync)
    except OSError as error:
        for file in staged:
            file.discard()  # the record holds the same bytes
        message = f"the group is recorded and will be completed at the next change: {error}"
        raise DurabilityUnknownError(message, number=error.errno, path=record) from error


def _write_record(record: str, data: bytes, *, sync: bool) -> None:
    folder = os.path.dirname(record)
    if fileio.stat_file(folder) is None:  # others have removed it
        fileio.make_directories(*os.path.split(folder), sync=sync)
    try:
        temporary, _ = fileio.write_temp_synced(record, data, sync=sync)
        try:
            syscalls.rename(temporary, record)
        except BaseException:
            fileio.discard(temporary)
            raise
        if sync:
            syscalls.fsync_directory(folder)
    except OSError as error:
        raise storage_error(error, "writing a group", path=record) from error


def _undo(
    record: str,
    staged: Iterable[StagedFile],
    appended: Sequence[tuple[LogWriter, int]],
    cause: BaseException,
    *,
    sync: bool,
) -> None:
    """Undo everything before the first rename; if that fails, the outcome is unknown."""
    for file in staged:
        file.discard()
    try:
        for log, size in reversed(appended):
            with contextlib.suppress(FileNotFoundError):  # before the first line
                log.truncate(size)
        with contextlib.suppress(FileNotFoundError):  # before the record
            _remove_record(record, sync=sync)
    except OSError as error:
        raise DurabilityUnknownError(
            f"the group failed ({cause}) and could not be undone", path=record
        ) from error


def _apply(
    directory: StateDirectory,
    changes: Sequence[ResolvedChange],
    places: Sequence[DocumentPath],
    staged: Iterable[StagedFile],
) -> None:
    """Rename and remove, in order: a later change of a document builds on an earlier one."""
    folders: dict[str, None] = {}
    files = iter(staged)
    for change, at in zip(changes, places, strict=True):
        if isinstance(change, ResolvedAppend):
            continue
        if isinstance(change, ResolvedPut):
            directory.documents.place(next(files))
        else:
            directory.documents.delete(at, sync=False)
        folders[at.parent] = None
    if directory.sync:
        for folder in folders:
            syscalls.fsync_directory(folder)


def _remove_record(record: str, *, sync: bool) -> None:
    with contextlib.suppress(FileNotFoundError):  # others have removed it, or its folder
        syscalls.unlink(record)
        if sync:
            # A record that came back after a power cut would restore what was deleted since.
            syscalls.fsync_directory(os.path.dirname(record))


# -- redo records of other writers, living or dead ---------------------------------------------


def record_paths(directory: StateDirectory) -> list[str]:
    """The paths of all redo records. Raises ``StorageError``."""
    names = fileio.list_folder(directory.journal)
    return [f"{directory.journal}/{name}" for name in names if name.startswith(_RECORD_PREFIX)]


def records_of(directory: StateDirectory, wanted: Wanted) -> list[str]:
    """The redo records whose writers need locks that nobody can have beside these.

    For the holder of these: the writer of such a record is dead.
    """
    found = []
    for path in record_paths(directory):
        try:
            concerned = conflict(wanted, _locks_of(path))
        except FileNotFoundError:
            continue  # its writer has finished
        except StateCorruptedError:
            concerned = True  # ``complete`` quarantines it
        if concerned:
            found.append(path)
    return found


@lru_cache(maxsize=256)
def _locks_of(path: str) -> Wanted:
    """The locks of a record's writer. A record never changes, and its name is never reused."""
    record = _read(path)
    return locks_of(map(id_of, record.changes), record.checked)


def _read(path: str) -> Record:
    """The contents of a redo record. Raises ``FileNotFoundError``, ``StateCorruptedError``."""
    found = fileio.read_file(path)
    if found is None:
        raise FileNotFoundError(path)
    return decode_record(found[0].removesuffix(b"\n"))


class RedoRecord(NamedTuple):
    """A redo record as it is now: its changes (none when it is torn), or its damage."""

    path: str
    changes: list[ResolvedChange]
    damage: str | None = None


def read_records(directory: StateDirectory) -> list[RedoRecord]:
    """Every redo record, of a dead writer or a living one, read without a lock."""
    found = []
    for path in record_paths(directory):
        try:
            content = fileio.read_file(path)
            if content is not None:  # its writer may have finished by now
                torn = content[0] and not content[0].endswith(b"\n")
                found.append(
                    RedoRecord(path, [] if torn else decode_record(content[0][:-1]).changes)
                )
        except AgentStateError as error:
            found.append(RedoRecord(path, [], error.message))
    return found


def complete_all(directory: StateDirectory, *, sync: bool | None = None) -> None:
    """Complete the redo records of all dead writers. ``sync``: None for the directory's."""
    for record in record_paths(directory):
        with contextlib.suppress(LockTimeoutError):  # its writer lives, or another completes it
            complete(directory, record, sync=sync)


def complete(
    directory: StateDirectory,
    record: str,
    *,
    holders: Sequence[DocumentLocks] = (),
    sync: bool | None = None,
) -> None:
    """Redo what a dead writer had recorded. Doing it twice is harmless.

    ``holders``: whose locks the caller may use. Raises ``LockTimeoutError`` when another one is
    taken: the writer lives, or another process completes the record.
    """
    sync = directory.sync if sync is None else sync
    with ExitStack() as stack:
        ours = directory.new_locks()
        stack.callback(ours.release)
        try:
            for name, exclusive in _locks_of(record).items():
                holder = next((each for each in holders if each.holds(name)), ours)
                stack.callback(holder.give_back, holder.take({name: exclusive}))
            # Under the locks: the writer of a record that still exists is dead.
            changes = _read(record).changes
        except FileNotFoundError:
            return
        except StateCorruptedError as error:
            directory.quarantine.move(record, f"an intent was damaged: {error.message}")
            return
        places = [directory.locate(*id_of(change), ENDINGS[type(change)]) for change in changes]
        # Its writer may have died before any of its fsyncs: the record must be durable before
        # changes build on it, and so must be in the end the changes that were made already.
        _make_durable(directory, [record], sync=sync)
        lineage = Lineage()
        lineage.add(changes)
        foreign = lineage.foreign(directory)
        for change, at in zip(changes, places, strict=True):
            if reason := foreign.get((id_of(change), ENDINGS[type(change)])):
                directory.keep_out(change, reason)
                continue
            try:
                directory.retry_after_clearing_path(partial(_redo, directory, change, at, sync))
            except UnmergedStateError as error:
                directory.keep_out(change, f"not written: {error.message}")
        _make_durable(directory, [at.path for at in places], sync=sync)
        try:
            _remove_record(record, sync=sync)
        except OSError as error:  # it will be redone, which changes nothing
            raise storage_error(error, "removing an intent", path=record) from error


def _make_durable(directory: StateDirectory, files: Iterable[str], *, sync: bool) -> None:
    """Fsync these files and their folders. Raises ``StorageError``."""
    if sync:
        pending = PendingSync(directory.root)
        for path in files:
            pending.note_file(path)
        pending.sync()


def _redo(directory: StateDirectory, change: ResolvedChange, at: DocumentPath, sync: bool) -> None:
    """Make one recorded change, unless the stored version is as new."""
    documents = directory.documents
    if isinstance(change, ResolvedAppend):
        documents.make_parent(at, sync=sync)
        directory.logs.writer(at).bring([change.record], sync=sync)
        return
    stored = read_or_restore(directory, at)
    revision = stored.document.revision if stored else 0
    if isinstance(change, ResolvedDelete):
        if 0 < revision <= change.revision:
            documents.delete(at, sync=sync)
    elif revision < change.document.revision:
        documents.write(at, change.document, change.meta, sync=sync)


def read_or_restore(directory: StateDirectory, at: DocumentPath) -> StoredDocument | None:
    """The document; a damaged one is quarantined and its snapshot restored. Under its lock."""
    try:
        return directory.documents.read(at)
    except StateCorruptedError as error:
        return directory.documents.quarantine_and_restore(at, error.message)
