"""Admits attempts: not more at once, and not more within a period, than handlers may make.

What is used of a rate limit is stored in ``system/limits/<name>`` before it is granted, by
compare-and-set: so a kill forgets none of it, and runtimes that share a store share the limit.
Those that wait are served by the priority and age of their tasks.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

from agent_state.errors import AgentStateError, Key, RevisionConflictError, StateValidationError
from agent_state.runtime import transitions
from agent_state.runtime.handlers import RegisteredHandler
from agent_state.runtime.rate_limits import RateLimit, UsageWindow
from agent_state.runtime.state import LiveAgent, LiveTask, RuntimeState, logger

LIMITS = "limits"
"""Below ``system``: what was used of each rate limit in its last period."""

_RETRY_SECONDS = 1.0
"""The wait while the store refuses to store what is used."""
_MAX_PAUSE_SECONDS = 30.0
"""How long to wait at most: the wall clock may jump."""

_FIRST = (-math.inf, "", "")

Place = tuple[tuple[float, str, str], int]
"""The place of a request in the queue: that of its task, and its number."""


@dataclass(order=True, slots=True)
class QuotaRequest:
    """A request to use an amount of a limit."""

    place: Place
    amount: float = field(compare=False)
    waits: bool = field(compare=False)
    """False: it was used already, and only has to be stored."""
    granted: Callable[[], None] = field(compare=False)
    withdrawn: bool = field(default=False, compare=False)


class QuotaLedger:
    """What this runtime knows of the use of one limit, and those that wait to use it."""

    def __init__(self, state: RuntimeState, limit: RateLimit) -> None:
        self._state = state
        self.limit = limit
        self.waiting: list[QuotaRequest] = []
        self._window: UsageWindow | None = None
        """None while it is to be read from the store."""
        self._revision = 0

    @property
    def _key(self) -> Key:
        return (LIMITS, self.limit.name)

    async def grant(self) -> float | None:
        """Grant what may be used now; return when to look again, None if nobody waits."""
        while self.waiting:
            window = self._window or await self._read()
            granted, seconds = self._choose(window)
            if not granted:
                return seconds
            body = {
                "amount": self.limit.amount,
                "per_seconds": self.limit.per_seconds,
                "used": window.to_json(),
            }
            try:
                self._revision = await self._state.manager.save(
                    "system", self._key, body, expected=self._revision
                )
            except BaseException as error:
                # It is read again; what was stored all the same counts as used.
                self._window = None
                for request in granted:
                    heapq.heappush(self.waiting, request)
                if isinstance(error, RevisionConflictError):
                    continue  # another runtime has used some
                raise
            for request in granted:
                request.granted()
        return None

    async def _read(self) -> UsageWindow:
        stored = await self._state.manager.load_with_revision("system", self._key)
        used = stored.state.model_dump().get("used") if stored is not None else None
        self._revision = stored.revision if stored is not None else 0
        self._window = UsageWindow(self.limit, used if isinstance(used, dict) else None)
        return self._window

    def _choose(self, window: UsageWindow) -> tuple[list[QuotaRequest], float | None]:
        """Count what is granted now, in order; return it, and when the next one may be."""
        now, granted = self._state.clock.now(), list[QuotaRequest]()
        while self.waiting:
            request = self.waiting[0]
            seconds = window.wait_seconds(request.amount, now) if request.waits else 0.0
            if seconds and not request.withdrawn:
                return granted, seconds  # it is not overtaken by one that needs less
            heapq.heappop(self.waiting)
            if not request.withdrawn:
                window.use(request.amount, now)
                granted.append(request)
        return granted, None


class Admission:
    """What one agent has been granted of rate limits, for its next attempt of a handler."""

    def __init__(self) -> None:
        self.granted: set[str] = set()
        self.requested: set[str] = set()
        self.names: set[str] = set()
        """The names of the tasks that wait for it."""

    def grant(self, limit: str, agent: LiveAgent) -> None:
        """Note that one call was granted; with the last one, the agent may look."""
        self.requested.discard(limit)
        self.granted.add(limit)
        if not self.requested:
            agent.unblock(*self.names)
            self.names.clear()


class ConcurrencyGate:
    """How many attempts of one handler run, and the agents that wait to make one."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._running = 0
        self._waiting: list[tuple[Place, LiveAgent, str]] = []

    def enter(self, agent: LiveAgent, live: LiveTask, number: int) -> bool:
        """Begin an attempt, unless as many run as may; then the agent is woken later."""
        if self._running < self._most:
            self._running += 1
            return True
        place = (transitions.order(live.task), number)
        heapq.heappush(self._waiting, (place, agent, live.task.name))
        return False

    def leave(self) -> None:
        """End an attempt."""
        self._running -= 1
        self.wake()

    def wake(self) -> None:
        """Let the next agent that is free look, if an attempt may begin.

        It calls this again once it has looked, because it may have found something else to do.
        """
        while self._waiting and self._running < self._most:
            _, agent, name = heapq.heappop(self._waiting)
            agent.unblock(name)
            if agent.leased and agent.loop is not None and agent.stop_request is None:
                agent.wakers.append(self.wake)
                return


