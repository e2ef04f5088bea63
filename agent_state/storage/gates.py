"""Locks between the tasks of one process, by name, with a time limit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from agent_state.errors import LockTimeoutError


class _Gate:
    __slots__ = ("depth", "holder", "lock", "users")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.holder: asyncio.Task[object] | None = None
        self.depth = 0
        self.users = 0


class Gates:
    """One gate a name. A task that holds a gate passes it again; another one waits."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._gates: dict[str, _Gate] = {}

    def __bool__(self) -> bool:
        """Whether anybody holds, or waits for, any gate."""
        return bool(self._gates)

    def closed_to_me(self, name: str) -> bool:
        """Whether another task holds this gate now."""
        gate = self._gates.get(name)
        return gate is not None and gate.depth > 0 and gate.holder is not asyncio.current_task()

    @asynccontextmanager
    async def passing(self, names: Iterable[str]) -> AsyncIterator[None]:
        """Hold all these gates, taken in one order by everyone. Raises ``LockTimeoutError``."""
        held: list[tuple[str, _Gate]] = []
        try:
            for name in sorted(set(names)):
                gate = await self._enter(name)
                held.append((name, gate))
            yield
        finally:
            for name, gate in reversed(held):
                self._leave(name, gate)

    async def _enter(self, name: str) -> _Gate:
        gate = self._gates.setdefault(name, _Gate())
        me = asyncio.current_task()
        if gate.depth > 0 and gate.holder is me:
            gate.depth += 1
            return gate
        gate.users += 1
        try:
            if gate.lock.locked():
                async with asyncio.timeout(self._timeout):
                    await gate.lock.acquire()
            else:
                await gate.lock.acquire()
        except BaseException as error:
            gate.users -= 1
            self._drop(name, gate)
            if isinstance(error, TimeoutError):
                raise LockTimeoutError(
                    f"{name}: another task of this process held it for {self._timeout:g} s"
                ) from error
            raise
        gate.holder, gate.depth = me, 1
        return gate

    def _leave(self, name: str, gate: _Gate) -> None:
        gate.depth -= 1
        if gate.depth == 0:
            gate.holder = None
            gate.lock.release()
            gate.users -= 1
            self._drop(name, gate)

    def _drop(self, name: str, gate: _Gate) -> None:
        if gate.users == 0 and self._gates.get(name) is gate:
            del self._gates[name]
