"""Messages of a journey: all of them, once each, whoever writes at the same time."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from agent_state import (
    MemoryStateStore,
    StateNotFoundError,
    StatePersistenceManager,
    StateValidationError,
)
from agent_state.errors import Key
from agent_state.protocols import Change, LogRecord
from agent_state.testing import FakeClock
from agent_state_integrations.journey import ConversationStateManager
from agent_state_integrations.journey.repository import MessageIndex
from tests.journey.journeys import STORES, journeys, said


@pytest.fixture(params=STORES)
async def sessions(
    request: pytest.FixtureRequest, tmp_path: Path, clock: FakeClock
) -> AsyncIterator[ConversationStateManager]:
    async with journeys(request.param, tmp_path / "state", clock) as manager:
        yield manager


async def test_past_the_window_everything_is_still_there(
    sessions: ConversationStateManager,
) -> None:
    session_id, _ = await sessions.initialize_session("ann")
    first = await sessions.append_message("ann", session_id, said("message 1"))
    for number in range(2, 151):
        await sessions.append_message("ann", session_id, said(f"message {number}"))

    resumed = await sessions.resume_session("ann", session_id)
    widest = await sessions.resume_session("ann", session_id, recent=1000)
    every = [each async for each in sessions.stream_messages("ann", session_id)]

    assert [each.content for each in resumed.recent_messages] == [
        f"message {number}" for number in range(131, 151)
    ]
    assert len(widest.recent_messages) == 100
    assert [each.content for each in every] == [f"message {number}" for number in range(1, 151)]
    assert resumed.session_metadata.message_count == 150
    # What triggered it is far outside the window.
    await sessions.record_breakthrough("ann", session_id, "late insight", first)
    [breakthrough] = (await sessions.get_journey_summary("ann", session_id)).breakthroughs
    assert breakthrough.trigger_excerpt == "message 1"
    text, _ = await sessions.exports.markdown("ann", session_id)
    assert "| Total Messages | 150 |" in text


async def test_history_page_by_page(sessions: ConversationStateManager) -> None:
    session_id, _ = await sessions.initialize_session("ann")
    for number in range(1, 8):
        await sessions.append_message("ann", session_id, said(str(number)))

    page = await sessions.get_message_history("ann", session_id, 3)
    pages = [[each.content for each in page]]
    while page and page[0].seq != 1:
        page = await sessions.get_message_history("ann", session_id, 3, before=page[0].seq)
        pages.append([each.content for each in page])

    assert pages == [["5", "6", "7"], ["2", "3", "4"], ["1"]]
    assert await sessions.get_message_history("ann", session_id, 0) == []
    later = [each.content async for each in sessions.stream_messages("ann", session_id, after=5)]
    assert later == ["6", "7"]
    with pytest.raises(StateValidationError):
        await sessions.get_message_history("ann", session_id, -1)
    with pytest.raises(StateNotFoundError):
        await sessions.get_message_history("ann", "unknown")


async def test_a_message_keeps_its_id_its_time_and_fields_of_the_callers_own(
    sessions: ConversationStateManager,
) -> None:
    session_id, _ = await sessions.initialize_session("ann")
    mine = said(
        "hi",
        message_id="mine",
        timestamp="2025-12-31T22:00:00+02:00",
        parent_message_id="before",
        is_milestone=True,
        channel="web",
    )

    assert await sessions.append_message("ann", session_id, mine) == "mine"

    [stored] = await sessions.get_message_history("ann", session_id)
    assert stored.model_dump() == {
        "role": "user",
        "content": "hi",
        "message_id": "mine",
        "timestamp": "2025-12-31T20:00:00.000000Z",
        "parent_message_id": "before",
        "is_milestone": True,
        "channel": "web",
        "seq": 1,
    }
    assert mine.timestamp == "2025-12-31T20:00:00.000000Z"
    # What was read can be said again elsewhere: the number is not stored.
    other, _ = await sessions.initialize_session("ann")
    await sessions.append_message("ann", other, said("first"))
    await sessions.append_message("ann", other, stored)
    assert [each.seq for each in await sessions.get_message_history("ann", other)] == [1, 2]


async def test_a_retried_message_is_stored_once_with_all_that_came_with_it(
    sessions: ConversationStateManager, clock: FakeClock
) -> None:
    session_id, _ = await sessions.initialize_session("ann")
    expiry = (await sessions.check_session_expiry("ann", session_id)).expires_at
    for _ in range(3):
        result = await sessions.append_message(
            "ann",
            session_id,
            said("hi", message_id="mine", tokens=5),
            {"emotion": "happy"},
            is_breakthrough=True,
        )
        assert result == "mine"
        await clock.advance(1)

    assert (await sessions.check_session_expiry("ann", session_id)).expires_at == expiry
    stats = await sessions.get_session_stats("ann", session_id)
    assert (stats.message_count, stats.tokens, stats.breakthrough_count) == (1, 5, 1)
    assert stats.emotion_updates == 1
    assert len(await sessions.citations.all("ann", session_id)) == 2


async def test_a_retry_is_known_after_a_restart_and_far_back(
    tmp_path: Path, clock: FakeClock
) -> None:
    for kind in ("exclusive", "shared"):
        async with journeys(kind, tmp_path / kind, clock) as sessions:
            session_id, _ = await sessions.initialize_session("ann")
            for number in range(120):
                await sessions.append_message(
                    "ann", session_id, said(str(number), message_id=f"m{number}")
                )
        async with journeys(kind, tmp_path / kind, clock) as sessions:
            await sessions.append_message("ann", session_id, said("0", message_id="m0"))
            await sessions.append_message("ann", session_id, said("120", message_id="m120"))
            await sessions.append_message("ann", session_id, said("119", message_id="m119"))
            assert (await sessions.get_session("ann", session_id)).message_count == 121


async def test_an_id_that_says_something_else_is_no_retry(
    sessions: ConversationStateManager,
) -> None:
    session_id, _ = await sessions.initialize_session("ann")
    await sessions.append_message("ann", session_id, said("one", message_id="1"))

    with pytest.raises(StateValidationError, match="another role or content"):
        await sessions.append_message("ann", session_id, said("two", message_id="1"))

    assert [each.content for each in await sessions.get_message_history("ann", session_id)] == [
        "one"
    ]


async def test_the_trigger_of_a_breakthrough_is_a_stored_message(
    sessions: ConversationStateManager,
) -> None:
    session_id, _ = await sessions.initialize_session("ann")
    with pytest.raises(StateNotFoundError, match="no message 'nobody'"):
        await sessions.record_breakthrough("ann", session_id, "x", "nobody")


async def test_many_tasks_in_one_session(sessions: ConversationStateManager) -> None:
    session_id, _ = await sessions.initialize_session("ann")

    async def one(number: int) -> None:
        await sessions.append_message(
            "ann", session_id, said(str(number), message_id=f"m{number % 30}", tokens=1)
            if number < 30
            else said(str(number % 30), message_id=f"m{number % 30}", tokens=1),
            {"emotion": "happy" if number % 2 else "anxious"},
        )  # fmt: skip
        await sessions.record_milestone("ann", session_id, str(number))

    await asyncio.gather(*(one(number) for number in range(60)))

    stats = await sessions.get_session_stats("ann", session_id)
    history = await sessions.get_message_history("ann", session_id, 100)
    assert sorted(int(each.content) for each in history) == list(range(30))
    assert (stats.message_count, stats.tokens, stats.emotion_updates) == (30, 30, 30)
    assert stats.milestone_count == 60
    journey = await sessions.get_emotion_journey("ann", session_id)
    ways = [(step.from_emotion, step.to_emotion) for step in journey]
    assert [way[1] for way in ways[:-1]] == [way[0] for way in ways[1:]]


WRITER = """
    import asyncio, sys
    from agent_state import StatePersistenceManager
    from agent_state_integrations.journey import (ConversationStateManager, JourneyMessage)

    async def main(folder, session_id, name):
        async with StatePersistenceManager(folder) as manager:
            sessions = ConversationStateManager(manager)
            for number in range(40):
                await sessions.append_message(
                    "ann", session_id,
                    JourneyMessage(role="user", content=f"{name}-{number}", tokens=1),
                    {"emotion": "happy" if number % 2 else "anxious"},
                )
                await sessions.append_message(  # both say this, and it is stored once
                    "ann",
                    session_id,
                    JourneyMessage(role="user", content="x", message_id=f"{number}"),
                )

    asyncio.run(main(*sys.argv[1:]))
