"""``agent-state top``: the agents of a directory as a table that is drawn again and again."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from agent_state.cli.glance import journal_line, owner_line, short_time, since
from agent_state.cli.options import (
    OK,
    STATE,
    JsonOption,
    StateOption,
    given_keyring,
    parse_seconds,
)
from agent_state.cli.output import counted, print_line, printable, show_json, show_table
from agent_state.cli.overview import WAITING, AgentOverview, PlainReader, read_agents
from agent_state.protocols import BodySealer

_AROUND_TABLE = 7
"""The lines of a frame that are no rows of agents."""
_COLUMNS = (
    "agent",
    "status",
    "type",
    "running",
    "waiting",
    "oldest",
    "dead",
    "done",
    "per min",
    "unread",
    "asleep until",
)
_NUMBERS = {"running", "waiting", "oldest", "dead", "done", "per min", "unread"}


class Rates:
    """How many tasks each agent completes in a minute, by what was completed at each look."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[float, int]] = {}

    def look(self, agents: Iterable[AgentOverview], now: float) -> dict[str, float]:
        """Return the rate of each agent since it was first seen; ``now``: seconds."""
        rates = {}
        for agent in agents:
            done = agent.tasks.get("completed", 0)
            at, before = self._first.setdefault(agent.agent_id, (now, done))
            if done < before:  # cleaning up has archived some
                self._first[agent.agent_id] = now, done
            elif now > at:
                rates[agent.agent_id] = (done - before) * 60 / (now - at)
        return rates


def order(agents: Iterable[AgentOverview]) -> list[AgentOverview]:
    """Return who works first, then whose task has waited longest, then the others by name."""
    return sorted(
        agents,
        key=lambda agent: (
            not agent.tasks.get("in_progress"),
            agent.oldest_due or "~",
            not agent.tasks.get("dead"),
            agent.agent_id,
        ),
    )


def top(
    state: StateOption = STATE,
    every: Annotated[
        str, typer.Option("--every", help="How often to look, such as 0.5s or 1m.")
    ] = "2s",
    once: Annotated[bool, typer.Option("--once", help="Draw it once, and end.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Draw a table of all agents, those that work first, and again, until Ctrl-C.

    Tasks that run, wait, are dead and done, how long the oldest has waited, completed tasks a
    minute since the start of this command, unread mail, sleepers. Works while a server runs, and
    changes nothing.

    Example: agent-state top --every 5s
    """
    seconds, sealer, rates = max(0.1, parse_seconds(every)), given_keyring(), Rates()
    if as_json:
        reader = PlainReader(state, sealer)
        agents = order(read_agents(reader))
        show_json({"state_dir": reader.root, "owner": reader.owner(), "agents": agents})
        raise typer.Exit(OK)
    console = Console()
    if once or not console.is_terminal:
        head, rows, last = _look(state, sealer, rates, most=None)
        for line in head:
            print_line(line)
        show_table(_COLUMNS, rows)
        for line in last:
            print_line(line)
        raise typer.Exit(OK)
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                room = max(1, console.height - _AROUND_TABLE)
                live.update(_frame(state, sealer, rates, room), refresh=True)
                time.sleep(min(seconds, threading.TIMEOUT_MAX))
    except KeyboardInterrupt:
        raise typer.Exit(OK) from None


Cell = str | int | None


def _look(
    state: Path, sealer: BodySealer | None, rates: Rates, *, most: int | None
) -> tuple[list[str], list[tuple[Cell, ...]], list[str]]:
    """What is above the table, its rows, and what is below it."""
    reader = PlainReader(state, sealer)  # raises if it is missing
    agents = order(read_agents(reader))
    rate = rates.look(agents, time.monotonic())
    head = f"{reader.root}: {counted(len(agents), 'agent')}, {owner_line(reader.owner())}"
    left = 0 if most is None else max(0, len(agents) - most)
    last = [f"… and {counted(left, 'agent')} more"] if left else []
    if reader.incidents:
        files = counted(len(reader.incidents), "file")
        last.append(f"{files} could not be used (see agent-state doctor)")
    rows = [_row(agent, rate.get(agent.agent_id)) for agent in agents[:most]]
    return [head, f"journal: {journal_line(reader.journal())}"], rows, last


def _row(agent: AgentOverview, rate: float | None) -> tuple[Cell, ...]:
    return (
        agent.agent_id,
        agent.status,
        agent.agent_type,
        agent.tasks.get("in_progress"),
        sum(agent.tasks.get(status, 0) for status in WAITING) or None,
        since(agent.oldest_due) if agent.oldest_due else None,
        agent.tasks.get("dead"),
        agent.tasks.get("completed"),
        round(rate) if rate else None,
        agent.unread or None,
        short_time(agent.asleep_until or "woken") if agent.asleep else None,
    )


def _frame(state: Path, sealer: BodySealer | None, rates: Rates, rows: int) -> Group:
    """The whole terminal."""
    head, cells, last = _look(state, sealer, rates, most=rows)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    used = [n for n, _ in enumerate(_COLUMNS) if not n or any(row[n] is not None for row in cells)]
    for n in used:
        side: Literal["left", "right"] = "right" if _COLUMNS[n] in _NUMBERS else "left"
        table.add_column(_COLUMNS[n], justify=side, overflow="ellipsis", no_wrap=True)
    for row in cells:
        style = "red" if row[_COLUMNS.index("dead")] else "bold" if row[1] == "active" else ""
        table.add_row(
            *("" if row[n] is None else Text(printable(str(row[n]))) for n in used), style=style
        )
    lines = [Text(printable(line)) for line in head]
    return Group(*lines, table, *(Text(printable(line)) for line in last))
