"""A real server of agents, killed again and again: every task done, every mail once."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.faults.tally import Tally

pytestmark = pytest.mark.long("kills a server again and again")

SERVER = """
import asyncio, sys
from agent_state import AsyncAgentSessionManager, RetryPolicy

root, agents, tasks = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
runtime = AsyncAgentSessionManager(
    root, lease_seconds=1.0, retry=RetryPolicy(base_seconds=0.01, max_interruptions=1000)
)

def say(word):
    lines = open("/proc/self/status").read().splitlines()
    [memory] = [line.split()[1] for line in lines if line.startswith("VmRSS")]
    print(word, memory, flush=True)

@runtime.handler("worker")
async def worker(ctx, task):
    n = task.payload["n"]
    ctx.memory["begun"] = ctx.memory.get("begun", 0) + 1
    doubled = await ctx.step("double", lambda: n * 2)
    await ctx.send_mail(f"w{n * 7 % agents}", subject=task.name, body=doubled)
    await ctx.checkpoint({"mailed": True})
    await asyncio.sleep(0.002)
    if n % 17 == 0 and ctx.attempt - task.interruptions == 1:
        raise RuntimeError("the first try always fails")
    if n % 4 == 0:
        await ctx.submit(f"clerk{n % 16}", "file", {"n": n})
    return doubled

@runtime.handler("clerk")
async def clerk(ctx, task):
    return task.payload["n"]

async def submit_all():
    # Until it is known that all of them are stored, each start tells them all again.
    if await runtime.manager.load_system_state("submitted") is None:
        for n in range(16):
            await runtime.agents.create(f"clerk{n}", agent_type="clerk")
        for n in range(agents):
            await runtime.agents.create(f"w{n}", agent_type="worker")
        for start in range(0, tasks, 500):
            await asyncio.gather(*(
                runtime.tasks.submit(f"w{n % agents}", f"task {n}", {"n": n}, dedupe_key=f"t{n}")
                for n in range(start, min(tasks, start + 500))
            ))
        await runtime.manager.save_system_state("submitted", {"tasks": tasks})

async def main():
    async with runtime:
        say("restored")
        await submit_all()
        await runtime.wait_idle()
        say("idle")

asyncio.run(main())
"""


logger = logging.getLogger(__name__)
"""What was measured: `-o log_cli=true --log-cli-level=INFO` shows it."""


@dataclass(frozen=True)
class Load:
    """How much, and how long each server lives: from its start, or from its being restored."""

    agents: int
    tasks: int
    kills: int
    opening_seconds: float
    working_seconds: float


SEEDED = Load(agents=20, tasks=300, kills=10, opening_seconds=0.6, working_seconds=0.12)
FULL = Load(agents=500, tasks=16_000, kills=50, opening_seconds=2.5, working_seconds=2.5)
"""With what the clerks are given, 20,000 tasks."""


@dataclass
class Life:
    """One server's: how long it took to restore, and how much memory that was."""

    finished: bool
    seconds: float | None = None
    kibibytes: int = 0


async def serve(root: Path, load: Load, chance: random.Random | None) -> Life:
    """Run the server and kill it at a random moment; without ``chance`` it comes to its end."""
    began = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        SERVER,
        str(root),
        str(load.agents),
        str(load.tasks),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    life = Life(finished=False)
    opening = chance is not None and chance.random() < 0.4
    try:
        within = chance.uniform(0.1, load.opening_seconds) if chance and opening else 60.0
        async with asyncio.timeout(within):
            word, memory = (await process.stdout.readline()).split()
        assert word == b"restored"
        life.seconds, life.kibibytes = time.monotonic() - began, int(memory)
        lifetime = chance.uniform(0.0, load.working_seconds) if chance else None
        await asyncio.wait_for(process.wait(), lifetime)
    except TimeoutError:
        assert opening or life.seconds is not None, "the server did not come up"
        os.kill(process.pid, signal.SIGKILL)
    life.finished = await process.wait() == 0
    return life


@pytest.mark.proof("T5", "a server of agents, killed with SIGKILL at random moments")
@pytest.mark.timeout(600)
async def test_a_killed_server_finishes_every_task_and_sends_every_mail_once(
    tmp_path: Path,
    tally: Tally,
    full: bool,
) -> None:
    root, load, chance = tmp_path / "state", FULL if full else SEEDED, random.Random(4)
    lives: list[Life] = []
    while len(lives) < load.kills and not (lives and lives[-1].finished):
        lives.append(await serve(root, load, chance))
    tally.faults = sum(not life.finished for life in lives)
    assert tally.faults > load.kills / 3, "the server was too quick to be killed"
    lives.append(await serve(root, load, None))
    assert lives[-1].finished

    verify_tasks(root, load, tally)
    verify_mail(root, load, tally)
    left = [
        *(root / ".quarantine").rglob("[!.]*"),
        *root.rglob(".tmp-*"),
        *(root / ".journal").glob("[!.]*"),
    ]
    tally.leaked = len(left)
    assert left == []
    assert tally.clean()
    logger.info("%s", lives)
    verify_costs([life for life in lives if life.seconds is not None])


def verify_tasks(root: Path, load: Load, tally: Tally) -> None:
    done = list(documents(root, "tasks/w*/*.json"))
    tally.points = len(done)
    tally.acknowledged = load.tasks
    tally.lost = load.tasks - len({task["payload"]["n"] for task in done})
    assert Counter(task["status"] for task in done) == {"completed": load.tasks}
    assert {task["payload"]["n"]: task["result"] for task in done} == {
        n: n * 2 for n in range(load.tasks)
    }
    filed = list(documents(root, "tasks/clerk*/*.json"))
    tally.points += len(filed)
    assert sorted(task["payload"]["n"] for task in filed) == list(range(0, load.tasks, 4))
    assert {task["status"] for task in filed} == {"completed"}
    attempts = [task["attempts"] - task.get("interruptions", 0) for task in done]
    assert min(attempts) >= 1, "a task is completed that was never attempted"


def verify_mail(root: Path, load: Load, tally: Tally) -> None:
    """Each task's message is in the right box, once."""
    mail = Counter(
        (message["to_agent"], message["subject"]) for message in documents(root, "mail/*/*.json")
    )
    sent = Counter((f"w{n * 7 % load.agents}", f"task {n}") for n in range(load.tasks))
    tally.points += mail.total()
    tally.lost += (sent - mail).total()
    assert mail == sent


def verify_costs(lives: list[Life]) -> None:
    """More is there to be restored each time; neither memory nor time runs away."""
    seconds = [life.seconds or 0.0 for life in lives]
    memory = [life.kibibytes / 1024 for life in lives]
    assert max(seconds) < 30, seconds
    assert max(memory) < 500, memory
    # What there is to load is there from the middle on.
    middle = sorted(memory[len(memory) // 2 :])[len(memory) // 4]
    assert memory[-1] < 1.5 * middle + 20, memory


def documents(root: Path, pattern: str) -> Iterator[dict[str, Any]]:
    for path in root.glob(pattern):
        yield json.loads(path.read_text())
