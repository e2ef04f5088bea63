"""Replays a seed: ``python -m tests.simulation SEED``; ``FIRST:LAST`` looks at a range of seeds."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.simulation.driver import simulate
from tests.simulation.histories import draw_history
from tests.simulation.reports import report
from tests.simulation.seeded import FAULTS
from tests.simulation.seeding import first_seed
from tests.simulation.shrinking import shrink


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("seeds", nargs="?", help="a seed, or FIRST:LAST")
    parser.add_argument("--keep-going", action="store_true", help="of a range: do not end early")
    parser.add_argument("--as-drawn", action="store_true", help="of a seed: do not shrink")
    parser.add_argument("--seeded", action="store_true", help="the first seed of each seeded fault")
    given = parser.parse_args()
    if given.seeded:
        return _table()
    if given.seeds is None:
        parser.error("give a seed, FIRST:LAST, or --seeded")
    first, colon, last = given.seeds.partition(":")
    if not colon:
        return _one(int(first), as_drawn=given.as_drawn)
    return _many(range(int(first), int(last)), keep_going=given.keep_going)


def _one(seed: int, *, as_drawn: bool) -> int:
    history = draw_history(seed)
    outcome = simulate(history, tracing=True)
    if outcome.broken is not None and not as_drawn:
        history = shrink(history, outcome.broken.kind)
        outcome = simulate(history, tracing=True)
    print(report(history, outcome))
    return 1 if outcome.broken else 0


def _table() -> int:
    """Find the first seed that shows each seeded fault; 1 if the table says another one."""
    wrong = 0
    print("| law | seed | fault |\n|---|---:|---|")
    for name, fault in FAULTS.items():
        seed = first_seed(fault, 2000)
        print(f"| {fault.law} | {seed} | {name} |", flush=True)
        wrong += seed != fault.seed
    return 1 if wrong else 0


def _many(seeds: range, *, keep_going: bool) -> int:
    began, cpu = time.perf_counter(), time.process_time()
    commits = done = 0
    laws = Counter[str]()
    for seed in seeds:
        outcome = simulate(draw_history(seed))
        commits += outcome.commits
        done += 1
        if outcome.broken is not None:
            laws[outcome.broken.law] += 1
            print(f"seed {seed}: {outcome.broken}", flush=True)
            if not keep_going:
                break
    seconds, busy = time.perf_counter() - began, time.process_time() - cpu
    print(
        f"{done} seeds, {commits} commits; a seed took {1000 * busy / done:.1f} ms of CPU", end=" "
    )
    print(f"and {1000 * seconds / done:.1f} ms; broken: {dict(sorted(laws.items())) or 'none'}")
    return 1 if laws else 0


if __name__ == "__main__":
    sys.exit(main())
