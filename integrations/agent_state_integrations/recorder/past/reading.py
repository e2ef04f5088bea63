"""Reading a recording: one way through live log, segments, archives, exports and older logs."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice
from os import PathLike, fspath
from pathlib import Path

import orjson

from agent_state.errors import StateCorruptedError, StateNotFoundError
from agent_state.protocols import JsonObject
from agent_state.storage import logs
from agent_state_integrations.recorder.enriching.enrichment import enrich
from agent_state_integrations.recorder.enriching.rules import Rules
from agent_state_integrations.recorder.messages import RecordedMessage
from agent_state_integrations.recorder.past import formats
from agent_state_integrations.recorder.past.parsing import Numbered, Parser, Skipped
from agent_state_integrations.recorder.past.query import Query
from agent_state_integrations.recorder.past.sources import Source, is_begun, recording_at, sources
from agent_state_integrations.recorder.segments import Recording

_BATCH = 1000
_SEQ = re.compile(rb'\{"_crc":"[0-9a-f]{8}","_seq":(\d{1,18})[,}]')


def read(
    path: str | PathLike[str],
    query: Query | None = None,
    *,
    rules: Rules | None = None,
    skipped: Skipped | None = None,
) -> Iterator[RecordedMessage]:
    """The messages that a query means, in the order of the log. Blocks; memory is bounded.

    ``path`` is a state directory, the folder of a recording, one file of a recording, an export,
    a log in an older form, or a folder with such logs directly in it. What lacks enrichment gets
    it from ``rules``. A line that holds no message is left out and counted in ``skipped``.

    Raises ``StateNotFoundError`` when there is nothing, ``StateCorruptedError`` naming an archive
    that is damaged or missing, ``StorageError``, and ``MissingExtraError`` where one is needed.
    """
    for seq, record in read_records(path, query, rules=rules, skipped=skipped):
        yield RecordedMessage.from_record(record, seq)


def read_records(
    path: str | PathLike[str],
    query: Query | None = None,
    *,
    rules: Rules | None = None,
    skipped: Skipped | None = None,
) -> Iterator[Numbered]:
    """``read`` as plain objects, each with its number in the recording (0: it has none)."""
    found = _matching(path, query, rules, skipped if skipped is not None else Skipped())
    return found if query is None or query.limit is None else islice(found, query.limit)


def _matching(
    path: str | PathLike[str], query: Query | None, rules: Rules | None, skipped: Skipped
) -> Iterator[Numbered]:
    test = query.test() if query is not None else None
    backwards = query is not None and query.newest_first
    # What rules add is in no column, and in no index but by its time.
    asked = query if rules is None else None
    with sources(path) as found:
        for source in reversed(found) if backwards else found:
            if not source.may_hold(query):
                continue
            parser = Parser(source.path, source.received, skipped)
            for batch in source.batches(asked, backwards=backwards):
                for numbered in parser.records(batch):
                    if rules is not None:
                        enrich(numbered[1], rules)
                    if test is None or test(numbered[1]):
                        yield numbered


def count(
    path: str | PathLike[str], query: Query | None = None, *, skipped: Skipped | None = None
) -> int:
    """How many messages a query means; in Parquet files without reading any. Raises as ``read``."""
    query = query or Query()
    skipped = skipped if skipped is not None else Skipped()
    test, total = query.test(), 0
    with sources(path) as found:
        for source in found:
            if source.may_hold(query):
                total += _count_in(source, query, test, skipped)
    return total if query.limit is None else min(total, query.limit)


def _count_in(
    source: Source, query: Query, test: Callable[[JsonObject], bool] | None, skipped: Skipped
) -> int:
    opened = source.opened()
    if opened is None:
        return 0
    file, path, kind = opened
    if kind == "parquet":
        from agent_state_integrations.recorder.past import parquet  # needs an extra

        return parquet.count(file, path, query)
    parser, total = Parser(path, source.received, skipped), 0
    for batch in formats.batches(file, path, kind):
        records = parser.records(batch)
        total += len(records) if test is None else sum(test(record) for _, record in records)
    return total


# -- lines as they stand in the log --------------------------------------------------------------


def raw_lines(
    recording: Recording | str | PathLike[str], first_seq: int, last_seq: int
) -> Iterator[bytes]:
    """The lines with these numbers as they were written, without newlines, wherever they are.

    What a line says of its own number counts: lines that say none are left out. Raises as ``read``.
    """
    if not isinstance(recording, Recording):
        found = recording_at(Path(recording).resolve())
        if found is None:
            raise StateNotFoundError("there is no recording here", path=recording)
        recording = found
    if not is_begun(recording):
        return
    with sources(recording.folder) as files:
        for source in between(files, first_seq, last_seq):
            yield from lines_between(source, first_seq, last_seq)


def between(files: Sequence[Source], first_seq: int, last_seq: int) -> Iterator[Source]:
    """Those of a recording's files, which are in order, that may hold these numbers."""
    for number, source in enumerate(files):
        following = files[number + 1].segment if number + 1 < len(files) else None
        begins = source.segment.first_seq if source.segment is not None else 0
        ended = following is not None and following.first_seq <= first_seq
        ended = ended or (source.entry is not None and source.entry.last_seq < first_seq)
        if begins <= last_seq and not ended:
            yield source


