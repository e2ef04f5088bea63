"""A server that saves all the time, while git does each of its operations.

Nothing acknowledged is lost: the last version of every document is in its file, in the
quarantine, or with git. No edit vanishes: what a person wrote is in one of them too. No snapshot
has a torn group.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent_state import AgentStateError, StatePersistenceManager
from agent_state.verify import verify
from agent_state_integrations.git import (
    GitRepository,
    configure,
    merge_revision,
    resolve_unmerged,
    snapshot,
)
from agent_state_integrations.git.repository import GitError
from agent_state_integrations.git.snapshots import SNAPSHOTS
from tests.deadlines import until
from tests.git.repositories import CLEAN, Repository

BOTH = pytest.mark.parametrize("exclusive", [True, False], ids=["exclusive", "shared"])
GROUP = [f"w{number}" for number in range(6)]
"""Documents that the server saves together, all the time."""
OTHERS = [f"g{number}" for number in range(3)]
"""Documents that both branches change, each in a field of its own."""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CLEAN.items():
        monkeypatch.setenv(name, value)


class Server:
    """Saves one group after another, and knows what was acknowledged."""

    def __init__(self, manager: StatePersistenceManager) -> None:
        self.manager = manager
        self.acknowledged = 0
        self.refused = 0
        self._resumed = asyncio.Event()
        self._idle = asyncio.Event()

    async def run(self) -> None:
        number = 0
        while True:
            self._idle.set()
            await self._resumed.wait()
            self._idle.clear()
            number += 1
            try:
                async with self.manager.group() as group:
                    for name in GROUP:
                        group.save("notes", name, {"group": number})
                self.acknowledged = number
            except AgentStateError:
                self.refused += 1
                await asyncio.sleep(0.01)
            await asyncio.sleep(0)

    def resume(self) -> None:
        self._resumed.set()

    async def pause(self) -> None:
        """Everything that was acknowledged is in its file then, or where it was put instead."""
        self._resumed.clear()
        await self._idle.wait()
        await self.manager.flush()

    async def works_again(self) -> None:
        before = self.acknowledged
        await until(lambda: self.acknowledged > before + 1)


class Place:
    """A repository with a second worktree, where the branch `other` goes on."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self.git = GitRepository(repository.state)
        self.side = repository.root.with_name("side")
        self._turn = 0

    async def begin(self) -> None:
        configure(self.git)
        async with StatePersistenceManager(self.repository.state) as manager:
            for name in (*GROUP, *OTHERS, "edited"):
                await manager.save("notes", name, {"ours": 0, "theirs": 0})
        self.repository.commit("base")
        self.repository.git("worktree", "add", "-q", "-b", "other", str(self.side))

    async def change_both(self, manager: StatePersistenceManager) -> None:
        """One more commit on both branches: the same document, different fields."""
        self._turn += 1
        name = OTHERS[self._turn % len(OTHERS)]
        self.repository.git("-C", str(self.side), "reset", "-q", "--hard", "main")
        async with StatePersistenceManager(self.side / "state") as theirs:
            await _change(theirs, name, theirs=self._turn)
        self.repository.git("-C", str(self.side), "commit", "-qam", f"theirs {self._turn}")
        await _change(manager, name, ours=self._turn)

    def everything(self) -> list[dict[str, Any]]:
        """Each version that is anywhere: in a file, in the quarantine, in git."""
        state = self.repository.state
        files = [*(state / "notes").glob("*.json"), *(state / ".quarantine/notes").glob("*.json*")]
        found = [file.read_bytes() for file in files if ".reason" not in file.name]
        listed = self.repository.git(
            "cat-file", "--batch-all-objects", "--batch-check=%(objecttype) %(objectname)"
        )
        oids = [line.split()[1] for line in listed.splitlines() if line.startswith("blob")]
        found += self.git.blobs(oids).values()
        return [
            json.loads(data) for data in found if data.startswith(b"{") and b"_revision" in data
        ]

    def clear_up(self) -> None:
        """Settle what an operation has left, without a change of any file by force."""
        resolve_unmerged(self.git, take="ours")
        for operation in ("merge", "rebase", "cherry-pick", "revert", "am"):
            self.repository.run(operation, "--quit")
        self.repository.git("symbolic-ref", "HEAD", "refs/heads/main")
        self.repository.run("reset", "-q")


async def _change(manager: StatePersistenceManager, name: str, **fields: int) -> None:
    found = await manager.load("notes", name)
    assert found is not None
    await manager.save("notes", name, {**found.model_dump(), **fields})


