"""Whether the laws of the runtime held, by a ledger and by what is stored.

Nothing of the runtime is used: the ledger was written at the time, and the stored documents are
JSON. What must be in them, as far as it follows from the documents alone, is what the laws of the
simulation say; the rest follows from the ledger.

==  ========  ===================================================================================
L1  consume   as in the simulation: the marks of mail and what the memory of its agent says
L2  once      as in the simulation; and what a step did that was stored is not done by a later
              attempt, a step that is done at most once is not done twice
L3  whole     as in the simulation; and no acknowledged commit or commit point is missing
L4  sent once as in the simulation; and all that a handler or a client was told is sent is there
L5  fenced    every change on behalf of an agent was checked against its owner; one runtime alone
              used each ownership; no revision was made under an older ownership than the one before
L6  alive     see the director
L7  same      all values that a step or a task gave, to whomever and whenever, are equal
==  ========  ===================================================================================
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import orjson

from agent_state.clock import SystemClock
from agent_state.protocols import Put, StateStore
from tests.faults.serving import AGENTS, Plan
from tests.faults.tally import Tally
from tests.simulation.laws import FINISHED, Laws
from tests.simulation.loop import LoopClock

Place = tuple[str, tuple[str, ...]]
KINDS = ("agents", "tasks", "mail", "sleep", "system")
TWICE = frozenset({"L2", "L4", "L5"})
"""Of the laws of the simulation, those whose breach counts as done twice; the others: as lost."""


REASONS = (
    *("HandlerFailedError", "HandlerBrokeError", "SystemExit", "CancelledError", "TimeoutError"),
    *("UnknownStepError", "StorageError", "StorageFullError", "DurabilityUnknownError"),
    "LockTimeoutError",
)
"""What a task may end by as dead: what its program does, and a store in trouble."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One document as it is stored. ``revision`` is 0 in an archive."""

    revision: int
    body: dict[str, Any]


Documents = Mapping[Place, Stored]


async def documents_of(store: StateStore) -> dict[Place, Stored]:
    """Everything in a store, by the store alone; opening it recovers what was interrupted."""
    await store.open()
    try:
        found = {place: stored async for place, stored in _archived(store)}
        for kind in KINDS:
            async for one in store.scan(kind):
                found[kind, one.key] = Stored(one.revision, orjson.loads(one.body))
        damage = store.incidents()
        assert not damage, f"damaged documents: {damage}"
    finally:
        await store.close()
    return found


async def _archived(store: StateStore) -> AsyncIterator[tuple[Place, Stored]]:
    for kind in ("tasks", "mail"):
        for key in await store.logs(kind):
            async for record in store.read_log(kind, key):
                yield _placed(kind, Stored(0, orjson.loads(record.body)))


def documents_in(root: Path) -> dict[Place, Stored]:
    """Everything in a directory that nobody has open, as any program reads it."""
    found: dict[Place, Stored] = {}
    for kind in ("tasks", "mail"):
        for path in sorted((root / kind).rglob("*.jsonl")):
            for line in path.read_text().splitlines():
                found |= [_placed(kind, Stored(0, _plain(json.loads(line))))]
    for kind in ("agents", "tasks", "mail", "sleep"):
        for path in sorted((root / kind).rglob("*.json")):
            body = json.loads(path.read_text())
            found |= [_placed(kind, Stored(body["_revision"], _plain(body)))]
    return found


def _plain(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if not name.startswith("_")}


def _placed(kind: str, stored: Stored) -> tuple[Place, Stored]:
    body = stored.body
    if kind == "tasks":
        return (kind, (body["agent_id"], body["task_id"])), stored
    if kind == "mail":
        return (kind, (body["to_agent"], body["message_id"])), stored
    return (kind, (body["agent_id"],)), stored


