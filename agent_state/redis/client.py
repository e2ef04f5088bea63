"""The connection to Redis: URLs, the link that sends commands, and the kinds of failure.

Every command is bounded in time, and redis-py's retries are off: it retries ten times by default,
which keeps a caller waiting for over ten seconds and may write an old value over a newer one.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from hashlib import sha1
from importlib.resources import files
from typing import Any, Literal, cast
from urllib.parse import unquote

from redis.asyncio import BlockingConnectionPool, Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import (
    Sentinel,
    SentinelConnectionPool,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)
from redis.backoff import NoBackoff
from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ConnectionError,  # noqa: A004  # redis-py's own, which is not the built-in one
    MaxConnectionsError,
    MovedError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,  # noqa: A004
)

from agent_state.errors import DurabilityUnknownError, StorageError, StorageFullError
from agent_state.storage.executor import Batcher

Argument = str | bytes | int | float
Command = tuple[Any, ...]
"""The words of a command; the first of a script's is the ``Script``."""

FAILURES = (RedisError, OSError)
"""Errors that a command of redis-py raises; some of them are the operating system's."""

SCAN_COUNT = 1000
"""How many keys or fields one step of a SCAN looks at."""

_PAUSE_SECONDS = 0.05
_ELSEWHERE = (MovedError, AskError)
_SEVERAL_HOSTS = re.compile(
    r"(rediss?)\+(cluster|sentinel)://(?:([^/?#]*)@)?([^/?#@]*)(/[^?#]*)?(\?.*)?"
)
_SECRET = re.compile(r"(://[^/?#:@]*):[^/?#]*@|((?:^|[?&])[^=&]*password=)[^&#]*")


# -- URLs ----------------------------------------------------------------------------------------


def connect(url: str, *, timeout_seconds: float = 1.0, max_connections: int = 4) -> Redis:
    """A client for one server, a cluster, or the master that sentinels know; nothing is sent yet.

    ``redis://``, ``rediss://`` (TLS), ``unix://``; ``redis+cluster://host:port,host:port``;
    ``redis+sentinel://host:port,host:port/service``, its database after the service or as
    ``?db=``; ``rediss+…`` for TLS. User, password and certificates are in the URL, as redis-py
    reads it; sentinels with a password of their own take it from ``?sentinel_password=`` (and
    ``sentinel_username``).

    ``timeout_seconds``: the time limit for a connection, a command, or a free connection.
    Raises ``ValueError`` for an invalid URL. The cluster's client is not a ``Redis`` by class, but
    has the same commands where all keys are in one slot.
    """
    limits: dict[str, Any] = {
        "socket_timeout": timeout_seconds,
        "socket_connect_timeout": timeout_seconds,
        "health_check_interval": 30,
        "retry": Retry(NoBackoff(), 0),
    }
    if several := _SEVERAL_HOSTS.fullmatch(url):
        return _connect_to_several(several, limits, max_connections)
    pool = BlockingConnectionPool.from_url(
        url, timeout=timeout_seconds, max_connections=max_connections, **limits
    )
    return Redis.from_pool(pool)


def without_password(url: str) -> str:
    """The URL as an error or a log may show it."""
    return _SECRET.sub(lambda found: f"{found[1]}:***@" if found[1] else f"{found[2]}***", url)


def _connect_to_several(url: re.Match[str], limits: dict[str, Any], max_connections: int) -> Redis:
    scheme, form, login, hosts, path, query = url.groups(default="")
    places = [
        _host_and_port(host, 26379 if form == "sentinel" else 6379) for host in hosts.split(",")
    ]
    # The first host stands for all of them, so that redis-py reads the rest of the URL.
    first = f"[{places[0][0]}]" if ":" in places[0][0] else places[0][0]
    at = f"{login}@" if login else ""
    options: dict[str, Any] = {**limits, **parse_url(f"{scheme}://{at}{first}{query}")}
    for name in ("host", "port", "connection_class"):
        options.pop(name, None)
    tls = scheme == "rediss"
    if form == "cluster":
        nodes = [ClusterNode(host, port) for host, port in places]
        cluster = RedisCluster(
            startup_nodes=nodes, max_connections=max_connections, ssl=tls, **options
        )
        return cast("Redis", cluster)
    service, _, database = unquote(path).strip("/").partition("/")
    if not service:
        raise ValueError("a redis+sentinel URL ends in /service, the name that sentinels know")
    if database:
        options["db"] = int(database)
    own = {name: options.pop(f"sentinel_{name}", None) for name in ("username", "password")}
    asking = {**limits, **{name: value for name, value in own.items() if value}, "ssl": tls}
    sentinel = Sentinel(places, sentinel_kwargs=asking)  # type: ignore[no-untyped-call]  # redis-py's
    pool = _SentinelPool(  # type: ignore[no-untyped-call]  # redis-py's
        service,
        sentinel,
        max_connections=max_connections,
        connection_class=SentinelManagedSSLConnection if tls else SentinelManagedConnection,
        **options,
    )
    return Redis.from_pool(pool)


