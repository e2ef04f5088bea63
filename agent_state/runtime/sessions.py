"""The runtime: agents that are restored at the start, run, and are saved as they go."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import signal
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from agent_state.clock import stamp
from agent_state.errors import (
    AgentStateError,
    RevisionConflictError,
    StateValidationError,
)
from agent_state.models import AgentState, detached
from agent_state.protocols import NoticeStream
from agent_state.runtime.context import Handler
from agent_state.runtime.core import logger
from agent_state.runtime.live import LiveAgent
from agent_state.runtime.messages import MessageMethods
from agent_state.runtime.parts import cancelled
from agent_state.runtime.report import RestoreReport
from agent_state.runtime.restore import (
    RUNTIME,
    load_agent,
)
from agent_state.runtime.runner import STUBBORN_SECONDS
from agent_state.runtime.saving import SavingMethods
from agent_state.runtime.work import WorkMethods
from agent_state.storage.executor import shielded

H = TypeVar("H", bound=Handler)


class AsyncAgentSessionManager(WorkMethods, MessageMethods, SavingMethods):
    """Runs agents and keeps everything they must not forget.

    ``exclusive``: this process alone writes the directory (the default, and the fast way);
    otherwise several runtimes may share it, each running the agents it holds the lease of.
    ``lease_seconds``: how long a task or agent stays with a runtime that says nothing.
    ``save_every``: seconds between checks that memory and disk agree. ``grace_seconds``: how
    long running handlers may go on at a shutdown. ``store`` replaces the files altogether;
    ``mirror``, ``mirror_restores`` and ``observer`` are as in ``StatePersistenceManager``.
    Time, ids and randomness come from ``clock``, ``ids`` and ``random``.
    """

    # -- life --------------------------------------------------------------------------------

    def handler(self, agent_type: str) -> Callable[[H], H]:
        """Register the coroutine that does the tasks of all agents of a type.

        Raises ``ValueError`` when the type has one, ``TypeError`` for a plain function.
        """

        def register(function: H) -> H:
            if agent_type in self._handlers:
                raise ValueError(f"agent type {agent_type!r} has a handler already")
            is_async: bool = inspect.iscoroutinefunction(function)
            if not is_async:
                raise TypeError(f"the handler of {agent_type!r} must be an async function")
            self._handlers[agent_type] = function
            for agent in self.core.agents.values():
                if self._services and agent.state.agent_type == agent_type:
                    self._runner.start(agent)
            return function

        return register

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    async def start(self) -> RestoreReport:
        """Restore everything, then run. Twice is a no-op."""
        if self._services and self.report is not None:
            return self.report
        await self.manager.open()
        try:
            self.core.stopping = False
            # Watching begins before reading, so that no change falls between the two.
            notices = await self.manager.store.watch()
            self.report = await self.restore_all_session_states()
            await self._remember("running")
        except BaseException:
            await shielded(self._undo_start())
            raise
        self._services = [
            asyncio.create_task(service, name=f"agent-state {name}")
            for name, service in self._all_services(notices).items()
        ]
        for agent in self.core.agents.values():
            self._runner.start(agent)
        for line in self.report.lines():
            logger.info("%s", line)
        return self.report

    async def _undo_start(self) -> None:
        self.core.agents.clear()
        try:
            if self._leases is not None:
                await self._leases.give_all_back()
        finally:
            await self.manager.close()

    def _all_services(self, notices: NoticeStream) -> dict[str, Any]:
        services = {
            "alarm": self._alarm.run(),
            "check": self._check_forever(),
            "watch": self._watch(notices),
        }
        if self._leases is not None:
            services["leases"] = self._leases.run()
        return services

    async def stop(self) -> None:
        """Take no new work, give handlers their grace, put back what is left, save, close."""
        if not self._services:
            await self.manager.close()
            return
        self.core.stopping = True
        agents = list(self.core.agents.values())
        for agent in agents:
            agent.changed.set()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._grace):
                    await self._until_all_rest()
            for agent in agents:
                self._runner.stop(agent, "shutdown")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2 * STUBBORN_SECONDS):
                    await self._until_all_rest()
        finally:
            await shielded(self._end(agents))

    async def _end(self, agents: Sequence[LiveAgent]) -> None:
        loops = [agent.loop for agent in agents if agent.loop is not None]
        await cancelled([*loops, *self._services])
        self._services = []
        await self._save_and_close(agents)

    async def _save_and_close(self, agents: Sequence[LiveAgent]) -> None:
        try:
            async with contextlib.AsyncExitStack() as last:  # each, whatever becomes of the others
                last.push_async_callback(self._remember, "stopped")
                if self._leases is not None:
                    for agent in agents:
                        last.push_async_callback(self._leases.give_back, agent.agent_id)
                await self.save_all_session_states()
        finally:
            self._runner.results.tell_stopped()
            self.core.agents.clear()
            self.core.activity.set()
            await self.manager.close()

    async def _until_all_rest(self) -> None:
        while self._runner.at_work:
            self.core.activity.clear()
            await self.core.activity.wait()

    async def serve(self) -> None:
        """Start, run until SIGTERM or SIGINT, and stop in good order."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, stop.set)
        try:
            async with self:
                await stop.wait()
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    async def _remember(self, status: str) -> None:
        body = {"at": stamp(self.core.now()), "owner": self.core.owner, "status": status}
        await self.manager.save_system_state(RUNTIME, body)

    async def _check_forever(self) -> None:
        while True:
            await self.core.clock.sleep(self._save_every)
            try:
                await self._keeper.check()
            except AgentStateError as error:
                logger.error("memory and disk could not be compared: %s", error)

    async def _watch(self, notices: NoticeStream) -> None:
        async with contextlib.aclosing(notices):
            async for notice in notices:
                if notice.outside:
                    await self._keeper.notice(notice)

    # -- sessions ----------------------------------------------------------------------------

    async def create_session(
        self,
        agent_id: str,
        *,
        agent_type: str,
        name: str | None = None,
        configuration: Mapping[str, Any] | None = None,
        system_prompt: str | None = None,
        tool_sets: Sequence[Any] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> AgentState:
        """A new agent, running at once; one that exists is left as it is and returned.

        So the same start-up code serves the first start and every restart. Raises
        ``StateValidationError`` when the existing agent is of another type.
        """
        agent = await self._find(agent_id)
        if agent is None:
            state = AgentState(
                agent_id=agent_id,
                agent_name=name or agent_id,
                agent_type=agent_type,
                status="idle" if agent_type in self._handlers else "waiting",
                created_at=stamp(self.core.now()),
                configuration=detached(dict(configuration or {})),
            )
            if system_prompt is not None:
                state.context.system_prompt = system_prompt
            if tool_sets:
                state.tool_sets = detached(list(tool_sets))
            if metadata:
                state.metadata = detached(dict(metadata))
            agent = await self._create(state)
        if agent.state.agent_type != agent_type:
            raise StateValidationError(
                f"the agent exists, with type {agent.state.agent_type!r}",
                kind="agents",
                key=agent_id,
            )
        return agent.state.model_copy(deep=True)

    async def _find(self, agent_id: str) -> LiveAgent | None:
        """The agent, live, if there is one."""
        agent = self.core.agents.get(agent_id)
        if agent is None:
            stored = await load_agent(self.manager, agent_id)
            agent = None if stored is None else await self._admit(stored)
        return agent

    async def _create(self, state: AgentState) -> LiveAgent:
        """Store a new agent and let it live; the other one, if somebody was quicker."""
        try:
            await self.manager.save("agents", state.agent_id, state, expected=0)
        except RevisionConflictError:
            agent = await self._find(state.agent_id)
            if agent is None:
                raise
            return agent
        return await self._admit(LiveAgent(state))

    async def stop_session(self, agent_id: str) -> None:
        """Let the agent finish its task and begin no other. Its state, tasks and mail stay."""
        await self._set_status(self._agent(agent_id), "stopped")

    async def start_session(self, agent_id: str) -> None:
        """Let a stopped agent work again."""
        agent = self._agent(agent_id)
        if agent.state.status == "stopped":
            await self._set_status(agent, "idle")

    async def _set_status(self, agent: LiveAgent, status: str) -> None:
        before, agent.state.status = agent.state.status, status
        try:
            if agent.leased:
                await self.core.save(agent)
            else:  # the runtime that holds it notices
                async with self.manager.edit("agents", agent.agent_id) as state:
                    state.status = status
        except BaseException as error:
            # The change of a caller who was cancelled may have been made all the same.
            if not (isinstance(error, asyncio.CancelledError) and agent.leased):
                agent.state.status = before
            raise
        finally:
            agent.changed.set()

    def session(self, agent_id: str) -> AgentState:
        """The agent as it is now, as a copy. Raises ``StateNotFoundError``."""
        agent = self._agent(agent_id)
        state = agent.state.model_copy(deep=True)
        state.status = agent.status(agent.current)
        return state

    def sessions(self) -> list[str]:
        """The ids of all agents here, sorted."""
        return sorted(self.core.agents)
