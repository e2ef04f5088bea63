"""A state for callers on any loop and in any thread."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Callable
from contextvars import Context, ContextVar
from pathlib import Path
from typing import TypeVarTuple

import pytest

from agent_state import (
    AgentStateError,
    FileStateStore,
    MemoryStateStore,
    StateDirectoryInUseError,
    StatePersistenceManager,
)
from agent_state.access import StateAccess, as_segment, from_segment
from agent_state.protocols import JsonObject
from tests.deadlines import until_in_thread

Ts = TypeVarTuple("Ts")


async def save(manager: StatePersistenceManager, name: str = "n", value: int = 1) -> int:
    return await manager.save("notes", name, {"value": value})


async def names(manager: StatePersistenceManager) -> list[str]:
    return [key[0] for key in await manager.keys("notes")]


def test_several_loops_use_one_directory(tmp_path: Path) -> None:
    access = StateAccess(tmp_path)

    asyncio.run(access.run(save))
    asyncio.run(access.run(lambda manager: save(manager, "m")))

    assert asyncio.run(access.run(names)) == ["m", "n"]
    access.close_blocking()


def test_threads_without_a_loop_open_it_once(tmp_path: Path) -> None:
    with StateAccess(tmp_path) as access:
        threads = [
            threading.Thread(
                target=access.run_blocking, args=[lambda manager, i=i: save(manager, f"n{i}")]
            )
            for i in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert access.run_blocking(names) == [f"n{i}" for i in range(8)]


async def test_a_blocking_call_works_on_a_running_loop_if_a_directory_was_given(
    tmp_path: Path,
) -> None:
    with StateAccess(tmp_path) as access:
        assert access.run_blocking(save) == 1


async def test_a_blocking_call_on_the_loop_of_a_given_manager_is_refused(tmp_path: Path) -> None:
    async with StatePersistenceManager(tmp_path) as manager:
        access = StateAccess(manager)

        with pytest.raises(AgentStateError, match="would never return"):
            access.run_blocking(save)
        assert await asyncio.to_thread(access.run_blocking, save) == 1


async def test_a_given_manager_is_used_on_its_own_loop_and_stays_open(tmp_path: Path) -> None:
    async with StatePersistenceManager(tmp_path, exclusive=True) as manager:
        async with StateAccess(manager) as access:
            await access.run(save)
            await asyncio.to_thread(asyncio.run, access.run(lambda m: save(m, "m")))

        assert await names(manager) == ["m", "n"]


@pytest.mark.parametrize("kind", ["memory", "files"])
async def test_a_given_store_is_opened(kind: str, tmp_path: Path) -> None:
    store = MemoryStateStore() if kind == "memory" else FileStateStore(tmp_path)
    access = StateAccess(store)

    assert await access.run(save) == 1

    assert await store.get("notes", ("n",)) is not None
    await store.close()


def test_a_store_in_memory_serves_a_thread_and_then_a_loop() -> None:
    access = StateAccess(MemoryStateStore())

    access.run_blocking(save)

    assert asyncio.run(access.run(names)) == ["n"]


async def test_a_closed_access_opens_again(tmp_path: Path) -> None:
    access = StateAccess(tmp_path, exclusive=True)
    await access.run(save)
    await access.close()
    async with StatePersistenceManager(tmp_path, exclusive=True) as manager:
        assert await names(manager) == ["n"]

    assert await access.run(names) == ["n"]
    await access.close()


async def test_a_forgotten_access_gives_the_directory_back(tmp_path: Path) -> None:
    access = StateAccess(tmp_path, exclusive=True)
    await access.run(save)
    del access
    gc.collect()

    def is_free() -> bool:
        try:
            with StateAccess(tmp_path, exclusive=True) as other:
                return other.run_blocking(names) == ["n"]
        except AgentStateError:
            return False

    await asyncio.to_thread(until_in_thread, is_free)


async def test_accesses_to_one_directory_share_its_manager(tmp_path: Path) -> None:
    one, other = (StateAccess(tmp_path, exclusive=True) for _ in range(2))
    await asyncio.gather(one.run(save), other.run(lambda manager: save(manager, "m")))
    await one.close()
    assert await other.run(names) == ["m", "n"]
    await other.close()

    async with StatePersistenceManager(tmp_path, exclusive=True) as manager:
        assert await names(manager) == ["m", "n"]


async def test_a_directory_that_cannot_be_opened_is_tried_again(tmp_path: Path) -> None:
    access = StateAccess(tmp_path, exclusive=True)
    async with StatePersistenceManager(tmp_path, exclusive=True):
        with pytest.raises(StateDirectoryInUseError):
            await access.run(save)

    assert await access.run(save) == 1
    await access.close()


async def test_a_cancelled_caller_waits_for_the_outcome(tmp_path: Path) -> None:
    started, proceed = threading.Event(), threading.Event()

    async def slow(manager: StatePersistenceManager) -> None:
        started.set()
        await asyncio.to_thread(proceed.wait)
        await save(manager)

    async with StateAccess(tmp_path) as access:
        caller = asyncio.create_task(access.run(slow))
        await asyncio.to_thread(started.wait)
        caller.cancel()
        proceed.set()
        with pytest.raises(asyncio.CancelledError):
            await caller

        assert await access.run(names) == ["n"]


def test_callers_that_come_together_wake_the_loop_of_the_state_once() -> None:
    woken: list[None] = []

    class CountingLoop(asyncio.SelectorEventLoop):
        def call_soon_threadsafe(
            self,
            callback: Callable[[*Ts], object],
            *args: *Ts,
            context: Context | None = None,
        ) -> asyncio.Handle:
            woken.append(None)
            return super().call_soon_threadsafe(callback, *args, context=context)

    async def made() -> StateAccess:
        return StateAccess(MemoryStateStore())

    async def calls(access: StateAccess) -> None:
        held, proceed = threading.Event(), threading.Event()

        def hold() -> None:
            held.set()
            proceed.wait()

        home.call_soon_threadsafe(hold)
        await asyncio.to_thread(held.wait)
        woken.clear()
        callers = [asyncio.create_task(access.run(names)) for _ in range(50)]
        await asyncio.sleep(0)
        assert len(woken) == 1
        proceed.set()
        assert await asyncio.gather(*callers) == [["n"]] * 50

    home = CountingLoop()
    thread = threading.Thread(target=home.run_forever)
    thread.start()
    access = asyncio.run_coroutine_threadsafe(made(), home).result()
    access.run_blocking(save)
    asyncio.run(calls(access))
    home.call_soon_threadsafe(home.stop)
    thread.join()
    home.close()


async def test_work_sees_the_context_of_its_caller(tmp_path: Path) -> None:
    name: ContextVar[str] = ContextVar("name")

    async def seen(_: StatePersistenceManager) -> str:
        return name.get()

    async def call(access: StateAccess, value: str) -> str:
        name.set(value)
        return await access.run(seen)

    async with StateAccess(tmp_path) as access:
        assert await asyncio.gather(*(call(access, each) for each in "abc")) == ["a", "b", "c"]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_opens_the_directory_for_itself(tmp_path: Path) -> None:
    with StateAccess(tmp_path) as access:
        access.run_blocking(save)
        child = os.fork()
        if child == 0:
            done = 1
            try:
                done = access.run_blocking(lambda manager: save(manager, "m")) - 1
            finally:
                os._exit(done)

        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert access.run_blocking(names) == ["m", "n"]


def test_settings_of_a_store_are_refused_with_a_given_store() -> None:
    with pytest.raises(TypeError, match="belong to the store"):
        StateAccess(MemoryStateStore(), exclusive=True)


def test_what_is_no_state_is_refused() -> None:
    not_a_state: JsonObject = {}
    with pytest.raises(TypeError, match="not dict"):
        StateAccess(not_a_state)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "\0", "\0\0", "a\0", "a", "..", "a/b"])
def test_every_text_has_a_segment_of_its_own(text: str) -> None:
    assert as_segment(text)
    assert from_segment(as_segment(text)) == text
