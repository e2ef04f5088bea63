"""Archives: a million messages to Parquet, and one day of them found again."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import orjson

from agent_state.clock import stamp
from agent_state.storage.logs import line_checksum
from agent_state_integrations.recorder.archiver import RetentionPolicy, archive
from agent_state_integrations.recorder.export import export
from agent_state_integrations.recorder.files import Recording
from agent_state_integrations.recorder.query import Query, day
from agent_state_integrations.recorder.reader import count, read_records
from agent_state_integrations.recorder.sql import connect
from benchmarks.report import Row, at_most
from benchmarks.workload import WORDS, Setting

MESSAGES, DAYS = 1_000_000, 30
BEGAN = datetime(2026, 6, 1, tzinfo=UTC)
DAY = "2026-06-15"


def archives(setting: Setting) -> list[Row]:
    """Thirty days, a segment each, become Parquet; then one day is asked for."""
    total = setting.scaled(MESSAGES)
    each = -(-total // DAYS)
    bytes_written = 0
    figures: dict[str, list[float]] = {}

    def measured(name: str, began: float) -> None:
        figures.setdefault(name, []).append(time.perf_counter() - began)

    with setting.folder() as folder:
        for run in range(setting.runs):
            state = folder / f"state-{run}"
            bytes_written = _record(Recording(state), each)
            began = time.perf_counter()
            export(
                read_records(state),
                folder / f"{run}.parquet",
                export_id="all",
                label="bench",
                timestamp=stamp(BEGAN),
            )
            measured("export", began)
            began = time.perf_counter()
            archive(state, RetentionPolicy(parquet_past=0))
            measured("archive", began)
            first, end = day(DAY)
            query = Query(since=first, until=end)
            began = time.perf_counter()
            assert count(state, query) == each
            measured("count", began)
            began = time.perf_counter()
            assert sum(1 for _ in read_records(state, query)) == each
            measured("read", began)
            began = time.perf_counter()
            with connect(state) as tables:
                statement = "SELECT count(*) FROM messages WHERE timestamp >= ? AND timestamp < ?"
                assert list(tables.select(statement, [first, end]).rows) == [(each,)]
            measured("sql", began)
            for option in ("--count", "--json"):
                began = time.perf_counter()
                said = _query(state, option)
                measured(option, began)
                found = orjson.loads(said)
                assert (found if option == "--count" else len(found)) == each
    some = f"{each * DAYS:,} messages"
    return [
        Row(
            f"{some} to one Parquet file",
            figures["export"],
            "s",
            at_most(20),
            note=f"of {bytes_written / 1e6:.0f} MB",
        ),
        Row(f"{some} archived, each verified", figures["archive"], "s"),
        Row(f"record query --day --count, of {some}", figures["--count"], "s", at_most(1)),
        Row(f"record query --day --json, {each:,} of them", figures["--json"], "s", at_most(1)),
        Row("  in the process: counted", figures["count"], "s", at_most(1)),
        Row("  in the process: read", figures["read"], "s", at_most(1)),
        Row("  by SQL: counted", figures["sql"], "s", at_most(1)),
    ]


def _query(state: Path, option: str) -> bytes:
    command = [sys.executable, "-m", "agent_state", "record", "query", str(state)]
    done = subprocess.run(  # noqa: S603  # our own command
        [*command, "--day", DAY, option], capture_output=True, check=True
    )
    return done.stdout


def _record(recording: Recording, each: int) -> int:
    """Thirty segments of one day each, with lines as the writer has them; their bytes."""
    recording.folder.mkdir(parents=True)
    written = 0
    for number in range(DAYS):
        began = BEGAN + timedelta(days=number)
        first = number * each + 1
        path = recording.segment_path(f"{began:%Y-%m-%d}", first)
        with path.open("wb") as file:
            for line in _lines(first, each, began):
                written += file.write(line)
    return written


def _lines(first: int, each: int, began: datetime) -> Iterator[bytes]:
    chance = random.Random(first)  # noqa: S311  # words, not secrets
    texts = [" ".join(chance.choices(WORDS, k=30)) for _ in range(500)]
    step = timedelta(days=1) / each
    for place in range(each):
        seq = first + place
        text = f"{seq} {texts[place % len(texts)]}"
        record = {
            "ContextId": f"context-{seq % 50}",
            "ConversationType": 0,
            "Id": f"{seq:012x}-bench",
            "Message": text,
            "Metadata": {
                "ace_tier": "ACE"[seq % 3],
                "chain_type": ("ui_ux", "system_architecture", "none")[seq % 3],
                "char_count": len(text),
                "content_hash": f"{seq:032x}",
                "keywords": ["agent", "plan"],
                "shl_tags": ["@Chain-none", "@Status-Ready"],
                "word_count": 31,
            },
            "SpeakerName": f"agent-{seq % 7}",
            "SpeakerRole": "Agent",
            "Timestamp": stamp(began + place * step),
        }
        body = orjson.dumps(record)
        yield b'%b,"_crc":"%b","_seq":%d}\n' % (body[:-1], line_checksum(seq, body).encode(), seq)
