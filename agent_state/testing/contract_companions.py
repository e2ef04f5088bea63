"""The contracts of a mirror, an observer and a session source, as tests that their authors inherit.

Needs pytest and pytest-asyncio, in either mode.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from agent_state.errors import MirrorError
from agent_state.manager import StatePersistenceManager
from agent_state.protocols import DocumentId, Mirror, MirrorStatus, Observer
from agent_state.runtime import SessionSource, attach
from agent_state.testing.contents import StateContents, read_state


class MirrorContract:
    """The docstrings of ``agent_state.protocols.Mirror`` as tests.

    A subclass defines ``make_mirror``. What waits must be copied when ``close`` returns, as it is
    by a mirror that can be reached.
    """

    pytestmark = pytest.mark.asyncio

    def make_mirror(self, directory: Path) -> Mirror:
        """A mirror, not yet open, whose copy belongs to ``directory``.

        A second one of the same directory finds what the first has copied.
        """
        raise NotImplementedError("a subclass makes the mirror")

    def mirrored(self, tmp_path: Path, name: str = "state", **options: Any) -> Any:
        """A manager over files, with a new mirror of the test's one copy."""
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        return StatePersistenceManager(
            tmp_path / name, mirror=self.make_mirror(elsewhere), **options
        )

    async def restored(self, tmp_path: Path) -> StateContents:
        """What comes back from the copy when the state directory is lost."""
        shutil.rmtree(tmp_path / "state")
        async with self.mirrored(tmp_path, mirror_restores=True) as manager:
            return await read_state(manager)

    async def test_a_lost_directory_comes_back(self, tmp_path: Path) -> None:
        async with self.mirrored(tmp_path) as manager:
            await manager.save_agent_state("ann", {"agent_id": "ann", "mood": "good"})
            async with manager.group() as group:
                group.save("notes", ("a", "b"), {"n": 1})
                group.append("notes", "all", {"n": 1})
            for n in range(2, 300):
                await manager.append("notes", "all", {"n": n}, dedupe_key=str(n))
            before = await read_state(manager)

        assert await self.restored(tmp_path) == before
        assert await self.restored(tmp_path) == before

    async def test_the_newest_version_comes_back_and_nothing_that_was_deleted(
        self, tmp_path: Path
    ) -> None:
        async with self.mirrored(tmp_path) as manager:
            for n in range(50):
                await manager.save("notes", "a", {"n": n})
                await manager.save("notes", "b", {"n": n})
            await manager.delete("notes", "b")
        async with self.mirrored(tmp_path) as manager:  # as the next process opens it
            await manager.save("notes", "a", {"n": 50})

        assert await self.restored(tmp_path) == {"notes/a": {"n": 50}}

    async def test_what_was_erased_does_not_come_back(self, tmp_path: Path) -> None:
        async with self.mirrored(tmp_path) as manager:
            await manager.save("notes", "kept", {"n": 1})
            await manager.save("notes", ("ann", "a"), {"n": 1})
            await manager.append("notes", ("ann", "log"), {"n": 1})
            await manager.erase("notes", "ann")

        assert await self.restored(tmp_path) == {"notes/kept": {"n": 1}}

    async def test_what_was_there_before_the_mirror_is_copied_too(self, tmp_path: Path) -> None:
        async with StatePersistenceManager(tmp_path / "state") as manager:
            await manager.save("notes", "a", {"n": 1})
        async with self.mirrored(tmp_path):
            pass

        assert await self.restored(tmp_path) == {"notes/a": {"n": 1}}

    async def test_a_damaged_document_is_restored(self, tmp_path: Path) -> None:
        async with self.mirrored(tmp_path) as manager:
            await manager.save("notes", "a", {"n": 1})
        damaged = tmp_path / "state" / "notes" / "a.json"
        damaged.write_text("{ damaged")
        os.utime(damaged, (1_000_000_000, 1_000_000_000))  # a fresh one may be half written

        async with self.mirrored(tmp_path, mirror_restores=True) as manager:
            assert await read_state(manager) == {"notes/a": {"n": 1}}

    async def test_what_it_does_not_have_is_none(self, tmp_path: Path) -> None:
        async with self.mirrored(tmp_path) as manager:
            assert await manager.mirror.restore_document("notes", ("nothing",)) is None

    async def test_the_copy_of_another_instance_is_refused(self, tmp_path: Path) -> None:
        async with self.mirrored(tmp_path) as manager:
            await manager.save("notes", "a", {"n": 1})
        with pytest.raises(MirrorError):
            async with self.mirrored(tmp_path, "another"):
                pass

        assert await self.restored(tmp_path) == {"notes/a": {"n": 1}}

    async def test_it_says_how_it_is(self, tmp_path: Path) -> None:
        manager = self.mirrored(tmp_path)
        async with manager:
            await manager.save("notes", "a", {"n": 1})
            assert isinstance(manager.mirror.status(), MirrorStatus)
        after = manager.mirror.status()
        assert (after.state, after.waiting) == ("closed", 0)


