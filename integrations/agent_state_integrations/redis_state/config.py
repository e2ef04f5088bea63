"""The configuration, read from the environment."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar
from urllib.parse import quote, urlsplit

from agent_state.errors import StateValidationError
from agent_state.redis.client import connect
from agent_state_integrations.redis_state.keys import DEFAULT_PREFIX, Keys

T = TypeVar("T")

SESSION_TTL = 86_400
EXECUTION_TTL = 3_600
START_SECONDS = 30.0
_FORMER_NAMES = {"session_ttl": "ttl_seconds", "execution_ttl": "execution_ttl_seconds"}
LONGEST_TTL = 1e10

TransportName = Literal["direct", "coaia"]


@dataclass(frozen=True, slots=True)
class RedisConfig(Mapping[str, Any]):
    """The settings, which are also a mapping: ``config["host"]``, ``{**config}``.

    A URL wins over host, port, password and database.
    """

    enabled: bool = True
    ttl_seconds: float = SESSION_TTL
    """How long a session is kept; a whole number is an ``int``, ``math.inf`` is for ever."""
    execution_ttl_seconds: float = EXECUTION_TTL
    key_prefix: str = DEFAULT_PREFIX
    host: str = "localhost"
    port: int = 6379
    url: str = field(default="redis://localhost:6379/0", repr=False)
    transport: TransportName = "direct"
    coaia_command: tuple[str, ...] = ("coaiapy-mcp",)
    coaia_start_seconds: float = START_SECONDS
    """How long the coaia server may take to start."""
    gzip_over_bytes: int | None = None
    """Records that are larger as JSON are stored compressed; None: none is."""
    instance: str | None = None
    """The name of the coaia transport's index; None: a new name each time."""
    server_id: str | None = None
    """The only user of this prefix; None: any, unchecked."""

    def __post_init__(self) -> None:
        for name in ("ttl_seconds", "execution_ttl_seconds"):
            seconds = getattr(self, name)
            if isinstance(seconds, float) and seconds.is_integer():
                object.__setattr__(self, name, int(seconds))

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> RedisConfig:
        """Read the variables; those after a bar are taken when the first is not set.

        ``REDIS_STATE_ENABLED | REDIS_ENABLED``: true or false (also 1/0, yes/no, on/off).
        ``REDIS_SESSION_TTL_SECONDS | REDIS_TTL_SECONDS`` and ``REDIS_EXECUTION_TTL_SECONDS``:
        seconds, or ``never``. ``REDIS_KEY_PREFIX``. ``REDIS_URL | KV_URL``, or ``REDIS_HOST``,
        ``REDIS_PORT``, ``REDIS_PASSWORD`` and ``REDIS_DB``. ``REDIS_STATE_TRANSPORT``: direct or
        coaia. ``REDIS_STATE_COAIA_COMMAND``: as in a shell. ``REDIS_STATE_INSTANCE``.
        ``REDIS_STATE_SERVER_ID``. ``REDIS_STATE_COAIA_START_SECONDS``.
        ``REDIS_STATE_GZIP_OVER_BYTES``. An empty variable counts as not set. Raises
        ``StateValidationError``, which names the variable.
        """
        read = _Reader(environ)
        url = read(_url, "REDIS_URL", "KV_URL")
        if url is None:
            host = read(_host, "REDIS_HOST") or "localhost"
            port = read(_port, "REDIS_PORT") or 6379
            password = read(str, "REDIS_PASSWORD")
            login = f":{quote(password, safe='')}@" if password else ""
            url = f"redis://{login}{host}:{port}/{read(_database, 'REDIS_DB') or 0}"
        given = {
            **_place(url),
            "enabled": read(_switch, "REDIS_STATE_ENABLED", "REDIS_ENABLED"),
            "ttl_seconds": read(_seconds, "REDIS_SESSION_TTL_SECONDS", "REDIS_TTL_SECONDS"),
            "execution_ttl_seconds": read(_seconds, "REDIS_EXECUTION_TTL_SECONDS"),
            "key_prefix": read(_prefix, "REDIS_KEY_PREFIX"),
            "url": url,
            "transport": read(_transport, "REDIS_STATE_TRANSPORT"),
            "coaia_command": read(_command, "REDIS_STATE_COAIA_COMMAND"),
            "instance": read(str, "REDIS_STATE_INSTANCE"),
            "coaia_start_seconds": read(_seconds, "REDIS_STATE_COAIA_START_SECONDS"),
            "gzip_over_bytes": read(_size, "REDIS_STATE_GZIP_OVER_BYTES"),
            "server_id": read(str, "REDIS_STATE_SERVER_ID"),
        }
        return cls(**{name: value for name, value in given.items() if value is not None})

    def __getitem__(self, name: str) -> Any:
        """A setting, also by the name that it had in an older program. Raises ``KeyError``."""
        name = _FORMER_NAMES.get(name, name)
        if name not in self.__dataclass_fields__:
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return (each.name for each in fields(self))

    def __len__(self) -> int:
        return len(fields(self))


