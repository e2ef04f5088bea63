"""``agent-state doctor``: what is wrong with a directory, why, and what to do."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import typer

from agent_state.cli.glance import owner_line, since
from agent_state.cli.options import OK, PROBLEM, STATE, JsonOption, StateOption, given_keyring
from agent_state.cli.output import counted, print_line, progress, show_json
from agent_state.cli.overview import PlainReader, read_agents
from agent_state.cli.sizes import readable
from agent_state.clock import instant
from agent_state.verify import Fault, Finding, VerifyReport, verify

_FREE_BYTES = 100 << 20
_LATE_SECONDS = 3600.0
_UNANSWERED_SECONDS = 60.0
_SHOWN = 20
_SOUND_MIRROR = frozenset({"starting", "following", "closed"})

_ADVICE: dict[Fault, str] = {
    "damaged": "the next start, or `agent-state restore`, sets it aside and restores its last "
    "good version; or mend it now",
    "invalid": "mend its fields by hand; or let the next start set it aside, and put it back "
    "with `agent-state quarantine restore`",
    "unmerged": "resolve the merge, by `agent-state git resolve` or by hand, and `git add` it",
    "newer schema": "use the version of agent-state that wrote it; it is left untouched",
    "unreachable": "give this user permission to read it",
    "encrypted": "give the keyring that it was encrypted with (--keyring)",
    "unknown file": "rename it to `ID.json`, or move it out of the directory",
}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One thing that is wrong, or that somebody should know."""

    severity: Literal["problem", "warning"]
    what: str
    why: str
    do: str
    """What to do about it."""
    where: str | None = None
    """A file or folder, relative to the state directory."""


def doctor(state: StateOption = STATE, as_json: JsonOption = False) -> None:
    """Say what is wrong with a directory, why, and what to do; exit 1 if something is.

    It checks every file as `verify` does, and then what a person would look at: dead tasks, tasks
    that wait for a server, requests without an answer, the mirror, the last start, what was set
    aside, permissions, room on the disk. Works while a server runs, and changes nothing.

    Example: agent-state doctor --json
    """
    with progress("checking") as advance:
        report = asyncio.run(verify(state, encryption=given_keyring(), progress=advance))
    found = [*examine(report)]
    problems = sum(one.severity == "problem" for one in found)
    if as_json:
        findings = [asdict(one) for one in found]
        show_json({"state_dir": report.state_dir, "ok": not problems, "findings": findings})
    else:
        print_line(f"{report.state_dir}: {owner_line(report.owner)}")
        for one in found[:_SHOWN]:
            print_line()
            style = "red" if one.severity == "problem" else "yellow"
            print_line(
                f"{one.severity}: {one.what}" + (f": {one.where}" if one.where else ""), style
            )
            print_line(f"  why   {one.why}")
            print_line(f"  do    {one.do}")
        if len(found) > _SHOWN:
            print_line(f"… and {len(found) - _SHOWN} more (--json has all)")
        print_line()
        warnings = len(found) - problems
        print_line(f"{counted(problems, 'problem')}, {counted(warnings, 'warning')}")
    raise typer.Exit(PROBLEM if problems else OK)


def examine(report: VerifyReport) -> Iterator[Diagnosis]:
    """What is wrong with a directory that was verified, the problems first. Blocks."""
    for finding in report.problems:
        yield _of_file(finding)
    reader = PlainReader(report.state_dir, given_keyring())
    yield from _of_quarantine(report)
    served = reader.is_served()
    yield from _of_tasks(reader, served)
    yield from _of_requests(reader)
    yield from _of_mirror(reader)
    yield from _of_last_start(reader, served)
    yield from _of_permissions(Path(report.state_dir))
    yield from _of_disk(report.state_dir)


def _of_file(finding: Finding) -> Diagnosis:
    do = _ADVICE.get(finding.fault, "look at it with `agent-state verify`")
    return Diagnosis("problem", f"{finding.fault} file", finding.why, do, finding.path)


def _of_quarantine(report: VerifyReport) -> Iterator[Diagnosis]:
    for kept in report.quarantine:
        yield Diagnosis(
            "warning",
            "a file was set aside",
            kept.reason,
            f"mend it, then `agent-state quarantine restore {kept.path}`; "
            f"or `agent-state quarantine drop {kept.path}`",
            kept.path,
        )