class ObserverContract:
    """The docstring of ``agent_state.protocols.Observer`` as tests.

    A subclass defines ``make_observer`` and ``noted``.
    """

    pytestmark = pytest.mark.asyncio

    def make_observer(self, directory: Path) -> Observer:
        """An observer that may keep files in ``directory``."""
        raise NotImplementedError("a subclass makes the observer")

    async def noted(self, observer: Any) -> Sequence[DocumentId]:
        """The ``(kind, key)`` of each change that it has noted, in order."""
        raise NotImplementedError("a subclass says what was noted")

    async def test_it_notes_each_change_in_the_order_of_the_commits(self, tmp_path: Path) -> None:
        observer = self.make_observer(tmp_path / "observer")
        wanted = []
        async with StatePersistenceManager(tmp_path / "state", observer=observer) as manager:
            for n in range(20):
                await manager.save("tasks", ("ann", str(n)), {"agent_id": "ann", "task_id": str(n)})
                wanted.append(("tasks", ("ann", str(n))))
            assert list(await self.noted(observer)) == wanted

    async def test_it_takes_every_change_at_once_and_raises_nothing(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        observer = self.make_observer(tmp_path / "observer")
        async with StatePersistenceManager(tmp_path / "state", observer=observer) as manager:
            async with manager.group() as group:
                group.save("notes", ("a", "b"), {"n": 1})
                group.append("notes", "all", {"n": 1})
            await manager.delete("notes", ("a", "b"))
            await manager.delete("notes", "nothing")
            await manager.save_agent_state("ann", {"agent_id": "ann"})
            saves = (manager.save("notes", str(n), {"n": n}) for n in range(200))
            await asyncio.gather(*saves)
            await manager.erase("notes", "all")
        assert "the observer failed" not in caplog.text

    async def test_it_belongs_to_no_loop_and_no_manager(self, tmp_path: Path) -> None:
        observer = self.make_observer(tmp_path / "observer")
        for _ in range(2):
            async with StatePersistenceManager(tmp_path / "state", observer=observer) as manager:
                await manager.save_agent_state("ann", {"agent_id": "ann"})


class SessionSourceContract:
    """The docstrings of ``agent_state.SessionSource`` as tests.

    A subclass defines ``make_source``, ``put_session`` and ``remove_session``.
    """

    pytestmark = pytest.mark.asyncio

    def make_source(self) -> SessionSource:
        """A session manager without sessions, as a new process has it."""
        raise NotImplementedError("a subclass makes the session manager")

    async def put_session(self, source: Any, session_id: str) -> None:
        """Create a session of that id, or change it if there is one."""
        raise NotImplementedError("a subclass creates a session")

    async def remove_session(self, source: Any, session_id: str) -> None:
        """Remove a session."""
        raise NotImplementedError("a subclass removes a session")

    async def exported(self, source: SessionSource) -> dict[str, Mapping[str, Any] | None]:
        """Every session that the source lists, as it exports it."""
        return {each: await _value(source.export_session(each)) for each in await _listed(source)}

    async def test_a_session_is_listed_and_exported(self) -> None:
        source = self.make_source()
        assert await _listed(source) == []
        await self.put_session(source, "a")
        [(session_id, state)] = (await self.exported(source)).items()
        assert session_id == "a"
        assert state is not None
        assert state["agent_id"] == "a"

    async def test_one_that_is_removed_is_exported_as_none(self) -> None:
        source = self.make_source()
        await self.put_session(source, "a")
        await self.remove_session(source, "a")
        assert await _listed(source) == []
        assert await _value(source.export_session("a")) is None

    async def test_what_is_imported_is_exported_equal(self) -> None:
        source, heir = self.make_source(), self.make_source()
        await self.put_session(source, "a")
        state = await _value(source.export_session("a"))
        assert state is not None
        await _value(heir.import_session("a", state))
        assert await _value(heir.export_session("a")) == state

    async def test_a_change_and_a_removal_are_reported_until_the_calls_end(self) -> None:
        source = self.make_source()
        reported: list[str] = []
        end = source.on_change(reported.append)
        await self.put_session(source, "a")
        assert "a" in reported
        reported.clear()
        await self.remove_session(source, "a")
        assert "a" in reported
        if end is not None:
            reported.clear()
            end()
            await self.put_session(source, "a")
            assert reported == []

    async def test_its_sessions_survive_the_process(self, tmp_path: Path) -> None:
        source = self.make_source()
        async with attach(source, tmp_path / "state") as attached:
            for name in ("a", "b", "c"):
                await self.put_session(source, name)
            await self.remove_session(source, "b")
            await self.put_session(source, "c")
            await attached.saved()
        before = await self.exported(source)
        assert sorted(before) == ["a", "c"]

        heir = self.make_source()
        async with attach(heir, tmp_path / "state") as attached:
            assert sorted(attached.restored) == ["a", "c"]
            assert await self.exported(heir) == before


async def _listed(source: SessionSource) -> list[str]:
    return sorted(await _value(source.list_sessions()))


async def _value(value: Any) -> Any:
    return await value if asyncio.iscoroutine(value) or asyncio.isfuture(value) else value
