"""What piles up in the long run: nothing.

``AGENT_STATE_SOAK_SECONDS=3600 pytest tests/faults/test_soak.py --full`` runs it for an hour.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from tests.faults.soaking import Soaked, soak
from tests.faults.storm import weather_of
from tests.faults.tally import Tally

logger = logging.getLogger(__name__)
"""What was measured: `-o log_cli=true --log-cli-level=INFO` shows it."""

THREADS = 12
"""The main one, eight for files, one for the journal, and two of the event loop's own."""
SECONDS = float(os.environ.get("AGENT_STATE_SOAK_SECONDS", "30"))


@pytest.mark.proof("T22", "soak: kills, pauses and cancellations, and what processes hold")
@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="it reads /proc")
@pytest.mark.timeout(SECONDS + 120)
def test_in_the_long_run_nothing_is_lost_and_nothing_piles_up(tmp_path: Path, tally: Tally) -> None:
    """A process that stays in each store, paused at times, beside those that are killed."""
    soaked = weather_of(soak, tmp_path, SECONDS, "soak")
    assert isinstance(soaked, Soaked)
    tally.add(soaked.tally)
    logger.info("%s", soaked)
    assert soaked.violations == []
    assert tally.clean()
    assert soaked.kills.total() > SECONDS
    assert soaked.pauses > SECONDS / 10
    assert set(soaked.held) == {"shared", "exclusive"}
    for store, held in soaked.held.items():
        assert len(held) > SECONDS / 3, f"{store}: hardly anything was measured"
        for what in ("descriptors", "memory"):
            flat(f"{what} of the {store} store", [second[what] for second in held])
        # A pool makes a thread when more is to do at once than ever before, however late that is.
        assert max(second["threads"] for second in held) <= THREADS


def flat(what: str, seconds: list[int]) -> None:
    """The least held in the last quarter is no more than a tenth above that of the second.

    The first quarter is for warming up; what is held for a moment is no leak.
    """
    quarter = len(seconds) // 4
    warm, late = min(seconds[quarter : 2 * quarter]), min(seconds[-quarter:])
    assert late <= 1.1 * warm + 1, f"{what} went from {warm} to {late}: {seconds}"
