"""A person writes at the worst moment of a save: what they typed is used, or kept and told."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest

from agent_state import AgentStateError, StatePersistenceManager
from agent_state.storage import FileStateStore, WALStateStore, syscalls
from agent_state.testing import Crash, FaultyDisk
from tests.faults.tally import Tally

ROW = pytest.mark.proof("T21b", "hand edits at every moment of a save")
OURS, THEIRS = 2, 100
Person = Callable[[Path], None]


# -- what a person does ------------------------------------------------------------------------


def typed(path: Path, **more: object) -> str:
    content = json.loads(path.read_bytes()) if path.exists() else {}
    return json.dumps({**content, "n": THEIRS, **more}, indent=2)


def in_place(path: Path) -> None:
    text = typed(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        file.write(text)


def by_rename(path: Path) -> None:
    text = typed(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name("4913")
    fresh.write_text(text)
    fresh.replace(path)


def bare(path: Path) -> None:
    """A file with nothing of ours in it, as somebody types it from scratch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name("4913")
    fresh.write_text(json.dumps({"n": THEIRS}))
    fresh.replace(path)


def ahead(path: Path) -> None:
    """An edit that claims to be newer than whatever is being saved."""
    text = typed(path, _revision=50)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name("4913")
    fresh.write_text(text)
    fresh.replace(path)


