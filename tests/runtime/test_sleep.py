"""Sleep, and the events that end it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from typing import Any

import pytest

from agent_state import (
    AsyncAgentSessionManager,
    MailMessage,
    MemoryStateStore,
    SleepState,
    StateValidationError,
    StorageFullError,
    Task,
    TaskContext,
)
from agent_state.models import WakeEvent
from agent_state.protocols import Delete
from agent_state.runtime import sleep as rules
from agent_state.runtime.mailbox import Mailbox
from agent_state.testing import FakeClock
from tests.deadlines import soon, until
from tests.runtime.runtimes import (
    TroubledStore,
    counted,
    make_runtime,
    puts,
    working,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def mail(priority: str = "normal", status: str = "unread") -> MailMessage:
    return MailMessage(message_id="m", priority=priority, status=status)


@pytest.mark.parametrize(
    ("events", "message", "event"),
    [
        (["mail_received"], mail("low"), "mail_received"),
        (["high_priority_mail"], mail("high"), "high_priority_mail"),
        (["high_priority_mail"], mail("urgent"), "high_priority_mail"),
        (["high_priority_mail"], mail("normal"), None),
        (["system_event"], mail("urgent"), None),
        (["mail_received"], mail(status="read"), None),
        ([], mail("urgent"), None),
    ],
)
def test_which_mail_wakes_whom(
    events: list[WakeEvent], message: MailMessage, event: str | None
) -> None:
    sleep = rules.fall_asleep("alice", now=NOW, wake_on=events)
    assert rules.woken_by_mail(sleep, message) == event


@pytest.mark.parametrize(
    "wish",
    [
        {"wake_on": ["sunrise"]},
        {"seconds": -1},
        {"seconds": float("nan")},
        {"seconds": 1, "until": NOW},
    ],
)
def test_a_sleep_that_makes_no_sense_is_refused(wish: dict[str, object]) -> None:
    with pytest.raises(StateValidationError):
        rules.fall_asleep("alice", now=NOW, **wish)  # type: ignore[arg-type]


def sleeper(
    store: MemoryStateStore | None = None, clock: FakeClock | None = None
) -> AsyncAgentSessionManager:
    runtime = make_runtime(store, clock)

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> str:
        return "done"

    return runtime


async def test_a_sleeping_agent_works_only_when_its_time_has_come() -> None:
    clock = FakeClock()
    async with sleeper(clock=clock) as runtime:
        await runtime.agents.create("alice", agent_type="worker")
        await runtime.agents.sleep("alice", seconds=3600)
        task = await runtime.tasks.submit("alice", "x")
        await clock.advance(3599)
        assert (await runtime.tasks.get(task)).status == "pending"
        assert runtime.agents.get("alice").status == "sleeping"
        stored = await runtime.manager.load_sleep_state("alice")
        assert stored is not None
        assert stored.is_sleeping
        await clock.advance(2)
        assert await runtime.tasks.result(task) == "done"
        assert await runtime.manager.load_sleep_state("alice") is None


async def test_each_event_wakes_who_waits_for_it() -> None:
    async with sleeper() as runtime:
        waits_for: dict[str, WakeEvent] = {
            "a": "mail_received",
            "b": "system_event",
            "c": "manual_wake",
        }
        for name, event in waits_for.items():
            await runtime.agents.create(name, agent_type="worker")
            await runtime.agents.sleep(name, wake_on=[event])
        assert await runtime.emit("system_event", {"why": "deploy"}) == 1
        await runtime.mail.send("x", "a", subject="hi")
        await runtime.mail.send("x", "b", subject="hi")
        assert await runtime.agents.wake("c")
        assert not await runtime.agents.wake("c")
        states = {name: runtime.agents.get(name) for name in "abc"}
        assert {name: state.status for name, state in states.items()} == dict.fromkeys(
            "abc", "idle"
        )
        woken = [state.metadata["woken_by"] for state in states.values()]
        assert woken == ["mail_received", "system_event", "manual_wake"]
        events = [
            entry.record["data"] async for entry in runtime.manager.read_log("system", "events")
        ]
        assert events == [{"why": "deploy"}]


async def test_old_unread_mail_lets_an_agent_sleep_and_new_mail_does_not() -> None:
    async with sleeper() as runtime:
        await runtime.agents.create("alice", agent_type="worker")
        await runtime.mail.send("bob", "alice", subject="old")
        await runtime.agents.sleep("alice", wake_on=["mail_received"])
        assert runtime.agents.get("alice").status == "sleeping"
        await runtime.mail.send("bob", "alice", subject="new")
        assert runtime.agents.get("alice").status == "idle"


async def test_mail_that_comes_between_looking_and_sleeping_is_not_missed() -> None:
    runtime = make_runtime()
    looked, go = asyncio.Event(), asyncio.Event()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> list[str]:
        found = [message.subject for message in await ctx.inbox()]
        if not found:
            looked.set()
            await go.wait()
            await ctx.sleep(wake_on=["mail_received"])
        return found

    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        task = await runtime.tasks.submit("alice", "wait for mail")
        await looked.wait()
        await runtime.mail.send("bob", "alice", subject="just now")
        go.set()
        assert await runtime.tasks.result(task) == ["just now"]
        assert (await runtime.tasks.get(task)).attempts == 1


async def test_overdue_sleepers_wake_at_the_restart_once() -> None:
    store, clock = MemoryStateStore(), FakeClock()
    runtime = sleeper(store, clock)
    await runtime.start()
    for name, seconds in (("early", 10), ("late", 10_000)):
        await runtime.agents.create(name, agent_type="worker")
        await runtime.agents.sleep(name, seconds=seconds)
    await runtime.abort()
    await clock.advance(60)

    runtime = sleeper(store, clock)
    report = await runtime.start()
    assert [(woken.agent_id, woken.reason) for woken in report.woken] == [("early", "time")]
    assert report.asleep == ["late"]
    await runtime.abort()
    again = sleeper(store, clock)
    assert (await again.start()).woken == []
    await again.stop()


async def test_mail_dropped_while_the_server_was_down_wakes_its_reader() -> None:
    store = MemoryStateStore()
    runtime = sleeper(store)
    await runtime.start()
    await runtime.agents.create("alice", agent_type="worker")
    await runtime.agents.sleep("alice", wake_on=["high_priority_mail"])
    await runtime.stop()

    runtime = sleeper(store)
    await runtime.manager.open()
    urgent = {"message_id": "m1", "subject": "look", "priority": "urgent", "status": "unread"}
    await runtime.manager.save("mail", ("alice", "m1"), urgent)
    report = await runtime.start()
    assert [(w.agent_id, w.reason) for w in report.woken] == [("alice", "high_priority_mail")]
    assert report.unread_mail == {"alice": 1}
    await runtime.stop()


async def test_a_clock_that_jumps_back_lets_nobody_sleep_for_ever() -> None:
    clock = FakeClock()
    async with sleeper(clock=clock) as runtime:
        await runtime.agents.create("alice", agent_type="worker")
        await runtime.agents.sleep("alice", seconds=60)
        await clock.advance(30)
        clock.jump(-3600)
        await clock.advance(3600 + 120)
        assert runtime.agents.get("alice").status == "idle"


async def test_a_clock_that_jumps_forward_wakes_within_half_a_minute() -> None:
    clock = FakeClock()
    async with sleeper(clock=clock) as runtime:
        await runtime.agents.create("alice", agent_type="worker")
        await runtime.agents.sleep("alice", seconds=7200)
        await until(lambda: clock.sleepers)
        clock.jump(7200)
        await clock.advance(31)
        assert runtime.agents.get("alice").status == "idle"


async def test_mail_sent_before_its_agent_fell_asleep_and_stored_after_wakes_it() -> None:
    store = TroubledStore()
    runtime = make_runtime(store)
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
        store.hold = puts("mail")
        sending = asyncio.create_task(runtime.mail.send("bob", "alice", subject="hi"))
        await store.held.wait()
        go.set()
        while await runtime.manager.load_sleep_state("alice") is None:
            await asyncio.sleep(0)
        store.gate.set()
        await sending

        assert await asyncio.wait_for(runtime.tasks.result(task), 60) == "read"


async def test_mail_that_comes_while_a_sleep_is_being_stored_leaves_no_sleep_behind() -> None:
    store = TroubledStore()
    runtime = make_runtime(store)

    @runtime.handler("reader")
    async def read(context: TaskContext, _: Task) -> str:
        inbox = await context.inbox()
        if not inbox:
            store.hold = puts("sleep")
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


async def test_a_sleeper_that_cannot_be_woken_keeps_nobody_else_asleep() -> None:
    clock = FakeClock()
    store = TroubledStore(clock)
    runtime = make_runtime(store, clock)
    working(runtime)
    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        await runtime.agents.create("bob", agent_type="worker")
        await runtime.agents.sleep("alice", seconds=10)
        await runtime.agents.sleep("bob", seconds=11)
        store.full = lambda change: isinstance(change, Delete) and change.key == ("alice",)
        await clock.advance(60)
        assert runtime.state.agents["bob"].sleep is None
        store.full = lambda _: False
        await clock.advance(60)
        assert runtime.state.agents["alice"].sleep is None


async def test_a_stopped_agent_that_mail_or_an_event_wakes_stays_stopped() -> None:
    runtime = make_runtime()
    async with runtime:
        await runtime.agents.create("alice", agent_type="none")
        await runtime.agents.stop("alice")
        for event in ("mail_received", "system_event"):
            await runtime.agents.sleep("alice", wake_on=[event])
            await runtime.mail.send("bob", "alice", subject="hi")
            await runtime.emit()
            assert await runtime.manager.load_sleep_state("alice") is None
            stored = await runtime.manager.load_agent_state("alice")
            assert stored is not None
            assert stored.status == "stopped"


async def test_a_sleep_that_is_not_stored_leaves_the_agent_awake() -> None:
    store = TroubledStore()
    runtime = make_runtime(store)
    working(runtime)
    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        store.full = puts("sleep")
        with pytest.raises(StorageFullError):
            await runtime.agents.sleep("alice", seconds=60)
        assert await soon(runtime.tasks.result(await runtime.tasks.submit("alice", "x"))) == "alice"


async def test_a_sleep_that_is_over_at_once_is_over_when_the_call_returns() -> None:
    runtime = make_runtime()
    async with runtime:
        await runtime.agents.create("alice", agent_type="none")
        await runtime.agents.sleep("alice", seconds=0)
        assert runtime.agents.get("alice").status == "waiting"


async def test_mail_stored_while_an_agent_without_handler_falls_asleep_wakes_it() -> None:
    store = TroubledStore()
    runtime = make_runtime(store)
    async with runtime:
        await runtime.agents.create("alice", agent_type="none")
        store.hold = puts("mail")
        sending = asyncio.create_task(runtime.mail.send("bob", "alice", subject="hi"))
        await store.held.wait()
        await runtime.agents.sleep("alice", wake_on=["mail_received"])
        store.gate.set()
        await sending
        assert await runtime.manager.load_sleep_state("alice") is None


# -- what a sleeper has seen -------------------------------------------------------------------


def named(number: int, status: str = "unread", **fields: Any) -> dict[str, Any]:
    name = f"m{number:04d}"
    return {"message_id": name, "timestamp": "2025-12-31T00:00:00Z", "status": status, **fields}


async def asleep_with_mail(
    store: MemoryStateStore, clock: FakeClock, unread: int, *, read: int = 0
) -> AsyncAgentSessionManager:
    """Return a started runtime whose agent sleeps until mail comes, and has unread mail."""
    runtime = sleeper(store, clock)
    await runtime.manager.open()
    await runtime.manager.save_agent_state("alice", {"agent_id": "alice", "agent_type": "worker"})
    for number in range(unread + read):
        status = "unread" if number < unread else "read"
        await runtime.manager.save("mail", ("alice", f"m{number:04d}"), named(number, status))
    await runtime.start()
    await runtime.agents.sleep("alice", wake_on=["mail_received"])
    return runtime


async def sleeps_after(
    store: MemoryStateStore, clock: FakeClock, change: Callable[[SleepState], None] = lambda _: None
) -> bool:
    """Whether the agent still sleeps after a restart."""
    runtime = sleeper(store, clock)
    await runtime.manager.open()
    sleep = await runtime.manager.load_sleep_state("alice")
    assert sleep is not None
    change(sleep)
    await runtime.manager.save_sleep_state("alice", sleep)
    report = await runtime.start()
    await runtime.stop()
    return report.asleep == ["alice"]


async def test_the_document_of_a_sleep_is_as_long_for_a_thousand_messages_as_for_one() -> None:
    sizes = []
    for unread in (1, 1000):
        store, clock = MemoryStateStore(), FakeClock()
        runtime = await asleep_with_mail(store, clock, unread)
        document = await store.get("sleep", ("alice",))
        assert document is not None
        sizes.append(len(document.body))
        await runtime.stop()
        assert await sleeps_after(store, clock)
    assert sizes[0] == sizes[1]


async def test_mail_that_comes_later_wakes_whatever_its_place_in_the_order() -> None:
    for name in ("a", "m0001b", "z"):  # before, among and after the mail that was seen
        for restart in (False, True):
            store, clock = MemoryStateStore(), FakeClock()
            runtime = await asleep_with_mail(store, clock, 3)
            late = {"message_id": name, "timestamp": "2025-12-31T00:00:00Z", "status": "unread"}
            if restart:
                await runtime.stop()
                await runtime.manager.open()
                await runtime.manager.save("mail", ("alice", name), late)
                await runtime.manager.close()
                assert not await sleeps_after(store, clock)
                continue
            await runtime.manager.save("mail", ("alice", name), late)
            stored = await runtime.manager.load_with_revision("mail", ("alice", name))
            assert stored is not None
            runtime.state.agents["alice"].apply_loaded(stored)
            await runtime.mail.send("bob", "nobody", subject="elsewhere")
            assert runtime.agents.get("alice").status == "sleeping"
            assert await runtime.agents._sleep.wake_if_due(runtime.state.agents["alice"])
            await runtime.stop()


async def test_mail_that_was_read_while_the_agent_slept_wakes_nobody() -> None:
    store, clock = MemoryStateStore(), FakeClock()
    runtime = await asleep_with_mail(store, clock, 3, read=2)
    await clock.advance(1)
    await runtime.mail.read("alice", "m0001")
    await runtime.mail.archive("alice", "m0002")
    await runtime.stop()
    assert await sleeps_after(store, clock)


async def test_mail_that_was_changed_by_hand_wakes_once_too_often_rather_than_never() -> None:
    store, clock = MemoryStateStore(), FakeClock()
    runtime = await asleep_with_mail(store, clock, 3)
    await runtime.manager.delete("mail", ("alice", "m0001"))
    await runtime.stop()
    assert not await sleeps_after(store, clock)


async def test_the_list_that_older_versions_stored_is_read() -> None:
    def as_before(seen: list[str], sleep: SleepState) -> None:
        sleep.seen_mail, sleep.mail_seen = None, seen

    for seen, sleeps in ((["m0000", "m0001"], True), (["m0001"], False)):
        store, clock = MemoryStateStore(), FakeClock()
        runtime = await asleep_with_mail(store, clock, 2)
        await runtime.stop()
        assert await sleeps_after(store, clock, partial(as_before, seen)) is sleeps


async def test_the_digest_that_older_versions_stored_is_read() -> None:
    digest = sha256(b"".join(b"5:%b" % name for name in (b"m0000", b"m0001"))).hexdigest()[:32]

    def as_before(sleep: SleepState) -> None:
        assert sleep.seen_mail is not None
        sleep.seen_mail.digest = digest

    for number, sleeps in ((2, True), (1, False)):
        store, clock = MemoryStateStore(), FakeClock()
        runtime = await asleep_with_mail(store, clock, number)
        await runtime.stop()
        assert await sleeps_after(store, clock, as_before) is sleeps


def asleep_again(runtime: AsyncAgentSessionManager, naps: list[int], times: int) -> bool:
    return len(naps) == times and runtime.state.agents["alice"].sleep is not None


async def test_falling_asleep_looks_at_no_message_that_is_unread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a handler and outside of it: a thousand sleeps with a thousand messages are no million."""
    runtime = make_runtime()
    naps: list[int] = []

    @runtime.handler("reader")
    async def reader(ctx: TaskContext, task: Task) -> None:
        naps.append(len(naps))
        await ctx.sleep(wake_on=["mail_received"])

    async with runtime:
        await runtime.agents.create("alice", agent_type="reader")
        for number in range(20):
            await runtime.mail.send("bob", "alice", subject=f"{number}")
        with monkeypatch.context() as watched:
            watched.setattr(Mailbox, "unread", lambda _: pytest.fail("all were looked at"))
            await runtime.tasks.submit("alice", "nap")
            for number in range(1, 4):
                await until(partial(asleep_again, runtime, naps, number))
                await runtime.mail.send("bob", "alice", subject="wake up")
            await until(lambda: len(naps) == 4)
        await runtime.agents.wake("alice")


