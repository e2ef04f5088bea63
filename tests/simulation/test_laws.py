"""The laws of the runtime hold in every simulated history."""

from __future__ import annotations

import pytest

from tests.simulation.reports import run

SEEDS = 2000
CHUNK = 50


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_every_law_holds(first: int) -> None:
    totals = run(range(first, first + CHUNK))
    assert totals.broken is None, totals.broken
    assert totals.commits > 5 * CHUNK
