"""A server of real files that is killed, and started again by another deploy."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SERVER = """
import asyncio, sys
from pydantic import BaseModel
from agent_state import AsyncAgentSessionManager, MailMessage, TaskContext

DEPLOY = int(sys.argv[2])
runtime = AsyncAgentSessionManager(sys.argv[1])

if DEPLOY == 1:
    class Article(BaseModel):
        url: str

    @runtime.task("summarise", agent_type="writer")
    async def summarise(ctx: TaskContext, payload: Article) -> str:
        return await hang(ctx)
else:
    class Article(BaseModel):
        urls: list[str]
        language: str

    @runtime.task(
        "summarise", agent_type="writer", version=2,
        migrations={1: lambda old: {"urls": [old["url"]], "language": "en"}},
    )
    async def summarise(ctx: TaskContext, payload: Article) -> str:
        return f"{payload.urls} in {payload.language}, attempt {ctx.attempt}"

@runtime.on_mail("writer")
async def read(ctx: TaskContext, message: MailMessage) -> str:
    if DEPLOY == 1:
        await hang(ctx)
    return message.subject

async def hang(ctx):
    ctx.memory["lost"] = True
    print("running", flush=True)
    await asyncio.Event().wait()

async def main():
    async with runtime:
        await runtime.agents.create("ann", agent_type="writer")
        await runtime.agents.create("bob", agent_type="writer")
        if DEPLOY == 1:
            await runtime.tasks.submit("ann", "summarise", Article(url="x.org"), dedupe_key="one")
            await runtime.tasks.submit("ann", "summarise", Article(url="y.org"), dedupe_key="two")
            await runtime.mail.send("ann", "bob", subject="hello")
            await asyncio.Event().wait()
        await runtime.wait_idle()
        for agent in ("ann", "bob"):
            for task in await runtime.tasks.list(agent):
                print(task.name, task.result)
            print(runtime.agents.get(agent).context.working_memory)
        print(len(runtime.mail.inbox("bob")))

asyncio.run(main())
"""


@contextmanager
def server(state: Path, deploy: int) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, state, str(deploy)], stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def test_a_killed_server_is_continued_by_a_deploy_with_another_payload(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with server(state, 1) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    with server(state, 2) as process:
        said, _ = process.communicate()
        assert process.returncode == 0
    assert said.splitlines() == [
        "summarise ['x.org'] in en, attempt 2",
        "summarise ['y.org'] in en, attempt 1",
        "{}",
        "on_mail hello",
        "{}",
        "0",
    ]
