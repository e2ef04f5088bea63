"""``python -m benchmarks.growth``: what one operation costs beside what is there already.

Each operation is measured in a directory of its own that holds more and more: its CPU time, over
all threads, the least of five runs: load only adds to it. The exponent is the slope of the costs
over the sizes, both as logarithms: 0 is a cost that does not grow, 1 one that grows with what is
there. Where an operation is about everything, such as a start, its cost is for each thing that it
is about.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from agent_state import AsyncAgentSessionManager, StatePersistenceManager, Task, TaskContext
from agent_state.models import ARCHIVE
from agent_state.sessions import SessionManager

SIZES = (100, 1000, 10_000)
RUNS = 5
EXPLAINED = 0.15
_AT_ONCE = 500

Work = Callable[[], Awaitable[object]]
Prepared = Callable[[Path, int], AbstractAsyncContextManager[Work]]


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation, what there is beside it, and how often a run does it."""

    name: str
    beside: str
    prepare: Prepared
    times: int = 20
    of_each: bool = False
    """The cost is divided by the number of things that are there."""
    once: bool = False
    """It can be done once only: each run prepares anew, and there are three."""
    largest: int = 10**6
    """The most that is prepared in this benchmark."""


@dataclass(slots=True)
class Curve:
    """The CPU time of an operation in microseconds, by what is there."""

    operation: Operation
    costs: dict[int, list[float]] = field(default_factory=dict)

    @property
    def exponent(self) -> float:
        """The slope of the costs over the sizes, both as logarithms."""
        points = [(math.log(size), math.log(min(found))) for size, found in self.costs.items()]
        x, y = (sum(each) / len(points) for each in zip(*points, strict=True))
        below = sum((size - x) ** 2 for size, _ in points)
        return sum((size - x) * (cost - y) for size, cost in points) / below if below else 0.0


def cpu_microseconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return (used.ru_utime + used.ru_stime) * 1e6


# -- what is measured --------------------------------------------------------------------------


async def _each(total: int, make: Callable[[int], Awaitable[object]], *, first: int = 0) -> None:
    for start in range(first, first + total, _AT_ONCE):
        end = min(first + total, start + _AT_ONCE)
        await asyncio.gather(*(make(number) for number in range(start, end)))


def _agent(number: int, step: int = 0) -> dict[str, object]:
    return {"agent_id": f"a{number}", "agent_type": "worker", "status": "idle", "data": {"n": step}}


@asynccontextmanager
async def save(root: Path, size: int) -> AsyncIterator[Work]:
    steps = count(1)
    async with StatePersistenceManager(root, exclusive=True) as manager:
        await _each(size, lambda number: manager.save_agent_state(f"a{number}", _agent(number)))
        await manager.flush()
        yield lambda: manager.save_agent_state("a7", _agent(7, next(steps)))


async def _fill_log(root: Path, size: int) -> None:
    async with StatePersistenceManager(root, exclusive=True) as manager:
        for start in range(0, size, _AT_ONCE):
            async with manager.group() as group:
                for number in range(start, min(size, start + _AT_ONCE)):
                    record = {"n": number, "text": "x" * 150}
                    group.append("notes", "log", record, dedupe_key=f"k{number}")


@asynccontextmanager
async def append(root: Path, size: int) -> AsyncIterator[Work]:
    await _fill_log(root, size)
    keys = count()
    async with StatePersistenceManager(root, exclusive=True) as manager:
        yield lambda: manager.append("notes", "log", {"n": 1}, dedupe_key=f"new{next(keys)}")


@asynccontextmanager
async def first_append(root: Path, size: int) -> AsyncIterator[Work]:
    await _fill_log(root, size)
    keys = count()

    async def work() -> None:
        async with StatePersistenceManager(root, exclusive=True) as manager:
            await manager.append("notes", "log", {"n": 1}, dedupe_key=f"new{next(keys)}")

    await work()
    yield work


@asynccontextmanager
async def submit(root: Path, size: int) -> AsyncIterator[Work]:
    async with AsyncAgentSessionManager(root, exclusive=True) as runtime:
        await runtime.agents.create("ann", agent_type="none")
        await _each(size, lambda _: runtime.tasks.submit("ann", "work"))
        await runtime.manager.flush()
        yield lambda: runtime.tasks.submit("ann", "work")


@asynccontextmanager
async def claim(root: Path, size: int) -> AsyncIterator[Work]:
    runtime = AsyncAgentSessionManager(root, exclusive=True, grace_seconds=0.1)
    allowed, done = asyncio.Semaphore(0), asyncio.Semaphore(0)

    @runtime.handler("worker")
    async def worker(_: TaskContext, __: Task) -> None:
        await allowed.acquire()
        done.release()

    async def work() -> None:
        allowed.release()
        await done.acquire()

    async with runtime:
        await runtime.agents.create("ann", agent_type="worker")
        await _each(size + 200, lambda _: runtime.tasks.submit("ann", "work"))
        await runtime.manager.flush()
        yield work


