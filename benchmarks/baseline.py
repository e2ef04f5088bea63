"""Today's code and an older commit, measured in turns in one run.

``python -m benchmarks.baseline [name ...] [--commit REV] [--runs N]`` installs the commit into an
environment of its own, below ``.baseline/``, with the same versions of all dependencies. Then it
runs each workload with both, in turns, every measurement in a fresh process. A ratio above 1
means that today's code is faster. Machines differ by a factor of five, and one machine by a third
from hour to hour: only figures of one run compare.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    # Last, so that `agent_state` is the installed one and only `benchmarks` is found here.
    sys.path.append(str(ROOT))

from benchmarks.large import bytes_written, save_one_field  # noqa: E402  # found as above
from benchmarks.report import Row, at_least, table  # noqa: E402  # found through the path above
from benchmarks.workload import Save, agent_state, all_at_once  # noqa: E402

COMMIT = "0172aae"
"""The last commit before the core was rebuilt."""

WORKLOADS = {
    "exclusive": 200,
    "shared": 30,
    "restore": 4000,
    "large": 300,
    "queue": 40,
    "backlog": 40,
}
"""Saves of each of 100 agents; ``restore``: agents with two tasks each; ``large``: saves;
``queue``: tasks of each of 50 agents, each submitted when the one before has its result;
``backlog``: the same tasks, all of an agent's submitted before its first result is waited for."""
QUEUED = ("queue", "backlog")
QUEUES = 50


# -- what is measured, in a process of its own -----------------------------------------------------
# Names that differ between the two versions are looked up here and nowhere else.


@asynccontextmanager
async def _saves(folder: Path, *, exclusive: bool) -> AsyncIterator[Save]:
    from agent_state import StatePersistenceManager  # the version under measurement

    async with StatePersistenceManager(folder / "state", exclusive=exclusive) as manager:

        async def save(_: int, state: dict[str, Any]) -> None:
            await manager.save_agent_state(state["agent_id"], state)

        yield save


async def _fill(state: Path, agents: int) -> None:
    from agent_state import StatePersistenceManager  # the version under measurement

    async with StatePersistenceManager(state, exclusive=True) as manager:
        for index in range(agents):
            body = agent_state(index)
            async with manager.group() as group:
                group.save("agents", body["agent_id"], body)
                for number in range(2):
                    task = {"task_id": f"task-{number}", "agent_id": body["agent_id"], "name": "x"}
                    group.save("tasks", (body["agent_id"], task["task_id"]), task)


async def _restore(state: Path, agents: int) -> float:
    from agent_state import AsyncAgentSessionManager  # the version under measurement

    began = time.perf_counter()
    async with AsyncAgentSessionManager(state) as runtime:
        seconds = time.perf_counter() - began
        assert runtime.report is not None
        assert len(runtime.report.agents) == agents
    return seconds


async def _work_off(folder: Path, each: int, *, at_once: bool) -> float:
    """No-op tasks end to end, durable."""
    from agent_state import AsyncAgentSessionManager  # the version under measurement

    runtime: Any = AsyncAgentSessionManager(folder / "state")
    tasks = getattr(runtime, "tasks", runtime)

    async def plain(_: object, task: Any) -> dict[str, int]:
        return {"n": task.payload["n"]}

    runtime.handler("plain")(plain)

    async def work(agent: str) -> None:
        queued = []
        for n in range(each):
            queued.append(await tasks.submit(agent, "count", {"n": n}))
            if not at_once:
                assert await tasks.result(queued[-1]) == {"n": n}
        for n, task in enumerate(queued):
            assert await tasks.result(task) == {"n": n}

    agents = [f"agent-{index}" for index in range(QUEUES)]
    async with runtime:
        create = runtime.agents.create if tasks is not runtime else runtime.create_session
        for agent in agents:
            await create(agent, agent_type="plain")
        began = time.perf_counter()
        await asyncio.gather(*map(work, agents))
        return time.perf_counter() - began


async def _save_all(folder: Path, *, exclusive: bool, each: int) -> float:
    load = await all_at_once(lambda place: _saves(place, exclusive=exclusive), folder, each)
    return load.seconds


def measure(name: str, folder: Path, count: int) -> dict[str, float]:
    """Seconds of a workload; the processor's seconds and the bytes written until it is closed."""
    importlib.import_module("agent_state")  # what an import costs is no part of a save
    gc.collect()
    before, written = _processor_seconds(), bytes_written()
    began = time.perf_counter()
    if name == "restore":
        seconds = asyncio.run(_restore(folder, count))
    elif name in QUEUED:
        seconds = asyncio.run(_work_off(folder, count, at_once=name == "backlog"))
    elif name == "large":
        asyncio.run(save_one_field(folder, count))
        seconds = time.perf_counter() - began
    else:
        seconds = asyncio.run(_save_all(folder, exclusive=name == "exclusive", each=count))
    return {
        "seconds": seconds,
        "processor": _processor_seconds() - before,
        "written": bytes_written() - written,
    }


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


