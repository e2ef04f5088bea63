"""Recording as blocking calls: a batch of messages in, durable lines out.

Each message is normalized, redacted, enriched and, unless it is a duplicate, appended to
``record/current.jsonl``; the batch shares one write and one fdatasync. Several processes may record
into one directory: each batch holds ``.locks/recorder.lock``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from os import PathLike
from typing import Any, Literal, Protocol, Self

from agent_state.clock import Clock, IdFactory, SystemClock, new_id, stamp
from agent_state.errors import UnreadableMessageError
from agent_state.protocols import Incident, JsonObject, LogRecord
from agent_state.serializers import canonical_json
from agent_state.storage import paths
from agent_state_integrations.recorder import checkpoint as checkpoints
from agent_state_integrations.recorder.checkpoint import Checkpoint
from agent_state_integrations.recorder.enrichment import enrich
from agent_state_integrations.recorder.files import DEAD_LETTERS, KIND, Recording
from agent_state_integrations.recorder.live_log import LiveLog
from agent_state_integrations.recorder.normalize import NormalRecord, normalize
from agent_state_integrations.recorder.redact import SecretRedactor
from agent_state_integrations.recorder.rules import Rules

ROTATE_BYTES = 64 * 1024 * 1024
MAX_BYTES = 64 * 1024 * 1024
DEDUPE_WINDOW = 100_000
_LINE_OVERHEAD = len('"_crc":"00000000","_seq":000000000000,') + 1
_MAX_INLINE_LETTER = 1024 * 1024

RawMessage = bytes | str | Mapping[str, Any]
"""A message as it was sent: a mapping, or JSON text or bytes."""


@dataclass(frozen=True, slots=True)
class RecordResult:
    """The outcome of recording one message."""

    outcome: Literal["recorded", "duplicate", "dead-letter"]
    id: str | None = None
    seq: int = 0
    """Its number in the recording; a duplicate has that of the first; 0 for a dead letter."""
    reason: str | None = None
    """Why it is a dead letter."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that cannot be read, as it was sent, and why."""

    raw: RawMessage
    reason: str


class MessageWriter(Protocol):
    """Records batches of messages; ``RecordWriter`` is one."""

    def write(
        self, messages: Sequence[RawMessage | DeadLetter], source: str = ""
    ) -> list[RecordResult]: ...


class CheckpointWriter(MessageWriter, Protocol):
    """A ``MessageWriter`` that makes checkpoints too."""

    def checkpoint(self, label: str = ...) -> object: ...