@dataclass
class Judge:
    """What the ledger says, taken in line by line, and what is wrong."""

    plan: Plan
    tally: Tally = field(default_factory=Tally)
    violations: list[str] = field(default_factory=list)
    work: int = 0
    """Commits that were more than a heartbeat: while there are more, things go on."""
    work_of: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """The same by life of a server."""
    up: set[str] = field(default_factory=set)
    """Lives that have started."""
    told: set[int] = field(default_factory=set)
    """Clients that have asked for everything."""
    left: int | None = None
    """How many tasks are unfinished, as the last server said that looked."""

    _revisions: dict[Place, int] = field(default_factory=dict)
    _deleted: set[Place] = field(default_factory=set)
    _fences: dict[Place, dict[int, set[int]]] = field(default_factory=lambda: defaultdict(dict))
    _users: dict[tuple[str, int], str] = field(default_factory=dict)
    _sent: dict[Place, str] = field(default_factory=dict)
    _points: dict[Place, int] = field(default_factory=dict)
    _given: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)
    _done: dict[tuple[str, str], int] = field(default_factory=dict)
    _ran: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))

    def lost(self, law: str, text: str) -> None:
        self.violations.append(f"{law}: {text}")
        self.tally.lost += 1

    def twice(self, law: str, text: str) -> None:
        self.violations.append(f"{law}: {text}")
        self.tally.twice += 1

    def stuck(self, text: str) -> None:
        self.violations.append(f"L6: {text}")
        self.tally.stuck += 1

    # -- the ledger

    def take(self, line: dict[str, Any]) -> None:
        take = getattr(self, f"_take_{line['is'].replace(' ', '_')}", None)
        if take is not None:
            take(line)

    def _take_up(self, line: dict[str, Any]) -> None:
        self.up.add(line["life"])

    def _take_told(self, line: dict[str, Any]) -> None:
        self.told.add(line["index"])

    def _take_left(self, line: dict[str, Any]) -> None:
        self.left = line["tasks"]

    def _take_broken(self, line: dict[str, Any]) -> None:
        self.stuck(f"{line['life']} ended with {line['error']}")

    def _take_commit(self, line: dict[str, Any]) -> None:
        fences = line["fences"]
        for agent, revision in fences.items():
            user = self._users.setdefault((agent, revision), line["life"])
            if user != line["life"]:
                self.twice("L5", f"{line['life']} and {user} both used one ownership of {agent}")
        works = False
        for kind, key, number in line["puts"]:
            place = (kind, tuple(key))
            self.tally.acknowledged += 1
            self._deleted.discard(place)
            self._revisions[place] = max(number, self._revisions.get(place, 0))
            works = works or kind != "system"
            if self.plan.shared and kind != "system" and key[0] in AGENTS:
                self._check_fence(line, place, number, fences.get(key[0]))
        for kind, key in line["deletes"]:
            self._deleted.add((kind, tuple(key)))
        self.work += works
        self.work_of[line["life"]] += works

    def _check_fence(
        self, line: dict[str, Any], place: Place, number: int, fence: int | None
    ) -> None:
        if fence is not None:
            if (
                place[0] != "sleep"
            ):  # a sleep that has ended is deleted, and its revisions begin anew
                self._fences[place].setdefault(number, set()).add(fence)
        elif number > 1 or place[0] == "sleep":
            self.twice("L5", f"{line['life']} changed {_name(place)} unchecked")

    def _take_sent(self, line: dict[str, Any]) -> None:
        kind, key = line["place"]
        self.tally.acknowledged += 1
        self._sent[kind, tuple(key)] = f"{line['life']} was told it is sent"

    def _take_answer(self, line: dict[str, Any]) -> None:
        self._take_sent(line)

    def _take_checkpoint(self, line: dict[str, Any]) -> None:
        place = ("tasks", tuple(line["task"]))
        self.tally.acknowledged += 1
        self._points[place] = max(line["pc"], self._points.get(place, 0))

    def _take_gave(self, line: dict[str, Any]) -> None:
        of = (line["task"], line["step"])
        life, value = self._given.setdefault(of, (line["life"], line["value"]))
        if value != line["value"]:
            text = (
                f"{of[1]} of {of[0]} gave {value} to {life}, and {line['value']} to {line['life']}"
            )
            self.lost("L7", text)

    def _take_step(self, line: dict[str, Any]) -> None:
        self._done.setdefault((line["task"][1], line["step"]), line["attempt"])

    def _take_runs(self, line: dict[str, Any]) -> None:
        of = (line["task"][1], line["step"])
        done = self._done.get(of)
        self._ran[of] += 1
        if done is not None and line["attempt"] > done:
            self.twice("L2", f"{of[1]} of {of[0]} runs again in attempt {line['attempt']}")
        if line["once"] and self._ran[of] > 1:
            self.twice("L2", f"{of[1]} of {of[0]}, to be done at most once, runs again")

    def _take_failed(self, line: dict[str, Any]) -> None:
        self._ran[line["task"], line["step"]] -= 1

    # -- what is stored

    def look(self, found: Documents, when: str) -> None:
        """Compare the ledger with all documents, at a moment at which nobody writes any."""
        self.tally.points += 1
        self._check_acknowledged(found, when)
        laws = Laws(self.plan.history(), cast("LoopClock", SystemClock()))
        puts = [
            Put(kind, key, orjson.dumps(stored.body), "")
            for (kind, key), stored in found.items()
            if kind in ("agents", "tasks", "mail", "sleep")
        ]
        laws.committed("the store", None, puts, [0] * len(puts))
        laws.check_all()
        if laws.broken is not None:
            law = laws.broken.law
            (self.twice if law in TWICE else self.lost)(law, f"{when}: {laws.broken}")

    def _check_acknowledged(self, found: Documents, when: str) -> None:
        for place, revision in self._revisions.items():
            stored = found.get(place)
            if place in self._deleted or place[0] in ("system", "sleep"):
                continue  # a sleep may have been ended by a process that was killed in saying so
            if stored is None or 0 < stored.revision < revision:
                there = f"at {stored.revision}" if stored else "gone"
                self.lost("L3", f"{when}: {_name(place)} was at {revision}, and is {there}")
        for place, who in self._sent.items():
            if place not in found:
                self.lost("L4", f"{when}: {_name(place)} is missing, and {who}")
        for place, pc in self._points.items():
            stored = found.get(place)
            if stored is None or stored.body.get("progress", {}).get("pc", 0) < pc:
                self.lost("L3", f"{when}: {_name(place)} is not past its checkpoint at {pc}")

    def end(self, found: Documents) -> None:
        """The last look, when everything is done."""
        self.look(found, "in the end")
        for place, stored in found.items():
            status, error = stored.body.get("status"), str(stored.body.get("error"))
            if place[0] == "tasks" and status not in FINISHED:
                self.stuck(f"{_name(place)} is {status} in the end")
            elif status == "dead" and not error.startswith(REASONS):
                self.lost("L6", f"{_name(place)} is dead by {error}")
        for place, ways in self._fences.items():
            newest = 0
            for number in sorted(ways):
                if min(ways[number]) < newest:
                    self.twice("L5", f"a former owner made revision {number} of {_name(place)}")
                newest = max(newest, *ways[number])


def _name(place: Place) -> str:
    return "/".join((place[0], *place[1]))
