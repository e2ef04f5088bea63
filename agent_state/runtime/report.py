"""What a start has restored, for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from agent_state.protocols import Incident


@dataclass(frozen=True, slots=True)
class Requeued:
    """A task whose process died while it ran. ``unknown_steps`` may have had their effect."""

    agent_id: str
    task_id: str
    name: str
    attempts: int
    status: str
    unknown_steps: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Woken:
    """A sleeper that was woken at the start, and why: ``time`` or a wake event."""

    agent_id: str
    reason: str


@dataclass(slots=True)
class RestoreReport:
    """What was found, what was put back to work, and what could not be used."""

    after_crash: bool = False
    """The runtime before this one did not end in good order."""
    agents: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    """Agents whose type has no handler here; they keep everything and do nothing."""
    held_elsewhere: list[str] = field(default_factory=list)
    """Agents that another runtime holds the lease of."""
    requeued: list[Requeued] = field(default_factory=list)
    tasks_pending: int = 0
    """Tasks that will be worked on, the re-queued ones among them."""
    woken: list[Woken] = field(default_factory=list)
    asleep: list[str] = field(default_factory=list)
    unread_mail: dict[str, int] = field(default_factory=dict)
    """Unread messages by agent, where there are any."""
    edited: list[str] = field(default_factory=list)
    """Documents that a person, or another program, changed; they are used as they are."""
    without_agent: list[str] = field(default_factory=list)
    """Tasks, sleep and mail of agents that do not exist; they are left as they are."""
    contained: list[Incident] = field(default_factory=list)
    """What could not be used, where it was put, and whether an earlier version came back."""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> Sequence[str]:
        """A few lines for a log or a terminal."""
        said = [
            f"{_count(len(self.agents), 'agent')} restored in {self.seconds:.2f} s"
            + (" after a crash" if self.after_crash else ""),
            f"{_count(self.tasks_pending, 'task')} to do, {len(self.requeued)} of them re-queued",
            (
                f"{_count(sum(self.unread_mail.values()), 'message')} unread, "
                f"{_count(len(self.woken), 'sleeper')} woken, {len(self.asleep)} asleep"
            ),
        ]
        for task in self.requeued:
            if task.unknown_steps:
                steps = ", ".join(task.unknown_steps)
                said.append(f"{task.agent_id}/{task.task_id}: outcome unknown of {steps}")
        if self.waiting:
            said.append(f"no handler for {_count(len(self.waiting), 'agent')}; they wait")
        if self.without_agent:
            documents = _count(len(self.without_agent), "document")
            said.append(f"{documents} without an agent, such as {self.without_agent[0]}")
        if self.edited:
            said.append(f"{_count(len(self.edited), 'document')} changed outside")
        for incident in self.contained:
            where = f" ({incident.path})" if incident.path else ""
            kept = f"; kept at {incident.kept}" if incident.kept else ""
            back = "; an earlier version is back" if incident.restored else ""
            said.append(f"not usable{where}: {incident.what}{kept}{back}")
        return said


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
