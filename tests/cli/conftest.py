"""A Redis server for the commands that need one."""

from tests.redis.conftest import server

__all__ = ["server"]
