"""What a server's settings mean for what is kept there, in words for the log."""

from __future__ import annotations

import re
from typing import Any

from redis.exceptions import ResponseError

from agent_state.errors import StorageError
from agent_state.redis.link import Link

_OLDEST = (6, 2)


async def look_at(link: Link, *, wait_replicas: int) -> list[str]:
    """What could cost data here, a line each. Raises ``StorageError`` for a server too old.

    A server may forbid the question; then that is what is said.
    """
    info = await _ask(link, "INFO")
    warnings = []
    if isinstance(info, dict):
        version = re.match(r"(\d+)\.(\d+)", str(info.get("redis_version", "")))
        if version and (int(version[1]), int(version[2])) < _OLDEST:
            raise StorageError(
                f"Redis {info['redis_version']} is too old, 6.2 is the oldest", path=link.url
            )
        if wait_replicas > int(info.get("connected_slaves", 0)):
            warnings.append(
                f"{wait_replicas} replicas are to confirm each commit, and "
                f"{info.get('connected_slaves', 0)} are connected"
            )
    policy = await _config(link, "maxmemory-policy")
    if policy is not None and policy != "noeviction" and await _config(link, "maxmemory") != "0":
        warnings.append(
            f"maxmemory-policy is {policy}: a full server drops what is needed; use noeviction"
        )
    return [*warnings, *await _on_disk(link, info)]


async def _on_disk(link: Link, info: Any) -> list[str]:
    appendonly = await _config(link, "appendonly")
    if appendonly is None and isinstance(info, dict) and "aof_enabled" in info:
        appendonly = "yes" if info["aof_enabled"] else "no"
    if appendonly is None:
        return ["the server does not say whether it writes to disk (INFO and CONFIG are forbidden)"]
    if appendonly != "yes":
        return ["appendonly is off: what was saved since the last snapshot is lost with the server"]
    appendfsync = await _config(link, "appendfsync")
    if appendfsync == "always":
        return []
    if appendfsync is None:
        return ["the server does not say how often it syncs its file (CONFIG is forbidden)"]
    lost = "the last second" if appendfsync == "everysec" else "some seconds"
    return [f"appendfsync is {appendfsync}: a power cut costs {lost} of what was saved"]


async def _config(link: Link, name: str) -> str | None:
    found = await _ask(link, "CONFIG GET", name)
    if not isinstance(found, dict):
        return None
    value = found.get(name, found.get(name.encode()))
    return value.decode() if isinstance(value, bytes) else value


async def _ask(link: Link, *command: str) -> Any:
    """The reply as redis-py reads it; None when the server will not say."""
    try:
        client: Any = link.client
        return await client.execute_command(*command, **await link.node())
    except ResponseError:
        return None
