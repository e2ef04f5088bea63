"""Repositories, names and configurations that are valid and seldom: ``agent-state git`` in them."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent_state import (
    LockTimeoutError,
    SchemaTooNewError,
    StateCorruptedError,
    StateNotFoundError,
    StatePersistenceManager,
)
from agent_state.storage import barrier
from agent_state_integrations.git import (
    GitRepository,
    blame,
    changes_between,
    check,
    configure,
    merge_revision,
    restore,
    snapshot,
    story,
    unconfigure,
)
from agent_state_integrations.git import repository as repository_module
from agent_state_integrations.git.forks import fork
from agent_state_integrations.git.merge_rules import UnmergeableError, merge
from agent_state_integrations.git.repository import GitError
from agent_state_integrations.git.snapshots import SNAPSHOTS
from agent_state_integrations.git.textconv import convert
from tests.deadlines import soon
from tests.git.repositories import CLEAN, Repository, agent_state


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CLEAN.items():
        monkeypatch.setenv(name, value)


def write(repository: Repository, **fields: object) -> None:
    """Save alice, with a line in her diary."""

    async def save() -> None:
        async with StatePersistenceManager(repository.state, durability="os") as manager:
            await manager.save_agent_state("alice", {"agent_id": "alice", **fields})
            await manager.append("diary", "alice", fields)

    asyncio.run(save())


def alice(repository: Repository) -> dict[str, Any]:
    return dict(json.loads((repository.state / "agents/alice.json").read_text()))


def branch(repository: Repository, ours: dict[str, object], theirs: dict[str, object]) -> None:
    """`other` and `main`, which go on from what is there."""
    repository.commit("base")
    repository.git("checkout", "-q", "-b", "other")
    write(repository, **theirs)
    repository.commit("theirs")
    repository.git("checkout", "-q", "main")
    write(repository, **ours)
    repository.commit("ours")


# -- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["my [s]t?te", ":x", "-state", 'it\'s "so"', "a/b/zustän%Od", "."])
def test_a_state_directory_may_have_any_name(repository: Repository, name: str) -> None:
    repository.state.rmdir()
    repository.state = repository.root / name
    write(repository, a=1, b=1)
    git = GitRepository(repository.state)
    configure(git)
    (repository.state / ".gitattributes").unlink()  # so that the pattern with the name counts
    branch(repository, {"a": 1, "b": 2}, {"a": 2, "b": 1})
    assert [line for line in check(git) if not line.endswith("does not name the driver")] == []
    merged = repository.run("merge", "-m", "merge", "other")
    assert merged.returncode == 0, merged
    assert (alice(repository)["a"], alice(repository)["b"]) == (2, 2)
    write(repository, a=3, b=3)
    assert snapshot(git, "snapshot").commit is not None
    assert repository.status == ""


# -- hooks -------------------------------------------------------------------------------------


def test_the_hook_in_a_linked_worktree_stages_the_state_of_that_one(repository: Repository) -> None:
    configure(GitRepository(repository.state), hooks=True)
    write(repository, a=1)
    repository.commit("base")
    repository.git("worktree", "add", "-q", "../linked", "-b", "linked")
    write(repository, a="of the main worktree")
    linked = Repository(repository.root.parent / "linked")
    write(linked, a="of the linked one")
    linked.commit("mine")
    shown = json.loads(linked.git("show", "HEAD:state/agents/alice.json"))
    assert shown["a"] == "of the linked one"
    assert linked.status == ""


def test_a_commit_may_remove_all_of_the_state(repository: Repository) -> None:
    configure(GitRepository(repository.state), hooks=True)
    write(repository, a=1)
    repository.commit("base")
    repository.git("rm", "-rqf", "state")
    shutil.rmtree(repository.state)
    repository.git("commit", "-qm", "no state")
    assert repository.git("ls-tree", "-r", "HEAD") == ""


def test_hooks_that_other_repositories_share_are_left_alone(
    repository: Repository, tmp_path: Path
) -> None:
    shared = tmp_path / "hooks"
    shared.mkdir()
    repository.git("config", "core.hooksPath", str(shared))
    with pytest.raises(GitError, match="other repositories"):
        configure(GitRepository(repository.state), hooks=True)
    assert [*shared.iterdir()] == []
    assert repository.run("config", "merge.agent-state.driver").stdout == ""  # nothing was done

    repository.git("config", "core.hooksPath", ".githooks")
    configure(GitRepository(repository.state), hooks=True)
    assert (repository.root / ".githooks/pre-commit").exists()


# -- the configuration -------------------------------------------------------------------------


def halves(repository: Repository) -> Iterator[tuple[str, str]]:
    """Ways to lose a part of the configuration, and what is said of them."""
    attributes = repository.state / ".gitattributes"
    info = repository.root / ".git/info/attributes"
    was, of_clone = attributes.read_text(), info.read_text()
    attributes.write_text("".join(f"# {line}\n" for line in was.splitlines()))
    yield "a comment", f"{attributes} does not name the driver"
    attributes.write_text(was)
    info.write_text(f"{of_clone}/state/** -merge\n")
    yield "a later line", "git takes merge=unset for state/agents/x.json"
    info.write_text(of_clone.replace("/state/**/*.jsonl", "# "))
    attributes.write_text(was.replace("*.jsonl", "#"))
    yield "one ending", "git takes merge=unspecified for state/system/x.jsonl"
    attributes.write_text(was)
    info.write_text(of_clone)
    repository.git("config", "--unset", "diff.agent-state.textconv")
    yield "no textconv", "diff.agent-state.textconv is missing"
    configure(GitRepository(repository.state))
    driver = repository.git("config", "merge.agent-state.driver").strip()
    repository.git("config", "merge.agent-state.driver", driver.replace("driver.py", "gone.py"))
    yield "the driver's file", "the driver's file is gone"
    configure(GitRepository(repository.state))
    (repository.root / ".gitignore").write_text("state\n")
    yield "ignored", "git ignores"
    (repository.root / ".gitignore").unlink()


def test_doctor_asks_git_what_it_takes(repository: Repository) -> None:
    git = GitRepository(repository.state)
    configure(git)
    for what, said in halves(repository):
        assert any(said in line for line in check(git)), (what, check(git))
    assert check(git) == []


def test_deinit_leaves_every_line_of_the_user(repository: Repository) -> None:
    git = GitRepository(repository.state)
    configure(git)
    attributes = repository.state / ".gitattributes"
    mine = b"# \xe4\r\n*.bin binary\r\n# merge=agent-state is set\r\n*.x merge=agent-statement\r\n"
    attributes.write_bytes(mine + attributes.read_bytes().replace(b"\n", b"\r\n"))
    assert check(git) == []
    unconfigure(git)
    assert attributes.read_bytes() == mine


def test_what_init_was_told_counts_for_every_merge(repository: Repository) -> None:
    def task(status: str) -> None:
        (repository.state / "tasks/alice").mkdir(parents=True, exist_ok=True)
        text = json.dumps({"agent_id": "alice", "status": status, "task_id": "t"})
        (repository.state / "tasks/alice/t.json").write_text(text)
        repository.commit(status)

    assert agent_state(repository.root, "git", "init", "--prefer", "cancelled").returncode == 0
    task("pending")
    repository.git("checkout", "-q", "-b", "other")
    task("completed")
    repository.git("checkout", "-q", "main")
    task("cancelled")
    merged = agent_state(repository.root, "git", "merge", "other")
    assert merged.returncode == 0, merged
    assert '"status": "cancelled"' in (repository.state / "tasks/alice/t.json").read_text()
    agent_state(repository.root, "git", "init")
    assert " cancelled" in repository.git("config", "merge.agent-state.driver")


# -- what stands in the way --------------------------------------------------------------------


def test_an_index_that_another_command_has_is_waited_for(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(repository, a=1)
    head = repository.commit("base")
    write(repository, a=2)
    lock = repository.root / ".git/index.lock"
    lock.touch()
    monkeypatch.setattr(repository_module, "_BUSY_SECONDS", 0.1)
    with pytest.raises(GitError, match="has the index, or has left"):
        snapshot(GitRepository(repository.state), "no")
    assert repository.git("rev-parse", "HEAD").strip() == head
    assert snapshot(GitRepository(repository.state), "own", ref=SNAPSHOTS).commit is not None
    lock.unlink()
    assert snapshot(GitRepository(repository.state), "yes").commit is not None
    assert repository.status == ""  # nothing is staged that takes the snapshot back


@pytest.mark.parametrize("way", ["merge", "rebase"])
def test_in_the_midst_of_an_operation_nothing_is_committed_or_merged(
    repository: Repository, way: str
) -> None:
    write(repository, a=1)
    (repository.root / "code").write_text("base\n")
    branch(repository, {"a": 2}, {"a": 1})
    for name in ("other", "main"):
        repository.git("checkout", "-q", name)
        (repository.root / "code").write_text(f"{name}\n")
        repository.commit(name)
    assert repository.run(way, "other").returncode == 1
    (repository.root / "code").write_text("both\n")
    repository.git("add", "-A")
    git, head = GitRepository(repository.state), repository.git("rev-parse", "HEAD")
    with pytest.raises(GitError, match=f"a {way} is in progress"):
        snapshot(git, "no")
    with pytest.raises(GitError, match=f"a {way} is in progress"):
        merge_revision(git, "other")
    assert repository.git("rev-parse", "HEAD") == head
    assert snapshot(git, "own", ref=SNAPSHOTS).commit is not None


def test_a_clone_that_no_server_has_opened_can_be_committed(repository: Repository) -> None:
    write(repository, a=1)
    repository.commit("base")
    repository.git("clone", "-q", ".", "../clone")
    clone = Repository(repository.root.parent / "clone")
    (clone.state / "agents/alice.json").write_text('{"agent_id": "alice", "a": 2}')
    assert snapshot(GitRepository(clone.state), "by hand").commit is not None
    assert clone.status == ""
    with (
        pytest.raises(LockTimeoutError, match="a writer came"),
        barrier.hold(str(clone.state)),
    ):
        write(clone, a=3)
    shutil.rmtree(clone.state)
    with pytest.raises(GitError, match="there is no state to commit"):
        snapshot(GitRepository(clone.state), "nothing")


def test_commits_of_a_branch_are_signed_as_the_users_are(repository: Repository) -> None:
    """By a program that signs with a word; a snapshot on a ref of its own is nobody's commit."""
    signer = repository.root.parent / "signer"
    signer.write_text(
        '#!/bin/sh\ncat >/dev/null\nprintf "[GNUPG:] SIG_CREATED word\\n" >&2\necho a-word\n'
    )
    signer.chmod(0o700)
    repository.git("config", "commit.gpgSign", "yes")
    repository.git("config", "gpg.program", str(signer))
    write(repository, a=1)
    git = GitRepository(repository.state)
    snapshot(git, "kept", ref=SNAPSHOTS)
    assert "gpgsig" not in repository.git("cat-file", "commit", SNAPSHOTS)
    snapshot(git, "first")
    assert "gpgsig a-word" in repository.git("cat-file", "commit", "HEAD")
    branch(repository, {"a": 2, "b": 1}, {"a": 2, "c": 1})
    merge_revision(git, "other")
    assert "gpgsig a-word" in repository.git("cat-file", "commit", "HEAD")

    repository.git("config", "gpg.program", "false")
    before = repository.git("rev-parse", "HEAD")
    write(repository, a=3)
    with pytest.raises(GitError, match="failed to sign"):
        snapshot(git, "second")
    assert repository.git("rev-parse", "HEAD") == before
    assert repository.git("diff", "--cached", "--name-only") == ""


