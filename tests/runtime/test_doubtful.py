"""A change whose outcome is not known may have been made: memory follows the store."""

from __future__ import annotations

import pytest

from agent_state import DurabilityUnknownError, StorageError
from agent_state.protocols import Document, Key, Notice
from agent_state.testing import FakeClock
from tests.runtime.runtimes import (
    TroubledStore,
    edit,
    make_runtime,
    puts,
    sharing,
    with_agent,
    working,
)


async def test_a_task_that_was_stored_without_a_reply_is_done(fake_clock: FakeClock) -> None:
    store = TroubledStore(fake_clock)
    runtime = make_runtime(store, fake_clock)
    ran: list[str] = []
    working(runtime, ran)
    await with_agent(runtime)
    store.unknown = puts("tasks", "pending")

    with pytest.raises(DurabilityUnknownError):
        await runtime.tasks.submit("alice", "once")
    await fake_clock.advance(31)

    assert ran == ["alice/once"]
    await runtime.stop()


async def test_mail_that_was_stored_without_a_reply_arrives(fake_clock: FakeClock) -> None:
    store = TroubledStore(fake_clock)
    runtime = make_runtime(store, fake_clock)
    working(runtime)
    await with_agent(runtime)
    store.unknown = puts("mail")

    with pytest.raises(DurabilityUnknownError):
        await runtime.mail.send("bob", "alice", subject="there")
    await fake_clock.advance(31)

    assert [message.subject for message in runtime.mail.inbox("alice")] == ["there"]
    await runtime.stop()


class AwayStore(TroubledStore):
    away = False

    async def get(self, kind: str, key: Key) -> Document | None:
        if self.away:
            raise StorageError("the store is away")
        return await super().get(kind, key)


async def test_a_change_of_others_that_could_not_be_read_is_read_later(
    fake_clock: FakeClock,
) -> None:
    store = AwayStore(fake_clock)
    runtime = make_runtime(store, fake_clock)
    ran: list[str] = []
    working(runtime, ran)
    await with_agent(runtime)
    task = {"agent_id": "alice", "task_id": "t1", "name": "theirs"}
    await runtime.manager.save("tasks", ("alice", "t1"), task)

    store.away = True
    await runtime.reconciler.notice(Notice("tasks", ("alice", "t1"), 1, outside=True))
    store.away = False
    await fake_clock.advance(31)

    assert ran == ["alice/theirs"]
    await runtime.stop()


async def test_a_check_that_overlaps_the_loss_of_an_agent_writes_nothing(
    fake_clock: FakeClock,
) -> None:
    store = TroubledStore(fake_clock)
    first, second = sharing(store, fake_clock, "first"), sharing(store, fake_clock, "second")
    await with_agent(first)
    await second.start()
    agent = first.state.agent("alice")
    agent.state.context.working_memory["old"] = True
    check = first.reconciler._check_agent

    async def lost_meanwhile(agent_: object) -> int:
        first.state.lose(agent, "belongs to another runtime now")
        return await check(agent)

    first.reconciler._check_agent = lost_meanwhile  # type: ignore[method-assign, assignment]
    await edit(second, "agents", "alice", metadata={"theirs": 1})
    await first.reconciler.check()

    stored = await second.manager.load_agent_state("alice")
    assert stored is not None
    assert "old" not in stored.context.working_memory
    await first.stop()
    await second.stop()


async def test_an_agent_that_another_process_archived_is_forgotten(fake_clock: FakeClock) -> None:
    store = TroubledStore(fake_clock)
    first, second = sharing(store, fake_clock, "first"), sharing(store, fake_clock, "second")
    await with_agent(first)
    await second.start()
    await first.agents.stop("alice")
    await fake_clock.advance(1)
    await second.manager.cleanup_old_states(0)

    for runtime in (first, second):
        await runtime.reconciler.notice(Notice("agents", ("alice",), None, outside=True))
    await first.reconciler.check()

    assert (first.agents.list(), second.agents.list()) == ([], [])
    assert await first.manager.load_agent_state("alice") is None
    await first.stop()
    await second.stop()
