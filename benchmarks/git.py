"""State in git: a merge against git's own text merge, a driver's start, a snapshot under load."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

from agent_state import StatePersistenceManager
from agent_state_integrations.git import GitRepository, configure, merge_revision, snapshot
from agent_state_integrations.git import driver as driver_module
from agent_state_integrations.git.snapshots import SNAPSHOTS, SnapshotReport
from benchmarks.report import Row, at_most
from benchmarks.workload import Setting

_ENV = {
    "GIT_AUTHOR_NAME": "b",
    "GIT_AUTHOR_EMAIL": "b@example.org",
    "GIT_COMMITTER_NAME": "b",
    "GIT_COMMITTER_EMAIL": "b@example.org",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    # A collection in the background would go on in a folder that is removed, and while we measure.
    "GIT_CONFIG_COUNT": "1",
    "GIT_CONFIG_KEY_0": "gc.auto",
    "GIT_CONFIG_VALUE_0": "0",
}
_STARTS = 20


def git(setting: Setting) -> list[Row]:
    """What git costs with our rules, beside what it costs without."""
    os.environ.update(_ENV)
    return [*_merges(setting), *_starts(setting), *asyncio.run(_snapshots(setting))]


def _git(root: Path, *args: str) -> None:
    subprocess.run(["git", *args], cwd=root, check=True, capture_output=True)  # noqa: S603, S607


# -- merging -------------------------------------------------------------------------------------


def _merges(setting: Setting) -> list[Row]:
    """Documents changed on both sides, in different fields."""
    count = setting.scaled(1000)
    ours, text = [], []
    for _ in range(setting.runs):
        with setting.folder() as folder:
            asyncio.run(_branches(folder, count))
            _git(folder, "branch", "before")
            # The same files without the lines that conflict in every document, for git alone.
            text.append(_timed(lambda: _git(folder, "merge", "-q", "-m", "m", "text-other")))
            _git(folder, "checkout", "-q", "main")
            report = None

            def merge(folder: Path = folder) -> None:
                nonlocal report
                report = merge_revision(GitRepository(folder / "state"), "other")

            ours.append(_timed(merge))
            assert report is not None
            assert len(report.merged) == count
            assert not report.conflicts
    ratios = [one / other for one, other in zip(ours, text, strict=True)]
    return [
        Row(f"merge {count} documents changed on both sides, in one process", ours, "s"),
        Row("… git's text merge of as many files, without reserved fields", text, "s"),
        Row("… ratio", ratios, "x", at_most(3)),
    ]


async def _branches(folder: Path, count: int) -> None:
    """`main` and `other`, and the same without reserved fields: `text-main`, `text-other`."""
    _git(folder, "init", "-q", "-b", "main")
    configure(GitRepository(folder / "state"))
    words = {f"w{number:02}": "a" * 20 for number in range(40)}
    for branch, change in (("base", {}), ("other", {"w01": "b"}), ("main", {"w30": "c"})):
        if branch == "other":
            _git(folder, "checkout", "-q", "-b", "other")
        elif branch == "main":
            _git(folder, "checkout", "-q", "main")
        async with StatePersistenceManager(folder / "state", durability="os") as manager:
            await asyncio.gather(
                *(
                    manager.save("notes", f"n{number}", {**words, **change})
                    for number in range(count)
                )
            )
        _git(folder, "add", "-A")
        _git(folder, "commit", "-q", "-m", branch)
    _git(folder, "checkout", "-q", "--orphan", "text-base")
    (folder / ".git/info/attributes").write_text("")
    _git(folder, "rm", "-q", "-rf", ".")
    for branch, change in (("base", {}), ("other", {"w01": "b"}), ("main", {"w30": "c"})):
        if branch != "base":
            _git(folder, "checkout", "-q", "-b", f"text-{branch}", "text-base")
        for number in range(count):
            path = folder / "text" / f"n{number}.json"
            path.parent.mkdir(exist_ok=True)
            lines = [f'  "{name}": "{value}",' for name, value in {**words, **change}.items()]
            path.write_text("\n".join(["{", *lines, f'  "number": {number}', "}", ""]))
        _git(folder, "add", "-A")
        _git(folder, "commit", "-q", "-m", branch)


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# -- a driver's start ----------------------------------------------------------------------------


def _starts(setting: Setting) -> list[Row]:
    """One merge of one small document, against an interpreter that does nothing. CPU time."""
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder, name)) for name in ("base", "ours", "theirs")]
        driver = [str(Path(driver_module.__file__)), *files, "x.json", folder]
        nothing, merging = [], []
        for _ in range(setting.runs):
            nothing.append(median(_cpu("-c", "pass") for _ in range(_STARTS)))
            times = []
            for _ in range(_STARTS):
                for path, text in zip(files, ('{"a":1}', '{"a":2}', '{"a":1,"b":1}'), strict=True):
                    Path(path).write_text(text)
                times.append(_cpu(*driver))
            merging.append(median(times))
    ratios = [one / other for one, other in zip(merging, nothing, strict=True)]
    return [
        Row("the driver merges one document", merging, "ms CPU"),
        Row("… python -I -S -c pass", nothing, "ms CPU"),
        Row("… ratio", ratios, "x", at_most(1.5)),
    ]


def _cpu(*args: str) -> float:
    """The processor time of one start, which a busy machine changes least; milliseconds."""
    pid = os.posix_spawn(sys.executable, [sys.executable, "-I", "-S", *args], os.environ)
    _, status, used = os.wait4(pid, 0)
    assert status == 0
    return (used.ru_utime + used.ru_stime) * 1000


# -- a snapshot ----------------------------------------------------------------------------------


async def _snapshots(setting: Setting) -> list[Row]:
    """Of a directory whose server saves all the time; 100 documents change between two."""
    count = setting.scaled(10_000)
    held: list[float] = []
    took: list[tuple[float, float]] = []
    plain: list[tuple[float, float]] = []
    resting: list[tuple[float, float]] = []
    for _ in range(setting.runs):
        with setting.folder() as folder:
            _git(folder, "init", "-q", "-b", "main")
            async with StatePersistenceManager(folder / "state", exclusive=True) as manager:
                await _save(manager, count, 0)
                await manager.flush()
                _git(folder, "add", "-A")
                _git(folder, "commit", "-q", "-m", "base")
                repository = GitRepository(folder / "state")
                await asyncio.to_thread(snapshot, repository, "first", ref=SNAPSHOTS)
                await _save(manager, 100, 1)
                await manager.flush()
                resting.append(await asyncio.to_thread(_used, partial(_add_and_commit, folder)))

                loading = asyncio.create_task(_load(manager))
                await _save(manager, 100, 2)
                wall, used, _ = await _beside(folder, "plain")
                plain.append((wall, used))
                await _save(manager, 100, 3)
                wall, used, seconds = await _beside(folder, "snapshot")
                took.append((wall, used))
                held.append(seconds * 1000)
                loading.cancel()
    ratios = [one / other for (_, one), (_, other) in zip(took, plain, strict=True)]
    by_clock = [one / other for (one, _), (other, _) in zip(took, plain, strict=True)]
    return [
        Row(f"a snapshot of {count} documents holds the writers", held, "ms", at_most(200)),
        Row("… takes, beside a server that saves", [wall for wall, _ in took], "s"),
        Row("… git add -A && git commit of the same, beside it", [wall for wall, _ in plain], "s"),
        Row("… at rest", [wall for wall, _ in resting], "s"),
        Row("… ratio by the clock", by_clock, "x", at_most(2)),
        Row("… costs", [used * 1000 for _, used in took], "ms CPU"),
        Row("… git add -A && git commit costs", [used * 1000 for _, used in plain], "ms CPU"),
        Row("… ratio of the costs", ratios, "x", at_most(2)),
    ]


async def _beside(folder: Path, what: str) -> list[float]:
    """A commit by another process than the server's, as the command is; what it used and held.

    Its start, which has nothing to do with the number of documents, is left out.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.git", str(folder), what),
        stdout=asyncio.subprocess.PIPE,
    )
    said, _ = await process.communicate()
    return list(json.loads(said))


