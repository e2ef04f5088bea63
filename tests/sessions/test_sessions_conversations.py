"""Conversations of sessions: every message once, in order, page by page."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_state import MemoryStateStore, StatePersistenceManager
from agent_state.clock import later, stamp
from agent_state.codec import Codec, Group
from agent_state.errors import (
    Key,
    SerializationError,
    StateCorruptedError,
    StateValidationError,
)
from agent_state.protocols import Document, LogRecord
from agent_state.sessions import (
    ConversationPage,
    InvalidConversationIdError,
    NewMessage,
    SessionManager,
    SessionNotFoundError,
    UnknownAgentTypeError,
    UnknownRoleError,
)
from agent_state.sessions.models import Conversation, StoredSession
from agent_state.sessions.names import conversation_id_of, is_session_id, parse_conversation_id
from agent_state.sessions.repository import RenewalCache
from agent_state.testing import FakeClock
from tests.sessions.managers import AGENT_TYPES, opened, session_manager


@pytest.fixture
async def sessions(files: StatePersistenceManager) -> SessionManager:
    made = session_manager(files)
    await made.create("ann")
    return made


def said(page: ConversationPage) -> list[Any]:
    return [message.content for message in page.messages]


# -- adding --------------------------------------------------------------------------------------


async def test_a_message_is_stored_with_its_number_time_and_context(
    sessions: SessionManager, clock: FakeClock
) -> None:
    added = await sessions.conversations.add(
        "s1",
        "content_liaison",
        "assistant",
        "Parsing your file",
        orchestrator_context={"orchestrator": "Content", "workflow_id": "w1", "status": "active"},
        metadata={"model": "small"},
    )
    assert (added.seq, added.message_count, added.duplicate) == (1, 1, False)
    assert added.conversation_id == "conv_content_liaison_s1"
    page = await sessions.conversations.page("s1", "content_liaison")
    assert page.messages == [added.message]
    assert added.message.timestamp == "2026-01-01T00:00:00.000000Z"
    session = await sessions.get("s1")
    conversation = session.conversations["content_liaison"]
    assert (conversation.message_count, conversation.last_message_at) == (
        1,
        added.message.timestamp,
    )


async def test_the_document_of_the_session_does_not_grow_with_what_is_said(
    sessions: SessionManager, files: StatePersistenceManager
) -> None:
    await sessions.conversations.add("s1", "guide_agent", "user", "first")
    before = await files.store.get("sessions", ("s1",))
    for _ in range(30):
        await sessions.conversations.add("s1", "guide_agent", "user", "word " * 100)
    after = await files.store.get("sessions", ("s1",))
    assert before is not None
    assert after is not None
    assert abs(len(after.body) - len(before.body)) < 10


class _Watched(MemoryStateStore):
    """Tells what was read."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock=clock)
        self.read: list[str] = []

    async def get(self, kind: str, key: Key) -> Document | None:
        self.read.append(kind)
        return await super().get(kind, key)

    def read_log(self, kind: str, key: Key, **places: Any) -> AsyncIterator[LogRecord]:
        self.read.append(f"log of {kind}")
        return super().read_log(kind, key, **places)


async def test_a_message_reads_no_log_and_tells_who_watches_the_session(clock: FakeClock) -> None:
    store = _Watched(clock)
    async with StatePersistenceManager(store=store, clock=clock) as files:
        sessions = session_manager(files)
        await sessions.create("ann")
        async with aclosing(await store.watch()) as notices:
            for revision in range(2, 5):
                await clock.advance(0.001)
                await sessions.conversations.add("s1", "guide_agent", "user", "hello")
                while (notice := await anext(notices)).kind != "sessions":
                    pass
                assert notice.revision == revision
        assert "log of conversations" not in store.read


async def test_where_it_is_asked_for_messages_renew_the_session_only_so_often(
    clock: FakeClock,
) -> None:
    store = _Watched(clock)
    async with StatePersistenceManager(store=store, clock=clock) as files:
        sessions = session_manager(files, renew_interval_seconds=1)
        await sessions.create("ann")
        times = []
        for _ in range(4):
            for _ in range(3):
                await sessions.conversations.add("s1", "guide_agent", "user", "hello")
            document = await store.get("sessions", ("s1",))
            assert document is not None
            times.append((document.revision, document.saved_at[17:22]))
            await clock.advance(0.5)
        assert times == [(2, "00.00"), (2, "00.00"), (3, "01.00"), (3, "01.00")]
        assert "log of conversations" not in store.read
        assert store.read.count("sessions") == 2 + 4  # two renewals, and four looks of ours
        assert (await sessions.get("s1")).conversations["guide_agent"].message_count == 12