def records_between(
    recording: Recording | str | PathLike[str],
    first_seq: int,
    last_seq: int,
    *,
    skipped: Skipped | None = None,
) -> Iterator[Numbered]:
    """The messages with these numbers. Raises as ``read``."""
    where = recording.folder if isinstance(recording, Recording) else recording
    unknown = datetime.fromtimestamp(0, UTC)
    parser = Parser(where, unknown, skipped if skipped is not None else Skipped())
    found = raw_lines(recording, first_seq, last_seq)
    while batch := list(islice(found, _BATCH)):
        yield from parser.records(batch)


def lines_between(source: Source, first: int, last: int) -> Iterator[bytes]:
    """``raw_lines`` of one file."""
    opened = source.opened()
    if opened is None:
        return
    file, path, kind = opened
    if kind == "parquet":
        from agent_state_integrations.recorder.past import parquet  # needs an extra

        batches = parquet.lines_between(file, path, first, last)
    elif kind == "jsonl":
        with file:
            start, end = _place(file.fileno(), fspath(path), first)
            batches = ([line] for line in logs.forwards(file.fileno(), start, end))
            yield from _numbered(batches, first, last)
        return
    else:
        batches = formats.batches(file, path, kind)
    yield from _numbered(batches, first, last)


def _place(fd: int, path: str, first: int) -> tuple[int, int]:
    """Where to begin in an open log, and where its last whole line ends."""
    start, _, _ = logs.seek(path, after=first - 1)
    status = os.fstat(fd)
    try:
        same = os.path.samestat(Path(path).stat(), status)
    except FileNotFoundError:
        same = False
    return (start if same else 0), logs.last_newline(fd, status.st_size)


def _numbered(batches: Iterator[list[bytes]], first: int, last: int) -> Iterator[bytes]:
    for batch in batches:
        for line in batch:
            seq = number_of(line)
            if first <= seq <= last:
                yield line
            elif seq > last and _is_whole(line):
                return


def _is_whole(line: bytes) -> bool:
    """Whether what the line says of its number can be relied on."""
    try:
        logs.decode_line(line, 0)
    except StateCorruptedError:
        return False
    return True


def number_of(line: bytes) -> int:
    """The number that a line says it has; 0 for none. Of our own lines the beginning is enough."""
    found = _SEQ.match(line)
    if found is not None and line.endswith(b"}"):
        return int(found[1])
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return 0
    seq = record.get("_seq") if type(record) is dict else None
    return seq if logs.is_seq(seq) else 0
