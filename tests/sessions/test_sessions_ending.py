"""A destroyed session is gone with everything, whoever writes to it and whatever crashes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from agent_state import FileStateStore, MemoryStateStore, StatePersistenceManager, WALStateStore
from agent_state.errors import Key, SessionExpiredError, StorageError
from agent_state.protocols import Append, Change, Delete
from agent_state.sessions import SessionManager, SessionNotFoundError, UnknownTokenError
from agent_state.testing import FakeClock
from tests.sessions.managers import STORES, opened, session_manager
from tests.storage.counting import CountedDisk

SECRET = "a secret that must not stay"
KINDS = (
    "sessions",
    "conversations",
    "session_states",
    "session_lives",
    "session_tokens",
    "session_users",
)


async def fill(sessions: SessionManager, session_id: str) -> None:
    await sessions.update(session_id, {"note": SECRET}, context={"note": SECRET})
    for agent_type in ("guide_agent", "content_liaison"):
        await sessions.conversations.add(session_id, agent_type, "user", SECRET)
    await sessions.states.save(session_id, {"note": SECRET})
    await sessions.states.save(session_id, {"note": SECRET}, state_id="other")
    await sessions.workflows.track(session_id, "w", data={"note": SECRET})


async def nothing_left(files: StatePersistenceManager) -> bool:
    return not any([await files.keys(kind) or await files.store.logs(kind) for kind in KINDS])


class DestroyedAfterCommit(MemoryStateStore):
    """Another process destroys the session right after a message was stored."""

    async def commit(self, changes: Sequence[Change]) -> list[int]:
        numbers = await super().commit(changes)
        if any(isinstance(each, Append) and each.kind == "conversations" for each in changes):
            await super().commit([Delete("sessions", ("s1",))])
            await self.erase("conversations", ("s1", "guide_agent"))
        return numbers


async def test_a_session_destroyed_right_after_a_message_is_not_found_and_nothing_is_damaged() -> (
    None
):
    async with StatePersistenceManager(store=DestroyedAfterCommit()) as files:
        sessions = session_manager(files)
        await sessions.create("ann")

        with pytest.raises(SessionNotFoundError):
            await sessions.conversations.add("s1", "guide_agent", "user", "hi", dedupe_key="k")


@pytest.mark.parametrize("store", STORES)
async def test_a_destroyed_session_leaves_nothing(store: str, tmp_path: Path) -> None:
    async with opened(store, tmp_path, FakeClock()) as files:
        sessions = session_manager(files)
        created = await sessions.create("ann")
        await fill(sessions, "s1")
        await files.flush()
        await fill(sessions, "s1")  # so that there are earlier versions
        assert await sessions.destroy("s1") is True
        assert await nothing_left(files)
        with pytest.raises(SessionNotFoundError):
            await sessions.get("s1")
        with pytest.raises(UnknownTokenError):
            await sessions.tokens.resolve(created.session_token)
        with pytest.raises(SessionNotFoundError):
            await sessions.conversations.add("s1", "guide_agent", "user", "anyone?")
        assert await nothing_left(files)
        assert await sessions.destroy("s1") is False
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".gitignore"]
    assert not [path for path in kept if SECRET.encode() in path.read_bytes()]


@pytest.mark.parametrize("exclusive", [False, True])
async def test_destroying_one_leaves_the_others(tmp_path: Path, exclusive: bool) -> None:
    async with StatePersistenceManager(tmp_path, exclusive=exclusive) as files:
        sessions = session_manager(files)
        for _ in range(2):
            await sessions.create("ann")
        await fill(sessions, "s2")
        await sessions.destroy("s1")
        assert [each.session_id for each in await sessions.of_user("ann")] == ["s2"]
        page = await sessions.conversations.page("s2", "guide_agent")
        assert [message.content for message in page.messages] == [SECRET]
        assert len(await sessions.states.load_all("s2")) == 2


class _Dying:
    """A store whose disk fails at the n-th erase: the process gets no further."""

    erases_left = 0

    async def erase(self, kind: str, key: Key) -> int:
        if self.erases_left == 0:
            raise StorageError("the disk is gone", kind=kind, key=key)
        self.erases_left -= 1
        return await super().erase(kind, key)  # type: ignore[misc,no-any-return]


class _DyingShared(_Dying, FileStateStore):
    pass


class _DyingExclusive(_Dying, WALStateStore):
    pass


@pytest.mark.parametrize("completion", ["destroy", "cleanup"])
@pytest.mark.parametrize("store", [_DyingShared, _DyingExclusive])
@pytest.mark.parametrize("erases", range(6))
async def test_a_destruction_that_was_cut_short_is_completed(
    tmp_path: Path, erases: int, store: Any, completion: str
) -> None:
    made = store(tmp_path)
    made.erases_left = erases
    async with StatePersistenceManager(store=made) as files:
        sessions = session_manager(files)
        created = await sessions.create("ann")
        await fill(sessions, "s1")
        with pytest.raises(StorageError):
            await sessions.destroy("s1")
    async with StatePersistenceManager(tmp_path, exclusive=store is _DyingExclusive) as files:
        sessions = session_manager(files)
        with pytest.raises(SessionNotFoundError):
            await sessions.get("s1")
        with pytest.raises(SessionNotFoundError):
            await sessions.renew("s1")
        with pytest.raises(UnknownTokenError):
            await sessions.tokens.resolve(created.session_token)
        assert await sessions.of_user("ann") == []
        if completion == "destroy":
            assert await sessions.destroy("s1") is True
        else:
            result = await sessions.cleanup()
            assert (result.expired, result.completed) == ([], ["s1"])
        assert await nothing_left(files)


@pytest.mark.parametrize("renew_interval_seconds", [0, 1])
@pytest.mark.parametrize("store", STORES)
async def test_who_writes_while_it_is_destroyed_brings_nothing_back(
    store: str, renew_interval_seconds: float, tmp_path: Path
) -> None:
    async with opened(store, tmp_path, FakeClock()) as files:
        sessions = session_manager(files, renew_interval_seconds=renew_interval_seconds)
        other = session_manager(files, renew_interval_seconds=renew_interval_seconds)
        await sessions.create("ann")
        refused = 0

        async def write(number: int) -> None:
            nonlocal refused
            manager = (sessions, other)[number % 2]
            try:
                while True:
                    await asyncio.sleep(0)
                    await manager.conversations.add("s1", "guide_agent", "user", "more")
                    await manager.states.save("s1", {"n": number})
            except SessionNotFoundError:
                refused += 1

        async def destroy() -> None:
            await asyncio.sleep(0)
            while (await sessions.get("s1")).conversations["guide_agent"].message_count < 5:
                await asyncio.sleep(0)
            assert await sessions.destroy("s1") is True

        await asyncio.gather(*(write(number) for number in range(4)), destroy())
        assert refused == 4
        assert await nothing_left(files)


async def test_a_session_renewed_while_cleaning_up_lives_on(tmp_path: Path) -> None:
    """Another process, whose clock is behind, has just written: the cleanup looks again."""
    clock, behind = FakeClock(), FakeClock()
    async with (
        StatePersistenceManager(tmp_path, clock=clock) as files,
        StatePersistenceManager(tmp_path, clock=behind) as others,
    ):
        sessions = session_manager(files)
        await sessions.create("ann")
        await clock.advance(3600)
        await behind.advance(3599)

        class Renewing(FileStateStore):
            async def scan(self, kind: str, prefix: Key = ()) -> Any:
                async for document in super().scan(kind, prefix):
                    yield document
                if kind == "sessions":
                    await session_manager(others).renew("s1")

        async with StatePersistenceManager(store=Renewing(tmp_path), clock=clock) as slow:
            result = await session_manager(slow).cleanup()
        assert (result.expired, result.completed) == ([], [])
        assert (await sessions.get("s1")).session_id == "s1"


async def test_a_write_is_refused_when_the_time_is_over_in_the_meantime(tmp_path: Path) -> None:
    clock = FakeClock()
    async with opened("exclusive", tmp_path, clock) as files:
        sessions = session_manager(files)
        await sessions.create("ann")
        await sessions.renew("s1")  # whatever is remembered of it, it has expired
        await clock.advance(3600)
        with pytest.raises(SessionExpiredError):
            await sessions.conversations.add("s1", "guide_agent", "user", "late")
        assert await files.store.logs("conversations") == []
        assert await sessions.destroy("s1") is True


@pytest.mark.parametrize("exclusive", [False, True])
async def test_a_cleanup_costs_what_it_erases(tmp_path: Path, exclusive: bool) -> None:
    """Neither the sessions that live on, nor their number at once, make one more expensive.

    How many of them one pass erases is a matter of time.
    """
    synced = {}
    for living in (5, 150):
        clock = FakeClock()
        root = tmp_path / f"{living}"
        async with StatePersistenceManager(root, exclusive=exclusive, clock=clock) as files:
            sessions = SessionManager(files)
            await asyncio.gather(*(sessions.create() for _ in range(40)))
            await clock.advance(7200)
            await asyncio.gather(*(sessions.create() for _ in range(living)))
            await files.flush()
            with CountedDisk() as disk:
                result = await sessions.cleanup()
        assert len(result.expired) == 40
        listed = disk.about("scandir")
        folders = [f"{root}{hidden}/{kind}" for kind in KINDS for hidden in ("", "/.snapshots")]
        assert sum(map(listed.count, folders)) <= 2  # the scans of all sessions and states
        synced[living] = disk.count("fsync_directory")
    # The end of a session is a group of three documents: in the shared store it syncs its redo
    # record twice, and three folders.
    ends = 0 if exclusive else 40 * 5
    assert max(synced.values()) - ends <= 40  # to erase each by itself would need several
