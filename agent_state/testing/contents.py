"""What a state has in it, as values that a test compares and a person reads."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from contextlib import aclosing
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import orjson

from agent_state.errors import Key
from agent_state.manager import StatePersistenceManager
from agent_state.models import SCHEMAS
from agent_state.testing.processes import Process, manager_of

StateContents: TypeAlias = dict[str, Any]
"""By ``kind/key``: the fields of a document, or the records of a log (its name ends in ``.jsonl``).

A key of several ids is joined by ``/``.
"""

KINDS = frozenset({*SCHEMAS, "conversations", "sessions"})
"""The kinds that are read in addition to those that have a folder."""
_OF_THE_RUN = re.compile(r"system/(mirror|runtime|runtimes/.*|owners/.*)$")
"""Documents about the process that runs and its mirror, and not about what it keeps."""
_CHECKSUM_LINE = '  "_checksum":'
_CHECKSUM_OF_RECORD = re.compile(r'^\{"_crc":"[0-9a-f]{8}",')


async def read_state(process: Process, *, kinds: Iterable[str] = ()) -> StateContents:
    """Everything that a runtime or a manager keeps, but the notes on the process that runs.

    ``kinds``: kinds of the application's that are not on a disk, in addition.
    """
    manager = manager_of(process)
    await manager.flush()
    found: StateContents = {}
    origin = await manager.store.origin()
    for kind in sorted({*KINDS, *origin.kinds, *kinds}):
        async with aclosing(manager.scan(kind)) as states:
            async for stored in states:
                found[_name(kind, stored.key)] = stored.state.model_dump(mode="json")
        for key in await manager.store.logs(kind):
            found[_name(kind, key) + ".jsonl"] = await _records(manager, kind, key)
    return {name: found[name] for name in sorted(found) if not _OF_THE_RUN.match(name)}


async def _records(manager: StatePersistenceManager, kind: str, key: Key) -> list[Any]:
    return [entry.record async for entry in manager.read_log(kind, key)]


def _name(kind: str, key: Key) -> str:
    return "/".join((kind, *key))


async def assert_restored_equal(
    before: StateContents | Process, after: StateContents | Process, *, ignore: Iterable[str] = ()
) -> None:
    """Assert that a restart has restored what was there, field for field.

    Each side is what ``read_state`` returned, or is read now. ``ignore``: names of fields that may
    differ, at any depth, such as ``last_active``. Raises ``AssertionError`` with a diff.
    """
    ignored = frozenset(ignore)
    sides = [
        side if isinstance(side, Mapping) else await read_state(side) for side in (before, after)
    ]
    expected, actual = (_without(side, ignored) for side in sides)
    if expected != actual:
        diff = _diff(_text(expected), _text(actual), "before the restart", "after it")
        raise AssertionError(f"the restart did not restore what was there:\n{diff}")


def _without(value: Any, names: frozenset[str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _without(item, names) for key, item in value.items() if key not in names}
    return [_without(item, names) for item in value] if isinstance(value, list) else value


def _text(contents: Any) -> str:
    options = orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS
    return orjson.dumps(contents, option=options).decode() + "\n"


def _diff(expected: str, actual: str, before: str, after: str) -> str:
    lines = (expected.splitlines(), actual.splitlines())
    return "\n".join(difflib.unified_diff(*lines, before, after, lineterm="", n=2))


class StateTree:
    """The files that a test left in a state directory, compared with a stored listing.

    The listing has every file below the directory with its text, without hidden folders, and
    without checksums. ``snapshot``: the file that the listing is stored in. ``update``: store it
    anew instead of comparing.
    """

    def __init__(
        self, state_dir: str | PathLike[str], snapshot: str | PathLike[str], *, update: bool = False
    ) -> None:
        self._state_dir = Path(state_dir)
        self._snapshot = Path(snapshot)
        self._update = update

    def text(self, mask: Mapping[str, str] | None = None) -> str:
        """The listing. ``mask``: texts by the regular expression that they replace.

        Mask what differs from run to run, such as random ids and times of the system's clock.
        """
        parts = []
        for path in sorted(self._state_dir.rglob("*")):
            name = path.relative_to(self._state_dir).as_posix()
            if path.is_file() and not any(part.startswith(".") for part in name.split("/")):
                parts.append(f"=== {name}\n{_readable(path.read_bytes())}")
        listing = "\n".join(parts)
        for pattern, text in (mask or {}).items():
            listing = re.sub(pattern, text, listing)
        return listing

    def check(self, mask: Mapping[str, str] | None = None) -> None:
        """Compare the listing with the stored one; store it when it is to be updated.

        ``mask`` is as in ``text``. Raises ``AssertionError`` with a diff, or when no listing is
        stored.
        """
        found = self.text(mask)
        if self._update:
            self._snapshot.parent.mkdir(parents=True, exist_ok=True)
            self._snapshot.write_text(found)
            return
        if not self._snapshot.is_file():
            raise AssertionError(
                f"{self._snapshot} does not exist; `pytest --snapshot-update` stores what is there:"
                f"\n{found}"
            )
        expected = self._snapshot.read_text()
        if expected != found:
            diff = _diff(expected, found, str(self._snapshot), str(self._state_dir))
            raise AssertionError(
                f"the state differs from the snapshot; if it is right, `pytest --snapshot-update` "
                f"stores it:\n{diff}"
            )


def _readable(data: bytes) -> str:
    """The text of a file without checksums, which say nothing to a reader; no text is named."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return f"({len(data)} bytes that are no text, SHA-256 {sha256(data).hexdigest()[:16]})\n"
    lines = [line for line in text.splitlines() if not line.startswith(_CHECKSUM_LINE)]
    return "\n".join(_CHECKSUM_OF_RECORD.sub("{", line) for line in lines) + "\n"
