"""Handlers by task name: which one a task gets, what it is given, and how it is run."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Any

import pytest
from pydantic import BaseModel, Field
from typing_extensions import TypedDict  # pydantic asks for it before Python 3.12

from agent_state import (
    InvalidPayloadError,
    MemoryStateStore,
    RateLimit,
    RetryPolicy,
    StateValidationError,
    Task,
    TaskContext,
    TaskFailedError,
)
from agent_state.testing import FakeClock
from tests.deadlines import until
from tests.runtime.runtimes import counted, make_runtime, with_agent

AT_ONCE = RetryPolicy(base_seconds=0.0, jitter=0.0)


class Tone(Enum):
    DRY = "dry"
    WARM = "warm"


class Letter(BaseModel):
    text: str
    tone: Tone = Tone.DRY
    due: datetime | None = None
    words: set[str] = Field(default_factory=set)


@dataclass
class Summary:
    text: str
    length: int


class Point(TypedDict):
    x: int
    y: int


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="agent_state.runtime")
    return caplog


async def test_a_task_gets_the_handler_of_its_name_and_else_that_of_the_agent_type() -> None:
    runtime = make_runtime()

    @runtime.task("shout", agent_type="worker")
    async def shout(ctx: TaskContext, task: Task) -> str:
        return str(task.payload["text"]).upper()

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> str:
        return task.name

    @runtime.task("shout", agent_type="other")
    async def other(ctx: TaskContext) -> str:
        return "another type's"

    await with_agent(runtime)
    await runtime.agents.create("bob", agent_type="other")
    shouted = await runtime.tasks.submit("alice", "shout", {"text": "hi"})
    whispered = await runtime.tasks.submit("alice", "whisper")
    others = await runtime.tasks.submit("bob", "shout")
    assert await runtime.tasks.result(shouted) == "HI"
    assert await runtime.tasks.result(whispered) == "whisper"
    assert await runtime.tasks.result(others) == "another type's"
    await runtime.stop()


async def test_two_handlers_of_one_name_and_a_plain_function_are_refused() -> None:
    runtime = make_runtime()

    @runtime.task("plan", agent_type="worker")
    async def plan(ctx: TaskContext) -> None: ...

    async def three(ctx: TaskContext, task: Task, more: int) -> None: ...

    with pytest.raises(ValueError, match="'plan' of agent type 'worker' has a handler already"):
        runtime.task("plan", agent_type="worker")(plan)
    with pytest.raises(TypeError, match="must be an async function"):
        runtime.task("draw", agent_type="worker")(lambda _: None)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="takes its context"):
        runtime.task("draw", agent_type="worker")(three)  # type: ignore[type-var]
    with pytest.raises(StateValidationError, match="timeout_seconds"):
        runtime.task("draw", agent_type="worker", timeout_seconds=0)
    with pytest.raises(StateValidationError, match="max_attempts"):
        runtime.handler("draw", max_attempts=0)
    with pytest.raises(StateValidationError, match="priority"):
        runtime.on_mail("draw", priority="high up")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no step from version 2 to version 2"):
        runtime.task("draw", agent_type="worker", version=2, migrations={2: dict})(plan)


async def test_a_task_without_a_handler_waits_is_said_and_does_not_hold_up_the_others(
    log: pytest.LogCaptureFixture,
) -> None:
    runtime = make_runtime()

    @runtime.task("known", agent_type="worker")
    async def known(ctx: TaskContext) -> str:
        return "done"

    await with_agent(runtime)
    first = await runtime.tasks.submit("alice", "knwon", priority="urgent")
    again = await runtime.tasks.submit("alice", "knwon")
    last = await runtime.tasks.submit("alice", "known")
    assert await runtime.tasks.result(last) == "done"
    await runtime.wait_idle()
    assert (await runtime.tasks.get(first)).attempts == 0
    [warning] = [record.getMessage() for record in log.records if "waits" in record.getMessage()]
    assert first.task_id in warning
    assert "'knwon'" in warning
    assert "'known'" in warning

    @runtime.task("knwon", agent_type="worker")
    async def typo(ctx: TaskContext) -> str:
        return "at last"

    assert await runtime.tasks.result(first) == "at last"
    assert await runtime.tasks.result(again) == "at last"
    await runtime.stop()


async def test_a_failed_task_whose_handler_a_deploy_took_away_waits() -> None:
    clock = FakeClock()
    store = MemoryStateStore(clock=clock)
    runtime = make_runtime(store, clock)

    @runtime.task("old", agent_type="worker")
    async def old(ctx: TaskContext) -> None:
        raise ConnectionError

    await with_agent(runtime)
    task = await runtime.tasks.submit("alice", "old")
    await until(lambda: runtime.state.agents["alice"].tasks[task.task_id].task.status == "failed")
    await runtime.stop()

    deployed = make_runtime(store, clock, name="new")

    @deployed.task("new", agent_type="worker")
    async def new(ctx: TaskContext) -> str:
        return "new"

    await deployed.start()
    await clock.advance(3600)
    assert await deployed.tasks.result(await deployed.tasks.submit("alice", "new")) == "new"
    await deployed.wait_idle()
    assert (await deployed.tasks.get(task)).status == "failed"
    await deployed.stop()


async def test_priority_and_age_decide_across_names_that_were_blocked_and_others() -> None:
    runtime = make_runtime()
    ran: list[str] = []
    gate = asyncio.Event()

    @runtime.task("gate", agent_type="worker")
    async def hold(ctx: TaskContext) -> None:
        await gate.wait()

    await with_agent(runtime)
    await runtime.tasks.submit("alice", "late", {"n": "late"})  # blocked: no handler yet
    await runtime.wait_idle()
    await runtime.tasks.submit("alice", "gate")
    for number, priority in enumerate(("low", "urgent", "normal")):
        for name in ("late", "other"):
            payload = {"n": f"{name} {number}"}
            await runtime.tasks.submit("alice", name, payload, priority=priority)  # type: ignore[arg-type]

    for name in ("late", "other"):

        @runtime.task(name, agent_type="worker")
        async def handle(ctx: TaskContext, task: Task) -> None:
            ran.append(task.payload["n"])

    gate.set()
    await runtime.wait_idle()
    assert ran == ["late 1", "other 1", "late", "late 2", "other 2", "late 0", "other 0"]
    await runtime.stop()


async def test_choosing_a_task_costs_the_same_however_many_names_have_no_handler() -> None:
    costs = []
    for count in (100, 1000):
        runtime = make_runtime()

        @runtime.task("known", agent_type="worker")
        async def known(ctx: TaskContext) -> None: ...

        await with_agent(runtime)
        for number in range(count):
            await runtime.tasks.submit("alice", f"unknown {number}")
        await runtime.wait_idle()
        agent = runtime.state.agents["alice"]
        with counted() as cost:
            assert agent.next_task(runtime.state.clock.now()) is None
            costs.append(cost())
        await runtime.stop()
    assert costs[1] <= costs[0] + 10


# -- payloads ----------------------------------------------------------------------------------


async def test_a_payload_is_given_as_the_type_of_the_annotation() -> None:
    runtime = make_runtime()
    given: list[Any] = []

    @runtime.task("letter", agent_type="worker")
    async def letter(ctx: TaskContext, payload: Letter) -> None:
        given.append(payload)

    @runtime.task("summary", agent_type="worker")
    async def summary(ctx: TaskContext, payload: Summary) -> None:
        given.append(payload)

    @runtime.task("point", agent_type="worker")
    async def point(ctx: TaskContext, payload: Point) -> None:
        given.append(payload)

    class Local(BaseModel):
        name: str = Field(alias="Name")

    @runtime.task("local", agent_type="worker")
    async def local(ctx: TaskContext, payload: Local) -> None:
        given.append(payload)

    await with_agent(runtime)
    sent = Letter(
        text="a", tone=Tone.WARM, due=datetime.fromisoformat("2026-03-01T00:00:00Z"), words={"x"}
    )
    tasks = [
        await runtime.tasks.submit("alice", "letter", sent),
        await runtime.tasks.submit("alice", "letter", {"text": "b", "tone": "warm"}),
        await runtime.tasks.submit("alice", "summary", Summary("c", 1)),
        await runtime.tasks.submit("alice", "point", {"x": 1, "y": 2}),
        await runtime.tasks.submit("alice", "local", Local(Name="d")),
    ]
    for task in tasks:
        await runtime.tasks.result(task)
    assert given == [
        sent,
        Letter(text="b", tone=Tone.WARM),
        Summary("c", 1),
        {"x": 1, "y": 2},
        Local(Name="d"),
    ]
    assert (await runtime.tasks.get(tasks[1])).payload == {"text": "b", "tone": "warm"}
    await runtime.stop()


@pytest.mark.parametrize(
    "payload", [{"text": 5}, {}, {"text": "a", "tone": "angry"}, Summary("a", 1), None, 7]
)
async def test_a_payload_of_another_type_is_refused_when_it_is_queued(payload: object) -> None:
    runtime = make_runtime()

    @runtime.task("letter", agent_type="worker")
    async def letter(ctx: TaskContext, payload: Letter) -> None: ...

    await with_agent(runtime)
    with pytest.raises(InvalidPayloadError, match="payload"):
        await runtime.tasks.submit("alice", "letter", payload)
    assert await runtime.tasks.list("alice") == []
    await runtime.stop()


async def test_a_queued_payload_that_is_not_valid_ends_its_task_at_once_and_is_seen(
    log: pytest.LogCaptureFixture,
) -> None:
    store = MemoryStateStore(clock=FakeClock())
    before = make_runtime(store)
    await with_agent(before)
    task = await before.tasks.submit("alice", "letter", {"body": "secret"})
    await before.stop()

    after = make_runtime(store, name="after")

    @after.task("letter", agent_type="worker")
    async def letter(ctx: TaskContext, payload: Letter) -> None:
        raise AssertionError("never called")

    await after.start()
    with pytest.raises(TaskFailedError) as raised:
        await after.tasks.result(task)
    assert isinstance(raised.value.__cause__, InvalidPayloadError)
    assert raised.value.__cause__.key == ("alice", task.task_id)
    stored = await after.tasks.get(task)
    assert (stored.status, stored.attempts) == ("dead", 1)
    assert stored.error is not None
    assert stored.error.startswith("InvalidPayloadError: the payload is not valid: text:")
    assert "secret" not in stored.error
    [error] = [record for record in log.records if record.levelno == logging.ERROR]
    assert task.task_id in error.getMessage()
    assert "text: Field required" in error.getMessage()
    await after.stop()


async def test_the_payload_of_an_older_deploy_is_migrated_step_by_step() -> None:
    store = MemoryStateStore(clock=FakeClock())
    first = make_runtime(store)

    @first.task("add", agent_type="other")
    async def add(ctx: TaskContext, task: Task) -> None: ...

    await with_agent(first)
    one = await first.tasks.submit("alice", "add", {"x": 1})
    await first.stop()

    second = make_runtime(store, name="second")

    @second.task(
        "add", agent_type="worker", version=2, migrations={1: lambda old: {"n": [old["x"]]}}
    )
    async def add_second(ctx: TaskContext, task: Task) -> None:
        raise ConnectionError

    await second.start()
    await second.agents.stop("alice")
    two = await second.tasks.submit("alice", "add", {"n": [2, 3]})
    assert (await second.tasks.get(two)).payload_version == 2
    await second.agents.start("alice")
    agent = second.state.agents["alice"]
    await until(lambda: agent.tasks[two.task_id].task.status == "failed")
    await second.stop()

    clock = FakeClock(datetime.fromisoformat("2026-02-01T00:00:00Z"))
    third = make_runtime(store, clock, name="third")

    def to_second(old: dict[str, Any]) -> dict[str, Any]:
        old["n"] = [old.pop("x")]  # what a migration does to its argument changes nothing stored
        return old

    @third.task(
        "add",
        agent_type="worker",
        version=3,
        migrations={1: to_second, 2: lambda old: {"x": old["n"][0], "y": sum(old["n"])}},
    )
    async def add_third(ctx: TaskContext, payload: Point) -> int:
        return payload["x"] * 100 + payload["y"]

    await third.start()
    assert await third.tasks.result(one) == 101
    assert await third.tasks.result(two) == 205
    done = await third.tasks.get(one)
    assert (done.payload, done.payload_version) == ({"x": 1}, 1)
    await third.stop()


@pytest.mark.parametrize(
    ("version", "migrations"),
    [
        (2, {}),
        (3, {2: dict}),
        (2, {1: lambda old: {"text": old["missing"]}}),
        (2, {1: lambda _: 5}),
    ],
)
async def test_a_payload_that_cannot_be_migrated_ends_its_task_at_once(
    version: int, migrations: Any
) -> None:
    store = MemoryStateStore(clock=FakeClock())
    before = make_runtime(store)
    await with_agent(before)
    task = await before.tasks.submit("alice", "letter", {"text": "a"})
    await before.stop()
    after = make_runtime(store, name="after")

    @after.task("letter", agent_type="worker", version=version, migrations=migrations)
    async def letter(ctx: TaskContext, payload: Letter) -> None: ...

    await after.start()
    with pytest.raises(TaskFailedError, match=r"InvalidPayloadError: .*migration from version 1"):
        await after.tasks.result(task)
    assert (await after.tasks.get(task)).attempts == 1
    await after.stop()


async def test_a_task_of_a_newer_deploy_waits_for_it_and_is_said(
    log: pytest.LogCaptureFixture,
) -> None:
    clock = FakeClock()
    store = MemoryStateStore(clock=clock)

    def deploy(version: int) -> Any:
        runtime = make_runtime(store, clock, name=f"v{version}")

        @runtime.task("letter", agent_type="worker", version=version)
        async def letter(ctx: TaskContext, payload: Letter) -> int:
            return version

        return runtime

    newer = deploy(2)
    await with_agent(newer)
    await newer.agents.stop("alice")
    task = await newer.tasks.submit("alice", "letter", {"text": "a"})
    await newer.stop()

    older = deploy(1)
    await older.start()
    await older.agents.start("alice")
    assert await older.tasks.result(await older.tasks.submit("alice", "letter", {"text": "b"})) == 1
    await older.wait_idle()
    assert (await older.tasks.get(task)).attempts == 0
    assert [task.task_id in record.getMessage() for record in log.records if "newer" in record.msg]
    await older.stop()

    newer = deploy(2)
    await newer.start()
    assert await newer.tasks.result(task) == 2
    await newer.stop()


async def test_an_annotation_that_nobody_knows_is_refused_when_it_is_registered() -> None:
    runtime = make_runtime()

    async def odd(ctx: TaskContext, payload: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(TypeError, match="'Nowhere'"):
        runtime.task("odd", agent_type="worker")(odd)


# -- results -----------------------------------------------------------------------------------


async def test_a_result_is_of_the_type_of_the_annotation_where_its_handler_is_registered() -> None:
    store = MemoryStateStore(clock=FakeClock())
    runtime = make_runtime(store)

    @runtime.task("letter", agent_type="worker")
    async def letter(ctx: TaskContext) -> Letter:
        return Letter(text="a", words={"x"})

    @runtime.task("summary", agent_type="worker")
    async def summary(ctx: TaskContext) -> Summary:
        return {"text": "b", "length": 2}  # type: ignore[return-value]

    @runtime.task("wrong", agent_type="worker")
    async def wrong(ctx: TaskContext) -> Summary:
        return "b"  # type: ignore[return-value]

    await with_agent(runtime)
    written = await runtime.tasks.submit("alice", "letter")
    assert await runtime.tasks.result(written) == Letter(text="a", words={"x"})
    assert await runtime.tasks.result(written, dict) == {
        "text": "a", "tone": "dry", "due": None, "words": ["x"]
    }  # fmt: skip
    task = await runtime.tasks.submit("alice", "summary")
    assert await runtime.tasks.result(task) == Summary("b", 2)
    task = await runtime.tasks.submit("alice", "wrong")
    with pytest.raises(TaskFailedError, match="another type than it says"):
        await runtime.tasks.result(task)
    assert (await runtime.tasks.get(task)).status == "dead"
    await runtime.stop()

    elsewhere = make_runtime(store, name="elsewhere")
    await elsewhere.start()
    assert (await elsewhere.tasks.result(written))["text"] == "a"
    await elsewhere.stop()


# -- options -----------------------------------------------------------------------------------


async def test_each_handler_has_its_own_retry_policy_and_number_of_attempts() -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock, retry=AT_ONCE)
    slow = RetryPolicy(base_seconds=1000.0, max_seconds=5000.0, jitter=0.0)

    @runtime.task("slow", agent_type="worker", retry=slow, max_attempts=2)
    async def fail_slowly(ctx: TaskContext) -> None:
        raise ConnectionError

    @runtime.handler("worker", max_attempts=5)
    async def fail(ctx: TaskContext, task: Task) -> None:
        raise ConnectionError

    await with_agent(runtime)
    patient = await runtime.tasks.submit("alice", "slow")
    for given, attempts in (({}, 5), ({"max_attempts": 1}, 1)):
        task = await runtime.tasks.submit("alice", "fast", **given)  # type: ignore[arg-type]
        with pytest.raises(TaskFailedError):
            await runtime.tasks.result(task)
        assert (await runtime.tasks.get(task)).attempts == attempts
    await clock.advance(990)
    assert (await runtime.tasks.get(patient)).status == "failed"
    await clock.advance(20)
    assert (await runtime.tasks.get(patient)).status == "dead"
    await runtime.stop()


@pytest.mark.parametrize("per_handler", [True, False])
async def test_an_error_that_is_not_retried_ends_the_task_at_once(per_handler: bool) -> None:
    policy = RetryPolicy(base_seconds=0.0, jitter=0.0, not_retried=(LookupError,))
    runtime = make_runtime(retry=AT_ONCE if per_handler else policy)
    options: Any = {"retry": policy} if per_handler else {}

    @runtime.task("look", agent_type="worker", **options)
    async def look(ctx: TaskContext, task: Task) -> None:
        raise KeyError("nothing") if task.payload["here"] else ValueError("no")

    await with_agent(runtime)
    for here, attempts in ((True, 1), (False, 3)):
        task = await runtime.tasks.submit("alice", "look", {"here": here})
        with pytest.raises(TaskFailedError):
            await runtime.tasks.result(task)
        assert (await runtime.tasks.get(task)).attempts == attempts
    await runtime.stop()


async def test_an_error_that_is_not_retried_is_found_in_a_step_and_in_a_task_group() -> None:
    runtime = make_runtime(retry=AT_ONCE)
    policy = RetryPolicy(base_seconds=0.0, jitter=0.0, not_retried=(PermissionError,))
    asked: list[str] = []

    async def ask(name: str, error: Exception) -> None:
        asked.append(name)
        raise error

    @runtime.task("step", agent_type="worker", retry=policy)
    async def one(ctx: TaskContext) -> None:
        await ctx.step("ask", ask, "step", PermissionError("no key"))

    @runtime.task("group", agent_type="worker", retry=policy)
    async def many(ctx: TaskContext) -> None:
        async with asyncio.TaskGroup() as outer, asyncio.TaskGroup() as inner:
            outer.create_task(asyncio.sleep(0))
            inner.create_task(ctx.step("other", ask, "other", ConnectionError("busy")))
            inner.create_task(ctx.step("ask", ask, "group", PermissionError("no key")))

    @runtime.task("caught", agent_type="worker", retry=policy)
    async def caught(ctx: TaskContext) -> str:
        try:
            await ctx.step("ask", ask, "caught", PermissionError("no key"))
        except PermissionError:
            return "without"
        raise AssertionError

    await with_agent(runtime)
    for name in ("step", "group"):
        task = await runtime.tasks.submit("alice", name)
        with pytest.raises(TaskFailedError, match=r"PermissionError|TaskGroup"):
            await runtime.tasks.result(task)
        assert (await runtime.tasks.get(task)).attempts == 1
        assert asked.count(name) == 1
    assert await runtime.tasks.result(await runtime.tasks.submit("alice", "caught")) == "without"
    await runtime.stop()


@pytest.mark.parametrize(
    "wrong",
    [
        {"retry": 3},
        {"rate_limits": RateLimit("calls", 1)},
        {"rate_limits": ["calls"]},
        {"max_attempts": 2.5},
        {"max_attempts": 0},
        {"max_attempts": True},
        {"concurrency": 0.5},
        {"timeout_seconds": "5"},
        {"timeout_seconds": False},
        {"priority": "hihg"},
    ],
    ids=str,
)
async def test_an_option_that_is_none_is_refused_when_the_handler_is_registered(
    wrong: dict[str, Any],
) -> None:
    runtime = make_runtime()
    for register in (
        lambda: runtime.handler("worker", **wrong),
        lambda: runtime.task("look", agent_type="worker", **wrong),
        lambda: runtime.on_mail("worker", **wrong),
    ):
        with pytest.raises(StateValidationError, match=next(iter(wrong))):
            register()


@pytest.mark.parametrize("wrong", [LookupError, ("LookupError",), (LookupError(),), (3,)])
def test_what_is_no_error_cannot_be_one_that_is_not_retried(wrong: Any) -> None:
    with pytest.raises(StateValidationError, match="not_retried"):
        RetryPolicy(not_retried=wrong)


async def test_two_limits_of_one_name_are_refused_when_the_second_is_registered() -> None:
    runtime = make_runtime()

    @runtime.task("one", agent_type="worker", rate_limits=[RateLimit("calls", 10)])
    async def one(ctx: TaskContext) -> None: ...

    @runtime.task("two", agent_type="worker", rate_limits=[RateLimit("calls", 10)])
    async def two(ctx: TaskContext) -> None: ...

    with pytest.raises(StateValidationError, match="two rate limits named 'calls'"):

        @runtime.task("three", agent_type="worker", rate_limits=[RateLimit("calls", 20)])
        async def three(ctx: TaskContext) -> None: ...


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_attempts": 0},
        {"max_attempts": -1},
        {"max_attempts": 1.5},
        {"timeout_seconds": 0},
        {"timeout_seconds": float("nan")},
        {"delay_seconds": float("nan")},
        {"priority": "hihg"},
    ],
    ids=str,
)
async def test_what_a_task_cannot_have_is_refused_when_it_is_queued(wrong: dict[str, Any]) -> None:
    runtime = make_runtime()

    @runtime.task("look", agent_type="worker", max_attempts=2, timeout_seconds=5)
    async def look(ctx: TaskContext) -> None: ...

    await with_agent(runtime)
    with pytest.raises(StateValidationError, match=next(iter(wrong))):
        await runtime.tasks.submit("alice", "look", **wrong)
    assert await runtime.tasks.list("alice") == []
    task = await runtime.tasks.submit("alice", "look", delay_seconds=60)
    for seconds in (float("nan"), "5"):
        with pytest.raises(StateValidationError, match="timeout_seconds"):
            await runtime.tasks.result(task.task_id, timeout_seconds=seconds)  # type: ignore[arg-type]
    await runtime.stop()


async def test_a_handler_has_a_time_limit_unless_the_task_has_one() -> None:
    clock = FakeClock()
    runtime = make_runtime(clock=clock)

    @runtime.task("hang", agent_type="worker", timeout_seconds=10, max_attempts=1)
    async def hang(ctx: TaskContext) -> None:
        await asyncio.Event().wait()

    await with_agent(runtime)
    for given, seconds in (({}, 10), ({"timeout_seconds": 100.0}, 100)):
        task = await runtime.tasks.submit("alice", "hang", **given)  # type: ignore[arg-type]
        await clock.advance(seconds - 1)
        assert (await runtime.tasks.get(task)).status == "in_progress"
        await clock.advance(2)
        with pytest.raises(TaskFailedError, match=f"not done within {seconds} s"):
            await runtime.tasks.result(task)
    await runtime.stop()


async def test_the_tasks_of_a_handler_have_its_priority_unless_they_say_otherwise() -> None:
    runtime = make_runtime()
    ran: list[str] = []

    @runtime.task("soon", agent_type="worker", priority="high")
    async def soon(ctx: TaskContext, task: Task) -> None:
        ran.append(task.payload["n"])

    @runtime.handler("worker")
    async def worker(ctx: TaskContext, task: Task) -> None:
        ran.append(task.payload["n"])

    await with_agent(runtime)
    await runtime.agents.stop("alice")
    await runtime.tasks.submit("alice", "later", {"n": "3"})
    await runtime.tasks.submit("alice", "soon", {"n": "2"})
    await runtime.tasks.submit("alice", "soon", {"n": "4"}, priority="low")
    await runtime.tasks.submit("alice", "later", {"n": "1"}, priority="urgent")
    await runtime.agents.start("alice")
    await runtime.wait_idle()
    assert ran == ["1", "2", "3", "4"]
    await runtime.stop()


async def test_a_dedupe_key_holds_when_a_deploy_changes_the_options_of_the_handler() -> None:
    store = MemoryStateStore(clock=FakeClock())
    tasks = []
    for number, options in enumerate(({}, {"priority": "high", "max_attempts": 9, "version": 2})):
        runtime = make_runtime(store, name=f"{number}")

        @runtime.task("add", agent_type="worker", **options)  # type: ignore[arg-type]
        async def add(ctx: TaskContext) -> None: ...

        await with_agent(runtime)
        tasks.append(await runtime.tasks.submit("alice", "add", {"x": 1}, dedupe_key="one"))
        await runtime.stop()
    assert tasks[0].task_id == tasks[1].task_id
