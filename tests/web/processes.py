"""``agent-state serve`` in a process of its own."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

SERVE = (sys.executable, "-m", "agent_state", "serve")


@asynccontextmanager
async def serving(
    state: Path,
    *options: str,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    """``agent-state serve`` in a process of its own, killed at the end. Makes ``state``."""
    state.mkdir(exist_ok=True)
    server = await asyncio.create_subprocess_exec(
        *SERVE,
        str(state),
        "--port",
        "0",
        *options,
        stdout=-1,
        stderr=-1,
        cwd=cwd,
        env={**os.environ, **(env or {})},
    )
    assert server.stdout is not None
    try:
        async with asyncio.timeout(240):
            line = b""
            while not line.startswith(b"http://"):
                line = await server.stdout.readline()
                assert line, await server.stderr.read() if server.stderr else ""
        yield line.decode().split()[0], server
    finally:
        if server.returncode is None:
            server.kill()
        await server.communicate()
