"""Locks of documents between real processes: a stopped one holds only what it was changing."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent_state import FileStateStore, LockTimeoutError, RevisionConflictError
from agent_state.protocols import Change
from agent_state.testing import Crash, Fault, FaultyDisk
from agent_state.testing.contract_base import append, check, content_of, put, records_of
from tests.deadlines import soon

STOP_IN_COMMIT = """
import asyncio, signal, sys, threading
from agent_state import FileStateStore
from agent_state.storage import syscalls
from agent_state.testing.contract_base import append, check, put

rename, first = syscalls.rename, [True]

def stop_and_rename(source, target):
    if "notes" in target and first:
        first.clear()
        print("stopped", flush=True)
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # this thread stops at once
    rename(source, target)

async def main():
    store = FileStateStore(sys.argv[1])
    await store.open()
    syscalls.rename = stop_and_rename
    changes = [put(("alice", "1"), {"by": "child"}), check("owner", 1)]
    if sys.argv[2] == "group":
        changes += [put(("alice", "2"), {"by": "child"}), append(("alice", "log"), {})]
    await store.commit(changes)
    print("committed", flush=True)
    await store.close()

asyncio.run(main())
"""


@contextmanager
def stopped_in_commit(root: Path, what: str) -> Iterator[subprocess.Popen[str]]:
    """A process that was stopped (SIGSTOP) just before its commit became visible."""
    child = subprocess.Popen(
        [sys.executable, "-c", STOP_IN_COMMIT, str(root), what],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == "stopped\n"
        os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
        yield child
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[FileStateStore]:
    store = FileStateStore(tmp_path, lock_timeout_seconds=60)
    await store.open()
    await store.commit([put("owner", {"n": 1})])
    yield store
    await store.close()


async def impatient(root: Path, *changes: Change) -> list[int]:
    """Commit without waiting for a lock."""
    store = FileStateStore(root, lock_timeout_seconds=0)
    await store.open()
    try:
        return await store.commit(changes)
    finally:
        await store.close()


@pytest.mark.parametrize("what", ["document", "group"])
async def test_a_stopped_process_holds_only_the_documents_of_its_commit(
    store: FileStateStore, tmp_path: Path, what: str
) -> None:
    with stopped_in_commit(tmp_path, what) as child:
        others: list[Change] = [
            put(("alice", "3"), {"by": "us"}),
            append(("alice", "other"), {"by": "us"}),
        ]
        assert await impatient(tmp_path, *others, check("owner", 1)) == [1, 1, 1]
        assert await impatient(tmp_path, put(("alice", "4"), {}), put("bob", {})) == [1, 1]
        assert await store.get("notes", ("alice", "1")) is None
        assert len(await store.keys("notes")) == 4

        held: list[Change] = [put(("alice", "1"), {"by": "us"}), put("owner", {"n": 2}, 1)]
        if what == "group":
            held += [put(("alice", "2"), {}), append(("alice", "log"), {})]
        for change in held:
            with pytest.raises(LockTimeoutError) as caught:
                await impatient(tmp_path, change)
            assert (caught.value.kind, caught.value.key) == ("notes", change.key)
            assert f"process {child.pid} holds it" in str(caught.value)

        os.kill(child.pid, signal.SIGCONT)
        assert await soon(asyncio.to_thread(child.wait)) == 0
        assert await content_of(store, ("alice", "1")) == {"by": "child"}


@pytest.mark.parametrize("what", ["document", "group"])
async def test_after_its_owner_changed_a_stopped_commit_was_before_or_is_refused(
    store: FileStateStore, tmp_path: Path, what: str
) -> None:
    """The heir cannot become the owner in between, and finds what the former owner made."""
    with stopped_in_commit(tmp_path, what) as child:
        heir = asyncio.create_task(store.commit([put("owner", {"n": 2}, expected=1)]))
        with pytest.raises(LockTimeoutError):
            await impatient(tmp_path, put("owner", {"n": 3}, expected=1))
        child.kill()
        assert await soon(heir) == [2]

    made = {("alice", "1"), ("alice", "2")} if what == "group" else set()
    assert {*await store.keys("notes")} == {("owner",), *made}
    with pytest.raises(RevisionConflictError):
        await store.commit([put(("alice", "1"), {}), check("owner", 1)])


async def test_a_lock_covers_what_is_below_its_key_and_nothing_beside_it(tmp_path: Path) -> None:
    one, other = FileStateStore(tmp_path), FileStateStore(tmp_path, lock_timeout_seconds=0)
    await one.open()
    await other.open()

    async with one.lock("notes", ("a", "b")):
        await one.commit([put(("a", "b", "c"), {}), put(("a", "b"), {}), put("a", {})])
        for free in (("a", "c"), ("b",), ("a", "bb")):
            await other.commit([put(free, {})])
        for locked in (("a", "b"), ("a", "b", "d"), ("a",)):
            with pytest.raises(LockTimeoutError):
                await other.commit([put(locked, {"by": "other"})])
        with pytest.raises(LockTimeoutError):
            async with other.lock("notes", ("a",)):
                raise AssertionError("something below is locked")
        async with one.lock("notes", ("a",)):
            await one.commit([put("a", {"n": 2})])
            with pytest.raises(LockTimeoutError):
                await other.commit([put(("a", "c"), {"by": "other"})])
        await other.commit([put(("a", "c"), {"by": "other"})])
        with pytest.raises(LockTimeoutError):
            await other.commit([put(("a", "b"), {"by": "other"})])
    await other.commit([put(("a", "b"), {"by": "other"})])
    for store in (one, other):
        await store.close()


async def test_locks_make_no_file_for_a_document(store: FileStateStore, tmp_path: Path) -> None:
    for n in range(200):
        await store.commit([put(("alice", str(n)), {}), append((f"agent-{n}", "log"), {})])
        async with store.lock("notes", (f"queue-{n}",)):
            pass

    locks = [path.name for path in (tmp_path / ".locks").rglob("[!.]*") if path.is_file()]
    assert len(locks) == 4, locks  # the owner's, the documents', the barrier's, and this writer's


async def test_erasing_completes_the_groups_of_dead_writers_first(tmp_path: Path) -> None:
    dead, heir = FileStateStore(tmp_path), FileStateStore(tmp_path)
    await dead.open()
    await heir.open()
    with FaultyDisk(Fault(at=2, call="rename", action="crash before")), pytest.raises(Crash):
        await dead.commit([put(("alice", "1"), {"n": 1}), put("bob", {}), append("alice", {})])

    assert await heir.erase("notes", ("alice",)) == 2

    assert await heir.keys("notes") == [("bob",)]
    assert await records_of(heir, "alice") == []
    for store in (dead, heir):
        await store.close()


async def test_tasks_share_a_lock_and_its_owner_waits_its_turn(tmp_path: Path) -> None:
    """Commits below a key run side by side; a lock of the key comes in between them."""
    store = FileStateStore(tmp_path)
    await store.open()
    order: list[str] = []

    async def save(name: str) -> None:
        await store.commit([put(("a", name), {})])
        order.append(name)

    async def lock() -> None:
        async with store.lock("notes", ("a",)):
            order.append("locked")

    held, go_on = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        async with store.lock("notes", ("a", "held")):
            held.set()
            await go_on.wait()

    holding = asyncio.create_task(hold())
    await held.wait()
    await soon(save("beside"))
    waiting = [asyncio.create_task(lock()), asyncio.create_task(save("after"))]
    await asyncio.sleep(0)
    go_on.set()
    await soon(asyncio.gather(holding, *waiting))
    assert order == ["beside", "locked", "after"]
    await store.close()
