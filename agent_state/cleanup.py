"""What is finished and old moves into archive logs; what is still needed stays."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from agent_state.clock import instant
from agent_state.errors import RevisionConflictError
from agent_state.models import UNFINISHED, AgentState, MailMessage, SleepState, Task

if TYPE_CHECKING:
    from agent_state.codec import StoredState
    from agent_state.groups import Group
    from agent_state.manager import StatePersistenceManager

ARCHIVE = "archive"


@dataclass(slots=True)
class CleanupReport:
    """Ids of what was moved to archive logs or removed, as ``agent/id`` for tasks and mail."""

    agents: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    mail: list[str] = field(default_factory=list)
    sleep: list[str] = field(default_factory=list)
    spared: int = 0
    """Documents that are younger, or still needed."""
    dry_run: bool = False
    """Nothing was moved; this is what would have been."""

    @property
    def total(self) -> int:
        return len(self.agents) + len(self.tasks) + len(self.mail) + len(self.sleep)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


async def clean(
    manager: StatePersistenceManager, max_age_hours: float, *, dry_run: bool = False
) -> CleanupReport:
    """See ``StatePersistenceManager.cleanup_old_states``. ``dry_run``: only say what it would."""
    limit = manager.clock.now() - timedelta(hours=max_age_hours)
    report = CleanupReport(dry_run=dry_run)
    needed: set[str] = set()
    async for loaded in manager.scan("tasks"):
        task = loaded.state
        if not isinstance(task, Task) or len(loaded.key) != 2:
            needed.add(loaded.key[0])
        elif task.status not in UNFINISHED and _older(loaded, limit):
            await _archive(manager, "tasks", loaded, report)
            continue
        elif task.status in UNFINISHED:
            needed.add(loaded.key[0])
        report.spared += 1
    async for loaded in manager.scan("mail"):
        mail = loaded.state
        done = isinstance(mail, MailMessage) and mail.status in ("archived", "replied", "read")
        if done and len(loaded.key) == 2 and _older(loaded, limit) and not _awaits_reply(mail):
            await _archive(manager, "mail", loaded, report)
            continue
        if not done:
            needed.add(loaded.key[0])
        report.spared += 1
    async for loaded in manager.scan("sleep"):
        sleep = loaded.state
        if isinstance(sleep, SleepState) and not sleep.is_sleeping and _older(loaded, limit):
            await _remove(manager, "sleep", loaded, report)
            continue
        needed.add(loaded.key[0])
        report.spared += 1
    async for loaded in manager.scan("agents"):
        agent = loaded.state
        stopped = isinstance(agent, AgentState) and agent.status.lower() == "stopped"
        if stopped and loaded.key[0] not in needed and _older(loaded, limit):
            await _archive(manager, "agents", loaded, report)
        else:
            report.spared += 1
    return report


async def _archive(
    manager: StatePersistenceManager, kind: str, loaded: StoredState, report: CleanupReport
) -> None:
    """Move one document into its folder's archive log, unless it has changed meanwhile."""
    group = manager.new_group()
    group.delete(kind, loaded.key, expected=loaded.revision)
    dedupe_key = f"{loaded.key[-1]}@{loaded.revision}"
    group.append(
        kind, (*loaded.key[:-1], ARCHIVE), loaded.state.model_dump(), dedupe_key=dedupe_key
    )
    await _commit(manager, group, kind, loaded, report)


async def _remove(
    manager: StatePersistenceManager, kind: str, loaded: StoredState, report: CleanupReport
) -> None:
    group = manager.new_group()
    group.delete(kind, loaded.key, expected=loaded.revision)
    await _commit(manager, group, kind, loaded, report)


async def _commit(
    manager: StatePersistenceManager,
    group: Group,
    kind: str,
    loaded: StoredState,
    report: CleanupReport,
) -> None:
    try:
        if not report.dry_run:
            await manager.commit(group)
    except RevisionConflictError:
        return  # somebody works with it, so it is not old
    moved: list[str] = getattr(report, kind)
    moved.append("/".join(loaded.key))


def _older(loaded: StoredState, limit: datetime) -> bool:
    """By its own stamp, not the file's: a checkout or a copy makes every file young."""
    try:
        return instant(loaded.saved_at) < limit
    except ValueError:
        return False


def _awaits_reply(mail: object) -> bool:
    return isinstance(mail, MailMessage) and mail.expects_reply and mail.status != "replied"
