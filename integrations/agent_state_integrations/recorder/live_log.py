"""The live log as one recorder sees it: its end, and the newest messages.

Another process may have appended to it, or rotated it, since the last batch; its lines are then
read once, from whichever file they are in. All methods block, and all but ``read_recent`` need the
recorder's lock.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import orjson

from agent_state.errors import (
    MissingExtraError,
    StateCorruptedError,
    StorageError,
    storage_error,
)
from agent_state.protocols import JsonObject, LogRecord
from agent_state.serializers import parse_line
from agent_state.storage import fileio, logs, paths, syscalls
from agent_state.storage.log_writer import LogWriter, Tail
from agent_state_integrations.recorder import archiver, formats
from agent_state_integrations.recorder import checkpoint as checkpoints
from agent_state_integrations.recorder.files import CURRENT, KIND, Recording, StateDirectory
from agent_state_integrations.recorder.reader import between, lines_between, sources

logger = logging.getLogger("agent_state_integrations.recorder")

_SEQ_BITS = 48
_DIGEST = 2**32 - 1
_STRINGS = ("Id", "Message", "SpeakerName", "ContextId")


class DedupeWindow:
    """The ids and contents of the newest messages: of at least ``window``, at most twice as many.

    A message with a known id and the same content is a duplicate. One with a known id and other
    content is recorded as ``<id>~<8 hex digits of its content>``, so that a repetition of it is
    found too, with its own id as ``Metadata.original_id``. ``contents``: a message with the text,
    speaker and context of another is a duplicate whatever its id.

    Stored are 64 bits of a hash of each id, salted for this process, and 32 bits of the content:
    about 120 bytes a message.
    """

    def __init__(self, window: int, *, contents: bool = False) -> None:
        self.window = window
        self._contents = contents
        self._staged: dict[int, int] = {}
        self._young: dict[int, int] = {}
        self._old: dict[int, int] = {}

    def find_duplicate(self, record: JsonObject) -> int:
        """The number of the message that this one repeats; 0 if it is new.

        If only its id is taken, the record gets another one.
        """
        found = self._find(hash(record["Id"]))
        if found is not None and found & _DIGEST != _digest(record):
            record["Metadata"]["original_id"] = record["Id"]
            record["Id"] = f"{record['Id']}~{_hex_digest(record)}"
            found = self._find(hash(record["Id"]))
        if found is None and self._contents:
            found = self._find(_content_hash(record))
        return 0 if found is None else found >> 32

    def stage(self, record: JsonObject, seq: int) -> None:
        """Add a message that is about to be recorded; ``commit`` keeps it."""
        entry = (seq & (2**_SEQ_BITS - 1)) << 32 | _digest(record)
        self._staged[hash(record["Id"])] = entry
        if self._contents:
            self._staged[_content_hash(record)] = entry

    def commit(self) -> None:
        """Keep the staged messages, which are recorded."""
        self._young.update(self._staged)
        self._staged.clear()
        if len(self._young) >= self.window * (1 + self._contents):
            self._young, self._old = {}, self._young

    def discard(self) -> None:
        """Drop the staged messages, which could not be recorded."""
        self._staged.clear()

    def _find(self, place: int) -> int | None:
        for known in (self._staged, self._young, self._old):
            if (found := known.get(place)) is not None:
                return found
        return None


def _digest(record: JsonObject) -> int:
    content = record.get("Content")
    if content is None:
        return hash(record["Message"]) & _DIGEST
    return hash((record["Message"], _sorted_json(content))) & _DIGEST


def _content_hash(record: JsonObject) -> int:
    return hash(
        (
            "content",
            record["SpeakerName"],
            record["ContextId"],
            record["Message"],
            _sorted_json(record.get("Content")),
        )
    )


def _hex_digest(record: JsonObject) -> str:
    content = [record["Message"], record.get("Content")]
    return hashlib.sha256(_sorted_json(content)).hexdigest()[:8]


def _sorted_json(value: object) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


class LiveLog:
    """``record/current.jsonl``. ``window`` and ``contents`` are those of ``DedupeWindow``."""

    def __init__(
        self, recording: Recording, directory: StateDirectory, *, window: int, contents: bool
    ) -> None:
        self._recording = recording
        self._directory = directory
        self._at = directory.locate(KIND, CURRENT, paths.LOG)
        self._window = window
        self.known = DedupeWindow(window, contents=contents)
        self.last_seq = 0
        """The last number given, in whichever file it is."""
        self.size = 0
        """Bytes of the live log."""
        self.day = ""
        """The UTC day on which the live log was begun."""
        self._first_seq = 1
        self._inode = -1
        self._release_fd: Callable[[], object] = _nothing

    @property
    def _log(self) -> LogWriter:
        return self._directory.logs.writer(self._at)

    def read_recent(self) -> None:
        """Read the newest messages of segments and archives, which needs no lock.

        The live log is left out, since its last lines may still be taken back.
        """
        self._read_after(self._newest() - self._window, live=False)

    def catch_up(self) -> None:
        """Read the lines of other processes, and sync them, since their writer may have died.

        Raises ``StorageError``.
        """
        log = self._log
        tail = log.tail()
        if (tail.inode, tail.size) == (self._inode, self.size):
            return
        if tail.inode == self._inode:
            current = str(self._recording.current)
            self._read(logs.lines_from(current, self.size, tail.size))
        else:
            newest = self._newest()
            self._read_after(newest - self._window)
            self.last_seq = max(self.last_seq, newest)
        self._directory.documents.ensure_synced([self._at])
        tail = log.tail()
        if tail.inode != self._inode and tail.size:
            self._first_seq = _seq_of(logs.first_line(str(self._recording.current))) or 1
            self.day = _day_of(self._recording.current)
        self.last_seq = max(self.last_seq, tail.seq)
        self._hold(tail)

    def release(self) -> None:
        """Close the live log; it is inspected again at the next use."""
        self._release_fd()
        self._inode = -1
        self._directory.logs.forget(self._at)

    def _hold(self, tail: Tail) -> None:
        """Remember the end of the log, and keep it open, so that its inode is not used again."""
        if tail.inode != self._inode:
            self._release_fd()
            self._inode = -1
            if tail.inode:
                with formats.open_file(self._recording.current) as file:
                    self._release_fd = weakref.finalize(self, os.close, os.dup(file.fileno()))
        self._inode, self.size = tail.inode, tail.size

    def append(self, lines: Sequence[LogRecord], received: datetime) -> None:
        """Append lines that are numbered from ``last_seq`` on. Raises ``StorageError``."""
        begins = not self.size
        log = self._log
        self._directory.documents.make_parent(self._at)
        log.append(lines, sync=self._directory.sync)
        tail = log.tail()
        self._hold(tail)
        self.last_seq = tail.seq
        if begins:
            self.day, self._first_seq = received.strftime("%Y-%m-%d"), lines[0].seq

    def rotate(self) -> str:
        """Rename the live log, which must not be empty, to a segment; its name without ending."""
        path = self._recording.segment_path(self.day, self._first_seq)
        if path.exists():
            number = errno.EEXIST
            raise StorageError(f"rotating the log: {os.strerror(number)}", number=number, path=path)
        try:
            syscalls.rename(str(self._recording.current), str(path))
        except OSError as error:
            raise storage_error(error, "rotating the log", path=path) from error
        self.release()
        self._inode = self.size = 0
        if self._directory.sync:
            fileio.sync_directory(str(self._recording.folder))
        return path.stem

    # -- earlier messages ----------------------------------------------------------------

    def _read_after(self, seq: int, *, live: bool = True) -> None:
        """Read the messages after a number that are not known yet, from all files."""
        seq = max(seq, self.last_seq)
        if not self._recording.has_begun():
            return
        with sources(self._recording.folder) as files:
            for source in between(files, seq + 1, logs.MAX_SEQ):
                if source.segment is None and not live:
                    continue
                try:
                    self._read(lines_between(source, seq + 1, logs.MAX_SEQ))
                except (StateCorruptedError, MissingExtraError) as error:
                    logger.warning("duplicates of messages in an archive are not found: %s", error)

    def _read(self, lines: Iterable[bytes]) -> None:
        for line in lines:
            seq, record = _record_of(line)
            self.last_seq = max(self.last_seq, seq)
            if record is not None:
                self.known.stage(record, seq)
                self.known.commit()

    def _newest(self) -> int:
        """The last number of a line, a checkpoint or an archive."""
        plain = (segment.path for segment in self._recording.segments()[-1:])
        last = checkpoints.newest(self._directory)
        return max(
            *(logs.last_seq(str(path)) for path in (*plain, self._recording.current)),
            last.last_seq if last is not None else 0,
            archiver.last_archived(self._recording),
        )


def _record_of(line: bytes) -> tuple[int, JsonObject | None]:
    """The number of a line, and its record unless it is damaged or written by a person."""
    try:
        record = parse_line(line)
    except StateCorruptedError:
        return 0, None
    seq = record.get("_seq")
    complete = all(type(record.get(name)) is str for name in _STRINGS)
    return (seq if logs.is_seq(seq) else 0), (record if complete else None)


def _seq_of(line: bytes) -> int:
    return _record_of(line)[0]


def _day_of(path: Path) -> str:
    """The day of the last write: a log is rotated at midnight, so it was begun on this day too."""
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%d")


def _nothing() -> None:
    """No descriptor is open."""
