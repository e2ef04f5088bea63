"""Growth: rotated segments become archives, and the oldest archives go when that is asked for.

A plain segment goes only when its archive is durable, has been read back completely, hashes to
the segment's own bytes and stands in the index. Killed at any moment, a run leaves the segment,
the archive, or both, which readers take for one; the next run goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date, timedelta
from os import PathLike, fspath

from agent_state.clock import Clock, SystemClock, stamp
from agent_state.errors import (
    AgentStateError,
    StateCorruptedError,
    StateDirectoryInUseError,
    StateNotFoundError,
)
from agent_state.storage import fileio, locks
from agent_state.storage.directory import StateDirectory
from agent_state_integrations.recorder.archives import packing
from agent_state_integrations.recorder.archives.growth import Archived, Policy, Verified
from agent_state_integrations.recorder.past.index import (
    INDEX,
    Entry,
    Index,
    archive_path,
    directory_of,
    known_index,
    read_index,
    write_index,
)
from agent_state_integrations.recorder.past.optional import has_arrow
from agent_state_integrations.recorder.past.sources import is_begun
from agent_state_integrations.recorder.segments import KIND, Format, Recording, Segment

LOCK = ".locks/archiver.lock"

Progress = Callable[[int, int], object]


def archive(
    state_dir: str | PathLike[str],
    policy: Policy | None = None,
    *,
    dry_run: bool = False,
    clock: Clock | None = None,
    progress: Progress | None = None,
) -> Archived:
    """Archive what the policy says. Blocks. Works beside a recorder and readers.

    Raises ``StateDirectoryInUseError`` when another archiver is at work, ``StateNotFoundError``
    where nothing was recorded, ``StorageError``: what could not be archived stays as it was.
    """
    recording = Recording(state_dir)
    if not is_begun(recording):
        raise StateNotFoundError("there is no recording here", path=recording.folder)
    policy = policy or Policy()
    clock = clock or SystemClock()
    run = _Run(recording, policy, clock, progress or (lambda _done, _of: None))
    if dry_run:
        return run.plan()
    with _alone(recording):
        return run.carry_out()


def verify_archives(
    state_dir: str | PathLike[str], *, progress: Progress | None = None
) -> Verified:
    """Read every archive completely and compare it with the index; changes nothing."""
    recording = Recording(state_dir)
    problems = []
    try:
        index = read_index(directory_of(recording))
    except StateCorruptedError as error:
        index = Index()
        problems.append(str(error))
    messages = 0
    for number, entry in enumerate(index.archives, 1):
        try:
            packing.check(recording, entry)
            messages += entry.messages
        except AgentStateError as error:
            problems.append(str(error))
        if progress is not None:
            progress(number, len(index.archives))
    plain = {segment.stem for segment in recording.segments()}
    problems += [
        f"the index does not name this archive [{segment.path}]"
        for segment in recording.archives()
        if index.find(segment.stem) is None and segment.stem not in plain
    ]
    return Verified(len(index.archives), messages, tuple(problems))


class _Run:
    """One run of the archiver."""

    def __init__(
        self, recording: Recording, policy: Policy, clock: Clock, progress: Progress
    ) -> None:
        self._recording = recording
        self._policy = policy
        self._clock = clock
        self._progress = progress
        self._today = clock.now().date()
        self._index = known_index(recording)
        self._directory: StateDirectory = directory_of(recording, sync=True, clock=clock)

    def plan(self) -> Archived:
        """What would be done."""
        report = Archived(dry_run=True)
        plain = self._recording.segments()
        report.plain_bytes = sum(_sizes(plain))
        twins = {segment.stem for segment in plain}
        report.finished = [one.stem for one in self._unfinished() if one.stem in twins]
        entries = list(self._index.archives)
        for segment, kind in self._due(plain):
            if segment.stem not in report.finished:
                self._note(report, segment.stem, kind)
        report.removed = [entry.stem for entry in self._expired(entries)]
        return report

    def carry_out(self) -> Archived:
        """Do it."""
        report = Archived()
        self._make_ready()
        report.plain_bytes = sum(_sizes(self._recording.segments()))
        self._finish(report)
        due = self._due(self._recording.segments())
        for number, (segment, kind) in enumerate(due, 1):
            entry = self._pack(segment, kind)
            self._replace(segment, entry, report)
            self._note(report, segment.stem, entry.format)
            self._progress(number, len(due))
        for entry in self._expired(self._index.archives):
            self._remove(entry, report)
        return report

    # -- what is to be done --------------------------------------------------------------

    def _due(self, plain: Sequence[Segment]) -> list[tuple[Segment, Format]]:
        """The segments that are to be archived, oldest first, and how."""
        sizes = _sizes(plain)
        total = sum(sizes)
        columns: Format = "parquet" if has_arrow() else packing.packed_format()
        due: list[tuple[Segment, Format]] = []
        past = self._policy.compress_past
        if self._policy.keep_for is not None:  # only archives are removed
            past = min(past, self._policy.keep_for)
        for segment, size in zip(plain, sizes, strict=True):
            if total > self._policy.parquet_past:
                due.append((segment, columns))
                total -= size
            elif self._age(segment.day) > past:
                due.append((segment, packing.packed_format()))
        return due

    def _expired(self, archives: Sequence[Entry]) -> list[Entry]:
        """The archives that retention removes: from the oldest on, no gap is made."""
        keep_for, keep_bytes = self._policy.keep_for, self._policy.keep_bytes
        total = sum(entry.size for entry in archives)
        expired = []
        for entry in archives:
            old = keep_for is not None and self._age(entry.day) > keep_for
            if not old and (keep_bytes is None or total <= keep_bytes):
                break
            expired.append(entry)
            total -= entry.size
        return expired

    def _age(self, day: str) -> timedelta:
        try:
            return self._today - date.fromisoformat(day)
        except ValueError:  # a person made up the name
            return timedelta(0)

    @staticmethod
    def _note(report: Archived, stem: str, kind: Format) -> None:
        (report.parquet if kind == "parquet" else report.compressed).append(stem)

    # -- doing it ------------------------------------------------------------------------

    def _make_ready(self) -> None:
        self._directory.documents.make_parent(self._directory.locate(KIND, INDEX))
        for name in self._recording.archive.iterdir():
            if name.name.startswith(fileio.TEMPORARY):  # of an archiver that died
                fileio.discard(fspath(name))
        try:
            self._index = read_index(self._directory)
        except StateCorruptedError as error:
            at = self._directory.locate(KIND, INDEX)
            self._directory.documents.quarantine(at, error.message, restored=False)
            self._index = Index()

    def _unfinished(self) -> list[Segment]:
        """Archives whose segment is still there, or that the index does not name."""
        plain = {segment.stem for segment in self._recording.segments()}
        return [
            segment
            for segment in self._recording.archives()
            if segment.stem in plain or self._index.find(segment.stem) is None
        ]

    def _finish(self, report: Archived) -> None:
        """Go on where an earlier run died."""
        plain = {segment.stem: segment for segment in self._recording.segments()}
        for made in self._unfinished():
            segment = plain.get(made.stem)
            if segment is None:
                # Its segment has gone, so it had been verified: only the index was lost.
                self._enter(packing.describe(made))
                report.finished.append(made.stem)
                continue
            try:
                entry = packing.describe(made)
            except StateCorruptedError:
                entry = None
            sha256 = packing.sha256_of(segment.path, "jsonl")
            indexed = self._index.find(made.stem)
            if indexed is not None and indexed.sha256 != sha256:
                why = "this segment is not the one that was archived under its name"
                raise StateCorruptedError(why, path=segment.path)
            if entry is None or entry.sha256 != sha256:
                fileio.remove_file(fspath(made.path), sync=True)
                continue
            # It may have been seen before it was durable.
            fileio.sync_directory(fspath(self._recording.archive))
            self._replace(segment, entry, report)
            report.finished.append(made.stem)

    def _pack(self, segment: Segment, kind: Format) -> Entry:
        """Write an archive and read it back. Raises with the archive gone."""
        entry = packing.pack(self._recording, segment, kind)
        try:
            packing.check(self._recording, entry)
        except BaseException:
            self._drop(entry)
            raise
        return entry

    def _replace(self, segment: Segment, entry: Entry, report: Archived) -> None:
        """The index first, then the segment goes: nobody rotates or begins to record meanwhile."""
        size = segment.path.stat().st_size
        with self._recording.locked():
            try:
                self._enter(entry)
            except BaseException:
                self._drop(entry)
                raise
            fileio.remove_file(fspath(segment.path), sync=True)
        report.freed_bytes += size - entry.size

    def _enter(self, entry: Entry) -> None:
        now = stamp(self._clock.now())
        self._index = write_index(self._directory, self._index.with_entry(entry), now)

    def _drop(self, entry: Entry) -> None:
        path = archive_path(self._recording, entry.stem, entry.format)
        fileio.discard(fspath(path))

    def _remove(self, entry: Entry, report: Archived) -> None:
        """Out of the index first: what it names must be there."""
        with self._recording.locked():
            now = stamp(self._clock.now())
            self._index = write_index(self._directory, self._index.without(entry.stem), now)
        path = archive_path(self._recording, entry.stem, entry.format)
        fileio.remove_file(fspath(path), sync=True)
        report.removed.append(entry.stem)
        report.freed_bytes += entry.size


@contextmanager
def _alone(recording: Recording) -> Iterator[None]:
    root = fspath(recording.state_dir)
    fileio.make_directories(root, ".locks", sync=False)
    lock = locks.try_acquire(f"{root}/{LOCK}")
    if lock is None:
        raise StateDirectoryInUseError("another archiver is at work here", path=root)
    try:
        yield
    finally:
        lock.release()


def _sizes(segments: Sequence[Segment]) -> list[int]:
    return [segment.path.stat().st_size for segment in segments]
