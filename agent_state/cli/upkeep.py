"""What the commands that change a directory do: ``restore`` and ``cleanup``."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from os import PathLike

from agent_state.cleanup import CleanupReport, clean
from agent_state.cli.output import Advance
from agent_state.codec import StoredState
from agent_state.errors import Key, StateNotFoundError
from agent_state.manager import StatePersistenceManager
from agent_state.protocols import Incident
from agent_state.runtime.report import RestoreReport
from agent_state.runtime.restore import plan_restore
from agent_state.storage import ReadOnlyStateStore

_SCANNED = ("agents", "tasks", "sleep", "mail")


async def restore(
    state_dir: str | PathLike[str], *, dry_run: bool, advance: Advance
) -> RestoreReport:
    """Recover a directory, or say what a start would do.

    Raises ``StateNotFoundError``, and ``StateDirectoryInUseError`` while a server runs there.
    """
    async with _open(state_dir, exclusive=True, dry_run=dry_run, advance=advance) as manager:
        return await plan_restore(manager, clock=manager.clock)


async def cleanup(
    state_dir: str | PathLike[str], max_age_hours: float, *, dry_run: bool, advance: Advance
) -> tuple[CleanupReport, list[Incident]]:
    """Archive what is finished and old, or say what that would be. Raises as ``restore``.

    Also what was found on the way and could not be used.
    """
    async with _open(state_dir, exclusive=False, dry_run=dry_run, advance=advance) as manager:
        report = await clean(manager, max_age_hours, dry_run=dry_run)
        return report, manager.incidents()


@asynccontextmanager
async def _open(
    state_dir: str | PathLike[str], *, exclusive: bool, dry_run: bool, advance: Advance
) -> AsyncIterator[StatePersistenceManager]:
    # A store that writes would make the directory; a mistyped name must not.
    if not os.path.isdir(state_dir):  # noqa: ASYNC240, PTH112  # once, before anything runs
        where = os.path.abspath(state_dir)  # noqa: ASYNC240, PTH100
        raise StateNotFoundError("there is no such state directory", path=where)
    store = ReadOnlyStateStore(state_dir) if dry_run else None
    manager = _CountedManager(state_dir, exclusive=exclusive, store=store)
    manager.advance = advance
    async with manager:
        await manager.count()
        yield manager


class _CountedManager(StatePersistenceManager):
    """Tells how many documents of all have been scanned."""

    advance: Advance
    _done = _total = 0

    async def count(self) -> None:
        self._total = sum([len(await self.keys(kind)) for kind in _SCANNED])

    async def scan(self, kind: str, prefix: Key | str = ()) -> AsyncIterator[StoredState]:
        async for loaded in super().scan(kind, prefix):
            self._done += 1
            self.advance(self._done, self._total)
            yield loaded
