"""``agent-state`` alone, and ``agent-state ls``: a directory at a glance.

It is done without the packages that parse commands, colour tables or validate models, so that it
starts at once.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from agent_state.cli.output import (
    OK,
    PROBLEM,
    counted,
    print_error,
    print_line,
    progress,
    show_json,
    show_table,
)
from agent_state.cli.overview import KINDS, WAITING, AgentOverview, PlainReader, read_agents
from agent_state.clock import instant
from agent_state.errors import describe
from agent_state.protocols import BodySealer, Incident, JsonObject

if TYPE_CHECKING:
    from agent_state.storage.inspection import JournalCheck
    from agent_state.storage.quarantine import QuarantinedFile

MAX_ROWS = 1000
"""The rows of a table for people; JSON for scripts has all."""
KEYRING_VARIABLE = "AGENT_STATE_KEYRING"
"""The folder of the keys of an encrypted state."""
STATE, STATE_VARIABLE = "state", "AGENT_STATE_DIR"
"""The state directory that is meant unless ``--state`` or the variable names another one."""
_FEW_ROWS = 20
_UNITS = ((86_400, "d"), (3_600, "h"), (60, "min"))


def list_agents(state: Path, as_json: bool, sealer: BodySealer | None = None) -> int:
    """Print every agent, and what was set aside; the exit code."""
    reader = PlainReader(state, sealer)
    with progress("reading") as advance:
        agents = read_agents(reader, advance)
    owner, kept = reader.owner(), reader.kept_aside()
    if as_json:
        found = {"state_dir": reader.root, "owner": owner, "agents": agents, "quarantine": kept}
        show_json(found)
    else:
        print_line(f"{reader.root}: {counted(len(agents), 'agent')}, {owner_line(owner)}")
        show_agents(agents, MAX_ROWS)
        show_kept_aside(kept)
    return report_unusable(reader.incidents, as_json=as_json)


def glance(state: Path, as_json: bool, sealer: BodySealer | None = None) -> int:
    """Print what there is in a directory, and how it is; the exit code."""
    from agent_state.cli.sizes import measure, readable

    reader = PlainReader(state, sealer)
    with progress("reading") as advance:
        agents = read_agents(reader, advance)
    kinds = {kind: reader.count(kind) for kind in reader.kinds() if kind not in KINDS}
    mirror, started = reader.document("system", ("mirror",)), _last_start(reader)
    sizes, journal, owner = measure(Path(reader.root)), reader.journal(), reader.owner()
    kept, tasks = reader.kept_aside(), sum((Counter(agent.tasks) for agent in agents), Counter())
    if as_json:
        show_json(
            {
                "state_dir": reader.root,
                "owner": owner,
                "agents": agents,
                "tasks": tasks,
                "kinds": {
                    kind: {"documents": documents, "logs": logs}
                    for kind, (documents, logs) in kinds.items()
                },
                "bytes": sizes.bytes,
                "files": sizes.files,
                "last_start": started,
                "journal": journal,
                "mirror": mirror,
                "quarantine": kept,
                "unusable": reader.incidents,
            }
        )
        return PROBLEM if reader.incidents else OK
    print_line(f"{reader.root}: {counted(len(agents), 'agent')}, {owner_line(owner)}")
    show_agents(agents, _FEW_ROWS)
    lines = [
        ("tasks", _tasks_line(tasks, agents)),
        ("mail", f"{sum(agent.unread for agent in agents):,} unread"),
        ("asleep", _sleep_line(agents)),
        ("also", _kinds_line(kinds)),
        ("size", f"{readable(sizes.bytes)} in {counted(sizes.files, 'file')}"),
        ("last start", _start_line(started, reader.is_served())),
        ("journal", journal_line(journal)),
        ("mirror", _mirror_line(mirror)),
        ("set aside", counted(len(kept), "file") if kept else "nothing"),
    ]
    for name, text in lines:
        print_line(f"{name:<10}  {text}")
    show_kept_aside(kept)
    return report_unusable(reader.incidents, as_json=False)


# -- what both show --------------------------------------------------------------------------


def owner_line(owner: int | None) -> str:
    if owner is None:
        return "no server owns it"
    return f"owned by process {owner}" if owner else "owned by a running process"


def show_agents(agents: Sequence[AgentOverview], most: int) -> None:
    """A table of agents, of ``most`` rows."""
    if not agents:
        return
    rows = (
        (
            agent.agent_id,
            agent.status or ("—" if agent.stored else "(none)"),
            agent.agent_type,
            ", ".join(f"{number} {status}" for status, number in sorted(agent.tasks.items())),
            agent.unread or None,
            short_time(agent.asleep_until or "woken") if agent.asleep else None,
        )
        for agent in agents[:most]
    )
    show_table(("agent", "status", "type", "tasks", "unread", "asleep until"), rows)
    if len(agents) > most:
        print_line(f"… and {len(agents) - most} more")


def show_kept_aside(kept: Sequence[QuarantinedFile]) -> None:
    """The newest files of the quarantine."""
    if not kept:
        return
    print_line()
    print_line(f"{counted(len(kept), 'file')} set aside in .quarantine:", "yellow")
    for each in kept[:5]:
        print_line(f"  {each.was or each.path}, {short_time(each.at or '')}: {each.reason}")
    if len(kept) > 5:
        print_line(f"  … and {len(kept) - 5} more (see agent-state quarantine ls)")


def report_unusable(incidents: Sequence[Incident], *, as_json: bool) -> int:
    """Report the files that could not be used; on stderr if stdout is for JSON alone."""
    if not incidents:
        return OK
    if as_json:
        for incident in incidents:
            print_error(f"not usable: {location(incident)}: {incident.what}")
    else:
        show_unusable(incidents)
    return PROBLEM


def show_unusable(incidents: Sequence[Incident]) -> None:
    """Print the files that could not be used."""
    files = counted(len(incidents), "file")
    print_line()
    print_line(f"{files} could not be used (see agent-state doctor):", "red")
    for incident in incidents[:20]:
        print_line(f"  {location(incident)}: {incident.what}")
    if len(incidents) > 20:
        print_line(f"  … and {len(incidents) - 20} more")


def location(incident: Incident) -> str:
    """The path of the incident; without one, the document's name."""
    return incident.path or describe(incident.kind or "", incident.key)