async def test_an_edit_by_hand_is_not_overwritten_by_a_message(
    tmp_path: Path, clock: FakeClock
) -> None:
    async with opened("shared", tmp_path, clock) as files:
        sessions = session_manager(files, renew_interval_seconds=1)
        await sessions.create("ann")
        await sessions.conversations.add("s1", "guide_agent", "user", "hello")
        path = tmp_path / "sessions/s1.json"
        document = json.loads(path.read_text())
        document["context"] = {"written": "by hand"}
        path.write_text(json.dumps(document))
        for _ in range(2):
            await sessions.conversations.add("s1", "guide_agent", "user", "hello")
            await clock.advance(1)
        assert (await sessions.get("s1")).context == {"written": "by hand"}


@pytest.mark.parametrize("content", ["", "häh\n\x00", {"type": "image", "url": "x"}, [1, 2], None])
async def test_content_is_text_or_any_json(sessions: SessionManager, content: Any) -> None:
    await sessions.conversations.add("s1", "guide_agent", "user", content)
    assert said(await sessions.conversations.page("s1", "guide_agent")) == [content]


async def test_unknown_roles_and_agent_types_are_refused(sessions: SessionManager) -> None:
    with pytest.raises(UnknownRoleError, match="wizard"):
        await sessions.conversations.add("s1", "guide_agent", "wizard", "abracadabra")
    with pytest.raises(UnknownAgentTypeError, match="wizard"):
        await sessions.conversations.add("s1", "wizard", "user", "hello")
    with pytest.raises(UnknownAgentTypeError):
        await sessions.conversations.page("s1", "wizard")
    with pytest.raises(UnknownAgentTypeError):
        await sessions.conversations.update_context("s1", "../x", {})
    history = await sessions.history("s1")
    assert sum(each.message_count for each in history.conversations.values()) == 0


async def test_an_application_registers_its_own_agents_and_roles(
    sessions: SessionManager, files: StatePersistenceManager
) -> None:
    own = SessionManager(files, agent_types=["weather_agent"], roles=["wizard"])
    added = await own.conversations.add("s1", "weather_agent", "wizard", "rain")
    assert added.conversation_id == "conv_weather_agent_s1"
    sessions.agent_types.register("late_agent")
    await sessions.conversations.add("s1", "late_agent", "user", "hello")
    session = await sessions.get("s1")
    assert session.conversations["late_agent"].conversation_id == "conv_late_agent_s1"
    for name in ("Weather", "", "a-b", "../x", "x" * 65):
        with pytest.raises(UnknownAgentTypeError):
            sessions.agent_types.register(name)


@pytest.mark.parametrize("content", [float("nan"), {1, 2}, object(), 2**70])
async def test_what_is_no_json_is_refused_and_changes_nothing(
    sessions: SessionManager, content: Any
) -> None:
    before = await sessions.get("s1")
    with pytest.raises((SerializationError, StateValidationError)):
        await sessions.conversations.add("s1", "guide_agent", "user", content)
    assert await sessions.get("s1") == before
    assert said(await sessions.conversations.page("s1", "guide_agent")) == []


async def test_several_messages_are_added_all_or_none(sessions: SessionManager) -> None:
    added = await sessions.conversations.add_many(
        "s1",
        "guide_agent",
        [NewMessage(role="user", content="a"), {"role": "assistant", "content": "b"}],
    )
    assert [each.seq for each in added] == [1, 2]
    assert [each.message_count for each in added] == [2, 2]
    with pytest.raises(UnknownRoleError):
        await sessions.conversations.add_many(
            "s1", "guide_agent", [{"role": "user", "content": "c"}, {"role": "x", "content": "d"}]
        )
    assert said(await sessions.conversations.page("s1", "guide_agent")) == ["a", "b"]
    assert await sessions.conversations.add_many("s1", "guide_agent", []) == []


# -- once ----------------------------------------------------------------------------------------