@asynccontextmanager
async def send_mail(root: Path, size: int) -> AsyncIterator[Work]:
    async with AsyncAgentSessionManager(root, exclusive=True) as runtime:
        await runtime.agents.create("ann", agent_type="none")
        await _each(size, lambda number: runtime.mail.send("bob", "ann", subject=f"{number}"))
        await runtime.manager.flush()
        yield lambda: runtime.mail.send("bob", "ann", subject="new")


@asynccontextmanager
async def nap(root: Path, size: int) -> AsyncIterator[Work]:
    async with AsyncAgentSessionManager(root, exclusive=True) as runtime:
        await runtime.agents.create("ann", agent_type="none")
        await _each(size, lambda number: runtime.mail.send("bob", "ann", subject=f"{number}"))
        await runtime.manager.flush()

        async def work() -> None:
            await runtime.agents.sleep("ann", wake_on=["mail_received"])
            await runtime.agents.wake("ann")

        yield work


@asynccontextmanager
async def page(root: Path, size: int) -> AsyncIterator[Work]:
    async with StatePersistenceManager(root, exclusive=True) as manager:
        sessions = SessionManager(manager)
        session_id = (await sessions.create()).session.session_id
        for start in range(0, size, _AT_ONCE):
            messages = [
                {"role": "user", "content": f"{number} " + "x" * 100}
                for number in range(start, min(size, start + _AT_ONCE))
            ]
            await sessions.conversations.add_many(session_id, "guide_agent", messages)
        await manager.flush()
        yield lambda: sessions.conversations.page(session_id, "guide_agent", before=size // 2)


@asynccontextmanager
async def archived(root: Path, size: int) -> AsyncIterator[Work]:
    async with StatePersistenceManager(root, exclusive=True) as manager:
        await manager.save_agent_state("ann", {"agent_id": "ann"})
        for start in range(0, size, _AT_ONCE):
            async with manager.group() as group:
                for number in range(start, min(size, start + _AT_ONCE)):
                    task = Task(task_id=f"t{number}", agent_id="ann", name="w", status="completed")
                    key = f"t{number}@3"
                    group.append("tasks", ("ann", ARCHIVE), task.model_dump(), dedupe_key=key)
            await manager.flush()
        await manager.append("tasks", ("ann", ARCHIVE), {}, dedupe_key="t0@4")
    async with AsyncAgentSessionManager(root, exclusive=True) as runtime:
        yield lambda: runtime.tasks.get(("ann", f"t{size // 3}"))


@asynccontextmanager
async def erase(root: Path, size: int) -> AsyncIterator[Work]:
    keys = count()
    async with StatePersistenceManager(root, exclusive=True) as manager:
        await _each(size + 200, lambda number: manager.save("notes", f"n{number}", {"n": number}))
        await manager.flush()
        yield lambda: manager.erase("notes", f"n{next(keys)}")


@asynccontextmanager
async def check(root: Path, size: int) -> AsyncIterator[Work]:
    await _make_agents(root, size)
    async with AsyncAgentSessionManager(root, exclusive=True) as runtime:
        for _ in range(2):
            await runtime.reconciler.check_some()
        yield runtime.reconciler.check_some


async def _make_agents(root: Path, size: int) -> None:
    async with StatePersistenceManager(root, exclusive=True) as manager:
        await _each(size, lambda number: manager.save_agent_state(f"a{number}", _agent(number)))


@asynccontextmanager
async def list_keys(root: Path, size: int) -> AsyncIterator[Work]:
    await _make_agents(root, size)
    async with StatePersistenceManager(root, exclusive=True) as manager:
        yield lambda: manager.keys("agents")


def _with_handler(root: Path) -> AsyncAgentSessionManager:
    runtime = AsyncAgentSessionManager(root, exclusive=True)

    @runtime.handler("worker")
    async def worker(_: TaskContext, __: Task) -> None:
        pass

    return runtime


@asynccontextmanager
async def restore(root: Path, size: int) -> AsyncIterator[Work]:
    await _make_agents(root, size)
    runtime = _with_handler(root)
    yield runtime.start
    await runtime.stop()


@asynccontextmanager
async def stop(root: Path, size: int) -> AsyncIterator[Work]:
    await _make_agents(root, size)
    runtime = _with_handler(root)
    await runtime.start()
    yield runtime.stop


OPERATIONS = (
    Operation("save", "agents", save),
    Operation("append with a dedupe key", "lines of the log", append),
    Operation("open, append one, close", "lines of the log", first_append, times=1),
    Operation("submit", "pending tasks of the agent", submit, largest=10_000),
    Operation("claim and finish", "pending tasks of the agent", claim, largest=10_000),
    Operation("send mail", "unread mail of the agent", send_mail, largest=10_000),
    Operation("sleep and wake", "unread mail of the agent", nap, largest=10_000),
    Operation("a page of a conversation", "messages", page),
    Operation("look up an archived task", "archived tasks", archived),
    Operation("erase", "documents of the kind", erase),
    Operation("a periodic check", "agents", check, times=5),
    Operation("list, each", "agents", list_keys, times=1, of_each=True),
    Operation("start, each", "agents", restore, times=1, of_each=True, once=True),
    Operation("stop, each", "agents", stop, times=1, of_each=True, once=True),
)


# -- measuring ---------------------------------------------------------------------------------


async def measure(operation: Operation, size: int, folder: Path) -> list[float]:
    """The CPU time of one operation in microseconds, in each run."""
    found: list[float] = []
    for number in range(3 if operation.once else 1):
        async with operation.prepare(folder / f"{number}", size) as work:
            for _ in range(1 if operation.once else RUNS):
                began = cpu_microseconds()
                for _ in range(operation.times):
                    await work()
                spent = (cpu_microseconds() - began) / operation.times
                found.append(spent / size if operation.of_each else spent)
    return found


def measure_all(names: Sequence[str], sizes: Iterable[int], directory: Path) -> list[Curve]:
    """Measure what is asked for, one size after the other."""
    chosen = [each for each in OPERATIONS if not names or each.name in names]
    curves = [Curve(operation) for operation in chosen]
    for size in sizes:
        for curve in curves:
            if size > curve.operation.largest:
                continue
            folder = Path(tempfile.mkdtemp(prefix="growth-", dir=directory))
            began = time.monotonic()
            try:
                curve.costs[size] = asyncio.run(measure(curve.operation, size, folder))
            finally:
                shutil.rmtree(folder)
            cost = min(curve.costs[size])
            seconds = time.monotonic() - began
            progress = f"{curve.operation.name}, {size:,}: {cost:,.0f} µs ({seconds:.0f} s)"
            print(progress, file=sys.stderr, flush=True)
    return curves


def as_markdown(curves: Sequence[Curve]) -> str:
    """A table: a line for each operation, a column for each size."""
    sizes = sorted({size for curve in curves for size in curve.costs})
    head = ["operation", "beside", *(f"{size:,}" for size in sizes), "exponent"]
    lines = [head, ["---", "---", *("---:" for _ in sizes), "---:"]]
    for curve in curves:
        costs = [f"{min(curve.costs[size]):,.0f}" if size in curve.costs else "" for size in sizes]
        operation = curve.operation
        lines.append([operation.name, operation.beside, *costs, f"{curve.exponent:.2f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Draw all curves into a PNG file; both axes are logarithmic."""
    import matplotlib.pyplot as plt  # the table needs no drawing

    figure, axes = plt.subplots(figsize=(9, 7), layout="constrained")
    for number, curve in enumerate(curves):
        costs = {size: min(found) for size, found in sorted(curve.costs.items())}
        label = f"{curve.operation.name} ({curve.exponent:+.2f})"
        style = "-o" if number < 10 else "--s"
        axes.loglog([*costs], [*costs.values()], style, label=label, markersize=4)
    axes.set_xlabel("what is there already")
    axes.set_ylabel("CPU time of one operation, µs")
    axes.set_title("Growth (in brackets: the exponent)")
    axes.grid(visible=True, which="major", alpha=0.4)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> int:
    """Measure; print the table, and draw it when asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    names = ", ".join(each.name for each in OPERATIONS)
    parser.add_argument("names", nargs="*", metavar="name", help=f"any of: {names}")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="N")
    parser.add_argument("--png", type=Path, help="draw the curves into this file")
    default = Path(__file__).resolve().parents[2]
    parser.add_argument("--directory", type=Path, default=default, help="where to write")
    arguments = parser.parse_args()
    unknown = {*arguments.names} - {each.name for each in OPERATIONS}
    if unknown:
        parser.error(f"no such operation: {', '.join(sorted(unknown))}")
    curves = measure_all(arguments.names, sorted(arguments.sizes), arguments.directory)
    print(f"CPU time in µs, Python {platform.python_version()}, {platform.machine()}\n")
    print(as_markdown(curves))
    if arguments.png is not None:
        draw(curves, arguments.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
