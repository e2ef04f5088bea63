"""Which messages are recorded already: of the newest ones, what their ids and contents were.

The live log as one recorder sees it: where it ends, and what has been recorded lately.

Another process may have appended to it, or rotated it, since the last batch; what it wrote is
read then, once, wherever it stands by now. All of it blocks, and all but ``look_back`` is done
under the recorder's lock.
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
from agent_state.serializers import parse_object
from agent_state.storage import fileio, logs, paths, syscalls
from agent_state.storage.directory import StateDirectory
from agent_state.storage.log_writer import LogWriter, Tail
from agent_state_integrations.recorder import archiver, formats
from agent_state_integrations.recorder import checkpoint as checkpoints
from agent_state_integrations.recorder.files import CURRENT, KIND, Recording
from agent_state_integrations.recorder.reader import between, is_begun, lines_between, sources

_SEQ_BITS = 48
_DIGEST = 2**32 - 1


class DedupeWindow:
    """Remembers the newest messages: at least ``window`` of them, at most twice as many.

    A message with a known id and the same content is a duplicate. One with a known id and other
    content is not lost: it is recorded as ``<id>~<8 hex digits of its content>``, which a repeat
    of it finds again, and ``Metadata.original_id`` says what it was sent as. ``contents``: the same
    words of the same speaker in the same context are a duplicate too, whatever their id.

    What is kept is a hash of each id, 64 bits of this process's own, with 32 bits of the content:
    about 120 bytes a message.
    """

    def __init__(self, window: int, *, contents: bool = False) -> None:
        self.window = window
        self._contents = contents
        self._new: dict[int, int] = {}
        self._young: dict[int, int] = {}
        self._old: dict[int, int] = {}

    def settle(self, record: JsonObject) -> int:
        """The number of the message that this one repeats; 0 when it is new.

        Where only the id is taken, the record gets another one.
        """
        digest = _digest(record)
        found = self._find(hash(record["Id"]))
        if found is not None and found & _DIGEST != digest:
            record["Metadata"]["original_id"] = record["Id"]
            record["Id"] = f"{record['Id']}~{_hex(record)}"
            found = self._find(hash(record["Id"]))
        if found is None and self._contents:
            found = self._find(_words(record))
        return 0 if found is None else found >> 32

    def add(self, record: JsonObject, seq: int) -> None:
        """This one is about to be recorded under the number; ``keep`` says that it is."""
        entry = (seq & (2**_SEQ_BITS - 1)) << 32 | _digest(record)
        self._new[hash(record["Id"])] = entry
        if self._contents:
            self._new[_words(record)] = entry

    def keep(self) -> None:
        """What was added is recorded."""
        self._young.update(self._new)
        self._new.clear()
        if len(self._young) >= self.window * (1 + self._contents):
            self._young, self._old = {}, self._young

    def drop(self) -> None:
        """What was added is not recorded after all."""
        self._new.clear()

    def _find(self, place: int) -> int | None:
        for known in (self._new, self._young, self._old):
            if (found := known.get(place)) is not None:
                return found
        return None


def _digest(record: JsonObject) -> int:
    content = record.get("Content")
    if content is None:
        return hash(record["Message"]) & _DIGEST
    return hash((record["Message"], _canonical(content))) & _DIGEST


def _words(record: JsonObject) -> int:
    return hash(
        (
            "words",
            record["SpeakerName"],
            record["ContextId"],
            record["Message"],
            _canonical(record.get("Content")),
        )
    )


def _hex(record: JsonObject) -> str:
    said = [record["Message"], record.get("Content")]
    return hashlib.sha256(_canonical(said)).hexdigest()[:8]


def _canonical(value: object) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


logger = logging.getLogger("agent_state_integrations.recorder")

_STRINGS = ("Id", "Message", "SpeakerName", "ContextId")


class LiveLog:
    """Follows ``record/current.jsonl``; see ``DedupeWindow`` for ``window`` and ``contents``."""

    def __init__(
        self, recording: Recording, directory: StateDirectory, *, window: int, contents: bool
    ) -> None:
        self._recording = recording
        self._directory = directory
        self._at = directory.locate(KIND, CURRENT, paths.LOG)
        self._window = window
        self.known = DedupeWindow(window, contents=contents)
        self.last_seq = 0
        """The last number given, in whatever file it stands."""
        self.size = 0
        """Bytes of the live log."""
        self.day = ""
        """The UTC day on which the live log was begun."""
        self._first_seq = 1
        self._inode = -1
        self._let_go: Callable[[], object] = _nothing

    @property
    def _log(self) -> LogWriter:
        return self._directory.logs.writer(self._at)

    def look_back(self) -> None:
        """Remember the newest messages of segments and archives, which needs no lock.

        Of what is in the live log some may still be taken back.
        """
        self._learn_after(self._newest() - self._window, live=False)

    def catch_up(self) -> None:
        """Read what others have written. What they may have died on is made durable.

        Raises ``StorageError``.
        """
        log = self._log
        tail = log.tail()
        if (tail.inode, tail.size) == (self._inode, self.size):
            return
        if tail.inode == self._inode:
            current = str(self._recording.current)
            self._learn(logs.lines_from(current, self.size, tail.size))
        else:
            newest = self._newest()
            self._learn_after(newest - self._window)
            self.last_seq = max(self.last_seq, newest)
        self._directory.documents.ensure_synced([self._at])
        tail = log.tail()
        if tail.inode != self._inode and tail.size:
            self._first_seq = _seq_of(logs.first_line(str(self._recording.current))) or 1
            self.day = _day_of(self._recording.current)
        self.last_seq = max(self.last_seq, tail.seq)
        self._hold(tail)

    def release(self) -> None:
        """Let go of the live log, which is looked at anew next time."""
        self._let_go()
        self._inode = -1
        self._directory.logs.forget(self._at)

    def _hold(self, tail: Tail) -> None:
        """The live log ends so. It is kept open, or its inode could become another log's."""
        if tail.inode != self._inode:
            self._let_go()
            self._inode = -1
            if tail.inode:
                with formats.open_file(self._recording.current) as file:
                    self._let_go = weakref.finalize(self, os.close, os.dup(file.fileno()))
        self._inode, self.size = tail.inode, tail.size

    def append(self, lines: Sequence[LogRecord], received: datetime) -> None:
        """Append lines numbered from ``last_seq`` on. Raises ``StorageError``."""
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
        """Give the live log, which has lines, its name as a segment; the name without ending."""
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

    # -- what is there -------------------------------------------------------------------

    def _learn_after(self, seq: int, *, live: bool = True) -> None:
        """Remember what came after a number and is not known, wherever it stands by now."""
        seq = max(seq, self.last_seq)
        if not is_begun(self._recording):
            return
        with sources(self._recording.folder) as files:
            for source in between(files, seq + 1, logs.MAX_SEQ):
                if source.segment is None and not live:
                    continue
                try:
                    self._learn(lines_between(source, seq + 1, logs.MAX_SEQ))
                except (StateCorruptedError, MissingExtraError) as error:
                    logger.warning("repeats of what is archived here are not known: %s", error)

    def _learn(self, lines: Iterable[bytes]) -> None:
        for line in lines:
            seq, record = _record_of(line)
            self.last_seq = max(self.last_seq, seq)
            if record is not None:
                self.known.add(record, seq)
                self.known.keep()

    def _newest(self) -> int:
        """The last number that a line has, or a checkpoint or an archive names."""
        plain = (segment.path for segment in self._recording.segments()[-1:])
        last = checkpoints.newest(self._directory)
        return max(
            *(logs.last_seq(str(path)) for path in (*plain, self._recording.current)),
            last.last_seq if last is not None else 0,
            archiver.last_archived(self._recording),
        )


def _record_of(line: bytes) -> tuple[int, JsonObject | None]:
    """The number of a line, and its record unless it is damaged, or a person's."""
    try:
        record = parse_object(line)
    except StateCorruptedError:
        return 0, None
    seq = record.get("_seq")
    whole = all(type(record.get(name)) is str for name in _STRINGS)
    return (seq if logs.is_seq(seq) else 0), (record if whole else None)


def _seq_of(line: bytes) -> int:
    return _record_of(line)[0]


def _day_of(path: Path) -> str:
    """A log that is rotated at midnight was last written on the day on which it was begun."""
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%d")


def _nothing() -> None:
    """There is nothing to let go of."""
