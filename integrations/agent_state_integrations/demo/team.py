"""The agents. A handler may be killed at any line; it then starts again from the beginning."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from agent_state.models import Task
from agent_state.runtime import AsyncAgentSessionManager, TaskContext
from agent_state_integrations.demo import analysis, files

PLANNER, REPORTER = "planner", "reporter"
READERS = tuple(f"reader-{number}" for number in range(1, 5))
AGENTS = (PLANNER, *READERS, REPORTER)


@dataclass(frozen=True, slots=True)
class Job:
    """The folder to read, and the paths to write. ``pause``: minimum seconds for a file."""

    folder: Path
    state: Path
    report: Path
    pause: float


Notify = Callable[..., None]
"""Called with the name of an event and its facts, once they are stored."""


def register_handlers(runtime: AsyncAgentSessionManager, job: Job, notify: Notify) -> None:
    """Register the handlers."""

    @runtime.handler(PLANNER)
    async def plan(context: TaskContext, task: Task) -> int:
        names = await context.step("list the files", files.text_files, job.folder, job.state)
        for number, name in enumerate(names):
            reader = READERS[number % len(READERS)]
            request = {"file": name, "task": task.task_id}
            # Both have a dedupe key, so that a second attempt, which starts at the first file
            # again, sends and queues nothing twice.
            mail = await context.send_mail(
                reader, subject=f"please read {name}", body=request, dedupe_key=f"{number:03d}"
            )
            notify("mail", to=reader, id=mail.message_id)
            queued = await context.submit(
                reader, "read", {"file": name, "mail": mail.message_id}, dedupe_key=name
            )
            notify("task", agent=reader, id=queued.task_id)
            await asyncio.sleep(job.pause / 8)
        mail = await context.send_mail(
            REPORTER, subject="how many", body={"files": len(names)}, dedupe_key="all"
        )
        notify("mail", to=REPORTER, id=mail.message_id)
        return len(names)

    @runtime.handler("reader")
    async def read(context: TaskContext, task: Task) -> analysis.Analysis:
        name = task.payload["file"]
        found: analysis.Analysis = await context.step(
            "read and analyse", files.read_and_analyse, job.folder, name
        )
        await asyncio.sleep(job.pause)
        context.memory.setdefault("words", {})[name] = found["words"]
        mail = await context.send_mail(REPORTER, subject=f"{name} is read", body=found)
        notify("read", to=REPORTER, id=mail.message_id)
        await context.archive_mail(task.payload["mail"])
        return found

    @runtime.handler(REPORTER)
    async def report(context: TaskContext, task: Task) -> dict[str, int]:
        inbox = await context.inbox()
        if "findings" not in task.progress:
            total = next((mail.body["files"] for mail in inbox if mail.subject == "how many"), None)
            findings = [mail.body for mail in inbox if mail.subject != "how many"]
            if total is None or len(findings) < total:
                await context.sleep(
                    wake_on=["mail_received"],
                    reason=f"{len(findings)} of {total or 'an unknown number of'} replies are here",
                )
            await context.checkpoint({"findings": findings})
        # A next attempt continues from here, even if a part of the inbox is archived.
        findings = context.progress["findings"]
        await context.step("write report.md", write_report, job.report, findings)
        for mail in inbox:
            await context.archive_mail(mail.message_id)
        return {"files": len(findings)}


async def set_up(runtime: AsyncAgentSessionManager) -> Task:
    """Create the agents and their first tasks, unless a former run did. Returns the last task."""
    for agent_id in AGENTS:
        kind = "reader" if agent_id in READERS else agent_id
        await runtime.agents.create(agent_id, agent_type=kind)
    last = await runtime.tasks.submit(REPORTER, "write the report", dedupe_key="the report")
    await runtime.tasks.submit(PLANNER, "plan", dedupe_key="the plan")
    return last


def write_report(path: Path, findings: list[analysis.Analysis]) -> int:
    """Write the report atomically; the number of its files."""
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_text(analysis.report(findings), encoding="utf-8", newline="\n")
    temporary.replace(path)
    return len(findings)
