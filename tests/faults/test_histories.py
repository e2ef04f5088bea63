"""Random histories of saves, faults, crashes, restarts and hand edits, against a model."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.faults.histories import Histories
from tests.faults.tally import Tally

PARTS = 8
STEPS = 50


@pytest.mark.long("random histories, each in a fresh directory")
@pytest.mark.parametrize(
    "part", [0, *(pytest.param(part, marks=pytest.mark.full) for part in range(1, PARTS))]
)
@pytest.mark.timeout(600)
@pytest.mark.proof("T21", "random histories beside a model")
def test_no_history_tells_disk_and_model_apart(part: int, full: bool, tally: Tally) -> None:
    histories: type[Histories] = type(f"Histories{part}", (Histories,), {"tally": tally})
    run_state_machine_as_test(
        seed(part)(histories),
        settings=settings(
            max_examples=40 if full else 25,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
            print_blob=False,
        ),
    )
    assert tally.acknowledged
    assert tally.faults


@pytest.mark.proof("T21", "random histories beside a model")
def test_a_document_made_anew_over_a_deleted_hand_edit_survives_a_crash(tally: Tally) -> None:
    """A history that was found: the edit that had been deleted came back over what was saved."""
    history = type("Found", (Histories,), {"tally": tally})()
    try:
        history.begin(exclusive=True)
        history.write_by_hand(name="one", settled=False, bare=False, ahead=0)
        history.delete(name="one", fault=None)
        history.save(name="one", fault=None)
        history.vanish(exclusive=False)
    finally:
        history.teardown()
