"""Checks that nothing was lost or done twice, with ``json`` alone and without this library."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent_state.errors import StateNotFoundError
from agent_state.verify import verify
from agent_state_integrations.demo import analysis, files
from agent_state_integrations.demo.server_runs import AcknowledgedIds


@dataclass(frozen=True, slots=True)
class ClaimCheck:
    """A claim, whether it holds, and its figures or the first contradictions."""

    claim: str
    holds: bool
    detail: str


@dataclass(slots=True)
class Evidence:
    """The content of a state directory after the team has finished."""

    tasks: list[dict[str, Any]] = field(default_factory=list)
    mail: list[dict[str, Any]] = field(default_factory=list)
    memories: dict[str, Any] = field(default_factory=dict)
    asleep: list[str] = field(default_factory=list)
    """The agents that still sleep, with nothing left to wait for."""
    report: str = ""


def gather(state: Path, report: Path) -> Evidence:
    """Read the files as any other program could. Raises ``OSError``, ``ValueError``."""
    evidence = Evidence(
        tasks=list(_objects(state / "tasks", "*/*.json")),
        mail=list(_objects(state / "mail", "*/*.json")),
        report=report.read_text(encoding="utf-8"),
    )
    evidence.asleep = [sleep["agent_id"] for sleep in _objects(state / "sleep", "*.json")]
    for agent in _objects(state / "agents", "*.json"):
        evidence.memories[agent["agent_id"]] = agent.get("context", {}).get("working_memory", {})
    return evidence


def _objects(folder: Path, pattern: str) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob(pattern)):
        yield json.loads(path.read_bytes())


def prove(
    folder: Path, before: dict[str, str], seen: Evidence, calm: Evidence, stored: AcknowledgedIds
) -> Iterator[ClaimCheck]:
    """Every claim of the demo. ``calm`` is the evidence of a run without kills."""
    names = list(before)
    changed = [
        path for path, digest in files.fingerprint(folder, names).items() if digest != before[path]
    ]
    yield _holds_without("the files are as they were at the start", changed, f"{len(names)} files")

    rows = analysis.rows(seen.report)
    expected = [analysis.row(files.read_and_analyse(folder, name)) for name in names]
    listed = Counter(row.split(" | ")[0] for row in rows)
    wanted = Counter(row.split(" | ")[0] for row in expected)
    yield _holds_without(
        "every file is in the report, once",
        [*(listed - wanted), *(wanted - listed)],
        f"{len(rows)} rows",
    )
    wrong = [*(Counter(rows) - Counter(expected)), *(Counter(expected) - Counter(rows))]
    yield _holds_without(
        "its numbers are right, counted again here", wrong, f"{len(expected)} rows"
    )
    yield ClaimCheck(
        "the report equals that of a run without kills",
        seen.report == calm.report,
        f"{len(seen.report.encode()):,} bytes and {len(calm.report.encode()):,} bytes",
    )

    tasks = Counter((task["agent_id"], task["task_id"]) for task in seen.tasks)
    lost = stored.tasks - tasks.keys()
    yield _holds_without("no acknowledged task is lost", lost, f"{len(stored.tasks)} acknowledged")
    undone = [task["task_id"] for task in seen.tasks if task["status"] != "completed"]
    again = sum(1 for task in seen.tasks if task.get("interruptions"))
    yield _holds_without(
        "every task is completed",
        undone,
        f"{len(seen.tasks)} tasks, {again} interrupted on the way",
    )
    mail = Counter((message["to_agent"], message["message_id"]) for message in seen.mail)
    lost = stored.mail - mail.keys()
    yield _holds_without("no acknowledged mail is lost", lost, f"{len(stored.mail)} acknowledged")
    said = Counter((message["to_agent"], message["subject"]) for message in seen.mail)
    twice = [place for place, count in said.items() if count > 1]
    yield _holds_without("no mail came twice", twice, f"{len(seen.mail)} messages")
    yield _holds_without(
        "tasks, mail and memories equal those of a run without kills",
        [*_differing(_comparable(seen), _comparable(calm))],
        f"{len(tasks)} tasks, {len(mail)} messages, {len(seen.memories)} memories",
    )


def inspect_killed(state: Path) -> tuple[int, list[str]]:
    """The number of changes in a killed server's journal, and the damaged files."""
    try:
        report = asyncio.run(verify(state))
    except StateNotFoundError:
        return 0, []  # killed before it created the directory
    return report.journal.changes, [f"{one.path}: {one.why}" for one in report.problems]


def check_undamaged(found: list[str], kills: int) -> ClaimCheck:
    """Check that no kill left a damaged file."""
    return _holds_without(
        "no kill left anything damaged", found, f"looked at after each of {kills}"
    )


def check_verified(state: Path) -> ClaimCheck:
    """Check that ``agent-state verify`` finds nothing in the end."""
    report = asyncio.run(verify(state))
    found = [f"{one.path}: {one.why}" for one in (*report.problems, *report.notices)]
    found += [f"{kept.path}: {kept.reason}" for kept in report.quarantine]
    documents = sum(report.documents.values())
    return _holds_without(
        "agent-state verify finds nothing in the end", found, f"{documents} documents"
    )


def _comparable(evidence: Evidence) -> dict[tuple[str, ...], Any]:
    """The content that must not depend on kills: all but times and numbers of attempts."""
    found: dict[tuple[str, ...], Any] = {}
    for task in evidence.tasks:
        place = ("task", task["agent_id"], task["task_id"])
        found[place] = [task["name"], task["status"], task.get("payload"), task.get("result")]
    for message in evidence.mail:
        place = ("mail", message["to_agent"], message["message_id"])
        found[place] = [message["subject"], message["body"], message["status"]]
    for agent_id, memory in evidence.memories.items():
        found["memory", agent_id] = memory
    for agent_id in evidence.asleep:
        found["sleep", agent_id] = True
    return found


def _differing(one: dict[tuple[str, ...], Any], other: dict[tuple[str, ...], Any]) -> list[str]:
    missing = object()
    return [
        "/".join(place)
        for place in sorted({*one, *other})
        if one.get(place, missing) != other.get(place, missing)
    ]


def _holds_without(claim: str, contradictions: Iterable[object], detail: str) -> ClaimCheck:
    """A claim that holds without contradictions."""
    found = [str(one) for one in contradictions]
    if not found:
        return ClaimCheck(claim, holds=True, detail=detail)
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return ClaimCheck(claim, holds=False, detail=f"not so: {', '.join(found[:3])}{more}")
