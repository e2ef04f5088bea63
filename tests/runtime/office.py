"""A server with every option that docs/runtime.md names; tests/runtime/test_tutorial.py runs it."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from pydantic import BaseModel

from agent_state import (
    AgentRuntime,
    MailMessage,
    RateLimit,
    RestoreReport,
    RetryPolicy,
    Task,
    TaskContext,
    TaskFilter,
    TaskTimeoutError,
)

AT_ONCE = RetryPolicy(
    base_seconds=0.01, factor=1, max_seconds=0.01, jitter=0, not_retried=(PermissionError,)
)
CALLS = RateLimit("calls", 2, per_seconds=86_400)
TOKENS = RateLimit("tokens", 1000)

runtime = AgentRuntime(
    "state", grace_seconds=1, cancel_timeout_seconds=0.1, lease_seconds=60, retry=AT_ONCE
)


class Letter(BaseModel):
    """What ``write`` takes since its second version."""

    body: str
    language: str


def note(line: str) -> None:
    """Add a line to the diary."""
    with Path("diary").open("a", encoding="utf-8") as diary:
        diary.write(f"{line}\n")


async def until_there_is(name: str) -> None:
    """Wait for a file."""
    while not Path(name).exists():
        await asyncio.sleep(0.01)


@runtime.task("slow", agent_type="clerk", warn_after_seconds=0.1)
async def wait_for_a_signature(ctx: TaskContext) -> None:
    await until_there_is("signature")


@runtime.task("low", agent_type="clerk", priority="low")
async def tidy_up(ctx: TaskContext) -> None:
    note("low")


@runtime.task("high", agent_type="clerk", priority="high")
async def answer_the_phone(ctx: TaskContext) -> None:
    note("high")


@runtime.task("hang", agent_type="clerk", timeout_seconds=0.1, max_attempts=2)
async def hang(ctx: TaskContext) -> None:
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        await until_there_is("the end of time")  # it ignores its cancellation


@runtime.task("refuse", agent_type="clerk", max_attempts=5)
async def refuse(ctx: TaskContext) -> None:
    raise PermissionError("the key has expired")


@runtime.task("stamp", agent_type="clerk", concurrency=1)
async def stamp(ctx: TaskContext) -> None:
    note(f"takes the stamp: {ctx.agent_id}")
    await asyncio.sleep(0)
    note(f"gives it back: {ctx.agent_id}")


@runtime.task("call", agent_type="clerk", rate_limits=[CALLS])
async def call(ctx: TaskContext) -> None:
    note("calls")
    await ctx.take(TOKENS, 100)
    await ctx.take(TOKENS, -40, wait=False)


@runtime.task(
    "write",
    agent_type="clerk",
    version=2,
    migrations={1: lambda old: {"body": old["text"], "language": "en"}},
)
async def write(ctx: TaskContext, letter: Letter) -> str:
    return f"{letter.body} ({letter.language})"


@runtime.task("report", agent_type="clerk")
async def report(ctx: TaskContext) -> str:
    late = await ctx.submit("bob", "slow", delay_seconds=86_400, dedupe_key="the late one")
    try:
        await ctx.result(late, timeout_seconds=0.1)
    except TaskTimeoutError:
        await runtime.tasks.cancel(late)
    letter = await ctx.submit("bob", "write", Letter(body="Dear Ann", language="en"))
    return await ctx.result(letter, str)


@runtime.task("nap", agent_type="sleeper")
async def nap(ctx: TaskContext) -> None:
    if ctx.memory.setdefault("naps", 0) == 0:
        ctx.memory["naps"] += 1
        await ctx.sleep(seconds=86_400, wake_on=["mail_received"], reason="until there is mail")
    note(f"wakes, {ctx.configuration['mood']}")


@runtime.task("digest", agent_type="clerk")
async def digest(ctx: TaskContext, task: Task) -> None:
    if not ctx.memory.get("digests"):
        note(f"a digest for {task.payload['reader']}")
    ctx.memory["digests"] = ctx.memory.get("digests", 0) + 1


runtime.schedule(
    "digest", agent_id="carl", cron="* * * * * *", zone="Europe/Paris", payload={"reader": "dora"}
)


@runtime.on_mail("clerk")
async def read_mail(ctx: TaskContext, message: MailMessage) -> None:
    note(f"mail: {message.subject}")
    await ctx.reply(message, "read", priority="high")


@runtime.on_failure
async def count_failure(task: Task, error: BaseException | None) -> None:
    note(f"failed: {task.name} {type(error).__name__}")


@runtime.on_dead
def bury(task: Task, error: BaseException | None) -> None:
    note(f"dead: {task.name}")


@runtime.on_restore
async def greet(report: RestoreReport) -> None:
    note(f"restored: {len(report.agents)}")


async def follow() -> None:
    """Say what ends."""
    ended = TaskFilter(status=("dead", "completed"), name="refuse", agent_id="ann")
    async for task in runtime.tasks.watch(ended):
        note(f"watched: {task.name} {task.status}")


async def open_the_office() -> None:
    for name in ("ann", "bob", "carl"):
        await runtime.agents.create(name, agent_type="clerk")
    await runtime.agents.create("dora", agent_type="sleeper", configuration={"mood": "cheerful"})
    async with runtime, asyncio.TaskGroup() as group:
        group.create_task(follow())
        submit = runtime.tasks.submit
        for name in ("slow", "low", "high", "hang", "refuse"):
            await submit("ann", name, dedupe_key="first day", dedupe_seconds=86_400)
        for name in ("ann", "bob", "ann", "bob"):
            await submit(name, "stamp")
        calls = [await submit("bob", "call", dedupe_key=str(number)) for number in range(3)]
        await submit("bob", "report", priority="urgent", max_attempts=1, timeout_seconds=60)
        await submit("dora", "nap", dedupe_key="first day")
        await runtime.mail.send("ann", "bob", subject="an invoice")
        try:
            await runtime.tasks.result(calls[2].task_id, timeout_seconds=0.1)
        except TaskTimeoutError:
            note("the third call is late")
        await asyncio.Event().wait()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    asyncio.run(open_the_office())
