from __future__ import annotations

from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_state.clock import stamp
from agent_state.protocols import JsonObject
from agent_state_integrations.recorder.conversation import (
    RecordedConversation,
    TopicShift,
    conversations,
)
from tests.recorder.segments import BEGAN, message


def said(
    seconds: float,
    speaker: str = "ann",
    context: str = "unknown",
    topic: str | None = "ui_ux",
    tags: Any = (),
) -> JsonObject:
    return message(
        1,
        Id=f"{context}{seconds}",
        Timestamp=stamp(BEGAN + timedelta(seconds=seconds)),
        SpeakerName=speaker,
        ContextId=context,
        Metadata={"chain_type": topic, "shl_tags": list(tags) if type(tags) is tuple else tags},
    )


def found(*records: JsonObject, **options: Any) -> list[RecordedConversation]:
    return conversations(((0, record) for record in records), **options)


def test_a_context_is_one_conversation_however_long_it_is_silent() -> None:
    [one] = found(
        said(0, "ann", "c1"),
        said(10_000, "bob", "c1"),
        said(9_000, "ann", "c1"),
        said(5, "x", "c2"),
    )
    assert one == RecordedConversation(
        thread_id="c1",
        start_time=stamp(BEGAN),
        end_time=stamp(BEGAN + timedelta(seconds=10_000)),
        duration_seconds=10_000.0,
        message_count=3,
        participants=("ann", "bob"),
        final_status="Completed",
        context_shifts=(),
    )


def test_without_a_context_a_silence_of_more_than_five_minutes_ends_it() -> None:
    first, second = found(said(0), said(300), said(600.5), said(605.5), said(606), said(2000))
    assert (first.message_count, second.message_count) == (2, 3)
    assert first.thread_id == "gap-2026-11-01T08:00:00.000000Z"
    assert second.start_time == stamp(BEGAN + timedelta(seconds=600.5))


def test_an_empty_context_names_none() -> None:
    [one] = found(said(0, context=""), said(10, context="unknown"))
    assert one.message_count == 2


def test_short_ones_are_left_out_unless_asked_for() -> None:
    records = [said(0, context="a"), said(4.9, context="a"), said(9, context="b")]
    assert found(*records) == []
    every = found(*records, fewest=1, shortest=timedelta(0))
    assert [one.thread_id for one in every] == ["a", "b"]
    assert [one.thread_id for one in found(*records, shortest=timedelta(seconds=4))] == ["a"]


@pytest.mark.parametrize(
    ("tags", "status"),
    [
        ([(), ()], "Completed"),
        ([("@Status-Ready",), ()], "Ready"),
        ([("@Status-Ready",), ("@Status-Blocked",)], "Blocked"),
        ([("@Status-Blocked",), ("@Status-Ready",)], "Ready"),
        ([("@Status-Ready", "@Status-Blocked"), ()], "Blocked"),
        (["@Status-Ready", None], "Completed"),
    ],
)
def test_the_last_message_that_says_so_tells_how_it_ended(tags: list[Any], status: str) -> None:
    records = [said(index * 10, context="c", tags=tag) for index, tag in enumerate(tags)]
    [one] = found(*reversed(records))
    assert one.final_status == status


@pytest.mark.parametrize(
    ("topics", "shifts"),
    [
        ("aabb", [("a", "b", 2)]),
        ("aabaa", []),
        ("aabbaa", [("a", "b", 2), ("b", "a", 4)]),
        ("abab", []),
        ("baabb", [("a", "b", 3)]),
        ("aa-b-b", [("a", "b", 3)]),
        ("aabcc", [("a", "c", 3)]),
        ("a", []),
        ("--", []),
    ],
)
def test_a_topic_has_to_last_for_two_messages_to_be_a_shift(
    topics: str, shifts: list[tuple[str, str, int]]
) -> None:
    records = [
        said(index * 10, context="c", topic=None if topic == "-" else topic)
        for index, topic in enumerate(topics)
    ]
    [one] = found(*records, fewest=1, shortest=timedelta(0))
    assert one.context_shifts == tuple(TopicShift(*shift) for shift in shifts)


def test_the_messages_are_kept_on_request_alone() -> None:
    records = [said(10, context="c"), said(0, context="c")]
    [one] = found(*records)
    assert one.messages is None
    assert "messages" not in one.to_dict()
    [one] = found(*records, with_messages=True)
    assert one.messages == (records[1], records[0])
    assert list(one.to_dict()["messages"]) == [records[1], records[0]]


@given(
    st.lists(
        st.tuples(st.integers(0, 2000), st.sampled_from(["unknown", "c1", "c2"])), max_size=30
    ),
    st.randoms(),
)
def test_the_order_in_which_messages_come_changes_nothing(
    times: list[tuple[int, str]], chance: Any
) -> None:
    """Each message of another moment is in one conversation alone."""
    records = [said(at, f"s{at}", context) for at, context in dict.fromkeys(times)]
    mixed = records.copy()
    chance.shuffle(mixed)
    options: dict[str, Any] = {"fewest": 1, "shortest": timedelta(0), "with_messages": True}
    alike = {one for one, _ in times}
    if len(alike) == len(set(times)):
        assert found(*records, **options) == found(*mixed, **options)
    parts = found(*mixed, **options)
    assert sum(one.message_count for one in parts) == len(records)
    gapped = [one for one in parts if one.thread_id.startswith("gap-")]
    for before, after in pairwise(gapped):
        end, start = map(datetime.fromisoformat, (before.end_time, after.start_time))
        assert (start - end).total_seconds() > 300
