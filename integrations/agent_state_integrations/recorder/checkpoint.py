"""Checkpoints: what has come since the last one, as a range of numbers with a SHA-256.

A checkpoint copies nothing. It is a small document that is never changed,
``record/checkpoints/<date>-<time>-<microseconds>_<label>.json``, which says which lines it means
and what they hash to. Lines that have moved to a segment or an archive since are found, and
verified, there.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import cast

from agent_state.clock import stamp
from agent_state.codec import Codec
from agent_state.errors import InvalidKeyError, StateCorruptedError
from agent_state.migrations import schema_of
from agent_state.models import SCHEMAS, OpenModel
from agent_state.protocols import Document
from agent_state.serializers import canonical_json
from agent_state.storage.directory import StateDirectory
from agent_state_integrations.recorder.files import CHECKPOINTS, KIND, Recording
from agent_state_integrations.recorder.reader import raw_lines

SCHEMA = schema_of("record_checkpoints")
MAX_LABEL = 100
logger = logging.getLogger("agent_state_integrations.recorder")
_NAME = "%Y%m%d-%H%M%S-%f"
_NAME_LENGTH = len("20261121-170921-123456")


class Checkpoint(OpenModel):
    """What was recorded between two moments: the lines ``first_seq`` to ``last_seq``."""

    checkpoint_id: str
    """Its name. Ids sort in the order in which checkpoints were made."""
    timestamp: str
    label: str
    message_count: int
    """Lines that say a number: messages, and what a person wrote in their place."""
    size_bytes: int
    """Of the lines, with their newlines."""
    first_seq: int
    last_seq: int
    sha256: str
    """Of the lines, with their newlines, in order."""
    previous: str | None = None
    """The checkpoint before; None for the first."""


SCHEMAS["record_checkpoints"] = Checkpoint


@dataclass(frozen=True, slots=True)
class LineDigest:
    """What lines amount to."""

    message_count: int
    size_bytes: int
    sha256: str


def contents_of(lines: Iterable[bytes]) -> LineDigest:
    """Counts and hashes lines, which come without their newlines."""
    digest, count, size = hashlib.sha256(), 0, 0
    for line in lines:
        digest.update(line)
        digest.update(b"\n")
        count += 1
        size += len(line) + 1
    return LineDigest(count, size, digest.hexdigest())


def ids(directory: StateDirectory) -> list[str]:
    """The ids of all checkpoints, oldest first."""
    return [key[1] for key in directory.tree.keys(KIND, (CHECKPOINTS,)) if len(key) == 2]


def read(directory: StateDirectory, checkpoint_id: str) -> Checkpoint | None:
    """One checkpoint; None when there is none.

    Raises ``StateCorruptedError``, ``StateValidationError``, ``SchemaTooNewError``.
    """
    stored = directory.documents.read(directory.locate(KIND, (CHECKPOINTS, checkpoint_id)))
    return None if stored is None else cast("Checkpoint", Codec().load(stored.document).state)


def newest(directory: StateDirectory) -> Checkpoint | None:
    """The last one made that can be read; what a damaged one covered is covered once more."""
    for name in reversed(ids(directory)):
        try:
            return read(directory, name)
        except StateCorruptedError as error:
            logger.warning("this checkpoint is damaged: %s", error)
    return None


def prepare(
    recording: Recording, label: str, now: datetime, *, last: Checkpoint | None, upto: int
) -> Checkpoint | None:
    """What came after the last checkpoint, up to a number; None when nothing has.

    Needs no lock: lines that are there do not change. Raises ``InvalidKeyError`` for a label that
    cannot be one, ``StorageError``.
    """
    if not label or len(label) > MAX_LABEL:
        raise InvalidKeyError(f"a label has 1 to {MAX_LABEL} characters", kind=KIND, key=label)
    first = last.last_seq + 1 if last is not None else 1
    if upto < first:
        return None
    found = contents_of(raw_lines(recording, first, upto))
    return Checkpoint(
        checkpoint_id=f"{_moment_after(now, last)}_{label}",
        timestamp=stamp(now),
        label=label,
        message_count=found.message_count,
        size_bytes=found.size_bytes,
        first_seq=first,
        last_seq=upto,
        sha256=found.sha256,
        previous=last.checkpoint_id if last is not None else None,
    )


def store(directory: StateDirectory, checkpoint: Checkpoint) -> bool:
    """Write it down, under the recorder's lock; False when another one was made meanwhile."""
    last = newest(directory)
    if (last.checkpoint_id if last is not None else None) != checkpoint.previous:
        return False
    key = (CHECKPOINTS, checkpoint.checkpoint_id)
    at = directory.locate(KIND, key)
    directory.documents.make_parent(at)
    body = canonical_json(checkpoint.model_dump())
    directory.documents.write(at, Document(KIND, key, body, 1, checkpoint.timestamp, SCHEMA), {})
    return True


def _moment_after(now: datetime, last: Checkpoint | None) -> str:
    """The time as it stands in an id; later than the last one's also if the clock went back."""
    if last is not None:
        text = last.checkpoint_id[:_NAME_LENGTH]
        before = datetime.strptime(text, _NAME).replace(tzinfo=UTC)
        now = max(now, before + timedelta(microseconds=1))
    return now.strftime(_NAME)
