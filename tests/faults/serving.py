"""A server of agents whose handlers do everything that a context can, and a ledger of what it did.

The ledger is one file outside of the state, opened for appending, and each line is one write: so
no kill tears one, and several processes share it. It has what the store acknowledged (each commit
with its revisions and its fences), what contexts and clients were told is done, what steps gave,
and what handlers reached.

What handlers do are the random programs of the simulation, a hundred times as fast.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NoReturn, cast

import orjson

from agent_state import (
    AgentStateError,
    AsyncAgentSessionManager,
    RetryPolicy,
    StateStore,
    StorageError,
    Task,
    TaskContext,
)
from agent_state.clock import SystemClock
from agent_state.errors import LockTimeoutError
from agent_state.protocols import Change, Check, Delete, Put
from agent_state.redis import RedisStateStore
from agent_state.runtime.transitions import is_finished
from agent_state.storage import FileStateStore, WALStateStore
from tests.simulation.histories import History
from tests.simulation.programs import Interpreter, draw_program
from tests.simulation.store import Process, World

AGENTS = ("ann", "bob", "cat", "dan", "eve", "fay")
PROGRAMS = 60
OUTSIDER = "zoe"
"""The sender of mail that comes from no agent."""
PACE = 0.01
"""A second of a program takes this long."""
TIMEOUT = 1.0
"""The time limit of an attempt, where a program has one."""
KEY_SECONDS, ASKING_SECONDS = 20.0, 10.0
"""How long the key of a client holds, and how long the client asks again under it."""
WINDOW = 6
"""So many tasks a client has asked for and not seen finished, at most."""
TRIES_AGAIN = (StorageError, LockTimeoutError)
"""What the store may raise while it is in trouble."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What all servers of a run have in common."""

    kind: str
    """``exclusive``, ``shared`` or ``redis``."""
    place: str
    """The state directory, or the URL of the Redis server."""
    folder: str
    """Where the ledger is, outside of the state."""
    seed: int
    servers: int
    lease_seconds: float

    @property
    def shared(self) -> bool:
        return self.kind != "exclusive"

    @property
    def ledger(self) -> Path:
        return Path(self.folder) / "ledger"

    @property
    def quiet(self) -> Path:
        """A file that exists once clients are to ask for nothing more."""
        return Path(self.folder) / "quiet"

    def history(self) -> History:
        """The programs, as the laws of the simulation want them."""
        random = Random(self.seed)
        programs = tuple(
            draw_program(random, AGENTS, range(number + 1, PROGRAMS)) for number in range(PROGRAMS)
        )
        return History(self.seed, AGENTS, self.shared, self.servers, programs, ())

    def store(self) -> StateStore:
        """A store that is not witnessed, to look at what is stored."""
        if self.kind == "redis":
            return RedisStateStore(self.place, prefix="app:", timeout_seconds=10.0)
        return FileStateStore(self.place) if self.shared else WALStateStore(self.place)


# -- the ledger ------------------------------------------------------------------------------