# -- two versions in turns -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Version:
    """An interpreter that has one version of agent_state installed."""

    python: Path

    def run(self, *arguments: object) -> dict[str, float]:
        # `-P`: benchmarks/http.py must not hide the standard library's http.
        command = [str(self.python), "-P", str(Path(__file__)), "--measure", *map(str, arguments)]
        done = subprocess.run(  # noqa: S603  # our own interpreters and module
            command, stdout=subprocess.PIPE, check=True, cwd=self.python.parents[2]
        )
        figures: dict[str, float] = json.loads(done.stdout)
        return figures


def install(commit: str) -> Version:
    """The commit in an environment of its own; made once."""
    home = ROOT / ".baseline" / commit
    python = home / "venv" / "bin" / "python"
    if not (home / "installed").exists():
        source = home / "source"
        source.mkdir(parents=True, exist_ok=True)
        archive = subprocess.run(  # noqa: S603  # git, with a name given by the caller
            ["git", "archive", commit],  # noqa: S607
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
        subprocess.run(["tar", "-x"], cwd=source, input=archive.stdout, check=True)  # noqa: S607
        venv.create(home / "venv", with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        limits = home / "constraints.txt"
        limits.write_text(_installed_versions())
        subprocess.run([*pip, "-c", str(limits), str(source)], check=True)  # noqa: S603  # as above
        (home / "installed").touch()
    return Version(python)


def _installed_versions() -> str:
    """This environment's packages but for ours, so that both versions use the same ones."""
    listed = subprocess.run(  # our own interpreter
        [sys.executable, "-m", "pip", "list", "--format=json", "--disable-pip-version-check"],
        capture_output=True,
        check=True,
    )
    packages = json.loads(listed.stdout)
    return "".join(
        f"{package['name']}=={package['version']}\n"
        for package in packages
        if package["name"] not in {"agent-state", "pip", "setuptools"}
    )


def compare(name: str, old: Version, new: Version, runs: int, directory: Path) -> list[Row]:
    """Both versions in turns, which goes first by turns too; ratios are of neighbours."""
    count = WORKLOADS[name]
    found: dict[Version, list[dict[str, float]]] = {old: [], new: []}
    with tempfile.TemporaryDirectory(prefix="baseline-", dir=directory) as folder:
        if name == "restore":
            old.run("fill", Path(folder) / "filled", count)
            old.run(name, Path(folder) / "filled", count)  # the first start writes more than others
        for turn in range(runs):
            for version in (old, new) if turn % 2 else (new, old):
                with _place(Path(folder), name) as place:
                    found[version].append(version.run(name, place, count))

    def of(version: Version, figure: str) -> list[float]:
        return [one[figure] for one in found[version]]

    def ratios(figure: str) -> list[float]:
        pairs = zip(of(old, figure), of(new, figure), strict=True)
        return [before / after for before, after in pairs]

    fewer = at_least(15) if name == "large" else None
    faster = at_least(2 if name in QUEUED else 0.95)
    written = Row("  bytes written, today = 1", ratios("written"), "times", fewer)
    return [
        Row(f"{name}, before", of(old, "seconds"), "s"),
        Row(f"{name}, today", of(new, "seconds"), "s"),
        Row("  speed, before = 1", ratios("seconds"), "times", faster),
        Row("  processor, before", of(old, "processor"), "s"),
        Row("  processor, today", of(new, "processor"), "s"),
        Row("  speed by processor time", ratios("processor"), "times", faster),
        written,
    ]


@contextmanager
def _place(folder: Path, name: str) -> Iterator[Path]:
    if name == "restore":
        yield folder / "filled"
        return
    with tempfile.TemporaryDirectory(prefix="run-", dir=folder) as place:
        yield Path(place)


def main() -> int:
    """Print the ratios; 1 when a median is below what is asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.baseline", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"any of: {', '.join(WORKLOADS)}")
    parser.add_argument("--commit", default=COMMIT, help="the older version")
    parser.add_argument("--runs", type=int, default=5, help="turns; the median counts")
    parser.add_argument("--directory", type=Path, default=ROOT.parent, help="where to write")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(WORKLOADS)
    if unknown:
        parser.error(f"no such workload: {', '.join(sorted(unknown))}")
    old, new = install(arguments.commit), Version(Path(sys.executable))
    print(f"{arguments.commit} and today's code in turns, {arguments.runs} runs,", end=" ")
    print(f"load {os.getloadavg()[0]:.1f} before the start", flush=True)
    ok = True
    for name in arguments.names or WORKLOADS:
        rows = compare(name, old, new, arguments.runs, arguments.directory)
        print(f"\n{table(rows)}", flush=True)
        ok = ok and all(row.ok for row in rows)
    return 0 if ok else 1


def _measured(name: str, folder: str, count: str) -> int:
    if name == "fill":
        asyncio.run(_fill(Path(folder), int(count)))
        print("{}")
    else:
        print(json.dumps(measure(name, Path(folder), int(count))))
    return 0


if __name__ == "__main__":
    sys.exit(_measured(*sys.argv[2:]) if sys.argv[1:2] == ["--measure"] else main())