def broken(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name("4913")
    fresh.write_text(f'{{"n": {THEIRS},')
    fresh.replace(path)


def remove(path: Path) -> None:
    path.unlink(missing_ok=True)


PEOPLE: dict[str, Person] = {
    person.__name__: person for person in (in_place, by_rename, bare, ahead, broken, remove)
}


# -- when they do it ---------------------------------------------------------------------------


class At:
    """Just before the first system call of that name about that place, somebody acts."""

    def __init__(self, call: str, place: str, act: Callable[[], None]) -> None:
        self._call, self._place, self._act = call, place, act
        self.done = False

    def __enter__(self) -> Self:
        real = self._real = getattr(syscalls, self._call)

        def call(*args: Any) -> Any:
            if not self.done and any(self._place in str(arg) for arg in args):
                self.done = True
                self._act()
            return real(*args)

        setattr(syscalls, self._call, call)
        return self

    def __exit__(self, *_: object) -> None:
        setattr(syscalls, self._call, self._real)


Moment = Callable[[StatePersistenceManager, Callable[[], None]], Awaitable[None]]
MOMENTS: dict[str, Moment] = {}


def moment(name: str) -> Callable[[Moment], Moment]:
    def register(function: Moment) -> Moment:
        MOMENTS[name] = function
        return function

    return register


async def save(manager: StatePersistenceManager) -> None:
    await manager.save("notes", "it", {"n": OURS})


@moment("before the save")
async def before(manager: StatePersistenceManager, act: Callable[[], None]) -> None:
    act()
    await save(manager)


@moment("while it is being written to the journal")
async def writing(manager: StatePersistenceManager, act: Callable[[], None]) -> None:
    with At("write", "", act) as at:
        await save(manager)
    assert at.done


@moment("after the acknowledgement, before settling")
async def unsettled(manager: StatePersistenceManager, act: Callable[[], None]) -> None:
    await save(manager)
    act()


@moment("after settling's look, before its new file")
async def looked(manager: StatePersistenceManager, act: Callable[[], None]) -> None:
    await save(manager)
    with At("open", "/notes/.tmp-", act) as at:
        await manager.flush()
    assert at.done


@moment("after settling, before the file is synced")
async def settled(manager: StatePersistenceManager, act: Callable[[], None]) -> None:
    await save(manager)
    with At("open", "/state/notes/it.json", act) as at:
        await manager.flush()
    assert at.done


@moment("before the segment is removed")
async def rotating(manager: StatePersistenceManager, act: Callable[[], None]) -> None:
    await save(manager)
    with At("unlink", "/.journal/", act) as at:
        await manager.flush()
    assert at.done


@moment("after everything")
async def after(manager: StatePersistenceManager, act: Callable[[], None]) -> None:
    await save(manager)
    await manager.flush()
    act()


@dataclass
class Found:
    value: int | None
    kept: list[str]
    earlier: list[str]
    told: list[str]


def open_manager(root: Path, exclusive: bool) -> StatePersistenceManager:
    kind = WALStateStore if exclusive else FileStateStore
    return StatePersistenceManager(store=kind(root))


async def look(manager: StatePersistenceManager, root: Path) -> Found:
    try:
        loaded = await manager.load_with_revision("notes", "it")
    except AgentStateError:
        loaded = None
    kept = [path.read_text() for path in root.glob(".quarantine/notes/*") if path.suffix != ".json"]
    told = [incident.kept for incident in manager.incidents() if incident.kept is not None]
    earlier = [path.read_text() for path in root.glob(".snapshots/notes/*")]
    return Found(loaded.state.model_dump()["n"] if loaded else None, kept, earlier, told)


def judge(found: Found, person: str, tally: Tally, *, known: bool = True) -> None:
    """Nothing that was typed and nothing that was acknowledged is gone without a trace.

    ``known``: to the store that saved. If not, it has read the edit and was told to save over it,
    as over any version; then the edit is the document's earlier version.
    """
    tally.points += 1
    is_kept = any(str(THEIRS) in text for text in found.kept + ([] if known else found.earlier))
    if person == "remove":
        lost = found.value not in (OURS, None, 1)
    elif person == "broken":
        lost = not is_kept
    else:
        lost = found.value != THEIRS and not is_kept
    tally.lost += lost
    assert not lost, f"what was typed is gone: {found}"
    assert found.value in (OURS, THEIRS, *((None, 1) if person in ("remove", "broken") else ()))
    assert len(found.told) >= len(found.kept), f"kept and not told: {found}"


@ROW
@pytest.mark.parametrize("person", PEOPLE)
@pytest.mark.parametrize("name", MOMENTS)
@pytest.mark.parametrize(
    "known", [True, pytest.param(False, marks=pytest.mark.full)], ids=["changed", "created"]
)
async def test_what_a_person_writes_while_the_exclusive_store_saves_is_used_or_kept(
    tmp_path: Path, tally: Tally, name: str, person: str, known: bool
) -> None:
    root = tmp_path / "state"
    path = root / "notes" / "it.json"

    def act() -> None:
        PEOPLE[person](path)
        tally.faults += 1

    async with open_manager(root, exclusive=True) as manager:
        if known:
            await manager.save("notes", "it", {"n": 1})
            await manager.flush()
        await MOMENTS[name](manager, act)
        tally.acknowledged += 1
        await manager.flush()
        found = await look(manager, root)
        judge(found, person, tally, known=known)
        await manager.flush()
    async with open_manager(root, exclusive=False) as again:
        assert (await look(again, root)).value == found.value


@ROW
@pytest.mark.parametrize("person", PEOPLE)
@pytest.mark.parametrize("when", ["before recovery", "after recovery's look"])
async def test_what_a_person_writes_between_a_crash_and_its_recovery_is_used_or_kept(
    tmp_path: Path, tally: Tally, when: str, person: str
) -> None:
    root = tmp_path / "state"
    path = root / "notes" / "it.json"
    manager = open_manager(root, exclusive=True)
    with FaultyDisk() as disk:
        await manager.open()
        await manager.save("notes", "it", {"n": 1})
        await manager.flush()
        await save(manager)
        disk.crash()
        with contextlib.suppress(Crash):
            await manager.close()

    def act() -> None:
        PEOPLE[person](path)
        tally.faults += 1

    again = open_manager(root, exclusive=True)
    if when == "before recovery":
        act()
        await again.open()
    else:
        with At("open", "/state/notes/.tmp-", act) as at:
            await again.open()
        assert at.done
    found = await look(again, root)
    judge(found, person, tally)
    await again.close()


@ROW
@pytest.mark.parametrize("person", PEOPLE)
@pytest.mark.parametrize("call", ["open", "fdatasync"])
@pytest.mark.parametrize("how", ["save", "group", pytest.param("edit", marks=pytest.mark.full)])
async def test_what_a_person_writes_between_read_and_save_of_the_shared_store_is_used_or_kept(
    tmp_path: Path, tally: Tally, how: str, call: str, person: str
) -> None:
    root = tmp_path / "state"
    path = root / "notes" / "it.json"

    def act() -> None:
        PEOPLE[person](path)
        tally.faults += 1

    place = {"open": "/state/notes/.tmp-", "fdatasync": ""}[call]
    async with open_manager(root, exclusive=False) as manager:
        await manager.save("notes", "it", {"n": 1})
        await asyncio.sleep(0.11)  # so old that what was read of it may be believed
        await manager.load_with_revision("notes", "it")
        with At(call, place, act) as at:
            if how == "save":
                await save(manager)
            elif how == "edit":
                async with manager.edit("notes", "it") as state:
                    state.n = OURS
            else:
                async with manager.group() as group:
                    group.save("notes", "it", {"n": OURS})
                    group.save("notes", "other", {"n": OURS})
        assert at.done
        tally.acknowledged += 1
        judge(await look(manager, root), person, tally)
