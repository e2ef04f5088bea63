"""One way to reach a Redis server: every command bounded in time, no retries of its own.

redis-py retries ten times by default, which keeps a caller waiting for over ten seconds and puts
an old value over a newer one. Whoever calls here decides whether to try again.
"""

from __future__ import annotations

import re
from typing import Any, cast
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
from redis.exceptions import RedisError

FAILURES = (RedisError, OSError, TimeoutError)
"""What a command may raise: redis-py lets some of the operating system's errors through."""

_SEVERAL = re.compile(r"(rediss?)\+(cluster|sentinel)://(?:([^/?#]*)@)?([^/?#@]*)(/[^?#]*)?(\?.*)?")
_SECRET = re.compile(r"(://[^/?#:@]*):[^/?#]*@|((?:^|[?&])[^=&]*password=)[^&#]*")


def connect(url: str, *, timeout_seconds: float = 1.0, max_connections: int = 4) -> Redis:
    """A client for one server, a cluster, or the master that sentinels know; nothing is sent yet.

    ``redis://``, ``rediss://`` (TLS), ``unix://``; ``redis+cluster://host:port,host:port``;
    ``redis+sentinel://host:port,host:port/service``, its database after the service or as
    ``?db=``; ``rediss+…`` for TLS. User, password and certificates are in the URL, as redis-py
    reads it; sentinels with a password of their own take it from ``?sentinel_password=`` (and
    ``sentinel_username``).

    ``timeout_seconds``: the time limit for a connection, a command, or a free connection.
    Raises ``ValueError`` for a URL that is none. The cluster's client is no ``Redis`` by class,
    and answers to the same commands where all keys are in one slot.
    """
    limits: dict[str, Any] = {
        "socket_timeout": timeout_seconds,
        "socket_connect_timeout": timeout_seconds,
        "health_check_interval": 30,
        "retry": Retry(NoBackoff(), 0),
    }
    if several := _SEVERAL.fullmatch(url):
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
    places = [_place(host, 26379 if form == "sentinel" else 6379) for host in hosts.split(",")]
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
    """Also closes the connections to the sentinels, which are nobody else's."""

    async def aclose(self) -> None:
        await super().aclose()
        await self.sentinel_manager.aclose()


def _place(host: str, port: int) -> tuple[str, int]:
    found = re.fullmatch(r"(?:\[(?P<v6>[^\]]+)\]|(?P<name>[^:\[\]]+))(?::(?P<port>\d+))?", host)
    if found is None:
        raise ValueError(f"{host!r} is no host, and no host:port")
    return found["v6"] or found["name"], int(found["port"] or port)
