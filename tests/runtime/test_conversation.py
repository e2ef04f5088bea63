"""What handlers do to a conversation, and what of it is stored."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from agent_state import (
    AsyncAgentSessionManager,
    MemoryStateStore,
    Task,
    TaskContext,
)

LONG = "x" * 1000


def said(history: list[Any]) -> list[Any]:
    return [each["content"] for each in history]


class _Program:
    """Does to a conversation, in a handler, what a task's payload lists; counts what it says."""

    def __init__(self) -> None:
        self.count = 0

    def say(self) -> str:
        self.count += 1
        return f"{self.count} {LONG}"

    async def run(self, ctx: TaskContext, task: Task) -> None:
        for number, what in enumerate(task.payload["does"]):
            if what == "turn":
                ctx.add_turn("user", self.say())
            elif what == "list":
                content = [self.say()]
                ctx.add_turn("user", content)
                content.append("said later")
            elif what == "read":
                ctx.history.append({"role": "user", "content": self.say()})
            elif what == "change" and ctx.history:
                ctx.history[len(ctx.history) // 2]["content"] = self.say()
            elif what == "forget":
                del ctx.history[:2]
            elif what == "checkpoint":
                await ctx.checkpoint({"at": number})
            elif what == "step":
                await ctx.step(f"step {number}", lambda: self._inside(ctx))
            elif what == "thread":
                await ctx.step(f"thread {number}", lambda: ctx.add_turn("user", self.say()))
            elif what == "side by side":
                outside = ctx.step(f"side {number}", lambda: self._inside(ctx))
                await asyncio.gather(outside, self._inside(ctx))
            elif what == "fail":
                raise ValueError("as it was told")

    async def _inside(self, ctx: TaskContext) -> None:
        ctx.add_turn("user", self.say())
        await asyncio.sleep(0)
        ctx.add_turn("user", self.say())


class _Expected:
    """The same for a list."""

    def __init__(self) -> None:
        self.count = 0
        self.stored: list[Any] = []

    def say(self) -> str:
        self.count += 1
        return f"{self.count} {LONG}"

    def run(self, does: list[str]) -> None:
        now = [*self.stored]
        for what in does:
            if what in ("turn", "read", "thread"):
                now.append(self.say())
            elif what == "list":
                now.append([self.say()])
            elif what == "change" and now:
                now[len(now) // 2] = self.say()
            elif what == "forget":
                del now[:2]
            elif what == "step":
                now += [self.say(), self.say()]
            elif what == "side by side":
                now += [self.say(), self.say(), self.say(), self.say()]
            elif what == "checkpoint":
                self.stored = [*now]
            elif what == "fail":
                return
        self.stored = now


_WHAT = ["turn", "turn", "list", "read", "change", "forget", "checkpoint", "step", "thread"]
_TASKS = st.lists(
    st.lists(st.sampled_from([*_WHAT, "side by side", "fail"]), max_size=7), max_size=6
)


@settings(deadline=None)
@given(tasks=_TASKS)
async def test_what_handlers_say_is_stored(tasks: list[list[str]]) -> None:
    store, expected, program = MemoryStateStore(), _Expected(), _Program()
    for turn, does in enumerate(tasks):
        runtime = AsyncAgentSessionManager(store=store)
        runtime.handler("speaker")(program.run)
        async with runtime:
            await runtime.agents.create("ann", agent_type="speaker")
            await runtime.tasks.submit("ann", f"turn {turn}", {"does": does}, max_attempts=1)
            await runtime.wait_idle()
            expected.run(does)
            agent = runtime.agents.get("ann")
            assert said(agent.context.conversation_history) == expected.stored
            stored = await runtime.manager.load_agent_state("ann")
        assert stored is not None
        assert said(stored.context.conversation_history) == expected.stored


async def test_what_is_given_out_can_be_changed() -> None:
    runtime = AsyncAgentSessionManager(store=MemoryStateStore())

    @runtime.handler("speaker")
    async def speak(ctx: TaskContext, task: Task) -> None:
        ctx.add_turn("user", [LONG, *task.payload["words"]])

    async with runtime:
        await runtime.agents.create("ann", agent_type="speaker")
        for number in range(9):
            await runtime.tasks.result(await runtime.tasks.submit("ann", "a", {"words": [number]}))
            history = runtime.agents.get("ann").context.conversation_history
            history[0]["content"].append("by who was given it")
            history.clear()
        stored = await runtime.manager.load_agent_state("ann")
    assert stored is not None
    assert said(stored.model_dump()["context"]["conversation_history"]) == [
        [LONG, number] for number in range(9)
    ]


_GROWS = ["turn", "turn", "list", "read", "checkpoint", "step", "thread", "side by side", "fail"]


@settings(deadline=None)
@given(
    tasks=st.lists(st.lists(st.sampled_from(_GROWS), max_size=7), max_size=6),
    window=st.integers(1, 9),
)
async def test_a_part_of_the_conversation_is_in_memory(tasks: list[list[str]], window: int) -> None:
    store, expected, program = MemoryStateStore(), _Expected(), _Program()
    for turn, does in enumerate(tasks):
        runtime = AsyncAgentSessionManager(store=store, history_window=window)
        runtime.handler("speaker")(program.run)
        async with runtime:
            agent = await runtime.agents.create("ann", agent_type="speaker")
            restored = agent.context.conversation_history
            assert said(restored) == expected.stored[len(expected.stored) - len(restored) :]
            assert len(restored) in (window, len(expected.stored))
            for part in (does[::2], does[1::2]):
                await runtime.tasks.submit("ann", f"{turn}", {"does": part}, max_attempts=1)
                before = program.count
                await runtime.wait_idle()
                expected.run(part)
                memory = runtime.agents.get("ann").context
                history, start = memory.conversation_history, memory.conversation_history_offset
                assert said(history) == expected.stored[start:]
                assert len(history) < 2 * window + program.count - before + 1
            stored = [each async for each in runtime.manager.read_history("ann")]
            assert said(stored) == expected.stored
            assert await runtime.reconciler.check() == 0
