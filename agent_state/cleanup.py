"""Cleanup: finished documents that are old enough move into archive logs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from agent_state.clock import Clock, check_duration, instant, later, sort_text
from agent_state.codec import Group, StoredState
from agent_state.errors import Key, RevisionConflictError
from agent_state.models import (
    UNFINISHED,
    AgentState,
    MailMessage,
    SleepState,
    Task,
    TaskReference,
    meaning_of,
)

_READ = frozenset({"read", "replied", "archived"})


@dataclass(slots=True)
class CleanupReport:
    """The ids of what was archived or removed, as ``agent/id`` for tasks and mail."""

    agents: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    mail: list[str] = field(default_factory=list)
    sleep: list[str] = field(default_factory=list)
    spared: int = 0
    """The number of documents that are younger, or still needed."""
    dead_letters: int = 0
    """The number of dead tasks among them that are old: run them again, or delete them."""
    dry_run: bool = False
    """Nothing was moved: this is what would have been."""

    @property
    def total(self) -> int:
        """The number of documents that were archived or removed."""
        return len(self.agents) + len(self.tasks) + len(self.mail) + len(self.sleep)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        return asdict(self)


class CleanupStates(Protocol):
    """The part of a ``StatePersistenceManager`` that cleanup needs."""

    @property
    def clock(self) -> Clock:
        """The clock that documents were stamped with."""

    def scan(self, kind: str, prefix: Key | str = ()) -> AsyncIterator[StoredState]:
        """Every usable state of a kind."""

    async def load_with_revision(self, kind: str, key: Key | str) -> StoredState | None:
        """One state; None if it is not stored."""

    def new_group(self) -> Group:
        """An empty group, for ``commit``."""

    async def commit(self, group: Group) -> list[int]:
        """Make a group's changes, all or none."""


async def clean(
    states: CleanupStates,
    max_age_hours: float,
    *,
    dead_letters: bool = False,
    dry_run: bool = False,
) -> CleanupReport:
    """Archive as ``StatePersistenceManager.cleanup_old_states`` does.

    ``dry_run`` changes nothing, and reports what would be archived.
    """
    check_duration("max_age_hours", max_age_hours, unit="hours")
    cleanup = _Cleanup(states, max_age_hours, dead_letters=dead_letters, dry_run=dry_run)
    await cleanup.clean_tasks()
    await cleanup.clean_mail()
    await cleanup.clean_sleep()
    await cleanup.clean_agents()
    return cleanup.report


class _Cleanup:
    """One run of ``clean``."""

    def __init__(
        self, states: CleanupStates, max_age_hours: float, *, dead_letters: bool, dry_run: bool
    ) -> None:
        self._states = states
        self._dead_letters = dead_letters
        self._now = states.clock.now()
        self._limit = later(self._now, -3600 * max_age_hours)
        self._needed: set[str] = set()
        """The agents that still have something to do, and therefore stay."""
        self._archived: set[tuple[str, Key]] = set()
        self.report = CleanupReport(dry_run=dry_run)

    async def clean_tasks(self) -> None:
        sent: list[tuple[str, Key]] = []
        async for stored in self._states.scan("tasks"):
            task = stored.state
            unknown = not isinstance(task, Task) or len(stored.key) != 2
            status = "" if unknown else meaning_of(getattr(task, "status", ""))
            dead = status == "dead" and not self._dead_letters
            if unknown or dead or status in UNFINISHED or not self._is_old(stored):
                self._count_spared(stored, needed=unknown or dead or status in UNFINISHED)
                self.report.dead_letters += dead and self._is_old(stored)
            elif isinstance(task, Task) and task.sent_by is not None:
                sent.append((sort_text(task.created_at), stored.key))
            else:
                await self._archive("tasks", stored)
        for _, key in sorted(sent):  # a task after the one that submitted it
            again = await self._states.load_with_revision("tasks", key)
            if again is not None and self._is_old(again):
                await self._archive_sent("tasks", again)

    async def clean_mail(self) -> None:
        async for stored in self._states.scan("mail"):
            mail = stored.state
            done = isinstance(mail, MailMessage) and meaning_of(mail.status) in _READ
            if done and len(stored.key) == 2 and self._is_old(stored) and not _awaits_reply(mail):
                await self._archive_sent("mail", stored)
            else:
                self._count_spared(stored, needed=not done)

    async def clean_sleep(self) -> None:
        async for stored in self._states.scan("sleep"):
            sleep = stored.state
            awake = isinstance(sleep, SleepState) and not sleep.is_sleeping
            if awake and self._is_old(stored):
                await self._archive("sleep", stored, log=False)
            else:
                self._count_spared(stored, needed=True)

    async def clean_agents(self) -> None:
        async for stored in self._states.scan("agents"):
            agent = stored.state
            stopped = isinstance(agent, AgentState) and meaning_of(agent.status) == "stopped"
            if stopped and stored.key[0] not in self._needed and self._is_old(stored):
                await self._archive("agents", stored)
            else:
                self._count_spared(stored, needed=False)

    async def _archive_sent(self, kind: str, stored: StoredState) -> None:
        """Archive what a task has sent, unless that task is still stored: it may send it again."""
        sender = getattr(stored.state, "sent_by", None)
        if isinstance(sender, TaskReference):
            key = (sender.agent_id, sender.task_id)
            archived = ("tasks", key) in self._archived
            if not archived and await self._states.load_with_revision("tasks", key) is not None:
                self._count_spared(stored, needed=False)
                return
        await self._archive(kind, stored)

    def _count_spared(self, stored: StoredState, *, needed: bool) -> None:
        self.report.spared += 1
        if needed:
            self._needed.add(stored.key[0])

    async def _archive(self, kind: str, stored: StoredState, *, log: bool = True) -> None:
        """Move a document into its folder's archive log, unless it has changed since.

        ``log=False`` only removes it.
        """
        group = self._states.new_group()
        if log:
            await group.archive(stored, kind)
        else:
            group.delete(kind, stored.key, expected=stored.revision)
        try:
            if not self.report.dry_run:
                await self._states.commit(group)
        except RevisionConflictError:
            return  # it was saved a moment ago, so it is not old
        self._archived.add((kind, stored.key))
        moved: list[str] = getattr(self.report, kind)
        moved.append("/".join(stored.key))

    def _is_old(self, stored: StoredState) -> bool:
        """Whether a document may go. Its dedupe key holds until the time that was promised.

        Judged by the document's stamp: a checkout or a copy makes every file new.
        """
        try:
            if instant(stored.saved_at) >= self._limit:
                return False
        except ValueError:
            return False
        try:
            until = getattr(stored.state, "dedupe_until", None)
            return until is None or instant(until) <= self._now
        except ValueError:
            return True


def _awaits_reply(mail: object) -> bool:
    return (
        isinstance(mail, MailMessage)
        and mail.expects_reply
        and meaning_of(mail.status) != "replied"
    )