async def test_a_retried_message_is_stored_once(
    sessions: SessionManager, files: StatePersistenceManager
) -> None:
    first = await sessions.conversations.add("s1", "guide_agent", "user", "hello", dedupe_key="k1")
    await sessions.conversations.add("s1", "guide_agent", "assistant", "hi")
    for manager in (sessions, SessionManager(files)):  # the second knows nothing yet
        again = await manager.conversations.add(
            "s1", "guide_agent", "user", "hello, once more", dedupe_key="k1"
        )
        assert (again.duplicate, again.message, again.message_count) == (True, first.message, 2)
    assert said(await sessions.conversations.page("s1", "guide_agent")) == ["hello", "hi"]
    other = await sessions.conversations.add(
        "s1", "content_liaison", "user", "hello", dedupe_key="k1"
    )
    assert other.duplicate is False


async def test_the_key_of_a_message_has_its_old_name_in_the_log(
    sessions: SessionManager, files: StatePersistenceManager
) -> None:
    added = await sessions.conversations.add("s1", "guide_agent", "user", "hi", dedupe_key="k1")
    assert added.message.dedupe_key == "k1"
    [line] = [entry async for entry in files.read_log("conversations", ("s1", "guide_agent"))]
    assert line.record["idempotency_key"] == "k1"
    assert "dedupe_key" not in line.record


async def test_retries_at_the_same_time_store_one_message(
    sessions: SessionManager, files: StatePersistenceManager
) -> None:
    managers = [sessions, SessionManager(files, renew_interval_seconds=1)]
    results = await asyncio.gather(
        *(
            managers[number % 2].conversations.add(
                "s1", "guide_agent", "user", f"try {number}", dedupe_key="k1"
            )
            for number in range(10)
        )
    )
    assert sum(not each.duplicate for each in results) == 1
    assert len({each.message.message_id for each in results}) == 1
    page = await sessions.conversations.page("s1", "guide_agent")
    assert (len(page.messages), page.message_count) == (1, 1)


async def test_one_call_may_repeat_itself(sessions: SessionManager) -> None:
    twice = {"role": "user", "content": "a", "dedupe_key": "k1"}
    added = await sessions.conversations.add_many("s1", "guide_agent", [twice, twice])
    assert [each.duplicate for each in added] == [False, True]
    assert [each.seq for each in added] == [1, 1]
    assert [each.message_count for each in added] == [1, 1]


# -- reading -------------------------------------------------------------------------------------


async def fill(sessions: SessionManager, number: int) -> None:
    await sessions.conversations.add_many(
        "s1",
        "guide_agent",
        [
            {
                "role": "user" if n % 2 else "assistant",
                "content": f"Message {n}",
                "orchestrator_context": {"workflow_id": f"w{n % 3}"},
            }
            for n in range(1, number + 1)
        ],
    )


async def test_a_page_is_the_latest_by_default_and_leads_both_ways(
    sessions: SessionManager,
) -> None:
    await fill(sessions, 10)
    page = await sessions.conversations.page("s1", "guide_agent", limit=4)
    assert said(page) == ["Message 7", "Message 8", "Message 9", "Message 10"]
    assert (page.next_after, page.next_before, page.message_count) == (None, 7, 10)
    back = await sessions.conversations.page("s1", "guide_agent", before=page.next_before, limit=4)
    assert said(back) == ["Message 3", "Message 4", "Message 5", "Message 6"]
    assert (back.next_after, back.next_before) == (6, 3)
    forth = await sessions.conversations.page("s1", "guide_agent", after=back.next_after, limit=4)
    assert said(forth) == said(page)
    assert forth.next_after is None
    first = await sessions.conversations.page("s1", "guide_agent", before=3, limit=4)
    assert (said(first), first.next_before) == (["Message 1", "Message 2"], None)
    between = await sessions.conversations.page("s1", "guide_agent", after=2, before=5)
    assert said(between) == ["Message 3", "Message 4"]


async def test_paging_finds_each_message_once_whatever_the_page_and_the_filter(
    sessions: SessionManager,
) -> None:
    await fill(sessions, 601)
    expected = [f"Message {n}" for n in range(1, 602) if n % 2 and n % 3 == 1]
    chosen: dict[str, Any] = {"role": "user", "workflow_id": "w1"}
    forwards: list[str] = []
    after: int | None = 0
    while after is not None:
        page = await sessions.conversations.page(
            "s1", "guide_agent", after=after, limit=7, **chosen
        )
        forwards += said(page)
        after = page.next_after
    assert forwards == expected
    backwards: list[str] = []
    before: int | None = None
    while True:
        page = await sessions.conversations.page(
            "s1", "guide_agent", before=before, limit=9, **chosen
        )
        backwards = said(page) + backwards
        before = page.next_before
        if before is None:
            break
    assert backwards == expected