async def test_a_handler_is_woken_by_what_it_has_not_looked_at() -> None:
    """Mail beyond the limit of its last look counts as new, as does mail that came since."""
    runtime = make_runtime()
    read: list[list[str]] = []

    @runtime.handler("reader")
    async def reader(ctx: TaskContext, task: Task) -> None:
        found = await ctx.inbox(limit=2)
        read.append([message.subject for message in found])
        for message in found:
            await ctx.read_mail(message.message_id)
        if "stop" not in read[-1]:
            await ctx.sleep(wake_on=["mail_received"])

    async with runtime:
        await runtime.agents.create("alice", agent_type="reader")
        for subject in "abc":
            await runtime.mail.send("bob", "alice", subject=subject)
        task = await runtime.tasks.submit("alice", "read")
        await until(lambda: runtime.state.agents["alice"].sleep is not None and len(read) == 2)
        await runtime.mail.send("bob", "alice", subject="stop")
        await soon(runtime.tasks.result(task))
    assert read == [["a", "b"], ["c"], ["stop"]]


async def test_what_sleep_and_mail_for_a_sleeper_cost_grows_no_faster_than_the_mail() -> None:
    async def cost(unread: int) -> tuple[int, int, int]:
        runtime = sleeper()
        async with runtime:
            await runtime.agents.create("alice", agent_type="worker")
            for n in range(unread):
                await runtime.mail.send("bob", "alice", subject=f"{n}")
            agent, fell, came = runtime.state.agents["alice"], 0, 0
            with counted() as calls:
                await runtime.agents.sleep("alice", wake_on=["high_priority_mail"])
            fell = calls()
            with counted() as calls:
                for _ in range(10):
                    await runtime.mail.send("bob", "alice", subject="more")
            came = calls()
            with counted() as calls:
                for _ in range(10):
                    assert rules.wake_reason(agent, runtime.state.clock.now()) is None
            return fell, came, calls()

    few, many = await cost(50), await cost(1000)
    assert many[0] < 25 * few[0]  # 20 times the mail
    assert many[1] < 1.5 * few[1]
    assert many[2] == few[2]


async def test_marking_all_mail_costs_no_more_for_each_the_more_there_is() -> None:
    async def cost(unread: int) -> int:
        runtime, found = make_runtime(), []

        @runtime.handler("reader")
        async def reader(ctx: TaskContext, task: Task) -> None:
            with counted() as calls:
                for message in await ctx.inbox():
                    await ctx.read_mail(message.message_id)
                assert await ctx.inbox() == []
                await ctx.checkpoint({})
            found.append(calls())

        async with runtime:
            await runtime.agents.create("alice", agent_type="reader")
            for n in range(unread):
                await runtime.mail.send("bob", "alice", subject=f"{n}")
            await soon(runtime.tasks.result(await runtime.tasks.submit("alice", "read")))
        return found[0]

    assert await cost(500) < 14 * await cost(50)  # 10 times the mail
