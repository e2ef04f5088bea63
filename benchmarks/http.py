"""A chat request through HTTP, and the same work without HTTP, turn by turn in one run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx

from agent_state import AsyncAgentSessionManager, Task, TaskContext
from agent_state.sessions import SessionManager
from agent_state.web import LiveBackend, create_app, serve
from benchmarks.report import Row, at_most
from benchmarks.workload import Setting, percentile

REQUESTS = 500
TOKEN = "bench-token-0123456789"  # noqa: S105  # opens nothing but this benchmark
_GUIDE = "guide_agent"

Ask = Callable[[str], Awaitable[None]]


def http(setting: Setting) -> list[Row]:
    """One client on one connection; what HTTP adds is the difference of the medians, and of p99.

    A *message* is stored in a conversation; a *chat* is also answered: a task for an agent, whose
    handler stores the reply, is submitted and waited for.
    """
    direct: dict[str, list[list[float]]] = {"message": [], "chat": []}
    through: dict[str, list[list[float]]] = {"message": [], "chat": []}
    for _ in range(setting.runs):
        with setting.folder() as folder:
            asyncio.run(_run(folder, setting.scaled(REQUESTS), direct, through))
    rows: list[Row] = []
    for name, plain_runs in direct.items():
        for figure, at in (("median", 0.5), ("p99", 0.99)):
            plain = [percentile(run, at) for run in plain_runs]
            web = [percentile(run, at) for run in through[name]]
            added = [one - other for one, other in zip(web, plain, strict=True)]
            rows += [
                Row(f"{name} through HTTP, {figure}", web, "ms"),
                Row(f"  the same without HTTP, {figure}", plain, "ms"),
                Row(f"  HTTP adds, {figure}", added, "ms", at_most(5)),
            ]
    return rows


async def _run(
    folder: Path,
    requests: int,
    direct: dict[str, list[list[float]]],
    through: dict[str, list[list[float]]],
) -> None:
    async with AsyncExitStack() as stack:
        runtime = AsyncAgentSessionManager(folder / "state")
        sessions = SessionManager(runtime.manager)
        _answering(runtime, sessions)
        await stack.enter_async_context(runtime)
        await runtime.agents.create("guide", agent_type="guide")
        client = await _client(stack, LiveBackend(runtime=runtime, sessions=sessions))
        session = (await sessions.create()).session.session_id
        ways: list[tuple[Ask, list[float]]] = []
        for name, asks in _asks(runtime, sessions, client, session).items():
            for ask, kept in zip(asks, (direct[name], through[name]), strict=True):
                kept.append([])
                ways.append((ask, kept[-1]))
        for ask, _ in ways:
            await ask("warm")
        for number in range(requests):
            # Turn by turn, so that what the machine does meanwhile is everybody's.
            for ask, kept_ms in ways if number % 2 else ways[::-1]:
                began = time.perf_counter()
                await ask(f"message {number}")
                kept_ms.append((time.perf_counter() - began) * 1e3)


def _answering(runtime: AsyncAgentSessionManager, sessions: SessionManager) -> None:
    @runtime.handler("guide")
    async def guide(_: TaskContext, task: Task) -> str:
        said = f"you said: {task.payload['text']}"
        await sessions.conversations.add(task.payload["session"], _GUIDE, "assistant", said)
        return said


async def _client(stack: AsyncExitStack, backend: LiveBackend) -> httpx.AsyncClient:
    address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    app = create_app(backend, tokens=[TOKEN])
    server = asyncio.create_task(serve(app, port=0, on_start=address.set_result))

    async def stop() -> None:
        server.cancel()
        await asyncio.wait([server])

    stack.push_async_callback(stop)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    return await stack.enter_async_context(
        httpx.AsyncClient(base_url=await address, headers=headers, timeout=30)
    )


def _asks(
    runtime: AsyncAgentSessionManager,
    sessions: SessionManager,
    client: httpx.AsyncClient,
    session: str,
) -> dict[str, tuple[Ask, Ask]]:
    """Each without HTTP and with it."""

    async def message(text: str) -> None:
        await sessions.conversations.add(session, _GUIDE, "user", text)

    async def message_http(text: str) -> None:
        path = f"/api/global/session/{session}/conversations/{_GUIDE}/messages"
        answer = await client.post(path, json={"content": text})
        assert answer.status_code == 201

    def work(text: str) -> dict[str, Any]:
        return {"session": session, "text": text}

    async def chat(text: str) -> None:
        task = await runtime.tasks.submit("guide", "answer", work(text))
        assert await runtime.tasks.result(task) == f"you said: {text}"

    async def chat_http(text: str) -> None:
        body = {"name": "answer", "payload": work(text)}
        answer = await client.post("/api/agents/guide/tasks", params={"wait": 20}, json=body)
        assert answer.json()["result"] == f"you said: {text}"

    return {"message": (message, message_http), "chat": (chat, chat_http)}
