"""A handler's attempt is a transaction: commit points store what it changed, or nothing does."""

from __future__ import annotations

import asyncio
import threading
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
from pydantic import BaseModel

from agent_state import (
    AsyncAgentSessionManager,
    MemoryStateStore,
    RateLimit,
    RetryPolicy,
    Task,
    TaskContext,
    TaskFailedError,
)
from agent_state.models import AgentState, MailMessage
from agent_state.protocols import Change
from agent_state.testing import FakeClock
from tests.deadlines import SECONDS, until
from tests.runtime.runtimes import TroubledStore, make_runtime, puts, with_agent

AT_ONCE = RetryPolicy(base_seconds=0.0, jitter=0.0)


class Recorder:
    """Observes commits: the kinds of each one, in order."""

    def __init__(self) -> None:
        self.commits: list[list[str]] = []

    def committed(self, changes: Sequence[Change], numbers: Sequence[int]) -> None:
        self.commits.append(sorted(change.kind for change in changes))


async def stored_agent(runtime: AsyncAgentSessionManager, agent_id: str = "alice") -> AgentState:
    state = await runtime.manager.load_agent_state(agent_id)
    assert state is not None
    return state


def retrying(**settings: Any) -> AsyncAgentSessionManager:
    return make_runtime(retry=AT_ONCE, **settings)


# -- what an attempt that failed leaves --------------------------------------------------------


async def test_a_handler_that_failed_twice_has_changed_memory_once() -> None:
    runtime = retrying()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> int:
        ctx.memory["words"] = ctx.memory.get("words", 0) + len(task.payload["text"].split())
        if ctx.attempt < 3:
            raise ConnectionError("not yet")
        return int(ctx.memory["words"])

    await with_agent(runtime)
    task = await runtime.tasks.submit("alice", "count", {"text": "one two three four"})
    assert await runtime.tasks.result(task) == 4
    assert (await stored_agent(runtime)).context.working_memory == {"words": 4}
    await runtime.stop()


@pytest.mark.parametrize("way", ["raise", "time out", "cancel", "stop"])
async def test_an_attempt_that_does_not_end_well_leaves_nothing_of_what_it_changed(
    way: str,
) -> None:
    clock = FakeClock()
    store = MemoryStateStore(clock=clock)
    runtime = make_runtime(store, clock, grace_seconds=0.01)
    changed = asyncio.Event()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        if task.name == "first":
            ctx.memory["list"] = [1]
            return
        ctx.memory["list"].append(2)
        ctx.memory["new"] = True
        ctx.data["n"] = 1
        ctx.configuration["model"] = "other"
        ctx.add_turn("user", "hello")
        [message] = await ctx.inbox()
        await ctx.read_mail(message.message_id)
        assert await ctx.inbox() == []
        changed.set()
        if way == "raise":
            raise ValueError("no")
        await asyncio.Event().wait()

    await with_agent(runtime)
    await runtime.mail.send("bob", "alice", subject="s")
    await runtime.tasks.result(await runtime.tasks.submit("alice", "first"))
    before = await stored_agent(runtime)
    timeout = 5.0 if way == "time out" else None
    task = await runtime.tasks.submit("alice", "second", timeout_seconds=timeout, max_attempts=1)
    await changed.wait()
    if way == "time out":
        await until(lambda: clock.sleepers)
        await clock.advance(6)
    elif way == "cancel":
        await runtime.tasks.cancel(task)
    if way == "stop":
        await runtime.stop()
        runtime = make_runtime(store, clock)
        await runtime.start()
    else:
        with pytest.raises(TaskFailedError):
            await runtime.tasks.result(task)
    for state in (runtime.agents.get("alice"), await stored_agent(runtime)):
        assert state.context == before.context
        assert state.configuration == before.configuration
    assert [m.status for m in runtime.mail.inbox("alice", status=None)] == ["unread"]
    await runtime.stop()


# -- one commit --------------------------------------------------------------------------------


async def test_the_end_of_an_attempt_is_one_commit_of_all_that_the_handler_left() -> None:
    observer = Recorder()
    runtime = make_runtime(observer=observer)

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        for message in await ctx.inbox():
            ctx.memory.setdefault("seen", []).append(message.subject)
            if message.subject == "a":
                await ctx.archive_mail(message.message_id)
            else:
                await ctx.read_mail(message.message_id)
        observer.commits.clear()

    await with_agent(runtime)
    for subject in ("a", "b"):
        await runtime.mail.send("bob", "alice", subject=subject)
    await runtime.tasks.result(await runtime.tasks.submit("alice", "read"))
    assert observer.commits == [["agents", "mail", "mail", "tasks"]]
    assert (await stored_agent(runtime)).context.working_memory == {"seen": ["a", "b"]}
    assert sorted(m.status for m in await runtime.mail.history("alice")) == ["archived", "read"]
    await runtime.stop()


