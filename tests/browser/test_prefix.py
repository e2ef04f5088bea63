"""The dashboard behind a proxy that serves it under a prefix."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit

import pytest
from playwright.async_api import expect

from tests.browser.conftest import Dashboard

pytestmark = pytest.mark.asyncio(loop_scope="session")  # one browser for all
expect.set_options(timeout=60_000)

PREFIX = b"/deep/agents"


@asynccontextmanager
async def _proxy(address: str, outside: list[str]) -> AsyncIterator[str]:
    """A proxy that takes the prefix off each path; ``outside`` gets the paths without it."""
    server = urlsplit(address)

    async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while piece := await source.read(65_536):
                target.write(piece)
                await target.drain()
        target.close()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:  # a connection that the browser opened in advance
            writer.close()
            return
        method, path, rest = head.split(b" ", 2)
        if not path.startswith(PREFIX + b"/"):
            outside.append(path.decode())
        rest = rest.replace(b"keep-alive", b"close")  # one request for each connection
        reader_there, writer_there = await asyncio.open_connection(server.hostname, server.port)
        writer_there.write(b" ".join((method, path.removeprefix(PREFIX), rest)))
        await asyncio.gather(copy(reader, writer_there), copy(reader_there, writer))

    async with await asyncio.start_server(forward, "127.0.0.1", 0) as proxy:
        port = proxy.sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}{PREFIX.decode()}/"


async def test_behind_a_prefix_it_shows_follows_and_changes(dashboard: Dashboard) -> None:
    outside: list[str] = []
    async with _proxy(dashboard.address, outside) as address:
        page = await dashboard.context.new_page()
        page.on("pageerror", lambda error: dashboard.errors.append(str(error)))
        page.on("console", lambda message: dashboard.look(message.type, message.text))
        await page.goto(address)
        await expect(page.get_by_text("live", exact=True)).to_be_visible()
        await page.goto(f"{address}#/tasks?status=dead")
        await expect(page.locator("tbody tr")).to_have_count(6)
        await page.goto(f"{address}#/tasks?agent=cleo")
        await page.get_by_role("button", name="Cancel all").click()
        await page.get_by_role("button", name="Cancel 3").click()
        await expect(page.locator(".status.cancelled")).to_have_count(3)
        await page.close()

    assert outside == []
