"""A client of the SDK whose connection is cut, and what it gets of a server with our events."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client

from tests.deadlines import SECONDS, soon, until

SERVER = """
import asyncio, socket, sys
from pathlib import Path
import uvicorn
from mcp.server.mcpserver import Context, MCPServer
from agent_state_integrations.mcp import AgentStateEventStore

state, gate = sys.argv[1:]
server = MCPServer("counts")

@server.tool()
async def count(context: Context) -> str:
    for n in range(1, 6):
        await context.report_progress(n, 5)
        while n == 1 and not Path(gate).exists():
            await asyncio.sleep(0.01)
    return "counted"

async def main():
    async with AgentStateEventStore(state) as events:
        app = server.streamable_http_app(event_store=events, retry_interval=10)
        listening = socket.create_server(("127.0.0.1", 0))
        print(listening.getsockname()[1], flush=True)
        await uvicorn.Server(uvicorn.Config(app, log_level="error")).serve([listening])

asyncio.run(main())
"""


class Wire:
    """A connection between a client and a server that can be cut, and held shut."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._is_open = asyncio.Event()
        self._is_open.set()
        self._ends: list[asyncio.StreamWriter] = []

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._ends.append(writer)
        await self._is_open.wait()
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._ends.append(inner_writer)
        await asyncio.gather(_pump(reader, inner_writer), _pump(inner_reader, writer))

    def cut(self) -> None:
        """Cut all connections; those that come now wait."""
        self._is_open.clear()
        for end in self._ends:
            end.transport.abort()
        self._ends.clear()

    def mend(self) -> None:
        """Let those through that wait, and all that come."""
        self._is_open.set()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


@asynccontextmanager
async def serving(state: Path, gate: Path) -> AsyncIterator[int]:
    """The port of a server in a process of its own, which is killed in the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVER, str(state), str(gate), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        yield int(await process.stdout.readline())
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def stored(state: Path) -> str:
    return "".join(path.read_text() for path in state.glob("mcp_events/*.jsonl"))


async def test_a_client_whose_connection_was_cut_misses_nothing(tmp_path: Path) -> None:
    state, gate = tmp_path / "state", tmp_path / "gate"
    seen: list[float] = []

    async def progress(done: float, total: float | None, message: str | None) -> None:
        seen.append(done)

    async with serving(state, gate) as port:
        wire = Wire(port)
        proxy = await asyncio.start_server(wire.accept, "127.0.0.1", 0)
        address = proxy.sockets[0].getsockname()
        async with (
            streamable_http_client(f"http://{address[0]}:{address[1]}/mcp") as (reading, writing),
            ClientSession(reading, writing) as session,
        ):
            await session.initialize()
            call = asyncio.create_task(session.call_tool("count", progress_callback=progress))
            await until(lambda: seen == [1])
            wire.cut()
            gate.touch()
            await until(lambda: "counted" in stored(state))
            assert seen == [1]
            wire.mend()
            result = await soon(call)
            assert result.content[0].text == "counted"
            assert seen == [1, 2, 3, 4, 5]
        proxy.close()


HEADERS = {"Accept": "application/json, text/event-stream", "MCP-Protocol-Version": "2025-11-25"}
CALL = {"name": "count", "arguments": {}, "_meta": {"progressToken": "t"}}


def request(number: int, method: str, params: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": number, "method": method, "params": params}


async def begin(client: httpx.AsyncClient, url: str) -> dict[str, str]:
    """The headers of a new session."""
    hello = {
        "protocolVersion": HEADERS["MCP-Protocol-Version"],
        "capabilities": {},
        "clientInfo": {"name": "test", "version": "1"},
    }
    begun = await client.post(url, json=request(0, "initialize", hello), headers=HEADERS)
    headers = {**HEADERS, "Mcp-Session-Id": begun.headers["mcp-session-id"]}
    done = {"jsonrpc": "2.0", "method": "notifications/initialized"}
    await client.post(url, json=done, headers=headers)
    return headers


async def event_with(response: httpx.Response, text: str) -> tuple[str, list[str]]:
    """The id of the event that has the text, and the data of all up to it."""
    event, data = "", []
    async for line in response.aiter_lines():
        if line.startswith("id: "):
            event = line.removeprefix("id: ")
        if line.startswith("data: {"):
            data.append(line)
        if text in line:
            break
    return event, data


async def test_a_new_session_gets_what_a_killed_server_had_stored(tmp_path: Path) -> None:
    state, gate = tmp_path / "state", tmp_path / "gate"
    async with serving(state, gate) as port, httpx.AsyncClient(timeout=SECONDS) as client:
        url = f"http://127.0.0.1:{port}/mcp"
        old = await begin(client, url)
        call = request(1, "tools/call", CALL)
        async with client.stream("POST", url, json=call, headers=old) as response:
            event, data = await event_with(response, '"progress":1')
        assert len(data) == 1
        gate.touch()
        await until(lambda: "counted" in stored(state))

    async with serving(state, gate) as port, httpx.AsyncClient(timeout=SECONDS) as client:
        url = f"http://127.0.0.1:{port}/mcp"
        refused = await client.get(url, headers={**old, "Last-Event-ID": event})
        assert refused.status_code == 404  # the SDK's server forgets its sessions
        new = {**await begin(client, url), "Last-Event-ID": event}
        async with client.stream("GET", url, headers=new) as response:
            _, data = await event_with(response, "counted")
        assert len(data) == 5  # four more steps, and the result
