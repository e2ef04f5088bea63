"""Two branches of state are merged by real git with our driver, and in one process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_state import StatePersistenceManager
from agent_state.verify import verify
from agent_state_integrations.git import (
    GitRepository,
    configure,
    merge_revision,
    resolve_unmerged,
    restore,
    story,
)
from agent_state_integrations.git.forks import fork
from agent_state_integrations.git.repository import GitError
from tests.git.repositories import CLEAN, Repository

Key = tuple[str, ...]
States = Mapping[tuple[str, Key], Mapping[str, Any] | None]
ALICE, TASK, MAIL = ("agents", ("alice",)), ("tasks", ("alice", "t")), ("mail", ("alice", "m"))


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CLEAN.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def configured(repository: Repository) -> Repository:
    repository.commit("nothing")
    configure(GitRepository(repository.state))
    repository.commit("attributes")
    return repository


async def store(state: Path, states: States) -> None:
    """Save these states, as one group; None deletes one, and a list of a log appends to it."""
    async with StatePersistenceManager(state) as manager, manager.group() as group:
        for (kind, key), body in states.items():
            if body is None:
                group.delete(kind, key)
            elif kind == "diary":
                group.append(kind, key, body, dedupe_key=body.get("dedupe"))
            else:
                group.save(kind, key, body)


async def load(state: Path, place: tuple[str, Key]) -> dict[str, Any] | None:
    async with StatePersistenceManager(state) as manager:
        found = await manager.load(*place)
    return None if found is None else found.model_dump()


async def branch(repository: Repository, base: States, ours: States, theirs: States) -> None:
    """`main` and `other` go on from a common base; `main` is checked out."""
    await store(repository.state, base)
    repository.commit("base")
    repository.git("branch", "other")
    await store(repository.state, ours)
    repository.commit("ours")
    repository.git("checkout", "-q", "other")
    await store(repository.state, theirs)
    repository.commit("theirs")
    repository.git("checkout", "-q", "main")


async def assert_sound(repository: Repository) -> None:
    report = await verify(repository.state)
    assert report.problems == []
    assert [one for one in report.notices if one.fault == "changed outside"] == []


def by_driver(repository: Repository) -> int:
    return repository.run("merge", "-q", "-m", "merge", "other").returncode


def in_one_process(repository: Repository) -> int:
    return 1 if merge_revision(GitRepository(repository.state), "other").conflicts else 0


WAYS = pytest.mark.parametrize("way", [by_driver, in_one_process])
Way = Callable[[Repository], int]


# -- what the rules make of two sides ----------------------------------------------------------


def task(status: str, **fields: Any) -> dict[str, Any]:
    return {"task_id": "t", "agent_id": "alice", "status": status, **fields}


def mail(status: str, **fields: Any) -> dict[str, Any]:
    return {"message_id": "m", "to_agent": "alice", "status": status, **fields}


def history(*turns: str, **fields: Any) -> dict[str, Any]:
    said = [{"role": "user", "content": turn, "timestamp": f"2026-01-0{turn[0]}"} for turn in turns]
    return {"agent_id": "alice", "context": {"conversation_history": said}, **fields}


MERGED: dict[str, tuple[States, States, States, States]] = {
    "disjoint agents": (
        {ALICE: {"agent_id": "alice", "n": 1}, ("agents", ("bob",)): {"agent_id": "bob", "n": 1}},
        {ALICE: {"agent_id": "alice", "n": 2}},
        {("agents", ("bob",)): {"agent_id": "bob", "n": 3}},
        {ALICE: {"agent_id": "alice", "n": 2}, ("agents", ("bob",)): {"agent_id": "bob", "n": 3}},
    ),
    "different fields": (
        {ALICE: {"agent_id": "alice", "context": {"working_memory": {"a": 1, "b": 1.5}}}},
        {ALICE: {"agent_id": "alice", "context": {"working_memory": {"a": 2, "b": 1.5}}}},
        {ALICE: {"agent_id": "alice", "context": {"working_memory": {"a": 1, "b": 1e-7}}}},
        {ALICE: {"agent_id": "alice", "context": {"working_memory": {"a": 2, "b": 1e-7}}}},
    ),
    "completed against cancelled": (
        {TASK: task("pending")},
        {TASK: task("cancelled", finished_at="2026-01-02", error="by hand")},
        {TASK: task("completed", finished_at="2026-01-01", result=4)},
        {TASK: task("completed", finished_at="2026-01-01", result=4)},
    ),
    "completed against a further attempt": (
        {TASK: task("pending", attempts=1)},
        {TASK: task("completed", result=4, attempts=2)},
        {TASK: task("in_progress", attempts=3, lease={"owner": "x"})},
        {TASK: task("completed", result=4, attempts=3)},
    ),
    "read against replied": (
        {MAIL: mail("unread")},
        {MAIL: mail("read", read_at="2026-01-02")},
        {MAIL: mail("replied", read_at="2026-01-01", replied_with="x")},
        {MAIL: mail("replied", read_at="2026-01-02", replied_with="x")},
    ),
    "histories that go on": (
        {ALICE: history("1")},
        {ALICE: history("1", "2 ours", "5 ours", "6 both")},
        {ALICE: history("1", "3 theirs", "6 both")},
        {ALICE: history("1", "2 ours", "3 theirs", "5 ours", "6 both")},
    ),
    "times of both": (
        {ALICE: {"agent_id": "alice", "last_active": "2026-01-01"}},
        {ALICE: {"agent_id": "alice", "last_active": "2026-01-03", "a": 1}},
        {ALICE: {"agent_id": "alice", "last_active": "2026-01-02", "b": 1}},
        {ALICE: {"agent_id": "alice", "last_active": "2026-01-03", "a": 1, "b": 1}},
    ),
    "the same on both sides": (
        {},
        {ALICE: {"agent_id": "alice", "n": 1}},
        {ALICE: {"agent_id": "alice", "n": 1}},
        {ALICE: {"agent_id": "alice", "n": 1}},
    ),
    "new on both sides": (
        {},
        {ALICE: {"agent_id": "alice", "a": 1}},
        {ALICE: {"agent_id": "alice", "b": 1}},
        {ALICE: {"agent_id": "alice", "a": 1, "b": 1}},
    ),
    "a field removed, another added": (
        {ALICE: {"agent_id": "alice", "a": 1}},
        {ALICE: {"agent_id": "alice"}},
        {ALICE: {"agent_id": "alice", "a": 1, "b": "ü\u2028"}},
        {ALICE: {"agent_id": "alice", "b": "ü\u2028"}},
    ),
    "a hashed name": (
        {("agents", ("x" * 200,)): {"agent_id": "x" * 200}},
        {("agents", ("x" * 200,)): {"agent_id": "x" * 200, "a": 1}},
        {("agents", ("x" * 200,)): {"agent_id": "x" * 200, "b": 1}},
        {("agents", ("x" * 200,)): {"agent_id": "x" * 200, "a": 1, "b": 1}},
    ),
}


@WAYS
@pytest.mark.parametrize("name", MERGED)
async def test_both_sides_are_kept(configured: Repository, name: str, way: Way) -> None:
    base, ours, theirs, expected = MERGED[name]
    await branch(configured, base, ours, theirs)
    assert way(configured) == 0
    await assert_sound(configured)
    for place, body in expected.items():
        assert await load(configured.state, place) == body
    assert configured.git("status", "--porcelain") == ""
    assert len(configured.git("log", "-1", "--format=%P").split()) == 2


CONFLICTS: dict[str, tuple[States, States, States, str]] = {
    "the same field": (
        {ALICE: {"agent_id": "alice", "mood": "good", "a": 1}},
        {ALICE: {"agent_id": "alice", "mood": "ours", "a": 1}},
        {ALICE: {"agent_id": "alice", "mood": "theirs", "a": 2}},
        'mood: "ours" against "theirs"',
    ),
    "a field changed and removed": (
        {ALICE: {"agent_id": "alice", "mood": "good"}},
        {ALICE: {"agent_id": "alice", "mood": "ours"}},
        {ALICE: {"agent_id": "alice"}},
        'mood: "ours" against nothing',
    ),
    "a history that was rewritten": (
        {ALICE: history("1", "2")},
        {ALICE: history("1", "2", "3")},
        {ALICE: history("1", "9")},
        "conversation_history",
    ),
    "two results": (
        {TASK: task("pending")},
        {TASK: task("completed", result=1)},
        {TASK: task("completed", result=2)},
        "status",
    ),
}


@WAYS
@pytest.mark.parametrize("name", CONFLICTS)
async def test_a_conflict_is_readable_and_noted(
    configured: Repository, name: str, way: Way
) -> None:
    base, ours, theirs, said = CONFLICTS[name]
    await branch(configured, base, ours, theirs)
    [(kind, key)] = ours
    path = f"{kind}/{'/'.join(key)}.json"
    assert way(configured) == 1
    content = json.loads((configured.state / path).read_text())
    mine = {name: content[name] for name in content if not name.startswith("_")}
    assert {**mine, "a": None} == {**ours[kind, key], "a": None}  # type: ignore[dict-item]
    assert configured.git("diff", "--name-only", "--diff-filter=U").split() == [f"state/{path}"]
    if way is by_driver:
        [note] = (configured.state / ".runtime/conflicts").iterdir()
        assert said in note.read_text()
    else:
        report = resolve_unmerged(GitRepository(configured.state))
        assert any(said in line for line in report.conflicts)
    assert {problem.fault for problem in (await verify(configured.state)).problems} == {"unmerged"}

    settled = resolve_unmerged(GitRepository(configured.state), take="theirs")
    assert settled.conflicts == []
    configured.git("commit", "-q", "-m", "resolved")
    assert await load(configured.state, (kind, key)) == theirs[kind, key]
    assert not list((configured.state / ".runtime").glob("conflicts/*"))


@WAYS
async def test_logs_keep_the_lines_of_both(configured: Repository, way: Way) -> None:
    diary = ("diary", ("alice",))

    async def append(*bodies: dict[str, Any]) -> None:
        for body in bodies:
            await store(configured.state, {diary: body})

    await append({"n": 1})
    configured.commit("base")
    configured.git("branch", "other")
    await append({"n": "ours"}, {"n": 0, "dedupe": "once"})
    configured.commit("ours")
    configured.git("checkout", "-q", "other")
    await append({"n": "theirs"}, {"n": 0, "dedupe": "once"}, {"n": "last"})
    configured.commit("theirs")
    configured.git("checkout", "-q", "main")

    assert way(configured) == 0
    await assert_sound(configured)
    async with StatePersistenceManager(configured.state) as manager:
        lines = [(one.seq, one.record["n"]) async for one in manager.read_log(*diary)]
        assert lines == [(1, 1), (2, "ours"), (3, 0), (4, "theirs"), (5, "last")]
        assert await manager.append(*diary, {"n": 9}, dedupe_key="once") == 3


async def test_two_documents_under_one_name_are_a_conflict(configured: Repository) -> None:
    await branch(
        configured,
        {},
        {("notes", ("x",)): {"agent_id": "ann", "n": 1}},
        {("notes", ("x",)): {"agent_id": "ben", "m": 1}},
    )
    assert by_driver(configured) == 1
    assert json.loads((configured.state / "notes/x.json").read_text())["agent_id"] == "ann"


# -- deleted against changed -------------------------------------------------------------------


@pytest.mark.parametrize("deleted_by", ["us", "them"])
async def test_what_has_ended_is_kept_although_one_side_deleted_it(
    configured: Repository, deleted_by: str
) -> None:
    gone: States = {TASK: None}
    ended: States = {TASK: task("completed", result=4)}
    sides = (gone, ended) if deleted_by == "us" else (ended, gone)
    await branch(configured, {TASK: task("pending")}, *sides)
    assert by_driver(configured) == 1  # git asks no driver about a deleted file
    assert resolve_unmerged(GitRepository(configured.state)).conflicts == []
    configured.git("commit", "-q", "-m", "resolved")
    await assert_sound(configured)
    assert await load(configured.state, TASK) == task("completed", result=4)


async def test_what_was_archived_stays_archived(configured: Repository) -> None:
    done = task("completed", result=4, finished_at="2026-01-01T00:00:00.000000Z")
    await store(configured.state, {TASK: done})
    configured.commit("base")
    configured.git("branch", "other")
    async with StatePersistenceManager(configured.state) as manager:
        await manager.cleanup_old_states(0)
    assert not (configured.state / "tasks/alice/t.json").exists()
    configured.commit("archived")
    configured.git("checkout", "-q", "other")
    await store(configured.state, {TASK: {**done, "note": "touched"}})
    configured.commit("touched")
    configured.git("checkout", "-q", "main")

    report = merge_revision(GitRepository(configured.state), "other")
    assert report.conflicts == []
    assert report.told == ["tasks/alice/t.json: archived, although it was changed"]
    await assert_sound(configured)
    assert await load(configured.state, TASK) is None


@WAYS
async def test_a_change_of_what_is_open_is_asked_about(configured: Repository, way: Way) -> None:
    await branch(configured, {TASK: task("pending")}, {TASK: None}, {TASK: task("failed")})
    assert way(configured) == 1
    assert resolve_unmerged(GitRepository(configured.state)).conflicts == [
        "tasks/alice/t.json: we deleted it, and it was changed"
    ]
    resolve_unmerged(GitRepository(configured.state), take="ours")
    assert not (configured.state / "tasks/alice/t.json").exists()


# -- every way in which git merges -------------------------------------------------------------

BASE: States = {ALICE: {"agent_id": "alice", "a": 1, "b": 1, "c": 1}}
OURS: States = {ALICE: {"agent_id": "alice", "a": 2, "b": 1, "c": 1}}
THEIRS: States = {ALICE: {"agent_id": "alice", "a": 1, "b": 2, "c": 1}}
BOTH = {"agent_id": "alice", "a": 2, "b": 2, "c": 1}


@pytest.mark.parametrize(
    "command",
    [
        ["merge", "-q", "-m", "m", "-s", "ort", "other"],
        ["merge", "-q", "-m", "m", "-s", "recursive", "other"],
        ["cherry-pick", "other"],
        ["rebase", "-q", "other"],
        ["rebase", "-q", "--apply", "other"],
    ],
    ids=" ".join,
)
async def test_commands_that_take_a_branch(configured: Repository, command: list[str]) -> None:
    await branch(configured, BASE, OURS, THEIRS)
    configured.git(*command)
    assert await load(configured.state, ALICE) == BOTH
    await assert_sound(configured)


async def test_revert_takes_back_one_change_alone(configured: Repository) -> None:
    await store(configured.state, BASE)
    configured.commit("base")
    await store(configured.state, THEIRS)
    to_revert = configured.commit("theirs")
    await store(configured.state, {ALICE: BOTH})
    configured.commit("ours")
    configured.git("revert", "--no-edit", to_revert)
    assert await load(configured.state, ALICE) == {"agent_id": "alice", "a": 2, "b": 1, "c": 1}
    await assert_sound(configured)


@pytest.mark.parametrize("way", ["stash", "checkout -m", "am -3"])
async def test_commands_that_take_a_change(configured: Repository, way: str) -> None:
    await branch(configured, BASE, OURS, THEIRS)
    if way == "am -3":
        patch = configured.git("format-patch", "-1", "--stdout", "--full-index", "other")
        (configured.root / "patch").write_text(patch)
        configured.git("am", "-q", "-3", "patch")
    else:
        configured.git("checkout", "-q", "other~1")
        await store(configured.state, THEIRS)
        if way == "stash":
            configured.git("stash", "-q")
            configured.git("checkout", "-q", "main")
            configured.git("stash", "apply", "-q")
        else:
            configured.git("checkout", "-q", "-m", "main")
    assert await load(configured.state, ALICE) == BOTH
    await assert_sound(configured)


async def test_a_strategy_without_a_driver_is_settled_afterwards(configured: Repository) -> None:
    await branch(configured, BASE, OURS, THEIRS)
    assert configured.run("merge", "-s", "resolve", "-m", "m", "other").returncode == 1
    assert resolve_unmerged(GitRepository(configured.state)).conflicts == []
    configured.git("commit", "-q", "-m", "merged")
    assert await load(configured.state, ALICE) == BOTH
    await assert_sound(configured)


async def test_an_octopus_gives_up_and_the_branches_are_merged_one_by_one(
    configured: Repository,
) -> None:
    await branch(configured, BASE, OURS, THEIRS)
    configured.git("branch", "third", "other~1")
    configured.git("checkout", "-q", "third")
    await store(configured.state, {ALICE: {"agent_id": "alice", "a": 1, "b": 1, "c": 2}})
    configured.commit("third")
    configured.git("checkout", "-q", "main")
    assert configured.run("merge", "-m", "m", "other", "third").returncode != 0
    assert configured.git("status", "--porcelain") == ""  # git has put everything back
    for name in ("other", "third"):
        assert merge_revision(GitRepository(configured.state), name).conflicts == []
    assert await load(configured.state, ALICE) == {**BOTH, "c": 2}
    await assert_sound(configured)


async def test_a_criss_cross_merge_has_a_virtual_base(configured: Repository) -> None:
    await branch(configured, BASE, OURS, THEIRS)
    ours, theirs = (configured.git("rev-parse", name).strip() for name in ("main", "other"))
    configured.git("merge", "-q", "-m", "one", theirs)
    configured.git("checkout", "-q", "other")
    configured.git("merge", "-q", "-m", "two", ours)
    await store(configured.state, {ALICE: {**BOTH, "c": 2}})
    configured.commit("c")
    configured.git("checkout", "-q", "main")
    await store(configured.state, {ALICE: {**BOTH, "d": 1}})
    configured.commit("d")
    configured.git("merge", "-q", "-m", "three", "other")
    assert await load(configured.state, ALICE) == {**BOTH, "c": 2, "d": 1}


async def test_a_merge_with_local_changes_in_the_way_changes_nothing(
    configured: Repository,
) -> None:
    await branch(configured, BASE, OURS, THEIRS)
    await store(configured.state, {ALICE: {"agent_id": "alice", "local": 1}})
    before = configured.git("rev-parse", "HEAD"), configured.status
    with pytest.raises(GitError):
        merge_revision(GitRepository(configured.state), "other")
    assert (configured.git("rev-parse", "HEAD"), configured.status) == before


# -- the law -----------------------------------------------------------------------------------

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["submit", "complete", "cancel", "archive", "mail"]), st.integers(0, 5)
    ),
    max_size=8,
)


async def live(state: Path, steps: list[tuple[str, int]], side: str) -> set[str]:
    """A simulated run: tasks of its own are submitted, known ones end, and are archived."""
    made = set()
    async with StatePersistenceManager(state) as manager:
        for number, (what, which) in enumerate(steps):
            known = await manager.keys("tasks", "alice")
            if what == "submit":
                name = f"{side}-{number}"
                made.add(name)
                await manager.save("tasks", ("alice", name), task("pending", task_id=name))
            elif what == "mail":
                name = f"{side}-{number}"
                await manager.save("mail", ("alice", name), mail("unread", message_id=name))
            elif what == "archive":
                await manager.cleanup_old_states(0)
            elif known:
                async with manager.edit("tasks", known[which % len(known)]) as found:
                    if found.status == "pending":
                        found.status = "completed" if what == "complete" else "cancelled"
    return made


@settings(deadline=None)
@given(before=STEPS, ours=STEPS, theirs=STEPS)
def test_every_task_of_both_sides_is_there_exactly_once(
    tmp_path_factory: pytest.TempPathFactory,
    before: list[tuple[str, int]],
    ours: list[tuple[str, int]],
    theirs: list[tuple[str, int]],
) -> None:
    repository = Repository(tmp_path_factory.mktemp("law") / "repository")
    (repository.root / "README").write_text("")

    async def run() -> None:
        made = await live(repository.state, before, "base")
        repository.commit("base")
        repository.git("branch", "other")
        made |= await live(repository.state, ours, "ours")
        repository.commit("ours")
        repository.git("checkout", "-q", "other")
        made |= await live(repository.state, theirs, "theirs")
        repository.commit("theirs")
        repository.git("checkout", "-q", "main")
        await asyncio.to_thread(merge_revision, GitRepository(repository.state), "other")
        resolved = await asyncio.to_thread(
            resolve_unmerged, GitRepository(repository.state), take="ours"
        )
        assert resolved.conflicts == []
        await assert_sound(repository)
        async with StatePersistenceManager(repository.state) as manager:
            there = [key[1] for key in await manager.keys("tasks", "alice")]
            there += [
                str(one.record["task_id"])
                async for one in manager.read_log("tasks", ("alice", "archive"))
            ]
        assert sorted(there) == sorted(made)

    asyncio.run(run())


# -- conversations in logs -------------------------------------------------------------------------


def conversation(*said: str) -> dict[str, Any]:
    history = [{"role": "user", "content": text + "x" * 300} for text in said]
    return {"agent_id": "alice", "context": {"conversation_history": history}}


async def said(repository: Repository) -> list[str]:
    found = await load(repository.state, ALICE)
    assert found is not None
    return [turn["content"].rstrip("x") for turn in found["context"]["conversation_history"]]


LONG = [f"{number} " for number in range(20)]


@pytest.mark.parametrize("base", [LONG[:3], LONG], ids=["moves on both sides", "is a log"])
async def test_what_both_branches_said_is_kept(configured: Repository, base: list[str]) -> None:
    ours, theirs = [*LONG, "a ", "b "], [*LONG, "c "]
    await branch(
        configured,
        {ALICE: conversation(*base)},
        {ALICE: conversation(*ours)},
        {ALICE: conversation(*theirs)},
    )
    configured.git("merge", "other", "-m", "merged")
    assert await said(configured) == [*LONG, "a ", "b ", "c "]
    async with StatePersistenceManager(configured.state, exclusive=True) as manager:
        loaded = await manager.load_agent_state("alice")
        assert loaded is not None
        state = loaded.model_dump()
        state["context"]["conversation_history"].append({"role": "user", "content": "after "})
        await manager.save_agent_state("alice", state)
    assert await said(configured) == [*LONG, "a ", "b ", "c ", "after "]
    assert verify_problems(await verify(configured.state)) == []


def verify_problems(report: Any) -> list[str]:
    return [str(problem) for problem in report.problems]


async def test_a_line_is_what_a_turn_changes_in_git(configured: Repository) -> None:
    await store(configured.state, {ALICE: conversation(*LONG)})
    configured.commit("base")
    await store(configured.state, {ALICE: conversation(*LONG, "more ")})
    changed = configured.git("diff", "--numstat", "--", "state/agents/alice/history.jsonl")
    assert changed.split()[:2] == ["1", "0"]


async def test_one_branch_that_goes_on_is_merged(configured: Repository) -> None:
    await branch(
        configured,
        {ALICE: conversation(*LONG[:3])},
        {TASK: {"task_id": "t", "agent_id": "alice", "name": "n", "status": "pending"}},
        {ALICE: conversation(*LONG)},
    )
    configured.git("merge", "other", "-m", "merged")
    assert await said(configured) == LONG


async def test_a_server_does_not_mix_the_conversations_of_two_branches(
    configured: Repository,
) -> None:
    """Both branches have the agent at the same revision, with as many messages."""
    ours, theirs = [*LONG, "ours "], [*LONG, "theirs "]
    await branch(
        configured,
        {ALICE: conversation(*LONG)},
        {ALICE: conversation(*ours)},
        {ALICE: conversation(*theirs)},
    )
    async with StatePersistenceManager(configured.state, exclusive=True) as manager:
        await manager.save_agent_state("alice", conversation(*ours))
        await manager.flush()
        configured.git("checkout", "-q", "-f", "other")
        await manager.save_agent_state("alice", conversation(*ours, "and more "))
    assert await said(configured) == [*ours, "and more "]


async def test_a_fork_takes_its_conversation_along(configured: Repository) -> None:
    await store(configured.state, {ALICE: conversation(*LONG)})
    configured.commit("base")
    fork(GitRepository(configured.state), "nacht-Ü", ["alice"])
    configured.git("checkout", "-q", "-f", "nacht-Ü")
    new = "alice-nacht-Ü"
    found = await load(configured.state, ("agents", (new,)))
    assert found is not None
    assert found["context"] == conversation(*LONG)["context"]
    assert await load(configured.state, ALICE) is None
    assert verify_problems(await verify(configured.state)) == []
    async with StatePersistenceManager(configured.state) as manager:
        assert await manager.store.logs("agents") == [(new, "history")]


async def test_a_conversation_is_restored_as_a_revision_has_it(configured: Repository) -> None:
    await store(configured.state, {ALICE: conversation(*LONG)})
    early = configured.commit("early")
    for number in range(160):  # the log is followed by another, and by one more
        await store(configured.state, {ALICE: conversation(f"{number} ", *LONG[1:], "end ")})
        await store(configured.state, {ALICE: conversation(f"{number} ", *LONG[1:])})
    configured.commit("late")
    (configured.state / "agents/alice/history.jsonl").unlink(missing_ok=True)
    repository = GitRepository(configured.state)
    restored = await asyncio.to_thread(restore, repository, early, "alice")
    assert restored.restored == ["agents/alice.json"]
    assert await said(configured) == LONG
    configured.commit("back")
    words = story(repository, "alice")[0].words
    assert "history" in words
    assert "check" not in words
