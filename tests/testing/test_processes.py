"""A pretended process ends as a real one: what it leaves on disk, and what reaches the test."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent_state import (
    AgentRuntime,
    AgentStateError,
    MemoryStateStore,
    StatePersistenceManager,
    Task,
    TaskContext,
)
from agent_state.testing import (
    CrashPoint,
    FakeClock,
    Fault,
    FaultyDisk,
    ProcessGroup,
    assert_restored_equal,
    kill,
    read_state,
)
from tests.deadlines import soon

KILLED = """
import asyncio, os, signal, sys
from tests.testing.test_processes import work
from agent_state.testing import Fault, FaultyDisk

root, exclusive, call, at, action = sys.argv[1:]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

with FaultyDisk(Fault(int(at), call, action), at_crash=die):
    asyncio.run(work(root, exclusive == "True"))
"""


async def work(root: str | Path, exclusive: bool) -> None:
    """The same changes in every process: documents, a group, a log, a delete."""
    clock = FakeClock()
    async with StatePersistenceManager(
        root, exclusive=exclusive, durability="os", clock=clock
    ) as manager:
        await manager.save_agent_state("alice", {"agent_id": "alice"})
        async with manager.group() as group:
            group.save("agents", "bob", {"agent_id": "bob"})
            group.save("sleep", "bob", {"agent_id": "bob", "is_sleeping": True})
            group.append("notes", "all", {"n": 1})
        await manager.flush()
        await manager.append("notes", "all", {"n": 2})
        async with manager.edit("agents", "alice") as alice:
            alice.status = "active"
        await manager.delete("sleep", "bob")
        await manager.flush()


def files_of(root: Path) -> dict[str, bytes]:
    """Every file below a directory; a lock's has the number of its process, and ids are random."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and ".locks" not in path.parts
    }