class LedgerWriter:
    """Appends lines in the name of one life of one server."""

    def __init__(self, path: Path, life: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._life = life

    def tell(self, what: str, **facts: Any) -> None:
        line = orjson.dumps({"is": what, "life": self._life, **facts}) + b"\n"
        assert os.write(self._fd, line) == len(line), "a line is one write"


class LedgerReader:
    """Reads the lines that were appended since the last time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def lines(self) -> Iterator[dict[str, Any]]:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                yield orjson.loads(line)


class _Witnessed:
    """Placed before a store: tells the ledger of each commit that was made."""

    ledger: LedgerWriter

    async def commit(self: Any, changes: Sequence[Change]) -> list[int]:
        numbers: list[int] = await super().commit(changes)  # type: ignore[misc]  # a mixin's
        puts, deletes, fences = [], [], {}
        for change, number in zip(changes, numbers, strict=True):
            if isinstance(change, Put):
                puts.append([change.kind, change.key, number])
            elif isinstance(change, Delete) and number:
                deletes.append([change.kind, change.key])
            elif isinstance(change, Check) and change.key[0] == "owners":
                fences[change.key[1]] = change.expected
        self.ledger.tell("commit", puts=puts, deletes=deletes, fences=fences)
        return numbers


class WitnessedFiles(_Witnessed, FileStateStore):
    """Shared files, witnessed."""


class WitnessedWAL(_Witnessed, WALStateStore):
    """The files of one process, witnessed."""


class WitnessedRedis(_Witnessed, RedisStateStore):
    """Redis, witnessed."""


def witnessed_store(plan: Plan, ledger: LedgerWriter) -> StateStore:
    store: WitnessedFiles | WitnessedWAL | WitnessedRedis
    if plan.kind == "redis":
        store = WitnessedRedis(plan.place, prefix="app:", timeout_seconds=0.5)
    elif plan.shared:
        store = WitnessedFiles(plan.place)
    else:
        store = WitnessedWAL(plan.place)
    store.ledger = ledger
    return store


# -- handlers --------------------------------------------------------------------------------


class WitnessedContext:
    """A context that tells the ledger what it was told is done, and is a hundred times as fast."""

    def __init__(self, context: TaskContext, ledger: LedgerWriter) -> None:
        self._context = context
        self._ledger = ledger
        self._of = [context.agent_id, context.task.task_id]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def checkpoint(self, progress: Mapping[str, Any]) -> None:
        await self._context.checkpoint(progress)
        self._ledger.tell("checkpoint", task=self._of, pc=progress["pc"])

    async def step(self, name: str, function: Any) -> Any:
        return self._done(name, await self._context.step(name, function))

    async def step_at_most_once(self, name: str, function: Any) -> Any:
        return self._done(name, await self._context.step_at_most_once(name, function))

    def _done(self, name: str, value: object) -> object:
        self._ledger.tell("step", task=self._of, step=name, attempt=self._context.attempt)
        return value

    async def send_mail(self, to: str, **settings: Any) -> Any:
        sent = await self._context.send_mail(to, **settings)
        self._ledger.tell("sent", place=["mail", [sent.to_agent, sent.message_id]])
        return sent

    async def reply(self, message: Any, body: Any) -> Any:
        sent = await self._context.reply(message, body)
        self._ledger.tell("sent", place=["mail", [sent.to_agent, sent.message_id]])
        return sent

    async def submit(self, agent_id: str, name: str, payload: Any, **settings: Any) -> Any:
        settings["delay_seconds"] *= PACE
        settings["dedupe_seconds"] = 1.0
        if settings["timeout_seconds"] is not None:
            settings["timeout_seconds"] = TIMEOUT
        sent = await self._context.submit(agent_id, name, payload, **settings)
        self._ledger.tell("sent", place=["tasks", [sent.agent_id, sent.task_id]])
        return sent

    async def sleep(self, *, seconds: float | None, wake_on: Any) -> NoReturn:
        """Not without an end: nobody else would wake it."""
        await self._context.sleep(seconds=PACE * (seconds or 30.0), wake_on=wake_on)


class FastClock(SystemClock):
    """The time in which programs wait."""

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(PACE * seconds)


class Reporter:
    """Takes what a program tells of itself to the ledger, and from there how often it was where."""

    def __init__(self, ledger: LedgerWriter, reader: LedgerReader) -> None:
        self._ledger = ledger
        self._reader = reader
        self._reached: Counter[str] = Counter()
        self._reading = threading.Lock()
        """Steps that are plain functions tell from threads."""

    def reached(self, token: str) -> int:
        """How often an operation was reached by any process, this time included."""
        self._ledger.tell("reached", token=token)
        with self._reading:
            for line in self._reader.lines():
                if line["is"] == "reached":
                    self._reached[line["token"]] += 1
            return self._reached[token]

    def step_runs(self, process: object, agent: str, task: str, step: str, once: bool) -> None:
        attempt = cast("Handlers", process).attempts[task]
        self._ledger.tell("runs", task=[agent, task], step=step, once=once, attempt=attempt)

    def step_failed(self, task: str, step: str) -> None:
        self._ledger.tell("failed", task=task, step=step)

    def returned(self, task: str, step: str, value: object) -> None:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        self._ledger.tell("gave", task=task, step=step, value=f"{kind} {value!r}")


@dataclass(frozen=True, slots=True)
class Stage:
    """As much of the simulation's world as its programs look at."""

    history: History
    laws: Reporter


class Handlers:
    """The handler of one server; to programs it is their process."""

    def __init__(self, plan: Plan, ledger: LedgerWriter) -> None:
        self.clock = FastClock()
        self.owner = ""
        self.attempts: dict[str, int] = {}
        self._ledger = ledger
        stage = Stage(plan.history(), Reporter(ledger, LedgerReader(plan.ledger)))
        self._interpreter = Interpreter(cast("World", stage), cast("Process", self))
        self.reporter = stage.laws

    async def handle(self, ctx: TaskContext, task: Task) -> object:
        self.attempts[task.task_id] = ctx.attempt
        self._ledger.tell("begin", task=[ctx.agent_id, task.task_id], attempt=ctx.attempt)
        witnessed = cast("TaskContext", WitnessedContext(ctx, self._ledger))
        return await self._interpreter.handle(witnessed, task)


# -- a client --------------------------------------------------------------------------------


class Client:
    """Asks for tasks and sends mail from outside, until each is acknowledged."""

    def __init__(
        self, plan: Plan, index: int, runtime: AsyncAgentSessionManager, ledger: LedgerWriter
    ) -> None:
        self._plan = plan
        self._index = index
        self._runtime = runtime
        self._ledger = ledger
        self._history = plan.history()
        self._open: list[tuple[str, str]] = []

    async def run(self) -> None:
        """Go on where the client before this one was killed."""
        asked: dict[int, float] = {}
        answered: set[int] = set()
        for line in LedgerReader(self._plan.ledger).lines():
            if line["is"] == "ask" and line["n"] % self._plan.servers == self._index:
                asked[line["n"]] = line["at"]
            elif line["is"] == "answer":
                answered.add(line["n"])
        for n in sorted(asked.keys() - answered):
            await self._ask(n, asked[n])
        n = max(asked, default=self._index - self._plan.servers)
        while not self._plan.quiet.exists():
            if len(self._open) < WINDOW:
                n += self._plan.servers
                began = time.time()
                self._ledger.tell("ask", n=n, at=began)
                await self._ask(n, began)
            else:
                await self._look()
            await asyncio.sleep(0.005)
        self._ledger.tell("told", index=self._index)

    async def _ask(self, n: int, began: float) -> None:
        """Ask until there is an answer, as long as the key certainly holds."""
        while time.time() < began + ASKING_SECONDS:
            random = Random(f"{self._plan.seed}/{n}")
            agent = random.choice(AGENTS)
            try:
                if random.random() < 0.3:
                    place = await self._send(n, agent)
                else:
                    place = await self._submit(n, agent, random.randrange(PROGRAMS))
            except TRIES_AGAIN as error:
                self._ledger.tell("refused", n=n, error=type(error).__name__)
                await asyncio.sleep(0.05)
            else:
                self._ledger.tell("answer", n=n, place=place)
                return

    async def _send(self, n: int, agent: str) -> list[Any]:
        sent = await self._runtime.mail.send(
            OUTSIDER, agent, subject=f"x{n}", dedupe_key=f"x{n}", dedupe_seconds=KEY_SECONDS
        )
        return ["mail", [agent, sent.message_id]]

    async def _submit(self, n: int, agent: str, number: int) -> list[Any]:
        program = self._history.programs[number]
        task = await self._runtime.tasks.submit(
            agent,
            "asked",
            {"p": number, "token": f"x{n}"},
            dedupe_key=f"x{n}",
            dedupe_seconds=KEY_SECONDS,
            max_attempts=program.max_attempts,
            timeout_seconds=TIMEOUT if program.timeout is not None else None,
        )
        self._open.append((agent, task.task_id))
        return ["tasks", [agent, task.task_id]]

    async def _look(self) -> None:
        with contextlib.suppress(*TRIES_AGAIN):
            done = [key for key in self._open if is_finished(await self._runtime.tasks.get(key))]
            self._open = [key for key in self._open if key not in done]


class Observer:
    """Says how many tasks are left, and once there are none, what their results are."""

    def __init__(
        self,
        plan: Plan,
        runtime: AsyncAgentSessionManager,
        ledger: LedgerWriter,
        reporter: Reporter,
    ) -> None:
        self._plan = plan
        self._runtime = runtime
        self._ledger = ledger
        self._reporter = reporter

    async def run(self) -> None:
        known = -1
        while True:
            await asyncio.sleep(0.1)
            if not self._plan.quiet.exists():
                continue
            with contextlib.suppress(*TRIES_AGAIN):
                tasks = [task for agent in AGENTS for task in await self._runtime.tasks.list(agent)]
                left = sum(not is_finished(task) for task in tasks)
                if left == 0 and known != 0:
                    await self._give_results(tasks)
                if left != known:
                    self._ledger.tell("left", tasks=left)
                known = left

    async def _give_results(self, tasks: list[Task]) -> None:
        for task in tasks:
            if task.status == "completed":
                self._reporter.returned(
                    task.task_id, "result", await self._runtime.tasks.result(task)
                )


class Janitor:
    """Archives whatever may be archived, again and again."""

    def __init__(self, runtime: AsyncAgentSessionManager, ledger: LedgerWriter) -> None:
        self._runtime = runtime
        self._ledger = ledger

    async def run(self) -> None:
        while True:
            await asyncio.sleep(0.7)
            with contextlib.suppress(*TRIES_AGAIN):
                report = await self._runtime.cleanup_old_states(0)
                self._ledger.tell("cleaned", documents=report.total)


# -- a server --------------------------------------------------------------------------------


def serve(plan: Plan, index: int, life: str) -> None:
    """Run a server until it is killed, or told to stop by SIGTERM."""
    log = os.open(f"{plan.folder}/{life}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", force=True)
    ledger = LedgerWriter(plan.ledger, life)
    try:
        asyncio.run(_serve(plan, index, ledger))
    except BaseException:  # noqa: BLE001  # the ledger tells the director
        ledger.tell("broken", error=traceback.format_exc())
        os._exit(1)
    ledger.tell("ended")


async def _serve(plan: Plan, index: int, ledger: LedgerWriter) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    handlers = Handlers(plan, ledger)
    runtime = await _started(plan, ledger, handlers, stop)
    if runtime is None:
        return
    try:
        if index == 0:
            for agent in AGENTS:
                await runtime.agents.create(agent, agent_type="worker")
        ledger.tell("up", index=index)
        client = Client(plan, index, runtime, ledger)
        observer = Observer(plan, runtime, ledger, handlers.reporter)
        async with asyncio.TaskGroup() as group:
            janitor = Janitor(runtime, ledger)
            work = [group.create_task(one.run()) for one in (client, observer, janitor)]
            await stop.wait()
            for task in work:
                task.cancel()
    finally:
        await _stop(runtime, ledger)


async def _started(
    plan: Plan, ledger: LedgerWriter, handlers: Handlers, stop: asyncio.Event
) -> AsyncAgentSessionManager | None:
    """A runtime that has started; a store in trouble is tried again."""
    while not stop.is_set():
        runtime = AsyncAgentSessionManager(
            store=witnessed_store(plan, ledger),
            exclusive=not plan.shared,
            lease_seconds=plan.lease_seconds,
            save_interval_seconds=0.5,
            grace_seconds=0.3,
            cancel_timeout_seconds=0.2,
            retry=RetryPolicy(base_seconds=0.01, max_seconds=0.2, max_interruptions=100_000),
        )
        runtime.handler("worker")(handlers.handle)
        try:
            report = await runtime.start()
        except TRIES_AGAIN as error:
            ledger.tell("not started", error=str(error))
            await asyncio.sleep(0.1)
        else:
            if report.failed:
                ledger.tell("not restored", agents=report.failed)
            return runtime
    return None


async def _stop(runtime: AsyncAgentSessionManager, ledger: LedgerWriter) -> None:
    """Stop in good order; a store in trouble may refuse the last saves."""
    try:
        await runtime.stop()
    except AgentStateError as error:
        if not isinstance(error, TRIES_AGAIN):
            raise
        ledger.tell("stopped badly", error=str(error))
