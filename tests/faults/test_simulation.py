"""Two hundred thousand simulated histories of runtimes, and the laws that hold in each.

``make test`` runs the first two thousand, see ``tests/simulation``.
"""

from __future__ import annotations

import pytest

from tests.faults.tally import Tally
from tests.simulation.reports import run

SEEDS = 200_000
CHUNK = 2_000


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.proof("T24", "histories of runtimes, simulated: every law after every commit")
@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_every_law_holds(first: int, tally: Tally) -> None:
    totals = run(range(first, first + CHUNK))
    tally.points += totals.commits
    tally.faults += totals.faults
    assert totals.broken is None, totals.broken
    assert totals.commits >= 5 * CHUNK  # a million and more in all
