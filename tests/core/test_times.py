"""Times that others write: out of range, as numbers, and no times at all."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from agent_state import StatePersistenceManager, StateValidationError
from agent_state.clock import FIRST, LAST, instant, later, sort_text, stamp

NEW_YEAR = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("9999-12-31T23:59:59-05:00", LAST),
        ("9999-12-31T24:59:59-05:00".replace("24", "22"), LAST),
        ("0001-01-01T00:00:00+05:00", FIRST),
        ("0001-01-01T00:00:00+00:01", FIRST),
        ("+275760-09-13T00:00:00.000Z", LAST),
        ("-271821-04-20T00:00:00.000Z", FIRST),
        ("+002026-01-01T00:00:00Z", NEW_YEAR),
        ("12026-01-01T00:00:00Z".rjust(22, "+"), LAST),
        ("0000-01-01T00:00:00.000Z", FIRST),
        ("10000-01-01T00:00:00Z", LAST),
        ("2025-12-31T24:00:00Z", NEW_YEAR - timedelta(microseconds=1)),
        ("2025-12-31 24:00", NEW_YEAR - timedelta(microseconds=1)),
        ("2026-01-01T00:59:60.5+01:00", NEW_YEAR - timedelta(microseconds=1)),
        ("9999-12-31T23:59:60Z", LAST),
        (1767225600, NEW_YEAR),
        (1767225600.0, NEW_YEAR),
        (1767225600_000, NEW_YEAR),
        (1767225600_000_000, NEW_YEAR),
        (1767225600_000_000_000, NEW_YEAR),
        (10**40, LAST),
        (-1e300, FIRST),
        (math.inf, LAST),
    ],
)
def test_a_time_is_the_instant_it_names_or_the_nearest_one_that_there_is(
    time: str | float, expected: datetime
) -> None:
    assert instant(time) == expected


@pytest.mark.parametrize(
    "time", ["", "soon", "2026-13-01", "+12-01-01", "2026-02-30T24:00Z", math.nan, True]
)
def test_what_names_no_instant_is_refused(time: Any) -> None:
    with pytest.raises(ValueError, match=r".+"):
        instant(time)


def test_a_moment_with_a_zone_is_stamped_within_the_years_that_utc_has() -> None:
    west, east = (timezone(timedelta(hours=hours)) for hours in (-12, 14))

    assert stamp(datetime.max.replace(tzinfo=west)) == "9999-12-31T23:59:59.999999Z"
    assert stamp(datetime.min.replace(tzinfo=east)) == "0001-01-01T00:00:00.000000Z"


@pytest.mark.parametrize(
    ("seconds", "expected"), [(math.inf, LAST), (1e300, LAST), (-math.inf, FIRST), (-1e12, FIRST)]
)
def test_a_moment_beyond_all_years_is_the_last_or_the_first(
    seconds: float, expected: datetime
) -> None:
    assert later(NEW_YEAR, seconds) == expected


def test_numbers_and_texts_sort_as_their_times() -> None:
    times = [None, 1767225600, "2026-01-01T00:00:01.000000Z", 1767225602_000, {"no": "time"}]

    assert sorted(times, key=sort_text) == [None, {"no": "time"}, *times[1:4]]


EPOCHS: dict[str, dict[str, Any]] = {
    "agents": {"agent_id": "alice", "created_at": 1733011200, "last_active": 1733011200.25},
    "sleep": {"agent_id": "alice", "sleep_started": 1733011200123, "sleep_until": -1.5},
    "tasks": {"task_id": "t", "attempts": 0, "created_at": 0, "not_before": 1733011200},
    "mail": {"message_id": "m", "to_agent": "alice", "timestamp": 1.5e9, "read_at": 10**18},
}


@pytest.mark.parametrize("kind", EPOCHS)
async def test_epoch_numbers_of_other_managers_come_back_equal(
    manager: StatePersistenceManager, kind: str
) -> None:
    key = ("alice",) if kind in {"agents", "sleep"} else ("alice", "x")
    await manager.save(kind, key, EPOCHS[kind])

    loaded = await manager.load(kind, key)

    assert loaded is not None
    assert json.dumps(loaded.model_dump(), sort_keys=True) == json.dumps(
        EPOCHS[kind], sort_keys=True
    )


async def test_a_queue_of_another_manager_with_epoch_numbers_is_in_their_order(
    manager: StatePersistenceManager,
) -> None:
    for name, created in (("a", 3e9), ("b", 2_000_000_000), ("c", "2026-01-01T00:00:00Z")):
        await manager.save("tasks", ("alice", name), {"task_id": name, "created_at": created})

    queue = await manager.load_task_queue_state("alice")

    assert queue is not None
    assert [task["task_id"] for task in queue.pending_tasks] == ["c", "b", "a"]


@pytest.mark.parametrize("time", [True, [1], {"at": 1}, math.nan])
async def test_what_is_no_time_is_refused_by_name(
    manager: StatePersistenceManager, time: Any
) -> None:
    with pytest.raises((StateValidationError, TypeError), match=r"created_at|NaN"):
        await manager.save_agent_state("alice", {"agent_id": "alice", "created_at": time})


@pytest.mark.parametrize("hours", [math.inf, 1e300])
async def test_cleanup_takes_any_number_of_hours(
    manager: StatePersistenceManager, hours: float
) -> None:
    await manager.save_agent_state("bob", {"agent_id": "bob", "status": "stopped"})

    assert (await manager.cleanup_old_states(hours)).total == 0


@pytest.mark.parametrize("hours", [math.nan, "24", None, True, -1, -math.inf])
async def test_cleanup_refuses_what_is_no_number_of_hours(
    manager: StatePersistenceManager, hours: Any
) -> None:
    with pytest.raises(StateValidationError, match="max_age_hours"):
        await manager.cleanup_old_states(hours)
