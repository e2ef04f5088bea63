"""The simulation itself: it repeats itself, leaves nothing out, and its histories shrink."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.simulation.driver import simulate
from tests.simulation.histories import COMMIT_FAULTS, ENDS, Action, Fault, History, draw_history
from tests.simulation.programs import CHANGES, VALUES, Op, Program
from tests.simulation.shrinking import shrink

PROJECT = Path(__file__).parents[2]
SEEDS = range(40)

PLAIN = History(
    seed=1,
    agents=("ann",),
    shared=False,
    processes=1,
    programs=(Program((Op("change", "list"),)),),
    actions=(Action(0.0, "submit", "ann"),),
)


def digest() -> str:
    """A digest of every commit of some seeds."""
    seen = hashlib.sha256()
    for seed in SEEDS:
        outcome = simulate(draw_history(seed), tracing=True)
        seen.update("\n".join([*outcome.trace, str(outcome.broken)]).encode())
    return seen.hexdigest()


def test_a_seed_is_the_same_history_in_every_process() -> None:
    program = "from tests.simulation.test_harness import digest; print(digest())"
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=PROJECT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert digests == {digest() + "\n"}


def test_the_seeds_have_everything_in_them() -> None:
    found = Counter[str]()
    for seed in range(2000):
        history = draw_history(seed)
        found.update(action.kind for action in history.actions)
        found.update(f"fault {fault.kind}" for fault in history.faults)
        for program in history.programs:
            found.update(_everything(program.ops))
        for name in ("shared", "files", *ENDS):
            found[name] += getattr(history, name)
    wanted = {f"fault {kind}" for kind in COMMIT_FAULTS}
    wanted |= {f"change {how}" for how in CHANGES} | {f"step {value}" for value in VALUES}
    wanted |= {"files", *ENDS, "child", "retry", "delete", "discard"}
    wanted |= {"crash", "pause", "restart", "cleanup", "cancel", "edit", "steal", "outage", "idle"}
    wanted |= {"checkpoint", "sleep", "read reply", "send", "submit", "gather", "fail exit", "hang"}
    missing = {name: found[name] for name in wanted if found[name] < 20}
    assert missing == {}


def _everything(ops: tuple[Op, ...]) -> list[str]:
    names = []
    for op in ops:
        names += [op.kind, f"{op.kind} {op.how}", f"{op.kind} {op.value}", *_everything(op.body)]
    return names


def test_a_quiet_history_breaks_no_law() -> None:
    outcome = simulate(PLAIN)
    assert outcome.broken is None
    tokens = outcome.docs["agents", ("ann",)]["context"]["working_memory"]["list"]
    assert len(tokens) == 1


@pytest.mark.parametrize("kind", COMMIT_FAULTS)
def test_every_fault_befalls_a_commit(kind: str) -> None:
    shared = replace(PLAIN, shared=True, processes=2, faults=(Fault(1, kind, 40.0),))
    assert any(f"fault: commit 1: {kind}" in line for line in simulate(shared, tracing=True).trace)


def test_what_is_done_twice_is_seen_and_shrunk() -> None:
    """A handler that keeps what it knows outside the context is caught; little is left of it."""
    from tests.simulation import programs

    def twice(self: object, place: str, op: Op) -> None:
        ctx = self._ctx  # type: ignore[attr-defined]
        ctx.memory["list"] = [*ctx.memory.get("list", ()), *2 * [self._token(place)]]  # type: ignore[attr-defined]

    history = replace(
        draw_history(3),
        programs=(Program((Op("wait"), Op("change", "list"))),),
        actions=PLAIN.actions,
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(programs._Attempt, "_apply", twice)
        broken = simulate(history).broken
        assert broken is not None
        assert broken.law == "L2"
        small = shrink(history, broken.kind)
    assert (len(small.actions), len(small.agents), small.faults) == (1, 1, ())
    assert [op.kind for op in small.programs[0].ops] == ["change"]