@pytest.mark.parametrize("point", ["checkpoint", "sleep"])
async def test_a_commit_point_stores_progress_memory_and_mail_together(point: str) -> None:
    observer, clock = Recorder(), FakeClock()
    store = MemoryStateStore(clock=clock)
    runtime = make_runtime(store, clock, observer=observer)
    reached = asyncio.Event()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        for message in await ctx.inbox():
            ctx.memory["n"] = ctx.memory.get("n", 0) + 1
            await ctx.reply(message, "thanks")
        observer.commits.clear()
        if point == "sleep":
            await ctx.sleep(seconds=60)
        await ctx.checkpoint({"read": True})
        ctx.memory["n"] += 100
        reached.set()
        await asyncio.Event().wait()

    await with_agent(runtime)
    await runtime.agents.create("bob", agent_type="other")
    await runtime.mail.send("bob", "alice", subject="a", expects_reply=True)
    task = await runtime.tasks.submit("alice", "read")
    if point == "sleep":
        await until(lambda: runtime.agents.get("alice").status == "sleeping")
    else:
        await reached.wait()
    extra = ["sleep"] if point == "sleep" else []
    assert observer.commits == [["agents", "mail", *extra, "tasks"]]
    await runtime.abort()

    again = make_runtime(store, clock)
    await again.start()
    assert again.agents.get("alice").context.working_memory == {"n": 1}
    assert [m.status for m in await again.mail.history("alice")] == ["replied"]
    assert [m.body for m in again.mail.inbox("bob")] == ["thanks"]
    assert (await again.tasks.get(task)).progress == ({} if point == "sleep" else {"read": True})
    await again.stop()


async def test_steps_do_not_save_the_agent() -> None:
    observer = Recorder()
    runtime = make_runtime(observer=observer)

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        ctx.memory["big"] = "x" * 1000
        observer.commits.clear()
        for n in range(3):
            await ctx.step(f"s{n}", int)
        await ctx.send_mail("bob", subject="s")
        observer.commits.append(["end"])

    await with_agent(runtime)
    await runtime.tasks.result(await runtime.tasks.submit("alice", "w"))
    steps = observer.commits[: observer.commits.index(["end"])]
    assert [kinds for kinds in steps if "agents" in kinds] == []
    await runtime.stop()


# -- steps -------------------------------------------------------------------------------------

Program = Callable[[TaskContext], Any]


async def attempts(program: Program, memory: dict[str, Any] | None = None) -> dict[str, Any]:
    """The memory after a program that fails twice at its end, and then succeeds."""
    runtime = retrying()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        if task.name == "prepare":
            ctx.memory.update(memory or {})
            return
        await program(ctx)
        if ctx.attempt < 3:
            raise RuntimeError("again")

    await with_agent(runtime)
    await runtime.tasks.result(await runtime.tasks.submit("alice", "prepare"))
    task = await runtime.tasks.submit("alice", "work")
    await runtime.tasks.result(task)
    state = await stored_agent(runtime)
    assert runtime.agents.get("alice").context == state.context
    steps = (await runtime.tasks.get(task)).steps.values()
    assert [step.memory for step in steps if step.memory] == []
    await runtime.stop()
    return {
        "history": [
            turn["content"]
            for turn in state.context.conversation_history
            if isinstance(turn, dict) and "content" in turn
        ],
        "configuration": state.configuration,
        "data": state.context.agent_data,
        **state.context.working_memory,
    }


