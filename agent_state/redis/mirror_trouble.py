"""What Redis may say instead of doing it."""

from __future__ import annotations

import re

from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

_BY_CLASS: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
    ((AuthenticationError, AuthorizationError, NoPermissionError), "refused"),
    (OutOfMemoryError, "full"),
    (ReadOnlyError, "read-only"),
    (BusyLoadingError, "away"),
    ((RedisConnectionError, RedisTimeoutError, OSError, TimeoutError), "away"),
)
_BY_WORD = {
    "OOM": "full",
    "READONLY": "read-only",
    "LOADING": "away",
    "MASTERDOWN": "away",
    "CLUSTERDOWN": "away",
    "TRYAGAIN": "away",
    "NOAUTH": "refused",
    "WRONGPASS": "refused",
    "NOPERM": "refused",
}


_SCRIPT_LINE = re.compile(r"^@user_script: ?\d+: -?")


class ScriptError(ResponseError):
    """What a script met while it wrote one document."""


def state_of(error: Exception) -> str:
    """The state that a mirror is in when it meets this."""
    # A script's own error begins with the word; redis-py's classes have it taken off, and before
    # Redis 7 the place in the script and a hyphen are before it.
    word = _SCRIPT_LINE.sub("", str(error)).partition(" ")[0]
    if isinstance(error, RedisError) and word in _BY_WORD:
        return _BY_WORD[word]
    for classes, state in _BY_CLASS:
        if isinstance(error, classes):
            return state
    return "failing"


def is_not_ours(text: str) -> bool:
    """Whether a key holds what no mirror has put there; asking again does not help."""
    return _SCRIPT_LINE.sub("", text).startswith("WRONGTYPE")
