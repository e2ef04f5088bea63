"""Groups of files, whole or not at all: the intent record of the shared store.

The new files are staged first, so that a full disk is met while nothing has changed. Then one
fsynced intent says all that is to be done; from there the group goes forward. The intent is
locked while its writer lives: an intent that nobody locks is a dead writer's, and whoever
finds it completes it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from agent_state.errors import (
    AgentStateError,
    DurabilityUnknownError,
    Key,
    StateCorruptedError,
    storage_error,
)
from agent_state.protocols import Incident
from agent_state.storage import atomic, envelope, locks, paths, syscalls
from agent_state.storage.directory import JOURNAL, LOCKS, StateDirectory
from agent_state.storage.logs import LogFile
from agent_state.storage.records import (
    AppendDone,
    DeleteDone,
    Done,
    PutDone,
    decode_record,
    encode_record,
)

_PREFIX = "intent-"


def apply_group(directory: StateDirectory, done: Sequence[Done]) -> None:
    """Make all the changes or none. The caller holds the locks of all places.

    Raises ``StorageError`` when nothing was changed, ``DurabilityUnknownError`` when the group
    is recorded and the next to come will complete it.
    """
    staged: list[tuple[str, str]] = []
    intent = f"{directory.root}/{JOURNAL}/{_PREFIX}{secrets.token_hex(8)}.jsonl"
    try:
        _stage(directory, done, staged)
        lock = locks.acquire(intent, 0.0)
    except BaseException:
        for temporary, _ in staged:
            atomic.discard(temporary)
        raise
    appended: list[tuple[LogFile, int]] = []
    with ExitStack() as stack:
        stack.callback(lock.release)
        try:
            lock.write(encode_record(done))
            if directory.sync:
                lock.sync()
                syscalls.fsync_directory(os.path.dirname(intent))
            _append(directory, done, appended)
        except BaseException as error:
            _take_back(directory, intent, staged, appended, error)
            if isinstance(error, OSError) and not isinstance(error, AgentStateError):
                raise storage_error(error, "writing a group", path=intent) from error
            raise
        try:
            _go_forward(directory, done, staged)
            _remove_intent(directory, intent)
        except OSError as error:
            raise DurabilityUnknownError(
                f"the group is recorded and will be completed at the next change: {error}",
                number=error.errno,
                path=intent,
            ) from error


def _stage(directory: StateDirectory, done: Sequence[Done], staged: list[tuple[str, str]]) -> None:
    for change in done:
        if isinstance(change, PutDone):
            document = change.document
            path = directory.path(document.kind, document.key)
            directory.make_parent(path)
            data = envelope.encode_document(document, change.meta)
            try:
                temporary, _ = atomic.stage(path, data, sync=directory.sync)
            except OSError as error:
                raise storage_error(
                    error, "writing a file", kind=document.kind, key=document.key, path=path
                ) from error
            staged.append((temporary, path))


def _append(
    directory: StateDirectory, done: Sequence[Done], appended: list[tuple[LogFile, int]]
) -> None:
    for change in done:
        if isinstance(change, AppendDone):
            log = directory.log(change.kind, change.key)
            directory.make_parent(log.path)
            size = log.tail().size
            log.append([change.record], sync=directory.sync)
            appended.append((log, size))


def _take_back(
    directory: StateDirectory,
    intent: str,
    staged: Iterable[tuple[str, str]],
    appended: Sequence[tuple[LogFile, int]],
    cause: BaseException,
) -> None:
    """Undo what came before the first rename; if that fails, the outcome is not known."""
    for temporary, _ in staged:
        atomic.discard(temporary)
    try:
        for log, size in reversed(appended):
            log.truncate(size)
        _remove_intent(directory, intent)
    except OSError as error:
        raise DurabilityUnknownError(
            f"the group failed ({cause}) and could not be taken back", path=intent
        ) from error


def _go_forward(
    directory: StateDirectory, done: Sequence[Done], staged: Iterable[tuple[str, str]]
) -> None:
    folders: dict[str, None] = {}
    for temporary, path in staged:
        directory.snapshots.keep(path)
        syscalls.rename(temporary, path)
        directory.note_written(path, atomic.stat_file(path))
        folders[os.path.dirname(path)] = None
    for change in done:
        if isinstance(change, PutDone):
            directory.forget(change.document.kind, change.document.key)
        elif isinstance(change, DeleteDone):
            path = directory.path(change.kind, change.key)
            directory.forget(change.kind, change.key)
            directory.note_written(path, None)
            atomic.remove_file(path, sync=False)
            folders[os.path.dirname(path)] = None
    if directory.sync:
        for folder in folders:
            syscalls.fsync_directory(folder)


def _remove_intent(directory: StateDirectory, intent: str) -> None:
    syscalls.unlink(intent)
    if directory.sync:
        # An intent that came back after a power cut would bring back what was deleted since.
        syscalls.fsync_directory(os.path.dirname(intent))


def dead_intents(directory: StateDirectory) -> list[str]:
    """The intents whose writer is no more."""
    with syscalls.scandir(f"{directory.root}/{JOURNAL}") as entries:
        found = [entry.path for entry in entries if entry.name.startswith(_PREFIX)]
    dead = []
    for path in sorted(found):
        lock = locks.try_acquire(path) if atomic.stat_file(path) is not None else None
        if lock is not None:
            lock.release()
            dead.append(path)
    return dead


class Recorded(NamedTuple):
    """An intent as it is now: its changes (none when it is torn), or what is wrong with it."""

    path: str
    done: list[Done]
    damage: str | None = None


def recorded(directory: StateDirectory) -> list[Recorded]:
    """Every intent, of a dead writer or a live one, looked at without a lock."""
    try:
        with syscalls.scandir(f"{directory.root}/{JOURNAL}") as entries:
            found = sorted(entry.path for entry in entries if entry.name.startswith(_PREFIX))
    except FileNotFoundError:
        return []
    intents = []
    for path in found:
        try:
            content = atomic.read_file(path)
            if content is not None:  # its writer may be done with it by now
                whole = content[0].endswith(b"\n")
                intents.append(Recorded(path, decode_record(content[0][:-1]) if whole else []))
        except AgentStateError as error:
            intents.append(Recorded(path, [], error.message))
    return intents


def complete(directory: StateDirectory, intent: str, timeout: float) -> None:
    """Do what a dead writer had recorded. Doing it twice, or after somebody else, is harmless."""
    lock = locks.try_acquire(intent)
    if lock is None:
        return  # somebody else is at it
    with ExitStack() as stack:
        stack.callback(lock.release)
        found = atomic.read_file(intent)
        if found is None or not locks.is_current(lock):
            return
        data = found[0]
        if not data.endswith(b"\n"):
            _remove_intent(directory, intent)  # torn: never acknowledged, nothing was renamed
            return
        try:
            done = decode_record(data[:-1])
        except StateCorruptedError as error:
            kept = directory.aside.move(intent, error.message)
            directory.incidents.append(
                Incident(f"an intent was damaged: {error.message}", path=intent, kept=kept)
            )
            return
        names = {lock_name(*place_of(change)) for change in done}
        for name in sorted(names):
            stack.enter_context(locks.holding(lock_path(directory, name), timeout))
        for change in done:
            replay(directory, change)
        _remove_intent(directory, intent)


def replay(directory: StateDirectory, change: Done) -> None:
    """Bring one recorded change about, unless what is stored is as new already."""
    if isinstance(change, PutDone):
        document = change.document
        if _revision(directory, document.kind, document.key) < document.revision:
            directory.write(document, change.meta)
    elif isinstance(change, DeleteDone):
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
        stored = directory.contain(kind, key, error.message)
    return stored.document.revision if stored else 0


def place_of(change: Done) -> tuple[str, Key]:
    """Kind and key of a change."""
    if isinstance(change, PutDone):
        return change.document.kind, change.document.key
    return change.kind, change.key


def lock_name(kind: str, key: Key) -> str:
    """Documents and logs that share a kind and first segment share a lock."""
    return f"{paths.check_kind(kind)}/{paths.encode(key[0])}.lock"


def lock_path(directory: StateDirectory, name: str) -> str:
    """The lock file of a name; its folder is made when missing."""
    path = f"{directory.root}/{LOCKS}/{name}"
    directory.make_parent(path)
    return path
