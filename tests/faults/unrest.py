"""Servers of agents under all that can befall processes, a Redis server and a disk.

``python -m tests.faults.unrest PLAN`` directs one run, in a process of one thread, so that it can
fork a server in a few milliseconds. Servers are killed, and stand still until others have gone
on without them; the disk is full for a while; Redis is killed, stands still, or answers nobody.
In between everything is killed at once, and the store is looked at; in the end everything goes
quiet, what is left is done, and it is looked at once more. Faults follow each other by what was
done meanwhile, not by time, so a busy machine changes nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from tests.faults.filling import Ballast
from tests.faults.forking import fork
from tests.faults.judging import Documents, Judge, documents_in, documents_of
from tests.faults.ledger import leftovers, put_aside
from tests.faults.serving import LedgerReader, Plan, serve
from tests.faults.tally import Tally
from tests.redis.servers import RedisServer
from tests.redis.stores import ALWAYS

STUCK_SECONDS = 60.0
"""So long without a single commit of work, though there is work to do: something is stuck."""
LONGEST_END = 400.0
"""So long nothing goes wrong any more, and it is still not done: it turns in a circle."""
SERVERS = {"exclusive": 1, "shared": 4, "redis": 3}
LEASE_SECONDS = 0.8
MEGABYTES = 96


@dataclass(frozen=True, slots=True)
class Orders:
    """What a run is to be."""

    kind: str
    folder: str
    seed: int
    strikes: int
    """So many faults."""
    mounts: bool
    """Whether this process may mount a small file system, to fill it."""


@dataclass
class Outcome:
    """What came of a run."""

    tally: Tally
    struck: dict[str, int]
    """By kind of fault."""
    violations: list[str]
    statuses: dict[str, int]
    """Tasks by status in the end."""
    takeovers: int
    """How often a server took an agent from another one, or at its start."""


@dataclass
class Server:
    """A place for one server after another."""

    index: int
    pid: int = 0
    life: str = ""
    lives: int = 0


class StuckError(Exception):
    """Nothing goes on."""


class LawBrokenError(Exception):
    """The ledger shows that a law was broken: that is enough."""


class Director:
    """Directs one run."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        self._folder = Path(orders.folder)
        self._random = Random(orders.seed)
        self._redis: RedisServer | None = None
        place = str(self._folder / "disk" / "state")
        if orders.kind == "redis":
            self._redis = RedisServer(self._folder / "redis", *ALWAYS)
            place = self._redis.url
        elif orders.mounts:
            (self._folder / "disk").mkdir()
            size = f"size={MEGABYTES}m"
            mount = ["mount", "-t", "tmpfs", "-o", size, "none", str(self._folder / "disk")]
            subprocess.run(mount, check=True)
        self._plan = Plan(
            orders.kind, place, orders.folder, orders.seed, SERVERS[orders.kind], LEASE_SECONDS
        )
        self._servers = [Server(index) for index in range(self._plan.servers)]
        self._reader = LedgerReader(self._plan.ledger)
        self._judge = Judge(self._plan)
        self._struck: Counter[str] = Counter()
        self._takeovers = 0

    # -- the whole -----------------------------------------------------------------------------

    def run(self) -> Outcome:
        found: Documents = {}
        try:
            if self._redis is not None:
                self._redis.start()
            self._begin()
            strikes = self._strikes()
            for _ in range(self._orders.strikes):
                self._until_worked(self._random.randrange(10, 60))
                name = self._random.choice(strikes)
                self._struck[name] += 1
                getattr(self, f"_strike_{name}")()
                self._begin()
            found = self._end()
        except StuckError as stuck:
            self._judge.stuck(str(stuck))
        except LawBrokenError:
            pass  # the judge has it
        finally:
            for server in self._servers:
                self._kill(server)
            self._hear()
            if self._redis is not None:
                self._redis.kill()
        tally = self._judge.tally
        tally.faults += self._struck.total()
        statuses = Counter(
            str(stored.body["status"]) for place, stored in found.items() if place[0] == "tasks"
        )
        struck = dict(self._struck)
        return Outcome(tally, struck, self._judge.violations, dict(statuses), self._takeovers)

    def _strikes(self) -> list[str]:
        strikes = ["kill"] * 2 + ["kill_all"] * 4 + ["pause"] * 2 + ["stop"]
        if self._plan.shared:
            strikes += ["kill"] * 2 + ["outlive"] * 4
        if self._orders.mounts:
            strikes += ["fill"] * 2
        if self._redis is not None:
            strikes += ["redis_killed", "redis_paused", "redis_answers_nobody"] * 2
        return strikes

    def _end(self) -> Documents:
        """Everything goes quiet, and is done; then all that is stored is looked at."""
        self._plan.quiet.touch()
        everybody = set(range(self._plan.servers))
        self._until(
            lambda: self._judge.told == everybody and self._judge.left == 0,
            "not everything is done in the end",
        )
        for server in self._servers:
            self._terminate(server, quiet=True)
        self._hear()
        if self._redis is not None:
            found = self._look_at_store()
        else:
            root = Path(self._plan.place)
            if self._plan.shared:
                self._look_at_store()  # who opens alone removes what killed writers left
            found = documents_in(root)
            self._judge.tally.unreadable += len(put_aside(root))
            left = leftovers(root)
            self._judge.tally.leaked += len(left)
            if left:
                self._judge.violations.append(f"left behind: {left[:5]}")
        self._judge.end(found)
        return found

    # -- servers -------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Start the servers that do not run. The first creates the agents."""
        for server in self._servers:
            if not server.pid:
                server.lives += 1
                server.life = f"server-{server.index}-{server.lives}"
                server.pid = fork(partial(serve, self._plan, server.index, server.life))
                if server.lives == 1 and server.index == 0:
                    self._until_up(server)
        for server in self._servers:
            if server.lives == 1:
                self._until_up(server)

    def _until_up(self, server: Server) -> None:
        self._until(lambda: server.life in self._judge.up, f"{server.life} does not start")

    def _kill(self, server: Server) -> None:
        if server.pid:
            os.kill(server.pid, signal.SIGKILL)
            os.waitpid(server.pid, 0)
            server.pid = 0

    def _terminate(self, server: Server, *, quiet: bool = False) -> None:
        """SIGTERM. It ends, and in quiet times in good order."""
        os.kill(server.pid, signal.SIGTERM)
        until = time.monotonic() + STUCK_SECONDS
        while os.waitpid(server.pid, os.WNOHANG)[0] == 0:
            self._hear()
            if time.monotonic() > until:
                raise StuckError(f"{server.life} does not stop")
            time.sleep(0.01)
        server.pid = 0

    def _one(self) -> Server:
        return self._random.choice(self._servers)

    # -- faults --------------------------------------------------------------------------------

    def _strike_kill(self) -> None:
        self._kill(self._one())

    def _strike_kill_all(self) -> None:
        for server in self._random.sample(self._servers, len(self._servers)):
            self._kill(server)
        self._hear()
        self._judge.look(self._look_at_store(), f"after {self._judge.work} commits")

    def _strike_stop(self) -> None:
        self._terminate(self._one())

    def _strike_pause(self) -> None:
        """A moment, shorter or longer than a lease."""
        server = self._one()
        os.kill(server.pid, signal.SIGSTOP)
        self._rest(self._random.uniform(0.0, 2.0) * LEASE_SECONDS)
        os.kill(server.pid, signal.SIGCONT)

    def _strike_outlive(self) -> None:
        """It stands still longer than its lease, and until others have gone on; or for good."""
        server = self._one()
        os.kill(server.pid, signal.SIGSTOP)
        self._rest(1.2 * LEASE_SECONDS)
        before = self._others(server)
        self._until(
            lambda: self._others(server) >= before + 10 or self._judge.left == 0,
            f"nobody goes on while {server.life} stands still",
        )
        if self._random.random() < 0.2:
            self._kill(server)
        else:
            os.kill(server.pid, signal.SIGCONT)

    def _others(self, server: Server) -> int:
        return self._judge.work - self._judge.work_of[server.life]

    def _strike_fill(self) -> None:
        """The disk is full, and sometimes a server is killed meanwhile."""
        ballast = Ballast(self._folder / "disk" / "ballast")
        ballast.fill()
        self._rest(self._random.uniform(0.05, 0.5))
        if self._random.random() < 0.4:
            self._kill(self._one())
            self._begin()
            self._rest(self._random.uniform(0.05, 0.5))
        ballast.free()

    def _strike_redis_killed(self) -> None:
        assert self._redis is not None
        self._redis.kill()
        self._rest(self._random.choice((0.0, 0.3, 1.5 * LEASE_SECONDS)))
        self._redis.start()

    def _strike_redis_paused(self) -> None:
        assert self._redis is not None
        self._redis.stop()
        self._rest(self._random.uniform(0.1, 2.0) * LEASE_SECONDS)
        self._redis.go_on()

    def _strike_redis_answers_nobody(self) -> None:
        assert self._redis is not None
        how = self._random.choice(("ALL", "WRITE"))
        self._redis.ask("client", "pause", str(self._random.randrange(100, 1500)), how)

    # -- what goes on --------------------------------------------------------------------------

    def _hear(self) -> None:
        """Take in what the ledger has got since."""
        for line in self._reader.lines():
            self._judge.take(line)
            if line["is"] == "commit":
                self._takeovers += any(key[0] == "owners" for _, key, _ in line["puts"])

    def _rest(self, seconds: float) -> None:
        time.sleep(seconds)
        self._hear()

    def _until_worked(self, commits: int) -> None:
        self._hear()
        goal = self._judge.work + commits
        self._until(lambda: self._judge.work >= goal, "nothing goes on")

    def _until(self, condition: Callable[[], bool], otherwise: str) -> None:
        """Wait for it. What matters is that work goes on, not how long it takes."""
        self._hear()
        work, since, began = self._judge.work, time.monotonic(), time.monotonic()
        while not condition():
            if self._judge.violations:
                raise LawBrokenError
            time.sleep(0.005)
            self._hear()
            if self._judge.work != work:
                work, since = self._judge.work, time.monotonic()
            now = time.monotonic()
            if now - since > STUCK_SECONDS or now - began > LONGEST_END:
                raise StuckError(f"{otherwise}, after {work} commits; left: {self._judge.left}")

    def _look_at_store(self) -> Documents:
        """In a process of its own: opening a store makes threads."""
        answer = self._folder / "found"
        os.waitpid(fork(partial(self._write_documents, answer)), 0)
        found: Documents = pickle.loads(answer.read_bytes())
        answer.unlink()
        return found

    def _write_documents(self, answer: Path) -> None:
        answer.write_bytes(pickle.dumps(asyncio.run(documents_of(self._plan.store()))))


def direct(orders: Orders) -> dict[str, Any]:
    outcome = Director(orders).run()
    return asdict(outcome)


if __name__ == "__main__":
    print(json.dumps(direct(Orders(**json.loads(sys.argv[1])))))  # noqa: T201  # the answer
