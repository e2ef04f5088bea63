"""Which messages are recorded already: of the newest ones, what their ids and contents were."""

from __future__ import annotations

import hashlib

import orjson

from agent_state.protocols import JsonObject

_SEQ_BITS = 48
_DIGEST = 2**32 - 1


class Known:
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