async def test_messages_are_found_by_text_and_time(
    sessions: SessionManager, clock: FakeClock
) -> None:
    await sessions.conversations.add("s1", "guide_agent", "user", "Where is my FILE?")
    await clock.advance(60)
    await sessions.conversations.add("s1", "guide_agent", "assistant", {"file": "a.csv"})
    await clock.advance(60)
    await sessions.conversations.add("s1", "guide_agent", "user", "thanks")

    async def find(**chosen: Any) -> list[int | None]:
        page = await sessions.conversations.page("s1", "guide_agent", **chosen)
        return [message.seq for message in page.messages]

    assert await find(text="file") == [1, 2]
    assert await find(text="STRASSE") == []
    assert await find(since="2026-01-01T00:01:00Z") == [2, 3]
    assert await find(until="2026-01-01T02:01:00+02:00") == [1]
    assert await find(since=clock.now()) == [3]
    with pytest.raises(StateValidationError, match="since"):
        await find(since="yesterday")


async def test_the_largest_page_has_a_thousand_messages(sessions: SessionManager) -> None:
    await fill(sessions, 1001)
    page = await sessions.conversations.page("s1", "guide_agent", limit=1000)
    assert (len(page.messages), page.next_before) == (1000, 2)


@pytest.mark.parametrize("limit", [0, -1, 1001])
async def test_a_page_has_bounds(sessions: SessionManager, limit: int) -> None:
    with pytest.raises(StateValidationError):
        await sessions.conversations.page("s1", "guide_agent", limit=limit)


@pytest.mark.parametrize("number", [0, -7, 1, 2**60])
async def test_a_page_before_or_after_any_number_is_there_at_once(
    sessions: SessionManager, number: int
) -> None:
    await fill(sessions, 3)
    before = await sessions.conversations.page("s1", "guide_agent", before=number, text="message")
    assert len(before.messages) == (3 if number > 3 else 0)
    after = await sessions.conversations.page("s1", "guide_agent", after=number)
    assert len(after.messages) == max(0, 3 - max(0, number))


async def test_a_page_that_was_not_read_to_its_end_can_be_asked_for_again(
    sessions: SessionManager,
) -> None:
    await fill(sessions, 50)
    for _ in range(20):
        page = await sessions.conversations.page("s1", "guide_agent", after=0, limit=1)
        assert said(page) == ["Message 1"]


async def test_a_person_s_line_is_a_message_if_it_can_be(tmp_path: Path, clock: FakeClock) -> None:
    async with opened("shared", tmp_path, clock) as files:
        sessions = session_manager(files)
        await sessions.create("ann")
        await fill(sessions, 1)
        with (tmp_path / "conversations/s1/guide_agent.jsonl").open("a") as log:
            log.write(json.dumps({"role": "user", "content": "by hand"}) + "\n")
            log.write(json.dumps({"role": 7}) + "\n")
        page = await sessions.conversations.page("s1", "guide_agent")
        assert said(page) == ["Message 1", "by hand"]
        await sessions.conversations.page("s1", "guide_agent")
        assert [(each.kind, each.what[:24]) for each in sessions.incidents] == [
            ("conversations", "line 3 is not a message:")
        ]
        added = await sessions.conversations.add(
            "s1", "guide_agent", "user", "and on", dedupe_key="k"
        )
        assert added.seq == 4


async def test_a_repeated_message_whose_line_is_damaged_is_not_taken_for_another(
    tmp_path: Path, clock: FakeClock
) -> None:
    async with opened("shared", tmp_path, clock) as files:
        sessions = session_manager(files)
        await sessions.create("ann")
        for key in ("a", "b"):
            await sessions.conversations.add("s1", "guide_agent", "user", key, dedupe_key=key)
        path = tmp_path / "conversations" / "s1" / "guide_agent.jsonl"
        path.write_text(path.read_text().replace('"role":"user"', '"role":7', 1))

        with pytest.raises(StateCorruptedError, match="message 1 cannot be read") as caught:
            await sessions.conversations.add("s1", "guide_agent", "user", "a", dedupe_key="a")

        assert (caught.value.kind, caught.value.key) == ("conversations", ("s1", "guide_agent"))