def _main(folder: Path, what: str) -> None:
    reports = [SnapshotReport(None, 0.0)]
    repository = GitRepository(folder / "state")
    if what == "plain":
        used = _used(partial(_add_and_commit, folder))
    else:
        used = _used(lambda: reports.append(snapshot(repository, "s", ref=SNAPSHOTS)))
    print(json.dumps([*used, reports[-1].held_seconds]))


def _used(work: Callable[[], object]) -> tuple[float, float]:
    """The time that work in this thread and its processes takes, and their processor time."""
    before = _processor_seconds()
    took = _timed(work)
    return took, _processor_seconds() - before


def _processor_seconds() -> float:
    both = [resource.getrusage(who) for who in (resource.RUSAGE_THREAD, resource.RUSAGE_CHILDREN)]
    return sum(used.ru_utime + used.ru_stime for used in both)


def _add_and_commit(folder: Path) -> None:
    _git(folder, "add", "-A")
    _git(folder, "commit", "-q", "-m", "plain")


async def _save(manager: StatePersistenceManager, count: int, turn: int) -> None:
    for start in range(0, count, 500):
        await asyncio.gather(
            *(
                manager.save("notes", (f"a{n % 100}", f"n{n}"), {"n": n, "turn": turn})
                for n in range(start, min(count, start + 500))
            )
        )


async def _load(manager: StatePersistenceManager) -> None:
    """Groups of ten documents, one after another, among a hundred."""
    turn = 10
    while True:
        turn += 1
        async with manager.group() as group:
            for n in range(turn % 10, 100, 10):
                group.save("notes", (f"a{n % 100}", f"n{n}"), {"n": n, "turn": turn})
        await asyncio.sleep(0.005)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), sys.argv[2])
