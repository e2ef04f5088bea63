"""One way to reach a Redis server: every command bounded in time, no retries of its own.

redis-py retries ten times by default, which keeps a caller waiting for over ten seconds and puts
an old value over a newer one. Whoever calls here decides whether to try again.
"""

from __future__ import annotations

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

FAILURES = (RedisError, OSError, TimeoutError)
"""What a command may raise: redis-py lets some of the operating system's errors through."""


def connect(url: str, *, timeout: float = 1.0, max_connections: int = 4) -> Redis:
    """A client for ``redis://``, ``rediss://`` (TLS) or ``unix://``; nothing is sent yet.

    ``timeout``: seconds that a connection, a command, or waiting for a free connection may take.
    User, password, database and certificates are in the URL, as redis-py reads it. Raises
    ``ValueError`` for a URL that is none.
    """
    pool = BlockingConnectionPool.from_url(
        url,
        timeout=timeout,
        max_connections=max_connections,
        socket_timeout=timeout,
        socket_connect_timeout=timeout,
        health_check_interval=30,
        retry=Retry(NoBackoff(), 0),
    )
    return Redis.from_pool(pool)
