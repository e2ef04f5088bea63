"""A state directory with some of everything, and the handlers that made it; served to a browser.

``agent-state serve DIR --runtime tests.browser.sample:make`` runs its agents.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from agent_state import AsyncAgentSessionManager, Task, TaskContext
from agent_state.sessions import SessionManager
from agent_state.web import LiveBackend
from agent_state_integrations.recorder import Recorder

DOCUMENTS = ("report.pdf", "minutes.txt", "budget.csv")


def make(state: Path) -> LiveBackend:
    """Researchers work; writers have no handler here, so that their tasks wait."""
    runtime = AsyncAgentSessionManager(state)

    @runtime.handler("researcher")
    async def researcher(ctx: TaskContext, task: Task) -> Any:
        if task.name == "fetch":
            raise FileNotFoundError(f"there is no {task.payload['file']}")
        pages = await ctx.step("read", _read, task.payload.get("file", ""))
        words = await ctx.step("count", lambda: pages * 350)
        await ctx.checkpoint({"pages": pages})
        ctx.memory["last_file"] = task.payload.get("file")
        return {"pages": pages, "words": words}

    return LiveBackend(runtime=runtime)


def _read(file: str) -> int:
    return len(file)


async def fill(state: Path) -> str:
    """Fill the directory; the id of the session of ``ann``."""
    runtime = make(state).runtime
    assert runtime is not None
    async with runtime:
        for agent_id, agent_type in (
            ("ada", "researcher"),
            ("bela", "researcher"),
            ("cleo", "writer"),
            ("dina", "writer"),
        ):
            await runtime.agents.create(agent_id, agent_type=agent_type)
        sent = [
            await runtime.tasks.submit(agent, name, {"file": file}, max_attempts=1)
            for agent in ("ada", "bela")
            for name in ("summarize", "fetch")
            for file in DOCUMENTS
        ]
        await asyncio.gather(*map(runtime.tasks.result, sent), return_exceptions=True)
        for file in DOCUMENTS:
            await runtime.tasks.submit("cleo", "draft", {"file": file, "tone": "plain"})
        cancelled = await runtime.tasks.submit("dina", "draft", {"file": "old.txt"})
        await runtime.tasks.cancel(cancelled)
        await _write_mail(runtime)
        await runtime.agents.sleep("dina", seconds=3 * 3600, reason="waits for the review")
        session_id = await _talk(SessionManager(runtime.manager))
    await _record(state)
    (state / "agents" / "eve.json").write_text('{"agent_id": "eve", "status": ')
    return session_id


async def _record(state: Path) -> None:
    """What the agents said on ten days, more on some than on others."""
    said = ("The report is read.", "The budget does not add up.", "Which file is the last one?")
    async with Recorder(state) as recorder:
        await recorder.record_many(
            [
                {
                    "message_id": f"{day}-{number}",
                    "timestamp": f"2026-11-{day:02}T09:{number:02}:00Z",
                    "sender_id": ("ada", "bela", "cleo")[number % 3],
                    "conversation_id": f"report-{day % 4}",
                    "content": f"{said[(day + number) % 3]} ({day}.{number})",
                    "metadata": {
                        "usage": {"input_tokens": 900 + 40 * number, "output_tokens": 60 + day},
                        "model": ("model-large", "model-small")[number % 2],
                    },
                }
                for day in range(10, 20)
                for number in range(4 + day * 7 % 11)
            ]
        )


async def _write_mail(runtime: AsyncAgentSessionManager) -> None:
    asked = await runtime.mail.send(
        "ada", "cleo", subject="The report", body="Which pages matter to you?", expects_reply=True
    )
    await runtime.mail.reply("cleo", asked.message_id, "The first three, and the table on page 9.")
    await runtime.mail.send(
        "bela", "ada", subject="Budget", body={"file": "budget.csv", "rows": 40}
    )
    await runtime.mail.send("cleo", "dina", subject="Draft", body="It is in the file.")


async def _talk(sessions: SessionManager) -> str:
    made = await sessions.create("ann", context={"page": "upload"})
    await sessions.create(None)
    session_id = made.session.session_id
    for role, content in (
        ("user", "Help me upload a file."),
        ("assistant", "Of course. Which one is it?"),
        ("user", "The minutes of Tuesday."),
    ):
        await sessions.conversations.add(session_id, "guide_agent", role, content)
    await sessions.update(session_id, {"files": 1, "step": "choose"})
    return session_id
