"""Times as other programs write them come out as one text that sorts as time does."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_state.clock import stamp
from agent_state_integrations.recorder.normalize import parse_timestamp

MOMENT = "2026-11-21T03:11:09.123456Z"


@pytest.mark.parametrize(
    "written",
    [
        MOMENT,
        "2026-11-21T03:11:09.123456",
        "2026-11-21 03:11:09.123456",
        "2026-11-21T05:11:09.123456+02:00",
        "2026-11-20T21:41:09.123456-05:30",
        "2026-11-21T03:11:09.1234567Z",
        "2026-11-21T03:11:09.1234567",
        "2026-11-21T03:11:09.123456999+00:00",
        "2026-11-21T03:11:09.123456z",
        "2026-11-21 03:11:09.123456 UTC",
        "  2026-11-21T03:11:09.123456Z ",
        1795230669123456,
        1795230669123456789,
        "1795230669123456",
        "1795230669123456789",
        "1795230669.123456",
        datetime(2026, 11, 21, 3, 11, 9, 123456, tzinfo=UTC),
        datetime(2026, 11, 21, 3, 11, 9, 123456),  # noqa: DTZ001 - naive is UTC
        datetime(2026, 11, 21, 6, 11, 9, 123456, tzinfo=timezone(timedelta(hours=3))),
    ],
)
def test_all_of_these_are_the_same_moment(written: object) -> None:
    assert parse_timestamp(written) == MOMENT


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("2026-11-21", "2026-11-21T00:00:00.000000Z"),
        (date(2026, 11, 21), "2026-11-21T00:00:00.000000Z"),
        ("20261121", "2026-11-21T00:00:00.000000Z"),
        ("20261121031109", "2026-11-21T03:11:09.000000Z"),
        ("20261121T031109Z", "2026-11-21T03:11:09.000000Z"),
        (1795230669, "2026-11-21T03:11:09.000000Z"),
        ("1795230669", "2026-11-21T03:11:09.000000Z"),
        (1795230669.25, "2026-11-21T03:11:09.250000Z"),
        (1795230669250, "2026-11-21T03:11:09.250000Z"),
        (0, "1970-01-01T00:00:00.000000Z"),
        (-1, "1969-12-31T23:59:59.000000Z"),
    ],
)
def test_dates_and_numbers_by_their_size(written: object, meant: str) -> None:
    assert parse_timestamp(written) == meant


GARBAGE: list[Any] = [
    "",
    " ",
    "soon",
    "2026",
    "12",
    "2026-02-31T00:00:00.000000Z",
    "2026-13-01",
    "2026-11-21T25:00:00Z",
    "9" * 400,
    "2026-11-21" + " " * 100 + "x",
    None,
    True,
    float("nan"),
    float("inf"),
    10**30,
    [],
    {},
    b"2026-11-21",
]


@pytest.mark.parametrize("value", GARBAGE, ids=lambda value: repr(value)[:30])
def test_what_is_no_time_is_refused_or_replaced(value: object) -> None:
    with pytest.raises(ValueError, match=r"time|range|month"):
        parse_timestamp(value)
    fallback = datetime(2026, 1, 2, tzinfo=UTC)
    assert parse_timestamp(value, fallback=fallback) == "2026-01-02T00:00:00.000000Z"


@pytest.mark.parametrize(
    ("value", "nearest"),
    [
        ("0001-01-01T00:00:00+05:00", "0001-01-01T00:00:00.000000Z"),
        ("9999-12-31T23:59:59-05:00", "9999-12-31T23:59:59.999999Z"),
    ],
)
def test_a_time_out_of_range_is_the_nearest_one(value: str, nearest: str) -> None:
    assert parse_timestamp(value) == nearest


def test_a_fallback_is_only_for_what_is_no_time() -> None:
    assert parse_timestamp(MOMENT, fallback=datetime(2020, 1, 1, tzinfo=UTC)) == MOMENT


@given(st.datetimes(timezones=st.timezones()))
def test_any_datetime_is_understood_as_the_clock_writes_it(moment: datetime) -> None:
    try:
        expected = stamp(moment)
    except OverflowError:
        return  # before the year 1, or after 9999, in UTC
    assert parse_timestamp(moment) == expected
    assert parse_timestamp(expected) == expected
    if not moment.utcoffset() or not moment.utcoffset().microseconds:  # type: ignore[union-attr]
        assert parse_timestamp(moment.isoformat()) == expected


@given(st.one_of(st.text(max_size=30), st.integers(), st.floats()))
def test_anything_else_is_a_time_or_a_value_error(value: object) -> None:
    try:
        written = parse_timestamp(value)
    except ValueError:
        return
    assert datetime.fromisoformat(written).tzinfo is not None
    assert len(written) == 27
