from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_state.errors import QueryError
from agent_state_integrations.recorder.files import Format, Recording
from agent_state_integrations.recorder.query import Query, day, moment
from agent_state_integrations.recorder.reader import count, read_records
from tests.recorder.segments import BEGAN, FORMATS, line, live, message, mixed, pack, segment

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixed")
    mixed(path)
    return path


def numbers(path: Path, **asked: Any) -> list[int]:
    return [seq for seq, _ in read_records(path, Query(**asked))]


EXPECTED: list[tuple[dict[str, Any], list[int]]] = [
    ({}, list(range(1, 51))),
    ({"since": BEGAN + timedelta(hours=45)}, list(range(45, 51))),
    ({"until": BEGAN + timedelta(hours=3)}, [1, 2]),
    (
        {"since": BEGAN + timedelta(hours=9), "until": BEGAN + timedelta(hours=12)},
        [9, 10, 11],
    ),
    ({"speaker": "agent1"}, list(range(1, 51, 4))),
    ({"role": "Planner"}, list(range(5, 51, 5))),
    ({"context": "ctx1"}, list(range(1, 51, 2))),
    ({"chain_type": "ui_ux"}, list(range(3, 51, 3))),
    ({"ace_tier": "C"}, list(range(1, 51, 3))),
    ({"tag": "@Status-Ready"}, list(range(1, 51, 2))),
    ({"tag": "Status-Ready"}, list(range(1, 51, 2))),
    ({"message_type": 1}, list(range(1, 51, 2))),
    ({"message_type": "0"}, list(range(2, 51, 2))),
    ({"text": "MESSAGE 4"}, [4, *range(40, 50)]),
    ({"text": "CAFÉ"}, list(range(1, 51))),
    ({"text": "nothing like it"}, []),
    ({"speaker": "agent1", "role": "Planner", "tag": "Status-Ready"}, [5, 25, 45]),
    ({"limit": 3}, [1, 2, 3]),
    ({"limit": 0}, []),
    ({"speaker": "agent1", "limit": 2, "newest_first": True}, [49, 45]),
]


@pytest.mark.parametrize(("asked", "expected"), EXPECTED, ids=lambda value: str(value)[:50])
def test_each_question_is_answered_over_all_formats_alike(
    recording: Path, asked: dict[str, Any], expected: list[int]
) -> None:
    assert numbers(recording, **asked) == expected
    assert count(recording, Query(**asked)) == len(expected)


texts = st.text(max_size=5)
few = st.sampled_from(["", "ab", "İ", "straße", "K", "a\nb", "unknown"])


