"""How an attempt ends, and how that is stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from agent_state import sleep as sleeping
from agent_state import tasks as rules
from agent_state.codec import Group
from agent_state.errors import (
    AgentStateError,
    LeaseLostError,
    SerializationError,
    StateValidationError,
    UnknownStepError,
)
from agent_state.models import AgentState, Task
from agent_state.runtime.context import Suspend
from agent_state.runtime.core import Core, logger
from agent_state.runtime.live import LiveAgent, LiveTask
from agent_state.runtime.post import save_sleep
from agent_state.runtime.results import Results

PAUSES = (0.1, 0.5, 2.0, 10.0)
"""Seconds to wait while the store refuses: after the first time, the second, and so on."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a handler ended, when it ended by itself."""

    result: object = None
    error: BaseException | None = None


class Endings:
    """Stores what became of attempts."""

    def __init__(self, core: Core, results: Results) -> None:
        self._core = core
        self._results = results

    async def conclude(
        self, agent: LiveAgent, live: LiveTask, ended: Ended | None, reason: str | None
    ) -> None:
        """Store how an attempt ended; what no file can hold ends its task and nothing else."""
        try:
            await self._end(agent, live, ended, reason)
        except LeaseLostError:
            logger.warning("task %s is another runtime's now", live.task.task_id)
            await self._results.catch_up()
        except (SerializationError, StateValidationError) as error:
            if error.kind == "agents":
                await self._back_to_stored(agent)
            if ended is None:
                logger.error("agent %s left what cannot be stored: %s", agent.agent_id, error)
                await self._end(agent, live, ended, reason)
            else:
                await self._fail(agent, live, rules.told(error), permanent=True)

    async def _back_to_stored(self, agent: LiveAgent) -> None:
        """Give the agent the state it had when it was last saved."""
        stored = await self._core.manager.load("agents", agent.agent_id)
        if isinstance(stored, AgentState):
            stored.agent_id = agent.agent_id
            if "stopped" in (agent.state.status, stored.status):
                stored.status = agent.state.status
            agent.state = stored

    async def _end(
        self, agent: LiveAgent, live: LiveTask, ended: Ended | None, reason: str | None
    ) -> None:
        core = self._core
        if ended is not None and ended.error is None:
            result = ended.result
            await self._store(agent, live, lambda t: rules.complete(t, result, core.now()))
        elif ended is not None and isinstance(ended.error, Suspend):
            await self._fall_asleep(agent, live, ended.error)
        elif ended is not None and ended.error is not None:
            error = ended.error
            permanent = isinstance(error, UnknownStepError)
            await self._fail(agent, live, rules.told(error), permanent=permanent)
        elif reason == "shutdown":
            await self._store(agent, live, rules.put_back)
        elif reason == "cancel":
            await self._store(agent, live, lambda t: rules.cancel(t, core.now()))
        elif reason == "lease":
            logger.warning("task %s was left to another runtime", live.task.task_id)
        else:
            await self._fail(agent, live, "CancelledError: the handler cancelled itself")

    async def _fail(
        self, agent: LiveAgent, live: LiveTask, error: str, *, permanent: bool = False
    ) -> None:
        core = self._core
        change = partial(
            rules.fail,
            error=error,
            now=core.now(),
            policy=core.retry,
            random=core.random,
            permanent=permanent,
        )
        await self._store(agent, live, change)

    async def _fall_asleep(self, agent: LiveAgent, live: LiveTask, wish: Suspend) -> None:
        seen = wish.sleep.pop("mail_seen")
        try:
            sleep = sleeping.fall_asleep(
                agent.agent_id,
                now=self._core.now(),
                mail_seen=[m.message_id for m in agent.unread()] if seen is None else seen,
                **wish.sleep,
            )
        except StateValidationError as error:
            await self._fail(agent, live, f"{type(error).__name__}: {error}")
            return
        before, agent.sleep = agent.sleep, sleep
        try:
            await self._store(agent, live, rules.suspend, lambda group: save_sleep(group, sleep))
        except BaseException:
            agent.sleep = before
            raise
        # Mail that came while the sleep was being stored ends it at the loop's next look.

    async def _store(
        self,
        agent: LiveAgent,
        live: LiveTask,
        change: Callable[[Task], Task],
        stage: Callable[[Group], None] | None = None,
    ) -> None:
        """Store how it ended. While the disk refuses, keep trying: the work was done."""
        failures = 0
        while True:
            try:
                await self._core.save(agent, live=live, change=change, stage=stage)
                return
            except (LeaseLostError, SerializationError, StateValidationError):
                raise
            except AgentStateError as error:
                logger.error("the end of %s is not stored yet: %s", live.task.task_id, error)
                if self._core.stopping:
                    raise
                await self._core.clock.sleep(PAUSES[min(failures, len(PAUSES) - 1)])
                failures += 1
