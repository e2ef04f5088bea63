"""Carries out one history, from the first start to the last look at the store."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import orjson
from cronsim import CronSim

from agent_state import (
    AgentStateError,
    FileStateStore,
    LeaseLostError,
    LockTimeoutError,
    RevisionConflictError,
    StateNotFoundError,
    StateStore,
    StorageError,
)
from agent_state.clock import instant, later
from agent_state.runtime.operations import StoredTasks
from agent_state.runtime.recovery import garbage_collection_paused
from agent_state.storage import executor
from tests.simulation.histories import Action, History
from tests.simulation.laws import FINISHED, LawBroken, Place
from tests.simulation.loop import InlineThreads, LoopClock, StalledError, VirtualLoop
from tests.simulation.store import (
    CRON,
    LEASE_SECONDS,
    BrokenStoreError,
    Process,
    World,
    as_json,
    memory_store,
)

LONGEST_CALL = 150.0
"""Seconds after which a start, a stop or another call that nothing disturbs has hung."""
LONGEST_END = 1500.0
"""Seconds after which everything is done, once nothing goes wrong any more."""
OF_THE_CALLER = (StorageError, LeaseLostError, LockTimeoutError, BrokenStoreError)
"""What a call may raise while the store, or its process, is in trouble."""
IDLE_SECONDS = 60.0
"""How long it is looked at what runtimes write that have nothing to do."""
LATE_SECONDS = 45.0
"""How late the run of a schedule may be, when nothing goes wrong any more."""
TROUBLED_SECONDS = 60.0
"""How long the history goes on after its last action, while there is work."""


@dataclass(slots=True)
class Outcome:
    """What came of a simulation."""

    broken: LawBroken | None
    commits: int
    """Commits that were made."""
    faults: int
    """Faults that befell one, and troubles that somebody made."""
    seconds: float
    """Simulated time."""
    trace: list[str] = field(default_factory=list)
    docs: dict[Any, Any] = field(default_factory=dict)


def simulate(history: History, *, tracing: bool = False) -> Outcome:
    """Run a history; the same one always ends the same."""
    with _quiet(), garbage_collection_paused(), _inner_store(history) as inner:
        loop = VirtualLoop()
        loop.set_exception_handler(lambda *_: None)
        world = World(history, inner)
        world.tracing = tracing
        driver = Driver(world)
        try:
            loop.run(driver.run())
            if history.two_loops and world.laws.broken is None:
                world.finished = False
                loop = VirtualLoop(loop.now)
                loop.set_exception_handler(lambda *_: None)
                loop.run(driver.run_again())
        except (StalledError, SystemExit) as error:
            world.laws.break_law_at("L6", f"the process ended: {error!r}", loop.now)
    return Outcome(
        broken=world.laws.broken,
        commits=world.laws.committed_count,
        faults=world.faults,
        seconds=loop.now,
        trace=world.trace,
        docs=world.laws.docs,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _inner_store(history: History) -> Iterator[Callable[[LoopClock], StateStore]]:
    if not history.files:
        yield memory_store
        return
    memory = Path("/dev/shm")
    root = tempfile.mkdtemp(prefix="simulated-", dir=memory if memory.is_dir() else None)
    stores: list[FileStateStore] = []

    def new_store(clock: LoopClock) -> FileStateStore:
        stores.append(FileStateStore(root, durability="os", clock=clock))
        return stores[-1]

    try:
        with patch.object(executor, "WorkerThreads", InlineThreads):
            yield new_store
    finally:
        for store in stores:
            store._release()  # the descriptors of processes that died
        shutil.rmtree(root, ignore_errors=True)


class ProcessDiedError(Exception):
    """The process that was called has died, and the call never returns."""


class Driver:
    """Starts processes, does what the history says, and waits for the end."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._history = world.history
        self._laws = world.laws
        self._clock = world.clock
        self._submitted: list[tuple[str, str]] = []
        self._background: set[asyncio.Task[Any]] = set()
        self._actions: set[asyncio.Task[Any]] = set()
        self._restarts: set[asyncio.Task[Any]] = set()

    async def run(self) -> None:
        """The whole history, or until a law is broken."""
        await self._until_broken(self._run())

    async def run_again(self) -> None:
        """The same runtime objects, in a new event loop."""
        await self._until_broken(self._run_again())

    async def _until_broken(self, work: Awaitable[None]) -> None:
        broken = asyncio.Event()
        self._laws.on_break = broken.set
        main = asyncio.ensure_future(work)
        waiting = asyncio.ensure_future(broken.wait())
        await asyncio.wait({main, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        self._world.finished = True
        if main.done() and not main.cancelled() and (error := main.exception()) is not None:
            self._laws.break_law("L6", f"a call failed with {error!r}")

    async def _run(self) -> None:
        world = self._world
        await world.inner.open()
        first = await self._new_process()
        for agent in self._history.agents:
            await first.runtime.agents.create(agent, agent_type="worker")
        for _ in range(1, self._history.processes):
            await self._new_process()
        world.armed = True
        began = self._clock.monotonic()
        self._start(self._revive(), self._background)
        for action in self._history.actions:
            among = self._restarts if action.kind == "restart" else self._actions
            self._start(self._act(began + action.at, action), among)
        last = max((action.at for action in self._history.actions), default=0.0)
        await self._sleep_until(began + last + 0.5)
        end = self._clock.monotonic() + TROUBLED_SECONDS
        while self._clock.monotonic() < end and (self._laws.unfinished() or world.crashed):
            await self._clock.sleep(2.0)
        await self._end()

    async def _sleep_until(self, moment: float) -> None:
        await self._clock.sleep(moment - self._clock.monotonic())

    def _start(self, work: Any, among: set[asyncio.Task[Any]]) -> None:
        task = asyncio.ensure_future(work)
        among.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._background.discard(task)
        self._actions.discard(task)
        self._restarts.discard(task)
        if not task.cancelled() and task.exception() is not None:
            error = task.exception()
            self._laws.break_law("L6", f"a call failed with {error!r}")

    # -- processes

    async def _new_process(self) -> Process:
        process = self._world.new_process()
        await self._start_runtime(process)
        return process

    async def _start_runtime(self, process: Process) -> None:
        world = self._world
        while process.state == "new":
            try:
                report = await self._in_time(process, process.runtime.start(), "start")
            except ProcessDiedError:
                return
            except (StorageError, BrokenStoreError) as error:
                world.tell(f"{process.name} does not start: {error}")
                await self._clock.sleep(1.0)
                process.runtime = process.new_runtime()
                continue
            except AgentStateError as error:
                self._laws.break_law(
                    "L6", f"start() of {process.name} failed as a whole: {error!r}"
                )
                return
            if process.state == "new":
                process.state = "up"
                world.troubled_at = self._clock.monotonic()
            stored = {a for a in self._history.agents if ("agents", (a,)) in self._laws.docs}
            missing = sorted(stored.difference(report.agents, report.failed))
            if missing:
                self._laws.break_law("L6", f"start() of {process.name} says nothing of {missing}")
            world.tell(f"{process.name} is up as {process.owner}: {report.lines()[0]}")

    async def _in_time(self, process: Process, call: Awaitable[Any], name: str) -> Any:
        """Await a call; it hangs if it takes longer than anything that befalls the process."""
        task = asyncio.ensure_future(call)
        waited = 0.0
        while not task.done() and process.alive:
            await asyncio.wait({task}, timeout=10.0)
            if process.running.is_set() and not self._world.is_away():
                waited += 10.0
            if waited > LONGEST_CALL and not task.done():
                self._laws.break_law("L6", f"{name} of {process.name} hangs")
                break
        if not task.done():
            task.cancel()
            raise ProcessDiedError
        return task.result()

    async def _stop(self, process: Process) -> None:
        if process.state != "up":
            return
        process.state = "stopping"
        self._world.tell(f"{process.name} stops")
        try:
            await self._in_time(process, process.runtime.stop(), "stop")
        except ProcessDiedError:
            return
        except (AgentStateError, BrokenStoreError) as error:
            self._world.tell(f"{process.name} stopped with {error!r}")
        if process.state == "stopping":
            process.state = "down"
            process.store.close_streams()

    async def _revive(self) -> None:
        """Start another process some time after one has died."""
        world = self._world
        while True:
            while world.crashed:
                _, seconds = world.crashed[0]
                await self._clock.sleep(seconds if world.armed else 0.5)
                world.crashed.pop(0)
                if not world.over or not self._up():
                    await self._new_process()
            world.changed.clear()
            await world.changed.wait()

    def _up(self) -> list[Process]:
        return [process for process in self._world.processes if process.state == "up"]

    async def _process(self, index: int) -> Process | None:
        """The process of that number, or another one that runs; None if none does for long."""
        for _ in range(100):
            up = [process for process in self._up() if process.running.is_set()]
            if up:
                return up[index % len(up)]
            await self._clock.sleep(1.0)
        return None

    # -- the end

    async def _end(self) -> None:
        world = self._world
        world.tell("the history is over, and nothing goes wrong any more")
        world.over = True
        world.calm()
        stay = self._history.leave_paused and any(p.running.is_set() for p in self._up())
        for process in world.processes:
            if not stay or process.state != "up":  # one that starts is waited for
                process.running.set()
        if self._actions:
            for task in self._actions:
                task.cancel()
            await asyncio.wait(self._actions, timeout=20.0)  # one may be of a process that stays so
        if self._restarts:
            await asyncio.wait(self._restarts, timeout=2 * LONGEST_CALL)
        began = self._clock.monotonic()
        help_at = began
        while True:
            if self._clock.monotonic() > began + LONGEST_END:
                self._laws.break_law("L6", "not done: " + "; ".join(self._laws.unfinished()))
                return
            if not world.crashed and self._up():
                if not self._laws.unfinished() and not self._is_schedule_disturbed():
                    break
                if self._clock.monotonic() >= help_at:
                    await self._help()
                    help_at = self._clock.monotonic() + 60.0
            await self._clock.sleep(3.0)
        await self._last_look()

    async def _help(self) -> None:
        """What sleeps without an end, or was stopped, goes on when it is asked to."""
        for agent in self._history.agents:
            body = self._laws.docs.get(("agents", (agent,)), {})
            if str(body.get("status")).lower() == "stopped":
                await self._edit(agent, status="idle")
        await self._clock.sleep(8.0)
        for agent in self._history.agents:
            sleep = self._laws.docs.get(("sleep", (agent,)), {})
            process = self._owner(agent)
            until = sleep.get("sleep_until")
            soon = until and instant(until) < later(self._clock.now(), LONGEST_END / 2)
            if process is None or not sleep.get("is_sleeping") or soon:
                continue
            events = sleep.get("wake_events", ())
            self._world.tell(f"{agent} is to wake")
            self._laws.touched.update(self._history.agents)
            if "mail_received" in events:
                await process.runtime.mail.send(
                    "zoe", agent, subject=f"wake {self._world.new_id()}"
                )
            elif "system_event" in events:
                await process.runtime.emit()
            else:
                await process.runtime.agents.wake(agent)

    def _owner(self, agent: str) -> Process | None:
        """The running process that has the agent."""
        up = [process for process in self._up() if process.running.is_set()]
        if not self._history.shared:
            return up[0] if up else None
        owner = self._laws.owner_of(agent)
        return next((process for process in up if process.owner == owner), None)

    async def _idle(self) -> None:
        """With nothing to do, a runtime writes its heartbeat and nothing else."""
        sleepers = sum(kind == "sleep" for kind, _ in self._laws.docs)  # who may wake meanwhile
        before = self._laws.committed_count + sleepers
        await self._clock.sleep(IDLE_SECONDS)
        commits = self._laws.committed_count - before
        beats = IDLE_SECONDS / (LEASE_SECONDS / 3) + 1 if self._history.shared else 0
        taken = len(self._history.agents) if self._history.shared else 0  # from who has died
        if commits > beats * len(self._up()) + taken:
            self._laws.break_law("L6", f"{commits} commits in {IDLE_SECONDS:g} s without work")

    async def _last_look(self) -> None:
        self._laws.check_all()
        if self._history.second_look:
            await self._clock.sleep(5.0)  # one that just starts has more to write, others to hear
            if not self._history.scheduled:
                await self._idle()
            for agent in self._history.agents:
                self._compare_memory(agent)
        for process in self._up():
            if process.running.is_set():
                await self._results(process)
                await self._stop(process)
        self._laws.check_all()
        if self._history.second_look:
            process = await self._new_process()
            await self._results(process)
            await self._stop(process)
        await self._compare_store()
        self._check_schedule()

    def _is_schedule_disturbed(self) -> bool:
        """Whether a run may still be late."""
        since = max(self._laws.undisturbed_since, self._world.troubled_at)
        return self._history.scheduled and self._clock.monotonic() < since + LATE_SECONDS

    def _check_schedule(self) -> None:
        """The last run that was due is there, if the agent is."""
        agent, now = self._history.agents[0], self._clock.now()
        last = ("system", ("schedules", agent, "tick"))
        known = self._laws.docs.get(last)
        if known is None or ("agents", (agent,)) not in self._laws.docs:
            return
        if self._is_schedule_disturbed():
            return
        due = next(CronSim(CRON, now - timedelta(seconds=LATE_SECONDS), reverse=True))
        if instant(str(known["last_run"])) < due:
            self._laws.break_law("L6", f"the run of {due} was not queued: {known}")

    async def _results(self, process: Process) -> None:
        for key in self._submitted:
            body = self._laws.docs.get(("tasks", key)) or self._laws.archived.get(("tasks", key))
            deleted = ("tasks", key) in self._laws.deleted
            if body is not None and body.get("status") == "completed" and not deleted:
                with contextlib.suppress(StorageError):
                    value = await self._in_time(
                        process, process.runtime.tasks.result(key), "result"
                    )
                    self._laws.returned(key[1], "result", value)

    def _compare_memory(self, agent: str) -> None:
        """The owner of an agent shows it, and its mail, as they are stored."""
        process = self._owner(agent)
        stored = self._laws.docs.get(("agents", (agent,)))
        if process is None or stored is None:
            return
        shown = process.runtime.agents.get(agent).model_dump()
        for name in ("configuration", "context"):
            if shown.get(name) != stored.get(name):
                what = f"{name} {shown.get(name)}, and {stored.get(name)} is stored"
                self._laws.break_law("L3", f"{process.name} shows of {agent} the {what}")
        unread = {message.message_id for message in process.runtime.mail.inbox(agent)}
        waiting = {
            key[1]
            for kind, key in self._laws.mail[agent]
            if self._laws.docs.get((kind, key), {}).get("status") == "unread"
        }
        if unread != waiting:
            what = f"{sorted(unread)}, and {sorted(waiting)} is stored"
            self._laws.break_law("L3", f"{process.name} shows as unread mail of {agent} {what}")

    async def _compare_store(self) -> None:
        """The store itself, opened anew, has what was observed."""
        store = self._world.inner
        for (kind, key), body in self._laws.docs.items():
            document = await store.get(kind, key)
            if document is None or orjson.loads(document.body) != body:
                self._laws.break_law(
                    "L3", f"{kind}/{'/'.join(key)} is not in the store as it was committed"
                )
        if self._history.files:
            await store.close()

    async def _run_again(self) -> None:
        """Start the last runtimes again; what is due later must be done."""
        world = self._world
        agents = [a for a in self._history.agents if ("agents", (a,)) in self._laws.docs]
        if not agents:
            return  # cleaning up has archived them all
        agent = agents[0]
        process = next(p for p in reversed(world.processes) if p.state == "down")
        process.running = asyncio.Event()
        process.running.set()
        process.state = "new"
        owner = self._laws.owner_of(agent)
        if owner not in (None, process.owner) and self._laws.is_valid(str(owner)):
            return  # it stays with a thief for a while
        world.enter_loop()
        if self._history.files:
            await world.inner.open()
        await self._start_runtime(process)
        await process.runtime.tasks.submit(
            agent, "again", {"p": -1, "token": "again"}, delay_seconds=40.0
        )
        began = self._clock.monotonic()
        place = next(
            p
            for p in sorted(self._laws.tasks[agent])
            if self._laws.docs.get(p, {}).get("name") == "again"
        )
        stopped = str(self._laws.docs["agents", (agent,)].get("status")).lower() == "stopped"
        while self._laws.docs[place]["status"] not in FINISHED and not stopped:
            if self._clock.monotonic() > began + 50.0:
                self._laws.break_law("L6", "in a second event loop, a delayed task is late")
                return
            await self._clock.sleep(5.0)
        await self._stop(process)

    # -- actions

    async def _act(self, moment: float, action: Action) -> None:
        await self._sleep_until(moment)
        self._world.tell(f"action: {str(action)[12:]}")
        self._world.faults += action.kind not in ("submit", "send", "emit", "wake", "start", "idle")
        process = await self._process(action.process)
        if process is None:
            return
        # What a call raises while the store is in trouble, or its process, is the caller's.
        with contextlib.suppress(*OF_THE_CALLER):
            try:
                await getattr(self, f"_do_{action.kind}")(process, action)
            except AgentStateError:
                if process.state == "up" and not self._is_gone(("agents", (action.agent,))):
                    raise

    async def _do_submit(self, process: Process, action: Action) -> None:
        program, key, token, name = action.program, None, f"x{self._world.new_id()}", "task"
        if action.key:
            # The same key means the same content.
            program = sum(map(ord, action.key)) % len(self._history.programs)
            key, name = action.key, f"task-{action.sender}"
            token = f"{action.agent} {name} {key}"
        drawn = self._history.programs[program]

        async def submit(process: Process) -> None:
            task = await process.runtime.tasks.submit(
                action.agent,
                name,
                {"p": program, "token": token},
                delay_seconds=0.0 if action.key else action.seconds,
                max_attempts=drawn.max_attempts,
                timeout_seconds=drawn.timeout,
                dedupe_key=key,
            )
            if not self._laws.created("task", token):
                self._laws.break_law("L4", f"the task {token!r} was accepted and is not there")
            self._submitted.append((task.agent_id, task.task_id))
            self._start(self._await_result(process, task.agent_id, task.task_id), self._background)

        await self._tried(process, action, submit)

    async def _tried(
        self, process: Process, action: Action, call: Callable[[Process], Awaitable[None]]
    ) -> None:
        """With a key, a caller tries until it has an answer; without one, once."""
        for _ in range(30):
            try:
                await call(process)
                return
            except (StorageError, BrokenStoreError):
                if not action.key:
                    return
            await self._clock.sleep(2.0)
            if not process.alive:
                return

    async def _await_result(self, process: Process, agent: str, task_id: str) -> None:
        with contextlib.suppress(AgentStateError, BrokenStoreError):
            value = await process.runtime.tasks.result((agent, task_id))
            self._laws.returned(task_id, "result", value)

    async def _do_send(self, process: Process, action: Action) -> None:
        token = f"x{self._world.new_id()}"
        if action.key:
            token = f"{action.sender} {action.agent} {action.key}"

        async def send(process: Process) -> None:
            await process.runtime.mail.send(
                action.sender,
                action.agent,
                subject=token,
                priority="high" if action.how == "high" and not action.key else "normal",
                dedupe_key=action.key or None,
            )
            if not self._laws.created("mail", token):
                self._laws.break_law("L4", f"the message {token!r} was accepted and is not there")

        await self._tried(process, action, send)

    async def _do_cancel(self, process: Process, action: Action) -> None:
        if action.program < len(self._submitted):
            key = self._submitted[action.program]
            self._laws.cancels.add(("tasks", key))
            try:
                await process.runtime.tasks.cancel(key)
            except StateNotFoundError:
                if not self._is_gone(("agents", key[:1]), ("tasks", key)):
                    raise

    async def _do_retry(self, process: Process, action: Action) -> None:
        await self._operate(process, action, self._laws.retries, process.runtime.tasks.retry)

    async def _do_delete(self, process: Process, action: Action) -> None:
        await self._operate(process, action, self._laws.deletes, process.runtime.tasks.delete)

    async def _do_discard(self, process: Process, action: Action) -> None:
        """Cancel a task and delete it at once; where several share the store, from outside."""
        stored = StoredTasks(process.runtime.manager, process.clock)

        async def cancel(key: tuple[str, str]) -> bool:
            if self._history.shared:
                return (await stored.apply("cancel", key)).changed
            return await process.runtime.tasks.cancel(key)

        async def delete(key: tuple[str, str]) -> bool:
            if self._history.shared:
                return (await stored.apply("delete", key)).changed
            return await process.runtime.tasks.delete(key)

        await self._operate(process, action, self._laws.cancels, cancel)
        await self._operate(process, action, self._laws.deletes, delete)

    async def _operate(
        self,
        process: Process,
        action: Action,
        noted: set[tuple[str, Any]],
        change: Callable[[tuple[str, str]], Awaitable[bool]],
    ) -> None:
        """Do something with a task, if it was submitted once, without a key."""
        if action.program >= len(self._submitted):
            return
        key = self._submitted[action.program]
        body = self._laws.docs.get(("tasks", key), {})
        if body and not body.get("dedupe_key"):
            noted.add(("tasks", key))
            with contextlib.suppress(StateNotFoundError):  # it is archived, or deleted
                await change(key)

    def _is_gone(self, *places: Place) -> bool:
        """Whether an agent or a task of a call was archived or deleted."""
        return any(key[0] and (kind, key) not in self._laws.docs for kind, key in places)

    async def _do_stop(self, process: Process, action: Action) -> None:
        self._laws.touched.add(action.agent)
        with contextlib.suppress(RevisionConflictError):  # somebody edits the file, with no lock
            await process.runtime.agents.stop(action.agent)

    async def _do_start(self, process: Process, action: Action) -> None:
        self._laws.touched.add(action.agent)
        with contextlib.suppress(RevisionConflictError):
            await process.runtime.agents.start(action.agent)

    async def _do_sleep(self, process: Process, action: Action) -> None:
        self._laws.touched.add(action.agent)
        await process.runtime.agents.sleep(action.agent, seconds=action.seconds)

    async def _do_wake(self, process: Process, action: Action) -> None:
        self._laws.touched.add(action.agent)
        await process.runtime.agents.wake(action.agent)

    async def _do_emit(self, process: Process, action: Action) -> None:
        self._laws.touched.update(self._history.agents)
        await process.runtime.emit("system_event")

    async def _do_cleanup(self, process: Process, action: Action) -> None:
        await process.runtime.cleanup_old_states(0.0)

    async def _do_crash(self, process: Process, action: Action) -> None:
        self._world.crash(process, action.seconds)

    async def _do_pause(self, process: Process, action: Action) -> None:
        self._world.pause(process, action.seconds)

    async def _do_restart(self, process: Process, action: Action) -> None:
        await self._stop(process)
        if process.state == "down":
            await self._new_process()

    async def _do_outage(self, process: Process, action: Action) -> None:
        self._world.go_away(action.seconds)

    async def _do_deafen(self, process: Process, action: Action) -> None:
        process.store.deaf = True

    async def _do_restore(self, process: Process, action: Action) -> None:
        report = await process.runtime.restore_all_session_states()
        if report.after_crash and process.state == "up":
            self._laws.break_law("L6", f"{process.name} runs, and restoring says it crashed")

    async def _do_idle(self, process: Process, action: Action) -> None:
        await process.runtime.wait_idle()
        now = self._clock.now()
        for agent in self._history.agents:
            owner = self._laws.owner_of(agent)
            live = process.runtime.state.agents.get(agent)
            if process.state != "up" or live is None or self._rests(agent):
                continue
            if live.state.status == "stopped":
                continue  # the reply of its start was lost: the next check sees that it was made
            lately = self._laws.undisturbed_since + LEASE_SECONDS > self._clock.monotonic()
            if lately and live.owner is not None:
                continue  # so it was when the store could be asked last
            if owner not in (None, process.owner) and (lately or self._laws.is_valid(str(owner))):
                continue  # another one has it, or seemed to when the store was asked last
            known = {("tasks", (agent, task_id)) for task_id in live.tasks}
            for place in sorted(known & self._laws.tasks[agent]):
                task = self._laws.docs.get(place, {})
                if task.get("waits_for"):
                    continue
                due = task.get("not_before") or task.get("created_at")
                if task.get("status") in ("pending", "failed") and instant(str(due)) < later(
                    now, -10.0
                ):
                    self._laws.break_law(
                        "L6", f"wait_idle() of {process.name} returned, and {place[1]} is due"
                    )

    def _rests(self, agent: str) -> bool:
        status = self._laws.docs.get(("agents", (agent,)), {}).get("status", "stopped")
        return str(status).lower() == "stopped" or ("sleep", (agent,)) in self._laws.docs

    async def _do_edit(self, process: Process, action: Action) -> None:
        agent = action.agent
        if action.how == "memory":
            body = self._laws.docs.get(("agents", (agent,)), {})
            context = body.get("context", {})
            memory = {**context.get("working_memory", {}), "hand": self._clock.monotonic()}
            await self._edit(agent, context={**context, "working_memory": memory})
        elif action.how == "STOPPED":
            await self._edit(agent, status="STOPPED")
        elif action.how == "damage":
            await self._world.edit("agents", ("dan",), b'{"agent_id":5}')
        else:
            for place in sorted(self._laws.tasks[agent]):
                task = self._laws.docs.get(place, {})
                if task.get("status") in ("pending", "failed"):
                    await self._world.edit(*place, as_json({**task, "priority": "high"}))
                    return

    async def _edit(self, agent: str, **changes: Any) -> None:
        body = self._laws.docs.get(("agents", (agent,)))
        if body is not None:
            await self._world.edit("agents", (agent,), as_json({**body, **changes}))

    async def _do_steal(self, process: Process, action: Action) -> None:
        await self._world.steal(action.agent, action.seconds)
