"""Several real servers on one store: one stands still (SIGSTOP), and the others go on."""

from __future__ import annotations

import asyncio
import random
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest

from agent_state import MemoryStateStore, StatePersistenceManager, StateStore, TaskContext
from agent_state.models import MailMessage, Task
from agent_state.protocols import Change
from agent_state.redis import RedisStateStore
from agent_state.storage import FileStateStore
from agent_state.testing import FakeClock
from tests.deadlines import until
from tests.redis.servers import RedisServer
from tests.runtime.runtimes import hanging, make_runtime

SERVER = """
import asyncio, os, signal, sys
from agent_state import AsyncAgentSessionManager, LeaseLostError, RetryPolicy
from agent_state.redis import RedisStateStore

place, ledger, life, agents, tasks, pause, share, stands_still = sys.argv[1:]
agents, tasks, pause = int(agents), int(tasks), float(pause)
store = RedisStateStore(place, prefix="app:", timeout_seconds=10) if "://" in place else None
runtime = AsyncAgentSessionManager(
    None if store else place,
    store=store,
    exclusive=False,
    lease_seconds=3.0,
    retry=RetryPolicy(base_seconds=0.01, max_interruptions=1000),
    grace_seconds=1.0,
    cancel_timeout_seconds=1.0,
)
written = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def tell(*words):
    os.write(written, (" ".join(map(str, (life, *words))) + "\\n").encode())

async def go_on(ctx):
    # Whatever a former owner's handler tries, once its process runs again.
    ctx.memory["late"] = life
    ctx.add_turn("user", "late")
    for message in (await ctx.inbox())[:3]:
        await ctx.read_mail(message.message_id)
        await ctx.archive_mail(message.message_id)
    late = [
        lambda: ctx.checkpoint({"late": life}),
        lambda: ctx.step("late", len, ""),
    ]
    for number, act in enumerate(late):
        try:
            await act()
            tell("done", ctx.agent_id, number)
        except LeaseLostError:
            tell("refused", ctx.agent_id, number)

@runtime.handler("worker")
async def worker(ctx, task):
    n = task.payload["n"]
    tell("begin", ctx.agent_id, n)
    ctx.memory["done"] = ctx.memory.get("done", 0) + 1
    doubled = await ctx.step("double", lambda: n * 2)
    if stands_still == task.name:
        await submitted.wait()
        # No commit is under way, which would hold the locks of its documents.
        for other in range(1, agents):
            while any(t.status != "completed" for t in await runtime.tasks.list(f"w{other}")):
                await asyncio.sleep(0.02)
            for t in await runtime.tasks.list(f"w{other}"):
                async with runtime.manager.lock("tasks", (f"w{other}", t.task_id)):
                    pass  # the commit that completed it has given its locks back
        tell("stops", ctx.agent_id, n)
        try:
            os.kill(os.getpid(), signal.SIGSTOP)
            await asyncio.sleep(0)
        finally:
            await asyncio.shield(go_on(ctx))
    await ctx.send_mail(f"w{n * 7 % agents}", subject=task.name, body=doubled)
    await asyncio.sleep(0.003)
    return doubled

submitted = asyncio.Event()

async def main():
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with runtime:
        for n in range(agents):
            await runtime.agents.create(f"w{n}", agent_type="worker")
        for n in range(*(int(share), tasks, 2) if share else (tasks,)):
            name = f"task{n}"
            await runtime.tasks.submit(f"w{n % agents}", name, {"n": n}, dedupe_key=name)
            await asyncio.sleep(pause)
        print("submitted", flush=True)
        submitted.set()
        await stop.wait()

asyncio.run(main())
"""


