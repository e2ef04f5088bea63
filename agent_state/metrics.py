"""Figures about a program at work, and their text in Prometheus' format.

Only values are here. The manager measures its saves, ``runtime.statistics`` the tasks of a runtime,
``telemetry`` gives both to OpenTelemetry, and the HTTP server has them at ``/metrics``.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

SAVE_BUCKETS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
    10.0,
)  # fmt: skip
"""Upper bounds for the time of a save, in seconds."""

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
"""The content type of ``to_prometheus``."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure at one time, with a value for each combination of its labels."""

    name: str
    """In dotted form, such as ``agent_state.tasks.waiting``."""
    description: str
    values: Sequence[tuple[Mapping[str, str], float]]
    kind: Literal["gauge", "counter"] = "gauge"
    """A counter only grows while the process lives."""
    unit: str = ""
    """``s`` for seconds; empty for a number of things."""


@dataclass(slots=True)
class LatencyHistogram:
    """How often something took how long."""

    name: str
    description: str
    bounds: Sequence[float] = SAVE_BUCKETS
    """Upper bounds of the buckets, in seconds."""
    counts: list[int] = field(default_factory=list)
    """By bucket; the last one has no bound."""
    total: float = 0.0
    """The sum, in seconds."""

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, seconds: float) -> None:
        """Count one more."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds


@dataclass(slots=True)
class SaveStatistics:
    """The saves of one manager since it was made."""

    seconds: LatencyHistogram = field(
        default_factory=lambda: LatencyHistogram(
            "agent_state.save.duration", "Time until a save was durable, or refused."
        )
    )
    errors: Counter[str] = field(default_factory=Counter)
    """Those that raised, by the name of the error."""
    refused: bool = False
    """Whether the storage has refused one, and taken none since."""

    def metric(self) -> Metric:
        """Return the failed saves."""
        values = [({"error": name}, float(count)) for name, count in sorted(self.errors.items())]
        text = "Saves that raised, by error; a conflict or a refused state is one, too."
        return Metric("agent_state.save.errors", text, values, "counter")


@dataclass(frozen=True, slots=True)
class JournalLag:
    """How far the readable files are behind the journal, which has every acknowledged change."""

    documents: int
    """Documents and logs with changes that no file has yet."""
    seconds: float
    """At most so long the oldest of these changes has waited; 0 for none."""

    def metrics(self) -> Iterator[Metric]:
        documents = "Documents and logs whose newest change is in the journal only."
        yield Metric("agent_state.journal.waiting", documents, [({}, float(self.documents))])
        seconds = "How long the oldest of them has waited at most."
        yield Metric("agent_state.journal.lag", seconds, [({}, self.seconds)], unit="s")


# -- Prometheus ------------------------------------------------------------------------------


def to_prometheus(metrics: Iterable[Metric], histograms: Iterable[LatencyHistogram] = ()) -> str:
    """Return the figures in Prometheus' text format, version 0.0.4."""
    lines: list[str] = []
    for metric in metrics:
        name = _name(metric.name, metric.unit) + ("_total" if metric.kind == "counter" else "")
        lines += _head(name, metric.description, metric.kind)
        lines += [f"{name}{_labels(labels)} {_number(value)}" for labels, value in metric.values]
    for histogram in histograms:
        name = _name(histogram.name, "s")
        lines += _head(name, histogram.description, "histogram")
        count = 0
        for bound, more in zip((*histogram.bounds, math.inf), histogram.counts, strict=True):
            count += more
            lines.append(f"{name}_bucket{_labels({'le': _number(bound)})} {count}")
        lines += [f"{name}_sum {_number(histogram.total)}", f"{name}_count {count}"]
    return "\n".join([*lines, ""])


def _name(name: str, unit: str) -> str:
    return name.replace(".", "_") + ("_seconds" if unit == "s" else "")


def _head(name: str, description: str, kind: str) -> list[str]:
    text = description.replace("\\", r"\\").replace("\n", r"\n")
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def _labels(labels: Mapping[str, str]) -> str:
    pairs = []
    for name, value in labels.items():
        text = value.encode("utf-8", "backslashreplace").decode()
        text = text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
        pairs.append(f'{name}="{text}"')
    return f"{{{','.join(pairs)}}}" if pairs else ""


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(int(value)) if float(value).is_integer() else repr(float(value))