async def test_a_schedule_outlasts_a_merge_and_ends_in_good_order(repository: Repository) -> None:
    def begin() -> None:
        write(repository, a=1)
        branch(repository, {"a": 2}, {"a": 3})
        assert repository.run("merge", "other").returncode == 1

    await asyncio.to_thread(begin)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "agent_state", "git", "snapshot", "--every", "1"),
        cwd=repository.root,
        env=CLEAN,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        assert b"a merge is not resolved" in await soon(process.stderr.readline())
        repository.git("merge", "--abort")
        assert b"writers were held" in await soon(process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        assert await soon(process.wait()) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert [*(repository.root / ".git/agent-state").glob("agent-state-*")] == []


# -- history -----------------------------------------------------------------------------------


def test_a_story_has_every_commit_whatever_its_subject_is(repository: Repository) -> None:
    write(repository, a=1)
    repository.commit("first\u2028second\x0cthird\x1c")
    write(repository, a=2)
    repository.commit("fourth")
    for name in ("log.showSignature", "log.follow"):
        repository.git("config", name, "true")
    git = GitRepository(repository.state)
    assert [each.words for each in story(git, "alice")] == ["a 1 to 2", "created (no type)"]
    assert [each.value for each in blame(git, "alice", "a")] == ["2", "1"]
    with pytest.raises(StateNotFoundError, match=r"alice never had a\.b"):
        blame(git, "alice", "a.b")
    for ask in (story, lambda git, agent: blame(git, agent, "a")):
        with pytest.raises(StateNotFoundError, match="in no commit"):
            ask(git, "ghost")


def test_differences_of_files_that_vanish_are_told(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(repository, a=1)
    repository.commit("base")
    read = Path.read_bytes

    def read_late(path: Path) -> bytes:
        path.unlink()  # a server does so between the listing and the reading
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_late)
    changes = changes_between(GitRepository(repository.state), "HEAD", None)
    assert {change.after for change in changes} == {None}


def test_a_log_of_one_line_is_shown_as_a_log() -> None:
    line = '{"_crc":"0039fc5b","_seq":1,"a":"x\u2028y"}\n'.encode()
    assert convert(line) == '{"a":"x\u2028y"}\n'
    assert convert(line + line) == '{"a":"x\u2028y"}\n' * 2


@pytest.mark.parametrize("name", ["a b", "x..y", "-dash", "a\nfrom HEAD", "@{-1}"])
def test_a_fork_needs_the_name_of_a_branch(repository: Repository, name: str) -> None:
    write(repository, a=1)
    repository.commit("base")
    with pytest.raises(GitError, match="is no name for a branch"):
        fork(GitRepository(repository.state), name)
    assert [*(repository.root / ".git").glob("fast_import_crash*")] == []


def test_a_fork_of_a_damaged_document_names_it(repository: Repository) -> None:
    write(repository, a=1)
    (repository.state / "sleep").mkdir(exist_ok=True)
    (repository.state / "sleep/alice.json").write_text("{broken")
    repository.commit("base")
    with pytest.raises(StateCorruptedError, match=r"damaged document.*sleep/alice\.json"):
        fork(GitRepository(repository.state), "trial")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"agent_id": "alice"', StateCorruptedError),
        ('{"_schema": "agents/99"}', SchemaTooNewError),
    ],
)
def test_what_cannot_be_restored_is_named(
    repository: Repository, text: str, error: type[Exception]
) -> None:
    write(repository, a=1)
    good = repository.commit("good")
    (repository.state / "agents/alice.json").write_text(text)
    repository.commit("bad")
    repository.git("checkout", "-q", good)
    git = GitRepository(repository.state)
    with pytest.raises(error, match=r"not restored: .*\[agents/alice\]"):
        restore(git, "main")
    for revision in ("-x", "nowhere"):
        with pytest.raises(GitError, match=f"{revision} is no commit"):
            restore(git, revision)
    assert alice(repository)["a"] == 1


