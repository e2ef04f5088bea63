"""``agent-state git``: configuration, history in words, snapshots of a running server, forks."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from agent_state import LockTimeoutError, StateCorruptedError, StatePersistenceManager
from agent_state.storage import barrier
from agent_state.testing import FakeClock
from agent_state.verify import verify
from agent_state_integrations.git import (
    GitRepository,
    blame,
    changes_between,
    check,
    configure,
    merge_revision,
    snapshot,
    story,
    unconfigure,
)
from agent_state_integrations.git.forks import fork, forked_agents
from agent_state_integrations.git.history import in_words
from agent_state_integrations.git.repository import GitError
from agent_state_integrations.git.snapshots import SNAPSHOTS
from agent_state_integrations.git.textconv import convert
from tests.core import example_state
from tests.deadlines import soon, until
from tests.git.repositories import CLEAN, Repository, agent_state

GROUPS = 8


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CLEAN.items():
        monkeypatch.setenv(name, value)


async def save_only(repository: Repository, **moods: object) -> None:
    async with StatePersistenceManager(repository.state) as manager:
        for name, mood in moods.items():
            await manager.save_agent_state(name, {"agent_id": name, "mood": mood})


async def save(repository: Repository, **moods: object) -> str:
    await save_only(repository, **moods)
    return repository.commit(str(moods))


# -- configuration -----------------------------------------------------------------------------


def test_init_configures_doctor_agrees_and_deinit_leaves_nothing(repository: Repository) -> None:
    repository.commit("nothing")
    before = repository.git("config", "--local", "--list")
    git = GitRepository(repository.state)
    assert configure(git, hooks=True)
    assert configure(git, hooks=True)[-1].endswith("pre-commit was written")
    assert check(git) == []
    assert "merge: agent-state" in repository.git("check-attr", "merge", "state/agents/a.json")
    assert "merge: agent-state" in repository.git("check-attr", "merge", "state/a/b.jsonl")
    assert "merge: unspecified" in repository.git("check-attr", "merge", "other.json")
    unconfigure(git)
    assert repository.git("config", "--local", "--list") == before
    assert "merge: unspecified" in repository.git("check-attr", "merge", "state/agents/a.json")
    assert not (repository.root / ".git/hooks/pre-commit").exists()
    assert check(git) == []


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (["config", "--unset", "merge.agent-state.driver"], "every merge is fatal"),
        (["config", "--remove-section", "merge.agent-state"], "not configured: text is merged"),
        (["config", "merge.agent-state.driver", "/nowhere/python x"], "Python is gone"),
    ],
)
def test_doctor_finds_half_a_configuration(
    repository: Repository, broken: list[str], said: str
) -> None:
    configure(GitRepository(repository.state))
    repository.git(*broken)
    assert any(said in problem for problem in check(GitRepository(repository.state)))


async def test_a_clone_that_was_not_configured_is_told_so(
    repository: Repository, tmp_path: Path
) -> None:
    configure(GitRepository(repository.state))
    await save(repository, alice=1)
    repository.git("clone", "-q", str(repository.root), str(tmp_path / "clone"))
    clone = GitRepository(tmp_path / "clone/state")
    assert any("text is merged" in problem for problem in check(clone))


def test_without_git_one_clear_line_is_printed(repository: Repository, tmp_path: Path) -> None:
    done = agent_state(repository.root, "git", "doctor", PATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "git is not installed" in done.stderr


def test_outside_of_a_worktree_one_clear_line_is_printed(tmp_path: Path) -> None:
    done = agent_state(tmp_path, "git", "init", GIT_CEILING_DIRECTORIES=str(tmp_path.parent))
    assert done.returncode == 2
    assert "is in no git worktree" in done.stderr


async def test_git_diff_shows_a_document_without_its_noise(repository: Repository) -> None:
    configure(GitRepository(repository.state))
    await save(repository, alice="good")
    async with StatePersistenceManager(repository.state) as manager:
        await manager.save_agent_state("alice", {"agent_id": "alice", "mood": "bad"})
    shown = repository.git("diff", "-U0", "state/agents/alice.json")
    changed = [line for line in shown.splitlines() if line[:1] in "+-" and line[1:2] == " "]
    assert changed == ['-  "mood": "good"', '+  "mood": "bad"']
    (repository.state / "agents/alice.json").write_text("no JSON")
    assert "+no JSON" in repository.git("diff", "state/agents/alice.json")


async def test_git_diff_shows_what_is_compressed_in_an_archive(
    repository: Repository, fake_clock: FakeClock
) -> None:
    configure(GitRepository(repository.state))
    await save(repository, alice="good")
    (repository.state / "tasks/alice").mkdir(parents=True)
    log = repository.state / "tasks/alice/archive.jsonl"
    log.write_text('{"task_id": "t0", "_gzip": "no gzip"}\n')
    repository.commit("an archive")
    result = [f"the paragraph {number} of a long text" for number in range(5000)]
    async with StatePersistenceManager(repository.state, clock=fake_clock) as manager:
        done = {"task_id": "t1", "status": "completed", "result": result}
        await manager.save("tasks", ("alice", "t1"), done)
        await fake_clock.advance(25 * 3600)
        assert (await manager.cleanup_old_states()).tasks == ["alice/t1"]
    assert result[4321] not in log.read_text()
    shown = repository.git("diff", "state/tasks/alice/archive.jsonl")
    assert result[4321] in shown
    assert "_gzip" not in shown.split("\n+")[-1]


async def test_the_hook_refuses_a_conflict_that_nobody_looked_at(repository: Repository) -> None:
    repository.commit("nothing")
    configure(GitRepository(repository.state), hooks=True)
    await save(repository, alice="base")
    repository.git("branch", "other")
    await save(repository, alice="ours")
    repository.git("checkout", "-q", "other")
    await save(repository, alice="theirs")
    repository.git("checkout", "-q", "main")
    assert repository.run("merge", "other").returncode == 1
    done = repository.run("commit", "-a", "-m", "without looking")
    assert done.returncode != 0
    assert "was left in conflict: mood" in done.stderr
    repository.git("add", "state/agents/alice.json")
    repository.git("commit", "-q", "-m", "looked at")


# -- history -----------------------------------------------------------------------------------


async def test_the_hook_lets_no_part_of_a_state_be_committed(repository: Repository) -> None:
    """`git commit PATH` commits what a hook stages, and the next commit would undo it."""
    await save(repository, alice="one", bob="one")
    (repository.root / "mine.txt").write_text("1")
    repository.commit("mine")
    configure(GitRepository(repository.state), hooks=True)
    repository.commit("attributes")
    async with StatePersistenceManager(repository.state) as manager:
        for name in ("alice", "bob"):
            await manager.save_agent_state(name, {"agent_id": name, "mood": "two"})
    (repository.root / "mine.txt").write_text("2")

    refused = repository.run("commit", "-m", "half", "--", "state/agents/alice.json")
    assert refused.returncode != 0
    assert "part of the state" in refused.stderr
    repository.git("commit", "-m", "mine alone", "--", "mine.txt")
    repository.git("commit", "-m", "whole", "--", "state")
    assert repository.status == ""
    assert len(repository.git("show", "--name-only", "--format=", "HEAD").split()) == 2


async def test_a_day_is_told_in_words(repository: Repository) -> None:
    first = repository.commit("nothing")
    await example_state.write(repository.state)
    day = repository.commit("a day")
    words = in_words(changes_between(GitRepository(repository.state), first, day))
    assert words["carol"].startswith("created (reporter); until 2026-01-07T10:02:00.000000Z")
    assert "1 mail to Alice" in words["carol"]
    assert "1 task queued and completed" in words["bob"]
    assert "1 task queued and dead" in words["bob"]
    assert words["system/events.jsonl"] == "1 line in events"

    async with (
        StatePersistenceManager(repository.state) as manager,
        manager.edit("agents", "bob") as bob,
    ):
        bob.status = "sleeping"
        bob.context.working_memory["words_read"] = 99
    told = in_words(changes_between(GitRepository(repository.state), "HEAD", None))
    assert told == {"bob": "idle to sleeping; context.working_memory.words_read 18 to 99"}
    done = agent_state(repository.root, "git", "diff")
    assert done.stdout == f"bob: {told['bob']}\n"


async def test_log_and_blame_tell_an_agents_story(repository: Repository) -> None:
    repository.commit("nothing")
    await save(repository, alice="good")
    await save(repository, alice="good", bob=1)
    last = await save(repository, alice="bad")
    git = GitRepository(repository.state)
    told = story(git, "alice")
    assert [each.words for each in told] == ['mood "good" to "bad"', "created (no type)"]
    assert told[0].commit == last
    assert [value.value for value in blame(git, "alice", "mood")] == ['"bad"', '"good"']
    done = agent_state(repository.root, "git", "blame", "alice", "mood", "--json")
    assert [value["value"] for value in json.loads(done.stdout)] == ['"bad"', '"good"']


# -- snapshots ---------------------------------------------------------------------------------


async def save_group(manager: StatePersistenceManager, number: int) -> None:
    async with manager.group() as group:
        for name in range(GROUPS):
            group.save("notes", f"n{name}", {"n": number})


def numbers_in(repository: Repository, commit: str) -> set[int]:
    shown = [repository.git("show", f"{commit}:state/notes/n{name}.json") for name in range(GROUPS)]
    return {json.loads(text)["n"] for text in shown}


@pytest.mark.parametrize("exclusive", [True, False], ids=["exclusive", "shared"])
@pytest.mark.parametrize("ref", [None, SNAPSHOTS], ids=["branch", "own ref"])
async def test_a_snapshot_of_a_busy_server_is_one_state(
    repository: Repository, exclusive: bool, ref: str | None
) -> None:
    (repository.root / "mine.txt").write_text("1")
    repository.commit("nothing")
    (repository.root / "mine.txt").write_text("2")
    repository.git("add", "mine.txt")
    done, acknowledged = False, 0

    async def work(manager: StatePersistenceManager) -> None:
        nonlocal acknowledged
        while not done:
            await save_group(manager, acknowledged + 1)
            acknowledged += 1

    async with StatePersistenceManager(repository.state, exclusive=exclusive) as manager:
        working = asyncio.create_task(work(manager))
        await until(lambda: acknowledged > 3)
        git = GitRepository(repository.state)
        for turn in range(6):
            before = acknowledged
            report = await asyncio.to_thread(snapshot, git, f"turn {turn}", ref=ref)
            assert report.commit is not None
            [number] = numbers_in(repository, report.commit)
            assert number >= before
            await until(lambda before=before: acknowledged > before)  # type: ignore[misc]
        done = True
        await working
    status = repository.git("status", "--porcelain", "--", "mine.txt")
    assert status == "M  mine.txt\n"  # still staged, and in no commit
    listed = repository.git("ls-tree", "-r", "--name-only", ref or "HEAD").split()
    assert ("mine.txt" in listed) is (ref is None)
    assert repository.git("show", "HEAD:mine.txt") == "1"


async def test_a_snapshot_of_what_has_not_changed_is_none(repository: Repository) -> None:
    await save(repository, alice=1)
    git = GitRepository(repository.state)
    assert snapshot(git, "again").commit is None
    assert snapshot(git, "first", ref=SNAPSHOTS).commit is not None
    assert snapshot(git, "again", ref=SNAPSHOTS).commit is None


async def test_snapshots_go_on_from_the_last_one(repository: Repository) -> None:
    """The user commits nothing: each snapshot reads what has changed since the one before."""
    await save_only(repository, alice=1, bob=1)
    bob = repository.state / "agents/bob.json"
    os.utime(bob, (1, 1))  # git looks twice at what was written in the moment of its index
    git = GitRepository(repository.state)
    snapshot(git, "first", ref=SNAPSHOTS)
    untouched = repository.status
    # Were it read again, git would have to write what is not there any more.
    oid = repository.git("rev-parse", f"{SNAPSHOTS}:state/agents/bob.json").strip()
    kept = repository.root / f".git/objects/{oid[:2]}/{oid[2:]}"
    mtime = kept.stat().st_mtime_ns
    os.utime(kept, ns=(mtime - 10**12, mtime - 10**12))  # git renews it when it writes it again
    await save_only(repository, alice=2)
    second = snapshot(git, "second", ref=SNAPSHOTS)
    assert second.commit is not None
    assert kept.stat().st_mtime_ns == mtime - 10**12
    assert repository.status == untouched


async def test_a_ref_that_was_removed_and_collected_begins_anew(repository: Repository) -> None:
    await save_only(repository, alice=1)
    git = GitRepository(repository.state)
    snapshot(git, "first", ref=SNAPSHOTS)
    repository.git("update-ref", "-d", SNAPSHOTS)
    repository.git("prune", "--expire=now")
    again = snapshot(git, "again", ref=SNAPSHOTS)
    assert again.commit is not None
    assert repository.git("rev-list", "--count", SNAPSHOTS).strip() == "1"
    repository.git("fsck", "--strict")


async def test_a_snapshot_of_a_dead_servers_directory_has_its_journal(
    repository: Repository,
) -> None:
    repository.commit("nothing")
    program = (
        "import asyncio, os, sys\n"
        "from agent_state import StatePersistenceManager\n"
        "async def main():\n"
        "    async with StatePersistenceManager(sys.argv[1], exclusive=True) as manager:\n"
        "        await manager.save('notes', 'late', {'n': 1})\n"
        "        os._exit(9)\n"
        "asyncio.run(main())\n"
    )
    subprocess.run([sys.executable, "-c", program, str(repository.state)], check=False)
    report = await asyncio.to_thread(snapshot, GitRepository(repository.state), "late")
    assert report.commit is not None
    assert repository.git("show", f"{report.commit}:state/notes/late.json")


async def test_only_so_many_snapshots_stay(repository: Repository) -> None:
    await save(repository, alice=0)
    git = GitRepository(repository.state)
    for number in range(1, 8):
        async with StatePersistenceManager(repository.state) as manager:
            await manager.save_agent_state("alice", {"agent_id": "alice", "mood": number})
        await asyncio.to_thread(snapshot, git, f"turn {number}", ref=SNAPSHOTS, keep=3)
    subjects = repository.git("log", "--format=%s", SNAPSHOTS).split("\n")[:-1]
    assert 3 <= len(subjects) <= 6
    assert subjects[0] == "turn 7"


async def test_snapshots_on_a_schedule_leave_the_user_alone_and_are_collected(
    repository: Repository,
) -> None:
    await save(repository, alice=0)
    (repository.root / "staged").write_text("by the user")
    repository.git("add", "staged")
    before = repository.git("rev-parse", "HEAD"), repository.git("ls-files", "--stage")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "agent_state", "git", "snapshot", "--every", "1", "--keep", "1"),
        cwd=repository.root,
        env=CLEAN,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    commits: list[str] = []
    try:
        while len(commits) < 4:
            line = (await soon(process.stdout.readline())).decode()
            if "nothing has changed" not in line:
                commits.append(line.partition(";")[0])
                await save_only(repository, alice=len(commits))
    finally:
        process.kill()
        await process.wait()
    assert len(repository.git("rev-list", SNAPSHOTS).split()) <= 2
    assert (repository.git("rev-parse", "HEAD"), repository.git("ls-files", "--stage")) == before
    repository.git("gc", "-q", "--prune=now")
    assert repository.run("cat-file", "-e", commits[0]).returncode != 0
    found = json.loads(repository.git("show", f"{SNAPSHOTS}:state/agents/alice.json"))
    assert found["mood"] >= 3


def test_a_snapshot_in_a_merge_is_refused(repository: Repository) -> None:
    async def branches() -> None:
        await save(repository, alice="base")
        repository.git("branch", "other")
        await save(repository, alice="ours")
        repository.git("checkout", "-q", "other")
        await save(repository, alice="theirs")

    asyncio.run(branches())
    repository.run("merge", "main")
    with pytest.raises(GitError, match="not resolved"):
        snapshot(GitRepository(repository.state), "no")


async def test_who_holds_the_barrier_too_long_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(barrier, "HOLD_SECONDS", 0.2)
    path = tmp_path / "notes/a.json"
    async with StatePersistenceManager(tmp_path, exclusive=True) as manager:
        await manager.save("notes", "a", {"n": 1})
        holding, release = threading.Event(), threading.Event()

        def read_slowly() -> None:
            with barrier.hold(str(tmp_path)):
                holding.set()
                release.wait(60)

        reading = asyncio.create_task(asyncio.to_thread(read_slowly))
        await until(holding.is_set)
        await manager.save("notes", "a", {"n": 2})
        await until(lambda: json.loads(path.read_text())["n"] == 2)  # it did not wait
        release.set()
        with pytest.raises(LockTimeoutError, match="writers wait"):
            await reading


async def test_who_is_slow_without_a_writer_reads_one_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(barrier, "HOLD_SECONDS", 0.0)
    async with StatePersistenceManager(tmp_path, exclusive=True) as manager:
        await manager.save("notes", "a", {"n": 1})

        def read() -> None:
            with barrier.hold(str(tmp_path)):
                time.sleep(0.05)

        await asyncio.to_thread(read)


# -- restoring ---------------------------------------------------------------------------------


async def test_names_and_texts_with_other_ends_of_lines_are_told(repository: Repository) -> None:
    await save(repository, bob="a")
    await save_only(repository, bob="b\u2028c")
    repository.git("add", "-A")
    odd = "An\u2028n \x0b\x85B"
    repository.git("commit", "-qm", "one\u2029\x1ctwo\rthree", GIT_AUTHOR_NAME=odd)
    git = GitRepository(repository.state)

    first = story(git, "bob")[0]
    assert (first.author, first.subject) == (odd, "one\u2029\x1ctwo\rthree")
    assert blame(git, "bob", "mood")[0].author == odd
    log = b'{"_crc":"0","_seq":1,"text":"a\xe2\x80\xa8b"}\n{"_crc":"0","_seq":2}\n'
    assert convert(log) == '{"text":"a\u2028b"}\n{}\n'
    assert convert(b"") == ""


# -- forks -------------------------------------------------------------------------------------


async def test_an_agent_with_any_id_is_forked_beside_a_damaged_one(repository: Repository) -> None:
    odd = "new\nAgent-State-Fork: bob"
    await save(repository, bob="a", **{odd: "b", ' "q"': "c"})
    (repository.state / "agents/carol.json").write_text("{")
    base = repository.commit()
    git = GitRepository(repository.state)

    with pytest.raises(StateCorruptedError, match="damaged document: not JSON"):
        fork(git, "all")
    with pytest.raises(GitError, match="no name for a branch"):
        fork(git, "a\nb", [odd])
    assert fork(git, "trial", [odd, ' "q"']) == {odd: f"{odd}-trial", ' "q"': ' "q"-trial'}
    assert forked_agents(git, base, "trial") == [odd, ' "q"']


async def test_a_fork_has_new_ids_and_merges_back(repository: Repository) -> None:
    await example_state.write(repository.state)
    repository.commit("a day")
    git = GitRepository(repository.state)
    assert fork(git, "trial", ["bob"]) == {"bob": "bob-trial"}
    repository.git("checkout", "-q", "trial")
    assert (await verify(repository.state)).problems == []
    async with StatePersistenceManager(repository.state) as manager:
        assert await manager.list_persisted_agents() == ["Alice", "bob-trial", "carol"]
        forked = await manager.keys("tasks", "bob-trial")
        assert len(forked) == 3
        assert not [one async for one in manager.scan("tasks", "bob-trial") if one.edited]
    repository.git("checkout", "-q", "main")
    async with StatePersistenceManager(repository.state) as manager:
        here = await manager.keys("tasks", "bob")
        async with manager.edit("agents", "bob") as bob:
            bob.context.working_memory["words_read"] = 99
    assert not {key[1] for key in here} & {key[1] for key in forked}
    repository.commit("bob goes on")

    assert merge_revision(git, "trial").conflicts == []
    async with StatePersistenceManager(repository.state) as manager:
        assert await manager.list_persisted_agents() == ["Alice", "bob", "bob-trial", "carol"]
        assert await manager.keys("tasks", "bob") == here
        assert len(await manager.keys("tasks", "bob-trial")) == 3


# -- the driver --------------------------------------------------------------------------------


def test_the_driver_needs_no_package_at_all(repository: Repository, tmp_path: Path) -> None:
    """It runs where nothing is installed: copied alone into an empty folder."""
    import agent_state_integrations.git as package

    for name in ("driver.py", "merge_rules.py", "textconv.py"):
        shutil.copy(Path(package.__file__).with_name(name), tmp_path / name)
    for name, n in (("base", 1), ("ours", 2), ("theirs", 1)):
        (tmp_path / name).write_text(json.dumps({"a": n, "b": 1 if name != "theirs" else 2}))
    done = subprocess.run(
        [sys.executable, "-I", "-S", "driver.py", "base", "ours", "theirs", "x.json", "state"],
        cwd=tmp_path,
        env={"PATH": os.devnull},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    merged = json.loads((tmp_path / "ours").read_text())
    assert (merged["a"], merged["b"]) == (2, 2)


@pytest.mark.parametrize("sick", [b"", b"{", b"<<<<<<<\n", b'{"a": 1, "a": 2}', b"[]", b"\xff"])
def test_the_driver_never_guesses(tmp_path: Path, sick: bytes) -> None:
    from agent_state_integrations.git import driver

    (tmp_path / "base").write_text('{"a": 1}')
    (tmp_path / "ours").write_text('{"a": 2}')
    (tmp_path / "theirs").write_bytes(sick)
    done = subprocess.run(
        [sys.executable, "-I", "-S", driver.__file__, "base", "ours", "theirs", "x.json", "state"],
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 1
    assert b"CONFLICT" in done.stderr
    assert (tmp_path / "ours").read_text() == '{"a": 2}'
    assert len(list((tmp_path / "state/.runtime/conflicts").iterdir())) == 1
