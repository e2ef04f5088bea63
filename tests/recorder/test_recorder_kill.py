"""A process that records, rotates and archives, killed with SIGKILL: what it was told is there."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from agent_state_integrations.recorder import RecordWriter, RetentionPolicy, archive, read

pytestmark = pytest.mark.long("kills recorders for many seconds")

PROGRAM = """
import asyncio, sys
from agent_state_integrations.recorder import Recorder

async def talk(recorder, run, name):
    number = 0
    while True:
        own = f"{run}-{name}-{number}"
        recorded = await recorder.record({"message_id": own, "content": f"this is {own}"})
        sys.stdout.write(f"{own} {recorded.seq}\\n")
        number += 1

async def tell():
    while True:
        sys.stdout.flush()
        await asyncio.sleep(0.001)

async def main(state, run):
    async with Recorder(state, rotate_bytes=20_000, checkpoint_seconds=0.02) as recorder:
        talking = [talk(recorder, run, name) for name in range(8)]
        await asyncio.gather(tell(), *talking)

asyncio.run(main(*sys.argv[1:]))
"""
KILLS, PROCESSES, LINES = 4, 2, 300


def test_what_was_acknowledged_is_there_once_after_kill_9(tmp_path: Path) -> None:
    chosen = random.Random(9)
    told: dict[str, int] = {}
    for kill in range(KILLS):
        running = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(tmp_path), f"{kill}.{number}"],
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(PROCESSES)
        ]
        wanted = LINES + chosen.randrange(LINES)
        for process in running:
            assert process.stdout is not None
            heard = [process.stdout.readline() for _ in range(wanted)]
            process.send_signal(signal.SIGKILL)
            heard += process.stdout.read().split("\n")[:-1]
            process.wait()
            process.stdout.close()
            told |= {own: int(seq) for own, seq in map(str.split, heard)}
        archive(tmp_path, RetentionPolicy(parquet_past=60_000))
    found = {message.id: message.seq for message in read(tmp_path)}
    assert Counter(message.id for message in read(tmp_path)).most_common(1)[0][1] == 1
    assert {own: found.get(own) for own in told} == told
    assert sorted(found.values()) == list(range(1, len(found) + 1))
    with RecordWriter(tmp_path) as writer:
        again = writer.write(
            [{"message_id": own, "content": f"this is {own}"} for own in list(told)[-500:]]
        )
    assert {outcome.outcome for outcome in again} == {"duplicate"}
    assert list((tmp_path / "record/archive").glob("2*"))
