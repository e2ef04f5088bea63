"""The crew's own test suite, with the fixtures of agent-state's pytest plugin."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from agent_state import AgentRuntime, Task, TaskFailedError
from agent_state.testing import CrashPoint, FakeClock, FakeLLM, read_state
from examples.crew import Crew

SECONDS = 60.0
Restart = Callable[..., Awaitable[AgentRuntime]]


class Shop:
    """A tool with an effect outside of the process: it survives a crash, and counts."""

    def __init__(self) -> None:
        self.orders: list[str] = []

    async def order(self, item: str) -> str:
        self.orders.append(item)
        return f"{item} is ordered"


@pytest.fixture
def shop() -> Shop:
    return Shop()


@pytest.fixture
async def crew(agent_runtime: AgentRuntime, fake_llm: FakeLLM, shop: Shop) -> Crew:
    crew = Crew(agent_runtime, fake_llm, {"order": shop.order})
    await crew.hire("ann", "buyer")
    return crew


async def test_a_member_uses_a_tool_and_answers(crew: Crew, fake_llm: FakeLLM, shop: Shop) -> None:
    fake_llm.call_tool("order", item="tea").reply("Tea is on its way.")

    assignment = await crew.assign("ann", "We are out of tea.")

    assert await crew.result(assignment) == "Tea is on its way."
    assert shop.orders == ["tea"]
    roles = [message["role"] for message in fake_llm.calls[-1]]
    assert roles == ["system", "user", "assistant", "tool"]
    assert fake_llm.calls[0][0]["content"] == "You are the buyer."


async def test_an_unknown_tool_is_told_to_the_model(crew: Crew, fake_llm: FakeLLM) -> None:
    fake_llm.call_tool("dance").reply("Then not.")
    assert await crew.result(await crew.assign("ann", "Dance!")) == "Then not."
    assert fake_llm.calls[-1][-1]["content"] == "There is no tool dance."


@pytest.mark.parametrize("commits", range(1, 6))
async def test_wherever_it_dies_nothing_is_asked_or_ordered_twice(
    commits: int,
    crew: Crew,
    fake_llm: FakeLLM,
    shop: Shop,
    crash_after: Callable[..., CrashPoint],
    restart: Restart,
) -> None:
    fake_llm.call_tool("order", item="tea").reply("Tea is on its way.")

    async with crash_after(commits=commits):
        await crew.result(await crew.assign("ann", "We are out of tea."))
    runtime = await restart(crew.runtime)

    [assignment] = await runtime.tasks.list("ann")
    assert await runtime.tasks.result(assignment) == "Tea is on its way."
    assert shop.orders == ["tea"]
    assert len(fake_llm.calls) == 2


async def test_a_slow_model_keeps_no_other_member_waiting(
    crew: Crew, fake_llm: FakeLLM, fake_clock: FakeClock
) -> None:
    fake_llm.reply("At last.", seconds=600).reply("At once.")
    await crew.hire("bob", "cook")

    slow = await crew.assign("ann", "Think!")
    await fake_clock.advance(1)
    quick = await crew.assign("bob", "Answer!")
    assert await crew.result(quick) == "At once."

    waiting = asyncio.ensure_future(crew.result(slow))
    await fake_clock.advance(598)
    assert not waiting.done()
    await fake_clock.advance(1)
    assert await waiting == "At last."


async def test_a_model_that_fails_is_asked_again(
    crew: Crew, fake_llm: FakeLLM, fake_clock: FakeClock
) -> None:
    fake_llm.fail(ConnectionError("busy")).reply("Yes.")
    waiting = asyncio.ensure_future(crew.result(await crew.assign("ann", "Well?")))
    await fake_clock.advance(SECONDS)
    assert await waiting == "Yes."


async def test_a_member_that_never_ends_is_stopped(crew: Crew, fake_llm: FakeLLM) -> None:
    for _ in range(10):
        fake_llm.call_tool("order", item="tea")
    assignment: Task = await crew.runtime.tasks.submit(
        "ann", "assignment", {"text": "Tea!"}, max_attempts=1
    )
    with pytest.raises(TaskFailedError, match="no answer after 10 turns"):
        await crew.result(assignment)


async def test_a_deploy_keeps_what_members_remember(
    crew: Crew, fake_llm: FakeLLM, restart: Restart, assert_restored_equal: Any
) -> None:
    fake_llm.reply("Hello.")
    await crew.result(await crew.assign("ann", "Say hello."))
    await crew.runtime.wait_idle()
    before = await read_state(crew.runtime)

    runtime = await restart(crew.runtime)

    await assert_restored_equal(before, runtime, ignore=["owner", "last_active", "updated_at"])
    assert runtime.agents.get("ann").context.working_memory == {"done": ["Say hello."]}


async def test_the_files_of_a_member(crew: Crew, fake_llm: FakeLLM, state_tree: Any) -> None:
    fake_llm.call_tool("order", item="tea").reply("Tea is on its way.")
    await crew.result(await crew.assign("ann", "We are out of tea."))
    await crew.runtime.wait_idle()
    await state_tree.check()
