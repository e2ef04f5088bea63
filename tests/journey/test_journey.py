"""Conversations with the way they went: begun, continued, expired, erased."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent_state import (
    AgentStateError,
    FileStateStore,
    LockTimeoutError,
    StateNotFoundError,
    StatePersistenceManager,
    StateValidationError,
)
from agent_state.errors import Key, SessionClosedError, SessionExpiredError
from agent_state.testing import FakeClock
from agent_state_integrations.journey import (
    ConversationStateManager,
    EmotionalState,
    EmotionUpdate,
    TherapeuticCategory,
    Vocabulary,
)
from tests.journey.journeys import DAY, STORES, files, journeys, said


@pytest.fixture(params=STORES)
async def sessions(
    request: pytest.FixtureRequest, tmp_path: Path, clock: FakeClock
) -> AsyncIterator[ConversationStateManager]:
    async with journeys(request.param, tmp_path / "state", clock) as manager:
        yield manager


async def test_a_session_begins_neutral_and_empty(sessions: ConversationStateManager) -> None:
    session_id, conversation_id = await sessions.initialize_session("ann", model_id="m1")

    resumed = await sessions.resume_session("ann", session_id)

    assert resumed.session_metadata.conversation_id == conversation_id
    assert resumed.session_metadata.last_model == "m1"
    assert resumed.emotional_state.emotion == "neutral"
    assert resumed.recent_messages == []
    assert resumed.recent_milestones == []
    assert resumed.last_breakthrough == []


async def test_the_eight_emotions_and_six_categories() -> None:
    words = Vocabulary()
    assert words.emotions == (
        "neutral", "happy", "frustrated", "anxious", "breakthrough", "integrated", "exploring",
        "resistant",
    )  # fmt: skip
    assert words.categories == (
        "reframe", "integration", "insight", "acceptance", "pattern_recognition", "resolution",
    )  # fmt: skip


async def test_a_message_changes_emotion_and_records_a_breakthrough_at_once(
    sessions: ConversationStateManager, clock: FakeClock
) -> None:
    session_id, _ = await sessions.initialize_session("ann")

    message_id = await sessions.append_message(
        "ann",
        session_id,
        said("I hide behind jokes", model_id="m1", tokens=7, emotion_context="anxious"),
        {
            "emotion": EmotionalState.ANXIOUS,
            "intensity": 0.8,
            "confidence": 0.9,
            "breakthrough_insight": "humour as armour",
            "category": TherapeuticCategory.PATTERN_RECOGNITION,
        },
    )

    resumed = await sessions.resume_session("ann", session_id)
    [message] = resumed.recent_messages
    assert (message.message_id, message.is_breakthrough_trigger) == (message_id, True)
    assert resumed.emotional_state.emotion == "anxious"
    assert resumed.emotional_state.message_id == message_id
    [breakthrough] = resumed.last_breakthrough
    assert breakthrough.insight == "humour as armour"
    assert breakthrough.therapeutic_category == "pattern_recognition"
    assert breakthrough.trigger_message_id == message_id
    assert breakthrough.trigger_excerpt == "I hide behind jokes"
    assert breakthrough.emotion_shift == "neutral:anxious"
    stats = await sessions.get_session_stats("ann", session_id)
    assert (stats.message_count, stats.breakthrough_count, stats.tokens) == (1, 1, 7)


async def test_what_is_refused_leaves_nothing_half_done(
    sessions: ConversationStateManager,
) -> None:
    session_id, _ = await sessions.initialize_session("ann")
    before = await sessions.get_session("ann", session_id)
    for update in (
        {"emotion": "anxious", "intensity": 5},
        {"emotion": "anxious", "confidence": -0.1},
        {"emotion": "anxious", "intensity": float("nan")},
        {"emotion": "curious"},
        {"emotion": "anxious", "category": "nonsense"},
        {"emotion": "anxious", "intensty": 0.5},
    ):
        with pytest.raises(StateValidationError):
            await sessions.append_message("ann", session_id, said("hi"), update)
    for message in (
        {"role": "user"},
        {"role": "", "content": "x"},
        {"role": "user", "content": "x", "tokens": -1},
        {"role": "user", "content": "x", "emotion_context": "curious"},
        {"role": "user", "content": "x", "timestamp": "yesterday"},
        7,
    ):
        with pytest.raises(StateValidationError):
            await sessions.append_message("ann", session_id, message)  # type: ignore[arg-type]
    with pytest.raises(AgentStateError, match="surrogate"):
        await sessions.append_message("ann", session_id, said("\ud800"))

    assert await sessions.get_session("ann", session_id) == before
    assert await sessions.get_message_history("ann", session_id) == []
    assert await sessions.get_emotion_journey("ann", session_id) == []


@pytest.mark.parametrize("number", [-0.01, 1.01, 7.5, float("inf"), float("nan")])
async def test_intensity_and_confidence_are_from_0_to_1_everywhere(
    sessions: ConversationStateManager, number: float
) -> None:
    session_id, _ = await sessions.initialize_session("ann")
    message_id = await sessions.append_message("ann", session_id, said("hi"))

    with pytest.raises(StateValidationError, match="intensity"):
        await sessions.update_emotion("ann", session_id, "happy", number)
    with pytest.raises(StateValidationError, match="confidence"):
        await sessions.update_emotion("ann", session_id, "happy", confidence=number)
    with pytest.raises(StateValidationError, match="confidence"):
        await sessions.record_breakthrough("ann", session_id, "x", message_id, confidence=number)

    assert (await sessions.get_journey_summary("ann", session_id)).breakthrough_count == 0


async def test_words_that_are_none_are_refused(sessions: ConversationStateManager) -> None:
    session_id, _ = await sessions.initialize_session("ann")
    message_id = await sessions.append_message("ann", session_id, said("hi"))

    with pytest.raises(StateValidationError, match="not one of neutral"):
        await sessions.update_emotion("ann", session_id, "curious")
    with pytest.raises(StateValidationError, match="emotion"):
        await sessions.record_milestone("ann", session_id, "x", "curious")
    with pytest.raises(StateValidationError, match="category"):
        await sessions.record_breakthrough("ann", session_id, "x", message_id, category="nonsense")


async def test_an_application_has_its_own_words(tmp_path: Path, clock: FakeClock) -> None:
    words = Vocabulary(("calm", "curious"), ("idea",), "calm", "idea")
    async with journeys("exclusive", tmp_path, clock, vocabulary=words) as sessions:
        session_id, _ = await sessions.initialize_session("ann")
        await sessions.append_message(
            "ann", session_id, said("oh"), EmotionUpdate(emotion="curious"), is_breakthrough=True
        )
        with pytest.raises(StateValidationError):
            await sessions.update_emotion("ann", session_id, "neutral")
        summary = await sessions.get_journey_summary("ann", session_id)

    assert summary.breakthroughs[0].therapeutic_category == "idea"
    # Other words since: what was written is still read.
    async with journeys("exclusive", tmp_path, clock) as sessions:
        assert (await sessions.get_emotion_state("ann", session_id)).emotion == "curious"


@pytest.mark.parametrize(
    "words",
    [{"emotions": ()}, {"emotions": "neutral"}, {"emotions": ("neutral", "neutral")},
     {"categories": ("", "insight")}, {"emotions": ("calm",)}, {"first_category": "idea"}],
)  # fmt: skip
def test_a_vocabulary_that_is_none(words: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(StateValidationError):
        Vocabulary(**words)  # type: ignore[arg-type]


async def test_a_breakthrough_needs_neither_an_emotion_nor_an_insight(
    sessions: ConversationStateManager,
) -> None:
    session_id, _ = await sessions.initialize_session("ann")

    first = await sessions.append_message("ann", session_id, said("I see!"), is_breakthrough=True)
    second = await sessions.append_message(
        "ann",
        session_id,
        said("So that is it"),
        {"emotion": "breakthrough", "confidence": 0.6},
        is_breakthrough=True,
    )

    summary = await sessions.get_journey_summary("ann", session_id)
    assert [
        (each.insight, each.trigger_message_id, each.confidence) for each in summary.breakthroughs
    ] == [("I see!", first, 0.85), ("So that is it", second, 0.6)]


async def test_the_last_breakthrough_is_the_latest_and_not_the_most_confident(
    sessions: ConversationStateManager, clock: FakeClock
) -> None:
    session_id, _ = await sessions.initialize_session("ann")
    message_id = await sessions.append_message("ann", session_id, said("hi"))
    await sessions.record_breakthrough("ann", session_id, "old", message_id, confidence=0.95)
    await clock.advance(60)
    await sessions.record_breakthrough("ann", session_id, "new", message_id, confidence=0.6)

    resumed = await sessions.resume_session("ann", session_id)

    assert [each.insight for each in resumed.last_breakthrough] == ["new"]


async def test_the_whole_emotional_journey_is_kept(
    sessions: ConversationStateManager, clock: FakeClock
) -> None:
    session_id, _ = await sessions.initialize_session("ann")
    cause = await sessions.append_message("ann", session_id, said("oh"), {"emotion": "anxious"})
    await clock.advance(1)
    await sessions.update_emotion("ann", session_id, EmotionalState.ANXIOUS, 0.9, 1)
    await clock.advance(1)
    await sessions.update_emotion("ann", session_id, "integrated", message_id=cause)

    steps = await sessions.get_emotion_journey("ann", session_id)

    assert [(s.from_emotion, s.to_emotion, s.intensity, s.confidence, s.message_id)
            for s in steps] == [
        ("neutral", "anxious", 0.5, 0.7, cause),
        ("anxious", "anxious", 0.9, 1.0, None),
        ("anxious", "integrated", 0.5, 0.7, cause),
    ]  # fmt: skip
    assert [step.timestamp[17:19] for step in steps] == ["00", "01", "02"]
    assert (await sessions.get_emotion_journey("ann", session_id, limit=1)) == steps[-1:]
    stats = await sessions.get_session_stats("ann", session_id)
    assert (stats.emotion_updates, stats.emotion_changes) == (3, 2)
    with pytest.raises(StateNotFoundError, match="no message"):
        await sessions.update_emotion("ann", session_id, "happy", message_id="nobody")


async def test_milestones_know_how_far_the_conversation_was(
    sessions: ConversationStateManager,
) -> None:
    session_id, _ = await sessions.initialize_session("ann", model_id="m1")
    for number in range(7):
        await sessions.append_message("ann", session_id, said(f"message {number}"))
        await sessions.record_milestone("ann", session_id, f"milestone {number}", "happy")

    resumed = await sessions.resume_session("ann", session_id)
    summary = await sessions.get_journey_summary("ann", session_id)

    assert [each.message_count for each in resumed.recent_milestones] == [3, 4, 5, 6, 7]
    assert summary.milestone_count == len(summary.milestones) == 7
    assert summary.milestones[0].model_id == "m1"
    assert resumed.session_metadata.milestone_count == 7


async def test_every_write_and_every_resume_renews_the_whole_session(
    sessions: ConversationStateManager, clock: FakeClock
) -> None:
    session_id, _ = await sessions.initialize_session("ann")
    message_id = await sessions.append_message("ann", session_id, said("hi"))
    writes = (
        lambda: sessions.append_message("ann", session_id, said("again")),
        lambda: sessions.update_emotion("ann", session_id, "happy"),
        lambda: sessions.record_milestone("ann", session_id, "x"),
        lambda: sessions.record_breakthrough("ann", session_id, "x", message_id),
        lambda: sessions.update_context_snapshot("ann", session_id, current_theme="x"),
        lambda: sessions.switch_model_context("ann", session_id, "m2"),
        lambda: sessions.snapshot_session_state("ann", session_id),
        lambda: sessions.citations.generate("ann", session_id, "note", {}),
        lambda: sessions.resume_session("ann", session_id),
    )
    for write in writes:
        await clock.advance(6 * DAY)
        await write()
        assert (await sessions.check_session_expiry("ann", session_id)).ttl_seconds == 7 * DAY

    resumed = await sessions.resume_session("ann", session_id)
    assert resumed.emotional_state.emotion == "happy"
    assert len(resumed.recent_messages) == 2


async def test_reading_renews_nothing(sessions: ConversationStateManager, clock: FakeClock) -> None:
    session_id, _ = await sessions.initialize_session("ann")
    await clock.advance(6.5 * DAY)

    await sessions.get_message_history("ann", session_id)
    await sessions.get_session_stats("ann", session_id)
    expiry = await sessions.check_session_expiry("ann", session_id)

    assert (expiry.ttl_seconds, expiry.expired, expiry.soon) == (0.5 * DAY, False, True)


async def test_an_expiry_is_soon_in_less_than_a_day(
    sessions: ConversationStateManager, clock: FakeClock
) -> None:
    session_id, _ = await sessions.initialize_session("ann")
    await clock.advance(6 * DAY)
    assert not (await sessions.check_session_expiry("ann", session_id)).soon
    await clock.advance(1)
    assert (await sessions.check_session_expiry("ann", session_id)).soon


async def test_the_document_names_a_hundred_models_at_most(
    sessions: ConversationStateManager,
) -> None:
    session_id, _ = await sessions.initialize_session("ann", model_id="m0")
    for number in range(1, 102):
        await sessions.switch_model_context("ann", session_id, f"m{number}")
    session = await sessions.get_session("ann", session_id)
    assert session.models_used == [f"m{number}" for number in range(100)]
    assert session.last_model == "m101"


async def test_an_answer_dated_before_its_question_counts_for_no_response_time(
    sessions: ConversationStateManager,
) -> None:
    session_id, _ = await sessions.initialize_session("ann")
    times = ("00:00:10", "00:00:09", "00:00:20", "00:00:23")
    for number, time in enumerate(times):
        message = said("…", ("user", "assistant")[number % 2], timestamp=f"2026-01-01T{time}Z")
        await sessions.append_message("ann", session_id, message)
    stats = await sessions.get_session_stats("ann", session_id)
    assert stats.average_response_seconds == 3


@pytest.mark.parametrize(
    ("length", "excerpt"), [(240, "x" * 240), (241, "x" * 239 + "…")], ids=["fits", "cut"]
)
async def test_the_excerpt_of_a_breakthrough_has_240_characters_at_most(
    sessions: ConversationStateManager, length: int, excerpt: str
) -> None:
    session_id, _ = await sessions.initialize_session("ann")
    message_id = await sessions.append_message("ann", session_id, said("x" * length))
    await sessions.record_breakthrough("ann", session_id, "insight", message_id)
    [breakthrough] = (await sessions.get_journey_summary("ann", session_id)).breakthroughs
    assert breakthrough.trigger_excerpt == excerpt


async def test_nothing_is_written_to_a_session_that_expired_was_closed_or_never_was(
    sessions: ConversationStateManager, clock: FakeClock
) -> None:
    late, _ = await sessions.initialize_session("ann")
    await clock.advance(1)
    closed, _ = await sessions.initialize_session("ann")
    assert await sessions.close_session("ann", closed)
    await clock.advance(7 * DAY - 1)

    for session_id, error in (
        (late, SessionExpiredError),
        (closed, SessionClosedError),
        ("unknown", StateNotFoundError),
    ):
        with pytest.raises(error) as caught:
            await sessions.append_message("ann", session_id, said("hi"))
        assert caught.value.key == ("ann", session_id)
        with pytest.raises(error):
            await sessions.update_emotion("ann", session_id, "happy")
        with pytest.raises(error):
            await sessions.resume_session("ann", session_id)
    with pytest.raises(StateNotFoundError):
        await sessions.append_message("bob", late, said("a session of somebody else"))
    assert await sessions.manager.keys("journeys") == [("ann", late), ("ann", closed)]
    assert await sessions.manager.store.logs("journeys", ("ann", "unknown")) == []
    assert (await sessions.check_session_expiry("ann", late)).expired


async def test_a_clock_that_goes_back_shortens_no_session(
    sessions: ConversationStateManager, clock: FakeClock
) -> None:
    session_id, _ = await sessions.initialize_session("ann")
    expires_at = (await sessions.get_session("ann", session_id)).expires_at
    clock.jump(-600)
    await sessions.append_message("ann", session_id, said("hi"))
    assert (await sessions.get_session("ann", session_id)).expires_at == expires_at


async def test_closing_keeps_everything_and_can_be_taken_back(
    sessions: ConversationStateManager,
) -> None:
    session_id, _ = await sessions.initialize_session("ann")
    await sessions.append_message("ann", session_id, said("hi"))

    assert await sessions.close_session("ann", session_id)
    assert await sessions.close_session("ann", session_id)
    assert not await sessions.close_session("ann", "unknown")

    assert await sessions.get_user_sessions("ann") == []
    [ended] = await sessions.get_user_sessions("ann", ended=True)
    assert (ended.status, ended.message_count) == ("closed", 1)
    resumed = await sessions.resume_session("ann", session_id, reopen=True)
    assert resumed.session_metadata.status == "active"
    assert [each["event_type"] for each in await sessions.get_events("ann", session_id)] == [
        "closed",
        "reopened",
    ]


async def test_resume_tells_what_it_changed_and_where_the_conversation_stands(
    sessions: ConversationStateManager, clock: FakeClock
) -> None:
    session_id, _ = await sessions.initialize_session("ann")
    await sessions.update_context_snapshot("ann", session_id, current_theme="work")
    await sessions.update_context_snapshot(
        "ann", session_id, session_notes="calm today", working_hypotheses=["avoids conflict"]
    )
    await clock.advance(60)

    resumed = await sessions.resume_session("ann", session_id)

    assert resumed.context_snapshot.current_theme == "work"
    assert resumed.context_snapshot.working_hypotheses == ["avoids conflict"]
    assert resumed.session_metadata.last_resumed == "2026-01-01T00:01:00.000000Z"
    assert resumed.session_metadata.last_updated == resumed.session_metadata.last_resumed
    assert await sessions.get_context_snapshot("ann", session_id) == resumed.context_snapshot


async def test_models_are_kept_up_to_date(sessions: ConversationStateManager) -> None:
    session_id, _ = await sessions.initialize_session("ann", model_id="m1")
    await sessions.append_message("ann", session_id, said("hi", model_id="m2"))
    tracking_id = await sessions.switch_model_context("ann", session_id, "m3")

    metadata = await sessions.get_session("ann", session_id)
    [event] = await sessions.get_events("ann", session_id)

    assert (metadata.last_model, metadata.models_used) == ("m3", ["m1", "m2", "m3"])
    assert metadata.model_switched_at == event["timestamp"]
    assert event == {
        "event_type": "model_switch",
        "from_model": "m2",
        "to_model": "m3",
        "timestamp": "2026-01-01T00:00:00.000000Z",
        "tracking_id": tracking_id,
    }


async def test_a_snapshot_every_so_many_messages(tmp_path: Path, clock: FakeClock) -> None:
    async with journeys("exclusive", tmp_path, clock, snapshot_every=3) as sessions:
        session_id, _ = await sessions.initialize_session("ann")
        for number in range(7):
            await sessions.append_message("ann", session_id, said(str(number)))

        events = await sessions.get_events("ann", session_id)

        assert [each["counters"]["messages"] for each in events] == [3, 6]
        assert events[0]["tracking_id"].startswith(f"if://archive/{session_id}/")
        check = await sessions.citations.verify("ann", session_id, events[0]["tracking_id"])
        assert check.intact


async def test_erasing_leaves_nothing(tmp_path: Path, clock: FakeClock) -> None:
    for kind in ("exclusive", "shared"):
        folder = tmp_path / kind
        async with journeys(kind, folder, clock) as sessions:
            session_id, _ = await sessions.initialize_session("ann")
            other, _ = await sessions.initialize_session("ann")
            for number in range(3):
                await sessions.append_message(
                    "ann", session_id, said(f"secret-{number}"), {"emotion": "anxious"}
                )
                await clock.advance(120)  # so that snapshots are kept

            assert await sessions.erase_session("ann", session_id)
            assert not await sessions.erase_session("ann", session_id)

            with pytest.raises(StateNotFoundError):
                await sessions.resume_session("ann", session_id)
            assert [each.session_id for each in await sessions.get_user_sessions("ann")] == [other]
        held = [path for path in folder.rglob("*") if path.is_file()]
        assert held
        assert not [path for path in held if b"secret-" in path.read_bytes()]


async def test_cleaning_up_spares_the_living_and_stops_at_nothing(
    sessions: ConversationStateManager, clock: FakeClock
) -> None:
    gone = [(user, (await sessions.initialize_session(user))[0]) for user in ("a:b", "a", "x:y:z")]
    await clock.advance(6 * DAY)
    alive, _ = await sessions.initialize_session("a:b")
    await clock.advance(1 * DAY)

    assert await sessions.cleanup_expired_sessions() == 3
    assert await sessions.cleanup_expired_sessions() == 0

    assert ("a:b", alive) in await sessions.manager.keys("journeys")
    for user, session_id in gone:
        with pytest.raises(StateNotFoundError):
            await sessions.get_session(user, session_id)


async def test_a_damaged_session_is_put_aside_and_the_sweep_goes_on(
    tmp_path: Path, clock: FakeClock
) -> None:
    async with journeys("shared", tmp_path, clock) as sessions:
        for user in ("a", "b", "c"):
            await sessions.initialize_session(user)
        [damaged] = (tmp_path / "journeys" / "b").glob("*.json")
        damaged.write_text(damaged.read_text().replace("2026-01-08", "some day"))
        await clock.advance(7 * DAY)

        assert await sessions.cleanup_expired_sessions() == 3  # b as it was before the edit

        assert await sessions.manager.keys("journeys") == []
        assert {(each.key or ("",))[0] for each in sessions.manager.incidents()} == {"b"}


async def test_a_session_that_cannot_be_erased_now_stops_no_other(
    tmp_path: Path, clock: FakeClock
) -> None:
    store = FileStateStore(tmp_path, clock=clock, lock_timeout_seconds=0.2)
    async with (
        files("shared", tmp_path, clock) as other,
        StatePersistenceManager(store=store, clock=clock) as manager,
    ):
        sessions = ConversationStateManager(manager)
        own = {user: (await sessions.initialize_session(user)).session_id for user in "abc"}
        await clock.advance(7 * DAY)
        async with other.store.lock("journeys", ("b", own["b"])):
            with pytest.raises(LockTimeoutError):
                await sessions.cleanup_expired_sessions()

        assert await manager.keys("journeys") == [("b", own["b"])]
        assert await sessions.cleanup_expired_sessions() == 1


class AskedStore(FileStateStore):
    """Also tells when somebody asks for a lock."""

    asked: asyncio.Event | None = None

    @asynccontextmanager
    async def lock(self, kind: str, key: Key) -> AsyncIterator[None]:
        if self.asked is not None:
            self.asked.set()
        async with super().lock(kind, key):
            yield


async def test_a_session_that_is_renewed_while_it_is_swept_is_spared(
    tmp_path: Path, clock: FakeClock
) -> None:
    fast = FakeClock()
    await fast.advance(7 * DAY)  # the clock of another process, for which it has expired
    store = AskedStore(tmp_path, clock=fast)
    async with (
        files("shared", tmp_path, clock) as manager,
        StatePersistenceManager(store=store, clock=fast) as other,
    ):
        sessions = ConversationStateManager(manager)
        session_id, _ = await sessions.initialize_session("ann")
        async with manager.store.lock("journeys", ("ann", session_id)):
            store.asked = asyncio.Event()
            sweeping = asyncio.create_task(
                ConversationStateManager(other).cleanup_expired_sessions()
            )
            await store.asked.wait()
            await clock.advance(1)
            await sessions.append_message("ann", session_id, said("still here"))

        assert await sweeping == 0
        assert (await sessions.get_session("ann", session_id)).message_count == 1


async def test_ids_of_users_are_any_text_and_reach_nobody_else(
    sessions: ConversationStateManager,
) -> None:
    users = ["a", "a:b", "a/b", "../a", "A", "ä", "con", "%3A", " ", "a\nb"]
    own = {user: (await sessions.initialize_session(user)).session_id for user in users}
    for user, session_id in own.items():
        await sessions.append_message(user, session_id, said(f"I am {user!r}"))

    for user, session_id in own.items():
        [metadata] = await sessions.get_user_sessions(user)
        assert (metadata.user_id, metadata.session_id) == (user, session_id)
        [message] = await sessions.get_message_history(user, session_id)
        assert message.content == f"I am {user!r}"
    with pytest.raises(AgentStateError):
        await sessions.initialize_session("")


async def test_everything_is_there_after_a_restart(tmp_path: Path, clock: FakeClock) -> None:
    for kind in ("exclusive", "shared"):
        async with journeys(kind, tmp_path / kind, clock) as sessions:
            session_id, _ = await sessions.initialize_session("ann")
            await sessions.append_message(
                "ann", session_id, said("hi"), {"emotion": "happy"}, is_breakthrough=True
            )
            before = await sessions.resume_session("ann", session_id)
        async with journeys(kind, tmp_path / kind, clock) as sessions:
            assert await sessions.resume_session("ann", session_id) == before


async def test_settings_that_make_no_sense(tmp_path: Path, clock: FakeClock) -> None:
    manager = files("memory", tmp_path, clock)
    for settings in ({"ttl_seconds": 0}, {"ttl_seconds": float("nan")}, {"window": 0},
                     {"snapshot_every": -1}):  # fmt: skip
        with pytest.raises(StateValidationError):
            ConversationStateManager(manager, **settings)


async def test_a_hundred_sessions_at_once(sessions: ConversationStateManager) -> None:
    async def one(user: str) -> int:
        session_id, _ = await sessions.initialize_session(user)
        for number in range(3):
            await sessions.append_message(user, session_id, said(str(number)))
        return (await sessions.get_session_stats(user, session_id)).message_count

    counts = await asyncio.gather(*(one(f"user-{number % 20}") for number in range(100)))

    assert counts == [3] * 100