"""


async def test_two_processes_in_one_session(tmp_path: Path) -> None:
    async with StatePersistenceManager(tmp_path) as manager:
        sessions = ConversationStateManager(manager)
        session_id, _ = await sessions.initialize_session("ann")
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path), session_id, name]
            )
            for name in ("one", "two")
        ]
        for writer in writers:
            assert await asyncio.to_thread(writer.wait, 100) == 0

        history = [each.content async for each in sessions.stream_messages("ann", session_id)]
        stats = await sessions.get_session_stats("ann", session_id)
        steps = await sessions.get_emotion_journey("ann", session_id)

    for name in ("one", "two"):
        mine = [content for content in history if content.startswith(name)]
        assert mine == [f"{name}-{number}" for number in range(40)]
    assert history.count("x") == 40
    assert (stats.message_count, stats.tokens, stats.emotion_updates) == (120, 80, 80)
    assert [step.to_emotion for step in steps[:-1]] == [step.from_emotion for step in steps[1:]]


KILLED = """
    import asyncio, sys
    from agent_state import StatePersistenceManager
    from agent_state_integrations.journey import (ConversationStateManager, JourneyMessage)

    async def main(folder, exclusive):
        async with StatePersistenceManager(folder, exclusive=exclusive == "exclusive") as manager:
            sessions = ConversationStateManager(manager, snapshot_every=2)
            session_id, _ = await sessions.initialize_session("ann")
            print(session_id, flush=True)
            for number in range(10**9):
                await sessions.append_message(
                    "ann", session_id, JourneyMessage(role="user", content=str(number)),
                    {"emotion": "happy" if number % 2 else "anxious"}, is_breakthrough=True,
                )
                print(number, flush=True)

    asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("kind", ["exclusive", "shared"])