def _of_tasks(reader: PlainReader, served: bool) -> Iterator[Diagnosis]:
    agents = read_agents(reader)
    dead = sum(agent.tasks.get("dead", 0) for agent in agents)
    if dead:
        yield Diagnosis(
            "warning",
            f"{counted(dead, 'task')} dead",
            "all attempts failed; `agent-state tasks ls --dead` has the errors",
            "mend the cause, then `agent-state tasks retry --dead`; or `agent-state tasks delete "
            "--dead`",
        )
    late = [
        agent for agent in agents if agent.oldest_due and _age(agent.oldest_due) > _LATE_SECONDS
    ]
    stopped = [agent for agent in late if agent.status == "stopped"]
    for agent in stopped[:_SHOWN]:
        yield Diagnosis(
            "warning",
            f"a task waits since {since(agent.oldest_due or '')}",
            f"the agent {agent.agent_id} is stopped",
            f"`agent-state agents start {agent.agent_id}`",
            f"tasks/{agent.agent_id}",
        )
    waiting = [agent for agent in late if agent.status != "stopped"]
    if waiting:
        oldest = min(waiting, key=lambda agent: agent.oldest_due or "")
        why = "the server has no handler for them, or is busy" if served else "no server runs here"
        do = "look into its log" if served else "start the server with a handler for them"
        yield Diagnosis(
            "warning",
            f"tasks of {counted(len(waiting), 'agent')} wait, "
            f"one since {since(oldest.oldest_due or '')}",
            why,
            do,
            f"tasks/{oldest.agent_id}",
        )


def _of_requests(reader: PlainReader) -> Iterator[Diagnosis]:
    old = 0
    folder = Path(reader.root) / "requests"
    for path in folder.glob("*.json") if folder.is_dir() else ():
        try:
            old += time.time() - path.stat().st_mtime > _UNANSWERED_SECONDS
        except FileNotFoundError:
            continue  # it was answered
    if old:
        yield Diagnosis(
            "warning",
            f"{counted(old, 'request')} without an answer",
            "a command asked, and no runtime owns the directory and answers",
            "start the server, which carries them out; or remove them",
            "requests",
        )


def _of_mirror(reader: PlainReader) -> Iterator[Diagnosis]:
    mirror = reader.document("system", ("mirror",))
    if mirror is not None and mirror.get("state") not in _SOUND_MIRROR:
        yield Diagnosis(
            "warning",
            f"the mirror is {mirror.get('state')}, {mirror.get('waiting')} documents wait",
            str(mirror.get("last_error") or "its last report says no more"),
            "`agent-state mirror status`; what waits is written when the mirror answers again",
            "system/mirror.json",
        )


def _of_last_start(reader: PlainReader, served: bool) -> Iterator[Diagnosis]:
    started = reader.document("system", ("runtime",))
    if started is not None and started.get("status") == "running" and not served:
        yield Diagnosis(
            "warning",
            "the last server did not stop in good order",
            f"it started at {started.get('at')}, and no process owns the directory",
            "start it again, which restores everything; `agent-state restore --dry-run` says what "
            "it would do",
        )


def _of_permissions(root: Path) -> Iterator[Diagnosis]:
    if os.name == "posix" and stat.S_IMODE(root.stat().st_mode) & 0o077:
        yield Diagnosis(
            "warning",
            "other users may read or change the directory",
            f"its permissions are {stat.S_IMODE(root.stat().st_mode):o}",
            f"chmod 700 {root}",
            ".",
        )


def _of_disk(root: str) -> Iterator[Diagnosis]:
    free = shutil.disk_usage(root).free
    if free < _FREE_BYTES:
        yield Diagnosis(
            "warning",
            f"the disk has {readable(free)} left",
            "a full disk refuses each change; nothing that is stored is lost by that",
            "`agent-state ls --sizes` says what is large; `agent-state cleanup` archives",
        )


def _age(moment: str) -> float:
    try:
        return time.time() - instant(moment).timestamp()
    except ValueError:
        return 0.0
