"""What the exclusive store finds on the disk when memory does not say. Everything here blocks."""

from __future__ import annotations

from collections.abc import Iterable

from agent_state.errors import StateCorruptedError
from agent_state.protocols import Append
from agent_state.storage.directory import StateDirectory, Stored
from agent_state.storage.records import PutDone
from agent_state.storage.settling import Place

Found = PutDone | StateCorruptedError | None
"""What the file of a document was found to hold."""


def read(
    directory: StateDirectory, places: Iterable[Place]
) -> dict[Place, Stored | StateCorruptedError | None]:
    """The files of these places, each as it is; a damaged one is left where it is."""
    found: dict[Place, Stored | StateCorruptedError | None] = {}
    looked: set[str] = set()
    for place in places:
        try:
            found[place] = directory.read(*place, looked=looked)
        except StateCorruptedError as error:
            found[place] = error
    return found


def mend(
    directory: StateDirectory, place: Place, good: object, found: StateCorruptedError
) -> Found:
    """Look again; put a file that is still damaged aside, and write the last good version.

    ``good`` is that version, if it is known here; else a snapshot may have one.
    """
    try:
        stored = directory.read(*place)
    except StateCorruptedError as error:
        if isinstance(good, PutDone):
            directory.put_aside(*place, error.message, restored=True)
            directory.write(good.document, good.meta)
            directory.confirm(*place)  # no journal has this version any more
            return good
        stored = directory.contain(*place, error.message)
        if stored is None:
            return found
    return stored and PutDone(stored.document, stored.meta)


def ends(
    directory: StateDirectory, appends: Iterable[Append]
) -> tuple[dict[Place, int], dict[Place, dict[str, int]]]:
    """The last number of each log, and its dedupe ids where one of the records has such an id."""
    last, ids = {}, {}
    for change in appends:
        place = (change.kind, change.key)
        log = directory.log(*place)
        last[place] = log.tail().seq
        if change.dedupe_key is not None and place not in ids:
            ids[place] = dict(log.ids())
    return last, ids
