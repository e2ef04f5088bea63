"""What a benchmark says: figures with their spread, and whether each reached its target."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True)
class Target:
    """A bound on the median."""

    bound: float
    at_least: bool

    def holds(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.bound:g}"


def at_least(bound: float) -> Target:
    return Target(bound, at_least=True)


def at_most(bound: float) -> Target:
    return Target(bound, at_least=False)


@dataclass(frozen=True, slots=True)
class Row:
    """One figure: what was measured in each run of the same session, and what is asked of it."""

    what: str
    values: Sequence[float]
    unit: str
    target: Target | None = None
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.target is None or self.target.holds(median(self.values))

    def as_object(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "median": median(self.values),
            "min": min(self.values),
            "max": max(self.values),
            "runs": len(self.values),
            "unit": self.unit,
            "target": asdict(self.target) if self.target else None,
            "ok": self.ok,
            "note": self.note,
        }


def table(rows: Iterable[Row]) -> str:
    """All rows, one a line, with the spread next to the median."""
    lines = [("", "median", "min … max", "unit", "target", "")]
    for row in rows:
        spread = f"{number(min(row.values))} … {number(max(row.values))}"
        if len(row.values) == 1:
            spread = "one run"
        verdict = "" if row.target is None else "ok" if row.ok else "MISSED"
        lines.append(
            (
                row.what,
                number(median(row.values)),
                spread,
                row.unit,
                str(row.target or ""),
                f"{verdict} {row.note}".strip(),
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    return "\n".join(
        f"{line[0]:<{widths[0]}}  {line[1]:>{widths[1]}}  {line[2]:>{widths[2]}}  "
        f"{line[3]:<{widths[3]}}  {line[4]:<{widths[4]}}  {line[5]}".rstrip()
        for line in lines
    )


def number(value: float) -> str:
    """Three figures that mean something."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
