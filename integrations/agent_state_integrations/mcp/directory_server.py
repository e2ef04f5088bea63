"""An MCP server over a state directory, which another process may own.

Four tools stash texts, under the names and with the arguments of the coaia tools. Three change what
agents have: they ask the owner of the directory, as the commands ``tasks`` and ``mail`` do. Agents,
tasks and mail are resources. No tool keeps the directory open.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ResourceError, ResourceNotFoundError, ToolError
from mcp.server.mcpserver.resources import ResourceSecurity
from pydantic import Field

from agent_state import AgentStateError, StatePersistenceManager, __version__
from agent_state.access import as_segment, from_segment
from agent_state.cli.options import WAIT_SECONDS, given_keyring
from agent_state.cli.owner import request_change
from agent_state.errors import Key
from agent_state.models import Priority
from agent_state.protocols import JsonObject
from agent_state.runtime import TaskRequest
from agent_state.runtime.requests import (
    OPERATOR,
    DocumentAction,
    DocumentRequest,
    SendRequest,
    SubmitRequest,
)
from agent_state.storage import MemoryStateStore, ReadOnlyStateStore

STASH_KIND = "coaia_stash"
"""The kind of what is stashed: a document for each key."""
_NONE = cast("str", None)
"""The default of a text: for ``str | None`` the SDK would parse a text that is JSON."""
_ANY_ID = ResourceSecurity(exempt_params={"agent_id", "task_id", "message_id"})
"""Ids are not paths: ``..`` and ``a/b`` are agents, too."""

Ident = Annotated[str, Field(description="The agent's id.")]


def create_server(state: Path, *, wait_seconds: float = WAIT_SECONDS) -> MCPServer[Any]:
    """The server over a state directory.

    ``wait_seconds``: how long a tool waits for the process that owns the directory.
    """
    server: MCPServer[Any] = MCPServer(
        "agent-state",
        version=__version__,
        instructions="The state of AI agents in one directory: their tasks, their mail, and texts "
        "that were stashed under a key.",
    )
    stash, changes, reading = (
        Stash(state, wait_seconds),
        Changes(state, wait_seconds),
        Reading(state),
    )
    tools: list[Callable[..., Awaitable[Any]]] = [
        *(stash.coaia_tash, stash.coaia_fetch, stash.coaia_list, stash.coaia_drop),
        *(changes.submit_task, changes.requeue_tasks, changes.send_message),
    ]
    for tool in tools:
        server.add_tool(tool)
    for uri, read in {
        "agent-state://agents": reading.agents,
        "agent-state://agents/{agent_id}": reading.agent,
        "agent-state://tasks": reading.tasks,
        "agent-state://tasks/{agent_id}": reading.tasks_of,
        "agent-state://tasks/{agent_id}/{task_id}": reading.task,
        "agent-state://mail/{agent_id}": reading.mail_of,
        "agent-state://mail/{agent_id}/{message_id}": reading.message,
    }.items():
        server.resource(uri, mime_type="application/json", security=_ANY_ID)(read)
    return server


class Stash:
    """The coaia tools. A reply is JSON in a text, with ``success``, as theirs."""

    def __init__(self, state: Path, wait_seconds: float) -> None:
        self._state = state
        self._wait = wait_seconds

    async def coaia_tash(self, key: str, data: str = _NONE, value: str = _NONE) -> str:
        """Stash a text under a key, in place of the one before. ``value``: another word for it."""
        text = data if data is not None else value
        if text is None:
            return _refused("data is missing")
        with _answer() as answer:
            await self._change("save", key, {"value": text})
            answer |= {"message": f"Stored '{key}'"}
        return json.dumps(answer, ensure_ascii=False)

    async def coaia_fetch(self, key: str) -> str:
        """Fetch the text that was stashed under a key."""
        with _answer() as answer:
            found = await self._found(key)
            if found is None:
                return _refused(f"Key '{key}' not found")
            answer |= {"value": found["value"]}
        return json.dumps(answer, ensure_ascii=False)

    async def coaia_list(self, pattern: str = "*") -> str:
        """List the keys that match a pattern: * is any text, ? a character, [ab] one of these."""
        wanted = _matcher(pattern)
        with _answer() as answer:
            async with _view(self._state) as manager:
                keys = sorted(from_segment(key[0]) for key in await manager.keys(STASH_KIND))
            answer |= {"keys": [key for key in keys if wanted.fullmatch(key)]}
        return json.dumps(answer, ensure_ascii=False)

    async def coaia_drop(self, key: str) -> str:
        """Remove the text that was stashed under a key; nothing of it stays on the disk."""
        with _answer() as answer:
            there = await self._found(key) is not None
            if there:
                await self._change("erase", key)
            answer |= {"dropped": there}
        return json.dumps(answer, ensure_ascii=False)

    async def _found(self, key: str) -> JsonObject | None:
        async with _view(self._state) as manager:
            found = await manager.load(STASH_KIND, (as_segment(key),))
        return found.model_dump() if found is not None else None

    async def _change(
        self, action: DocumentAction, key: str, body: JsonObject | None = None
    ) -> None:
        request = DocumentRequest(
            action=action, kind=STASH_KIND, key=[as_segment(key)], body=body or {}
        )
        await asyncio.to_thread(self._state.mkdir, mode=0o700, parents=True, exist_ok=True)
        await request_change(request, self._state, self._wait, "stash")


class Changes:
    """The tools that change what agents have. Errors are those of the protocol."""

    def __init__(self, state: Path, wait_seconds: float) -> None:
        self._state = state
        self._wait = wait_seconds

    async def submit_task(  # noqa: PLR0917  # a client gives them by name
        self,
        agent_id: Ident,
        name: str,
        payload: dict[str, Any] | None = None,
        priority: Priority = "normal",
        delay_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0,
        max_attempts: Annotated[int, Field(ge=1)] = 3,
    ) -> JsonObject:
        """Queue a task for an agent, by the name of a handler that it has."""
        request = SubmitRequest(
            agent_id=agent_id,
            name=name,
            payload=payload or {},
            priority=priority,
            delay_seconds=delay_seconds,
            max_attempts=max_attempts,
        )
        return cast("JsonObject", (await self._request(request, "task"))["task"])

    async def requeue_tasks(self, tasks: list[str]) -> JsonObject:
        """Run tasks again that failed or are dead; each by task_id or agent_id/task_id."""
        return await self._request(TaskRequest(action="retry", tasks=tasks), "tasks")

    async def send_message(
        self,
        to_agent: Annotated[str, Field(description="The id of the agent that gets it.")],
        subject: str,
        body: str = "",
        from_agent: str = OPERATOR,
        priority: Priority = "normal",
    ) -> JsonObject:
        """Send a message to an agent. It wakes one that sleeps until it gets mail."""
        request = SendRequest(
            to_agent=to_agent, from_agent=from_agent, subject=subject, body=body, priority=priority
        )
        return cast("JsonObject", (await self._request(request, "message"))["message"])

    async def _request(self, request: Any, noun: str) -> JsonObject:
        try:
            return await request_change(request, self._state, self._wait, noun)
        except AgentStateError as error:
            raise ToolError(str(error)) from error


class Reading:
    """The resources: JSON as it is stored, read when it is asked for."""

    def __init__(self, state: Path) -> None:
        self._state = state

    async def agents(self) -> str:
        """All agents with their status."""
        return await self._rows("agents", (), ("agent_id", "agent_name", "status"))

    async def agent(self, agent_id: str) -> str:
        """An agent with its context."""
        return await self._one("agents", (agent_id,))

    async def tasks(self) -> str:
        """All tasks with their status."""
        return await self._rows("tasks", (), ("agent_id", "task_id", "name", "status"))

    async def tasks_of(self, agent_id: str) -> str:
        """An agent's tasks with their status."""
        return await self._rows("tasks", (agent_id,), ("task_id", "name", "status", "priority"))

    async def task(self, agent_id: str, task_id: str) -> str:
        """A task with its payload and its result."""
        return await self._one("tasks", (agent_id, task_id))

    async def mail_of(self, agent_id: str) -> str:
        """An agent's messages with their status."""
        fields = ("message_id", "from_agent", "subject", "status", "timestamp")
        return await self._rows("mail", (agent_id,), fields)

    async def message(self, agent_id: str, message_id: str) -> str:
        """A message with its body."""
        return await self._one("mail", (agent_id, message_id))

    async def _one(self, kind: str, key: Key) -> str:
        async with _resource(self._state) as manager:
            found = await manager.load(kind, key)
        if found is None:
            raise ResourceNotFoundError(f"there is no {'/'.join(key)} in {kind}")
        return json.dumps(found.model_dump(mode="json"), ensure_ascii=False)

    async def _rows(self, kind: str, prefix: Key, fields: tuple[str, ...]) -> str:
        rows = []
        async with _resource(self._state) as manager:
            async for stored in manager.scan(kind, prefix):
                body = stored.state.model_dump(mode="json")
                if all(name in body for name in fields[:1]):
                    rows.append({name: body.get(name) for name in fields})
        return json.dumps(rows, ensure_ascii=False)