class RecordWriter:
    """Records into a state directory. Blocks; for one thread at a time.

    ``rotate_bytes``: the live log becomes a segment before it would exceed this size, and at the
    first message of a new UTC day. ``max_bytes``: a larger message is a dead letter.
    ``dedupe_window``: duplicates are found among at least this many of the newest messages.
    ``dedupe_content``: a message with the text, speaker and context of another is a duplicate too.
    ``durability``: ``os`` does not fsync, so a power failure may lose messages.
    """

    def __init__(
        self,
        state_dir: str | PathLike[str] = "state",
        *,
        durability: Literal["fsync", "os"] = "fsync",
        rules: Rules | None = None,
        redactor: SecretRedactor | None = None,
        rotate_bytes: int = ROTATE_BYTES,
        max_bytes: int = MAX_BYTES,
        dedupe_content: bool = False,
        dedupe_window: int = DEDUPE_WINDOW,
        clock: Clock | None = None,
        new_id: IdFactory = new_id,
    ) -> None:
        self.recording = Recording(state_dir)
        self._clock = clock or SystemClock()
        self._new_id = new_id
        self._rules = rules or Rules.load("standard")
        self._redactor = redactor or SecretRedactor.default()
        self._rotate_bytes = rotate_bytes
        self._max_bytes = max_bytes
        self._directory = self.recording.directory(sync=durability == "fsync", clock=self._clock)
        self._live = LiveLog(
            self.recording, self._directory, window=dedupe_window, contents=dedupe_content
        )

    def open(self) -> None:
        """Make the folders and read the newest messages. A no-op when it is open."""
        self._directory.prepare()
        self._live.read_recent()
        with self.recording.locked():
            self._live.catch_up()

    def close(self) -> None:
        """Release the live log. It can be opened again."""
        self._live.release()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(
        self, messages: Sequence[RawMessage | DeadLetter], source: str = ""
    ) -> list[RecordResult]:
        """Record messages in order; returns a result for each. All are durable on return.

        Dead letters name ``source`` as their origin. Raises ``StorageError``: then no message is
        recorded (dead letters may be, and again at the next try); ``LockTimeoutError`` when another
        process holds the recording for 30 s.
        """
        received = self._clock.now()
        prepared = [self._prepare(message, received) for message in messages]
        with self.recording.locked():
            live = self._live
            live.catch_up()
            if live.size and received.date().isoformat() > live.day:
                live.rotate()
            try:
                results, lines, dead = self._resolve(prepared)
                self._write_dead_letters(dead, received, source)
                if lines:
                    size = sum(len(line.body) + _LINE_OVERHEAD for line in lines)
                    if live.size and live.size + size > self._rotate_bytes:
                        live.rotate()
                    live.append(lines, received)
            except BaseException:
                live.known.discard()  # no later message may count as a duplicate of these
                raise
            live.known.commit()
        return results

    def rotate(self) -> str | None:
        """Make the live log a segment; its name without ending, None if the log is empty."""
        with self.recording.locked():
            self._live.catch_up()
            return self._live.rotate() if self._live.size else None

    def checkpoint(self, label: str = "manual") -> Checkpoint | None:
        """Make a checkpoint of the messages since the last one; None if there are none.

        Raises ``StorageError``, ``InvalidKeyError`` for an empty or too long label.
        """
        while True:
            with self.recording.locked():
                self._live.catch_up()
                upto, last = self._live.last_seq, checkpoints.newest(self._directory)
            now = self._clock.now()
            made = checkpoints.prepare(self.recording, label, now, last=last, upto=upto)
            if made is None:
                return None
            with self.recording.locked():
                if checkpoints.store(self._directory, made):
                    return made

    def incidents(self) -> list[Incident]:
        """Damage that was found and contained, such as a torn line."""
        return list(self._directory.incidents)

    # -- one batch -----------------------------------------------------------------------

    def _prepare(
        self, message: RawMessage | DeadLetter, received: datetime
    ) -> JsonObject | DeadLetter:
        if isinstance(message, DeadLetter):
            return message
        if type(message) is NormalRecord:
            record: JsonObject = dict(message)
        else:
            try:
                record = normalize(message, received=received, new_id=self._new_id)
            except UnreadableMessageError as error:
                return DeadLetter(message, error.message)
        self._redactor.redact(record)
        enrich(record, self._rules)
        return record

    def _resolve(
        self, prepared: Sequence[JsonObject | DeadLetter]
    ) -> tuple[list[RecordResult], list[LogRecord], list[DeadLetter]]:
        """The result of each, the new lines with their numbers, and the dead letters."""
        known = self._live.known
        results, lines, dead = list[RecordResult](), list[LogRecord](), list[DeadLetter]()
        seq = self._live.last_seq
        for record in prepared:
            if isinstance(record, DeadLetter):
                dead.append(record)
                results.append(RecordResult("dead-letter", reason=record.reason))
                continue
            duplicate_of = known.find_duplicate(record)
            if duplicate_of:
                results.append(RecordResult("duplicate", record["Id"], duplicate_of))
                continue
            body = canonical_json(record)
            if len(body) > self._max_bytes:
                why = f"{len(body)} bytes are over the limit of {self._max_bytes}"
                dead.append(DeadLetter(body, why))
                results.append(RecordResult("dead-letter", record["Id"], reason=why))
                continue
            seq += 1
            lines.append(LogRecord(seq, body))
            known.stage(record, seq)
            results.append(RecordResult("recorded", record["Id"], seq))
        return results, lines, dead

    def _write_dead_letters(
        self, dead: Sequence[DeadLetter], received: datetime, source: str
    ) -> None:
        """Append dead letters to their log; the bytes of a long one go to the quarantine."""
        if not dead:
            return
        at = self._directory.locate(KIND, DEAD_LETTERS, paths.LOG)
        log = self._directory.logs.writer(at)
        self._directory.documents.make_parent(at)
        letters = []
        for number, letter in enumerate(dead, log.tail().seq + 1):
            raw = letter.raw if isinstance(letter.raw, bytes | str) else repr(letter.raw)
            text = self._redactor.redact_raw(raw)
            content: JsonObject = {"at": stamp(received), "reason": letter.reason}
            if source:
                content["source"] = source
            if len(text) > _MAX_INLINE_LETTER:
                content["kept"] = self._directory.quarantine.keep(
                    log.path, text.encode(), letter.reason, KIND, DEAD_LETTERS
                )
                text = text[:1000]
            content["raw"] = text
            letters.append(LogRecord(number, canonical_json(content)))
        log.append(letters, sync=self._directory.sync)
