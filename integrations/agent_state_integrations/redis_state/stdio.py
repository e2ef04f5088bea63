"""The smallest client of an MCP server over stdio: initialize, list the tools, call one.

Format: https://modelcontextprotocol.io/specification, JSON-RPC 2.0, one message a line. The
official library is not used: it needs sixteen packages for two calls, its stdio client must be
opened and closed by one task, while this server is restarted within any call, and its major
versions follow those of the server, which is bound to ``mcp<2``.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agent_state.errors import StateCorruptedError
from agent_state.protocols import JsonObject
from agent_state.serializers import JSONStateSerializer, parse_object
from agent_state_integrations.redis_state.transports import TransportError

PROTOCOL = "2024-11-05"

_logger = logging.getLogger("agent_state.redis_state")
_serializer = JSONStateSerializer()

_NEEDED = ("PATH", "HOME", "USER", "LANG", "LC_ALL", "TMPDIR", "SYSTEMROOT", "VIRTUAL_ENV")
"""The variables that the server inherits."""


class StdioServer:
    """A server process and its pending calls, by id.

    Lines that are not JSON are kept in ``noise`` (the last twenty) and otherwise skipped: some
    servers print warnings there. Its stderr goes nowhere, since servers log what they are given.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count(1)
        self._calls: dict[int, asyncio.Future[JsonObject]] = {}
        self._reader = asyncio.create_task(self._read())
        self.noise: list[str] = []
        self.tools: dict[str, frozenset[str]] = {}
        """The arguments of each tool, by its name."""

    @classmethod
    async def start(
        cls, command: Sequence[str], environment: Mapping[str, str], *, longest_line: int
    ) -> StdioServer:
        """Start the program and initialize the protocol. Raises ``TransportError``.

        The caller sets a time limit. No process is left after a failure or a timeout.
        """
        program = _found(command[0])
        inherited = {name: os.environ[name] for name in _NEEDED if name in os.environ}
        try:
            process = await asyncio.create_subprocess_exec(
                program,
                *command[1:],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=os.sep,  # where no configuration file lies around
                env=inherited | dict(environment),
                start_new_session=True,  # a Ctrl-C is for us; and its children end with it
                limit=longest_line,
            )
        except OSError as error:
            raise TransportError(f"{program} cannot be started: {error.strerror}") from error
        server = cls(process)
        try:
            await server._initialize()
        except BaseException:
            await server.close()
            raise
        return server

    async def _initialize(self) -> None:
        name = {"name": "agent_state", "version": "1"}
        hello = {"protocolVersion": PROTOCOL, "capabilities": {}, "clientInfo": name}
        await self.request("initialize", hello)
        await self._send({"jsonrpc": "2.0", "method": "notifications/initialized"})
        cursor: dict[str, Any] = {}
        while True:
            page = await self.request("tools/list", cursor)
            for tool in _objects(page.get("tools")):
                schema, *_ = _objects([tool.get("inputSchema")]) or [{}]
                arguments = schema.get("properties")
                self.tools[str(tool.get("name"))] = frozenset(
                    arguments if isinstance(arguments, dict) else ()
                )
            if not page.get("nextCursor"):
                return
            cursor = {"cursor": page["nextCursor"]}

    @property
    def alive(self) -> bool:
        return not self._reader.done() and self._loop is asyncio.get_running_loop()

    @property
    def pid(self) -> int:
        return self._process.pid

    async def call(self, tool: str, arguments: Mapping[str, str]) -> str:
        """The tool's answer, as text. Raises ``TransportError``."""
        answer = await self.request("tools/call", {"name": tool, "arguments": dict(arguments)})
        parts = _objects(answer.get("content"))
        text = "".join(str(part.get("text")) for part in parts if part.get("type") == "text")
        if answer.get("isError"):
            raise TransportError(f"{tool}: {text[:200]}")
        return text

    async def request(self, method: str, parameters: JsonObject) -> JsonObject:
        """The result. Raises ``TransportError`` for an error, and when the server ends."""
        number = next(self._ids)
        answer = asyncio.get_running_loop().create_future()
        self._calls[number] = answer
        try:
            if not self.alive:
                raise TransportError("the server has ended")
            message = {"jsonrpc": "2.0", "id": number, "method": method, "params": parameters}
            await self._send(message)
            reply = await answer
        finally:
            del self._calls[number]
            if answer.done() and not answer.cancelled():
                answer.exception()  # it may have failed while the message was being sent
        if "error" in reply or not isinstance(reply.get("result"), dict):
            raise TransportError(f"{method}: {str(reply.get('error', 'no result'))[:200]}")
        return dict(reply["result"])

    def _write(self, message: JsonObject) -> asyncio.StreamWriter:
        assert self._process.stdin is not None  # noqa: S101  # for mypy: we asked for a pipe
        self._process.stdin.write(_serializer.dumps(message) + b"\n")
        return self._process.stdin

    async def _send(self, message: JsonObject) -> None:
        try:
            await self._write(message).drain()
        except OSError as error:
            raise TransportError("the server has ended") from error

    async def _read(self) -> None:
        """Give every answer to its call; at the end fail the calls that are left."""
        assert self._process.stdout is not None  # noqa: S101  # for mypy: we asked for a pipe
        why = "the server has ended"
        try:
            while line := await self._process.stdout.readline():
                self._take(line)
        except ValueError:
            why = "the server sent a line that is too long"
        finally:
            for answer in self._calls.values():
                if not answer.done():
                    answer.set_exception(TransportError(why))

    def _take(self, line: bytes) -> None:
        try:
            message = parse_object(line)
        except StateCorruptedError:
            text = line.decode(errors="replace").strip()
            self.noise = [*self.noise[-19:], text[:200]]
            _logger.debug("skipped a line that is not JSON")
            return
        number = message.get("id")
        if "method" in message:
            if number is not None:  # it asks us: a ping is answered, we offer nothing else
                self._write({"jsonrpc": "2.0", "id": number} | _reply(message["method"]))
            return
        answer = self._calls.get(number) if isinstance(number, int) else None
        if answer is not None and not answer.done():
            answer.set_result(message)

    async def close(self) -> None:
        """End the process and everything it started, and wait until it is gone."""
        if self._process.returncode is None:  # not reaped, so the number is still its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # it holds nothing that is not stored
        if self._loop is not asyncio.get_running_loop():
            return  # nothing of it can be awaited where its own loop has ended
        if self._process.stdin is not None:
            self._process.stdin.close()
        await self._process.wait()
        self._reader.cancel()  # had it started others, they would still hold the pipe
        await asyncio.wait([self._reader])


def _objects(value: object) -> list[JsonObject]:
    """The objects of a list; other values are left out."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _found(name: str) -> str:
    program = shutil.which(name)
    if program is None:
        raise TransportError(f"there is no program {name}")
    return str(Path(program).absolute())


def _reply(method: object) -> JsonObject:
    if method == "ping":
        return {"result": {}}
    return {"error": {"code": -32601, "message": "not offered"}}
