"""Persistence for a session manager that was written without knowing of this library."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from agent_state import (
    SerializationError,
    StatePersistenceManager,
    StorageFullError,
    attach,
)
from agent_state.runtime.attached_sessions import AttachedSessions
from agent_state.testing import FakeClock
from tests.deadlines import soon, until
from tests.runtime.runtimes import TroubledStore, puts


class Mood(Enum):
    """Somebody else's vocabulary."""

    ACTIVE = "ACTIVE"
    ON_BREAK = "ON_BREAK"


class Desk:
    """A session of the other manager: its own fields, its own types."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.mood = Mood.ACTIVE
        self.said: list[str] = []
        self.queue: list[dict[str, Any]] = []
        self.errors = 0


class FrontDesk:
    """The other manager. It uses threads, and has never heard of ``agent_state``."""

    def __init__(self) -> None:
        self.desks: dict[str, Desk] = {}
        self._observers: list[Callable[[str], None]] = []
        self._guard = threading.Lock()

    def hire(self, name: str) -> Desk:
        with self._guard:
            desk = self.desks[name] = Desk(name)
        self._tell(name)
        return desk

    def hear(self, name: str, words: str) -> None:
        self.desks[name].said.append(words)
        self.desks[name].queue.append({"type": "answer", "data": {"to": words}})
        self._tell(name)

    def dismiss(self, name: str) -> None:
        del self.desks[name]
        self._tell(name)

    def _tell(self, name: str) -> None:
        for observer in self._observers:
            observer(name)

    # The four methods that persistence asks for.

    def list_sessions(self) -> list[str]:
        return list(self.desks)

    def export_session(self, session_id: str) -> dict[str, Any] | None:
        desk = self.desks.get(session_id)
        if desk is None:
            return None
        return {
            "agent_id": desk.name,
            "status": desk.mood.value,
            "context": {"conversation_history": list(desk.said)},
            "task_queue": {"pending_tasks": list(desk.queue), "current_task": None},
            "sleep_state": {"is_sleeping": desk.mood is Mood.ON_BREAK, "wake_events": ["bell"]},
            "metadata": {"error_count": desk.errors},
        }

    def import_session(self, session_id: str, state: Mapping[str, Any]) -> None:
        desk = Desk(session_id)
        desk.mood = Mood(state["status"])
        desk.said = list(state["context"]["conversation_history"])
        desk.queue = list(state["task_queue"]["pending_tasks"])
        desk.errors = state["metadata"]["error_count"]
        self.desks[session_id] = desk

    def on_change(self, callback: Callable[[str], None]) -> Callable[[], None]:
        self._observers.append(callback)
        return lambda: self._observers.remove(callback)


async def test_what_the_other_manager_knew_is_there_after_a_restart(tmp_path: Path) -> None:
    before = FrontDesk()
    async with attach(before, tmp_path / "state"):
        before.hire("alice")
        before.hear("alice", "hello")
        before.desks["alice"].mood = Mood.ON_BREAK
        before.hire("bob")
    after = FrontDesk()
    async with attach(after, tmp_path / "state") as attached:
        assert sorted(attached.restored) == ["alice", "bob"]
        for name in ("alice", "bob"):
            assert after.export_session(name) == before.export_session(name)


async def test_a_change_is_durable_soon_after_it_was_reported(tmp_path: Path) -> None:
    desk = FrontDesk()
    async with attach(desk, tmp_path / "state") as attached:
        desk.hire("alice")
        await asyncio.to_thread(desk.hear, "alice", "from a thread")
        await attached.saved()
        stored = await attached.manager.load_agent_state("alice")
        assert stored is not None
        assert stored.context.conversation_history == ["from a thread"]


async def test_a_session_that_is_gone_is_gone_from_disk(tmp_path: Path) -> None:
    desk = FrontDesk()
    async with attach(desk, tmp_path / "state") as attached:
        desk.hire("alice")
        await attached.saved()
        desk.dismiss("alice")
        await attached.saved()
        assert await attached.manager.list_persisted_agents() == []


async def test_sessions_the_manager_has_already_are_not_overwritten(tmp_path: Path) -> None:
    async with attach(first := FrontDesk(), tmp_path / "state"):
        first.hire("alice")
        first.hear("alice", "old")
    second = FrontDesk()
    second.hire("alice")
    async with attach(second, tmp_path / "state") as attached:
        assert attached.restored == []
        assert second.desks["alice"].said == []
        assert await attached.restore_session_state("alice")
        assert second.desks["alice"].said == ["old"]


async def test_an_async_manager_works_the_same(tmp_path: Path) -> None:
    class Async:
        def __init__(self) -> None:
            self.states: dict[str, dict[str, Any]] = {}

        async def list_sessions(self) -> list[str]:
            return list(self.states)

        async def export_session(self, session_id: str) -> dict[str, Any] | None:
            return self.states.get(session_id)

        async def import_session(self, session_id: str, state: Mapping[str, Any]) -> None:
            self.states[session_id] = dict(state)

        def on_change(self, callback: Callable[[str], None]) -> None:
            del callback  # this one never tells

    first = Async()
    async with attach(first, tmp_path / "state") as attached:
        first.states["a"] = {"agent_id": "a", "weights": [1, 2.5, None]}
        assert await attached.save_all_session_states() == 1
    second = Async()
    async with attach(second, tmp_path / "state"):
        assert second.states == first.states


async def test_a_state_that_cannot_be_stored_does_not_hold_up_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    desk = FrontDesk()
    async with attach(desk, tmp_path / "state") as attached:
        desk.hire("alice").errors = {1, 2}  # type: ignore[assignment]
        desk.hire("bob")
        for _ in range(2):  # also once it was refused, and logged, before
            with pytest.raises(SerializationError, match=r"metadata\.error_count"):
                await attached.saved()
            assert await attached.manager.list_persisted_agents() == ["bob"]
            await until(lambda: "could not be saved" in caplog.text)
        assert "metadata.error_count" in caplog.text
        desk.desks["alice"].errors = 2
        await attached.saved()
        assert await attached.manager.list_persisted_agents() == ["alice", "bob"]


def test_what_lacks_a_method_cannot_be_attached(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="lacks list_sessions, export_session"):
        attach(object(), tmp_path)  # type: ignore[arg-type]


async def test_the_files_are_those_of_the_manager(tmp_path: Path) -> None:
    async with attach(desk := FrontDesk(), tmp_path / "state"):
        desk.hire("alice")
    async with StatePersistenceManager(tmp_path / "state") as manager:
        assert await manager.list_persisted_agents() == ["alice"]


class Notebook:
    """Another manager, whose sessions named ``odd`` cannot be exported."""

    def __init__(self, *sessions: str) -> None:
        self.sessions = set(sessions)
        self.tell: Callable[[str], None] = lambda _: None
        self.exporting = asyncio.Event()
        self.slow: asyncio.Event | None = None

    def list_sessions(self) -> set[str]:
        return self.sessions

    async def export_session(self, session_id: str) -> dict[str, Any] | None:
        self.exporting.set()
        if self.slow is not None:
            await self.slow.wait()
        if session_id == "odd":
            raise KeyError("a fault of theirs")
        return {"agent_id": session_id} if session_id in self.sessions else None

    def import_session(self, session_id: str, state: Mapping[str, Any]) -> None:
        self.sessions.add(session_id)

    def on_change(self, callback: Callable[[str], None]) -> None:
        self.tell = callback


async def test_a_session_that_cannot_be_exported_keeps_no_other_from_being_saved(
    tmp_path: Path,
) -> None:
    book = Notebook("odd")
    with pytest.raises(KeyError, match="theirs"):
        async with attach(book, tmp_path / "state") as attached:
            book.tell("odd")
            await asyncio.sleep(0)
            book.exporting.clear()
            book.sessions.add("alice")
            book.tell("alice")
            await soon(book.exporting.wait())
            with pytest.raises(KeyError, match="theirs"):
                await soon(attached.saved())
            assert await attached.manager.list_persisted_agents() == ["alice"]
            book.sessions |= {"bob", "zoe"}  # and says nothing
    async with StatePersistenceManager(tmp_path / "state") as manager:
        assert await manager.list_persisted_agents() == ["alice", "bob", "zoe"]


async def test_a_session_that_is_removed_just_before_the_end_does_not_come_back(
    tmp_path: Path,
) -> None:
    book = Notebook("alice")
    async with attach(book, tmp_path / "state") as attached:
        await attached.save_all_session_states()
        book.exporting.clear()
        book.slow = asyncio.Event()
        book.sessions.remove("alice")
        book.tell("alice")
        await soon(book.exporting.wait())
        book.slow = None  # the export under way never ends, and is cancelled on leaving
    async with StatePersistenceManager(tmp_path / "state") as manager:
        assert await manager.list_persisted_agents() == []


def on(store: TroubledStore, book: Notebook, clock: FakeClock) -> AttachedSessions:
    return AttachedSessions(book, StatePersistenceManager(store=store, clock=clock))


async def test_what_was_reported_a_moment_ago_is_stored_when_saved_returns() -> None:
    clock, book = FakeClock(), Notebook()
    store = TroubledStore(clock)
    async with on(store, book, clock) as attached:
        for name in ("alice", "bob"):
            book.sessions.add(name)
            if name == "alice":
                book.tell(name)
            else:
                await asyncio.to_thread(book.tell, name)
            await soon(attached.saved())
            assert name in await attached.manager.list_persisted_agents()


async def test_saved_waits_for_a_save_that_is_under_way_whoever_began_it() -> None:
    clock, book = FakeClock(), Notebook("alice")
    store = TroubledStore(clock)
    async with on(store, book, clock) as attached:
        store.hold = puts("agents")
        book.tell("alice")
        saving = asyncio.create_task(attached.save_all_session_states())
        await soon(store.held.wait())
        waiting = asyncio.create_task(attached.saved())
        for _ in range(20):
            await asyncio.sleep(0)
        assert not waiting.done()
        store.gate.set()
        await soon(waiting)
        await saving
        assert await attached.manager.list_persisted_agents() == ["alice"]


async def test_saved_raises_what_the_store_refuses_and_it_is_stored_later() -> None:
    clock, book = FakeClock(), Notebook("alice", "bob")
    store = TroubledStore(clock)
    async with on(store, book, clock) as attached:
        store.full = puts("agents", "alice")
        for name in ("alice", "bob"):
            book.tell(name)
        with pytest.raises(StorageFullError):
            await soon(attached.saved())
        assert await attached.manager.list_persisted_agents() == ["bob"]
        with pytest.raises(StorageFullError):
            await soon(attached.saved())
        store.full = lambda _: False
        async with asyncio.timeout(60):
            while "alice" not in await attached.manager.list_persisted_agents():
                await clock.advance(1)
        await soon(attached.saved())


async def test_an_older_state_is_not_stored_over_a_newer_one() -> None:
    clock, book = FakeClock(), Notebook("alice")
    store = TroubledStore(clock)
    states = iter(["old", "new"])
    slow = asyncio.Event()

    async def export_session(session_id: str) -> dict[str, Any]:
        state = next(states, "new")
        if state == "old":
            book.exporting.set()
            await slow.wait()
        return {"agent_id": session_id, "agent_name": state}

    book.export_session = export_session  # type: ignore[method-assign]
    async with on(store, book, clock) as attached:
        first = asyncio.create_task(attached.save_session_state("alice"))
        await soon(book.exporting.wait())
        second = asyncio.create_task(attached.save_session_state("alice"))
        for _ in range(20):
            await asyncio.sleep(0)
        slow.set()
        await soon(first)
        await soon(second)
        stored = await attached.manager.load_agent_state("alice")
        assert stored is not None
        assert stored.agent_name == "new"
