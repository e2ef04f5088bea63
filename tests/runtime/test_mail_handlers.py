"""Handlers of mail: each unread message is a task of its own."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agent_state import (
    AsyncAgentSessionManager,
    MailMessage,
    MemoryStateStore,
    RetryPolicy,
    Task,
    TaskContext,
)
from agent_state.models import meaning_of
from agent_state.testing import FakeClock
from tests.deadlines import until
from tests.runtime.runtimes import (
    RecordingStore,
    TroubledStore,
    edit,
    make_runtime,
    puts,
    with_agent,
)

AT_ONCE = RetryPolicy(base_seconds=0.0, jitter=0.0)


def reading(runtime: AsyncAgentSessionManager, ran: list[str], **options: Any) -> None:
    """Register a handler of mail that adds each subject to ``ran`` and to memory."""

    @runtime.on_mail("worker", **options)
    async def read(ctx: TaskContext, message: MailMessage) -> str:
        ran.append(message.subject)
        ctx.memory.setdefault("subjects", []).append(message.subject)
        if message.body == "bad":
            raise ConnectionError("cannot be read")
        return message.subject


async def handled(runtime: AsyncAgentSessionManager) -> list[Task]:
    return [task for task in await runtime.tasks.list("alice") if task.name == "on_mail"]


async def test_each_message_is_handled_once_in_its_order_and_is_read_then() -> None:
    runtime = make_runtime()
    ran: list[str] = []
    reading(runtime, ran)
    await with_agent(runtime)
    await runtime.agents.stop("alice")
    for subject, priority in (("second", "normal"), ("third", "normal"), ("first", "urgent")):
        await runtime.mail.send("bob", "alice", subject=subject, priority=priority)  # type: ignore[arg-type]
    await runtime.agents.start("alice")
    await runtime.wait_idle()
    assert ran == ["first", "second", "third"]
    assert runtime.mail.inbox("alice") == []
    assert runtime.agents.get("alice").context.working_memory == {"subjects": ran}
    assert [task.result for task in await handled(runtime)] == ran
    await runtime.stop()


async def test_mail_that_waited_from_before_the_handler_or_the_start_is_handled() -> None:
    store = MemoryStateStore(clock=FakeClock())
    before = make_runtime(store)
    await with_agent(before)
    await before.mail.send("bob", "alice", subject="early")
    await before.stop()
    ran: list[str] = []
    after = make_runtime(store, name="later")
    await after.start()
    await after.mail.send("bob", "alice", subject="late")
    await after.wait_idle()
    reading(after, ran)
    await after.wait_idle()
    assert ran == ["early", "late"]
    await after.stop()


async def test_a_message_that_another_program_put_there_is_handled() -> None:
    runtime = make_runtime()
    ran: list[str] = []
    reading(runtime, ran)
    await with_agent(runtime)
    await edit(runtime, "mail", ("alice", "m1"), message_id="m1", to_agent="alice", subject="file")
    await runtime.wait_idle()
    assert ran == ["file"]
    await runtime.stop()


async def test_the_first_attempt_stores_its_task_and_the_mark_in_one_commit() -> None:
    store = RecordingStore()
    runtime = make_runtime(store)
    reading(runtime, [])
    await with_agent(runtime)
    await runtime.mail.send("bob", "alice", subject="one")
    await runtime.wait_idle()
    commits = [sorted(change.kind for change in commit) for commit in store.commits]
    assert commits[-3:] == [["mail"], ["agents", "mail", "tasks"], ["agents", "tasks"]]
    await runtime.stop()


async def test_a_message_whose_handler_fails_is_tried_again_and_its_task_ends_as_dead() -> None:
    store = MemoryStateStore(clock=FakeClock())
    runtime = make_runtime(store, retry=AT_ONCE)
    ran: list[str] = []
    reading(runtime, ran, max_attempts=2)
    await with_agent(runtime)
    await runtime.mail.send("bob", "alice", subject="odd", body="bad")
    await runtime.mail.send("bob", "alice", subject="good")
    await until(lambda: "good" in ran)
    await runtime.wait_idle()
    assert sorted(ran) == ["good", "odd", "odd"]
    statuses = {str(task.payload): task.status for task in await handled(runtime)}
    assert sorted(statuses.values()) == ["completed", "dead"]
    assert runtime.agents.get("alice").context.working_memory == {"subjects": ["good"]}
    await runtime.stop()

    after = make_runtime(store, name="after")
    reading(after, ran)
    await after.start()
    await after.wait_idle()
    assert len(ran) == 3  # a restart tries none of them again
    await after.stop()


async def test_a_message_whose_handler_was_interrupted_is_handled_again() -> None:
    store = MemoryStateStore(clock=FakeClock())
    before = make_runtime(store)
    started = asyncio.Event()

    @before.on_mail("worker")
    async def hang(ctx: TaskContext, message: MailMessage) -> None:
        started.set()
        await asyncio.Event().wait()

    await with_agent(before)
    await before.mail.send("bob", "alice", subject="again")
    await started.wait()
    await before.abort()
    after = make_runtime(store, name="after")
    ran: list[str] = []
    reading(after, ran)
    await after.start()
    await after.wait_idle()
    assert ran == ["again"]
    await after.stop()


async def test_mail_that_somebody_else_read_is_not_handled() -> None:
    runtime = make_runtime()
    ran: list[str] = []
    reading(runtime, ran)

    @runtime.task("hold", agent_type="worker")
    async def hold(ctx: TaskContext) -> None:
        started.set()
        await gate.wait()
        for message in await ctx.inbox():
            if message.subject == "mine":
                await ctx.read_mail(message.message_id)

    started, gate = asyncio.Event(), asyncio.Event()
    await with_agent(runtime)
    await runtime.tasks.submit("alice", "hold")
    await started.wait()
    await runtime.mail.send("bob", "alice", subject="mine")
    await runtime.mail.send("bob", "alice", subject="yours")
    gate.set()
    await runtime.wait_idle()
    assert ran == ["yours"]
    assert len(await handled(runtime)) == 1
    await runtime.stop()


async def test_a_handler_can_answer_the_message() -> None:
    runtime = make_runtime()

    @runtime.on_mail("worker")
    async def answer(ctx: TaskContext, message: MailMessage) -> None:
        await ctx.reply(message, "thanks")

    await with_agent(runtime)
    await runtime.agents.create("bob", agent_type="human")
    sent = await runtime.mail.send("bob", "alice", subject="hello", expects_reply=True)
    await runtime.wait_idle()
    assert [message.body for message in runtime.mail.inbox("bob")] == ["thanks"]
    assert meaning_of(runtime.mail.get("alice", sent.message_id).status) == "replied"
    assert runtime.mail.pending_replies("alice") == []
    await runtime.stop()


async def test_a_sleeper_handles_its_mail_when_it_is_awake() -> None:
    runtime = make_runtime()
    ran: list[str] = []
    reading(runtime, ran)
    await with_agent(runtime)
    await runtime.agents.sleep("alice")
    await runtime.mail.send("bob", "alice", subject="one")
    await runtime.wait_idle()
    assert ran == []
    await runtime.agents.wake("alice")
    await runtime.wait_idle()
    await runtime.agents.sleep("alice", wake_on=["mail_received"])
    await runtime.mail.send("bob", "alice", subject="two")
    await until(lambda: ran == ["one", "two"])
    await runtime.stop()


async def test_a_claim_whose_reply_was_lost_handles_the_message_once() -> None:
    store = TroubledStore()
    store.unknown = puts("tasks", "in_progress")
    runtime = make_runtime(store)
    ran: list[str] = []
    reading(runtime, ran)
    await with_agent(runtime)
    await runtime.mail.send("bob", "alice", subject="one")
    clock = runtime.state.clock
    assert isinstance(clock, FakeClock)
    await until(lambda: clock.sleepers > 0)
    await clock.advance(60)
    await until(lambda: ran == ["one"])
    await runtime.wait_idle()
    assert [task.status for task in await handled(runtime)] == ["completed"]
    assert runtime.mail.inbox("alice") == []
    await runtime.stop()


async def test_the_periodic_check_leaves_a_message_that_waits_alone() -> None:
    runtime = make_runtime()
    reading(runtime, [])

    @runtime.task("hold", agent_type="worker")
    async def hold(ctx: TaskContext) -> None:
        await gate.wait()

    gate = asyncio.Event()
    await with_agent(runtime)
    await runtime.mail.send("bob", "alice", subject="one")
    await runtime.wait_idle()
    await runtime.tasks.submit("alice", "hold")
    await runtime.mail.send("bob", "alice", subject="two")
    assert await runtime.reconciler.check() == 0
    assert len(await handled(runtime)) == 1
    gate.set()
    await runtime.stop()


@pytest.mark.parametrize("kind", ["handler", "task"])
async def test_another_handler_of_the_type_leaves_mail_alone(kind: str) -> None:
    runtime = make_runtime()

    async def worker(ctx: TaskContext, task: Task) -> None:
        raise AssertionError("there is no task")

    if kind == "handler":
        runtime.handler("worker")(worker)
    else:
        runtime.task("on_mail", agent_type="worker")(worker)
    await with_agent(runtime)
    await runtime.mail.send("bob", "alice", subject="one")
    await runtime.wait_idle()
    assert [message.subject for message in runtime.mail.inbox("alice")] == ["one"]
    await runtime.stop()
