"""Where live sessions are in Redis, in a layout that other programs read.

::

    session:{user_id}:{session_id}:metadata          HASH
    session:{user_id}:{session_id}:emotion           HASH
    session:{user_id}:{session_id}:messages          LIST   the latest 100, as JSON
    session:{user_id}:{session_id}:milestones        ZSET   JSON by time
    session:{user_id}:{session_id}:breakthroughs     ZSET   JSON by time
    session:{user_id}:{session_id}:context_snapshot  HASH
    sessions:user:{user_id}:index                    SET    of session ids
    sessions:global:active                           SET    of {user_id}:{session_id}

In ids ``%`` and ``:`` are written ``%25`` and ``%3A``, so that no id reaches another one's key.
Every key expires with the session, the indices with their last one.
"""

from __future__ import annotations

from typing import Any

import orjson

from agent_state.clock import instant
from agent_state.errors import Key
from agent_state.models import OpenModel
from agent_state_integrations.journey.models import JourneyState

ACTIVE = "sessions:global:active"
PARTS = ("metadata", "emotion", "messages", "milestones", "breakthroughs", "context_snapshot")


def escaped(ident: str) -> str:
    """An id within a key."""
    return ident.replace("%", "%25").replace(":", "%3A")


def key_of(user_id: str, session_id: str, part: str) -> str:
    """``session:{user_id}:{session_id}:{part}``."""
    return f"session:{escaped(user_id)}:{escaped(session_id)}:{part}"


def index_of(user_id: str) -> str:
    """``sessions:user:{user_id}:index``."""
    return f"sessions:user:{escaped(user_id)}:index"


def enter(pipe: Any, key: Key, ttl: int) -> None:
    """Put a session into the indices, which live as long as their last one."""
    user_id, session_id = key
    pipe.sadd(index_of(user_id), session_id)
    pipe.sadd(ACTIVE, f"{escaped(user_id)}:{escaped(session_id)}")
    for index in (index_of(user_id), ACTIVE):
        pipe.expire(index, ttl, nx=True)  # GT alone leaves a new key without an expiry
        pipe.expire(index, ttl, gt=True)


def leave(pipe: Any, key: Key) -> None:
    """Take a session out of the indices."""
    user_id, session_id = key
    pipe.srem(index_of(user_id), session_id)
    pipe.srem(ACTIVE, f"{escaped(user_id)}:{escaped(session_id)}")


def metadata(state: JourneyState) -> dict[str, str]:
    """The fields of the hash ``metadata``."""
    own = fields(state)
    for name in ("emotion", "context_snapshot", "counters", "last_message", "last_breakthrough"):
        own.pop(name, None)
    own["message_count"] = str(state.counters.messages)
    own["milestone_count"] = str(state.counters.milestones)
    own["breakthrough_count"] = str(state.counters.breakthroughs)
    return own


def fields(model: OpenModel) -> dict[str, str]:
    """Every field as text, what is not set as an empty one, so that no older value stays."""
    names = [*type(model).model_fields, *(model.model_extra or {})]
    return {name: _text(getattr(model, name)) for name in names}


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, OpenModel):
        value = value.model_dump()
    return orjson.dumps(value).decode()


def score(time: object) -> float:
    """Seconds since 1970; 0 for what is no time."""
    try:
        return instant(str(time)).timestamp()
    except ValueError:
        return 0.0