@dataclass
class Team:
    """Servers on one store, and the ledger that they append to."""

    place: str
    ledger: Path
    manager: StatePersistenceManager
    agents: int
    tasks: int
    lives: dict[str, Process] = field(default_factory=dict)
    numbers: count[int] = field(default_factory=count)

    async def start(self, *, pause: float = 0.0, share: str = "", stands_still: str = "") -> str:
        """Start a server, which submits all tasks, with a pause after each.

        ``share``: only those with even (0) or odd (1) numbers.
        It stops itself in the first attempt at the task named ``stands_still``.
        """
        life = f"life{next(self.numbers)}"
        self.lives[life] = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", SERVER, self.place, str(self.ledger), life),
            *(str(self.agents), str(self.tasks), str(pause), share, stands_still),
            stdout=PIPE,
        )
        return life

    async def submitted(self, life: str) -> None:
        stdout = self.lives[life].stdout
        assert stdout is not None
        async with asyncio.timeout(60):
            assert await stdout.readline() == b"submitted\n"

    def send(self, life: str, number: signal.Signals) -> None:
        self.lives[life].send_signal(number)

    async def end(self, life: str) -> None:
        """Stop a server in good order."""
        self.send(life, signal.SIGTERM)
        async with asyncio.timeout(60):
            assert await self.lives[life].wait() == 0

    async def kill_all(self) -> None:
        for process in self.lives.values():
            if process.returncode is None:
                process.kill()
                await process.wait()

    def told(self) -> list[list[str]]:
        """The lines of the ledger."""
        return [line.split() for line in self.ledger.read_text().splitlines()]

    async def until_told(self, *words: str) -> None:
        async with asyncio.timeout(60):
            while not any(line[: len(words)] == [*words] for line in self.told()):
                await asyncio.sleep(0.02)

    async def tasks_of(self) -> list[Task]:
        found = [loaded.state async for loaded in self.manager.scan("tasks")]
        return [task for task in found if isinstance(task, Task)]

    async def completed(self) -> int:
        """How many tasks are completed."""
        return sum(task.status == "completed" for task in await self.tasks_of())

    async def until_completed(self, number: int) -> None:
        async with asyncio.timeout(120):
            while await self.completed() < number:
                await asyncio.sleep(0.05)

    async def stored(self) -> dict[tuple[str, tuple[str, ...]], int]:
        """The revision of everything that belongs to an agent."""
        return {
            (kind, loaded.key): loaded.revision
            for kind in ("agents", "tasks", "sleep", "mail")
            async for loaded in self.manager.scan(kind)
        }

    async def verify(self) -> None:
        """Every task completed once, with all that it left: the result, the memory, the mail."""
        tasks = await self.tasks_of()
        assert Counter(task.status for task in tasks) == {"completed": self.tasks}
        assert {task.payload["n"]: task.result for task in tasks} == {
            n: n * 2 for n in range(self.tasks)
        }
        mail = [loaded.state async for loaded in self.manager.scan("mail")]
        assert Counter(
            (message.to_agent, message.subject)
            for message in mail
            if isinstance(message, MailMessage)
        ) == Counter((f"w{n * 7 % self.agents}", f"task{n}") for n in range(self.tasks))
        for n in range(self.agents):
            agent = await self.manager.load_agent_state(f"w{n}")
            assert agent is not None
            assert agent.context.working_memory == {"done": self.tasks // self.agents}
            assert agent.context.conversation_history == []
        assert self.manager.incidents() == []


@asynccontextmanager
async def team_on(
    where: str, tmp_path: Path, server: RedisServer, *, agents: int, tasks: int
) -> AsyncIterator[Team]:
    on_files = where == "files"
    place = str(tmp_path / "state") if on_files else server.url
    store = None if on_files else RedisStateStore(place, prefix="app:", timeout_seconds=10)
    manager = StatePersistenceManager(place if on_files else None, store=store, exclusive=False)
    async with manager:
        (tmp_path / "ledger").touch()
        team = Team(place, tmp_path / "ledger", manager, agents, tasks)
        try:
            yield team
        finally:
            await team.kill_all()


@pytest.mark.long("waits for the heartbeat of a stopped process to expire")
@pytest.mark.parametrize("where", ["files", "redis"])
async def test_a_process_that_stood_still_changes_nothing_of_its_former_agents(
    where: str, tmp_path: Path, server: RedisServer
) -> None:
    async with team_on(where, tmp_path, server, agents=5, tasks=60) as team:
        still = await team.start(stands_still="task40")
        await team.until_told(still, "stops")
        heir = await team.start()
        await team.submitted(heir)
        await team.until_completed(60)
        before = await team.stored()
        team.send(still, signal.SIGCONT)
        await team.until_told(still, "refused", "w0", "0")
        await team.end(still)
        after = await team.stored()
        assert {
            key: (before.get(key), after[key]) for key in after if before.get(key) != after[key]
        } == {}
        assert after.keys() == before.keys()
        late = [
            line[1:] for line in team.told() if line[0] == still and line[1] in ("done", "refused")
        ]
        assert [word for word, *_ in late] == ["refused"] * len(late)
        assert len(late) == 2
        await team.end(heir)
        await team.verify()


@pytest.mark.long("stops servers again and again, each past its heartbeat")
@pytest.mark.parametrize("where", ["files", "redis"])
async def test_servers_that_stand_still_again_and_again_lose_nothing_and_do_nothing_twice(
    where: str, tmp_path: Path, server: RedisServer
) -> None:
    chance = random.Random(13)
    async with team_on(where, tmp_path, server, agents=10, tasks=600) as team:
        lives = [await team.start(pause=0.06, share=share) for share in "01"]
        await team.until_completed(20)
        for number in range(4):
            still = lives[number % 2]
            await asyncio.sleep(chance.uniform(0.05, 0.5))
            team.send(still, signal.SIGSTOP)
            completed = await team.completed()
            await asyncio.sleep(4.5)  # longer than its heartbeat is valid
            assert await team.completed() > completed or completed == 600, "the other one stalls"
            team.send(still, signal.SIGCONT)
        await team.until_completed(600)
        for life in lives:
            await team.submitted(life)
        for life in lives:
            await team.end(life)
        await team.verify()


# -- in this process, on every store --------------------------------------------------------------


class CommitLog:
    """An observer that keeps the changes of every commit."""

    def __init__(self) -> None:
        self.commits: list[list[Change]] = []

    def committed(self, changes: Sequence[Change], numbers: Sequence[int]) -> None:
        self.commits.append([*changes])


def store_of(where: str, tmp_path: Path, server: RedisServer, clock: FakeClock) -> StateStore:
    if where == "files":
        return FileStateStore(tmp_path / "state", clock=clock, lock_timeout_seconds=2.0)
    if where == "redis":
        return RedisStateStore(server.url, prefix="app:", timeout_seconds=2.0)
    return MemoryStateStore(clock=clock, lock_timeout_seconds=2.0)


STORES = pytest.mark.parametrize("where", ["memory", "files", "redis"])


@STORES
async def test_a_runtime_writes_its_heartbeat_once_an_interval(
    where: str, tmp_path: Path, server: RedisServer
) -> None:
    clock, log = FakeClock(), CommitLog()
    store = store_of(where, tmp_path, server, clock)
    runtime = make_runtime(store, clock, exclusive=False, lease_seconds=30, observer=log)
    hanging(runtime)
    async with runtime:
        for number in range(20):
            await runtime.agents.create(f"w{number}", agent_type="worker")
            await runtime.tasks.submit(f"w{number}", "x")
        await until(lambda: runtime.runner.running_handlers == 20)
        log.commits.clear()
        for intervals in range(1, 6):
            await clock.advance(10)
            await until(lambda n=intervals: len(log.commits) >= n)  # type: ignore[misc]
            heartbeat = ("system", ("runtimes", runtime.state.owner))
            assert [[(c.kind, c.key) for c in each] for each in log.commits] == [
                [heartbeat]
            ] * intervals
            await clock.wait_for_sleepers(3)


@STORES
async def test_of_500_agents_with_one_whose_lock_is_held_499_run(
    where: str, tmp_path: Path, server: RedisServer
) -> None:
    """As a process does that was stopped in the middle of a commit."""
    clock = FakeClock()
    store = store_of(where, tmp_path, server, clock)
    peer = store if where == "memory" else store_of(where, tmp_path, server, clock)
    async with StatePersistenceManager(store=peer) as manager:
        for start in range(0, 500, 100):
            group = manager.new_group()
            for number in range(start, start + 100):
                name = f"w{number}"
                group.save("agents", name, {"agent_id": name, "agent_type": "worker"})
                task = Task(task_id="t", agent_id=name, status="in_progress", attempts=1)
                group.save("tasks", (name, "t"), task)
            await manager.commit(group)
        ran: set[str] = set()
        runtime = make_runtime(store, clock, exclusive=False, lease_seconds=30)

        @runtime.handler("worker")
        async def worker(ctx: TaskContext, task: Task) -> None:
            ran.add(ctx.agent_id)

        holding, release = asyncio.Event(), asyncio.Event()

        async def hold() -> None:
            async with manager.lock("tasks", ("w7", "t")):
                holding.set()
                await release.wait()

        holder = asyncio.create_task(hold())
        await holding.wait()
        report = await runtime.start()
        assert list(report.failed) == ["w7"]
        await until(lambda: len(ran) == 499)
        release.set()
        await holder
        async with asyncio.timeout(60):
            while len(ran) < 500:
                await clock.advance(10)
                await asyncio.sleep(0.02)
        assert runtime.agents.failed == {}
        await runtime.stop()


@STORES
async def test_two_runtimes_that_take_the_same_agents_share_them(
    where: str, tmp_path: Path, server: RedisServer
) -> None:
    """Each agent has one owner, whose token is one more than that of the dead runtime."""
    clock = FakeClock()
    store = store_of(where, tmp_path, server, clock)
    peer = store if where == "memory" else store_of(where, tmp_path, server, clock)
    dead = make_runtime(store, clock, name="dead", exclusive=False, lease_seconds=30)
    await dead.start()
    for number in range(40):
        await dead.agents.create(f"w{number}", agent_type="worker")
    await dead.abort()
    await dead.manager.close()
    clock.jump(60)
    first = make_runtime(store, clock, name="first", exclusive=False, lease_seconds=30)
    second = make_runtime(peer, clock, name="second", exclusive=False, lease_seconds=30)
    reports = await asyncio.gather(first.start(), second.start())
    assert [report.failed for report in reports] == [{}, {}]
    owned = [
        {name for name, agent in runtime.state.agents.items() if agent.leased}
        for runtime in (first, second)
    ]
    assert owned[0].isdisjoint(owned[1])
    assert len(owned[0] | owned[1]) == 40
    for runtime, names in zip((first, second), owned, strict=True):
        for name in names:
            owner = await runtime.manager.load("system", ("owners", name))
            assert owner is not None
            assert owner.model_dump() == {
                "agent_id": name,
                "owner": runtime.state.owner,
                "token": 2,
            }
    await first.stop()
    await second.stop()
