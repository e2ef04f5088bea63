"""Analytics of a long log, compared with a bare parse of the same file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from random import Random

from agent_state.clock import stamp
from agent_state.protocols import LogRecord
from agent_state.serializers import canonical_json
from agent_state.storage.logs import encode_lines
from agent_state_integrations.recorder.enrichment import enrich
from agent_state_integrations.recorder.rules import Rules
from benchmarks.report import Row, at_most
from benchmarks.workload import WORDS, Setting

MESSAGES = 1_000_000
SHORT = 50_000
_MIB = 1024 * 1024
_MORE = (
    "should we use the database or the cache? ",
    "I have implemented the storage layer and the tests pass. ",
    "We decided to keep the architecture as it is. ",
    "The import of the mesh is blocked by an error. ",
    "What do you think about the interface? ",
    "done, the benchmark is ready. ",
)
_BARE = """
import sys, time, orjson
began = time.perf_counter()
with open(sys.argv[1], "rb") as file:
    for line in file:
        orjson.loads(line)
print(time.perf_counter() - began)
"""
_OURS = """
import pathlib, resource, sys, time
began = time.perf_counter()
from agent_state_integrations.recorder.analytics.analysis import analyse
analysis = analyse(sys.argv[1], workers=int(sys.argv[2]) or None)
took = time.perf_counter() - began
try:  # ru_maxrss begins with what the parent had
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    [peak] = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
except FileNotFoundError:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(took, analysis.summary.messages, peak * 1024)
"""


def analysing(setting: Setting) -> list[Row]:
    """Each run is a fresh process; ours includes starting it and its workers."""
    count = setting.scaled(MESSAGES)
    bare, ours, alone, short_peak, peak = [], [], [], [], []
    plain_bare, plain = [], []
    with setting.folder() as folder:
        log, short, raw = (folder / f"{name}.jsonl" for name in ("current", "short", "raw"))
        write_log(log, count)
        write_log(short, SHORT)
        write_log(raw, count // 4, enriched=False)
        size = log.stat().st_size / _MIB
        for _ in range(setting.runs):
            bare.append(float(_run(_BARE, log)[0]))
            ours.append(_ours(log, count, workers=0)[0])
            seconds, most = _ours(log, count, workers=1)
            alone.append(seconds)
            peak.append(most / _MIB)
            short_peak.append(_ours(short, SHORT, workers=1)[1] / _MIB)
            plain_bare.append(float(_run(_BARE, raw)[0]))
            plain.append(_ours(raw, count // 4, workers=0)[0])
    return [
        Row(f"{count:,} messages, {size:,.0f} MiB: for line in file: orjson.loads", bare, "s"),
        Row(f"  analyse, {os.cpu_count()} processors", ours, "s"),
        Row("  ours / bare", _quotients(ours, bare), "times", at_most(2)),
        Row("  in one process / bare", _quotients(alone, bare), "times"),
        Row(
            "  a log that is not enriched: ours / bare",
            _quotients(plain, plain_bare),
            "times",
            at_most(6),
        ),
        Row("  the most memory of a process", peak, "MiB"),
        Row(
            f"  … more than for {SHORT:,}",
            [much - little for much, little in zip(peak, short_peak, strict=True)],
            "MiB",
            at_most(64),
        ),
    ]


def _quotients(mine: list[float], theirs: list[float]) -> list[float]:
    return [a / b for a, b in zip(mine, theirs, strict=True)]


def _ours(log: Path, count: int, *, workers: int) -> tuple[float, float]:
    seconds, messages, peak = _run(_OURS, log, str(workers))
    assert int(messages) == count
    return float(seconds), float(peak)


def _run(program: str, *arguments: str | Path) -> list[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603  # ours
    return done.stdout.split()


def write_log(path: Path, count: int, *, enriched: bool = True) -> None:
    """A log as the recorder writes it, the same every time."""
    more: dict[str, object] = {} if enriched else {"Metadata": {}}
    heads = (_line(number, {**body, **more}) for number, body in enumerate(_bodies(), 1))
    with path.open("wb") as file:
        while block := list(islice(heads, min(count, 10_000))):
            file.writelines(block)
            count -= len(block)
            if not count:
                break


def _line(number: int, body: dict[str, object]) -> bytes:
    return encode_lines(("current",), [LogRecord(number, canonical_json(body), None)])


def _bodies() -> Iterator[dict[str, object]]:
    random, rules = Random(20), Rules.load()  # noqa: S311  # the same every time
    began = datetime(2026, 1, 1, tzinfo=UTC)
    made: list[dict[str, object]] = []
    number = 0
    while True:
        number += 1
        if len(made) < 5_000:
            text = random.choice(_MORE) + " ".join(random.choices(WORDS, k=24))
            body: dict[str, object] = {"Message": text, "SpeakerRole": "Agent", "Metadata": {}}
            enrich(body, rules)
            made.append(body)
        else:
            body = made[random.randrange(5_000)]
        yield {
            **body,
            "Id": f"agent_{number:09d}",
            "Timestamp": stamp(began + timedelta(seconds=number * 3)),
            "SpeakerName": f"agent_{number * 7 % 12}",
            "ConversationType": 0,
            "ContextId": f"context_{number // 40}",
            "Message": f"{body['Message']} {number}",
        }
