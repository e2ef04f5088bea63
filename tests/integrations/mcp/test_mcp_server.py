"""``agent-state mcp`` as a client sees it: a real process, over standard input and output."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from mcp import ClientSession, MCPError, StdioServerParameters
from mcp.client.stdio import stdio_client

from agent_state import StatePersistenceManager
from agent_state.runtime import AsyncAgentSessionManager
from agent_state_integrations.mcp.directory_server import STASH_KIND, _matcher
from tests.integrations.states import HOSTILE


@asynccontextmanager
async def client_of(state: Path) -> AsyncIterator[ClientSession]:
    program = ["-m", "agent_state", "mcp", "--state", str(state), "--wait", "60"]
    server = StdioServerParameters(command=sys.executable, args=program)
    async with (
        stdio_client(server) as (reading, writing),
        ClientSession(reading, writing) as client,
    ):
        await client.initialize()
        yield client


async def call(client: ClientSession, tool: str, **arguments: Any) -> Any:
    result = await client.call_tool(tool, arguments)
    text = result.content[0].text
    return f"error: {text}" if result.is_error else json.loads(text)


async def read(client: ClientSession, *path: str) -> Any:
    uri = "agent-state://" + "/".join(quote(part, safe="") for part in path)
    return json.loads((await client.read_resource(uri)).contents[0].text)


async def test_the_coaia_tools_have_their_names_and_arguments(tmp_path: Path) -> None:
    async with client_of(tmp_path / "new") as client:
        tools = {
            tool.name: [*tool.input_schema["properties"]]
            for tool in (await client.list_tools()).tools
        }
        assert tools["coaia_tash"] == ["key", "data", "value"]
        assert tools["coaia_fetch"] == tools["coaia_drop"] == ["key"]
        assert tools["coaia_list"] == ["pattern"]
        assert tools.keys() > {"submit_task", "requeue_tasks", "send_message"}

        missing = {"success": False, "error": "Key 'a' not found"}
        assert await call(client, "coaia_fetch", key="a") == missing
        assert await call(client, "coaia_list") == {"success": True, "keys": []}
        assert not (tmp_path / "new").exists()  # looking makes no directory
        texts = ['{"context": {"n": 1}}', "[1]", "null", "", "ä\n", "1"]
        for text in texts:
            stored = await call(client, "coaia_tash", key="a", data=text)
            assert stored == {"success": True, "message": "Stored 'a'"}
            assert await call(client, "coaia_fetch", key="a") == {"success": True, "value": text}
        await call(client, "coaia_tash", key="b:1", value="by the other name")
        assert (await call(client, "coaia_fetch", key="b:1"))["value"] == "by the other name"
        assert (await call(client, "coaia_tash", key="c"))["success"] is False
        assert await call(client, "coaia_list", pattern="b:*") == {"success": True, "keys": ["b:1"]}
        assert await call(client, "coaia_drop", key="a") == {"success": True, "dropped": True}
        assert await call(client, "coaia_drop", key="a") == {"success": True, "dropped": False}
        assert await call(client, "coaia_fetch", key="a") == missing

    async with StatePersistenceManager(tmp_path / "new") as manager:
        assert await manager.keys(STASH_KIND) == [("b:1",)]


async def test_every_key_is_one_of_its_own(tmp_path: Path) -> None:
    async with client_of(tmp_path) as client:
        stashed = [call(client, "coaia_tash", key=key, data=f"of {key}") for key in HOSTILE]
        for said in await asyncio.gather(*stashed):  # a client has several calls in flight
            assert said["success"], said
        assert (await call(client, "coaia_list"))["keys"] == sorted(HOSTILE)
        for key in HOSTILE:
            assert (await call(client, "coaia_fetch", key=key))["value"] == f"of {key}"


async def test_agents_tasks_and_mail_are_read_and_changed(tmp_path: Path) -> None:
    async with AsyncAgentSessionManager(tmp_path) as runtime:
        for name in ("ann", "a/b", ".."):
            await runtime.agents.create(name, agent_type="clerk")
    async with client_of(tmp_path) as client:
        assert {row["agent_id"] for row in await read(client, "agents")} == {"ann", "a/b", ".."}
        assert (await read(client, "agents", ".."))["agent_name"] == ".."
        task = await call(client, "submit_task", agent_id="a/b", name="cook", payload={"n": 1})
        assert (await read(client, "tasks", "a/b", task["task_id"]))["payload"] == {"n": 1}
        (row,) = await read(client, "tasks", "a/b")
        assert (row["name"], row["status"]) == ("cook", "pending")
        assert len(await read(client, "tasks")) == 1
        sent = await call(client, "send_message", to_agent="ann", subject="hi", body="there")
        assert (await read(client, "mail", "ann", sent["message_id"]))["body"] == "there"
        assert [row["subject"] for row in await read(client, "mail", "ann")] == ["hi"]
        again = await call(client, "requeue_tasks", tasks=[task["task_id"]])
        assert again["changed"] == 0  # it has not failed
        refused = await call(client, "submit_task", agent_id="nobody", name="cook")
        assert refused.startswith("error: ")
        assert "no such agent" in refused
        with pytest.raises(MCPError, match="there is no nobody in agents"):
            await read(client, "agents", "nobody")


async def test_a_running_server_carries_out_what_is_asked(tmp_path: Path) -> None:
    async with AsyncAgentSessionManager(tmp_path) as runtime:
        await runtime.agents.create("ann", agent_type="clerk")
        fails = True

        @runtime.task("cook", agent_type="clerk")
        async def cook(context: Any, payload: dict[str, Any]) -> str:
            if fails:
                raise RuntimeError("no water")
            return str(payload["dish"])

        async with client_of(tmp_path) as client:
            task = await call(
                client,
                "submit_task",
                agent_id="ann",
                name="cook",
                payload={"dish": "soup"},
                max_attempts=1,
            )
            while (await read(client, "tasks", "ann", task["task_id"]))["status"] != "dead":
                await asyncio.sleep(0.05)
            fails = False
            again = await call(client, "requeue_tasks", tasks=[f"ann/{task['task_id']}"])
            assert again["changed"] == 1
            while (found := await read(client, "tasks", "ann", task["task_id"]))[
                "status"
            ] != "completed":
                await asyncio.sleep(0.05)
            assert found["result"] == "soup"
            assert (await call(client, "coaia_tash", key="a", data="b"))["success"]
            assert (await call(client, "coaia_fetch", key="a"))["value"] == "b"
            assert (await call(client, "coaia_drop", key="a"))["dropped"]
            assert not (await call(client, "coaia_drop", key="a"))["dropped"]


@pytest.mark.parametrize(
    ("pattern", "matching"),
    [
        ("*", ["ab", "a*b", "", "a\nb", "axb"]),
        ("a?b", ["a*b", "a\nb", "axb"]),
        (r"a\*b", ["a*b"]),
        ("a[xy]b", ["axb"]),
        ("a[^x]b", ["a*b", "a\nb"]),
        ("a[w-y]b", ["axb"]),
        ("a[z-a]b", []),
        ("a[b", []),
        ("", [""]),
    ],
)
def test_a_pattern_matches_as_in_redis(pattern: str, matching: list[str]) -> None:
    names = ["ab", "a*b", "", "a\nb", "axb"]

    assert [name for name in names if _matcher(pattern).fullmatch(name)] == matching