async def test_what_a_step_changed_is_stored_with_its_result_and_never_done_twice() -> None:
    ran = []

    async def program(ctx: TaskContext) -> None:
        async def change() -> None:
            ran.append(1)
            ctx.memory["n"] += 1
            ctx.memory["list"].append({"deep": [ctx.memory["n"]]})
            ctx.memory["map"]["a"]["b"] = "c"
            del ctx.memory["map"]["gone"]
            ctx.memory["flag"] = 1
            ctx.memory["odd/~key"] = None
            ctx.data["d"] = 1
            ctx.configuration["model"] = "m"
            ctx.add_turn("user", "hello")
            await asyncio.sleep(0)
            ctx.memory["n"] += 1

        await ctx.step("change", change)
        ctx.memory["outside"] = ctx.memory.get("outside", 0) + ctx.memory["n"]

    before = {"n": 5, "list": [1], "map": {"a": {"x": 1}, "gone": 1}, "flag": True}
    after = await attempts(program, before)
    assert ran == [1]
    assert after == {
        "n": 7,
        "list": [1, {"deep": [6]}],
        "map": {"a": {"x": 1, "b": "c"}},
        "flag": 1,
        "odd/~key": None,
        "outside": 7,
        "data": {"d": 1},
        "configuration": {"model": "m"},
        "history": ["hello"],
    }
    assert after["flag"] is not True


async def test_steps_side_by_side_each_keep_their_own_changes() -> None:
    ran = []

    async def program(ctx: TaskContext) -> None:
        async def add(name: str, ticks: int) -> None:
            ran.append(name)
            for _ in range(ticks):
                ctx.memory["n"] = ctx.memory.get("n", 0) + 1
                ctx.memory.setdefault("who", []).append(name)
                await asyncio.sleep(0)
            if name == "c" and ctx.attempt == 1:
                raise RuntimeError("this one fails")

        steps = [ctx.step(name, add, name, ticks) for name, ticks in (("a", 3), ("b", 1), ("c", 2))]
        ctx.memory["outside"] = ctx.memory.get("outside", 0) + 1
        for outcome in await asyncio.gather(*steps, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    after = await attempts(program)
    assert sorted(ran) == ["a", "b", "c", "c"]
    assert (after["n"], after["outside"]) == (6, 1)
    assert sorted(after["who"]) == ["a", "a", "a", "b", "c", "c"]


async def test_a_step_inside_a_step_and_one_in_a_thread_are_done_once() -> None:
    async def program(ctx: TaskContext) -> None:
        def in_thread() -> None:
            ctx.memory["thread"] = ctx.memory.get("thread", 0) + 1

        async def inner() -> None:
            ctx.memory["inner"] = ctx.memory.get("inner", 0) + 1

        async def outer() -> None:
            ctx.memory["outer"] = ctx.memory.get("outer", 0) + 1
            await asyncio.gather(ctx.step("inner", inner), ctx.step("thread", in_thread))
            ctx.memory["outer"] += 1
            if ctx.attempt == 1:
                raise RuntimeError("outer fails once; inner is done")

        await ctx.step("outer", outer)

    after = await attempts(program)
    assert (after["outer"], after["inner"], after["thread"]) == (2, 1, 1)


async def test_a_checkpoint_contains_what_the_steps_before_it_changed() -> None:
    async def program(ctx: TaskContext) -> None:
        async def add() -> None:
            ctx.memory["n"] = ctx.memory.get("n", 0) + 1

        await ctx.step("one", add)
        if not ctx.progress:
            await ctx.checkpoint({"at": 1})
        await ctx.step("two", add)

    assert (await attempts(program))["n"] == 2


async def test_an_item_taken_out_of_a_list_is_all_that_a_step_takes_out() -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock, retry=RetryPolicy(base_seconds=30, jitter=0.0))

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        async def take() -> None:
            ctx.memory["todo"].remove({"id": 2})
            ctx.memory["todo"].insert(0, {"id": 0})
            ctx.memory["todo"].append({"id": 9})

        if task.name == "prepare":
            ctx.memory["todo"] = [{"id": n} for n in (1, 2, 3)]
        elif task.name == "other":
            ctx.memory["todo"].append({"id": 7})
            ctx.memory["todo"].remove({"id": 3})
        else:
            await ctx.step("take", take)
            if ctx.attempt == 1:
                raise RuntimeError("once")

    await with_agent(runtime)
    await runtime.tasks.result(await runtime.tasks.submit("alice", "prepare"))
    task = await runtime.tasks.submit("alice", "take")
    await runtime.tasks.result(await runtime.tasks.submit("alice", "other"))
    done = asyncio.ensure_future(runtime.tasks.result(task))
    await clock.advance(31)
    await done
    todo = (await stored_agent(runtime)).context.working_memory["todo"]
    assert [item["id"] for item in todo] == [0, 1, 7, 9]
    await runtime.stop()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ([], [1]), ([1], []), ([1, 1], [1]), ([1], [1, 1]), ([1, 2, 3], [3, 2, 1]),
        ([1, 2], [1, 5, 2]), ([1, 2, 1], [2, 1]), ([True], [1]), ([1], [1.0]),
        ([[1], {"a": 1}], [{"a": 1}]), (list(range(300)), [5]), ([1, 2, 3, 4], [0, 2, 4, 5]),
        ([None], [None, None]), ([], []),
    ],
)  # fmt: skip
async def test_a_list_is_after_a_remembered_step_as_it_was_after_the_step(
    old: list[Any], new: list[Any]
) -> None:
    async def program(ctx: TaskContext) -> None:
        async def change() -> None:
            ctx.memory["l"] = new
            ctx.history[:] = new

        await ctx.step("change", change)

    after = await attempts(program, {"l": old})
    assert repr(after["l"]) == repr(new)