def shape_of(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files with the random part of a temporary file's name, and of a record's, left out."""
    shaped = {}
    for name, content in files.items():
        folder, _, last = name.rpartition("/")
        if last.startswith(".tmp-"):
            last = ".tmp"
        elif folder == ".journal":
            last = "record"
        shaped[f"{folder}/{last}"] = content
    return shaped


@pytest.mark.parametrize(
    ("exclusive", "call", "at", "action"),
    [
        (False, "rename", 2, "crash after"),
        (False, "write", 5, "crash torn"),
        (True, "rename", 1, "crash before"),
        (True, "write", 4, "crash torn"),
    ],
)
async def test_a_crash_leaves_what_a_killed_process_leaves(
    exclusive: bool, call: str, at: int, action: Any, tmp_path: Path
) -> None:
    pretended, real = tmp_path / "pretended", tmp_path / "real"

    async with CrashPoint(pretended, call=call, at=at, action=action) as point:
        await work(pretended, exclusive)
    assert point.happened

    arguments = [str(real), str(exclusive), call, str(at), action]
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", KILLED, *arguments], cwd=Path(__file__).parents[2]
    )
    assert done.returncode == -signal.SIGKILL
    assert shape_of(files_of(pretended)) == shape_of(files_of(real))
    async with StatePersistenceManager(pretended, exclusive=True) as manager:
        ours = await read_state(manager)
    async with StatePersistenceManager(real, exclusive=True) as manager:
        await assert_restored_equal(ours, manager)


@pytest.mark.parametrize("exclusive", [False, True])
async def test_a_killed_manager_writes_nothing_more_and_holds_no_lock(
    exclusive: bool, state_dir: Path
) -> None:
    manager = StatePersistenceManager(state_dir, exclusive=exclusive)
    await manager.open()
    threads = threading.active_count()
    await manager.save("notes", "a", {"n": 1})
    lock = manager.lock("notes", "b")
    await lock.__aenter__()
    before = files_of(state_dir)

    await soon(kill(manager))

    assert files_of(state_dir) == before
    assert threading.active_count() < threads
    with pytest.raises(AgentStateError, match="not open"):
        await manager.save("notes", "a", {"n": 2})
    async with StatePersistenceManager(state_dir, exclusive=True) as heir:
        assert await read_state(heir) == {"notes/a": {"n": 1}}
        await heir.save("notes", "b", {"n": 3})


async def test_a_kill_ends_a_handler_where_it_is_and_its_last_words_reach_no_disk(
    state_dir: Path,
) -> None:
    begun, words = asyncio.Event(), list[str]()
    runtime = AgentRuntime(state_dir)

    @runtime.task("work", agent_type="worker")
    async def handle(ctx: TaskContext) -> None:
        await ctx.checkpoint({"half": True})
        ctx.memory["lost"] = True
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            words.append("finally")
            await ctx.checkpoint({"half": False})

    await runtime.start()
    await runtime.agents.create("ann", agent_type="worker")
    task = await runtime.tasks.submit("ann", "work")
    await begun.wait()
    await soon(kill(runtime))

    async with StatePersistenceManager(state_dir) as manager:
        [stored] = [state async for state in manager.scan("tasks")]
        ann = await manager.load_agent_state("ann")
    assert isinstance(stored.state, Task)
    assert (stored.state.task_id, stored.state.status) == (task.task_id, "in_progress")
    assert stored.state.progress == {"half": True}
    assert ann is not None
    assert ann.context.working_memory == {}


async def test_another_directory_of_the_process_does_not_notice_a_kill(tmp_path: Path) -> None:
    doomed = StatePersistenceManager(tmp_path / "doomed")
    await doomed.open()
    async with StatePersistenceManager(tmp_path / "other", exclusive=True) as other:
        saves = [asyncio.ensure_future(other.save("notes", str(n), {"n": n})) for n in range(50)]
        await kill(doomed)
        assert await asyncio.gather(*saves) == [1] * 50


def test_a_disk_counts_only_what_is_below_its_directory(tmp_path: Path) -> None:
    async def save(manager: StatePersistenceManager) -> None:
        await manager.save("notes", "a", {"n": 1})

    async def main() -> None:
        async with (
            StatePersistenceManager(tmp_path / "here") as here,
            StatePersistenceManager(tmp_path / "there") as there,
        ):
            with FaultyDisk(Fault(1, "rename"), under=tmp_path / "here") as disk:
                await save(there)
                assert disk.calls == []
                with pytest.raises(AgentStateError):
                    await save(here)

    asyncio.run(main())


async def test_the_crash_reaches_a_test_that_waits_for_a_task(state_dir: Path) -> None:
    group = ProcessGroup()
    runtime = await group.begin(lambda: AgentRuntime(state_dir))

    @runtime.task("work", agent_type="worker")
    async def handle(ctx: TaskContext) -> str:
        await ctx.step("one", dict)
        await ctx.step("two", dict)
        return "done"

    await runtime.agents.create("ann", agent_type="worker")
    async with asyncio.timeout(60), CrashPoint(state_dir, commits=4, group=group) as point:
        task = await runtime.tasks.submit("ann", "work")
        await runtime.tasks.result(task)
    assert point.happened
    assert group.living == []

    runtime = await soon(group.restart(runtime))
    [known] = await runtime.tasks.list("ann")
    assert await soon(runtime.tasks.result(known)) == "done"
    assert (await runtime.tasks.get(known)).interruptions == 1
    await group.end()


@pytest.mark.parametrize("within", ["group", "gather"])
async def test_the_crash_reaches_tasks_within_the_block(state_dir: Path, within: str) -> None:
    async def save_for_ever(manager: StatePersistenceManager, name: str) -> None:
        for n in range(10**9):
            await manager.save("notes", name, {"n": n})

    async with (
        asyncio.timeout(60),
        CrashPoint(state_dir, commits=5) as point,
        StatePersistenceManager(state_dir, exclusive=True) as manager,
    ):
        if within == "group":
            async with asyncio.TaskGroup() as tasks:
                for name in "ab":
                    tasks.create_task(save_for_ever(manager, name))
        await asyncio.gather(*(save_for_ever(manager, name) for name in "ab"))
    assert point.happened
    await asyncio.sleep(0)
    assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]


@pytest.mark.parametrize("commits", [1, 2, 3])
@pytest.mark.parametrize("store", ["memory", "shared", "exclusive"])
async def test_a_crash_after_commits_keeps_just_these(
    commits: int, store: str, state_dir: Path
) -> None:
    kept = MemoryStateStore()
    acknowledged = 0

    def make() -> StatePersistenceManager:
        if store == "memory":
            return StatePersistenceManager(store=kept)
        return StatePersistenceManager(state_dir, exclusive=store == "exclusive")

    root = None if store == "memory" else state_dir
    async with CrashPoint(root, commits=commits), make() as manager:
        for n in range(1, 10):
            await manager.save("notes", str(n), {"n": n})
            acknowledged = n

    assert acknowledged == commits - 1
    async with make() as manager:
        assert [*await read_state(manager, kinds=["notes"])] == [
            f"notes/{n}" for n in range(1, commits + 1)
        ]


async def test_a_block_that_does_not_come_to_its_crash_fails(state_dir: Path) -> None:
    async def save() -> None:
        async with StatePersistenceManager(state_dir) as manager:
            await manager.save("notes", "a", {"n": 1})

    with pytest.raises(AssertionError, match="it made 1 of 3 commits"):
        async with CrashPoint(state_dir, commits=3):
            await save()
    with pytest.raises(AssertionError, match="it made 0 of 1 calls of rmdir"):
        async with CrashPoint(state_dir, call="rmdir"):
            await save()


async def test_an_error_of_the_test_in_the_block_is_the_tests(state_dir: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        async with CrashPoint(state_dir, commits=3):
            raise ZeroDivisionError
    with pytest.raises(asyncio.CancelledError):
        async with CrashPoint(state_dir, commits=3):
            raise asyncio.CancelledError


@pytest.mark.parametrize(
    "make",
    [
        lambda: CrashPoint("state"),
        lambda: CrashPoint("state", call="rename", commits=1),
        lambda: CrashPoint(None, call="rename"),
    ],
)
def test_a_crash_without_a_place_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(TypeError):
        make()


def test_calls_and_commits_are_counted_from_one() -> None:
    with pytest.raises(ValueError, match="from 1"):
        CrashPoint("state", call="rename", at=0)
    with pytest.raises(ValueError, match="from 1"):
        CrashPoint("state", commits=0)
    for number in (1.5, "2", True):
        with pytest.raises(TypeError, match="by an integer"):
            CrashPoint("state", commits=number)  # type: ignore[arg-type]  # that is the point
        with pytest.raises(TypeError, match="by an integer"):
            Fault(number, "rename")  # type: ignore[arg-type]


def test_a_crash_at_what_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no such system call: teleport; there are open, close"):
        CrashPoint("state", call="teleport")
    with pytest.raises(ValueError, match="no such system call: sync"):
        Fault(1, frozenset({"rename", "sync"}))
    for action in ("crash", "", None):
        with pytest.raises(ValueError, match="no such action"):
            Fault(1, "rename", action)  # type: ignore[arg-type]  # that is the point
    with pytest.raises(ValueError, match="'fail' is no crash"):
        CrashPoint("state", call="rename", action="fail")


# -- restarts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("agent_runtime", ["memory", "shared", "exclusive"], indirect=True)
@pytest.mark.parametrize("crash", [False, True])
async def test_a_restarted_runtime_has_the_handlers_and_goes_on(
    agent_runtime: AgentRuntime, restart: Any, fake_clock: FakeClock, crash: bool
) -> None:
    @agent_runtime.task("nap", agent_type="worker")
    async def nap(ctx: TaskContext) -> str:
        ctx.memory["begun"] = ctx.memory.get("begun", 0) + 1
        await ctx.checkpoint({})
        await fake_clock.sleep(60)
        return "slept"

    await agent_runtime.agents.create("ann", agent_type="worker")
    task = await agent_runtime.tasks.submit("ann", "nap")
    await fake_clock.advance(30)

    old = agent_runtime.state.owner
    runtime = await soon(restart(agent_runtime, crash=crash))
    assert runtime is not agent_runtime
    assert runtime.state.owner != old

    await fake_clock.advance(120)
    assert await soon(runtime.tasks.result(task)) == "slept"
    done = await runtime.tasks.get(task)
    assert done.interruptions == (1 if crash else 0)
    assert runtime.agents.get("ann").context.working_memory == {"begun": 2}


@pytest.mark.parametrize("crash", [False, True])
async def test_what_was_acknowledged_is_there_after_a_restart(
    state_manager: StatePersistenceManager, restart: Any, crash: bool
) -> None:
    await state_manager.save_agent_state("ann", {"agent_id": "ann", "mood": "good"})
    await state_manager.append("notes", "all", {"n": 1})
    before = await read_state(state_manager, kinds=["notes"])
    assert [*before] == ["agents/ann", "notes/all.jsonl"]

    manager = await soon(restart(state_manager, crash=crash))

    await assert_restored_equal(before, await read_state(manager, kinds=["notes"]))
    manager = await soon(restart(manager, crash=crash))
    await manager.save_agent_state("ann", {"agent_id": "ann", "mood": "better"})
    with pytest.raises(AssertionError, match=r'(?s)- .*"good".*\+ .*"better"'):
        await assert_restored_equal(before, manager)
    await assert_restored_equal(
        {"agents/ann": before["agents/ann"]},
        {"agents/ann": (await read_state(manager))["agents/ann"]},
        ignore=["mood"],
    )


async def test_only_what_the_fixtures_made_is_restarted(restart: Any) -> None:
    with pytest.raises(TypeError, match=r"agent_state\.testing\.kill"):
        await restart(StatePersistenceManager("elsewhere"))


@pytest.mark.parametrize("crash", [False, True])
async def test_what_was_restarted_is_not_restarted_again(
    state_manager: StatePersistenceManager, restart: Any, crash: bool
) -> None:
    manager = await restart(state_manager, crash=crash)
    with pytest.raises(ValueError, match="use what `restart` returned"):
        await restart(state_manager)
    await manager.save("notes", "one", {})