def short_time(text: str) -> str:
    """A time without its microseconds."""
    whole, dot, rest = text.partition(".")
    return f"{whole}Z" if dot and len(rest) == 7 and rest.endswith("Z") else text


def ago(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3 h`` or ``5 d``."""
    for size, unit in _UNITS:
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def since(moment: str) -> str:
    """How long ago a stored time was; empty if it is none."""
    try:
        return ago(time.time() - instant(moment).timestamp())
    except ValueError:
        return ""


# -- the lines of the glance -----------------------------------------------------------------


def _tasks_line(tasks: Counter[str], agents: Iterable[AgentOverview]) -> str:
    if not tasks:
        return "none"
    line = ", ".join(f"{number:,} {status}" for status, number in sorted(tasks.items()))
    due = {agent.oldest_due: agent.agent_id for agent in agents if agent.oldest_due}
    if due and any(tasks[status] for status in WAITING):
        oldest = min(due)
        line += f"; the oldest waits since {since(oldest)} ({due[oldest]})"
    if tasks["dead"]:
        line += "; dead ones: agent-state tasks ls --dead"
    return line


def _sleep_line(agents: Iterable[AgentOverview]) -> str:
    sleepers = [agent for agent in agents if agent.asleep]
    times = sorted(agent.asleep_until for agent in sleepers if agent.asleep_until)
    first = f"; the first wakes at {short_time(times[0])}" if times else ""
    return f"{len(sleepers):,}{first}" if sleepers else "nobody"


def _kinds_line(kinds: dict[str, tuple[int, int]]) -> str:
    found = []
    for kind, (documents, logs) in sorted(kinds.items()):
        parts = [counted(documents, "document")] if documents else []
        parts += [counted(logs, "log")] if logs else []
        found += [f"{kind} ({', '.join(parts)})"] if parts else []
    return ", ".join(found) or "nothing"


def _last_start(reader: PlainReader) -> JsonObject | None:
    started = reader.document("system", ("runtime",))
    return started and {name: started.get(name) for name in ("at", "status")}


def _start_line(started: JsonObject | None, served: bool) -> str:
    if started is None:
        return "no runtime has run here"
    at = short_time(str(started["at"]))
    if started["status"] != "running":
        return f"it stopped in good order at {at}"
    return at if served else f"{at}, and it did not stop in good order"


def journal_line(journal: JournalCheck | None) -> str:
    """The state of the journal in words."""
    if journal is None:
        return "empty"
    parts = [counted(journal.changes, "change") + " not in their files yet"]
    parts += [counted(journal.intents, "unfinished group")] if journal.intents else []
    parts += [counted(len(journal.damaged), "damaged file")] if journal.damaged else []
    return ", ".join(parts)


def _mirror_line(mirror: JsonObject | None) -> str:
    if mirror is None:
        return "none"
    line = f"{mirror.get('mirror')}: {mirror.get('state')}, {mirror.get('waiting')} waiting"
    error = mirror.get("last_error")
    return f"{line}; the last error: {error}" if error else line


# -- without a parser of commands --------------------------------------------------------------


def quick_command(args: Sequence[str]) -> Callable[[], int] | None:
    """What ``agent-state`` and ``agent-state ls`` do, if nothing but --state and --json is given.

    None for everything else, which is parsed as a command.
    """
    if os.environ.get(KEYRING_VARIABLE):
        return None  # encryption has options of its own
    work, rest = (list_agents, [*args[1:]]) if args[:1] == ["ls"] else (glance, [*args])
    state, as_json = os.environ.get(STATE_VARIABLE) or None, False
    while rest:
        option = rest.pop(0)
        if option == "--json":
            as_json = True
        elif option == "--state" and rest and rest[0]:
            state = rest.pop(0)
        else:
            return None
    if work is glance and state is None and not os.path.isdir(STATE):  # noqa: PTH112
        return None  # the help
    return lambda: work(Path(state or STATE), as_json)