@asynccontextmanager
async def _resource(state: Path) -> AsyncIterator[StatePersistenceManager]:
    try:
        async with _view(state) as manager:
            yield manager
    except AgentStateError as error:
        raise ResourceError(str(error)) from error


@asynccontextmanager
async def _view(state: Path) -> AsyncIterator[StatePersistenceManager]:
    """The directory as it is now, for reading; one that is missing has nothing."""
    missing = not await asyncio.to_thread(state.is_dir)
    store = MemoryStateStore() if missing else ReadOnlyStateStore(state)
    async with StatePersistenceManager(store=store, encryption=given_keyring()) as manager:
        yield manager


@contextmanager
def _answer() -> Iterator[JsonObject]:
    """The fields of a reply; an error becomes one."""
    answer: JsonObject = {"success": True}
    try:
        yield answer
    except AgentStateError as error:
        answer |= {"success": False, "error": str(error)}


def _refused(why: str) -> str:
    return json.dumps({"success": False, "error": why}, ensure_ascii=False)


def _matcher(pattern: str) -> re.Pattern[str]:
    """A pattern of Redis as a regular expression."""
    found, at = "", 0
    while at < len(pattern):
        here = pattern[at]
        closing = pattern.find("]", at + 1)
        if here == "[" and closing > 0:
            inner = pattern[at + 1 : closing]
            negated = inner.startswith("^")
            members = re.escape(inner.removeprefix("^")).replace(r"\-", "-")
            found += f"[{'^' if negated else ''}{members}]" if members else "(?!)"
            at = closing
        elif here == "\\" and at + 1 < len(pattern):
            at += 1
            found += re.escape(pattern[at])
        else:
            found += {"*": ".*", "?": "."}.get(here) or re.escape(here)
        at += 1
    try:
        return re.compile(found, re.DOTALL)
    except re.error:  # a range that ends before it begins matches nothing
        return re.compile("(?!)")
