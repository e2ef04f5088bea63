"""Messages that wait on the disk of the agent while the recorder's daemon is away.

    spool/current.jsonl         what is being added to, by any number of processes
    spool/<id>.jsonl            what is not any more; gone when the daemon has all of it
    spool/append.lock           held while something is added, or the current file is rotated
    spool/delivery.lock         held by the one process that delivers

The files are logs of the core: each line ``{"_crc", "_seq", "message": …}``, torn tails cut off.
A message is understood and cleared of secrets before it is written, as the daemon would do it, so
that the daemon finds it equal to one that it has already; ``raw`` is what cannot be understood.
All methods block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path

import orjson

from agent_state.clock import Clock, IdFactory, SystemClock, new_id
from agent_state.errors import StateCorruptedError, UnreadableMessageError, storage_error
from agent_state.protocols import JsonObject, LogRecord
from agent_state.serializers import canonical_json
from agent_state.storage import fileio, locks, logs, syscalls
from agent_state.storage.log_writer import LogWriter
from agent_state_integrations.recorder.network import wire
from agent_state_integrations.recorder.normalize import normalize
from agent_state_integrations.recorder.redact import SecretRedactor

SEGMENT_BYTES = 4 * 1024 * 1024
"""So few messages that all of them are within what the daemon remembers: what is sent twice,
because a client died in between, is recorded once."""
BATCH = 500
BATCH_BYTES = 4 * 1024 * 1024

_LOCK_SECONDS = 10.0
_CURRENT = "current.jsonl"
_ENDING = ".jsonl"


class Spool:
    """One folder of waiting messages, shared by any number of processes.

    ``redactor`` takes out what must not be written; by default it is the recorder's own.
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        *,
        redactor: SecretRedactor | None = None,
        clock: Clock | None = None,
        new_id: IdFactory = new_id,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        self.folder = Path(folder).absolute()
        self._redactor = redactor
        self._clock = clock or SystemClock()
        self._new_id = new_id
        self._segment_bytes = segment_bytes
        self._log = LogWriter(self._path(_CURRENT), ("current",), self._keep_torn)
        self._made = False

    def append(self, messages: Sequence[bytes]) -> None:
        """Keep these messages, each the bytes of a JSON object; durable when this returns.

        Raises ``StorageError`` (nothing was kept), ``LockTimeoutError``.
        """
        redactor = self._redactor = self._redactor or SecretRedactor.default()
        bodies = [canonical_json(self._cleared(message, redactor)) for message in messages]
        self._prepare()
        with locks.holding(self._path("append.lock"), _LOCK_SECONDS):
            tail = self._log.tail()
            if tail.size >= self._segment_bytes:
                self._rotate()
                tail = self._log.tail()
            records = [LogRecord(seq, body) for seq, body in enumerate(bodies, tail.seq + 1)]
            self._log.append(records, sync=True)

    def waiting(self) -> bool:
        """Whether there is anything to deliver."""
        # In this order: a file rotated in between is seen under its new name.
        return self._current_size() > 0 or any(name != _CURRENT for name in self._names())

    def begin_delivery(self) -> locks.FileLock | None:
        """The right to deliver, until it is released; None when another process does."""
        self._prepare()
        return locks.try_acquire(self._path("delivery.lock"))

    def oldest(self) -> str | None:
        """The path of the oldest file that is not added to any more; None when all is delivered.

        If it is the only one, the current file is rotated.
        """
        names = [name for name in self._names() if name != _CURRENT]
        if names:
            return self._path(min(names))
        with locks.holding(self._path("append.lock"), _LOCK_SECONDS):
            return self._rotate() if self._log.tail().size else None

    def batches(self, path: str) -> Iterator[list[bytes]]:
        """The messages of one file in order, in batches that fit in a request.

        A damaged line is returned unchanged: the daemon keeps it as a dead letter.
        """
        batch, size = list[bytes](), 0
        for line in logs.lines_from(path, 0, _size(path)):
            message = _message_in(line)
            if batch and (len(batch) >= BATCH or size + len(message) > BATCH_BYTES):
                yield batch
                batch, size = [], 0
            batch.append(message)
            size += len(message)
        if batch:
            yield batch

    def remove(self, path: str) -> None:
        """The daemon has all of this file. Raises ``StorageError``."""
        fileio.remove_file(path, sync=True)

    def _cleared(self, message: bytes, redactor: SecretRedactor) -> JsonObject:
        try:
            record = normalize(message, received=self._clock.now(), new_id=self._new_id)
        except UnreadableMessageError:
            return {"raw": redactor.redact_raw(message)}
        redactor.redact(record)
        return {"message": record}

    def _rotate(self) -> str:
        """Give the current file a number above those of all that wait; they are sent in order."""
        numbers = [int(stem) for name in self._names() if (stem := name.split(".")[0]).isdecimal()]
        path = self._path(f"{max(numbers, default=0) + 1:012d}{_ENDING}")
        try:
            syscalls.rename(self._log.path, path)
        except OSError as error:
            raise storage_error(error, "rotating a spool file", path=path) from error
        fileio.sync_directory(str(self.folder))
        return path

    def _prepare(self) -> None:
        if not self._made:
            there = next(parent for parent in self.folder.parents if parent.is_dir())
            fileio.make_directories(
                str(there), self.folder.relative_to(there).as_posix(), sync=True
            )
            ignore = self._path(".gitignore")
            if fileio.stat_file(ignore) is None:
                fileio.replace_file(ignore, b"*\n", sync=True)
            self._made = True

    def _names(self) -> list[str]:
        try:
            with syscalls.scandir(str(self.folder)) as entries:
                return [entry.name for entry in entries if entry.name.endswith(_ENDING)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise storage_error(error, "listing the spool", path=self.folder) from error

    def _current_size(self) -> int:
        return _size(self._log.path)

    def _keep_torn(self, data: bytes, _reason: str) -> None:
        """Its writer died before it was acknowledged; keep it for inspection."""
        fileio.replace_file(self._path(self._new_id() + ".torn"), data, sync=True)

    def _path(self, name: str) -> str:
        return f"{self.folder}/{name}"


def _message_in(line: bytes) -> bytes:
    try:
        body = orjson.loads(logs.decode_line(line, 0).body)
        return body["raw"].encode() if "raw" in body else orjson.dumps(body["message"])
    except (StateCorruptedError, KeyError, AttributeError):
        return line[: wire.MAX_MESSAGE]


def _size(path: str) -> int:
    stamp = fileio.stat_file(path)
    return stamp.size if stamp is not None else 0