@pytest.mark.parametrize("renew_interval_seconds", [0, 10])
async def test_every_message_has_its_own_number_time_context_and_metadata(
    files: StatePersistenceManager, clock: FakeClock, renew_interval_seconds: float
) -> None:
    sessions = session_manager(files, renew_interval_seconds=renew_interval_seconds)
    await sessions.create("ann")
    await sessions.conversations.add("s1", "guide_agent", "user", "first")
    await clock.advance(1)
    added = await sessions.conversations.add_many(
        "s1", "guide_agent", [{"role": "user", "content": str(n)} for n in range(3)]
    )
    assert [each.seq for each in added] == [2, 3, 4]
    assert {each.message.timestamp for each in added} == {"2026-01-01T00:00:01.000000Z"}

    about, facts = {"workflow_id": "w1"}, {"mood": "calm"}
    last = await sessions.conversations.add(
        "s1", "guide_agent", "user", "last", orchestrator_context=about, metadata=facts
    )
    page = await sessions.conversations.page("s1", "guide_agent", limit=1)
    assert page.messages == [last.message]
    assert (last.message.orchestrator_context, last.message.metadata) == (about, facts)


async def test_a_new_message_stays_its_callers(sessions: SessionManager) -> None:
    message = NewMessage(role="user", content={"words": ["hello"]})

    [added] = await sessions.conversations.add_many("s1", "guide_agent", [message])
    message.content["words"].append("more")
    added.message.content["words"].append("and more")

    assert message.content == {"words": ["hello", "more"]}
    [stored] = said(await sessions.conversations.page("s1", "guide_agent"))
    assert stored == {"words": ["hello"]}


async def test_a_refused_message_is_called_a_message(sessions: SessionManager) -> None:
    with pytest.raises(StateValidationError, match=r"^not a valid message: .*content"):
        await sessions.conversations.add_many("s1", "guide_agent", [{"role": "user"}])


@pytest.mark.parametrize("text", ['say "hi"', "grün"])
async def test_text_is_found_as_it_was_said(sessions: SessionManager, text: str) -> None:
    await sessions.conversations.add("s1", "guide_agent", "user", 'They say "hi"')
    await sessions.conversations.add("s1", "guide_agent", "user", {"colour": "Grün"})

    found = await sessions.conversations.page("s1", "guide_agent", text=text)

    assert len(found.messages) == 1


# -- which conversation --------------------------------------------------------------------------


async def test_each_conversation_id_leads_back_to_its_session(sessions: SessionManager) -> None:
    session = await sessions.get("s1")
    for agent_type, conversation in session.conversations.items():
        found = await sessions.conversations.find(conversation.conversation_id)
        assert found == (session, agent_type)


@pytest.mark.parametrize(
    "conversation_id", ["", "s1", "conv_", "conv__s1", "conv_guide_agent_", "conv_Guide_s1", "x_s1"]
)
async def test_what_is_no_conversation_id_is_refused(
    sessions: SessionManager, conversation_id: str
) -> None:
    with pytest.raises(InvalidConversationIdError):
        await sessions.conversations.find(conversation_id)


async def test_a_conversation_of_nobody_starts_no_session(
    sessions: SessionManager, files: StatePersistenceManager
) -> None:
    with pytest.raises(SessionNotFoundError):
        await sessions.conversations.find("conv_guide_agent_unknown")
    with pytest.raises(UnknownAgentTypeError):
        await sessions.conversations.find("conv_content_s1")  # not a second form of the same
    assert await files.keys("sessions") == [("s1",)]


@given(
    st.from_regex(r"[A-Za-z0-9.-]{1,20}", fullmatch=True),
    st.sampled_from(AGENT_TYPES) | st.from_regex(r"[a-z][a-z0-9_]{0,20}", fullmatch=True),
)
def test_a_conversation_id_says_both_of_its_parts(session_id: str, agent_type: str) -> None:
    conversation_id = conversation_id_of(session_id, agent_type)
    assert parse_conversation_id(conversation_id) == (session_id, agent_type)


