"""Mail that is stored at the very moment in which its agent falls asleep."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from agent_state import AsyncAgentSessionManager, MemoryStateStore
from agent_state.models import Task
from agent_state.protocols import Change, Put
from agent_state.runtime import TaskContext


class HeldStore(MemoryStateStore):
    """Holds back the commits that ``hold`` picks, until ``gate`` opens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.held = asyncio.Event()
        self.hold: Callable[[Change], bool] = lambda _: False

    async def commit(self, changes: Sequence[Change]) -> list[int]:
        if any(map(self.hold, changes)):
            self.held.set()
            await self.gate.wait()
        return await super().commit(changes)


def is_put(kind: str) -> Callable[[Change], bool]:
    return lambda change: isinstance(change, Put) and change.kind == kind


async def test_mail_sent_before_its_agent_fell_asleep_and_stored_after_wakes_it() -> None:
    store = HeldStore()
    runtime = AsyncAgentSessionManager(store=store)
    begun, go = asyncio.Event(), asyncio.Event()

    @runtime.handler("reader")
    async def read(context: TaskContext, _: Task) -> str:
        if not await context.inbox():
            begun.set()
            await go.wait()
            await context.sleep(wake_on=["mail_received"])
        return "read"

    async with runtime:
        await runtime.agents.create("alice", agent_type="reader")
        task = await runtime.tasks.submit("alice", "read")
        await begun.wait()
        store.hold = is_put("mail")
        sending = asyncio.create_task(runtime.mail.send("bob", "alice", subject="hi"))
        await store.held.wait()
        go.set()
        while await runtime.manager.load_sleep_state("alice") is None:
            await asyncio.sleep(0)
        store.gate.set()
        await sending

        assert await asyncio.wait_for(runtime.tasks.result(task), 60) == "read"


async def test_mail_that_comes_while_a_sleep_is_being_stored_leaves_no_sleep_behind() -> None:
    store = HeldStore()
    runtime = AsyncAgentSessionManager(store=store)

    @runtime.handler("reader")
    async def read(context: TaskContext, _: Task) -> str:
        inbox = await context.inbox()
        if not inbox:
            store.hold = is_put("sleep")
            await context.sleep(wake_on=["mail_received"])
        await context.archive_mail(inbox[0].message_id)
        return "read"

    async with runtime:
        await runtime.agents.create("alice", agent_type="reader")
        task = await runtime.tasks.submit("alice", "read")
        await store.held.wait()
        sending = asyncio.create_task(runtime.mail.send("bob", "alice", subject="hi"))
        await asyncio.sleep(0)
        store.gate.set()
        await sending

        assert await asyncio.wait_for(runtime.tasks.result(task), 60) == "read"
        assert await runtime.manager.load_sleep_state("alice") is None
