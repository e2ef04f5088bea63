"""Copies of one agent, in other worktrees and clones of its repository: one of them runs."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from agent_state.errors import AgentStateError
from agent_state.manager import StatePersistenceManager
from agent_state.runtime.live_agent import LiveAgent
from agent_state.runtime.state import logger
from agent_state.storage.claims import SETTING, Claims
from agent_state.storage.executor import shielded


class AgentCopies:
    """Claims the agents that a runtime runs, so that no copy of them runs on this machine.

    Without files, or outside of a git worktree, nothing is claimed.
    """

    def __init__(self, manager: StatePersistenceManager) -> None:
        self._manager = manager
        self._claims: Claims | None = None

    async def begin(self) -> None:
        """Claim nothing yet; what is bound to an event loop is made here."""
        self._mutex = asyncio.Lock()
        self._waiting: dict[str, LiveAgent] = {}
        root = self._manager.state_dir
        self._claims = None if root is None else await asyncio.to_thread(Claims.of, str(root))

    async def take(self, agents: Iterable[LiveAgent]) -> None:
        """Claim agents; where a copy of one runs, its ``elsewhere`` says so.

        Many callers at once are served together.
        """
        claims = self._claims
        if claims is None:
            return
        for agent in agents:
            if not claims.has(name := _name(agent)):
                self._waiting[name] = agent
        async with self._mutex:
            if self._waiting:
                waiting, self._waiting = self._waiting, {}
                await shielded(self._take(claims, waiting))

    async def _take(self, claims: Claims, waiting: dict[str, LiveAgent]) -> None:
        try:
            taken = await asyncio.to_thread(claims.take, waiting)
        except (AgentStateError, OSError, ValueError) as error:
            logger.warning("whether copies of agents run elsewhere is not looked at: %s", error)
            self._claims, taken = None, {}
        news = defaultdict[str, list[str]](list)
        for name, agent in waiting.items():
            where = str(taken[name]) if name in taken else None
            if where is not None and where != agent.elsewhere:
                news[where].append(agent.agent_id)
            agent.elsewhere = where
        for where, ids in news.items():
            logger.warning("%s", say_elsewhere(ids, where))

    async def drop(self, agents: Iterable[LiveAgent]) -> None:
        """Leave agents that are not run here any more to their copies."""
        if self._claims is not None:
            async with self._mutex:
                await self._in_thread(self._claims.drop, [_name(agent) for agent in agents])

    async def close(self) -> None:
        """Leave all agents to their copies."""
        claims, self._claims = self._claims, None
        if claims is not None:
            await self._in_thread(claims.close)

    async def _in_thread(self, work: Any, *args: Any) -> None:
        try:
            await shielded(asyncio.to_thread(work, *args))
        except (AgentStateError, OSError) as error:  # a claim ends with its process, too
            logger.warning("agents are still claimed: %s", error)


def _name(agent: LiveAgent) -> str:
    """What copies of an agent have in common, and another agent of the same id has not."""
    return f"{agent.agent_id}\0{agent.state.created_at or ''}"


def say_elsewhere(ids: list[str], where: str) -> str:
    """Tell that copies of agents run elsewhere, and what can be done."""
    who = f"agent {ids[0]} runs" if len(ids) == 1 else f"{len(ids)} agents, such as {ids[0]}, run"
    rest = f"`agent-state git fork` makes another agent of a copy, `git config {SETTING} true`"
    return f"{who} in {where}, and not here; {rest} runs copies"