# -- merges ------------------------------------------------------------------------------------


def test_branches_that_merged_each_other_have_all_their_bases(repository: Repository) -> None:
    git = GitRepository(repository.state)
    configure(git)
    write(repository, a=0, b=0, c=0)
    branch(repository, {"a": 1, "b": 0, "c": 0}, {"a": 0, "b": 1, "c": 0})
    repository.git("tag", "m", "main")
    repository.git("merge", "-q", "-m", "merge", "other")
    repository.git("checkout", "-q", "other")
    repository.git("merge", "-q", "-m", "merge", "m")
    write(repository, a=1, b=0, c=0)
    repository.commit("b is 0 again")
    repository.git("checkout", "-q", "main")
    write(repository, a=1, b=1, c=5)
    repository.commit("c is 5")
    assert len(repository.git("merge-base", "--all", "main", "other").split()) == 2
    assert merge_revision(git, "other").conflicts == []
    assert {name: alice(repository)[name] for name in "abc"} == {"a": 1, "b": 0, "c": 5}


def test_ends_of_lines_are_no_change_of_a_log() -> None:
    base = b'{"_seq":1,"a":1}\n'
    ours = b'{"_seq":1,"a":1}\r\n{"_seq":2,"a":2}\r\n'
    theirs = base + b'{"_seq":2,"a":3}\n'
    lines = merge("diary/alice.jsonl", base, ours, theirs).data.splitlines()
    assert [json.loads(line)["a"] for line in lines] == [1, 2, 3]


