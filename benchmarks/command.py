"""The command ``agent-state``: its cold start and a list of 100,000 agents, in processor time.

And how long ``watch`` takes to show a change that was acknowledged, with a hundred saves a second.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import orjson

from agent_state import StatePersistenceManager
from agent_state.protocols import Document
from agent_state.storage import paths
from agent_state.storage.document import encode_document
from benchmarks.report import Row, at_most
from benchmarks.workload import Setting

SAVED_AT = "2026-12-01T07:00:00.000000Z"
_SCAN = """
import os, sys, orjson
found = []
for entry in os.scandir(sys.argv[1]):
    if entry.name.endswith(".json"):
        with open(entry.path, "rb") as file:
            found.append(orjson.loads(file.read()))
print(len(found))
"""


def processor_seconds(*command: object) -> float:
    """The processor time, of user and system, that a process takes; its output goes nowhere."""
    with subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL) as process:  # noqa: S603
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    return used.ru_utime + used.ru_stime


def fill(state: Path, agents: int) -> None:
    """Write agents as the store does, without waiting for a disk."""
    for number in range(agents):
        name = f"agent-{number:06d}"
        at = paths.locate(str(state), "agents", (name,))
        agent = {
            "agent_id": name,
            "agent_type": "reader",
            "status": "idle",
            "context": {"working_memory": {"page": number, "words": number % 977}},
        }
        body = orjson.dumps(agent, option=orjson.OPT_SORT_KEYS)
        document = Document("agents", (name,), body, 1, SAVED_AT, "agents/1")
        path = Path(at.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_document(document, {}))


async def watched_seconds(state: Path, *, exclusive: bool, changes: int) -> list[float]:
    """How long after each acknowledged save its line is on the standard output of ``watch``."""
    ours = Path(sys.executable).parent / "agent-state"
    process = await asyncio.create_subprocess_exec(
        ours, "watch", "--json", "--state", state, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    shown: dict[int, float] = {}
    async with StatePersistenceManager(state, exclusive=exclusive) as manager:
        await process.stdout.readline()

        async def read() -> None:
            assert process.stdout is not None
            async for line in process.stdout:
                event = orjson.loads(line)
                if event["key"] == ["end"]:
                    return
                if event["key"] == ["agent-000000"]:
                    shown[event["revision"]] = time.perf_counter()

        reading = asyncio.create_task(read())
        saved: dict[int, float] = {}
        for number in range(changes):
            agent = {"agent_id": "agent-000000", "status": ("idle", "active")[number % 2]}
            revision = await manager.save_agent_state("agent-000000", agent)
            saved[revision] = time.perf_counter()
            for other in range(1, 30):  # what keeps the server busy
                note = {"agent_id": f"agent-{other:06d}", "n": number}
                await manager.save_agent_state(f"agent-{other:06d}", note)
                await asyncio.sleep(0.01)
        await manager.save_agent_state("end", {"agent_id": "end"})
        await asyncio.wait_for(reading, 60)
    process.terminate()
    await process.communicate()
    return [shown[each] - at for each, at in saved.items() if each in shown]


def command(setting: Setting) -> list[Row]:
    """Ratios to ``sqlite-utils --version``, and to a bare scan of the same files."""
    ours = Path(sys.executable).parent / "agent-state"
    other = shutil.which("sqlite-utils", path=str(Path(sys.executable).parent))
    assert other is not None, "pip install sqlite-utils"
    small, large = setting.directory / "small", setting.directory / "large"
    agents = setting.scaled(100_000)
    fill(small, 5)
    fill(large, agents)
    version, listed, scanned = [], [], []
    for run in range(setting.runs + 1):
        theirs = processor_seconds(other, "--version")
        mine = processor_seconds(ours, "--version")
        few = processor_seconds(ours, "ls", "--state", small)
        bare = processor_seconds(sys.executable, "-c", _SCAN, large / "agents")
        many = processor_seconds(ours, "ls", "--state", large)
        if run:  # the first compiles what is not compiled yet
            version.append(mine / theirs)
            listed.append(few / theirs)
            scanned.append(many / bare)
    late = {}
    for exclusive in (False, True):
        watched = setting.directory / f"watched-{exclusive}"
        fill(watched, 1000)
        seconds = asyncio.run(watched_seconds(watched, exclusive=exclusive, changes=20))
        late[exclusive] = [1000 * each for each in seconds]
    return [
        Row("agent-state --version / sqlite-utils --version", version, "ratio", at_most(1.3)),
        Row("agent-state ls, 5 agents / sqlite-utils --version", listed, "ratio", at_most(1.5)),
        Row(f"agent-state ls, {agents:,} agents / a bare scan", scanned, "ratio", at_most(2.0)),
        Row("agent-state watch: a change shows, shared", late[False], "ms", at_most(200)),
        Row("agent-state watch: a change shows, exclusive", late[True], "ms", at_most(200)),
    ]
