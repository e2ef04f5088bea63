"""Whoever is cancelled, or out of time, loses nothing for others: at every await of everything."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent_state import AgentStateError, StatePersistenceManager
from agent_state.storage import FileStateStore, WALStateStore
from tests.faults.attempts import Scene
from tests.faults.interrupting import (
    CancelledAt,
    Footprint,
    PatientDisk,
    SlowSync,
    cancel_at,
    locks_held,
)
from tests.faults.operations import OPERATIONS, SCENES, perform
from tests.faults.tally import Tally

Manager = StatePersistenceManager
Run = Callable[[Manager, int], Awaitable[object]]

KINDS = pytest.mark.parametrize("exclusive", [False, True], ids=["shared", "exclusive"])
MOST = 200
"""No operation suspends so often; one that does goes round and round."""


@dataclass(frozen=True)
class Act:
    """``run`` is cancelled, ``newer`` comes after it, and ``look`` must then give its number."""

    run: Run
    newer: Run
    look: Callable[[Manager, int], Awaitable[object]]


async def save(manager: Manager, n: int) -> None:
    await manager.save("notes", "first", {"n": n})


async def saved(manager: Manager, n: int) -> object:
    state = await manager.load("notes", "first")
    return state.model_dump()["n"] if state is not None else None


async def edit(manager: Manager, n: int) -> None:
    async with manager.edit("notes", "first") as state:
        await asyncio.sleep(0)
        state.n = n


async def group(manager: Manager, n: int) -> None:
    async with manager.group() as changes:
        changes.save("notes", "first", {"n": n})
        changes.save("notes", ("deep", "second"), {"n": n})
        changes.delete("notes", "third")
        changes.append("notes", "log", {"n": n}, dedupe_key=str(n))


async def grouped(manager: Manager, n: int) -> object:
    """The number, if all parts say the same, and the log says it once."""
    other = await manager.load("notes", ("deep", "second"))
    numbers = {await saved(manager, n), other and other.model_dump()["n"]}
    numbers.add(await appended(manager, n))
    return numbers.pop() if len(numbers) == 1 else numbers


async def append(manager: Manager, n: int) -> None:
    await manager.append("notes", "log", {"n": n}, dedupe_key=str(n))


async def appended(manager: Manager, n: int) -> object:
    """The last number of the log, if each is there at most once."""
    numbers = [entry.record["n"] async for entry in manager.read_log("notes", "log")]
    return numbers[-1] if len(set(numbers)) == len(numbers) else numbers


async def append_again(manager: Manager, n: int) -> None:
    """The cancelled one once more, as its caller would, and a newer one."""
    await append(manager, n - 1)
    await append(manager, n)


async def delete(manager: Manager, n: int) -> None:
    await manager.delete("notes", "first")


async def quarantine(manager: Manager, n: int) -> None:
    await manager.flush()  # what is not in its file yet is not put aside
    await manager.store.quarantine("notes", ("first",), "no good")


async def flush(manager: Manager, n: int) -> None:
    await manager.save("notes", "first", {"n": n})
    await manager.flush()


async def queue(manager: Manager, n: int) -> None:
    tasks = [{"task_id": f"t{n}", "n": n}, {"task_id": "t", "n": n}]
    await manager.save_task_queue_state("bob", {"agent_id": "bob", "tasks": tasks})


async def queued(manager: Manager, n: int) -> object:
    state = await manager.load_task_queue_state("bob")
    assert state is not None
    numbers = [task["n"] for task in state.model_dump()["tasks"]]
    return n if numbers == [n, n] else numbers


async def mailbox(manager: Manager, n: int) -> None:
    mail = [{"message_id": f"m{n}", "subject": str(n)}, {"message_id": "m", "subject": str(n)}]
    await manager.save_mailbox_state("bob", {"agent_id": "bob", "messages": mail})


async def mailed(manager: Manager, n: int) -> object:
    state = await manager.load_mailbox_state("bob")
    assert state is not None
    numbers = [message["subject"] for message in state.model_dump()["messages"]]
    return n if numbers == [str(n)] * 2 else numbers


async def cleanup(manager: Manager, n: int) -> None:
    await manager.cleanup_old_states(max_age_hours=0)


async def finish_and_clean(manager: Manager, n: int) -> None:
    done = {"task_id": f"done{n}", "agent_id": "bob", "status": "completed"}
    await manager.save("tasks", ("bob", f"done{n}"), done)
    await cleanup(manager, n)


async def cleaned(manager: Manager, n: int) -> object:
    """The number, if all that was finished is in the archive once, and nowhere else."""
    left = await manager.keys("tasks", "bob")
    kept = [
        entry.record["task_id"] async for entry in manager.read_log("tasks", ("bob", "archive"))
    ]
    once = len(set(kept)) == len(kept) and kept[-1:] == [f"done{n}"]
    return n if once and not left else (left, kept)


ACTS = {
    "save": Act(save, save, saved),
    "edit": Act(edit, edit, saved),
    "group": Act(group, group, grouped),
    "append": Act(append, append_again, appended),
    "delete": Act(delete, save, saved),
    "quarantine": Act(quarantine, save, saved),
    "flush": Act(flush, save, saved),
    "task queue": Act(queue, queue, queued),
    "mailbox": Act(mailbox, mailbox, mailed),
    "cleanup": Act(cleanup, finish_and_clean, cleaned),
}


@KINDS
@pytest.mark.parametrize("name", ACTS)
@pytest.mark.parametrize("disk", ["quick", pytest.param("slow", marks=pytest.mark.full)])
@pytest.mark.proof("T9", "cancelled or timed out at every await; the newer save wins")
async def test_a_newer_change_wins_over_one_cancelled_at_any_await(
    tmp_path: Path, tally: Tally, full: bool, name: str, disk: str, exclusive: bool
) -> None:
    act, before = ACTS[name], Footprint()
    manager = StatePersistenceManager(tmp_path, exclusive=exclusive)
    wrong: list[str] = []
    newest = 0
    async with manager:
        with SlowSync(0.3 if full else 0.02) as sync:
            for point in range(1, MOST):
                reached = False
                for at_once in (False, True):
                    newest += 2
                    await save(manager, newest - 2)
                    if disk == "slow":
                        sync.arm()
                    reached |= await _cancel_then_newer(manager, act, newest, point, at_once)
                    tally.points += 1
                    tally.acknowledged += 1
                    found = await act.look(manager, newest)
                    if found != newest:
                        wrong.append(f"point {point}, at once {at_once}: {found} for {newest}")
                    held = await _held(manager, tmp_path, before)
                    tally.leaked += len(held)
                    assert held == [], f"held after point {point}"
                tally.faults += 2 * reached
                if not reached:
                    break
    leaked = before.leaked() + locks_held(tmp_path)
    tally.leaked += len(leaked)
    async with StatePersistenceManager(tmp_path) as again:
        if (found := await act.look(again, newest)) != newest:
            wrong.append(f"after a restart: {found} for {newest}")
    tally.lost += len(wrong)
    assert wrong == []
    assert leaked == []
    assert tally.faults >= 2


async def _cancel_then_newer(
    manager: Manager, act: Act, newest: int, point: int, at_once: bool
) -> bool:
    """Cancel the older change there, make the newer one; whether the older came so far.

    ``at_once``: not only when the cancelled one has ended.
    """
    awaiting = CancelledAt(_run(act.run, manager, newest - 1), point)

    async def run() -> None:
        await awaiting

    older = asyncio.create_task(run())
    while at_once and not older.done() and not awaiting.reached:
        await asyncio.sleep(0)
    if not at_once:
        await asyncio.wait({older})
    await act.newer(manager, newest)
    ended = (await asyncio.gather(older, return_exceptions=True))[0]
    assert ended is None or isinstance(ended, asyncio.CancelledError), ended
    return awaiting.reached


async def _run(run: Run, manager: Manager, n: int) -> None:
    await run(manager, n)


async def _held(manager: Manager, root: Path, before: Footprint) -> list[str]:
    """What an operation must not leave held while its store lives on.

    The store writes back by itself, and holds what that needs, for a moment.
    """
    assert isinstance(manager.store, FileStateStore | WALStateStore)
    held = ["not looked at"]
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(10):
            while held:
                held = [p for p in locks_held(root) if not p.startswith(("writers.d/", "owner."))]
                held += [name for name in before.tasks() if not name.startswith("agent-state")]
                held += ["a task lock"] if manager.store._task_locks.held else []
                await asyncio.sleep(0.002 if held else 0)
    return held


@KINDS
@pytest.mark.proof("T9", "cancelled or timed out at every await; the newer save wins")
async def test_a_newer_save_wins_over_one_that_is_out_of_time(
    tmp_path: Path, tally: Tally, full: bool, exclusive: bool
) -> None:
    async with StatePersistenceManager(tmp_path, exclusive=exclusive) as manager:
        with SlowSync(0.3 if full else 0.1) as sync:
            for n in range(0, 20 if full else 4, 2):
                sync.arm()
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(save(manager, n), 0.02)
                await save(manager, n + 1)
                tally.points, tally.acknowledged = tally.points + 1, tally.acknowledged + 1
                tally.lost += await saved(manager, n) != n + 1
            tally.faults += sync.slow
    assert tally.faults == tally.points
    assert tally.clean(), f"an older save landed on {tally.lost} of {tally.points} newer ones"


@KINDS
@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.proof("T9", "cancelled or timed out at every await; the newer save wins")
async def test_opening_and_closing_cancelled_at_any_await_leave_nothing_held(
    tmp_path: Path, tally: Tally, scenes: dict[str, Scene], scene: str, exclusive: bool
) -> None:
    before = Footprint()
    for what in ("open", "close", "close at work"):
        for point in range(1, MOST):
            root = tmp_path / f"{what} {point}"
            scenes[scene].copy_to(root)
            manager = StatePersistenceManager(root, exclusive=exclusive)
            saves: list[asyncio.Task[int]] = []
            if what == "open":
                reached = await cancel_at(point, manager.open)
            else:
                await manager.open()
                if what == "close at work":
                    saves = [
                        asyncio.create_task(manager.save("notes", f"n{n}", {"n": n}))
                        for n in range(5)
                    ]
                    await _turns(point % 4)
                reached = await cancel_at(point, manager.close)
            ended = await asyncio.gather(*saves, return_exceptions=True)
            assert all(isinstance(end, int | AgentStateError) for end in ended), ended
            if what == "open" and not reached:
                await manager.close()
            leaked = before.leaked() + locks_held(root)
            tally.points, tally.faults = tally.points + 1, tally.faults + reached
            tally.leaked += len(leaked)
            assert leaked == [], f"{what}, point {point}"

            async with manager:  # and it opens again, with what was acknowledged
                for n, end in enumerate(ended):
                    if isinstance(end, int):
                        tally.acknowledged += 1
                        tally.lost += await manager.load("notes", f"n{n}") is None
            await manager.close()
            if not reached:
                break
    assert tally.clean()


async def _turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


SLOWEST = ("flush", "many at once", "group", "runtime: start and stop", "open and close, journal")


@KINDS
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.proof("T9b", "no call waits for the disk on the event loop")
async def test_the_event_loop_turns_during_every_system_call(
    tmp_path: Path,
    tally: Tally,
    full: bool,
    scenes: dict[str, Scene],
    name: str,
    exclusive: bool,
) -> None:
    root = tmp_path / "state"
    scenes[OPERATIONS[name].scene].copy_to(root)
    store = (WALStateStore if exclusive else FileStateStore)(root)
    slow = 0.3 if full and name in SLOWEST else 0.0
    with PatientDisk(asyncio.get_running_loop(), slow) as disk:
        await perform(name, store)
    tally.points += disk.calls
    assert disk.calls > 0
    assert disk.blocked == []


@KINDS
@pytest.mark.proof("T9b", "no call waits for the disk on the event loop")
async def test_the_event_loop_turns_while_everything_is_looked_at(
    tmp_path: Path, tally: Tally, scenes: dict[str, Scene], exclusive: bool
) -> None:
    root = tmp_path / "state"
    scenes["settled"].copy_to(root)
    with PatientDisk(asyncio.get_running_loop()) as disk:
        async with StatePersistenceManager(root, exclusive=exclusive) as manager:
            notices = await manager.store.watch()
            listening = asyncio.ensure_future(anext(notices))
            for kind in ("agents", "tasks", "mail", "notes"):
                async for _ in manager.scan(kind):
                    pass
            assert [entry async for entry in manager.read_log("notes", "alice", last=2)]
            assert await manager.list_persisted_agents()
            assert await manager.load_task_queue_state("bob")
            (root / "notes" / "first.json").write_text("{")
            async with asyncio.timeout(60):
                while not manager.incidents():  # a file that may still be written rests first
                    with contextlib.suppress(AgentStateError):  # mended, if a version is good
                        await manager.load("notes", "first")
                    await asyncio.sleep(0.05)
            assert (await asyncio.wait_for(listening, 60)).kind == "notes"
            await notices.aclose()
    tally.points += disk.calls
    assert disk.blocked == []


@KINDS
@pytest.mark.proof("T9b", "no call waits for the disk on the event loop")
async def test_the_event_loop_turns_when_a_store_closes_that_is_still_read(
    tmp_path: Path, tally: Tally, scenes: dict[str, Scene], exclusive: bool
) -> None:
    root = tmp_path / "state"
    scenes["settled"].copy_to(root)
    manager = StatePersistenceManager(root, exclusive=exclusive)
    with PatientDisk(asyncio.get_running_loop()) as disk:
        for turns in range(10):
            await manager.open()
            reading = [
                asyncio.create_task(_read_all(manager, kind)) for kind in ("agents", "notes")
            ]
            await _turns(turns)
            await manager.close()
            await asyncio.wait(reading)
            assert all(
                task.exception() is None or isinstance(task.exception(), AgentStateError)
                for task in reading
            )
    tally.points += disk.calls
    assert disk.blocked == []


async def _read_all(manager: Manager, kind: str) -> None:
    async for loaded in manager.scan(kind):
        await manager.load(kind, loaded.key)
