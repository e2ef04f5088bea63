"""Dedupe keys of mail and tasks: whose they are, what they stand for, and how long they hold."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from agent_state import (
    AsyncAgentSessionManager,
    DedupeKeyReusedError,
    MailMessage,
    MemoryStateStore,
    SerializationError,
    StatePersistenceManager,
    StateStore,
    StateValidationError,
    Task,
    TaskContext,
    sync,
)
from agent_state.protocols import Change
from agent_state.testing import FakeClock
from tests.deadlines import soon
from tests.runtime.runtimes import make_runtime

DAY = 86_400.0


@pytest.fixture
async def runtime(
    manager: StatePersistenceManager, fake_clock: FakeClock
) -> AsyncAgentSessionManager:
    """A runtime on each kind of store; it is not started yet."""
    return on(manager.store, fake_clock)


def on(store: StateStore, clock: FakeClock) -> AsyncAgentSessionManager:
    return make_runtime(store, clock, exclusive=True)


async def with_agents(runtime: AsyncAgentSessionManager, **types: str) -> None:
    for agent_id in ("alice", "bob", "carol"):
        await runtime.agents.create(agent_id, agent_type=types.get(agent_id, "none"))


def handler(
    runtime: AsyncAgentSessionManager,
    name: str,
    work: Callable[[TaskContext, Task], Awaitable[Any]],
) -> None:
    runtime.handler(name)(work)


# -- scopes ------------------------------------------------------------------------------------


async def test_a_key_of_mail_is_the_senders_and_the_readers(
    runtime: AsyncAgentSessionManager,
) -> None:
    async with runtime:
        await with_agents(runtime)
        for sender, to in (("bob", "alice"), ("carol", "alice"), ("bob", "carol")):
            await runtime.mail.send(sender, to, subject=f"{sender} to {to}", dedupe_key="1")
        assert [m.subject for m in runtime.mail.inbox("alice")] == [
            "bob to alice",
            "carol to alice",
        ]
        assert [m.subject for m in runtime.mail.inbox("carol")] == ["bob to carol"]
        again = await runtime.mail.send("carol", "alice", subject="carol to alice", dedupe_key="1")
        assert (again.dedupe_key, len(runtime.mail.inbox("alice"))) == ("1", 2)
        ids = {m.message_id for agent in ("alice", "carol") for m in runtime.mail.inbox(agent)}
        assert len(ids) == 3


async def test_a_key_of_tasks_is_the_agents_and_the_tasks_names(
    runtime: AsyncAgentSessionManager,
) -> None:
    async with runtime:
        await with_agents(runtime)
        made = [
            await runtime.tasks.submit(agent_id, name, {"n": 1}, dedupe_key="order-7")
            for agent_id, name in (("alice", "pay"), ("alice", "refund"), ("bob", "pay"))
        ]
        assert len({task.task_id for task in made}) == 3
        again = await runtime.tasks.submit("alice", "refund", {"n": 1}, dedupe_key="order-7")
        assert again.task_id == made[1].task_id


async def test_a_key_in_a_handler_is_the_submitting_agents(
    runtime: AsyncAgentSessionManager,
) -> None:
    async def work(ctx: TaskContext, task: Task) -> str:
        made = await ctx.submit("carol", "count", {"by": ctx.agent_id}, dedupe_key="1")
        return made.task_id

    handler(runtime, "worker", work)
    async with runtime:
        await with_agents(runtime, alice="worker", bob="worker")
        outside = await runtime.tasks.submit("carol", "count", {"by": "outside"}, dedupe_key="1")
        ids = [
            await soon(runtime.tasks.result(await runtime.tasks.submit(agent_id, f"t{n}")))
            for n in range(2)
            for agent_id in ("alice", "bob")
        ]
        assert ids[:2] == ids[2:]
        assert len({outside.task_id, *ids}) == 3


async def test_tasks_of_one_id_of_two_agents_send_both(
    manager: StatePersistenceManager, fake_clock: FakeClock
) -> None:
    """As ids are that a person, or another program, has given to tasks."""
    runtime = on(manager.store, fake_clock)

    async def work(ctx: TaskContext, task: Task) -> None:
        await ctx.send_mail("carol", subject=ctx.agent_id)
        await ctx.submit("carol", "count", {"by": ctx.agent_id})

    handler(runtime, "worker", work)
    for agent_id in ("alice", "bob"):
        await manager.save_agent_state(agent_id, {"agent_id": agent_id, "agent_type": "worker"})
        await manager.save("tasks", (agent_id, "1"), Task(task_id="1", agent_id=agent_id))
    await manager.save_agent_state("carol", {"agent_id": "carol"})
    async with runtime:
        await soon(runtime.wait_idle())
        assert {m.subject for m in runtime.mail.inbox("carol")} == {"alice", "bob"}
        tasks = await runtime.tasks.list("carol")
        assert {task.payload["by"] for task in tasks} == {"alice", "bob"}


async def test_scopes_that_read_the_same_are_not_the_same(
    runtime: AsyncAgentSessionManager,
) -> None:
    async with runtime:
        await runtime.agents.create("a", agent_type="none")
        await runtime.agents.create("a\0b", agent_type="none")
        tasks = [
            await runtime.tasks.submit(agent_id, name, dedupe_key=key)
            for agent_id, name, key in (("a", "b", "c\0d"), ("a", "b\0c", "d"), ("a\0b", "c", "d"))
        ]
        assert len({task.task_id for task in tasks}) == 3


async def test_a_reply_is_nobody_elses(runtime: AsyncAgentSessionManager) -> None:
    """Neither of another reader of a message with the same id, nor of one who guesses its name."""
    async with runtime:
        await with_agents(runtime)
        for to in ("alice", "bob"):
            message = {"message_id": "m", "from_agent": "carol", "to_agent": to, "subject": "?"}
            await runtime.manager.save("mail", (to, "m"), message)
            loaded = await runtime.manager.load_with_revision("mail", (to, "m"))
            assert loaded is not None
            runtime.state.agents[to].apply_loaded(loaded)
        await runtime.mail.send("alice", "carol", subject="own", dedupe_key="m.reply")
        await runtime.mail.send("bob", "carol", subject="own", dedupe_key="m.reply.alice")
        for to in ("alice", "bob"):
            assert (await runtime.mail.reply(to, "m", f"yes, {to}")).from_agent == to
        bodies = sorted(m.body for m in runtime.mail.inbox("carol"))
        assert bodies == ["", "", "yes, alice", "yes, bob"]


async def test_replies_of_two_agents_in_tasks_of_one_id_both_arrive(
    manager: StatePersistenceManager, fake_clock: FakeClock
) -> None:
    runtime = on(manager.store, fake_clock)

    async def work(ctx: TaskContext, task: Task) -> list[str]:
        [asked] = await ctx.inbox()
        answers = [await ctx.reply(asked, f"{n}, {ctx.agent_id}") for n in ("yes", "no")]
        return [answer.body for answer in answers]

    handler(runtime, "worker", work)
    for agent_id in ("alice", "bob"):
        await manager.save_agent_state(agent_id, {"agent_id": agent_id, "agent_type": "worker"})
        message = {"message_id": "m", "from_agent": "carol", "to_agent": agent_id}
        await manager.save("mail", (agent_id, "m"), message)
        await manager.save("tasks", (agent_id, "1"), Task(task_id="1", agent_id=agent_id))
    await manager.save_agent_state("carol", {"agent_id": "carol"})
    async with runtime:
        await soon(runtime.wait_idle())
        for agent_id in ("alice", "bob"):
            first = f"yes, {agent_id}"
            assert (await runtime.tasks.get((agent_id, "1"))).result == [first, first]
        assert {m.body for m in runtime.mail.inbox("carol")} == {"yes, alice", "yes, bob"}


# -- content -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        {"subject": "two"},
        {"body": {"n": 2}},
        {"priority": "high"},
        {"expects_reply": True},
        {"metadata": {"a": 1}},
    ],
    ids=lambda other: next(iter(other)),
)
async def test_other_mail_under_a_key_is_refused(
    runtime: AsyncAgentSessionManager, other: dict[str, Any]
) -> None:
    async with runtime:
        await with_agents(runtime)
        message: dict[str, Any] = {"subject": "one", "body": {"n": (1,)}, "dedupe_key": "k"}
        first = await runtime.mail.send("bob", "alice", **message)
        with pytest.raises(DedupeKeyReusedError, match="key 'k' was used before") as caught:
            await runtime.mail.send("bob", "alice", **(message | other))
        assert isinstance(caught.value, StateValidationError)
        assert (caught.value.kind, caught.value.key) == ("mail", ("alice", first.message_id))
        again = await runtime.mail.send("bob", "alice", **(message | {"body": {"n": [1]}}))
        assert again.message_id == first.message_id
        await runtime.mail.archive("alice", first.message_id)
        with pytest.raises(DedupeKeyReusedError):
            await runtime.mail.send("bob", "alice", **(message | other))
        assert runtime.mail.inbox("alice") == []


@pytest.mark.parametrize(
    "other",
    [
        {"payload": {"n": 2}},
        {"payload": None},
        {"priority": "high"},
        {"delay_seconds": 5.0},
        {"max_attempts": 4},
        {"timeout_seconds": 2.0},
    ],
    ids=lambda other: next(iter(other)),
)
async def test_another_task_under_a_key_is_refused(
    runtime: AsyncAgentSessionManager, other: dict[str, Any]
) -> None:
    async def work(ctx: TaskContext, task: Task) -> None:
        pass

    handler(runtime, "worker", work)
    async with runtime:
        await with_agents(runtime, alice="worker")
        wanted: dict[str, Any] = {"payload": {"n": (1,)}, "dedupe_key": "k"}
        task = await runtime.tasks.submit("alice", "pay", **wanted)
        for _ in range(2):  # while it waits, and once it is done
            with pytest.raises(DedupeKeyReusedError, match="key 'k' was used before") as caught:
                await runtime.tasks.submit("alice", "pay", **(wanted | other))
            assert (caught.value.kind, caught.value.key) == ("tasks", ("alice", task.task_id))
            await soon(runtime.tasks.result(task))
        again = await runtime.tasks.submit("alice", "pay", **(wanted | {"payload": {"n": [1]}}))
        assert (again.task_id, again.status) == (task.task_id, "completed")
        assert len(await runtime.tasks.list("alice")) == 1


async def test_what_a_person_changed_is_still_what_the_key_stands_for(
    runtime: AsyncAgentSessionManager,
) -> None:
    async with runtime:
        await with_agents(runtime)
        task = await runtime.tasks.submit("alice", "pay", {"n": 1}, dedupe_key="k")
        edited = task.model_copy(update={"payload": {"n": 5}, "priority": "urgent"})
        await runtime.manager.save("tasks", ("alice", task.task_id), edited)
        again = await runtime.tasks.submit("alice", "pay", {"n": 1}, dedupe_key="k")
        assert again.payload == {"n": 5}


async def test_a_later_attempt_may_send_something_else_and_gets_what_was_sent(
    runtime: AsyncAgentSessionManager,
) -> None:
    async def work(ctx: TaskContext, task: Task) -> list[Any]:
        mail = await ctx.send_mail("bob", subject=f"attempt {ctx.attempt}")
        named = await ctx.send_mail("bob", subject=f"named {ctx.attempt}", dedupe_key="k")
        own = await ctx.submit("carol", "count", {"attempt": ctx.attempt})
        keyed = await ctx.submit("carol", "count", {"attempt": ctx.attempt}, dedupe_key="k")
        if ctx.attempt < 3:
            raise ConnectionError
        return [mail.subject, named.subject, own.payload, keyed.payload]

    handler(runtime, "worker", work)
    async with runtime:
        await with_agents(runtime, alice="worker")
        first = await runtime.tasks.submit("alice", "x")
        clock = runtime.state.clock
        assert isinstance(clock, FakeClock)
        while (await runtime.tasks.get(first)).status != "completed":
            await clock.advance(1)
        assert (await runtime.tasks.get(first)).result == [
            "attempt 1",
            "named 1",
            {"attempt": 1},
            {"attempt": 1},
        ]
        assert len(runtime.mail.inbox("bob")) == 2
        assert len(await runtime.tasks.list("carol")) == 2


@pytest.mark.parametrize("key", ["", 7, b"k"])
async def test_a_key_that_is_none_is_refused(runtime: AsyncAgentSessionManager, key: Any) -> None:
    async with runtime:
        await with_agents(runtime)
        with pytest.raises(StateValidationError, match="a dedupe key is text"):
            await runtime.mail.send("bob", "alice", subject="x", dedupe_key=key)
        with pytest.raises(StateValidationError, match="a dedupe key is text"):
            await runtime.tasks.submit("alice", "x", dedupe_key=key)


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), "5"])
async def test_a_time_that_is_none_is_refused(
    runtime: AsyncAgentSessionManager, seconds: Any
) -> None:
    async with runtime:
        await with_agents(runtime)
        wanted: dict[str, Any] = {"dedupe_key": "k", "dedupe_seconds": seconds}
        with pytest.raises(StateValidationError, match="not a duration"):
            await runtime.mail.send("bob", "alice", subject="x", **wanted)
        with pytest.raises(StateValidationError, match="not a duration"):
            await runtime.tasks.submit("alice", "x", **wanted)


async def test_what_cannot_be_stored_is_named_with_a_key_too(
    runtime: AsyncAgentSessionManager,
) -> None:
    async with runtime:
        await with_agents(runtime)
        with pytest.raises(SerializationError, match=r"body\.n") as mail:
            await runtime.mail.send("bob", "alice", subject="x", body={"n": {1}}, dedupe_key="k")
        with pytest.raises(SerializationError, match=r"payload\.n") as task:
            await runtime.tasks.submit("alice", "x", {"n": {1}}, dedupe_key="k")
        assert (mail.value.kind, task.value.kind) == ("mail", "tasks")


# -- how long a key holds ----------------------------------------------------------------------


async def clean(how: str, runtime: AsyncAgentSessionManager, clock: FakeClock) -> None:
    """Clean up everything that may go, whatever its age."""
    await clock.advance(1)
    if how == "runtime":
        await runtime.cleanup_old_states(max_age_hours=0)
    else:
        await runtime.manager.cleanup_old_states(max_age_hours=0)


@pytest.mark.parametrize("how", ["runtime", "manager"])
async def test_a_key_holds_for_a_day_whatever_cleanup_does(
    runtime: AsyncAgentSessionManager, fake_clock: FakeClock, how: str
) -> None:
    runs = list[str]()

    async def work(ctx: TaskContext, task: Task) -> None:
        runs.append(task.name)

    handler(runtime, "worker", work)
    async with runtime:
        await with_agents(runtime, alice="worker")

        async def ask() -> tuple[str, str]:
            task = await runtime.tasks.submit("alice", "pay", {"n": 1}, dedupe_key="k")
            mail = await runtime.mail.send("carol", "bob", subject="hi", dedupe_key="k")
            return task.task_id, mail.message_id

        first = await ask()
        await soon(runtime.wait_idle())
        await runtime.mail.archive("bob", first[1])
        for _ in range(3):
            await clean(how, runtime, fake_clock)
            assert await ask() == first
        assert (runs, runtime.mail.inbox("bob")) == (["pay"], [])
        await fake_clock.advance(DAY)
        await clean(how, runtime, fake_clock)
        second = await ask()
        await soon(runtime.wait_idle())
        assert (runs, len(runtime.mail.inbox("bob"))) == (["pay", "pay"], 1)
        assert second == first  # the id is made of the key


async def test_a_key_holds_as_long_as_its_caller_asks(
    runtime: AsyncAgentSessionManager, fake_clock: FakeClock
) -> None:
    async with runtime:
        await with_agents(runtime)
        for key, seconds in (("week", 7 * 3600), ("none", 0)):
            wanted: dict[str, Any] = {"dedupe_key": key, "dedupe_seconds": seconds}
            mail = await runtime.mail.send("bob", "alice", subject=key, **wanted)
            await runtime.mail.read("alice", mail.message_id)
            task = await runtime.tasks.submit("alice", key, **wanted)
            await runtime.tasks.cancel(task)
        await fake_clock.advance(6 * 3600)
        report = await runtime.cleanup_old_states(max_age_hours=1)
        assert (len(report.tasks), len(report.mail)) == (1, 1)
        [left] = await runtime.tasks.list("alice")
        assert left.name == "week"
        [kept] = runtime.mail.inbox("alice", status="read")
        assert kept.subject == "week"
        await fake_clock.advance(3600 + 3601)
        report = await runtime.cleanup_old_states(max_age_hours=1)
        assert (len(report.tasks), len(report.mail)) == (1, 1)


async def test_cleaning_up_from_a_synchronous_program_keeps_keys_too(
    tmp_path: Path, fake_clock: FakeClock
) -> None:
    runtime = AsyncAgentSessionManager(tmp_path, clock=fake_clock)
    async with runtime:
        await with_agents(runtime)
        await runtime.tasks.cancel(await runtime.tasks.submit("alice", "x", dedupe_key="k"))
    await fake_clock.advance(3600)

    def moved() -> list[str]:
        return manager.cleanup_old_states(max_age_hours=0).tasks

    with sync.SyncStatePersistenceManager(tmp_path, clock=fake_clock) as manager:
        assert await asyncio.to_thread(moved) == []
        await fake_clock.advance(DAY)
        assert len(await asyncio.to_thread(moved)) == 1


async def test_a_time_that_cannot_be_read_keeps_nothing(
    manager: StatePersistenceManager, fake_clock: FakeClock
) -> None:
    task = Task(task_id="t", status="completed", dedupe_until="soon")
    await manager.save("tasks", ("alice", "t"), task)
    await fake_clock.advance(2 * DAY)
    assert (await manager.cleanup_old_states()).tasks == ["alice/t"]


# -- replies -----------------------------------------------------------------------------------


async def test_replying_again_gives_the_first_answer_archived_or_not(
    runtime: AsyncAgentSessionManager, fake_clock: FakeClock
) -> None:
    async with runtime:
        await with_agents(runtime)
        sent = await runtime.mail.send("alice", "bob", subject="?")
        first = await runtime.mail.reply("bob", sent.message_id, "yes")
        await runtime.mail.archive("alice", first.message_id)
        await fake_clock.advance(3600)
        await runtime.mail.archive("bob", sent.message_id)  # it is younger than its answer
        for kept in (1, 0):
            await fake_clock.advance(1)
            await runtime.cleanup_old_states(max_age_hours=kept / 2)
            assert len(await runtime.manager.keys("mail", "bob")) == kept
            again = await runtime.mail.reply("bob", sent.message_id, "no")
            assert (again.message_id, again.body) == (first.message_id, "yes")
            assert runtime.mail.inbox("alice") == []
            assert await runtime.manager.keys("mail", "alice") == []


async def test_what_a_task_answered_is_answered_for_every_task(
    runtime: AsyncAgentSessionManager, fake_clock: FakeClock
) -> None:
    async def work(ctx: TaskContext, task: Task) -> str:
        asked = MailMessage.model_validate(task.payload)
        body: str = (await ctx.reply(asked, task.name)).body
        if task.name == "dies":
            raise ConnectionError  # the answer is sent, and the message not marked as answered
        return body

    handler(runtime, "worker", work)
    async with runtime:
        await with_agents(runtime, bob="worker")
        for name in ("dies", "yes"):
            asked = await runtime.mail.send("alice", "bob", subject="?")
            first = await runtime.tasks.submit("bob", name, asked.model_dump(), max_attempts=1)
            await soon(runtime.wait_idle())
            status = (await runtime.tasks.get(first)).status
            assert status == ("dead" if name == "dies" else "completed")
            if name == "yes":  # the first answer is found when it was archived, too
                [answer] = [m for m in runtime.mail.inbox("alice") if m.body == name]
                await runtime.mail.archive("alice", answer.message_id)
                await fake_clock.advance(3600)
                await runtime.cleanup_old_states(max_age_hours=0)
            again = await runtime.tasks.submit("bob", "again", asked.model_dump())
            assert await soon(runtime.tasks.result(again)) == name
            assert (await runtime.mail.reply("bob", asked.message_id, "outside")).body == name


async def test_an_archived_message_that_was_not_answered_is_answered_no_more(
    runtime: AsyncAgentSessionManager, fake_clock: FakeClock
) -> None:
    async with runtime:
        await with_agents(runtime)
        sent = await runtime.mail.send("alice", "bob", subject="?")
        await runtime.mail.archive("bob", sent.message_id)
        await fake_clock.advance(2 * DAY)
        await runtime.cleanup_old_states()
        with pytest.raises(LookupError, match="no such message"):
            await runtime.mail.reply("bob", sent.message_id, "yes")


# -- old directories ---------------------------------------------------------------------------


async def test_what_an_older_version_sent_under_a_key_is_not_sent_again(
    manager: StatePersistenceManager, fake_clock: FakeClock
) -> None:
    """It made the id of the key alone, or of agent and key, and stored no digest."""
    await manager.save_agent_state("alice", {"agent_id": "alice"})
    message = {"message_id": "k", "from_agent": "bob", "to_agent": "alice", "subject": "old"}
    await manager.save("mail", ("alice", "k"), {**message, "status": "read"})
    task_id = "once-27a1787665de219bd4fd"
    task = Task(task_id=task_id, agent_id="alice", name="pay", dedupe_key="k", status="completed")
    await manager.save("tasks", ("alice", task_id), task)
    async with on(manager.store, fake_clock) as runtime:
        sent = await runtime.mail.send("bob", "alice", subject="old", dedupe_key="k")
        assert (sent.message_id, sent.status) == ("k", "read")
        assert (await runtime.tasks.submit("alice", "pay", dedupe_key="k")).status == "completed"
        other = await runtime.mail.send("carol", "alice", subject="new", dedupe_key="k")
        refund = await runtime.tasks.submit("alice", "refund", dedupe_key="k")
        assert (other.status, refund.status) == ("unread", "pending")


class LateStore(MemoryStateStore):
    """Stores the first task at once, and says so when ``gate`` is set."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock=clock)
        self.stored, self.gate = asyncio.Event(), asyncio.Event()

    async def commit(self, changes: Sequence[Change]) -> list[int]:
        revisions = await super().commit(changes)
        if not self.stored.is_set() and changes[0].kind == "tasks":
            self.stored.set()
            await self.gate.wait()
        return revisions


async def test_a_submission_whose_reply_comes_when_its_task_is_done_changes_nothing() -> None:
    clock = FakeClock()
    store = LateStore(clock)
    runtime = on(store, clock)

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> str:
        return "done"

    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        late = asyncio.create_task(runtime.tasks.submit("alice", "x", dedupe_key="k"))
        await soon(store.stored.wait())
        task = await runtime.tasks.submit("alice", "x", dedupe_key="k")
        assert await soon(runtime.tasks.result(task)) == "done"
        await soon(runtime.wait_idle())
        before = await runtime.manager.load_with_revision("agents", "alice")
        assert before is not None
        await clock.advance(10)
        store.gate.set()
        assert (await soon(late)).task_id == task.task_id
        await soon(runtime.wait_idle())
        await runtime.reconciler.check()
        after = await runtime.manager.load_with_revision("agents", "alice")
        assert after is not None
        assert after.revision == before.revision
        assert after.state == before.state
