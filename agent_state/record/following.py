"""The live log as one recorder sees it: where it ends, and what has been recorded lately.

Another process may have appended to it, or rotated it, since the last batch; what it wrote is
read then, once. All of it blocks, and is done under the recorder's lock.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from agent_state.errors import StateCorruptedError, StorageError, storage_error
from agent_state.protocols import JsonObject, LogRecord
from agent_state.record import checkpoints
from agent_state.record.archives import packing
from agent_state.record.known import Known
from agent_state.record.segments import CURRENT, KIND, Recording
from agent_state.serializers import parse_object
from agent_state.storage import atomic, logs, paths, syscalls
from agent_state.storage.directory import StateDirectory
from agent_state.storage.logfile import LogFile

_STRINGS = ("Id", "Message", "SpeakerName", "ContextId")


class Follower:
    """Follows ``record/current.jsonl``; see ``Known`` for ``window`` and ``contents``."""

    def __init__(
        self, recording: Recording, directory: StateDirectory, *, window: int, contents: bool
    ) -> None:
        self._recording = recording
        self._directory = directory
        self._window = window
        self._contents = contents
        self.forget()

    def forget(self) -> None:
        """Look at everything again next time."""
        self.known = Known(self._window, contents=self._contents)
        self.last_seq = 0
        """The last number given, in whatever file it stands."""
        self.size = 0
        """Bytes of the live log."""
        self.day = ""
        """The UTC day on which the live log was begun."""
        self._first_seq = 1
        self._inode = -1

    @property
    def _log(self) -> LogFile:
        return self._directory.log(KIND, CURRENT)

    def catch_up(self) -> None:
        """Read what others have written. What they may have died on is made durable.

        Raises ``StorageError``.
        """
        tail = self._log.tail()
        if (tail.inode, tail.size) == (self._inode, self.size):
            return
        if self._inode < 0:
            self._begin()
        else:
            self._read_on(tail.inode)
        self._directory.confirm(KIND, CURRENT, paths.LOG)
        tail = self._log.tail()
        if tail.inode != self._inode and tail.size:
            self._first_seq = _seq_of(logs.first_line(str(self._recording.current))) or 1
            self.day = _day_of(self._recording.current)
        self.last_seq = max(self.last_seq, tail.seq)
        self._inode, self.size = tail.inode, tail.size

    def append(self, lines: Sequence[LogRecord], received: datetime) -> None:
        """Append lines numbered from ``last_seq`` on. Raises ``StorageError``."""
        begins = not self.size
        log = self._log
        self._directory.make_parent(log.path)
        log.append(lines, sync=self._directory.sync)
        tail = log.tail()
        self._inode, self.size, self.last_seq = tail.inode, tail.size, tail.seq
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
        self._directory.forget_log(KIND, CURRENT)
        self._inode = self.size = 0
        if self._directory.sync:
            atomic.sync_directory(str(self._recording.folder))
        return path.stem

    # -- what is there -------------------------------------------------------------------

    def _begin(self) -> None:
        """Remember the newest messages of all plain files."""
        files = [*(segment.path for segment in self._recording.segments()), self._recording.current]
        self.last_seq = max((logs.last_seq(str(path)) for path in files[-2:]), default=0)
        self.last_seq = max(self.last_seq, self._promised())
        after = max(0, self.last_seq - self._window)
        firsts = [segment.first_seq for segment in self._recording.segments()]
        old = sum(1 for following in firsts[1:] if following <= after)
        for path in files[old:]:
            at, _, end = logs.seek(str(path), after=after)
            self._learn(str(path), at, end)

    def _read_on(self, inode: int) -> None:
        """Remember what came since; the live log may have become a segment, perhaps with others."""
        current = str(self._recording.current)
        if inode == self._inode:
            self._learn(current, self.size, _end_of(current))
            return
        segments = self._recording.segments()
        inodes = [_inode_of(segment.path) for segment in segments]
        if self._inode in inodes:
            ours = inodes.index(self._inode)
            path = str(segments[ours].path)
            self._learn(path, self.size, _end_of(path))
            for segment in segments[ours + 1 :]:
                self._learn(str(segment.path), 0, _end_of(str(segment.path)))
            self._learn(current, 0, _end_of(current))
        else:
            self.forget()
            self._begin()

    def _learn(self, path: str, start: int, end: int) -> None:
        for line in logs.lines_from(path, start, end):
            seq, record = _record_of(line)
            self.last_seq = max(self.last_seq, seq)
            if record is not None:
                self.known.add(record, seq)

    def _promised(self) -> int:
        """The last number that a checkpoint or an archive names, and that is not given again."""
        last = checkpoints.newest(self._directory)
        archived = packing.last_archived(self._recording)
        return max(last.last_seq if last is not None else 0, archived)


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


def _end_of(path: str) -> int:
    return logs.seek(path)[2]


def _inode_of(path: Path) -> int:
    stamp = atomic.stat_file(str(path))
    return stamp.inode if stamp is not None else -1
