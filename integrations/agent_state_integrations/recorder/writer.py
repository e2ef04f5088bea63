"""Recording as blocking calls: a batch of messages in, durable lines out.

Each message is understood, cleared of secrets, enriched and, if it is not there already, appended
to ``record/current.jsonl``; the batch shares one write and one fdatasync. Several processes may
record into one directory: each batch holds ``.locks/recorder.lock``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from os import PathLike
from typing import Any, Literal, Self

from agent_state.clock import Clock, IdFactory, SystemClock, new_id, stamp
from agent_state.errors import UnreadableMessageError
from agent_state.protocols import Incident, JsonObject, LogRecord
from agent_state.serializers import canonical_json
from agent_state.storage import paths
from agent_state_integrations.recorder import checkpoint as checkpoints
from agent_state_integrations.recorder.archive_index import directory_of
from agent_state_integrations.recorder.checkpoint import Checkpoint
from agent_state_integrations.recorder.enrichment import enrich
from agent_state_integrations.recorder.files import DEAD_LETTERS, KIND, Recording
from agent_state_integrations.recorder.live_log import LiveLog
from agent_state_integrations.recorder.normalize import normalize
from agent_state_integrations.recorder.redact import SecretRedactor
from agent_state_integrations.recorder.rules import Rules

ROTATE_BYTES = 64 * 1024 * 1024
MAX_BYTES = 64 * 1024 * 1024
DEDUPE_WINDOW = 100_000
_RESERVED = len('"_crc":"00000000","_seq":000000000000,') + 1
_LARGEST_LETTER = 1024 * 1024

RawMessage = bytes | str | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RecordResult:
    """What became of a message."""

    outcome: Literal["recorded", "duplicate", "dead-letter"]
    id: str | None = None
    seq: int = 0
    """Its number in the recording; a duplicate has that of the first; 0 for a dead letter."""
    reason: str | None = None
    """Why it is a dead letter."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that cannot be understood, as it came, and why."""

    raw: RawMessage
    reason: str


class RecordWriter:
    """Records into a state directory. Blocks; one thread at a time.

    ``rotate_bytes``: the live log becomes a segment before it would be larger, and at the first
    message of a new UTC day. ``max_bytes``: a larger message is a dead letter.
    ``dedupe_window``: a repeat is found among at least so many of the newest messages.
    ``dedupe_content``: the same words of the same speaker in the same context are a repeat too.
    ``durability`` is the manager's.
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
        self._directory = directory_of(
            self.recording, sync=durability == "fsync", clock=self._clock
        )
        self._live = LiveLog(
            self.recording, self._directory, window=dedupe_window, contents=dedupe_content
        )

    def open(self) -> None:
        """Make the folder ready and look at what is there. Twice is a no-op."""
        self._directory.prepare()
        self._live.look_back()
        with self.recording.locked():
            self._live.catch_up()

    def close(self) -> None:
        """Let go of the live log; what was written is durable. It can be opened again."""
        self._live.release()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(
        self, messages: Sequence[RawMessage | DeadLetter], source: str = ""
    ) -> list[RecordResult]:
        """Record them in order; what became of each. All of it is durable when this returns.

        ``source`` says in dead letters where they came from. Raises ``StorageError``: then none of
        the messages is recorded (a dead letter may be, and once more at the next try);
        ``LockTimeoutError`` when another process keeps the recording for 30 s.
        """
        received = self._clock.now()
        prepared = [self._prepare(message, received) for message in messages]
        with self.recording.locked():
            live = self._live
            live.catch_up()
            if live.size and received.strftime("%Y-%m-%d") > live.day:
                live.rotate()
            try:
                outcomes, lines, dead = self._number(prepared)
                self._bury(dead, received, source)
                if lines:
                    size = sum(len(line.body) + _RESERVED for line in lines)
                    if live.size and live.size + size > self._rotate_bytes:
                        live.rotate()
                    live.append(lines, received)
            except BaseException:
                live.known.drop()  # nobody may be told that a message is there which is not
                raise
            live.known.keep()
        return outcomes

    def rotate(self) -> str | None:
        """Make the live log a segment; its name without ending, None when there is no line."""
        with self.recording.locked():
            self._live.catch_up()
            return self._live.rotate() if self._live.size else None

    def checkpoint(self, label: str = "manual") -> Checkpoint | None:
        """Write down what has come since the last checkpoint; None when nothing has.

        Raises ``StorageError``, ``InvalidKeyError`` for a label that cannot be one.
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
        """What was found and contained, such as a torn line."""
        return list(self._directory.incidents)

    # -- one batch -----------------------------------------------------------------------

    def _prepare(
        self, message: RawMessage | DeadLetter, received: datetime
    ) -> JsonObject | DeadLetter:
        if isinstance(message, DeadLetter):
            return message
        try:
            record = normalize(message, received=received, new_id=self._new_id)
        except UnreadableMessageError as error:
            return DeadLetter(message, error.message)
        self._redactor.redact(record)
        enrich(record, self._rules)
        return record

    def _number(
        self, prepared: Sequence[JsonObject | DeadLetter]
    ) -> tuple[list[RecordResult], list[LogRecord], list[DeadLetter]]:
        """What becomes of each, the lines that are new, and the dead letters."""
        known = self._live.known
        outcomes, lines, dead = list[RecordResult](), list[LogRecord](), list[DeadLetter]()
        seq = self._live.last_seq
        for record in prepared:
            if isinstance(record, DeadLetter):
                dead.append(record)
                outcomes.append(RecordResult("dead-letter", reason=record.reason))
                continue
            repeated = known.settle(record)
            if repeated:
                outcomes.append(RecordResult("duplicate", record["Id"], repeated))
                continue
            body = canonical_json(record)
            if len(body) > self._max_bytes:
                why = f"{len(body)} bytes are over the limit of {self._max_bytes}"
                dead.append(DeadLetter(body, why))
                outcomes.append(RecordResult("dead-letter", record["Id"], reason=why))
                continue
            seq += 1
            lines.append(LogRecord(seq, body))
            known.add(record, seq)
            outcomes.append(RecordResult("recorded", record["Id"], seq))
        return outcomes, lines, dead

    def _bury(self, dead: Sequence[DeadLetter], received: datetime, source: str) -> None:
        """Write dead letters to their log; a long one is kept whole in the quarantine."""
        if not dead:
            return
        at = self._directory.locate(KIND, DEAD_LETTERS, paths.LOG)
        log = self._directory.logs.writer(at)
        self._directory.documents.make_parent(at)
        seq = log.tail().seq
        letters = []
        for number, letter in enumerate(dead, seq + 1):
            text = self._redactor.redact_raw(_as_it_came(letter.raw))
            content: JsonObject = {"at": stamp(received), "reason": letter.reason}
            if source:
                content["source"] = source
            if len(text) > _LARGEST_LETTER:
                content["kept"] = self._directory.quarantine.keep(
                    log.path, text.encode(), letter.reason, KIND, DEAD_LETTERS
                )
                text = text[:1000]
            content["raw"] = text
            letters.append(LogRecord(number, canonical_json(content)))
        log.append(letters, sync=self._directory.sync)


def _as_it_came(raw: RawMessage) -> str | bytes:
    return raw if isinstance(raw, bytes | str) else repr(raw)