@pytest.mark.parametrize("value", ['{"x":' * 900 + "1" + "}" * 900, '"\\ud800"'])
def test_what_has_no_text_is_left_to_a_person(value: str) -> None:
    ours = f'{{"a":{value}}}'.encode()
    with pytest.raises(UnmergeableError, match=r"nested too deeply|lone surrogate"):
        merge("agents/alice.json", b'{"a":1}', ours, b'{"a":1,"b":2}')


def test_a_merge_in_a_bare_repository_leaves_no_notes(repository: Repository) -> None:
    git = GitRepository(repository.state)
    if git.version < (2, 38):
        pytest.skip("merge-tree --write-tree needs git 2.38")
    configure(git)
    write(repository, a=1)
    branch(repository, {"a": 2}, {"a": 3})
    repository.git("clone", "-q", "--bare", ".", "../bare")
    bare = repository.root.parent / "bare"
    shutil.copytree(repository.root / ".git/info", bare / "info", dirs_exist_ok=True)
    shutil.copy(repository.root / ".git/config", bare / "config")
    done = subprocess.run(
        ["git", "-c", "core.bare=true", "merge-tree", "--write-tree", "main", "other"],
        cwd=bare,
        env=CLEAN,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "CONFLICT a: 2 against 3" in done.stderr
    assert not (bare / "state").exists()
    with pytest.raises(GitError, match="is in no git worktree"):
        GitRepository(bare / "state")
    assert os.listdir(repository.state)  # noqa: PTH208  # it has what it had
