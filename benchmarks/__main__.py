"""``python -m benchmarks [name ...] [--json] [--quick] [--directory DIR]``.

Everything that is compared is measured in this one run, turn by turn, five times; the table
gives the median and, beside it, the smallest and the largest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks import (
    analysing,
    archives,
    command,
    conversations,
    cost,
    dashboard,
    fixtures,
    frameworks,
    git,
    handlers,
    histories,
    http,
    journey,
    large,
    mirror,
    reading,
    recording,
    redis_state,
    redis_store,
    saves,
    shapes,
    starting,
    tasks,
    telemetry,
)
from benchmarks.report import Row, table
from benchmarks.workload import Setting

BENCHMARKS: dict[str, Callable[[Setting], list[Row]]] = {
    "exclusive": saves.exclusive,
    "shared": saves.shared,
    "shapes": shapes.shapes,
    "single": saves.single,
    "cost": cost.cost,
    "large": large.large,
    "histories": histories.histories,
    "restore": reading.restore,
    "memory": reading.memory,
    "tasks": tasks.tasks,
    "handlers": handlers.handlers,
    "quota": handlers.quota,
    "import": starting.importing,
    "command": command.command,
    "fixtures": fixtures.fixtures,
    "journey": journey.journey,
    "conversations": conversations.conversations,
    "git": git.git,
    "http": http.http,
    "dashboard": dashboard.dashboard,
    "mirror": mirror.mirror,
    "redis_state": redis_state.redis_state,
    "redis_store": redis_store.redis_store,
    "recording": recording.recording,
    "archives": archives.archives,
    "analysing": analysing.analysing,
    "telemetry": telemetry.telemetry,
    "langgraph": frameworks.langgraph,
    "openai_agents": frameworks.openai_agents,
    "strands": frameworks.strands,
    "key_value": frameworks.key_value,
    "google_adk": frameworks.google_adk,
}


def main() -> int:
    """Run what is asked for; 1 when a target was missed, 2 on misuse."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"any of: {', '.join(BENCHMARKS)}")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--quick", action="store_true", help="a fifth of the work, three runs")
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path(__file__).resolve().parents[2],
        help="where to write; the default is beside the checkout",
    )
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    kind = file_system(arguments.directory)
    if kind == "tmpfs":
        parser.error("a tmpfs has no disk to wait for; choose another --directory")
    heading = (
        f"Python {platform.python_version()}, {os.cpu_count()} cores, {platform.system()}, "
        f"file system {kind}, load {os.getloadavg()[0]:.1f} before the start"
    )
    if not arguments.json:
        print(heading, flush=True)
    results = {}
    with tempfile.TemporaryDirectory(prefix="agent-state-", dir=arguments.directory) as folder:
        setting = Setting(Path(folder), 3 if arguments.quick else 5, arguments.quick)
        for name in arguments.names or BENCHMARKS:
            results[name] = BENCHMARKS[name](setting)
            if not arguments.json:
                print(f"\n{name}\n{table(results[name])}", flush=True)
    if arguments.json:
        figures = {name: [row.as_object() for row in rows] for name, rows in results.items()}
        print(json.dumps({"machine": heading, "benchmarks": figures}, indent=2, ensure_ascii=False))
    return 0 if all(row.ok for rows in results.values() for row in rows) else 1


def file_system(directory: Path) -> str:
    """The kind of file system a directory is on; ``unknown`` where nothing tells."""
    try:
        mounts = Path("/proc/mounts").read_text().splitlines()
    except FileNotFoundError:
        return "unknown"
    best, found = "", "unknown"
    for line in mounts:
        _, point, kind, *_ = line.split()
        if directory.is_relative_to(point) and len(point) >= len(best):
            best, found = point, kind
    return found


if __name__ == "__main__":
    sys.exit(main())