async def test_a_killed_process_leaves_nothing_half_done(tmp_path: Path, kind: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        session_id = writer.stdout.readline().strip()
        for _ in range(50):
            writer.stdout.readline()
        writer.kill()
        rest = writer.stdout.read().split()
    acknowledged = 50 + len(rest)

    async with StatePersistenceManager(tmp_path, exclusive=kind == "exclusive") as manager:
        sessions = ConversationStateManager(manager)
        stats = await sessions.get_session_stats("ann", session_id)
        whole, _ = await sessions.exports.json("ann", session_id)
        lengths = {
            log: len(
                [entry async for entry in manager.read_log("journeys", ("ann", session_id, log))]
            )
            for log in ("messages", "emotions", "breakthroughs", "events")
        }

    assert stats.message_count in {acknowledged, acknowledged + 1}
    count = stats.message_count
    assert [each["content"] for each in whole["messages"]] == [str(n) for n in range(count)]
    assert lengths == {
        "messages": count, "emotions": count, "breakthroughs": count, "events": count // 2,
    }  # fmt: skip


class CountingStore(MemoryStateStore):
    """Also tells how many changes each commit had."""

    def __init__(self) -> None:
        super().__init__()
        self.commits: list[int] = []

    async def commit(self, changes: Sequence[Change]) -> list[int]:
        self.commits.append(len(changes))
        return await super().commit(changes)


async def test_a_message_with_all_it_brings_about_is_one_commit() -> None:
    store = CountingStore()
    async with StatePersistenceManager(store=store) as manager:
        sessions = ConversationStateManager(manager, snapshot_every=1)
        session_id, _ = await sessions.initialize_session("ann")
        store.commits.clear()

        await sessions.append_message(
            "ann", session_id, said("oh"), {"emotion": "happy"}, is_breakthrough=True
        )

    # The message, the emotion, the breakthrough, the snapshot, a citation of each, the document.
    assert store.commits == [8]


async def test_the_files_are_plain(tmp_path: Path, clock: FakeClock) -> None:
    async with journeys("shared", tmp_path, clock) as sessions:
        session_id, _ = await sessions.initialize_session("ann")
        await sessions.append_message("ann", session_id, said("hi"), {"emotion": "happy"})

    document = json.loads((tmp_path / "journeys" / "ann" / f"{session_id}.json").read_text())
    logs = {path.stem for path in (tmp_path / "journeys" / "ann" / session_id).iterdir()}
    assert document["_schema"] == "journeys/1"
    assert document["counters"]["messages"] == 1
    assert logs == {"messages", "emotions", "citations"}


async def test_a_dedupe_key_is_the_id_of_the_message(sessions: ConversationStateManager) -> None:
    session_id, _ = await sessions.initialize_session("ann")
    for _ in range(2):
        stored = await sessions.append_message("ann", session_id, said("one"), dedupe_key="k1")
        assert stored == "k1"
    with pytest.raises(StateValidationError, match="another role or content"):
        await sessions.append_message("ann", session_id, said("two"), dedupe_key="k1")
    same = said("one", message_id="k1")
    assert await sessions.append_message("ann", session_id, same, dedupe_key="k1") == "k1"
    with pytest.raises(StateValidationError, match="the same id"):
        await sessions.append_message("ann", session_id, same, dedupe_key="k2")
    assert [each.message_id for each in await sessions.get_message_history("ann", session_id)] == [
        "k1"
    ]


class _Counting(MemoryStateStore):
    """Counts the reads of logs."""

    reads = 0

    def read_log(self, kind: str, key: Key, **places: Any) -> AsyncIterator[LogRecord]:
        self.reads += 1
        return super().read_log(kind, key, **places)


async def test_the_index_of_messages_forgets_the_session_that_was_searched_longest_ago() -> None:
    store = _Counting()
    async with StatePersistenceManager(store=store) as manager:
        for session in ("a", "b", "c"):
            for number in range(4):
                record = {"message_id": f"{session}{number}"}
                await manager.append("journeys", ("ann", session, "messages"), record)
        index = MessageIndex(max_ids=8)

        async def find(session: str) -> int:
            before = store.reads
            assert await index.find(manager, ("ann", session), f"{session}3", 4) == 4
            return store.reads - before

        assert [await find(each) for each in "abab"] == [1, 1, 0, 0]
        assert [await find(each) for each in "cba"] == [1, 0, 1]
        index.add(("ann", "a"), "a5", 6)  # a message between was stored by another process
        assert await index.find(manager, ("ann", "a"), "a5", 4) is None
        index.add(("ann", "a"), "a4", 5)
        assert await index.find(manager, ("ann", "a"), "a4", 5) == 5