async def test_a_step_of_one_task_does_not_undo_what_another_task_changed_since() -> None:
    runtime = make_runtime(
        retry=RetryPolicy(base_seconds=30, jitter=0.0), clock=(clock := FakeClock())
    )

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        async def change() -> None:
            ctx.configuration.setdefault("tokens", []).append(task.name)
            ctx.memory["n"] = ctx.memory.get("n", 0) + 1
            ctx.memory.setdefault("by", {})[task.name] = {}

        await ctx.step("change", change)
        if task.name == "a" and ctx.attempt == 1:
            raise RuntimeError("once")

    await with_agent(runtime)
    a = await runtime.tasks.submit("alice", "a")
    await runtime.tasks.result(await runtime.tasks.submit("alice", "b"))
    done = asyncio.ensure_future(runtime.tasks.result(a))
    await clock.advance(31)
    await done
    state = await stored_agent(runtime)
    assert state.configuration == {"tokens": ["b", "a"]}
    assert state.context.working_memory == {"n": 2, "by": {"b": {}, "a": {}}}
    await runtime.stop()


async def test_steps_in_threads_each_keep_what_they_changed_at_the_same_time() -> None:
    together = threading.Barrier(2)

    async def program(ctx: TaskContext) -> None:
        def add(name: str) -> None:
            ctx.memory.setdefault("names", []).append(name)
            ctx.memory["n"] = ctx.memory.get("n", 0) + 1
            if ctx.attempt == 1:
                together.wait(SECONDS)
                if name == "b":
                    raise RuntimeError("b fails once; a is done")

        steps = [ctx.step(name, add, name) for name in "ab"]
        for outcome in await asyncio.gather(*steps, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    after = await attempts(program)
    assert (after["n"], sorted(after["names"])) == (2, ["a", "b"])


async def test_what_a_thread_changes_belongs_to_no_step_that_runs_beside_it() -> None:
    begun, go, changed = threading.Event(), threading.Event(), threading.Event()

    async def program(ctx: TaskContext) -> None:
        def in_thread() -> None:
            begun.set()
            go.wait(SECONDS)
            ctx.memory.setdefault("list", []).append("thread")
            changed.set()
            if ctx.attempt == 1:
                raise RuntimeError("the thread fails once; the step beside it is done")

        async def beside() -> None:
            await until(begun.is_set)
            go.set()
            changed.wait(SECONDS)  # it changes memory while this coroutine runs
            ctx.memory.setdefault("list", []).append("beside")

        steps = [ctx.step("thread", in_thread), ctx.step("beside", beside)]
        for outcome in await asyncio.gather(*steps, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    assert sorted((await attempts(program))["list"]) == ["beside", "thread"]


async def test_a_list_that_the_handler_holds_is_the_one_that_a_thread_continued() -> None:
    runtime = make_runtime()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        notes = ctx.memory.setdefault("notes", [])
        await ctx.step("in a thread", lambda: ctx.memory["notes"].append("thread"))
        notes.append("handler")
        await ctx.step("given", lambda: _append(ctx.memory["notes"], "coroutine"))

    await with_agent(runtime)
    await runtime.tasks.result(await runtime.tasks.submit("alice", "w"))
    memory = (await stored_agent(runtime)).context.working_memory
    assert memory == {"notes": ["thread", "handler", "coroutine"]}
    await runtime.stop()


async def _append(notes: list[str], note: str) -> None:
    notes.append(note)


# -- the same type at once and after a restart -------------------------------------------------


@dataclass
class Point:
    x: int
    tags: tuple[str, ...] = ()


class Model(BaseModel):
    x: int


class Pair(NamedTuple):
    a: int
    b: int


Loose = namedtuple("Loose", "a b")  # noqa: PYI024  # what people write


def make_point() -> Point:
    return Point(1, ("t",))


async def make_model() -> Model:
    return Model(x=1)


def make_pair() -> Pair:
    return Pair(1, 2)


def make_points() -> list[Point]:
    return [Point(1)]


def make_tuple() -> tuple[int, str]:
    return (1, "a")


def make_set() -> set[int]:
    return {1}


@pytest.mark.parametrize(
    ("function", "stored", "given"),
    [
        (make_point, {"x": 1, "tags": ["t"]}, Point(1, ("t",))),
        (make_model, {"x": 1}, Model(x=1)),
        (make_pair, [1, 2], Pair(1, 2)),
        (make_points, [{"x": 1, "tags": []}], [Point(1)]),
        (make_tuple, [1, "a"], (1, "a")),
        (make_set, [1], {1}),
        (lambda: Point(1), {"x": 1, "tags": []}, {"x": 1, "tags": []}),
        (lambda: Model(x=1), {"x": 1}, {"x": 1}),
        (lambda: Loose(1, (2,)), [1, [2]], [1, [2]]),
        (lambda: {"p": Point(1)}, {"p": {"x": 1, "tags": []}}, {"p": {"x": 1, "tags": []}}),
    ],
)
async def test_a_step_gives_the_same_at_once_and_in_the_next_attempt(
    function: Callable[[], Any], stored: Any, given: Any
) -> None:
    runtime = retrying()
    results: list[Any] = []

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> Any:
        results.append(await ctx.step("s", function))
        if ctx.attempt == 1:
            raise RuntimeError("again")
        return results[0] if not isinstance(results[0], set) else stored

    await with_agent(runtime)
    task = await runtime.tasks.submit("alice", "w")
    at_once = await runtime.tasks.result(task)
    assert results == [given, given]
    assert [type(result) for result in results] == [type(given)] * 2
    done = await runtime.tasks.get(task)
    assert (done.steps["s"].result, done.result) == (stored, stored)
    assert (at_once, type(at_once)) == (stored, type(stored))
    await runtime.stop()


# -- sent once ---------------------------------------------------------------------------------


async def test_what_a_task_sends_is_sent_once_whatever_cleanup_archives_meanwhile() -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock, retry=AT_ONCE)
    ran = []

    @runtime.handler("other")
    async def other(ctx: TaskContext, task: Task) -> None:
        ran.append(task.name)

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        [question] = await ctx.inbox()
        await ctx.send_mail("bob", subject="news")
        await ctx.send_mail("bob", subject="keyed", dedupe_key="k")
        await ctx.reply(question, "answer")
        await ctx.submit("bob", "errand")
        await ctx.submit("bob", "keyed errand", dedupe_key="k")
        if ctx.attempt < 3:
            await until(lambda: len(ran) == 2)
            for message in runtime.mail.inbox("bob"):
                await runtime.mail.archive("bob", message.message_id)
            clock.jump(100 * 3600)
            await runtime.cleanup_old_states(1)
            raise RuntimeError("again")

    await with_agent(runtime)
    await runtime.agents.create("bob", agent_type="other")
    await runtime.mail.send("bob", "alice", subject="question", expects_reply=True)
    task = await runtime.tasks.submit("alice", "w")
    await runtime.tasks.result(task)
    await runtime.wait_idle()
    history = await runtime.mail.history("bob")
    assert sorted(m.subject for m in history) == ["Re: question", "keyed", "news"]
    assert sorted(ran) == ["errand", "keyed errand"]

    # With the task archived nothing keeps what it sent: one cleanup takes them all.
    for message in runtime.mail.inbox("bob"):
        await runtime.mail.archive("bob", message.message_id)
    clock.jump(100 * 3600)
    await runtime.cleanup_old_states(1)
    assert await runtime.manager.keys("mail", "bob") == []
    assert await runtime.manager.keys("tasks") == []
    await runtime.stop()


# -- commits whose outcome is not known --------------------------------------------------------


async def test_the_end_that_was_stored_without_a_reply_is_not_undone_by_the_next_task() -> None:
    clock = FakeClock()
    store = TroubledStore(clock)
    runtime = make_runtime(store, clock)

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> int:
        ctx.memory["n"] = ctx.memory.get("n", 0) + 1
        for message in await ctx.inbox():
            await ctx.read_mail(message.message_id)
        store.unknown = puts("tasks", '"completed"') if task.name == "first" else lambda _: False
        return int(ctx.memory["n"])

    await with_agent(runtime)
    await runtime.mail.send("bob", "alice", subject="s")
    first = asyncio.ensure_future(
        runtime.tasks.result(await runtime.tasks.submit("alice", "first"))
    )
    await until(lambda: clock.sleepers)
    await clock.advance(1)
    assert await first == 1
    assert await runtime.tasks.result(await runtime.tasks.submit("alice", "second")) == 2
    assert runtime.mail.inbox("alice") == []
    [message] = await runtime.mail.history("alice")
    assert message.status == "read"
    await runtime.stop()


async def test_an_end_that_was_stored_without_a_reply_and_cleaned_up_is_not_stored_again() -> None:
    clock = FakeClock()
    store = TroubledStore(clock)
    runtime = make_runtime(store, clock)

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> int:
        ctx.memory["n"] = ctx.memory.get("n", 0) + 1
        store.unknown = puts("tasks", '"completed"')
        return int(ctx.memory["n"])

    await with_agent(runtime)
    done = asyncio.ensure_future(runtime.tasks.result(await runtime.tasks.submit("alice", "x")))
    await until(lambda: runtime.state.agents["alice"].unconfirmed is not None)
    clock.jump(3600)
    await runtime.cleanup_old_states(0.5)
    await clock.advance(1)
    assert await done == 1
    assert await runtime.manager.keys("tasks") == []
    assert (await stored_agent(runtime)).context.working_memory == {"n": 1}
    assert runtime.agents.get("alice").context.working_memory == {"n": 1}
    await runtime.stop()


@pytest.mark.parametrize("ending", ["unknown", "cancelled"])
async def test_a_checkpoint_whose_outcome_its_handler_never_heard_of_counts_if_it_was_stored(
    ending: str,
) -> None:
    clock = FakeClock()
    store = TroubledStore(clock)
    runtime = make_runtime(store, clock, retry=AT_ONCE)
    seen: list[tuple[Any, ...]] = []

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        unread = [message.message_id for message in await ctx.inbox()]
        seen.append((dict(ctx.memory), ctx.progress, len(unread)))
        if ctx.progress:
            return
        ctx.memory["n"] = 1
        await ctx.read_mail(unread[0])
        picked = puts("tasks", '"at":1')
        if ending == "unknown":
            store.unknown = picked
        else:
            store.hold = picked
        await ctx.checkpoint({"at": 1})

    await with_agent(runtime)
    await runtime.mail.send("bob", "alice", subject="s")
    task = await runtime.tasks.submit("alice", "w", timeout_seconds=5)
    if ending == "cancelled":
        await store.held.wait()
        await clock.advance(6)
        store.gate.set()
    await runtime.tasks.result(task)
    assert seen == [({}, {}, 1), ({"n": 1}, {"at": 1}, 0)]
    stored = await runtime.manager.load("mail", ("alice", runtime_mail_id(runtime)))
    assert isinstance(stored, MailMessage)
    assert stored.status == "read"
    await runtime.stop()


def runtime_mail_id(runtime: AsyncAgentSessionManager) -> str:
    [message] = runtime.mail.inbox("alice", status=None)
    return message.message_id


async def test_code_that_outlives_its_attempt_changes_nothing() -> None:
    runtime = retrying()
    left: list[asyncio.Task[None]] = []
    errors: list[str] = []
    go = asyncio.Event()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        async def linger() -> None:
            await go.wait()
            ctx.memory["late"] = True
            for call in (
                lambda: ctx.checkpoint({"late": True}),
                lambda: ctx.send_mail("bob", subject="late"),
                lambda: ctx.submit("alice", "late"),
                lambda: ctx.step("late", int),
                ctx.inbox,
                lambda: ctx.sleep(seconds=1),
                lambda: ctx.results([]),
                lambda: ctx.read_mail("late"),
                lambda: ctx.archive_mail("late"),
                lambda: ctx.take(RateLimit("late", 1, 1)),
            ):
                try:
                    await call()
                except Exception as error:  # noqa: BLE001
                    errors.append(type(error).__name__)

        if task.name == "w":
            left.append(asyncio.ensure_future(linger()))

    await with_agent(runtime)
    await runtime.tasks.result(await runtime.tasks.submit("alice", "w"))
    go.set()
    await left[0]
    await runtime.tasks.result(await runtime.tasks.submit("alice", "next"))
    assert errors == ["LeaseLostError"] * 10
    assert (await stored_agent(runtime)).context.working_memory == {}
    assert [task.name for task in await runtime.tasks.list("alice")] == ["w", "next"]
    assert await runtime.manager.keys("mail") == []
    await runtime.stop()
