"""Before the start: agents are created all the same, and everything else says what is missing."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from agent_state import (
    AgentRuntime,
    AsyncAgentSessionManager,
    MemoryStateStore,
    RuntimeNotStartedError,
    StateDirectoryInUseError,
    StateNotFoundError,
    StateValidationError,
    TaskFailedError,
    TaskFilter,
    TaskRequest,
)
from tests.deadlines import SECONDS, soon
from tests.runtime.runtimes import make_runtime, working


async def _called(function: Callable[[str], object], agent_id: str) -> object:
    return function(agent_id)


CALLS: dict[str, Callable[[AgentRuntime], Awaitable[object]]] = {
    "submit": lambda runtime: runtime.tasks.submit("alice", "x"),
    "get": lambda runtime: runtime.tasks.get("t"),
    "list": lambda runtime: runtime.tasks.list("alice"),
    "search": lambda runtime: runtime.tasks.search(),
    "result": lambda runtime: runtime.tasks.result("t"),
    "retry": lambda runtime: runtime.tasks.retry("t"),
    "cancel": lambda runtime: runtime.tasks.cancel(("alice", "t")),
    "delete": lambda runtime: runtime.tasks.delete("t"),
    "retry_all": lambda runtime: runtime.tasks.retry_all(),
    "cancel_all": lambda runtime: runtime.tasks.cancel_all(TaskFilter(name="x")),
    "perform": lambda runtime: runtime.tasks.perform(TaskRequest(action="delete")),
    "watch": lambda runtime: anext(runtime.tasks.watch()),
    "send": lambda runtime: runtime.mail.send("bob", "alice", subject="hello"),
    "history": lambda runtime: runtime.mail.history("alice"),
    "stop an agent": lambda runtime: runtime.agents.stop("alice"),
    "sleep": lambda runtime: runtime.agents.sleep("alice"),
    "wake": lambda runtime: runtime.agents.wake("alice"),
    "emit": lambda runtime: runtime.emit(),
    "wait_idle": lambda runtime: runtime.wait_idle(),
    "inbox": lambda runtime: _called(runtime.mail.inbox, "alice"),
    "get an agent": lambda runtime: _called(runtime.agents.get, "alice"),
    "cleanup": lambda runtime: runtime.cleanup_old_states(),
    "save all": lambda runtime: runtime.save_all_session_states(),
    "restore": lambda runtime: runtime.restore_session_state("alice"),
    "restore all": lambda runtime: runtime.restore_all_session_states(),
    "save": lambda runtime: runtime.save_session_state("alice"),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("memory", [True, False])
async def test_a_call_before_the_start_says_that_it_has_not_started(
    tmp_path: Path, name: str, memory: bool
) -> None:
    runtime = make_runtime() if memory else AgentRuntime(tmp_path / "state")
    await runtime.agents.create("alice", agent_type="worker")
    with pytest.raises(RuntimeNotStartedError, match=r"has not started.*serve"):
        await CALLS[name](runtime)


async def test_after_the_stop_an_agent_is_not_said_to_be_unknown(tmp_path: Path) -> None:
    runtime = AgentRuntime(tmp_path / "state")
    async with runtime:
        await runtime.agents.create("alice", agent_type="worker")
        with pytest.raises(StateNotFoundError):
            runtime.agents.get("nobody")
    with pytest.raises(RuntimeNotStartedError, match=r"stopped.*alice"):
        runtime.agents.get("alice")
    with pytest.raises(RuntimeNotStartedError):
        await runtime.tasks.submit("alice", "x")


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("end", ["stop", "abort"])
async def test_a_call_after_the_end_says_so(
    tmp_path: Path, name: str, memory: bool, end: str
) -> None:
    runtime = make_runtime() if memory else AgentRuntime(tmp_path / "state")
    await runtime.start()
    await runtime.agents.create("alice", agent_type="worker")
    await runtime.agents.create("bob", agent_type="worker")
    task = await runtime.tasks.submit("alice", "x")
    await (runtime.stop() if end == "stop" else runtime.abort())
    with pytest.raises(RuntimeNotStartedError, match="stopped" if end == "stop" else "aborted"):
        await soon(CALLS[name](runtime))
    await runtime.stop()
    async with runtime:  # and it can be started again
        assert (await runtime.tasks.get(task)).status == "pending"
        await runtime.wait_idle()


LATE_CALLS: dict[str, Callable[[AgentRuntime], Awaitable[object]]] = {
    "create": lambda runtime: runtime.agents.create("carol", agent_type="worker"),
    "create one that exists": lambda runtime: runtime.agents.create("alice", agent_type="worker"),
    "start an agent": lambda runtime: runtime.agents.start("alice"),
    "save all": lambda runtime: runtime.agents.save_all(),
    "replace": lambda runtime: runtime.agents.replace(
        "alice", lambda: runtime.manager.save_system_state("late", {})
    ),
    "restore": lambda runtime: runtime.agents.restore("bob"),
    "restore all": lambda runtime: runtime.agents.restore_all(),
}


@pytest.mark.parametrize("name", LATE_CALLS)
async def test_nothing_is_stored_through_a_runtime_that_was_aborted(name: str) -> None:
    store = MemoryStateStore()
    runtime = make_runtime(store)
    await runtime.start()
    await runtime.agents.create("alice", agent_type="worker")
    await runtime.agents.stop("alice")
    # A new version that only a save would store.
    runtime.state.agents["alice"].state.metadata["unsaved"] = True
    await runtime.abort()
    before = [document async for document in store.scan("agents")]
    with pytest.raises(RuntimeNotStartedError, match="aborted"):
        await soon(LATE_CALLS[name](runtime))
    assert [document async for document in store.scan("agents")] == before
    assert await store.get("system", ("late",)) is None
    await runtime.stop()


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("end", ["stop", "abort"])
async def test_whoever_waits_is_told_of_the_end(tmp_path: Path, memory: bool, end: str) -> None:
    runtime = AgentRuntime(
        None if memory else tmp_path / "state",
        store=MemoryStateStore() if memory else None,
        grace_seconds=0.0,
    )
    began = asyncio.Event()

    @runtime.handler("worker")
    async def work(_: object, __: object) -> None:
        began.set()
        await asyncio.Event().wait()

    await runtime.start()
    await runtime.agents.create("alice", agent_type="worker")
    watch = runtime.tasks.watch()
    first = asyncio.ensure_future(anext(watch))
    await runtime.agents.create("bob", agent_type="nobody")
    while not first.done():  # the watch begins at its first step
        await runtime.tasks.submit("bob", "x")
        await asyncio.sleep(0)
    task = await runtime.tasks.submit("alice", "x")
    await soon(began.wait())

    async def rest() -> None:
        async for _ in watch:
            pass

    ended = asyncio.gather(
        *(runtime.tasks.result(task), runtime.wait_idle(), rest()), return_exceptions=True
    )
    while not runtime.tasks.waiters or runtime.state.activity.is_set():
        await asyncio.sleep(0)
    await (runtime.stop() if end == "stop" else runtime.abort())
    result, idle, watched = await soon(ended)
    assert isinstance(result, TaskFailedError)
    if end == "stop":
        assert (idle, watched) == (None, None)
    else:
        assert "aborted" in str(result)
        assert isinstance(idle, RuntimeNotStartedError)
        assert isinstance(watched, RuntimeNotStartedError)
    await runtime.stop()


@pytest.mark.parametrize("exclusive", [True, False])
async def test_agents_that_are_created_before_the_start_run_from_it_on(
    tmp_path: Path, exclusive: bool
) -> None:
    runtime = AgentRuntime(tmp_path / "state", exclusive=exclusive)
    made = await asyncio.gather(
        *(runtime.agents.create(f"a{number}", agent_type="worker") for number in range(20)),
        runtime.agents.create("a0", agent_type="worker"),
    )
    assert [agent.agent_id for agent in made] == [f"a{n}" for n in range(20)] + ["a0"]
    with pytest.raises(StateValidationError, match="type 'worker'"):
        await runtime.agents.create("a1", agent_type="other")
    async with AgentRuntime(tmp_path / "state", exclusive=exclusive):
        pass  # nobody holds the directory
    working(runtime)
    async with runtime:
        assert len(runtime.agents.list()) == 20
        task = await runtime.tasks.submit("a7", "x")
        assert await soon(runtime.tasks.result(task)) == "a7"
    again = await runtime.agents.create("a7", agent_type="worker")
    assert again.context.working_memory == {}
    async with runtime:
        assert len(runtime.agents.list()) == 20


async def test_an_agent_that_is_created_as_the_runtime_starts_runs() -> None:
    runtime = make_runtime(MemoryStateStore())
    working(runtime)
    await asyncio.gather(
        runtime.agents.create("alice", agent_type="worker"),
        runtime.start(),
        runtime.agents.create("bob", agent_type="worker"),
    )
    for agent_id in ("alice", "bob"):
        task = await runtime.tasks.submit(agent_id, "x")
        assert await soon(runtime.tasks.result(task)) == agent_id
    await runtime.stop()


async def test_a_directory_that_another_runtime_owns_is_refused(tmp_path: Path) -> None:
    async with AgentRuntime(tmp_path / "state"):
        other = AgentRuntime(tmp_path / "state")
        with pytest.raises(StateDirectoryInUseError):
            await other.agents.create("alice", agent_type="worker")
        with pytest.raises(StateDirectoryInUseError):
            await other.start()
        with pytest.raises(RuntimeNotStartedError):
            await other.emit()


SERVER = """
import asyncio, sys
from agent_state import AgentRuntime

runtime = AgentRuntime(sys.argv[1])


@runtime.handler("worker")
async def worker(ctx, task):
    return 1


async def create():
    await runtime.agents.create("alice", agent_type="worker")


@runtime.on_restore
async def restored(report):
    print(report.agents, flush=True)


asyncio.run(create())  # another loop
asyncio.run(runtime.serve())
"""


async def test_agents_are_created_in_another_loop_before_serving(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVER, str(tmp_path / "state"), stdout=-1
    )
    assert process.stdout is not None
    line = await asyncio.wait_for(process.stdout.readline(), SECONDS)
    assert line == b"['alice']\n"
    process.terminate()
    assert await asyncio.wait_for(process.wait(), SECONDS) == 0


def test_the_class_has_two_names() -> None:
    assert AgentRuntime is AsyncAgentSessionManager
    assert AgentRuntime.__doc__ is not None
    assert "AgentRuntime" in AgentRuntime.__doc__
