"""Each fault of the table, put back on purpose, breaks its law at its seed.

``--full`` also looks at every seed before it: the table says the first.
"""

from __future__ import annotations

import pytest

from tests.simulation.driver import simulate
from tests.simulation.histories import draw_history
from tests.simulation.seeded import FAULTS
from tests.simulation.seeding import SeededFault, find, first_seed, seeded

MOST_SEEDS = 2000


@pytest.mark.parametrize("name", FAULTS)
def test_a_seeded_fault_breaks_its_law(name: str) -> None:
    fault = FAULTS[name]
    history = draw_history(fault.seed)
    before = find(fault.function).__code__

    with seeded(fault):
        broken = simulate(history).broken

    assert broken is not None
    assert broken.law == fault.law, broken
    assert fault.seed < MOST_SEEDS
    assert find(fault.function).__code__ is before


@pytest.mark.long("thousands of histories")
@pytest.mark.parametrize("name", FAULTS)
def test_the_table_has_the_first_seed(name: str) -> None:
    assert first_seed(FAULTS[name], MOST_SEEDS) == FAULTS[name].seed


def test_every_law_is_broken_by_a_fault() -> None:
    assert {fault.law for fault in FAULTS.values()} == {f"L{number}" for number in range(1, 8)}


def test_a_fault_that_fits_no_more_is_told() -> None:
    stale = SeededFault("runtime.transitions:complete", "no such text", "", "L1", 0)
    with pytest.raises(AssertionError, match="has changed"), seeded(stale):
        pass
