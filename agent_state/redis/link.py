"""Commands to one Redis, several at once, with what a failure leaves known told apart.

A command is tried a second time when the connection failed, never more often: whoever sends one
that changes something makes sure that the second time adds nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from redis.asyncio import RedisCluster
from redis.exceptions import (
    AskError,
    AuthenticationError,
    BusyLoadingError,
    ConnectionError,  # noqa: A004  # redis-py's own, which is not the built-in one
    MaxConnectionsError,
    MovedError,
    NoScriptError,
    OutOfMemoryError,
    ResponseError,
    TimeoutError,  # noqa: A004
)

from agent_state.errors import DurabilityUnknownError, StorageError, StorageFullError
from agent_state.redis.client import FAILURES, connect, without_password
from agent_state.redis.scripts import Script

Argument = str | bytes | int | float
Command = tuple[Any, ...]
"""Its words; the first of a script's is the ``Script``."""

_REFUSALS = (ResponseError, AuthenticationError, BusyLoadingError, MaxConnectionsError)
_ELSEWHERE = (MovedError, AskError)
_NOT_SENT = ("connecting to", "No connection available", "No master found", "max number of clients")
_PAUSE_SECONDS = 0.05


def call(script: Script, keys: Sequence[str], arguments: Sequence[Argument]) -> Command:
    """The command that runs a script."""
    return (script, len(keys), *keys, *arguments)


class Link:
    """A client with its URL. ``timeout``: seconds for one command; ``anchor``: any key of ours."""

    def __init__(self, url: str, *, timeout: float, max_connections: int, anchor: str) -> None:
        self.url = without_password(url)
        self.timeout = timeout
        self._anchor = anchor
        self.client: Any = connect(url, timeout_seconds=timeout, max_connections=max_connections)
        self.is_cluster = isinstance(self.client, RedisCluster)

    async def close(self) -> None:
        """Close every connection."""
        await self.client.aclose()

    async def run(self, *command: Any, doing: str = "reading") -> Any:
        """One command's reply. Raises ``StorageError``."""
        [reply] = await self.exchange([command], doing)
        if isinstance(reply, Exception):
            raise self.error(reply, doing)
        return reply

    async def exchange(self, commands: Sequence[Command], doing: str) -> list[Any]:
        """Send them on one connection; a reply or a refusal for each.

        Raises ``StorageError`` when nothing can have been done, and ``DurabilityUnknownError``
        when the commands may have been carried out, or still may be.
        """
        sent = False
        for last in (False, True):
            try:
                replies = await self._send(commands)
                broken = next((reply for reply in replies if _is_broken(reply)), None)
                if broken is None:
                    return replies
                raise broken
            except FAILURES as error:
                sent = sent or not is_refusal(error)
                if last or isinstance(error, ResponseError):
                    raise self.error(error, doing, unknown=sent) from error
                if self.is_cluster:
                    await self.client.aclose()  # it learns the cluster's shape anew
            await asyncio.sleep(_PAUSE_SECONDS)
        raise AssertionError("unreachable")

    async def _send(self, commands: Sequence[Command]) -> list[Any]:
        whole, replies = False, list[Any]()
        for _ in range(3):
            replies = await self._pipeline(commands, whole=whole)
            if any(isinstance(reply, NoScriptError) for reply in replies):
                whole = True  # nothing of a script that the server does not know was carried out
            elif not await self._follow(commands, replies):
                break
        return replies

    async def _follow(self, commands: Sequence[Command], replies: list[Any]) -> bool:
        """Send what is another node's to that node; whether all has to be sent once more.

        A ``WAIT`` is about what was sent before it, to one node on one connection.
        """
        moved = False
        if not any(isinstance(reply, _ELSEWHERE) for reply in replies):
            return False
        for index, reply in enumerate(replies):
            if isinstance(reply, _ELSEWHERE):
                moved = moved or isinstance(reply, MovedError)
                words = _words(commands[index], whole=True)
                try:
                    replies[index] = await self.client.execute_command(*words)
                except ResponseError as error:
                    replies[index] = error
            elif commands[index][0] == "WAIT":
                replies[index] = 0
        return moved and any(command[0] == "WAIT" for command in commands)

    async def _pipeline(self, commands: Sequence[Command], *, whole: bool) -> list[Any]:
        if len(commands) == 1 and not self.is_cluster:
            try:
                return [await self.client.execute_command(*_words(commands[0], whole=whole))]
            except ResponseError as error:
                return [error]
        # Where a cluster's node sends us elsewhere is our business: see above.
        how = {"allow_redirections": False} if self.is_cluster else {}
        pipeline = self.client.pipeline(transaction=False)
        for command in commands:
            where = await self.node() if command[0] == "WAIT" else {}
            pipeline.execute_command(*_words(command, whole=whole), **where)
        replies: list[Any] = await pipeline.execute(raise_on_error=False, **how)
        return replies

    async def node(self) -> dict[str, Any]:
        """For a command without a key: the node that has ours, as redis-py wants to hear it."""
        if not self.is_cluster:
            return {}
        await self.client.initialize()
        return {"target_nodes": self.client.get_node_from_key(self._anchor)}

    def error(self, error: Exception, doing: str, *, unknown: bool = False) -> StorageError:
        """The typed error, which names the server without its password."""
        why = f"{doing}: {str(error) or type(error).__name__}"
        if unknown:
            said = f"{why}; it may have been done, or not"
            return DurabilityUnknownError(said, path=self.url)
        full = isinstance(error, OutOfMemoryError) or "No space left" in why
        return (StorageFullError if full else StorageError)(why, path=self.url)


def is_refusal(error: Exception) -> bool:
    """Whether the server did nothing, for certain: it said so, or was never asked."""
    said = str(error)
    return isinstance(error, _REFUSALS) or any(words in said for words in _NOT_SENT)


def _is_broken(reply: object) -> bool:
    return isinstance(reply, ConnectionError | TimeoutError | OSError)


def _words(command: Command, *, whole: bool = False) -> Command:
    script = command[0]
    if not isinstance(script, Script):
        return command
    if whole:
        return ("EVAL", script.text, *command[1:])
    return ("EVALSHA", script.sha, *command[1:])


class Lane:
    """Commands of many tasks: those that are ready in one turn of the loop share a pipeline.

    So any number of tasks needs one connection. Only for commands that may be sent twice.
    """

    _MOST = 128

    def __init__(self, link: Link) -> None:
        self._link = link
        self._queue: list[tuple[Command, asyncio.Future[Any]]] = []
        self._running: asyncio.Task[None] | None = None

    async def run(self, *command: Any, doing: str = "reading") -> Any:
        """The command's reply. Raises ``StorageError``."""
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._queue.append((command, reply))
        if self._running is None:
            self._running = asyncio.create_task(self._run(), name="agent-state redis commands")
        result = await reply
        if isinstance(result, StorageError):
            raise type(result)(f"{doing}: {result.message}", path=result.path) from result
        if isinstance(result, Exception):
            raise self._link.error(result, doing) from result
        return result

    async def _run(self) -> None:
        try:
            while self._queue:
                batch, self._queue = self._queue[: self._MOST], self._queue[self._MOST :]
                try:
                    replies = await self._link.exchange([command for command, _ in batch], "sent")
                except Exception as error:  # noqa: BLE001  # each caller's to raise
                    replies = [error] * len(batch)
                for (_, reply), result in zip(batch, replies, strict=True):
                    if not reply.done():
                        reply.set_result(result)
        finally:
            self._running = None

    async def ended(self) -> None:
        """Wait for what was handed over."""
        while self._running is not None:
            await asyncio.wait([self._running])