class _Reader:
    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def __call__(self, parse: Callable[[str], T], *names: str) -> T | None:
        """The first variable that is set. Its value may be secret, so no error repeats it."""
        for name in names:
            text = self._environ.get(name, "").strip()
            if text:
                try:
                    return parse(text)
                except ValueError as error:
                    raise StateValidationError(f"the variable {name}: {error}") from None
        return None


def checked_seconds(seconds: float) -> float:
    """A time to live: above 0, at most 10**10 seconds, or ``math.inf``.

    Raises ``StateValidationError``, and ``TypeError`` for a value that is not a number.
    """
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"a time to live is a number of seconds, not {type(seconds).__name__}")
    if not (0.001 <= seconds <= LONGEST_TTL or seconds == math.inf):
        raise StateValidationError(
            f"a time to live is 0.001 to {LONGEST_TTL:.0f} seconds, or math.inf, not {seconds}"
        )
    return float(seconds)


def _switch(text: str) -> bool:
    word = text.lower()
    if word in {"true", "1", "yes", "on"}:
        return True
    if word in {"false", "0", "no", "off"}:
        return False
    raise ValueError("true or false is asked for")


def _seconds(text: str) -> float:
    if text.lower() == "never":
        return math.inf
    try:
        return checked_seconds(float(text))
    except ValueError as error:
        raise ValueError(f"a number of seconds, or never, is asked for, not {text!r}") from error


def _size(text: str) -> int:
    if not text.isdecimal() or len(text) > 12:
        raise ValueError(f"a number of bytes is asked for, not {text!r}")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text[:9]) < 65536:
        raise ValueError(f"a port (1 to 65535) is asked for, not {text!r}")
    return int(text)


def _host(text: str) -> str:
    if any(each in text for each in "/@?# "):
        raise ValueError(f"the name or address of a host is asked for, not {text!r}")
    return f"[{text}]" if ":" in text and not text.startswith("[") else text


def _database(text: str) -> int:
    if not text.isdecimal() or int(text[:9]) > 2**31:
        raise ValueError(f"the number of a database is asked for, not {text!r}")
    return int(text)


def _url(text: str) -> str:
    try:
        _ = connect(text)  # sends nothing
    except ValueError:  # its message may hold a password
        raise ValueError("a URL redis://, rediss:// or unix:// is asked for") from None
    return text


def _place(url: str) -> dict[str, Any]:
    """Host and port, if the URL names one of each."""
    try:
        place = urlsplit(url)
        return {"host": place.hostname, "port": place.port}
    except ValueError:  # several hosts: a cluster, or sentinels
        return {}


def _prefix(text: str) -> str:
    return Keys(text).prefix


def _transport(text: str) -> TransportName:
    for name in ("direct", "coaia"):
        if text.lower() == name:
            return name
    raise ValueError(f"direct or coaia is asked for, not {text!r}")


def _command(text: str) -> tuple[str, ...]:
    return tuple(shlex.split(text))
