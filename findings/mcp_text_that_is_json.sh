#!/usr/bin/env bash
# mcp 2.3.0: a tool's text argument that may be left out is parsed if it is JSON, and "null" is lost.
#
# Guess before looking: the schema of `text: str | None = None` says string or null, so any string arrives as it was
# sent, as for `text: str`.
# Seen: for `str` every text arrives as it is. For `str | None` the server reads the text as JSON first: an object or a
# list is then refused as not being a string, and the text "null" arrives as None, without an error.
# Met: a tool that stashes a text under a key, with two names for the text. What agents stash is mostly JSON.
#
# Output seen:
#   str         plain     'plain'
#   str         {"n": 1}  '{"n": 1}'
#   str         [1]       '[1]'
#   str         null      'null'
#   str | None  plain     'plain'
#   str | None  {"n": 1}  refused
#   str | None  [1]       refused
#   str | None  null      None
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check mcp==2.3.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import asyncio
import logging

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

logging.disable()
server = MCPServer("texts")


@server.tool(name="str")
def stash(text: str) -> str:
    return repr(text)


@server.tool(name="str | None")
def stash_or_not(text: str | None = None) -> str:
    return repr(text)


TEXTS = ("plain", '{"n": 1}', "[1]", "null")
SEEN = {
    "str": ["'plain'", "'{\"n\": 1}'", "'[1]'", "'null'"],
    "str | None": ["'plain'", "refused", "refused", "None"],
}


async def call(name: str, text: str) -> str:
    try:
        result = await server.call_tool(name, {"text": text})
    except ToolError:
        return "refused"
    return result.content[0].text


async def main() -> None:
    schemas = {tool.name: tool.input_schema["properties"]["text"] for tool in await server.list_tools()}
    assert {"type": "string"} in schemas["str | None"]["anyOf"]
    for name, expected in SEEN.items():
        found = [await call(name, text) for text in TEXTS]
        for text, each in zip(TEXTS, found, strict=True):
            print(f"{name:10}  {text:8}  {each}")
        assert found == expected, f"version 2.3.0 gave {found} for {name}"


asyncio.run(main())
PYTHON
