"""A talk that was imported, a reader in another zone, and the calls of the first design."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent_state import StateValidationError
from agent_state.testing import FakeClock
from agent_state_integrations.journey import (
    ConversationStateManager,
    EmotionalState,
    Message,
    TherapeuticCategory,
)
from tests.journey.journeys import journeys, said


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


async def talk(sessions: ConversationStateManager, **settings: Any) -> tuple[str, list[str]]:
    """A talk of 2024, imported in 2026: 30 messages a minute apart, with shifts and insights."""
    session_id, _ = await sessions.initialize_session("ann", **settings)
    ids = []
    emotions = {3: "anxious", 12: "exploring", 21: "integrated"}
    for number in range(30):
        update = {"emotion": emotions[number]} if number in emotions else None
        message = said(
            f"words {number}",
            "user" if number % 2 == 0 else "assistant",
            timestamp=f"2024-03-01T23:{number:02d}:00Z",
        )
        ids.append(await sessions.append_message("ann", session_id, message, update))
    for number in (5, 13, 29):
        await sessions.record_milestone("ann", session_id, f"m{number}", message_id=ids[number])
        await sessions.record_breakthrough("ann", session_id, f"b{number}", ids[number])
    return session_id, ids


@pytest.mark.parametrize("form", ["md", "txt", "markdown", "text"])
async def test_every_message_that_an_export_points_at_is_in_its_transcript(
    tmp_path: Path, clock: FakeClock, form: Any
) -> None:
    async with journeys("memory", tmp_path, clock, new_id=None) as sessions:
        session_id, ids = await talk(sessions)
        text = await (await sessions.exports.create("ann", session_id, form)).text()
        brief = await (
            await sessions.exports.create("ann", session_id, form, include_transcript=False)
        ).text()

    markdown = form in {"md", "markdown"}
    before, transcript = re.split("[Cc]onversation [Tt]ranscript", text)
    pointed = {each for each in ids if each in before}
    assert pointed == {ids[number] for number in (3, 12, 21, 5, 13, 29)}
    for place, each in enumerate(ids, 1):
        said_there = rf'<a id="message-{place}"></a>\*\*{place}\.' if markdown else rf"\n{place}\. "
        assert re.search(rf"{said_there}[^\n]*{each}", transcript)
        if each in pointed:
            assert f"[{place}](#message-{place}) `{each}`" in text or f"{place} ({each})" in before
    assert "#message-" not in brief
    assert ids[29] in brief


async def test_an_imported_talk_has_its_own_times(tmp_path: Path, clock: FakeClock) -> None:
    async with journeys("memory", tmp_path, clock) as sessions:
        session_id, _ = await talk(sessions)
        steps = await sessions.get_emotion_journey("ann", session_id)
        emotion = await sessions.get_emotion_state("ann", session_id)
        summary = await sessions.get_journey_summary("ann", session_id)
        stats = await sessions.get_session_stats("ann", session_id)
        text, _ = await sessions.export_markdown("ann", session_id)

    assert [step.timestamp for step in steps] == [
        f"2024-03-01T23:{minute}:00.000000Z" for minute in ("03", "12", "21")
    ]
    assert emotion.last_change == "2024-03-01T23:21:00.000000Z"
    assert summary.total_duration_minutes == stats.duration_minutes == 29
    times = ["2024-03-01T23:05", "2024-03-01T23:13", "2024-03-01T23:29"]
    assert [one.timestamp[:16] for one in summary.milestones] == times
    assert [one.timestamp[:16] for one in summary.breakthroughs] == times
    assert [one.message_count for one in summary.milestones] == [6, 14, 30]
    assert "| Duration | 29.0 minutes |" in text
    assert "| Started | 2024-03-01 23:00:00 UTC |" in text


async def test_a_breakthrough_has_the_shift_that_was_the_latest_at_its_trigger(
    tmp_path: Path, clock: FakeClock
) -> None:
    async with journeys("memory", tmp_path, clock) as sessions:
        session_id, ids = await talk(sessions)
        await sessions.record_breakthrough("ann", session_id, "early", ids[0])
        found = (await sessions.get_journey_summary("ann", session_id)).breakthroughs

    assert {one.insight: one.emotion_shift for one in found} == {
        "b5": "neutral:anxious",
        "b13": "anxious:exploring",
        "b29": "exploring:integrated",
        "early": None,
    }


async def test_a_live_talk_has_the_times_at_which_it_is_recorded(
    tmp_path: Path, clock: FakeClock
) -> None:
    async with journeys("memory", tmp_path, clock) as sessions:
        session_id, _ = await sessions.initialize_session("ann")
        first = await sessions.append_message("ann", session_id, said("hello"))
        await clock.advance(90)
        await sessions.update_emotion("ann", session_id, "happy", message_id=first)
        [step] = await sessions.get_emotion_journey("ann", session_id)

        assert step.timestamp == "2026-01-01T00:01:30.000000Z"
        assert (await sessions.get_session_stats("ann", session_id)).duration_minutes == 1.5


@pytest.mark.parametrize(
    ("zone", "expected"),
    [
        ("Asia/Tokyo", "2024-03-02 08:00:00 JST"),
        ("America/St_Johns", "2024-03-01 19:30:00 NST"),
        ("Asia/Kathmandu", "2024-03-02 04:45:00 +0545"),
        (None, "2024-03-01 23:00:00 UTC"),
    ],
)
@pytest.mark.parametrize("form", ["md", "txt"])
async def test_an_export_tells_times_in_the_persons_zone(
    tmp_path: Path, clock: FakeClock, form: Any, zone: str | None, expected: str
) -> None:
    async with journeys("memory", tmp_path, clock) as sessions:
        session_id, _ = await talk(sessions, user_timezone=zone)
        text = await (await sessions.exports.create("ann", session_id, form)).text()

    assert expected in text
    assert ("UTC" in expected) is ("23:00:00 UTC" in text)
    assert ("UTC" if "UTC" in expected else str(zone)) in text


@pytest.mark.parametrize("zone", ["Mars/Olympus", "", "../etc/passwd", "Europe", "a\0b"])
async def test_an_unknown_time_zone_is_refused(tmp_path: Path, clock: FakeClock, zone: str) -> None:
    async with journeys("files", tmp_path, clock) as sessions:
        with pytest.raises(StateValidationError, match=r"user_timezone.*no known time zone"):
            await sessions.initialize_session("ann", user_timezone=zone)
        session_id, _ = await talk(sessions)
        async with sessions.manager.edit("journeys", ("ann", session_id)) as stored:
            stored.user_timezone = zone  # as by hand
        with pytest.raises(StateValidationError, match=r"user_timezone.*no known time zone"):
            await sessions.exports.create("ann", session_id, "md")


# -- the calls of the first design ------------------------------------------------------------


async def test_a_manager_without_arguments_keeps_its_sessions_in_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    async with ConversationStateManager() as sessions:
        session_id, _ = await sessions.initialize_session("ann")
    async with ConversationStateManager() as sessions:
        assert (await sessions.get_session("ann", session_id)).status == "active"
    assert (tmp_path / "state/journeys/ann").is_dir()


@pytest.mark.parametrize(
    ("argument", "instead"),
    [
        ("redis_host", "RedisConversationCache"),
        ("redis_port", "RedisConversationCache"),
        ("ttl_days", "ttl_seconds"),
        ("max_message_window", "window"),
        ("nonsense", "nonsense"),
    ],
)
def test_an_argument_of_the_first_design_is_refused_with_what_to_write(
    argument: str, instead: str
) -> None:
    arguments: dict[str, Any] = {argument: 1}
    with pytest.raises(TypeError, match=instead):
        ConversationStateManager(**arguments)
    with pytest.raises(TypeError, match="StatePersistenceManager, not str"):
        ConversationStateManager("localhost")  # type: ignore[arg-type]


async def test_the_calls_of_the_first_design_work(tmp_path: Path, clock: FakeClock) -> None:
    async with journeys("exclusive", tmp_path, clock) as manager:
        session_id, _ = await manager.initialize_session("ann")
        message = Message(
            role="user",
            content="I am feeling overwhelmed",
            model_id="m",
            tokens=5,
            emotion_context="anxious",
            timestamp=1735689600123,  # type: ignore[arg-type]  # epoch milliseconds
        )
        message_id = await manager.append_message(
            "ann",
            session_id,
            message,
            {"emotion": EmotionalState.ANXIOUS.value, "intensity": 0.8, "confidence": 0.9},
        )
        await manager.record_breakthrough(
            "ann", session_id, "humour", message_id, TherapeuticCategory.REFRAME, 0.95
        )
        await manager.update_context_snapshot("ann", session_id, "theme", "focus", "state", "notes")
        await manager.record_milestone("ann", session_id, "first", "anxious", "m")
        markdown, export_id = await manager.export_markdown("ann", session_id, True)
        exported, _ = await manager.export_json("ann", session_id)
        resume = await manager.resume_session("ann", session_id)

    assert export_id in markdown
    assert exported["messages"][0]["timestamp"] == "2025-01-01T00:00:00.123000Z"
    assert resume["recent_messages"][0]["message_id"] == message_id
    assert resume["emotional_state"]["current_emotion"] == "anxious"
    assert resume["emotional_state"]["emotion_intensity"] == 0.8
    assert resume["context_snapshot"]["therapeutic_focus"] == "focus"
    assert resume["last_breakthrough"][0]["confidence"] == 0.95
    assert resume.get("nothing") is None
    assert dict(resume).keys() == {*resume.keys()}
    with pytest.raises(KeyError):
        resume["nothing"]


def test_a_message_becomes_a_mapping_and_text_and_comes_back() -> None:
    message = Message(role="user", content="hi", timestamp="2026-01-01T00:00:00Z", mine=[1])  # type: ignore[call-arg]

    assert message.to_dict()["mine"] == [1]
    assert Message.from_dict(message.to_dict()) == message
    assert Message.from_json(message.to_json()) == message
    assert json.loads(message.to_json())["content"] == "hi"
    for wrong in ("{", "7", '{"role": 1}'):
        with pytest.raises(StateValidationError):
            Message.from_json(wrong)


@pytest.mark.parametrize("time", ["0001-01-01T00:00:00+14:00", "+275760-09-13T00:00:00Z", 1e300])
async def test_a_message_may_have_any_time(
    tmp_path: Path, clock: FakeClock, time: Any, new_message: Callable[[Any], Message]
) -> None:
    async with journeys("memory", tmp_path, clock) as sessions:
        session_id, _ = await sessions.initialize_session("ann", user_timezone="Asia/Tokyo")
        await sessions.append_message("ann", session_id, new_message(time), {"emotion": "happy"})
        assert "words" in (await sessions.export_markdown("ann", session_id))[0]
        assert (await sessions.get_session_stats("ann", session_id)).duration_minutes >= 0


@pytest.fixture
def new_message() -> Callable[[Any], Message]:
    return lambda time: said("words", timestamp=time)
