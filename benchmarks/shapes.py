"""A store that several processes write: ours, and three other shapes of it as bare system calls.

Four processes replace 25 documents of 2 KiB each, round after round, every document durable at the
end of its round. What the shapes leave out (locks of documents, revisions, checksums, recovery,
readers) they would have to pay as well: a shape that is not much faster bare is no better.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from benchmarks import contenders
from benchmarks.report import Row, at_least
from benchmarks.workload import AGENTS, Contender, Setting, agent_state, change

PROCESSES = 4
ROUNDS = 40
_FEWER = {"langgraph": 4}
"""LangGraph does a quarter of the rounds."""

Shape = Callable[[Path, range, int], None]


def shapes(setting: Setting) -> list[Row]:
    """100 agents at once in four processes."""
    names = ["ours", "langgraph", *_SHAPES]
    speeds: dict[str, list[float]] = {name: [] for name in names}
    costs: dict[str, list[float]] = {name: [] for name in names}
    for run in range(setting.runs):
        for name in names if run % 2 else reversed(names):
            setting.rest()
            rounds = max(1, setting.scaled(ROUNDS) // _FEWER.get(name, 1))
            with setting.folder() as folder:
                speed, cost = _measured(name, folder, rounds)
            speeds[name].append(speed)
            costs[name].append(cost)
    ratios = _ratios(speeds["ours"], speeds["langgraph"])
    rows = [
        Row("shared, 100 agents in four processes", speeds["ours"], "saves/s"),
        Row("  processor time a save", [each * 1e6 for each in costs["ours"]], "us"),
        Row("  LangGraph AsyncSqliteSaver.aput", speeds["langgraph"], "/s"),
        Row("  ours / LangGraph", ratios, "times", at_least(2)),
    ]
    for name in _SHAPES:
        rows.append(Row(f"  bare, {name}", speeds[name], "/s"))
        rows.append(Row("    processor time a save", [each * 1e6 for each in costs[name]], "us"))
        rows.append(Row("    / ours", _ratios(speeds[name], speeds["ours"]), "times"))
    return rows


def _ratios(mine: list[float], theirs: list[float]) -> list[float]:
    return [one / other for one, other in zip(mine, theirs, strict=True)]


def _measured(name: str, folder: Path, rounds: int) -> tuple[float, float]:
    """Saves in a second, from the first process that begins to the last that ends; CPU a save."""
    command = [sys.executable, "-m", "benchmarks.shapes", name, str(folder), str(rounds)]
    workers = [
        subprocess.Popen(  # noqa: S603  # ourselves
            [*command, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for number in range(PROCESSES)
    ]
    for worker in workers:
        assert worker.stdout is not None  # for mypy
        worker.stdout.readline()  # it is ready
    for worker in workers:
        assert worker.stdin is not None  # as above
        worker.stdin.write(b"go\n")
        worker.stdin.flush()
    found = [json.loads(worker.communicate()[0]) for worker in workers]
    if any(worker.returncode for worker in workers):
        raise RuntimeError(f"a process of {name!r} failed")
    seconds = max(each["ended"] for each in found) - min(each["began"] for each in found)
    saves = AGENTS * rounds
    return saves / seconds, sum(each["processor"] for each in found) / saves


# -- one of the processes --------------------------------------------------------------------------


def _work(name: str, folder: Path, rounds: int, number: int) -> None:
    mine = range(number * AGENTS // PROCESSES, (number + 1) * AGENTS // PROCESSES)
    if name in _SHAPES:
        _SHAPES[name](folder, mine, 1)
        _wait_for_go()
        began = time.monotonic(), time.process_time()
        _SHAPES[name](folder, mine, rounds)
        ended = time.monotonic(), time.process_time()
    else:
        contender = (
            contenders.langgraph if name == "langgraph" else contenders.ours(exclusive=False)
        )
        began, ended = asyncio.run(_save(contender, folder, mine, rounds))
    times = {"began": began[0], "ended": ended[0], "processor": ended[1] - began[1]}
    sys.stdout.write(json.dumps(times) + "\n")


def _wait_for_go() -> None:
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()


async def _save(
    contender: Contender, folder: Path, mine: range, rounds: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    states = {index: agent_state(index) for index in mine}
    async with contender(folder) as save:

        async def agent(index: int) -> None:
            for turn in range(1, rounds + 1):
                change(states[index], turn)
                await save(index, states[index])

        for index, state in states.items():
            await save(index, state)
        _wait_for_go()
        began = time.monotonic(), time.process_time()
        await asyncio.gather(*map(agent, mine))
        return began, (time.monotonic(), time.process_time())


# -- shapes ----------------------------------------------------------------------------------------


def _replaced(folder: Path, index: int, data: bytes, *, sync: bool) -> tuple[Path, Path]:
    """A new file beside the one to replace, and that one."""
    path = folder / f"{index}.json"
    temporary = folder / f".tmp-{index}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(fd, data)
    if sync:
        os.fdatasync(fd)
    os.close(fd)
    return temporary, path


def _documents(states: dict[int, Any], turn: int) -> dict[int, bytes]:
    for state in states.values():
        change(state, turn)
    return {index: orjson.dumps(state) for index, state in states.items()}


def _files(folder: Path, mine: range, rounds: int) -> None:
    """What the store does: each file synced, renamed, and the folder synced once for all."""
    states = {index: agent_state(index) for index in mine}
    for turn in range(1, rounds + 1):
        made = [
            _replaced(folder, index, data, sync=True)
            for index, data in _documents(states, turn).items()
        ]
        for temporary, path in made:
            temporary.replace(path)
        fd = os.open(folder, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def _journal(folder: Path, mine: range, rounds: int, *, common: bool, files: bool) -> None:
    """A journal is synced once for all; then the files are replaced without a sync."""
    states = {index: agent_state(index) for index in mine}
    name = "journal" if common else f"journal-{mine.start}"
    journal = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for turn in range(1, rounds + 1):
        documents = _documents(states, turn)
        if common:
            fcntl.flock(journal, fcntl.LOCK_EX)
        os.write(journal, b"\n".join(documents.values()) + b"\n")
        os.fdatasync(journal)
        if common:
            fcntl.flock(journal, fcntl.LOCK_UN)
        for index, data in documents.items() if files else ():
            temporary, path = _replaced(folder, index, data, sync=False)
            temporary.replace(path)
    os.close(journal)


def _common_journal(folder: Path, mine: range, rounds: int) -> None:
    _journal(folder, mine, rounds, common=True, files=True)


def _own_journals(folder: Path, mine: range, rounds: int) -> None:
    _journal(folder, mine, rounds, common=False, files=True)


def _journal_alone(folder: Path, mine: range, rounds: int) -> None:
    _journal(folder, mine, rounds, common=True, files=False)


_SHAPES: dict[str, Shape] = {
    "each file synced": _files,
    "one journal, files not synced": _common_journal,
    "a journal each, files not synced": _own_journals,
    "one journal, files later": _journal_alone,
}

if __name__ == "__main__":
    _work(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
