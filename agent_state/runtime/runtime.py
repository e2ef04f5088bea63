"""The runtime: restores agents at the start, runs them, and saves them as they work."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import random
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from os import PathLike
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from agent_state.cleanup import CleanupReport
from agent_state.clock import Backoff, Clock, IdFactory, SystemClock, check_duration, new_id, stamp
from agent_state.errors import AgentStateError
from agent_state.manager import StatePersistenceManager
from agent_state.protocols import (
    BodySealer,
    DistributedStore,
    Durability,
    Mirror,
    Observer,
    StateSerializer,
    StateStore,
    StateValidator,
    Telemetry,
)
from agent_state.runtime.agents import AgentService, cancel_and_wait
from agent_state.runtime.context import Handler, MailHandler, NamedHandler
from agent_state.runtime.copies import AgentCopies
from agent_state.runtime.handlers import (
    ON_MAIL,
    HandlerOptions,
    HandlerRegistry,
    RegisteredHandler,
    check_options,
)
from agent_state.runtime.hooks import TaskHook
from agent_state.runtime.live_agent import LiveAgent
from agent_state.runtime.mail import MailService
from agent_state.runtime.ownership import AgentOwnership
from agent_state.runtime.payloads import HandlerSignature, PayloadMigration
from agent_state.runtime.reconciler import OutsideChanges, Reconciler
from agent_state.runtime.recovery import RUNTIME, RestoreReader, RestoreReport
from agent_state.runtime.requests import LiveOperator, RequestService
from agent_state.runtime.runner import Runner
from agent_state.runtime.schedules import Scheduler, new_schedule
from agent_state.runtime.signals import StopSignals
from agent_state.runtime.sleep import SleepService
from agent_state.runtime.state import RuntimeState, logger
from agent_state.runtime.statistics import RuntimeStatistics
from agent_state.runtime.tasks import TaskService
from agent_state.runtime.transitions import RetryPolicy
from agent_state.storage.executor import shielded

H = TypeVar("H", bound=Handler)
T = TypeVar("T", bound=TaskHook)
R = TypeVar("R", bound=Callable[[RestoreReport], object])
M = TypeVar("M", bound=MailHandler)
N = TypeVar("N", bound=NamedHandler)

_SAMPLE_SECONDS = 10.0
"""How often telemetry is given the figures of the runtime."""
_RESTART_SECONDS, _RESTART_SECONDS_MAX = 1.0, 30.0
"""How long a service that failed pauses: after the first failure, and at most."""


class AsyncAgentSessionManager:
    """Runs agents and stores their state, tasks, mail and sleep.

    ``exclusive``: this process alone writes the directory (the default, and much faster);
    otherwise several runtimes may share it, each running the agents it owns.
    ``durability``, ``serializer``, ``validator``, ``mirror``, ``mirror_restores``, ``observer``
    ``encryption`` and ``history_window`` (of which up to twice as many messages are in memory) are
    as in ``StatePersistenceManager``; ``store`` replaces the files, and ``exclusive`` is then False
    if other runtimes write to it.
    ``telemetry``: follows tasks, steps and saves, such as ``agent_state.telemetry.OpenTelemetry``.
    ``lease_seconds``: how long the agents stay with a runtime that does not renew its heartbeat.
    ``save_interval_seconds``: the time between two checks that memory and store agree.
    ``grace_seconds``: how long running handlers may continue at a shutdown.
    ``cancel_timeout_seconds``: how long a cancelled handler may take to end before it is left
    running.
    ``retry``: how long failed tasks wait. ``clock``, ``new_id`` and ``random`` are the sources
    of time, ids and randomness; a store that several machines share brings its own clock.

    Used with ``async with``, with ``serve``, or between ``start`` and ``stop``. In the first two
    SIGTERM and SIGINT cancel what runs in the block, and the runtime stops in good order; unless
    the program has handlers of its own for them. ``AgentRuntime`` is another name of this class.
    """

    def __init__(
        self,
        state_dir: str | PathLike[str] | None = None,
        *,
        exclusive: bool = True,
        durability: Durability | None = None,
        serializer: StateSerializer | None = None,
        validator: StateValidator | None = None,
        store: StateStore | None = None,
        mirror: Mirror | None = None,
        mirror_restores: bool = False,
        observer: Observer | None = None,
        telemetry: Telemetry | None = None,
        encryption: BodySealer | None = None,
        history_window: int | None = None,
        clock: Clock | None = None,
        new_id: IdFactory = new_id,
        random: random.Random | None = None,
        retry: RetryPolicy | None = None,
        lease_seconds: float = 60.0,
        save_interval_seconds: float = 30.0,
        grace_seconds: float = 10.0,
        cancel_timeout_seconds: float = 5.0,
    ) -> None:
        check_duration("lease_seconds", lease_seconds)
        check_duration("save_interval_seconds", save_interval_seconds)
        check_duration("grace_seconds", grace_seconds)
        check_duration("cancel_timeout_seconds", cancel_timeout_seconds)
        if clock is None:
            clock = store.clock if isinstance(store, DistributedStore) else SystemClock()
        self.manager = StatePersistenceManager(
            state_dir,
            exclusive=exclusive and store is None,
            durability=durability,
            serializer=serializer,
            validator=validator,
            store=store,
            mirror=mirror,
            mirror_restores=mirror_restores,
            observer=observer,
            telemetry=telemetry,
            encryption=encryption,
            history_window=history_window,
            clock=clock,
        )
        self.state = RuntimeState(
            self.manager,
            owner=new_id(),
            clock=clock,
            new_id=new_id,
            random=random or _random(),
            retry=retry or RetryPolicy(),
            lease_seconds=lease_seconds,
            shared=not exclusive,
            telemetry=telemetry,
        )
        self.statistics = RuntimeStatistics(self.state)
        self._save_interval_seconds = save_interval_seconds
        self._grace_seconds = grace_seconds
        self._cancel_timeout_seconds = cancel_timeout_seconds
        self._handlers = HandlerRegistry()
        self._services: list[asyncio.Task[None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = 0
        self._stop_signals = StopSignals()
        self.report: RestoreReport | None = None
        """The report of the last start; None before the first."""
        self.restore_readers: list[RestoreReader] = []
        """Those who see what a start reads."""

        self._sleep = sleep = SleepService(self.state)
        self.mail = MailService(self.state, sleep)
        self.tasks = TaskService(self.state, self._handlers)
        self._scheduler = Scheduler(self.state, self.tasks)
        self.runner = Runner(
            self.state,
            sleep,
            self.mail,
            self.tasks,
            self._handlers,
            cancel_timeout_seconds=cancel_timeout_seconds,
        )
        self.ownership = None if exclusive else AgentOwnership(self.state)
        """This runtime's heartbeat and agents; None where one process owns the store."""
        waiters = self.tasks.waiters
        self._copies = AgentCopies(self.manager)
        self.agents = AgentService(
            self.state, sleep, self.runner, waiters, ownership=self.ownership, copies=self._copies
        )
        self.agents.on_obtained = self._scheduler.look_again
        self.reconciler = Reconciler(self.state, sleep, waiters, self.runner, self.agents)
        operator = LiveOperator(
            self.state, self.tasks, self.mail, self.agents, self.reconciler.notice
        )
        self._requests = RequestService(self.state, operator)

    def handler(self, agent_type: str, **options: Unpack[HandlerOptions]) -> Callable[[H], H]:
        """Register the coroutine function that does the tasks of all agents of a type.

        It is given those tasks that have no handler by name. The options are ``HandlerOptions``.
        Raises ``ValueError`` when the type has one, ``TypeError`` for a plain function,
        ``StateValidationError`` for an option that is out of range.
        """
        check_options(options)

        def register(function: H) -> H:
            self._register(agent_type, RegisteredHandler(function, **options))
            return function

        return register

    def task(
        self,
        name: str,
        *,
        agent_type: str,
        version: int = 1,
        migrations: Mapping[int, PayloadMigration] | None = None,
        **options: Unpack[HandlerOptions],
    ) -> Callable[[N], N]:
        """Register the coroutine function that does the tasks of one name, of agents of a type.

        Its second parameter is given the payload as the type that it is annotated with (anything
        that pydantic knows), or the task, if it is annotated with ``Task`` or not at all; it may
        be left out. The result is of the type that is annotated. ``version``: the version of the
        payload's layout. ``migrations``: by version, the function that takes such a payload, as
        JSON, and returns the next version's. The options are ``HandlerOptions``.

        Raises ``ValueError`` when these tasks have a handler or a migration leads nowhere,
        ``TypeError`` for a function that is none, or an annotation that is no type,
        ``StateValidationError`` for an option that is out of range.
        """
        check_options(options)
        frame = inspect.currentframe()
        names = frame.f_back.f_locals if frame is not None and frame.f_back is not None else {}

        def register(function: N) -> N:
            signature = HandlerSignature(function, version, migrations, names)
            self._register(agent_type, RegisteredHandler(function, signature, **options), name)
            return function

        return register

    def on_mail(self, agent_type: str, **options: Unpack[HandlerOptions]) -> Callable[[M], M]:
        """Register the coroutine function that handles the mail of all agents of a type.

        Each unread message becomes a task named ``on_mail``, which is retried, listed and reported
        as others are; its priority is the message's, unless the handler has one. The message is
        ``read`` from the beginning of the first attempt on. Raises as ``handler``.
        """
        check_options(options)

        def register(function: M) -> M:
            handler = RegisteredHandler(function, takes_mail=True, **options)
            self._register(agent_type, handler, ON_MAIL)
            return function

        return register

    def schedule(
        self, name: str, *, agent_id: str, cron: str, zone: str = "UTC", payload: object = None
    ) -> None:
        """Queue a task of that name for the agent at the times of a cron expression.

        ``zone``: the time zone in which the expression is read. ``payload``: that of each run.
        Give the same schedules at every start: the time of the last run is stored, and times that
        passed meanwhile are made up for by one run. Of several runtimes on one store one queues a
        run. A schedule begins at the first start that has it, or has it with this expression.

        Raises ``StateValidationError`` for what is no expression, or no zone, ``ValueError``
        when the agent has a schedule for that task, ``MissingExtraError`` without the extra
        ``cron``.
        """
        now = self.state.clock.now()
        self._scheduler.add(new_schedule(agent_id, name, cron, zone, payload, now=now))

    def _register(
        self, agent_type: str, handler: RegisteredHandler, name: str | None = None
    ) -> None:
        self._handlers.add(agent_type, handler, name=name)
        if not self.agents.started or self._loop is None:
            return
        if threading.get_ident() == self._thread:
            self._start_agents(agent_type)
        else:  # registered from another thread, as through `agent_state.sync`
            self._loop.call_soon_threadsafe(self._start_agents, agent_type)

    def _start_agents(self, agent_type: str) -> None:
        for agent in self.state.agents.values():
            if self.agents.started and agent.state.agent_type == agent_type:
                self.runner.start(agent)

    def on_failure(self, function: T) -> T:
        """Register a function ``(task, error)`` that is called after each failed attempt.

        Also after the last one. ``task``: a copy, as it is stored. A coroutine function runs
        beside the agents, a plain one in a thread; its error is logged and changes nothing.
        """
        self.state.hooks.add("failure", function)
        return function

    def on_dead(self, function: T) -> T:
        """Register a function ``(task, error)`` that is called when a task ends as dead.

        ``error`` is None when its process died too often. Otherwise as ``on_failure``.
        """
        self.state.hooks.add("dead", function)
        return function

    def on_restore(self, function: R) -> R:
        """Register a function ``(report)`` that is called once a start has restored everything.

        Otherwise as ``on_failure``.
        """
        self.state.hooks.add("restore", function)
        return function

    def register_as(self, other: AsyncAgentSessionManager) -> None:
        """Register the handlers, hooks and schedules that another runtime has.

        For tests: a program that is started again registers them again. Raises as ``handler``.
        """
        for agent_type, handler, name in other._handlers.registered():
            self._register(agent_type, handler, name)
        self.state.hooks.add_all(other.state.hooks)
        self._scheduler.add_all(other._scheduler)

    async def emit(self, event: str = "system_event", data: Mapping[str, Any] | None = None) -> int:
        """Record an event in the log ``system/events``, and wake the agents that wait for it.

        Returns how many woke. Raises ``RuntimeNotStartedError`` before the start.
        """
        self.state.check_running()
        return await self._sleep.emit(event, data or {})

    async def wait_idle(self) -> None:
        """Wait until no task runs, is due, or waits for its next attempt.

        Tasks that start later, of sleeping or stopped agents, and of agents without a handler
        are not waited for. Raises ``RuntimeNotStartedError`` before the start, and after a stop.
        """
        self.state.check_running()
        while True:
            self.state.check_not_aborted()
            self.state.activity.clear()
            now = self.state.clock.now()
            for agent in self.state.agents.values():
                if not agent.is_idle(now):
                    break
            else:
                return
            await self.state.activity.wait()

    # -- start and stop ----------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._stop_signals.catch()
        try:
            await self.start()
        except BaseException:
            self._stop_signals.release()
            raise
        self._stop_signals.interrupt_if_received()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        by_signal = self._stop_signals.leave(kind)
        try:
            await self.stop()
        finally:
            self._stop_signals.release()
        return by_signal or None

    async def start(self) -> RestoreReport:
        """Restore everything, then run. Twice is a no-op.

        An agent that cannot be restored is reported, and tried again later; the others run.
        """
        await self._leave_ended_loop()
        if self.agents.started and self.report is not None:
            return self.report
        self._begin()
        async with self.agents.before_start:
            await self.manager.open()
            self.state.running = True
        try:
            await self._copies.begin()
            # Watching begins before reading, so that every later change is noticed.
            notices = await self.manager.subscribe()
            if self.ownership is not None:
                await self.ownership.renew()
                keeping = partial(self.agents.keep_heartbeat, self.ownership)
                self._start_service("heartbeat", keeping)
            for reader in self.restore_readers:
                await reader.begin(self.manager)
            self.report = await self.agents.restore_all(self.restore_readers)
            await self._record_status("running")
        except BaseException:
            await shielded(self._undo_start())
            raise
        self._start_service("timers", self.runner.timers.run)
        self._start_service("schedules", self._scheduler.run)
        self._start_service("rate limits", self.runner.limiter.run)
        self._start_service("slow handlers", self.runner.report_slow)
        self._start_service("blocked loop", self.runner.monitor.watch_loop)
        self._start_service("check", self._check_forever)
        outside = OutsideChanges(self.manager, self.reconciler, self._requests, notices)
        self._start_service("watch", outside.run)
        self._start_service("requests", self._requests.run)
        if self.state.telemetry is not None:
            self._start_service("telemetry", partial(self._sample_forever, self.state.telemetry))
        if self.ownership is not None:
            self._start_service("takeover", partial(self.agents.take_over, self.ownership))
        self.agents.started = True
        for agent in self.state.agents.values():
            self.runner.start(agent)
        if self.report.failed:
            await self.agents.take_free()
        for line in self.report.lines():
            logger.info("%s", line)
        self.runner.report_handlerless(self.report.waiting)
        self.state.hooks.call("restore", self.report)
        return self.report

    def _begin(self) -> None:
        """Make what is bound to the event loop, which may be another one than the last time."""
        self._loop, self._thread = asyncio.get_running_loop(), threading.get_ident()
        self.state.stopping = self.state.aborted = False
        self.state.agents.clear()
        self.state.activity = asyncio.Event()
        self.runner.begin()
        self._scheduler.begin()
        self.agents.begin()
        self._requests.begin()
        if self.ownership is not None:
            self.ownership.begin()

    async def _leave_ended_loop(self) -> None:
        """Close what a loop that ended without ``stop`` has left open."""
        if self._services and self._loop is not asyncio.get_running_loop():
            logger.error("the event loop of this runtime ended before the runtime was stopped")
            self._services = []
            self.agents.started = self.state.running = False
            self.tasks.waiters.begin()
            await self._copies.close()
            await self.manager.close()

    async def _undo_start(self) -> None:
        await cancel_and_wait(self._services)
        self._services = []
        self.state.running = False
        self.state.agents.clear()
        try:
            if self.ownership is not None:
                await self.ownership.end()
        finally:
            await self._copies.close()
            await self.manager.close()

    def _start_service(self, name: str, service: Callable[[], Awaitable[None]]) -> None:
        task = asyncio.create_task(self._supervise(name, service), name=f"agent-state {name}")
        self._services.append(task)

    async def _supervise(self, name: str, service: Callable[[], Awaitable[None]]) -> None:
        """Run a service until it is cancelled; start it again when it ends by an error."""
        backoff = Backoff(_RESTART_SECONDS, _RESTART_SECONDS_MAX)
        while True:
            began = self.state.clock.monotonic()
            try:
                await service()
                logger.error("the service %r ended, and is started again", name)
            except Exception:  # noqa: BLE001  # the others, and the agents, go on
                logger.exception("the service %r failed, and is started again", name)
            if self.state.clock.monotonic() - began > _RESTART_SECONDS_MAX:
                backoff.reset()
            await self.state.clock.sleep(backoff.pause())

    async def _check_forever(self) -> None:
        while True:
            await self.state.clock.sleep(self._save_interval_seconds)
            try:
                await self.reconciler.check_some()
            except AgentStateError as error:
                logger.error("memory and store could not be compared: %s", error)
            if self.ownership is None:
                await self.agents.take_free()

    async def _sample_forever(self, telemetry: Telemetry) -> None:
        while True:
            telemetry.sampled(await self.statistics.metrics())
            await self.state.clock.sleep(_SAMPLE_SECONDS)

    async def stop(self) -> None:
        """Begin no task, give running handlers their grace, requeue the rest, save, close."""
        await self._leave_ended_loop()
        if not self._services:
            await self.manager.close()
            return
        self.state.stopping = True
        agents = list(self.state.agents.values())
        for agent in agents:
            agent.changed.set()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._grace_seconds):
                    await self.runner.wait_stopped()
            for agent in agents:
                agent.request_stop("shutdown")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2 * self._cancel_timeout_seconds):
                    await self.runner.wait_stopped()
        finally:
            await shielded(self._end(agents))

    async def _end(self, agents: Sequence[LiveAgent]) -> None:
        loops = [agent.loop for agent in agents if agent.loop is not None]
        await self.agents.end_taking()
        await cancel_and_wait([*loops, *self._services])
        await self.state.hooks.end(self._cancel_timeout_seconds)
        self._services = []
        self.agents.started = False
        try:
            async with contextlib.AsyncExitStack() as last:  # each, even if another one fails
                last.push_async_callback(self._record_status, "stopped")
                if self.ownership is not None:
                    last.push_async_callback(self.ownership.end)
                await self.agents.save_all(changed_only=True)
        finally:
            self.state.running = False
            await self._end_waits()
            self.state.agents.clear()
            await self._copies.close()
            await self.manager.close()

    async def _end_waits(self) -> None:
        """Let everybody go on who waits for a task, for changes, or for the end of the work."""
        self.tasks.waiters.notify_stopped()
        self.state.activity.set()
        await self.tasks.end_watches()

    async def abort(self) -> None:
        """Stop at once, as a killed process would: nothing is saved, requeued or closed.

        For tests of what a restart restores. Whoever waits for a task, for changes or for the end
        of the work gets an error.
        """
        self.state.aborted = True
        doomed = [*self.runner.abort(), *self.state.hooks.abort(), *self._services]
        self._services = []
        self.agents.started = self.state.running = False
        await self.agents.end_taking()
        await cancel_and_wait(doomed)
        await self._end_waits()
        await self._copies.close()

    async def serve(self) -> None:
        """Start, run until SIGTERM or SIGINT, and stop in good order."""
        async with self:
            await asyncio.Event().wait()

    async def _record_status(self, status: str) -> None:
        body = {"at": stamp(self.state.clock.now()), "owner": self.state.owner, "status": status}
        await self.manager.save_system_state(RUNTIME, body)

    # -- saving and restoring on demand ------------------------------------------------------

    async def save_session_state(self, agent_id: str) -> None:
        """Save one agent as it is now. Raises ``StateNotFoundError``."""
        await self.state.save(self.state.agent(agent_id), outside=True)

    async def save_all_session_states(self) -> int:
        """Save every agent that this runtime holds; return how many.

        One that cannot be saved does not prevent saving the others; the first error is raised
        at the end.
        """
        self.state.check_running()
        return await self.agents.save_all()

    async def restore_session_state(self, agent_id: str) -> bool:
        """Load an agent and run it; False when it does not exist, or is live already."""
        self.state.check_running()
        return await self.agents.restore(agent_id)

    async def restore_all_session_states(self) -> RestoreReport:
        """Load every agent that is not live yet, and run it; ``start`` does this."""
        self.state.check_running()
        return await self.agents.restore_all()

    async def cleanup_old_states(
        self, max_age_hours: float = 24, *, dead_letters: bool = False
    ) -> CleanupReport:
        """Move finished documents older than that into archive logs; dead tasks only if told.

        See ``StatePersistenceManager.cleanup_old_states``.
        """
        self.state.check_running()
        report = await self.manager.cleanup_old_states(max_age_hours, dead_letters=dead_letters)
        await self.agents.remove_archived(report.agents, report.mail)
        return report


AgentRuntime = AsyncAgentSessionManager
"""The same class, under the name that says what it does."""


def _random() -> random.Random:
    return random.Random()  # noqa: S311  # jitter, not secrets
