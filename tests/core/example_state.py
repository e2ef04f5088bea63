"""The story behind the example in `state/`: the same under the same clock, byte for byte.

`python -m tests.core.example_state DIRECTORY` writes it.
"""

from __future__ import annotations

import asyncio
import random
import sys
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

from agent_state import AsyncAgentSessionManager, RetryPolicy, Task, TaskContext
from agent_state.testing import FakeClock

TEXT = "Agents must not forget.\nServers die all the same.\n"


async def write(root: Path) -> None:
    """Live a small day of three agents, and leave its state in ``root``."""
    clock = FakeClock(datetime(2026, 1, 5, 9, 0, tzinfo=UTC))
    numbers = count(1)
    runtime = AsyncAgentSessionManager(
        root,
        clock=clock,
        new_id=lambda: f"{next(numbers):04d}",
        random=random.Random(1),
        retry=RetryPolicy(jitter=0),
        save_interval_seconds=86_400,
    )

    @runtime.handler("reader")
    async def reader(ctx: TaskContext, task: Task) -> object:
        if task.name == "fetch":
            raise ConnectionError("no network today")
        words = await ctx.step("count", lambda text: len(text.split()), task.payload["text"])
        ctx.memory["words_read"] = ctx.memory.get("words_read", 0) + words
        ctx.add_turn("assistant", f"{task.payload['file']} has {words} words.")
        await ctx.checkpoint({"counted": True})
        await ctx.send_mail("Alice", subject=f"{task.payload['file']} is read", body=words)
        return {"words": words}

    async with runtime:
        await runtime.agents.create(
            "Alice",
            agent_type="planner",
            name="Alice",
            system_prompt="You plan the work of the others.",
            configuration={"model": "small-1", "temperature": 0.2},
            tool_sets=["files"],
        )
        await runtime.agents.create("bob", agent_type="reader", name="Bob")
        await runtime.agents.create("carol", agent_type="reporter", name="Carol")

        old = await runtime.tasks.submit("bob", "read", {"file": "old.md", "text": TEXT})
        await runtime.tasks.result(old)
        await clock.advance(48 * 3600)
        await runtime.cleanup_old_states(max_age_hours=24)

        await runtime.tasks.submit("bob", "read", {"file": "a.md", "text": TEXT}, priority="high")
        await runtime.tasks.submit("bob", "fetch", {"url": "https://example.org"}, max_attempts=1)
        await runtime.tasks.submit(
            "bob", "read", {"file": "b.md", "text": TEXT}, delay_seconds=7200
        )
        await runtime.wait_idle()
        await clock.advance(60)
        first = runtime.mail.inbox("Alice")[0]
        await runtime.mail.read("Alice", first.message_id)
        question = await runtime.mail.send(
            "Alice", "carol", subject="Report?", body="By noon, please.", expects_reply=True
        )
        await runtime.mail.reply("carol", question.message_id, "It will be there.")
        await clock.advance(60)
        await runtime.agents.sleep(
            "carol", seconds=3600, wake_on=["high_priority_mail", "system_event"], reason="waiting"
        )
        await runtime.emit("system_event", {"note": "lunch"})
        await runtime.manager.flush()  # else the next sleep goes on counting where this one ended
        await runtime.agents.sleep(
            "carol", seconds=3600, wake_on=["mail_received"], reason="waiting"
        )


if __name__ == "__main__":
    asyncio.run(write(Path(sys.argv[1])))
