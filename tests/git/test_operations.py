"""Each rule of the merge through each operation of git that merges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from agent_state import StatePersistenceManager
from agent_state.verify import verify
from agent_state_integrations.git import GitRepository, configure, merge_revision, resolve_unmerged
from tests.git.repositories import CLEAN, Repository
from tests.git.test_merges import MERGED, States, branch, load, store, task

EITHER = ("tasks", ("erin", "t"))
"""A task that one branch deletes, and the other one completes: it is kept."""
MOVED = ("tasks", ("frank", "t"))
"""A task that one branch moves to its archive, and the other one begins: it stays there."""
DIARY = ("diary", ("days",))


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CLEAN.items():
        monkeypatch.setenv(name, value)


def renamed(value: Any, number: int) -> Any:
    """A state, or a key, in which alice and bob are agents of one case alone."""
    if isinstance(value, str):
        return f"{value}{number}" if value in ("alice", "bob") else value
    if isinstance(value, dict):
        return {renamed(name, number): renamed(item, number) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(renamed(item, number) for item in value)
    return value


def sides() -> list[dict[Any, Any]]:
    """Base, ours, theirs and what is to come out, of all cases together."""
    found: list[dict[Any, Any]] = [{}, {}, {}, {}]
    for number, case in enumerate(MERGED.values()):
        for side, states in zip(found, case, strict=True):
            side.update(renamed(dict(states), number))
    return found


async def begin(repository: Repository) -> States:
    """Both branches with all cases; `main` is checked out. What is to come out."""
    configure(GitRepository(repository.state))
    repository.commit("attributes")
    base, ours, theirs, expected = sides()
    open_task = {**task("pending"), "agent_id": "erin"}
    frank = {**task("pending"), "agent_id": "frank"}
    ended = {**open_task, "status": "completed"}
    await branch(
        repository,
        {**base, EITHER: open_task, MOVED: frank, DIARY: {"n": "base"}},
        {**ours, EITHER: None, DIARY: {"n": "ours"}},
        {
            **theirs,
            EITHER: ended,
            MOVED: {**frank, "status": "in_progress"},
            DIARY: {"n": "theirs"},
        },
    )
    async with StatePersistenceManager(repository.state) as manager, manager.group() as group:
        group.append("tasks", ("frank", "archive"), {**frank, "status": "completed"})
        group.delete(*MOVED)
    repository.git("add", "-A")
    repository.git("commit", "-q", "--amend", "-m", "ours")
    return {**expected, EITHER: ended, MOVED: None}


def run(*args: str, go_on: tuple[str, ...]) -> Callable[[Repository], tuple[str, ...]]:
    """An operation; what settles it once nothing is unmerged."""

    def operate(repository: Repository) -> tuple[str, ...]:
        done = repository.run(*args)
        assert done.returncode in (0, 1), done.stderr
        return go_on

    operate.__name__ = " ".join(args)
    return operate


def in_one_process(repository: Repository) -> tuple[str, ...]:
    assert merge_revision(GitRepository(repository.state), "other").conflicts == []
    return ()


def by_mail(repository: Repository) -> tuple[str, ...]:
    patch = repository.root.with_name("patch")
    patch.write_text(repository.git("format-patch", "-1", "--stdout", "--full-index", "other"))
    repository.run("am", "-q", "-3", str(patch))
    return ("am", "--continue")


def with_changes(*commands: list[str]) -> Callable[[Repository], tuple[str, ...]]:
    """Their commit is no commit, but changes in the worktree of the base."""

    def operate(repository: Repository) -> tuple[str, ...]:
        repository.git("checkout", "-q", "other")
        repository.git("reset", "-q", "HEAD~1")
        repository.git("add", "-A")
        for command in commands:
            repository.run(*command)
        return ()

    operate.__name__ = commands[-1][0]
    return operate


# `checkout -m` refuses new files that the other branch has too; tests/git/test_merges.py has it.
OPERATIONS = [
    run("merge", "-q", "-m", "m", "-s", "ort", "other", go_on=("commit", "-q", "-m", "m")),
    run("merge", "-q", "-m", "m", "-s", "recursive", "other", go_on=("commit", "-q", "-m", "m")),
    in_one_process,
    run("cherry-pick", "other", go_on=("cherry-pick", "--continue")),
    run("rebase", "-q", "other", go_on=("rebase", "--continue")),
    run("rebase", "-q", "--apply", "other", go_on=("rebase", "--continue")),
    by_mail,
    with_changes(["stash", "-q"], ["checkout", "-q", "main"], ["stash", "apply", "-q"]),
]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda one: one.__name__)
async def test_each_rule_holds(
    repository: Repository, operation: Callable[[Repository], tuple[str, ...]]
) -> None:
    expected = await begin(repository)
    go_on = operation(repository)
    report = resolve_unmerged(GitRepository(repository.state))
    assert report.conflicts == []
    if go_on and repository.status:
        repository.git(*go_on)
    for place, body in expected.items():
        assert await load(repository.state, place) == body, place
    async with StatePersistenceManager(repository.state) as manager:
        said = [entry.record["n"] async for entry in manager.read_log(*DIARY)]
        assert said[0] == "base"
        assert sorted(said[1:]) == ["ours", "theirs"]
    assert (await verify(repository.state)).problems == []
    assert repository.run("ls-files", "-u").stdout == ""
    await store(repository.state, {("agents", ("alice0",)): {"agent_id": "alice0", "after": 1}})