class AttemptLimiter:
    """Decides whether an attempt may begin, for one runtime."""

    def __init__(self, state: RuntimeState) -> None:
        self._state = state
        self._numbers = count()
        self.begin()

    def begin(self) -> None:
        """Forget the life before a start; what is bound to an event loop is made here."""
        self._ledgers: dict[str, QuotaLedger] = {}
        self._gates: dict[int, ConcurrencyGate] = {}
        self._admissions: dict[tuple[str, int], Admission] = {}
        """By agent and handler."""
        self._requested = asyncio.Event()
        self._refused = ""

    async def run(self) -> None:
        """Grant what is requested of rate limits, until cancelled."""
        clock = self._state.clock
        while True:
            self._requested.clear()
            pauses = [await self._grant(ledger) for ledger in [*self._ledgers.values()]]
            waits: list[asyncio.Future[Any]] = [asyncio.ensure_future(self._requested.wait())]
            seconds = min((pause for pause in pauses if pause is not None), default=None)
            if seconds is not None:
                pause = min(seconds, _MAX_PAUSE_SECONDS)
                waits.append(asyncio.ensure_future(clock.sleep(pause)))
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for each in waits:
                    each.cancel()

    async def _grant(self, ledger: QuotaLedger) -> float | None:
        try:
            return await ledger.grant()
        except AgentStateError as error:
            if self._refused != str(error):  # it is tried often
                logger.error("the rate limit %r stands still: %s", ledger.limit.name, error)
            self._refused = str(error)
            return _RETRY_SECONDS

    # -- attempts ----------------------------------------------------------------------------

    def admit(self, agent: LiveAgent, live: LiveTask, handler: RegisteredHandler) -> bool:
        """Whether the attempt may begin; if not, tasks of its name wait until it may."""
        key, name = (agent.agent_id, id(handler)), live.task.name
        if handler.rate_limits:
            admission = self._admissions.setdefault(key, Admission())
            for limit in handler.rate_limits:
                if limit.name not in admission.granted | admission.requested:
                    admission.requested.add(limit.name)
                    granted = partial(admission.grant, limit.name, agent)
                    self._request(limit, 1, live, granted)
            if admission.requested:
                admission.names.add(name)
                agent.block(name, for_a_while=True)
                return False
        if handler.concurrency is not None:
            gate = self._gates.setdefault(id(handler), ConcurrencyGate(handler.concurrency))
            if not gate.enter(agent, live, next(self._numbers)):
                agent.block(name, for_a_while=True)
                return False
        self._admissions.pop(key, None)
        return True

    def end(self, handler: RegisteredHandler) -> None:
        """Count the end of an attempt that was admitted."""
        gate = self._gates.get(id(handler))
        if gate is not None:
            gate.leave()

    def wake_all(self) -> None:
        """Let agents look that wait to make an attempt, where one may begin."""
        for gate in self._gates.values():
            gate.wake()

    # -- handlers ----------------------------------------------------------------------------

    async def take(
        self, limit: RateLimit, amount: float, live: LiveTask, *, wait: bool = True
    ) -> None:
        """Wait until so much of the limit may be used, and count it.

        ``wait=False``: it was used already. Raises ``StateValidationError`` for more than the
        limit, or for what is no amount.
        """
        number = isinstance(amount, int | float) and abs(amount) < math.inf
        if not number or (wait and not 0 < amount <= limit.amount):
            raise StateValidationError(
                f"{amount!r} of {limit.name!r}, of which {limit.amount:g} may be used in a period"
            )
        granted = asyncio.get_running_loop().create_future()

        def grant() -> None:
            if not granted.done():
                granted.set_result(None)

        request = self._request(limit, amount, live, grant, waits=wait)
        try:
            await granted
        finally:
            request.withdrawn = True

    def _request(
        self,
        limit: RateLimit,
        amount: float,
        live: LiveTask,
        granted: Callable[[], None],
        *,
        waits: bool = True,
    ) -> QuotaRequest:
        ledger = self._ledgers.setdefault(limit.name, QuotaLedger(self._state, limit))
        if ledger.limit != limit:
            raise StateValidationError(f"there are two rate limits named {limit.name!r}")
        # What was used already is in front.
        place = (transitions.order(live.task) if waits else _FIRST, next(self._numbers))
        request = QuotaRequest(place, amount, waits, granted)
        heapq.heappush(ledger.waiting, request)
        self._requested.set()
        return request
