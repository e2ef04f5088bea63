"""Runs many seeds, and says of a broken law what somebody needs who is to mend it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tests.simulation.driver import Outcome, simulate
from tests.simulation.histories import History, draw_history
from tests.simulation.shrinking import shrink


@dataclass(slots=True)
class Totals:
    """What many seeds came to."""

    commits: int = 0
    faults: int = 0
    broken: str | None = None
    """The report of the first seed that breaks a law; None if none does."""


def run(seeds: Iterable[int]) -> Totals:
    """Run the histories of these seeds, to the first that breaks a law."""
    totals = Totals()
    for seed in seeds:
        history = draw_history(seed)
        outcome = simulate(history)
        totals.commits += outcome.commits
        totals.faults += outcome.faults
        if outcome.broken is not None:
            small = shrink(history, outcome.broken.kind)
            totals.broken = report(small, simulate(small, tracing=True))
            break
    return totals


def report(history: History, outcome: Outcome) -> str:
    """The history, its trace, and how it is run again."""
    lines = [str(outcome.broken or "every law holds"), *history.lines(), *_readable(outcome.trace)]
    lines.append(f"{outcome.commits} commits in {outcome.seconds:.0f} simulated seconds")
    lines.append(f"again: python -m tests.simulation {history.seed}")
    return "\n".join(lines)


def _readable(trace: list[str]) -> list[str]:
    """The trace without renewals, of which there may be hundreds."""
    renewals = 0
    lines = []
    for line in [*trace, ""]:
        if " commits system/leases/" in line or " commits system/runtimes/" in line:
            renewals += 1
            if renewals > 2:
                continue
        elif renewals:
            lines += [f"              … {renewals} renewals"] if renewals > 2 else []
            renewals = 0
        lines.append(line)
    return lines
