"""Checkpoints: the messages since the last checkpoint, as a range of numbers with a SHA-256.

A checkpoint copies nothing. It is a small document that never changes,
``record/checkpoints/<date>-<time>-<microseconds>_<label>.json``, with the numbers and the hash of
its lines. Lines that have moved to a segment or an archive since are found and verified there.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pydantic import ValidationError

from agent_state.clock import stamp
from agent_state.errors import InvalidKeyError, StateCorruptedError
from agent_state.migrations import migrate, schema_of
from agent_state.models import SCHEMAS, OpenModel
from agent_state.protocols import Document
from agent_state.serializers import canonical_json, parse_object
from agent_state_integrations.recorder.files import KIND, Recording, StateDirectory
from agent_state_integrations.recorder.reader import raw_lines

CHECKPOINTS = "checkpoints"
SCHEMA = schema_of("record_checkpoints")
MAX_LABEL = 100
logger = logging.getLogger("agent_state_integrations.recorder")
_NAME = "%Y%m%d-%H%M%S-%f"
_NAME_LENGTH = len("20261121-170921-123456")


class Checkpoint(OpenModel):
    """The lines ``first_seq`` to ``last_seq``, recorded between two moments."""

    checkpoint_id: str
    """Its name. Ids sort in the order in which checkpoints were made."""
    timestamp: str
    """When it was made, in UTC."""
    label: str
    """``auto``, ``final``, or the caller's word for it."""
    message_count: int
    """Numbered lines: messages, and lines that a person wrote in their place."""
    size_bytes: int
    """Bytes of the lines with their newlines."""
    first_seq: int
    """The number of the first line."""
    last_seq: int
    """The number of the last line."""
    sha256: str
    """Hash of the lines with their newlines, in order."""
    previous: str | None = None
    """The id of the checkpoint before; None for the first."""


SCHEMAS["record_checkpoints"] = Checkpoint


@dataclass(frozen=True, slots=True)
class LineDigest:
    """Count, size and hash of some lines."""

    message_count: int
    size_bytes: int
    sha256: str


def digest_of(lines: Iterable[bytes]) -> LineDigest:
    """Count and hash lines, which are given without their newlines."""
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
    """One checkpoint; None if it does not exist.

    Raises ``StateCorruptedError``, ``SchemaTooNewError``.
    """
    key = (CHECKPOINTS, checkpoint_id)
    stored = directory.documents.read(directory.locate(KIND, key))
    if stored is None:
        return None
    body = parse_object(stored.document.body)
    try:
        return Checkpoint.model_validate(migrate(stored.document.schema or SCHEMA, body))
    except ValidationError as error:
        raise StateCorruptedError(f"no checkpoint: {error}", kind=KIND, key=key) from error


def newest(directory: StateDirectory) -> Checkpoint | None:
    """The last readable checkpoint; the next one covers the lines of a damaged one again."""
    for name in reversed(ids(directory)):
        try:
            return read(directory, name)
        except StateCorruptedError as error:
            logger.warning("this checkpoint is damaged: %s", error)
    return None


def prepare(
    recording: Recording, label: str, now: datetime, *, last: Checkpoint | None, upto: int
) -> Checkpoint | None:
    """The checkpoint of the lines after ``last``, up to a number; None without such lines.

    Needs no lock, since written lines do not change. Raises ``InvalidKeyError`` for an empty or
    too long label, ``StorageError``.
    """
    if not label or len(label) > MAX_LABEL:
        raise InvalidKeyError(f"a label has 1 to {MAX_LABEL} characters", kind=KIND, key=label)
    first = last.last_seq + 1 if last is not None else 1
    if upto < first:
        return None
    found = digest_of(raw_lines(recording, first, upto))
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
    """Write it, under the recorder's lock; False if another one was made in the meantime."""
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
    """The time as an id has it; later than the last one's even if the clock went back."""
    if last is not None:
        text = last.checkpoint_id[:_NAME_LENGTH]
        before = datetime.strptime(text, _NAME).replace(tzinfo=UTC)
        now = max(now, before + timedelta(microseconds=1))
    return now.strftime(_NAME)
