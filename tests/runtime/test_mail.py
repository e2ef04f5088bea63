"""Mail between agents."""

from __future__ import annotations

import asyncio

import pytest

from agent_state import (
    MemoryStateStore,
    StateNotFoundError,
    StateValidationError,
    Task,
    TaskContext,
)
from agent_state.testing import FakeClock
from tests.deadlines import until
from tests.runtime.runtimes import (
    TroubledStore,
    make_runtime,
    puts,
)


async def test_a_message_goes_from_unread_to_read_replied_and_archived() -> None:
    async with make_runtime() as runtime:
        for name in ("alice", "bob"):
            await runtime.agents.create(name, agent_type="person")
        sent = await runtime.mail.send(
            "alice", "bob", subject="lunch?", body="at noon", priority="high", expects_reply=True
        )
        assert [m.message_id for m in runtime.mail.inbox("bob")] == [sent.message_id]
        assert [m.subject for m in runtime.mail.pending_replies("bob")] == ["lunch?"]
        read = await runtime.mail.read("bob", sent.message_id)
        assert (read.status, runtime.mail.inbox("bob")) == ("read", [])
        answer = await runtime.mail.reply("bob", sent.message_id, "yes")
        assert (answer.subject, answer.reply_to) == ("Re: lunch?", sent.message_id)
        assert runtime.mail.pending_replies("bob") == []
        assert [m.body for m in runtime.mail.inbox("alice")] == ["yes"]
        assert runtime.mail.inbox("bob", status="replied")[0].replied_with == answer.message_id
        await runtime.mail.archive("bob", sent.message_id)
        assert runtime.mail.inbox("bob", status=None) == []
        assert [m.status for m in await runtime.mail.history("bob")] == ["archived"]


async def test_reading_again_changes_no_answered_and_no_archived_message() -> None:
    async with make_runtime() as runtime:
        for name in ("alice", "bob"):
            await runtime.agents.create(name, agent_type="person")
        answered = await runtime.mail.send("alice", "bob", subject="?")
        archived = await runtime.mail.send("alice", "bob", subject="old")
        await runtime.mail.reply("bob", answered.message_id, "yes")
        kept = await runtime.mail.archive("bob", archived.message_id)
        assert (await runtime.mail.read("bob", answered.message_id)).status == "replied"
        assert await runtime.mail.read("bob", archived.message_id) == kept
        assert [m.status for m in runtime.mail.inbox("bob", status=None)] == ["replied"]
        assert [m.status for m in await runtime.mail.history("bob")] == ["replied", "archived"]


async def test_a_reply_is_given_once() -> None:
    async with make_runtime() as runtime:
        for name in ("alice", "bob"):
            await runtime.agents.create(name, agent_type="person")
        sent = await runtime.mail.send("alice", "bob", subject="?")
        first = await runtime.mail.reply("bob", sent.message_id, "yes")
        second = await runtime.mail.reply("bob", sent.message_id, "no")
        assert (second.message_id, second.body) == (first.message_id, "yes")
        assert len(runtime.mail.inbox("alice")) == 1


async def test_mail_is_kept_for_an_agent_that_does_not_exist_yet() -> None:
    async with make_runtime() as runtime:
        await runtime.mail.send("alice", "carol", subject="welcome")
        await runtime.agents.create("carol", agent_type="person")
        assert [m.subject for m in runtime.mail.inbox("carol")] == ["welcome"]


async def test_a_known_message_id_is_delivered_once() -> None:
    async with make_runtime() as runtime:
        await runtime.agents.create("bob", agent_type="person")
        for _ in range(2):
            await runtime.mail.send("alice", "bob", subject="x", dedupe_key="m-1")
        assert [m.dedupe_key for m in runtime.mail.inbox("bob")] == ["m-1"]


async def test_mail_sent_by_a_handler_arrives_once_however_often_it_is_attempted() -> None:
    store, clock = MemoryStateStore(), FakeClock()

    async def run(last: bool) -> None:
        runtime = make_runtime(store, clock)

        @runtime.handler("worker")
        async def worker(ctx: TaskContext, task: Task) -> None:
            await ctx.send_mail("bob", subject="one")
            await ctx.send_mail("bob", subject="two")
            await ctx.submit("bob", "follow", {"up": True})
            if not last:
                await ctx.step("die here", never)

        await runtime.start()
        await runtime.agents.create("alice", agent_type="worker")
        await runtime.agents.create("bob", agent_type="person")
        task = await runtime.tasks.submit("alice", "tell bob", dedupe_key="k")
        if last:
            await runtime.tasks.result(task)
            assert sorted(m.subject for m in runtime.mail.inbox("bob")) == ["one", "two"]
            assert len(await runtime.manager.keys("tasks", "bob")) == 1
            await runtime.stop()
        else:
            await until(lambda: "die here" in started)
            started.clear()
            await runtime.abort()

    started: list[str] = []

    async def never() -> None:
        started.append("die here")
        await until(lambda: False)

    for last in (False, False, False, True):
        await run(last)


