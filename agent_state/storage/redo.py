"""Groups of files, whole or not at all: the intent record of the shared store.

The new files are staged first, so that a full disk is met while nothing has changed. Then one
fsynced intent says all that is to be done; from there the group goes forward. The writer holds
the locks of all its documents until the intent is gone: whoever holds one of them and still
finds the intent knows that its writer is dead, and completes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Container, Iterable, Sequence
from contextlib import ExitStack
from functools import lru_cache, partial
from typing import NamedTuple

from agent_state.errors import (
    AgentStateError,
    DurabilityUnknownError,
    Key,
    LockTimeoutError,
    StateCorruptedError,
    StorageError,
    storage_error,
)
from agent_state.protocols import Incident
from agent_state.storage import fileio, locks, paths, syscalls
from agent_state.storage.changes import (
    ResolvedAppend,
    ResolvedChange,
    ResolvedDelete,
    ResolvedPut,
    decode_record,
    encode_record,
    id_of,
)
from agent_state.storage.directory import JOURNAL, LOCKS, BaseStamps, StateDirectory
from agent_state.storage.document import encode_document
from agent_state.storage.fileio import PendingSync
from agent_state.storage.log_writer import LogWriter

_PREFIX = "intent-"


def apply_group(
    directory: StateDirectory, done: Sequence[ResolvedChange], base_stamps: BaseStamps
) -> None:
    """Make all the changes or none. The caller holds the locks of all places.

    Raises ``StorageError`` when nothing was changed, ``DurabilityUnknownError`` when the group
    is recorded and the next to come will complete it.
    """
    staged: list[tuple[str, str]] = []
    appended: list[tuple[LogWriter, int]] = []
    intent = f"{directory.root}/{JOURNAL}/{_PREFIX}{secrets.token_hex(8)}.jsonl"
    try:
        _stage(directory, done, staged)
        _record(directory, intent, encode_record(done))
        _append(directory, done, appended)
    except BaseException as error:
        _take_back(directory, intent, staged, appended, error)
        raise
    try:
        _go_forward(directory, done, staged, dict(base_stamps))
        _remove_intent(directory, intent)
    except OSError as error:
        for temporary, _ in staged:
            fileio.discard(temporary)  # the intent holds what they hold
        raise DurabilityUnknownError(
            f"the group is recorded and will be completed at the next change: {error}",
            number=error.errno,
            path=intent,
        ) from error


def _stage(
    directory: StateDirectory, done: Sequence[ResolvedChange], staged: list[tuple[str, str]]
) -> None:
    for change in done:
        if isinstance(change, ResolvedPut):
            document = change.document
            path = directory.path(document.kind, document.key)
            directory.make_parent(path)
            data = encode_document(document, change.meta)
            try:
                temporary, _ = fileio.write_temp_synced(path, data, sync=directory.sync)
            except OSError as error:
                raise storage_error(
                    error, "writing a file", kind=document.kind, key=document.key, path=path
                ) from error
            staged.append((temporary, path))


def _record(directory: StateDirectory, intent: str, data: bytes) -> None:
    try:
        temporary, _ = fileio.write_temp_synced(intent, data, sync=directory.sync)
        fileio.rename_into_place(temporary, intent)
        if directory.sync:
            syscalls.fsync_directory(os.path.dirname(intent))
    except OSError as error:
        raise storage_error(error, "writing a group", path=intent) from error


def _append(
    directory: StateDirectory, done: Sequence[ResolvedChange], appended: list[tuple[LogWriter, int]]
) -> None:
    for change in done:
        if isinstance(change, ResolvedAppend):
            log = directory.log(change.kind, change.key)
            directory.make_parent(log.path)
            appended.append((log, log.tail().size))  # an append that fails may have happened
            log.append([change.record], sync=directory.sync)


def _take_back(
    directory: StateDirectory,
    intent: str,
    staged: Iterable[tuple[str, str]],
    appended: Sequence[tuple[LogWriter, int]],
    cause: BaseException,
) -> None:
    """Undo what came before the first rename; if that fails, the outcome is not known."""
    for temporary, _ in staged:
        fileio.discard(temporary)
    try:
        for log, size in reversed(appended):
            with contextlib.suppress(FileNotFoundError):  # it may not have come to the first line
                log.truncate(size)
        with contextlib.suppress(FileNotFoundError):  # it may not have come to the intent
            _remove_intent(directory, intent)
    except OSError as error:
        raise DurabilityUnknownError(
            f"the group failed ({cause}) and could not be taken back", path=intent
        ) from error


def _go_forward(
    directory: StateDirectory,
    done: Sequence[ResolvedChange],
    staged: Iterable[tuple[str, str]],
    base_stamps: BaseStamps,
) -> None:
    folders: dict[str, None] = {}
    temporaries = iter(staged)
    for change in done:  # in order: a later change of a document builds on an earlier one
        if isinstance(change, ResolvedPut):
            temporary, path = next(temporaries)
            directory.snapshots.keep(path)
            stamp = fileio.stat_file(temporary)
            place = id_of(change)
            directory.keep_foreign_edit(path, change.document, base_stamps[place])
            base_stamps[place] = stamp
            directory.expect(path, stamp)
            syscalls.rename(temporary, path)
            directory.mark_seen(path, stamp)
            directory.forget(change.document.kind, change.document.key)
        elif isinstance(change, ResolvedDelete):
            path = directory.path(change.kind, change.key)
            directory.remove(change.kind, change.key, sync=False)
        else:
            continue
        folders[os.path.dirname(path)] = None
    if directory.sync:
        for folder in folders:
            syscalls.fsync_directory(folder)


def _remove_intent(directory: StateDirectory, intent: str) -> None:
    syscalls.unlink(intent)
    if directory.sync:
        # An intent that came back after a power cut would bring back what was deleted since.
        syscalls.fsync_directory(os.path.dirname(intent))


def touching(directory: StateDirectory, names: Container[str]) -> list[str]:
    """The intents that concern any of these locks.

    To whoever holds one of them it says: the intent's writer is dead, or it would hold it.
    """
    found = []
    for path in _all(directory):
        try:
            concerned = any(name in names for name in _lock_names(path))
        except FileNotFoundError:
            continue  # its writer is done with it
        except StateCorruptedError:
            concerned = True  # ``complete`` puts it aside
        if concerned:
            found.append(path)
    return found


def _all(directory: StateDirectory) -> list[str]:
    folder = f"{directory.root}/{JOURNAL}"
    try:
        with syscalls.scandir(folder) as entries:
            return sorted(entry.path for entry in entries if entry.name.startswith(_PREFIX))
    except OSError as error:
        raise storage_error(error, "listing a directory", path=folder) from error


@lru_cache(maxsize=256)
def _lock_names(path: str) -> frozenset[str]:
    """The locks an intent concerns. An intent never changes, and its name is never used again."""
    return frozenset(lock_name(*id_of(change)) for change in _read(path))


def _read(path: str) -> list[ResolvedChange]:
    """The changes in an intent. Raises ``FileNotFoundError``, ``StateCorruptedError``."""
    found = fileio.read_file(path)
    if found is None:
        raise FileNotFoundError(path)
    return decode_record(found[0].removesuffix(b"\n"))


class RedoRecord(NamedTuple):
    """An intent as it is now: its changes (none when it is torn), or what is wrong with it."""

    path: str
    done: list[ResolvedChange]
    damage: str | None = None


def recorded(directory: StateDirectory) -> list[RedoRecord]:
    """Every intent, of a dead writer or a live one, verified_dirs at without a lock."""
    try:
        with syscalls.scandir(f"{directory.root}/{JOURNAL}") as entries:
            found = sorted(entry.path for entry in entries if entry.name.startswith(_PREFIX))
    except FileNotFoundError:
        return []
    intents = []
    for path in found:
        try:
            content = fileio.read_file(path)
            if content is not None:  # its writer may be done with it by now
                whole = content[0].endswith(b"\n")
                torn = content[0] and not whole
                intents.append(RedoRecord(path, [] if torn else decode_record(content[0][:-1])))
        except AgentStateError as error:
            intents.append(RedoRecord(path, [], error.message))
    return intents


def complete(directory: StateDirectory, intent: str, *, held: Container[str] = ()) -> None:
    """Do what a dead writer had recorded. Doing it twice, or after somebody else, is harmless.

    ``held``: the locks that the caller holds already. Raises ``LockTimeoutError`` when another
    one is taken: the writer lives, or somebody else is at it.
    """
    with ExitStack() as stack:
        try:
            for name in sorted(_lock_names(intent)):
                if name not in held:
                    stack.callback(take_lock(directory, name).release)
            # Under the locks: an intent that is still there has no writer any more.
            done = _read(intent)
        except FileNotFoundError:
            return
        except StateCorruptedError as error:
            kept = directory.quarantine_dir.move(intent, error.message)
            directory.incidents.append(
                Incident(
                    f"an intent was damaged: {error.message}",
                    path=directory.relative(intent),
                    kept=kept,
                )
            )
            return
        # Its writer may have died before any of its fsyncs: what is built on must be durable
        # first, and so must be in the end what was there already.
        _make_durable(directory, [intent])
        for change in done:
            directory.retry_after_clearing_path(partial(replay, directory, change))
        _make_durable(directory, [_path(directory, change) for change in done])
        try:
            _remove_intent(directory, intent)
        except OSError as error:  # done it is, and will be done again, which changes nothing
            raise storage_error(error, "removing an intent", path=intent) from error


def _make_durable(directory: StateDirectory, files: Iterable[str]) -> None:
    """Sync these files and their folders. Raises ``StorageError``."""
    if directory.sync:
        unsynced = PendingSync(directory.root)
        for path in files:
            unsynced.note_file(path)
        unsynced.sync()


def _path(directory: StateDirectory, change: ResolvedChange) -> str:
    ending = paths.LOG if isinstance(change, ResolvedAppend) else paths.DOCUMENT
    return directory.path(*id_of(change), ending)


def complete_dead(directory: StateDirectory) -> None:
    """Complete the intents of all writers that are no more."""
    for intent in _all(directory):
        with contextlib.suppress(LockTimeoutError):  # its writer lives, or somebody is at it
            complete(directory, intent)


def replay(directory: StateDirectory, change: ResolvedChange) -> None:
    """Bring one recorded change about, unless what is stored is as new already."""
    if isinstance(change, ResolvedPut):
        document = change.document
        if _revision(directory, document.kind, document.key) < document.revision:
            directory.write(document, change.meta)
    elif isinstance(change, ResolvedDelete):
        if 0 < _revision(directory, change.kind, change.key) <= change.revision:
            directory.remove(change.kind, change.key)
    else:
        log = directory.log(change.kind, change.key)
        if log.tail().seq < change.record.seq:
            directory.make_parent(log.path)
            log.append([change.record], sync=directory.sync)


def _revision(directory: StateDirectory, kind: str, key: Key) -> int:
    try:
        stored = directory.read(kind, key)
    except StateCorruptedError as error:
        stored = directory.quarantine_and_restore(kind, key, error.message)
    return stored.document.revision if stored else 0


def lock_name(kind: str, key: Key) -> str:
    """Documents and logs that share a kind and first segment share a lock."""
    return paths.relative(kind, key[:1], ".lock")


def take_lock(directory: StateDirectory, name: str) -> locks.FileLock:
    """The lock of that name, at once. Raises ``LockTimeoutError`` when it is taken."""
    path = f"{directory.root}/{LOCKS}/{name}"
    try:
        if fileio.has_folders(directory.root, path):
            return locks.acquire(path, 0.0)
    except StorageError as error:
        if error.errno != errno.ENOENT:
            raise
    directory.make_parent(path)
    return locks.acquire(path, 0.0)