class _SentinelPool(SentinelConnectionPool):
    """Also closes the connections to the sentinels, which this pool alone uses."""

    async def aclose(self) -> None:
        await super().aclose()
        await self.sentinel_manager.aclose()


def _host_and_port(host: str, port: int) -> tuple[str, int]:
    found = re.fullmatch(r"(?:\[(?P<v6>[^\]]+)\]|(?P<name>[^:\[\]]+))(?::(?P<port>\d+))?", host)
    if found is None:
        raise ValueError(f"{host!r} is neither a host nor host:port")
    return found["v6"] or found["name"], int(found["port"] or port)


# -- failures ------------------------------------------------------------------------------------

FailureKind = Literal["away", "full", "read-only", "refused", "wrong-type", "failing"]
"""Why a command failed: the server cannot be reached or is loading, has no room, takes no writes,
denies access, holds a key of another type, or gave any other error.
"""

_KIND_BY_WORD: dict[str, FailureKind] = {
    "OOM": "full",
    "READONLY": "read-only",
    "LOADING": "away",
    "MASTERDOWN": "away",
    "CLUSTERDOWN": "away",
    "TRYAGAIN": "away",
    "NOAUTH": "refused",
    "WRONGPASS": "refused",
    "NOPERM": "refused",
    "WRONGTYPE": "wrong-type",
}
_KIND_BY_CLASS: tuple[tuple[type[RedisError] | tuple[type[RedisError], ...], FailureKind], ...] = (
    ((AuthenticationError, AuthorizationError, NoPermissionError), "refused"),
    (OutOfMemoryError, "full"),
    (ReadOnlyError, "read-only"),
    ((ConnectionError, TimeoutError), "away"),  # BusyLoadingError is a ConnectionError
)
_SCRIPT_LINE = re.compile(r"^@user_script: ?\d+: -?")
"""Before Redis 7, an error of a command in a script begins so."""

_NOT_EXECUTED = (ResponseError, AuthenticationError, BusyLoadingError, MaxConnectionsError)
_NOT_SENT = ("connecting to", "No connection available", "No master found", "max number of clients")


def redis_error_of(error: BaseException | None) -> RedisError | None:
    """redis-py's error behind an error of a ``RedisLink``; None for any other error."""
    while isinstance(error, StorageError):
        error = error.__cause__
    return error if isinstance(error, RedisError) else None


def failure_kind(error: BaseException) -> FailureKind:
    """The kind of failure behind an error of a ``RedisLink``; ``failing`` for any other error."""
    cause = redis_error_of(error)
    if cause is None:
        return "failing"
    # An error inside a script keeps the server's code as its first word; redis-py has cut it off
    # where it has a class for it.
    text = _SCRIPT_LINE.sub("", str(cause))
    if kind := _KIND_BY_WORD.get(text.partition(" ")[0]):
        return kind
    if "No space left" in text:
        return "full"
    return next((kind for classes, kind in _KIND_BY_CLASS if isinstance(cause, classes)), "failing")


def _was_not_executed(error: Exception) -> bool:
    """Whether the server certainly did nothing: it refused, or the command was not sent."""
    text = str(error)
    return isinstance(error, _NOT_EXECUTED) or any(words in text for words in _NOT_SENT)