async def test_unknown_mail_and_priority_are_refused() -> None:
    async with make_runtime() as runtime:
        await runtime.agents.create("bob", agent_type="person")
        with pytest.raises(StateNotFoundError, match="no such message"):
            await runtime.mail.read("bob", "nothing")
        with pytest.raises(StateNotFoundError, match="no such agent"):
            runtime.mail.inbox("nobody")
        with pytest.raises(StateValidationError, match="priority 'loud'"):
            await runtime.mail.send("a", "bob", subject="x", priority="loud")  # type: ignore[arg-type]


async def test_history_holds_what_cleaning_up_has_moved_away() -> None:
    clock = FakeClock()
    async with make_runtime(clock=clock) as runtime:
        await runtime.agents.create("bob", agent_type="person")
        for subject in ("old", "unread"):
            await runtime.mail.send("alice", "bob", subject=subject)
        await runtime.mail.archive("bob", runtime.mail.inbox("bob")[0].message_id)
        await clock.advance(25 * 3600)
        report = await runtime.cleanup_old_states()
        assert len(report.mail) == 1
        assert [m.subject for m in await runtime.mail.history("bob")] == ["old", "unread"]
        assert [m.subject for m in runtime.mail.inbox("bob", status=None)] == ["unread"]


async def test_replies_to_one_message_sent_to_many_all_arrive() -> None:
    runtime = make_runtime()
    async with runtime:
        for agent_id in ("alice", "bob", "carol"):
            await runtime.agents.create(agent_id, agent_type="none")
        for to in ("alice", "bob"):
            sent = await runtime.mail.send("carol", to, subject="all", dedupe_key="news")
            await runtime.mail.reply(to, sent.message_id, f"yes, {to}")
        answers = sorted(mail.body for mail in runtime.mail.inbox("carol"))
        assert answers == ["yes, alice", "yes, bob"]


async def test_cleaning_up_one_agents_mail_leaves_another_ones_alone() -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock)
    async with runtime:
        await runtime.agents.create("a", agent_type="none")
        await runtime.agents.create("a/b", agent_type="none")
        for key, subject in ((("a", "b/m"), "keep"), (("a/b", "m"), "done")):
            mail = {"message_id": key[1], "subject": subject, "status": "unread"}
            await runtime.manager.save("mail", key, mail)
            loaded = await runtime.manager.load_with_revision("mail", key)
            assert loaded is not None
            runtime.state.agents[key[0]].apply_loaded(loaded)
        await runtime.mail.archive("a/b", "m")
        await clock.advance(3600 * 48)
        await runtime.cleanup_old_states()
        assert [mail.subject for mail in runtime.mail.inbox("a")] == ["keep"]
        assert not runtime.state.agents["a/b"].mail


async def test_mail_whose_sender_was_cancelled_is_in_the_inbox_once_it_is_stored() -> None:
    store = TroubledStore()
    runtime = make_runtime(store)
    async with runtime:
        await runtime.agents.create("alice", agent_type="none")
        store.hold = puts("mail")
        sending = asyncio.create_task(runtime.mail.send("bob", "alice", subject="hi"))
        await store.held.wait()
        sending.cancel()
        store.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert [mail.subject for mail in runtime.mail.inbox("alice")] == ["hi"]


async def test_a_message_has_the_defaults_and_the_time_that_are_documented() -> None:
    clock = FakeClock()
    async with make_runtime(clock=clock) as runtime:
        for name in ("alice", "bob"):
            await runtime.agents.create(name, agent_type="person")
        sent = await runtime.mail.send("alice", "bob", subject="x")
        assert (sent.priority, sent.expects_reply) == ("normal", False)
        await clock.advance(5)

        read = await runtime.mail.read("bob", sent.message_id)

        assert read.read_at == "2026-01-01T00:00:05.000000Z"
        assert runtime.mail.pending_replies("bob") == []


async def test_a_message_that_was_returned_is_a_copy() -> None:
    async with make_runtime() as runtime:
        for name in ("alice", "bob"):
            await runtime.agents.create(name, agent_type="person")
        sent = await runtime.mail.send("alice", "bob", subject="x", body={"n": [1]})
        sent.body["n"].append(2)
        [stored] = runtime.mail.inbox("bob")
        assert stored.body == {"n": [1]}

        read = await runtime.mail.read("bob", sent.message_id)
        read.body["n"].append(3)

        assert runtime.mail.inbox("bob", status="read")[0].body == {"n": [1]}


async def test_an_unknown_message_is_named() -> None:
    async with make_runtime() as runtime:
        await runtime.agents.create("bob", agent_type="person")
        with pytest.raises(StateNotFoundError, match="no such message") as caught:
            await runtime.mail.read("bob", "m")
        assert (caught.value.kind, caught.value.key) == ("mail", ("bob", "m"))
