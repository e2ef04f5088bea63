"""Real processes, killed with SIGKILL at random moments: nothing acknowledged is lost."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.faults.storm import Weather, encrypted_storm, storm, weather_of
from tests.faults.tally import Tally
from tests.faults.writing import OPERATIONS

pytestmark = pytest.mark.long("kills processes at random moments for many seconds")

logger = logging.getLogger(__name__)
"""What was measured: `-o log_cli=true --log-cli-level=INFO` shows it."""

SEEDED_KILLS = 200
FULL_KILLS = 7_500
"""By each of four parts: 30,000 in all."""


@pytest.mark.proof("T5", "SIGKILL at random moments, also while recovering; every operation")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", [0, pytest.param(1, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("exclusive", "directories"), [(False, 1), (True, 4)], ids=["shared", "exclusive"]
)
def test_kill_9_at_any_moment_loses_nothing_acknowledged(
    tmp_path: Path,
    tally: Tally,
    full: bool,
    exclusive: bool,
    directories: int,
    part: int,
) -> None:
    """Four processes at a time, in one shared directory or each in an exclusive one."""
    kills = FULL_KILLS if full else SEEDED_KILLS
    weather = weather_of(storm, tmp_path, exclusive, directories, kills, f"{part}")
    tally.add(weather.tally)
    logger.info("%s", weather)
    judge(weather, kills)
    assert tally.clean()


@pytest.mark.proof("T5e", "SIGKILL at random moments, of writers that encrypt")
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("exclusive", "directories"), [(False, 1), (True, 4)], ids=["shared", "exclusive"]
)
def test_kill_9_loses_nothing_that_was_encrypted(
    tmp_path: Path, tally: Tally, full: bool, exclusive: bool, directories: int
) -> None:
    kills = FULL_KILLS // 5 if full else SEEDED_KILLS // 2
    keys = str(tmp_path / "keys")
    weather = weather_of(encrypted_storm, keys, tmp_path, exclusive, directories, kills, "e")
    tally.add(weather.tally)
    logger.info("%s", weather)
    judge(weather, kills)
    assert tally.clean()


def judge(weather: Weather, kills: int) -> None:
    assert weather.violations == []
    assert weather.kills.total() >= kills
    assert weather.kills["opening"] > kills / 4, "recovery was hardly ever interrupted"
    assert weather.kills["writing"] > kills / 4, "writers were hardly ever killed at work"
    for operation in OPERATIONS:
        assert weather.acknowledged[operation] > kills / 20, f"too few {operation} to tell"
    assert weather.most_locks < 50, "dead writers' locks pile up"
