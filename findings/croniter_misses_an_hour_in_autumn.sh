#!/usr/bin/env bash
# croniter 6.0.0: where the clocks go back, an hourly schedule misses an hour, and the next day's run is an hour late.
#
# Guess before looking: an hourly schedule runs 25 times on that day, and a daily one at 02:30 once or twice; the day after is
# like any other.
# Seen: with the time zones of the standard library, `0 * * * *` and `*/30 * * * *` go from 02:00 and 02:30 summer time to 03:00
# winter time: nothing runs for the second 02:00 to 03:00, so that there are two hours between two runs. `30 2 * * *`, asked
# for the run after the one of that day, gives 03:30 of the next day, on which no clock is changed. In spring it is right.
# cronsim, asked the same, runs every hour, and at 02:30.
# Met: choosing the library for schedules in time zones.
#
# Output seen (local times from 2026-10-25 01:30, Paris):
#   croniter  hourly 02:00+0200 03:00+0100 04:00+0100   daily 25 02:30+0200, 26 03:30+0100, 27 02:30+0100
#   cronsim   hourly 02:00+0200 02:00+0100 03:00+0100   daily 25 02:30+0200, 26 02:30+0100, 27 02:30+0100
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check croniter==6.0.0 cronsim==2.6 tzdata==2025.2
cat >"$folder/run.py" <<'PYTHON'
from collections.abc import Callable, Iterator
from datetime import datetime
from zoneinfo import ZoneInfo

from croniter import croniter
from cronsim import CronSim

START = datetime(2026, 10, 25, 1, 30, tzinfo=ZoneInfo("Europe/Paris"))
Runs = Callable[[str], Iterator[datetime]]


def by_croniter(cron: str) -> Iterator[datetime]:
    return iter(croniter(cron, START, ret_type=datetime))


def by_cronsim(cron: str) -> Iterator[datetime]:
    return iter(CronSim(cron, START))


def three(runs: Runs, cron: str, form: str) -> list[str]:
    times = runs(cron)
    return [next(times).strftime(form) for _ in range(3)]


EXPECTED = {
    "croniter": (
        by_croniter,
        ["02:00+0200", "03:00+0100", "04:00+0100"],
        ["25 02:30+0200", "26 03:30+0100", "27 02:30+0100"],
    ),
    "cronsim": (
        by_cronsim,
        ["02:00+0200", "02:00+0100", "03:00+0100"],
        ["25 02:30+0200", "26 02:30+0100", "27 02:30+0100"],
    ),
}
for name, (runs, hours, days) in EXPECTED.items():
    hourly, daily = three(runs, "0 * * * *", "%H:%M%z"), three(runs, "30 2 * * *", "%d %H:%M%z")
    print(f"{name:9} hourly {' '.join(hourly)}   daily {', '.join(daily)}")
    assert (hourly, daily) == (hours, days), f"the version of {name} named above gave {(hours, days)}"
PYTHON
"$folder/venv/bin/python" "$folder/run.py"
