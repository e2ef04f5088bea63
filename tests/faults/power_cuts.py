"""Recording what real processes do, and opening what a power cut may have left of it."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from signal import SIGKILL

from tests.faults.attempts import Scene, reopen
from tests.faults.crash_states import Moment, Recorder, State
from tests.faults.ledger import STORES, Held, Ledger, leftovers
from tests.faults.tally import Tally
from tests.faults.tracing import FAILED, TRACED, Forking, read_trace

ENDINGS = (0, FAILED << 8, SIGKILL)


@dataclass(frozen=True)
class Run:
    """A process to be recorded: what it does, and at which call it is killed, if at any."""

    kind: str
    name: str
    killed_at: tuple[str, int] | None = None

    def options(self) -> list[str]:
        options = ["-xx", "-s", "10000000", "-e", f"trace={','.join(TRACED)}"]
        if self.killed_at is not None:
            options += ["-e", "inject={}:signal=KILL:when={}".format(*self.killed_at)]
        return options

    def __str__(self) -> str:
        killed = f" (killed at {self.killed_at[0]} {self.killed_at[1]})" if self.killed_at else ""
        return f"{self.kind}: {self.name}{killed}"


def record(forking: Forking, scene: Scene, memory: Path, *runs: Run) -> Recorder:
    """Do it for real, one process after the other, and see in the traces what they did."""
    work = Path(tempfile.mkdtemp(dir=memory))
    folder, ledger, trace = work / "traced", work / "ledger", work / "trace"
    folder.mkdir()
    scene.copy_to(folder / "state")
    recorder = Recorder(scene.origin, folder, ledger)
    for number, run in enumerate(runs):
        with forking.traced(trace, *run.options()):
            status = forking.run(run.kind, run.name, folder / "state", ledger, str(number))
        assert status in ENDINGS, f"{run}: it ended with {status}"
        recorder.follow(read_trace(trace))
    understood = Moment(recorder, len(recorder.events), "journal").last()
    real = State.of(folder, ledger.read_bytes())
    assert understood == real, f"{runs}: the trace was not understood"
    shutil.rmtree(work)
    return recorder


class Judge:
    """Opens what a power cut left, and holds it against the ledger as it was at the cut."""

    def __init__(self, before: Held, memory: Path, tally: Tally) -> None:
        self._before = before
        work = Path(tempfile.mkdtemp(dir=memory))
        self._folder, self._ledger = work / "found", work / "ledger"
        self._ledgers: dict[bytes, Ledger] = {}
        self._tally = tally
        self.wrong: list[str] = []

    async def judge(self, kind: str, state: State, what: str) -> None:
        self._folder.mkdir()
        state.put_into(self._folder)
        found = await reopen(kind, self._folder / "state")
        # A file that the cut tore is put aside and written again from the journal: an incident
        # with nothing lost. What counts is that the right things are there in the end.
        found = replace(found, unreadable=0)
        about = f"{what}, opened by the {kind} store: {state.about}"
        self._tally.points += 1
        self._tally.faults += 1
        try:
            self._told(state.told).judge(self._before, found, self._tally, about)
        except AssertionError as error:
            self.wrong.append(str(error))
        left = leftovers(self._folder / "state")
        self._tally.leaked += len(left)
        if left:
            self.wrong.append(f"{about}: left behind: {left}")
        shutil.rmtree(self._folder)

    def _told(self, told: bytes) -> Ledger:
        if told not in self._ledgers:
            self._ledger.write_bytes(told)
            self._ledgers[told] = Ledger(self._ledger)
        return self._ledgers[told]


def judge_all(
    states: Sequence[State],
    before: Held,
    memory: Path,
    tally: Tally,
    what: str,
    kinds: Sequence[str] = sorted(STORES),
) -> None:
    """Each of them, opened with the stores by turns."""
    judge = Judge(before, memory, tally)

    async def judge_each() -> None:
        for number, state in enumerate(states):
            await judge.judge(kinds[number % len(kinds)], state, what)

    asyncio.run(judge_each())
    wrong = judge.wrong
    assert not wrong, f"{len(wrong)} of {len(states)} states, the first of them:\n{wrong[0]}"