async def test_the_workflows_of_a_conversation_are_kept_side_by_side(
    sessions: SessionManager,
) -> None:
    async def tell(**context: str) -> dict[str, Any]:
        conversation = await sessions.conversations.update_context("s1", "guide_agent", context)
        return conversation.orchestrator_context

    await tell(orchestrator="Content", workflow_id="w1", status="processing")
    assert (await tell(workflow_id="w2", status="active"))["active_workflows"] == ["w1", "w2"]
    context = await tell(workflow_id="w1", status="completed")
    assert context == {
        "orchestrator": "Content",
        "workflow_id": "w1",
        "status": "completed",
        "active_workflows": ["w2"],
        "last_workflow_update": "2026-01-01T00:00:00.000000Z",
    }
    page = await sessions.conversations.page("s1", "guide_agent")
    assert page.orchestrator_context == context
    replaced = await sessions.conversations.update_context(
        "s1", "guide_agent", {"a": 1}, mode="replace"
    )
    assert set(replaced.orchestrator_context) == {"a", "last_workflow_update"}


async def test_any_agent_type_is_accepted_until_the_application_registers_its_own(
    files: StatePersistenceManager,
) -> None:
    sessions = SessionManager(files)
    session_id = (await sessions.create()).session.session_id
    added = await sessions.conversations.add(session_id, "echo", "user", "hello")
    assert added.conversation_id == f"conv_echo_{session_id}"
    assert list((await sessions.get(session_id)).conversations) == ["echo"]
    with pytest.raises(UnknownAgentTypeError, match="not a valid agent type"):
        await sessions.conversations.add(session_id, "../echo", "user", "hello")
    sessions.agent_types.register("parrot")
    await sessions.conversations.add(session_id, "parrot", "user", "hello")
    with pytest.raises(UnknownAgentTypeError, match="parrot"):
        await sessions.conversations.add(session_id, "echo", "user", "hello")
    assert set((await sessions.get(session_id)).conversations) == {"echo", "parrot"}


# -- what is bounded -----------------------------------------------------------------------------


class _Measured(MemoryStateStore):
    """Counts the records of each read of a log."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock=clock)
        self.sizes: list[int] = []

    async def read_log(self, kind: str, key: Key, **places: Any) -> AsyncIterator[LogRecord]:
        self.sizes.append(0)
        async for record in super().read_log(kind, key, **places):
            self.sizes[-1] += 1
            yield record


async def test_a_search_backwards_reads_windows_of_bounded_size(clock: FakeClock) -> None:
    store = _Measured(clock)
    async with StatePersistenceManager(store=store, clock=clock) as files:
        sessions = session_manager(files)
        await sessions.create("ann")
        contents = ["needle", *("hay" for _ in range(12_100))]
        messages = [{"role": "user", "content": content} for content in contents]
        await sessions.conversations.add_many("s1", "guide_agent", messages)
        store.sizes.clear()
        page = await sessions.conversations.page("s1", "guide_agent", text="NEEDLE")
    assert said(page) == ["needle"]
    assert max(store.sizes) <= 4096 + 1  # it sees the first record of the window before
    assert sum(store.sizes) <= 12_101 + len(store.sizes)


def renewed(session_id: str, now: datetime, ttl_seconds: float = 3600.0) -> StoredSession:
    time = stamp(now)
    return StoredSession(
        session_id=session_id,
        created_at=time,
        updated_at=time,
        last_activity=time,
        expires_at=stamp(later(now, ttl_seconds)),
        ttl_seconds=ttl_seconds,
        conversations={"guide_agent": Conversation(conversation_id="c")},
    )


def test_only_so_many_renewed_sessions_are_remembered() -> None:
    renewals, now = RenewalCache(1.0), FakeClock().now()
    for number in range(4097):
        renewals.add(renewed(f"s{number}", now), now, Group(Codec()))
    remembered = [
        number for number in (0, 1, 4096) if renewals.find(f"s{number}", "guide_agent", now)
    ]
    assert remembered == [1, 4096]
    assert not renewals.find("s1", "poet", now)
    assert not renewals.find("s1", "guide_agent", later(now, 1))


def test_a_renewal_lasts_a_hundredth_of_the_session_s_life_at_most() -> None:
    renewals, now = RenewalCache(1.0), FakeClock().now()
    renewals.add(renewed("short", now, ttl_seconds=10.0), now, Group(Codec()))
    assert renewals.find("short", "guide_agent", later(now, 0.09))
    assert not renewals.find("short", "guide_agent", later(now, 0.1))
    renewals.add(renewed("ending", later(now, -3599.9)), now, Group(Codec()))
    assert renewals.find("ending", "guide_agent", later(now, 0.05))
    assert not renewals.find("ending", "guide_agent", later(now, 0.1))


def test_a_session_id_has_128_characters_at_most() -> None:
    assert is_session_id("x" * 128)
    assert not is_session_id("x" * 129)
