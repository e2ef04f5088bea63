"""One time for all hosts: the server's, as far as its replies tell it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from agent_state.clock import Clock, SystemClock


class ServerClock:
    """This host's clock, put right by what Redis says.

    A reply tells that the server's clock showed its time somewhere between sending and receiving.
    The difference is changed only as far as that asks for, so that a slow reply changes nothing.
    """

    def __init__(self, base: Clock | None = None) -> None:
        self._base: Clock = base or SystemClock()
        self._ahead = timedelta(0)

    def now(self) -> datetime:
        """The server's time; never wrong by more than the quickest reply since a clock jumped."""
        return self._base.now() + self._ahead

    def monotonic(self) -> float:
        return self._base.monotonic()

    async def sleep(self, seconds: float) -> None:
        await self._base.sleep(seconds)

    def local(self) -> datetime:
        """This host's time, for ``learn``."""
        return self._base.now()

    def learn(self, sent: datetime, server_micros: int, received: datetime) -> None:
        """Take in the server's time, in microseconds since 1970, between two local times."""
        server = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=server_micros)
        self._ahead = min(max(self._ahead, server - received), server - sent)
