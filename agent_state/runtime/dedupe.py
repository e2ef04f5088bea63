"""Dedupe keys of tasks and mail: whose they are, what they stand for, and how long they hold."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import datetime
from hashlib import sha256
from typing import Any

from agent_state.clock import is_number, later, stamp
from agent_state.errors import DedupeKeyReusedError, Key, SerializationError, StateValidationError
from agent_state.models import MailMessage, Task
from agent_state.protocols import StateSerializer
from agent_state.serializers import canonical_json

DEDUPE_SECONDS = 86_400.0
"""How long a key holds at least, unless the caller says otherwise."""


def dedupe_id(*scope: str) -> str:
    """Return the id of the document of a key, which is the last part of its scope.

    One scope has one id; two scopes have two.
    """
    return f"once-{sha256(json.dumps(scope).encode()).hexdigest()[:20]}"


def check_key(dedupe_key: object, seconds: object) -> None:
    """Raise ``StateValidationError`` for what is no key, or no time that it could hold."""
    if not isinstance(dedupe_key, str) or not dedupe_key:
        raise StateValidationError("a dedupe key is text, and not empty")
    if not (is_number(seconds) and 0 <= seconds < math.inf):
        raise StateValidationError(f"{seconds} is not a duration in seconds")


def promise(
    document: Task | MailMessage,
    dedupe_key: str,
    seconds: float,
    content: Mapping[str, Any],
    *,
    now: datetime,
    serializer: StateSerializer,
) -> None:
    """Write into a new document its key, what the key stands for, and until when it holds.

    ``content``: what the caller gave. Raises ``SerializationError``.
    """
    document.dedupe_key = dedupe_key
    try:
        # As the store would give it back: a tuple and a list are the same.
        stored = serializer.loads(serializer.dumps(content))
    except SerializationError as error:
        error.kind, error.key = _place(document)
        raise
    document.dedupe_digest = sha256(canonical_json(stored)).hexdigest()[:32]
    if seconds:
        document.dedupe_until = stamp(later(now, seconds))


def check_same(stored: Task | MailMessage, new: Task | MailMessage) -> None:
    """Raise ``DedupeKeyReusedError`` if the stored document's key stands for other content.

    Two attempts of one task may differ in what they send: the first of them sent it.
    """
    if stored.dedupe_digest in (None, new.dedupe_digest):
        return
    if new.sent_by is not None and new.sent_by == stored.sent_by:
        return
    kind, key = _place(new)
    message = f"the key {new.dedupe_key!r:.80} was used before, for other content"
    raise DedupeKeyReusedError(message, kind=kind, key=key)


def _place(document: Task | MailMessage) -> tuple[str, Key]:
    if isinstance(document, Task):
        return "tasks", (document.agent_id, document.task_id)
    return "mail", (document.to_agent, document.message_id)