# -- scripts -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script of ``lua/``, where its file describes keys, arguments and reply.

    Not redis-py's ``register_script``: its pipelines ask ``SCRIPT EXISTS`` before each execution,
    which is one more round trip, and its cluster pipelines refuse scripts.
    """

    text: str
    sha: str

    @classmethod
    def load(cls, name: str) -> Script:
        """The script in ``lua/<name>.lua``."""
        text = files("agent_state.redis").joinpath("lua", f"{name}.lua").read_text("utf-8")
        return cls(text, sha1(text.encode(), usedforsecurity=False).hexdigest())

    def call(self, keys: Sequence[str], arguments: Sequence[Argument]) -> Command:
        """The command that runs the script."""
        return (self, len(keys), *keys, *arguments)


def _words(command: Command, *, full_text: bool = False) -> Command:
    script = command[0]
    if not isinstance(script, Script):
        return command
    if full_text:
        return ("EVAL", script.text, *command[1:])
    return ("EVALSHA", script.sha, *command[1:])


# -- commands ------------------------------------------------------------------------------------


class RedisLink:
    """Pipelined commands to one Redis, with errors that show whether a command may have run.

    ``url`` is read by ``connect``. ``timeout_seconds``: the time limit of one command. ``anchor``:
    any key of the caller's; in a cluster, commands without a key go to its node. ``retries``: how
    often commands are sent again after a failed connection; a caller that retries makes sure that
    a command which runs twice has the effect of one.
    """

    def __init__(
        self,
        url: str,
        *,
        anchor: str,
        timeout_seconds: float = 1.0,
        max_connections: int = 4,
        retries: int = 1,
    ) -> None:
        self.url = without_password(url)
        self.timeout_seconds = timeout_seconds
        self._anchor = anchor
        self._retries = retries
        # redis-py's types for replies change with its version and do not know bytes.
        self.client: Any = connect(
            url, timeout_seconds=timeout_seconds, max_connections=max_connections
        )
        self.is_cluster = isinstance(self.client, RedisCluster)

    async def close(self) -> None:
        """Close every connection; the next command makes a new one."""
        await self.client.aclose()

    async def run(self, *command: Any, doing: str = "reading") -> Any:
        """The reply to one command. Raises ``StorageError``; ``doing`` begins its message."""
        [reply] = await self.exchange([command], doing)
        if isinstance(reply, RedisError):
            raise self.error(reply, doing) from reply
        return reply

    async def exchange(self, commands: Sequence[Command], doing: str = "") -> list[Any]:
        """Send commands on one connection; returns a reply, or redis-py's refusal, for each.

        Raises ``StorageError`` when none of them can have run, and ``DurabilityUnknownError``
        when they may have run, or may still run.
        """
        sent = False
        for attempts_left in range(self._retries, -1, -1):
            try:
                replies = await self._send(commands)
                broken = next((reply for reply in replies if _is_broken(reply)), None)
                if broken is None:
                    return replies
                raise broken
            except FAILURES as failure:
                error = _as_redis_error(failure)
                sent = sent or not _was_not_executed(error)
                if not attempts_left or isinstance(error, ResponseError):
                    raise self.error(error, doing, unknown=sent) from error
                if self.is_cluster:
                    await self.client.aclose()  # the next command reads the cluster's layout again
            await asyncio.sleep(_PAUSE_SECONDS)
        raise AssertionError("unreachable")

    async def _send(self, commands: Sequence[Command]) -> list[Any]:
        full_text, replies = False, list[Any]()
        for _ in range(3):
            replies = await self._pipeline(commands, full_text=full_text)
            if any(isinstance(reply, NoScriptError) for reply in replies):
                full_text = True  # a script that the server does not know did not run
            elif not await self._follow_slots(commands, replies):
                break
        return replies

    async def _follow_slots(self, commands: Sequence[Command], replies: list[Any]) -> bool:
        """Send commands of a slot that moved to its new node; returns whether to send all again.

        A ``WAIT`` is about the commands before it, to one node on one connection.
        """
        moved = False
        if not any(isinstance(reply, _ELSEWHERE) for reply in replies):
            return False
        for index, reply in enumerate(replies):
            if isinstance(reply, _ELSEWHERE):
                moved = moved or isinstance(reply, MovedError)
                words = _words(commands[index], full_text=True)
                try:
                    replies[index] = await self.client.execute_command(*words)
                except ResponseError as error:
                    replies[index] = error
            elif commands[index][0] == "WAIT":
                replies[index] = 0
        return moved and any(command[0] == "WAIT" for command in commands)

    async def _pipeline(self, commands: Sequence[Command], *, full_text: bool) -> list[Any]:
        if len(commands) == 1 and not self.is_cluster:
            try:
                return [
                    await self.client.execute_command(*_words(commands[0], full_text=full_text))
                ]
            except ResponseError as error:
                return [error]
        # redis-py would follow a redirection and forget the WAIT after it: see _follow_slots.
        options = {"allow_redirections": False} if self.is_cluster else {}
        pipeline = self.client.pipeline(transaction=False)
        for command in commands:
            target = await self.node() if command[0] == "WAIT" else {}
            pipeline.execute_command(*_words(command, full_text=full_text), **target)
        replies: list[Any] = await pipeline.execute(raise_on_error=False, **options)
        return replies

    async def node(self, near: str | None = None) -> dict[str, Any]:
        """redis-py's argument for a command without a key: the node of ``near`` or the anchor."""
        if not self.is_cluster:
            return {}
        await self.client.initialize()
        return {"target_nodes": self.client.get_node_from_key(near or self._anchor)}

    async def run_on_node(
        self, *command: Any, near: str | None = None, doing: str = "reading"
    ) -> Any:
        """The reply to a command without a key, see ``node``. Raises ``StorageError``."""
        try:
            return await self.client.execute_command(*command, **await self.node(near))
        except FAILURES as failure:
            error = _as_redis_error(failure)
            raise self.error(error, doing) from error

    async def scan(
        self, pattern: str, *, near: str | None = None, of_type: str = "", doing: str = "reading"
    ) -> AsyncIterator[list[bytes]]:
        """The keys that match a glob, in pages; in a cluster those of one node, see ``node``."""
        options = ("TYPE", of_type) if of_type else ()
        cursor: Any = 0
        while True:
            command = ("SCAN", cursor, "MATCH", pattern, "COUNT", SCAN_COUNT, *options)
            cursor, page = await self.run_on_node(*command, near=near, doing=doing)
            yield page
            if isinstance(cursor, dict):
                [cursor] = cursor.values()  # a cluster's client gives the cursor by node
            if not int(cursor):
                return

    def error(self, error: RedisError, doing: str, *, unknown: bool = False) -> StorageError:
        """The typed error to raise ``from error``; it names the server without its password."""
        why = str(error) or type(error).__name__
        why = f"{doing}: {why}" if doing else why
        if unknown:
            return DurabilityUnknownError(f"{why}; it may have been done, or not", path=self.url)
        full = failure_kind(error) == "full"
        return (StorageFullError if full else StorageError)(why, path=self.url)


def _as_redis_error(error: Exception) -> RedisError:
    """The failure as redis-py's error: it lets some of the operating system's pass through."""
    if isinstance(error, RedisError):
        return error
    lost = ConnectionError(str(error) or type(error).__name__)
    lost.__cause__ = error
    return lost


def _is_broken(reply: object) -> bool:
    return isinstance(reply, ConnectionError | TimeoutError | OSError)


class PipelineBatcher:
    """Commands of many tasks on one connection: those that are ready together share a pipeline.

    Only for commands that may be sent twice.
    """

    def __init__(self, link: RedisLink) -> None:
        self._link = link
        self._batcher = Batcher[Command, Any](link.exchange, max_items=128, cancellable=True)

    async def run(self, *command: Any, doing: str = "reading") -> Any:
        """The reply to a command. Raises ``StorageError``; ``doing`` begins its message."""
        try:
            return await self._batcher.submit(command)
        except StorageError as error:  # of the batch; each caller gets its own error
            raise type(error)(f"{doing}: {error.message}", path=error.path) from error
        except RedisError as error:
            raise self._link.error(error, doing) from error

    async def ended(self) -> None:
        """Wait until every submitted command has its reply."""
        await self._batcher.ended()
