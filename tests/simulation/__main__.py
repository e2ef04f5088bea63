"""Replays a seed: ``python -m tests.simulation SEED``; ``FIRST:LAST`` looks at a range of seeds."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.simulation.driver import simulate
from tests.simulation.histories import draw_history


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("seeds", help="a seed, or FIRST:LAST")
    parser.add_argument("--keep-going", action="store_true", help="do not end at the first one")
    parser.add_argument("--trace", action="store_true", help="show every commit")
    parser.add_argument("--as-drawn", action="store_true", help="do not shrink")
    given = parser.parse_args()
    first, colon, last = given.seeds.partition(":")
    if not colon:
        return _one(int(first), trace=given.trace, as_drawn=given.as_drawn)
    return _many(range(int(first), int(last)), keep_going=given.keep_going)


def _one(seed: int, *, trace: bool, as_drawn: bool) -> int:
    history = draw_history(seed)
    outcome = simulate(history, tracing=trace or as_drawn)
    if outcome.broken is not None and not as_drawn:
        from tests.simulation.shrinking import shrink

        history = shrink(history, outcome.broken.kind)
        outcome = simulate(history, tracing=True)
        trace = True
    print("\n".join(history.lines()))
    if trace:
        print("\n".join(_readable(outcome.trace)))
    print(f"{outcome.commits} commits in {outcome.seconds:.0f} simulated seconds")
    print(outcome.broken or "every law holds")
    return 1 if outcome.broken else 0


def _readable(trace: list[str]) -> list[str]:
    """The trace without renewals, of which there may be hundreds."""
    renewals = 0
    lines = []
    for line in [*trace, ""]:
        if " commits system/leases/" in line or " commits system/runtimes/" in line:
            renewals += 1
            if renewals > 2:
                continue
        elif renewals:
            lines += [f"              … {renewals} renewals"] if renewals > 2 else []
            renewals = 0
        lines.append(line)
    return lines


def _many(seeds: range, *, keep_going: bool) -> int:
    began = time.perf_counter()
    commits, laws = 0, Counter[str]()
    done = 0
    for seed in seeds:
        outcome = simulate(draw_history(seed))
        commits += outcome.commits
        done += 1
        if outcome.broken is not None:
            laws[outcome.broken.law] += 1
            print(f"seed {seed}: {outcome.broken}", flush=True)
            if not keep_going:
                break
    seconds = time.perf_counter() - began
    print(f"{done} seeds, {commits} commits, {1000 * seconds / done:.1f} ms a seed; {dict(laws)}")
    return 1 if laws else 0


if __name__ == "__main__":
    sys.exit(main())
