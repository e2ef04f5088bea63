"""Admits attempts: not more at once, and not more within a period, than handlers may make.

What is used of a rate limit is stored in ``system/limits/<name>`` before it is granted, by
compare-and-set: so a kill forgets none of it, and runtimes that share a store share the limit.
Those that wait are served by the priority and age of their tasks.

What was granted for an attempt that did not begin soon, because its agent was busy or too many
others ran, is granted anew when it begins: else many of long ago could begin at once.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from itertools import count
from typing import Any

from agent_state.errors import AgentStateError, Key, RevisionConflictError, StateValidationError
from agent_state.runtime import transitions
from agent_state.runtime.handlers import RegisteredHandler, check_same_limits
from agent_state.runtime.live_agent import LiveAgent
from agent_state.runtime.rate_limits import RateLimit, UsageWindow
from agent_state.runtime.state import RuntimeState, logger
from agent_state.runtime.task_queue import LiveTask

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
    settled: Callable[[datetime | None], None] = field(compare=False)
    """Called with the time at which the amount counts as used; None if it may not be used."""
    used_at: datetime | None = field(default=None, compare=False)
    """When it was used, whatever the limit; it only has to be stored."""
    given_back: datetime | None = field(default=None, compare=False)
    """When it was granted before, and was not used; it does not wait to be granted anew."""
    withdrawn: bool = field(default=False, compare=False)

    @property
    def waits(self) -> bool:
        """Whether it waits until the limit permits it."""
        return self.used_at is None and self.given_back is None


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
            chosen, seconds = self._choose(window)
            if not chosen:
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
                for request, _ in chosen:
                    heapq.heappush(self.waiting, request)
                if isinstance(error, RevisionConflictError):
                    continue  # another runtime has used some
                raise
            for request, used_at in chosen:
                request.settled(used_at)
        return None

    async def _read(self) -> UsageWindow:
        stored = await self._state.manager.load_with_revision("system", self._key)
        used = stored.state.model_dump().get("used") if stored is not None else None
        self._revision = stored.revision if stored is not None else 0
        self._window = UsageWindow(self.limit, used if isinstance(used, dict) else None)
        return self._window

    def _choose(
        self, window: UsageWindow
    ) -> tuple[list[tuple[QuotaRequest, datetime | None]], float | None]:
        """Count what is used, in order; return it, and when the next one may be granted."""
        now, chosen = self._state.clock.now(), list[tuple[QuotaRequest, datetime | None]]()
        while self.waiting:
            request = self.waiting[0]
            if request.given_back is not None:
                window.use(-request.amount, request.given_back)
            seconds = 0.0 if request.used_at else window.wait_seconds(request.amount, now)
            if seconds and request.waits and not request.withdrawn:
                return chosen, seconds  # it is not overtaken by one that needs less
            heapq.heappop(self.waiting)
            used_at = None if seconds or request.withdrawn else request.used_at or now
            if used_at is not None:
                window.use(request.amount, used_at)
            if used_at is not None or request.given_back is not None:
                chosen.append((request, used_at))
        return chosen, None


class Admission:
    """What one agent has been granted of rate limits, for its next attempt of a handler."""

    def __init__(self) -> None:
        self.granted: dict[str, datetime] = {}
        """When each counts as used."""
        self.requested: set[str] = set()
        self.names: set[str] = set()
        """The names of the tasks that wait for it."""
        self.goes_first = False
        """Whether its agent waits for it, because it was busy when it was granted before."""

    def grant(self, limit: str, agent: LiveAgent, used_at: datetime | None) -> None:
        """Note that one call was granted; with the last one, the agent may look."""
        self.requested.discard(limit)
        if used_at is not None:
            self.granted[limit] = used_at
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

    async def admit(
        self, agent: LiveAgent, live: LiveTask, handler: RegisteredHandler
    ) -> bool | None:
        """Whether the attempt may begin.

        If not, the agent is woken when it may: False, and tasks of other names go first; None, and
        the task, whose turn it had been while the agent was busy, is the next one all the same.
        """
        if not handler.is_limited:
            return True
        admission = self._admissions.setdefault((agent.agent_id, id(handler)), Admission())
        self._request_missing(admission, agent, live, handler)
        if admission.requested:
            return self._wait(admission, agent, live)
        gate = None
        if handler.concurrency is not None:
            gate = self._gates.setdefault(id(handler), ConcurrencyGate(handler.concurrency))
            if not gate.enter(agent, live, next(self._numbers)):
                agent.block(live.task.name, for_a_while=True)
                return False
        admitted = False
        try:
            admitted = await self._renew(admission, live, handler)
        finally:
            if gate is not None and not admitted:
                gate.leave()
        if admitted:
            del self._admissions[agent.agent_id, id(handler)]
            return True
        admission.goes_first = True
        self._request_missing(admission, agent, live, handler)
        return self._wait(admission, agent, live)

    def _wait(self, admission: Admission, agent: LiveAgent, live: LiveTask) -> bool | None:
        admission.names.add(live.task.name)
        if admission.goes_first:
            return None
        agent.block(live.task.name, for_a_while=True)
        return False

    def _request_missing(
        self, admission: Admission, agent: LiveAgent, live: LiveTask, handler: RegisteredHandler
    ) -> None:
        """Request those of the handler's limits of which nothing was granted."""
        for limit in handler.rate_limits:
            if limit.name not in admission.granted.keys() | admission.requested:
                admission.requested.add(limit.name)
                settled = partial(admission.grant, limit.name, agent)
                self._request(limit, 1, live, settled)

    async def _renew(
        self, admission: Admission, live: LiveTask, handler: RegisteredHandler
    ) -> bool:
        """Let what was granted a while ago count from now; return whether that was possible."""
        now = self._state.clock.now()
        for limit in handler.rate_limits:
            granted_at = admission.granted[limit.name]
            if (now - granted_at).total_seconds() <= limit.slot_seconds:
                continue
            del admission.granted[limit.name]
            used_at = await self._settled(limit, 1, live, given_back=granted_at)
            if used_at is not None:
                admission.granted[limit.name] = used_at
        return all(limit.name in admission.granted for limit in handler.rate_limits)

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
        self,
        limit: RateLimit,
        amount: float,
        live: LiveTask,
        *,
        wait: bool = True,
        before: datetime | None = None,
    ) -> datetime:
        """Wait until so much of the limit may be used, count it, and return when it counts.

        ``wait=False``: it was used already; a negative amount is taken from what was used
        ``before``. Raises ``StateValidationError`` for more than the limit, or for what is no
        amount.
        """
        number = isinstance(amount, int | float) and abs(amount) < math.inf
        if not number or (wait and not 0 < amount <= limit.amount):
            raise StateValidationError(
                f"{amount!r} of {limit.name!r}, of which {limit.amount:g} may be used in a period"
            )
        now = self._state.clock.now()
        used_at = None if wait else before if before is not None and amount < 0 else now
        return await self._settled(limit, amount, live, used_at=used_at) or now

    async def _settled(
        self,
        limit: RateLimit,
        amount: float,
        live: LiveTask,
        *,
        used_at: datetime | None = None,
        given_back: datetime | None = None,
    ) -> datetime | None:
        """Return when the amount counts as used; None if it may not be used."""
        settled: asyncio.Future[datetime | None] = asyncio.get_running_loop().create_future()

        def settle(at: datetime | None) -> None:
            if not settled.done():
                settled.set_result(at)

        request = self._request(limit, amount, live, settle, used_at=used_at, given_back=given_back)
        try:
            return await settled
        finally:
            request.withdrawn = True

    def _request(
        self,
        limit: RateLimit,
        amount: float,
        live: LiveTask,
        settled: Callable[[datetime | None], None],
        *,
        used_at: datetime | None = None,
        given_back: datetime | None = None,
    ) -> QuotaRequest:
        ledger = self._ledgers.setdefault(limit.name, QuotaLedger(self._state, limit))
        check_same_limits(ledger.limit, limit)
        request = QuotaRequest((_FIRST, next(self._numbers)), amount, settled, used_at, given_back)
        if request.waits:  # what does not is in front
            request.place = (transitions.order(live.task), request.place[1])
        heapq.heappush(ledger.waiting, request)
        self._requested.set()
        return request