@given(st.data())
def test_archives_answer_as_the_plain_log_does(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever was said: columns, indexes and row groups leave nothing out and add nothing."""
    said = data.draw(
        st.lists(
            st.tuples(few | texts, few, st.integers(0, 3), st.none() | st.lists(few, max_size=2)),
            min_size=1,
            max_size=8,
        )
    )
    records = [
        message(
            number,
            Message=text,
            SpeakerName=speaker,
            ContextId=speaker,
            Timestamp=message(hour)["Timestamp"],
            Metadata={"shl_tags": tags, "chain_type": speaker or None},
        )
        for number, (text, speaker, hour, tags) in enumerate(said, 1)
    ]
    query = Query(
        since=data.draw(st.none() | st.integers(0, 3).map(lambda hour: BEGAN + hour * HOUR)),
        until=data.draw(st.none() | st.integers(0, 4).map(lambda hour: BEGAN + hour * HOUR)),
        speaker=data.draw(st.none() | few),
        chain_type=data.draw(st.none() | few),
        tag=data.draw(st.none() | few),
        text=data.draw(st.none() | few | texts),
    )
    root = tmp_path_factory.mktemp("law")
    expected = [(n, one) for n, one in enumerate(records, 1) if query.matches(one)]
    for kind in FORMATS:
        recording = Recording(root / kind)
        content = [line(number, record) for number, record in enumerate(records, 1)]
        pack(recording, segment(recording, 1, content), kind)
        assert list(read_records(root / kind, query)) == expected
        assert count(root / kind, query) == len(expected)


HOUR = timedelta(hours=1)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    "odd",
    [
        {"shl_tags": "Status-Ready"},
        {"shl_tags": [1, "@Status-Ready", None]},
        {"keywords": {"a": 1}},
        {"word_count": "many"},
        {"word_count": 2**63},
        {"chain_type": 7},
        {"ace_tier": ["A"]},
        {"content_hash": True},
    ],
    ids=str,
)
def test_odd_metadata_loses_no_message_and_stays_as_it_was(
    tmp_path: Path, kind: Format, odd: dict[str, Any]
) -> None:
    recording = Recording(tmp_path)
    records = [message(1), message(2, Metadata=odd), message(3)]
    content = [line(number, record) for number, record in enumerate(records, 1)]
    pack(recording, segment(recording, 1, content), kind)
    assert [record for _, record in read_records(tmp_path)] == records
    query = Query(tag="Status-Ready")
    expected = [number for number, one in enumerate(records, 1) if query.matches(one)]
    assert numbers(tmp_path, tag="Status-Ready") == expected
    assert numbers(tmp_path, ace_tier="A") == [3]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("asked", ["mine", "@mine"])
def test_a_tag_is_found_with_its_sign_and_without(tmp_path: Path, kind: Format, asked: str) -> None:
    recording = Recording(tmp_path)
    tags = ["mine", "@mine", "@@mine", "other"]
    records = [message(n, Metadata={"shl_tags": [tag]}) for n, tag in enumerate(tags, 1)]
    content = [line(number, record) for number, record in enumerate(records, 1)]
    pack(recording, segment(recording, 1, content), kind)
    assert numbers(tmp_path, tag=asked) == [1, 2]


def test_times_that_go_back_are_found_all_the_same(tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    hours = [5, 1, 9, 2, 7]
    content = [line(number, message(hour)) for number, hour in enumerate(hours, 1)]
    pack(recording, segment(recording, 1, content), "parquet")
    live(recording, [line(6, message(3))])
    found = numbers(tmp_path, since=BEGAN + 2 * HOUR, until=BEGAN + 6 * HOUR)
    assert found == [1, 4, 6]


@pytest.mark.parametrize("kind", FORMATS)
def test_since_includes_its_moment_and_until_does_not(tmp_path: Path, kind: Format) -> None:
    recording = Recording(tmp_path)
    pack(recording, segment(recording, 1, [line(1)]), kind)
    moment_of_it = BEGAN + HOUR
    assert numbers(tmp_path, since=moment_of_it) == [1]
    assert numbers(tmp_path, since=moment_of_it + timedelta(microseconds=1)) == []
    assert numbers(tmp_path, until=moment_of_it) == []
    assert numbers(tmp_path, until=moment_of_it + timedelta(microseconds=1)) == [1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24h", NOW - timedelta(hours=24)),
        ("30m", NOW - timedelta(minutes=30)),
        ("2w", NOW - timedelta(weeks=2)),
        ("2026-11-21", datetime(2026, 11, 21, tzinfo=UTC)),
        ("2026-11-21T10:30", datetime(2026, 11, 21, 10, 30, tzinfo=UTC)),
        ("2026-11-21T10:30:00+02:00", datetime(2026, 11, 21, 8, 30, tzinfo=UTC)),
    ],
)
def test_a_time_is_iso_or_counted_back_from_now(text: str, expected: datetime) -> None:
    assert moment(text, NOW) == expected


@pytest.mark.parametrize("text", ["", "yesterday", "24", "2026-13-01", "999999999w"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(QueryError, match="not a time"):
        moment(text, NOW)


def test_a_day_is_one_of_utc() -> None:
    first, end = day("2026-11-21")
    assert first == datetime(2026, 11, 21, tzinfo=UTC)
    assert end - first == timedelta(days=1)
    for wrong in ("21.11.2026", "2026-02-30", "9999-12-31"):
        with pytest.raises(QueryError, match="not a day"):
            day(wrong)


def test_what_names_no_instant_or_number_is_refused() -> None:
    with pytest.raises(QueryError, match="zone"):
        Query(since=datetime(2026, 1, 1))  # noqa: DTZ001
    with pytest.raises(QueryError, match="limit"):
        Query(limit=-1)


def test_what_is_no_unicode_is_refused() -> None:
    with pytest.raises(QueryError, match="speaker"):
        Query(speaker="a \udcff")
    with pytest.raises(QueryError, match="text"):
        Query(text="\ud800")
