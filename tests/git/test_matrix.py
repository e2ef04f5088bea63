"""Each case of two branches through each operation of git that merges: a product.

Where git itself gives up (a deleted file, an octopus), what it has left is settled by
``agent-state git resolve``, or the branches are merged one by one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from agent_state import StatePersistenceManager
from agent_state.verify import verify
from agent_state_integrations.git import GitRepository, configure, merge_revision, resolve_unmerged
from tests.git.repositories import CLEAN, Repository
from tests.git.test_merges import (
    ALICE,
    MAIL,
    TASK,
    history,
    load,
    mail,
    store,
    task,
)

BOB = ("agents", ("bob",))
CAROL = ("agents", ("carol",))
DIARY = ("diary", ("days",))
ARCHIVE = ("tasks", ("alice", "archive"))
OTHER_DIARY = ("diary", ("others",))
OURS, THEIRS = "ours", "theirs"


class Case(NamedTuple):
    """Two branches, and what comes out; a log is the list of what is appended to it."""

    base: Mapping[Any, Any]
    ours: Mapping[Any, Any]
    theirs: Mapping[Any, Any]
    expected: Mapping[Any, Any]
    reverted: Mapping[Any, Any]
    """After the commit of theirs was reverted on top of what comes out."""
    asked: str | None = None
    """The side that a person takes, where no rule decides."""


def agent(name: str, **fields: Any) -> dict[str, Any]:
    return {"agent_id": name, **fields}


PENDING, DONE = task("pending"), task("completed", finished_at="2026-01-01", result=4)
CASES = {
    "disjoint agents": Case(
        {ALICE: agent("alice", n=1), BOB: agent("bob", n=1), CAROL: agent("carol", n=1)},
        {ALICE: agent("alice", n=2)},
        {BOB: agent("bob", n=3), CAROL: agent("carol", n=3)},
        {ALICE: agent("alice", n=2), BOB: agent("bob", n=3), CAROL: agent("carol", n=3)},
        {ALICE: agent("alice", n=2), BOB: agent("bob", n=1), CAROL: agent("carol", n=1)},
    ),
    "different fields": Case(
        {
            ALICE: agent("alice", a=1, b=1, context={"working_memory": {"a": 1, "b": 1.5}}),
            BOB: agent("bob", a=1, b=1),
        },
        {
            ALICE: agent("alice", a=2, b=1, context={"working_memory": {"a": 2, "b": 1.5}}),
            BOB: agent("bob", a=1, b=1, c=1),
        },
        {
            ALICE: agent("alice", a=1, b=2, context={"working_memory": {"a": 1, "b": 1e-7}}),
            BOB: agent("bob", b=1),
        },
        {
            ALICE: agent("alice", a=2, b=2, context={"working_memory": {"a": 2, "b": 1e-7}}),
            BOB: agent("bob", b=1, c=1),
        },
        {
            ALICE: agent("alice", a=2, b=1, context={"working_memory": {"a": 2, "b": 1.5}}),
            BOB: agent("bob", a=1, b=1, c=1),
        },
    ),
    "the same field": Case(
        {ALICE: agent("alice", mood="base", a=1, b=1)},
        {ALICE: agent("alice", mood=OURS, a=2, b=1)},
        {ALICE: agent("alice", mood=THEIRS, a=1, b=2)},
        {ALICE: agent("alice", mood=THEIRS, a=1, b=2)},
        {ALICE: agent("alice", mood="base", a=1, b=1)},
        asked=THEIRS,
    ),
    "completed against cancelled": Case(
        {TASK: PENDING},
        {TASK: task("cancelled", finished_at="2026-01-02", error="by hand")},
        {TASK: DONE},
        {TASK: DONE},
        {TASK: PENDING},
    ),
    "read against replied": Case(
        {MAIL: mail("unread")},
        {MAIL: mail("read", read_at="2026-01-01")},
        {MAIL: mail("replied", read_at="2026-01-01", replied_with="x")},
        {MAIL: mail("replied", read_at="2026-01-01", replied_with="x")},
        {MAIL: mail("unread")},
    ),
    "histories appended": Case(
        {ALICE: history("1"), BOB: {**history("1"), "agent_id": "bob"}},
        {ALICE: history("1", "2 ours", "6 both"), BOB: {**history("1"), "agent_id": "bob", "n": 1}},
        {ALICE: history("1", "3 theirs", "6 both"), BOB: {**history("1", "2"), "agent_id": "bob"}},
        {
            ALICE: history("1", "2 ours", "3 theirs", "6 both"),
            BOB: {**history("1", "2"), "agent_id": "bob", "n": 1},
        },
        {ALICE: history("1"), BOB: {**history("1"), "agent_id": "bob", "n": 1}},
        asked=THEIRS,
    ),
    "logs appended": Case(
        {DIARY: [{"n": "base"}], OTHER_DIARY: [{"n": "base"}]},
        {DIARY: [{"n": "ours"}, {"n": "both", "dedupe": "x"}]},
        {DIARY: [{"n": "theirs"}, {"n": "both", "dedupe": "x"}], OTHER_DIARY: [{"n": "theirs"}]},
        {DIARY: {"base", "ours", "theirs", "both"}, OTHER_DIARY: {"base", "theirs"}},
        {DIARY: {"base", "ours"}, OTHER_DIARY: {"base"}},
    ),
    "archived against changed": Case(
        {TASK: DONE},
        {TASK: None, ARCHIVE: [DONE]},
        {TASK: {**DONE, "note": "touched"}},
        {TASK: None, ARCHIVE: {"t"}},
        {TASK: None, ARCHIVE: {"t"}},
    ),
    "deleted against ended": Case(
        {TASK: PENDING}, {TASK: None}, {TASK: DONE}, {TASK: DONE}, {TASK: PENDING}
    ),
    "ended against deleted": Case(
        {TASK: PENDING}, {TASK: DONE}, {TASK: None}, {TASK: DONE}, {TASK: DONE}
    ),
    "deleted against changed": Case(
        {TASK: PENDING},
        {TASK: None},
        {TASK: task("failed", error="x")},
        {TASK: task("failed", error="x")},
        {TASK: PENDING},
        asked=THEIRS,
    ),
}


# -- the repositories ------------------------------------------------------------------------------


async def save(state: Path, states: Mapping[Any, Any]) -> None:
    """Save these states; a set is what a log is to have, and was appended before."""
    logs = {place: body for place, body in states.items() if isinstance(body, list)}
    await store(state, {k: b for k, b in states.items() if not isinstance(b, (list, set))})
    async with StatePersistenceManager(state) as manager:
        for (kind, key), records in logs.items():
            for record in records:
                await manager.append(kind, key, record, dedupe_key=record.get("dedupe"))


async def begin(root: Path, case: Case) -> None:
    """`main` and `other` of a case, `third` with something else, and `done` for a revert."""
    repository = Repository(root)
    configure(GitRepository(repository.state))
    (repository.root / "README").write_text("")
    await save(repository.state, case.base)
    repository.commit("base")
    for name, states in (("third", {("notes", ("n",)): {"n": 1}}), ("other", case.theirs)):
        repository.git("checkout", "-q", "-b", name, "main")
        await save(repository.state, states)
        repository.commit(name)
    repository.git("checkout", "-q", "-b", "done")
    await save(repository.state, {**case.ours, **_documents(case.expected)})
    (repository.root / "README").write_text("later\n")
    repository.commit("done")
    repository.git("checkout", "-q", "main")
    await save(repository.state, case.ours)
    repository.commit("ours")


def _documents(states: Mapping[Any, Any]) -> dict[Any, Any]:
    return {place: body for place, body in states.items() if not isinstance(body, set)}


# -- the operations ----------------------------------------------------------------------------


class Left(NamedTuple):
    """How to go on from an operation that stopped, and whose changes are at stage 3."""

    go_on: tuple[str, ...] = ()
    swapped: bool = False


def run(*args: str, go_on: tuple[str, ...], swapped: bool = False) -> Callable[[Repository], Left]:
    def operate(repository: Repository) -> Left:
        done = repository.run(*args)
        assert done.returncode in (0, 1), done.stderr
        return Left(go_on, swapped)

    operate.__name__ = " ".join(args)
    return operate


def in_one_process(repository: Repository) -> Left:
    merge_revision(GitRepository(repository.state), "other")
    return Left(("commit", "-q", "-m", "m"))


def octopus(repository: Repository) -> Left:
    """One merge of two branches; git merges text, or gives up and leaves nothing."""
    done = repository.run("merge", "-q", "-m", "m", "third", "other")
    if done.returncode != 0 and not repository.run("ls-files", "-u").stdout:
        assert repository.status == ""
        merge_revision(GitRepository(repository.state), "third")
        merge_revision(GitRepository(repository.state), "other")
    return Left(("commit", "-q", "-m", "m"))


def by_mail(repository: Repository) -> Left:
    patch = repository.root.with_name("patch")
    patch.write_text(repository.git("format-patch", "-1", "--stdout", "--full-index", "other"))
    repository.run("am", "-q", "-3", str(patch))
    return Left(("am", "--continue"))


def stash(repository: Repository) -> Left:
    """The changes of `other` are none of a commit, but of the worktree."""
    _uncommitted(repository)
    repository.git("stash", "-q", "-u")
    repository.git("checkout", "-q", "main")
    repository.run("stash", "apply", "-q")
    return Left()


def checkout(repository: Repository) -> Left:
    _uncommitted(repository)
    repository.git("checkout", "-q", "-m", "main")
    return Left()


def _uncommitted(repository: Repository) -> None:
    repository.git("checkout", "-q", "--detach", "other")
    repository.git("reset", "-q", "HEAD~1")


OPERATIONS = [
    run("merge", "-q", "-m", "m", "-s", "ort", "other", go_on=("commit", "-q", "-m", "m")),
    run("merge", "-q", "-m", "m", "-s", "recursive", "other", go_on=("commit", "-q", "-m", "m")),
    octopus,
    in_one_process,
    run("cherry-pick", "other", go_on=("cherry-pick", "--continue")),
    run("rebase", "-q", "other", go_on=("rebase", "--continue"), swapped=True),
    run("rebase", "-q", "--apply", "other", go_on=("rebase", "--continue"), swapped=True),
    by_mail,
    stash,
    checkout,
]
QUICK = {"the same field", "logs appended", "deleted against ended"}
"""The cases that the quick suite puts through every operation."""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CLEAN.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("templates")


@pytest.fixture(
    params=[
        name if name in QUICK else pytest.param(name, marks=pytest.mark.long("a product"))
        for name in CASES
    ]
)
async def place(
    request: pytest.FixtureRequest, templates: Path, tmp_path: Path
) -> tuple[Repository, Case]:
    """A copy of the repository of a case."""
    case, template = CASES[request.param], templates / request.param.replace(" ", "-")
    if not template.exists():
        await begin(template, case)
    shutil.copytree(template, tmp_path / "repository", symlinks=True)
    return Repository(tmp_path / "repository"), case


async def assert_has(repository: Repository, expected: Mapping[Any, Any]) -> None:
    for place, body in expected.items():
        if not isinstance(body, set):
            assert await load(repository.state, place) == body, place
            continue
        async with StatePersistenceManager(repository.state) as manager:
            said = [entry.record async for entry in manager.read_log(*place)]
        names = [one.get("n") or one["task_id"] for one in said]
        assert sorted(names) == sorted(body)
        assert names[0] in ("base", "t")
    report = await verify(repository.state)
    assert report.problems == []
    assert [one for one in report.notices if one.fault == "changed outside"] == []
    assert repository.run("ls-files", "-u").stdout == ""
    assert [*(repository.state / ".runtime/conflicts").glob("*")] == []


def settle(repository: Repository, left: Left, take: str | None) -> None:
    """Settle what is left by the rules, and by a person who takes one side."""
    git = GitRepository(repository.state)
    report = resolve_unmerged(git)
    if take is not None and report.conflicts:
        assert all(path.read_text() for path in (repository.state / ".runtime/conflicts").glob("*"))
        assert resolve_unmerged(git, take=take).conflicts == []
    else:
        assert report.conflicts == []
    if left.go_on and repository.status:
        repository.git(*left.go_on)
    assert not left.go_on or repository.status == ""


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda one: one.__name__)
async def test_what_comes_out(
    place: tuple[Repository, Case], operation: Callable[[Repository], Left]
) -> None:
    repository, case = place
    left = operation(repository)
    take = case.asked
    if take is not None and left.swapped:  # the commit that is applied anew is ours
        take = OURS if take == THEIRS else THEIRS
    settle(repository, left, take)
    await assert_has(repository, case.expected)


async def test_what_a_revert_leaves(place: tuple[Repository, Case]) -> None:
    repository, case = place
    repository.git("checkout", "-q", "done")
    assert repository.run("revert", "--no-edit", "HEAD~1").returncode in (0, 1)
    settle(repository, Left(("revert", "--continue")), case.asked)
    await assert_has(repository, case.reverted)