def run(*args: str) -> Callable[[Place], int]:
    def operate(place: Place) -> int:
        return place.repository.run(*args).returncode

    operate.__name__ = " ".join(args)
    return operate


def each(*operations: Callable[[Place], int]) -> Callable[[Place], int]:
    def operate(place: Place) -> int:
        return next((code for one in operations if (code := one(place))), 0)

    operate.__name__ = "; ".join(one.__name__ for one in operations)
    return operate


def mail(place: Place) -> int:
    patch = place.repository.root.with_name("patch")
    patch.write_text(place.repository.git("format-patch", "-1", "--stdout", "other"))
    return place.repository.run("am", "-q", "-3", str(patch)).returncode


def octopus(place: Place) -> int:
    place.repository.git("branch", "-f", "third", "main~1")
    return place.repository.run("merge", "-q", "-m", "octopus", "third", "other").returncode


def in_one_process(place: Place) -> int:
    try:
        return len(merge_revision(place.git, "other").conflicts)
    except GitError:
        return 1


OPERATIONS = [
    run("merge", "-q", "-m", "merge", "other"),
    run("merge", "-q", "-s", "recursive", "-m", "merge", "other"),
    octopus,
    in_one_process,
    run("rebase", "-q", "--autostash", "other"),
    run("rebase", "-q", "--autostash", "--apply", "other"),
    run("cherry-pick", "other"),
    run("revert", "--no-edit", "HEAD"),
    each(run("stash", "-q"), run("stash", "pop", "-q")),
    each(run("checkout", "-q", "-m", "other^0"), run("checkout", "-q", "-m", "main")),
    each(run("checkout", "-q", "other^0"), run("checkout", "-q", "main")),
    mail,
]


@BOTH
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda one: one.__name__)
async def test_nothing_is_lost_while_git_works(
    repository: Repository, exclusive: bool, operation: Callable[[Place], int]
) -> None:
    place = Place(repository)
    await place.begin()
    async with StatePersistenceManager(repository.state, exclusive=exclusive) as manager:
        server = Server(manager)
        working = asyncio.create_task(server.run())
        edits = []
        for turn in range(3):
            await server.pause()
            await place.change_both(manager)
            await manager.flush()
            repository.git("commit", "-qam", f"ours {turn}")
            server.resume()
            await server.works_again()
            edits.append(_edit(repository.state / "notes/edited.json", turn))
            await asyncio.to_thread(operation, place)
            await server.pause()
            await asyncio.to_thread(place.clear_up)
            await server.pause()
            for name in GROUP:  # a server that goes on reads; then it finds what git replaced
                await manager.load("notes", name)

            everything = await asyncio.to_thread(place.everything)
            groups = [found.get("group", 0) for found in everything]
            assert groups.count(server.acknowledged) >= len(GROUP), server.acknowledged
            assert {found.get("typed") for found in everything}.issuperset(edits)

            server.resume()
            await server.works_again()
            report = await asyncio.to_thread(snapshot, place.git, f"turn {turn}", ref=SNAPSHOTS)
            assert report.commit is not None
            shown = [repository.git("show", f"{SNAPSHOTS}:state/notes/{n}.json") for n in GROUP]
            assert len({json.loads(text)["group"] for text in shown}) == 1
        working.cancel()
    assert (await verify(repository.state)).problems == []


def _edit(path: Path, turn: int) -> str:
    """Replace a document as an editor does."""
    typed = f"typed {turn}"
    temporary = path.with_name(".edited.swp")
    temporary.write_text(json.dumps({**json.loads(path.read_bytes()), "typed": typed}, indent=2))
    os.replace(temporary, path)  # noqa: PTH105  # as ``Path.replace``, in one line
    return typed


async def test_each_operation_succeeds_where_nobody_saves(repository: Repository) -> None:
    """So that the tests above are no tests of operations that git refuses."""
    place = Place(repository)
    await place.begin()
    for turn, operation in enumerate(OPERATIONS):
        async with StatePersistenceManager(repository.state) as manager:
            await place.change_both(manager)
        repository.commit("ours")
        _edit(repository.state / "notes/edited.json", turn)  # for a stash to have something
        code = await asyncio.to_thread(operation, place)
        # An octopus of branches that changed one document is given up by git itself.
        assert code == 0 or operation is octopus, operation.__name__
        await asyncio.to_thread(place.clear_up)
        repository.commit("cleared up")
