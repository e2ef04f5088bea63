"""Copies of messages in several logs, or in one: each counts once, with the metadata of all copies.

Two messages are copies when they have the same id and the same content. The one with the most
metadata stays, and gets what only others have, so that the order of the files does not matter.
Messages that stand in a thread (``{thread_id, messages}``) are compared like those on lines of
their own.

The ids are found by their bytes first, at about 100 bytes of memory a message; only lines with an
id that occurs again are parsed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import orjson

from agent_state.errors import StateCorruptedError, UnreadableMessageError
from agent_state.protocols import JsonObject
from agent_state.serializers import parse_line
from agent_state_integrations.recorder.message import UNKNOWN
from agent_state_integrations.recorder.normalize import NAMES, normalize_parsed

_Batches = Callable[[], Iterator[list[bytes]]]
_IDS = re.compile(
    rb'"(?:' + b"|".join(name.encode() for name in NAMES["id"]) + rb')"\s*:\s*"((?:[^"\\]|\\.)+)"'
)
_NO_TIME = datetime(1, 1, 1, tzinfo=UTC)
_THREAD = b'"thread_id"'
_EMPTY: tuple[object, ...] = (None, "", [], {}, UNKNOWN, "none")


class _Place(NamedTuple):
    """Where a message is: the file, the line from 1, and in a thread which of its messages."""

    file: int
    line: int
    nth: int


class _Copy(NamedTuple):
    place: _Place
    record: JsonObject

    def richness(self) -> int:
        return sum(value not in _EMPTY for value in self.record["Metadata"].values())


class CopyIndex:
    """Which messages of some files are left out, as others are copies of them."""

    def __init__(self) -> None:
        self._changes: dict[Path, dict[int, dict[int, JsonObject | None]]] = {}

    @classmethod
    def of(cls, files: Iterable[tuple[Path, _Batches]]) -> CopyIndex:
        """The copies among these files. Raises what reading them raises."""
        index, files = cls(), list(files)
        again = _ids_that_come_again(files)
        if again:
            groups: dict[tuple[str, bytes], list[_Copy]] = {}
            for number, (_, batches) in enumerate(files):
                for found in _candidates(number, batches(), again):
                    key = found.record["Id"], _content(found.record)
                    groups.setdefault(key, []).append(found)
            for group in groups.values():
                index._note(group, [path for path, _ in files])
        return index

    def __bool__(self) -> bool:
        return bool(self._changes)

    def __contains__(self, path: Path) -> bool:
        return path in self._changes

    def count(self, path: Path) -> int:
        """How many messages of a file are left out."""
        lines = self._changes.get(path, {}).values()
        return sum(change is None for line in lines for change in line.values())

    def without_copies(self, path: Path, batches: Iterator[list[bytes]]) -> Iterator[list[bytes]]:
        """The lines of a file with what stays of them; ``LEFT_OUT`` for one that goes."""
        changes = self._changes.get(path)
        if changes is None:
            yield from batches
            return
        number = 0
        for batch in batches:
            lines = []
            for line in batch:
                number += 1
                change = changes.get(number)
                lines.append(line if change is None else _changed(line, change))
            yield lines

    def _note(self, group: list[_Copy], paths: list[Path]) -> None:
        if len(group) == 1:
            return
        best = max(group, key=lambda copy: (copy.richness(), -copy.place.file, -copy.place.line))
        merged = _merged(best, group)
        for copy in group:
            file, line, nth = copy.place
            change = merged if copy is best else None
            if change is not None or copy is not best:
                lines = self._changes.setdefault(paths[file], {})
                lines.setdefault(line, {})[nth] = change


LEFT_OUT = b'{"_copy":true}'
"""What stands in the place of a line that is a copy."""


def _changed(line: bytes, change: Mapping[int, JsonObject | None]) -> bytes:
    if -1 in change:
        whole = change[-1]
        return LEFT_OUT if whole is None else orjson.dumps(whole)
    thread = parse_line(line)
    thread["messages"] = [
        change.get(nth, message) or message
        for nth, message in enumerate(thread["messages"])
        if change.get(nth, message) is not None
    ]
    return orjson.dumps(thread) if thread["messages"] else LEFT_OUT


def _ids_that_come_again(files: Iterable[tuple[Path, _Batches]]) -> set[bytes]:
    seen, again = set[int](), set[bytes]()
    for _, batches in files:
        for batch in batches():
            for line in batch:
                for name in _ids_on(line):
                    place = hash(name)
                    if place in seen:
                        again.add(name)
                    seen.add(place)
    return again


def _ids_on(line: bytes) -> list[bytes]:
    if _THREAD in line[:4000]:
        return _IDS.findall(line)
    found = _IDS.search(line)
    return [] if found is None else [found[1]]


def _candidates(number: int, batches: Iterator[list[bytes]], again: set[bytes]) -> Iterator[_Copy]:
    at = 0
    for batch in batches:
        for line in batch:
            at += 1
            if not again.isdisjoint(_ids_on(line)):
                for nth, message in _messages_on(line):
                    try:
                        record = normalize_parsed(message, received=_NO_TIME, new_id=str)
                    except UnreadableMessageError:
                        continue
                    if record["Id"]:
                        yield _Copy(_Place(number, at, nth), record)


def _messages_on(line: bytes) -> Iterator[tuple[int, JsonObject]]:
    try:
        value = parse_line(line)
    except StateCorruptedError:
        return
    if "thread_id" in value and type(value.get("messages")) is list:
        for nth, message in enumerate(value["messages"]):
            if type(message) is dict:
                yield nth, message
        return
    yield -1, value


def _content(record: JsonObject) -> bytes:
    return orjson.dumps([record["Message"], record.get("Content")], option=orjson.OPT_SORT_KEYS)


def _merged(best: _Copy, group: list[_Copy]) -> JsonObject | None:
    """The best copy with what only others have; None when it has everything."""
    record = {**best.record, "Metadata": dict(best.record["Metadata"])}
    changed = False
    for other in sorted(group, key=lambda copy: (-copy.richness(), _content(copy.record))):
        for name, value in other.record["Metadata"].items():
            if value not in _EMPTY and record["Metadata"].get(name) in _EMPTY:
                record["Metadata"][name] = value
                changed = True
        for name in ("SpeakerName", "ContextId"):
            if record[name] == UNKNOWN and other.record[name] != UNKNOWN:
                record[name] = other.record[name]
                changed = True
    return record if changed else None
