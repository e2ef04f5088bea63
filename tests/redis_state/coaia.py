"""The real coaia server for tests, in an environment of its own beside ours.

``python -m tests.redis_state.coaia`` makes it when missing. Its pins exclude ours (redis<=4.3.6),
and it does not start with mcp 2.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from filelock import FileLock

REQUIREMENTS = ("coaiapy-mcp==0.4.3", "mcp<2")
HOME = Path(sys.prefix) / "coaia"

TOMORROW = """
import asyncio, json
import mcp.types
from coaiapy_mcp import tools
from mcp.server import Server
from mcp.server.stdio import stdio_server

server = Server("coaia-of-tomorrow")
OFFERED = {"tash": ["key", "value"], "fetch": ["key"], "list": ["pattern"], "drop": ["key"]}

@server.list_tools()
async def offered():
    return [
        mcp.types.Tool(
            name=f"coaia_{name}",
            inputSchema={"type": "object", "properties": {each: {} for each in arguments}},
        )
        for name, arguments in OFFERED.items()
    ]

@server.call_tool()
async def call(name, arguments):
    if name == "coaia_list":
        answer = {"success": True, "keys": tools.redis_client.keys(arguments["pattern"])}
    elif name == "coaia_drop":
        answer = {"success": bool(tools.redis_client.delete(arguments["key"]))}
    else:
        answer = await tools.TOOLS[name](**arguments)
    return [mcp.types.TextContent(type="text", text=json.dumps(answer))]

async def main():
    async with stdio_server() as streams:
        await server.run(*streams, server.create_initialization_options())

asyncio.run(main())
"""
"""A program for that environment: the server as it may be one day, able to list and to drop."""


def installed() -> Path:
    """The folder of its programs. Raises ``CalledProcessError`` when it cannot be installed."""
    stamp = HOME / "installed.txt"
    wanted = "\n".join(REQUIREMENTS)
    with FileLock(f"{HOME}.lock"):
        if not stamp.is_file() or stamp.read_text() != wanted:
            subprocess.run([sys.executable, "-m", "venv", "--clear", HOME], check=True)
            pip = (HOME / "bin" / "python", "-m", "pip", "install", "--quiet")
            subprocess.run([*pip, *REQUIREMENTS], check=True)
            stamp.write_text(wanted)
    return HOME / "bin"


if __name__ == "__main__":
    installed()
