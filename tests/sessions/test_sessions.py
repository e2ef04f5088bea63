"""Sessions: created, found again, renewed, limited, opened by their own token alone."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from hashlib import sha256
from pathlib import Path

import pytest

from agent_state import StatePersistenceManager
from agent_state.clock import later, stamp
from agent_state.errors import (
    AgentStateError,
    RevisionConflictError,
    SessionExpiredError,
    StateValidationError,
)
from agent_state.sessions import (
    SessionManager,
    SessionNotFoundError,
    UnknownTokenError,
)
from agent_state.testing import FakeClock
from tests.sessions.managers import opened, session_manager


@pytest.fixture
def sessions(files: StatePersistenceManager) -> SessionManager:
    return session_manager(files)


def test_importing_sessions_imports_no_extra() -> None:
    extras = ["redis", "fastapi", "uvicorn", "typer", "rich", "pytest"]
    look = f"import sys, agent_state.sessions; print([e for e in {extras} if e in sys.modules])"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# -- created, found again, updated ---------------------------------------------------------------


async def test_a_new_session_has_a_token_a_conversation_for_each_agent_and_all_its_times(
    sessions: SessionManager,
) -> None:
    created = await sessions.create("ann", context={"page": "upload"})
    session = created.session
    assert len(created.session_token) == 43  # 32 bytes
    assert session.user_id == "ann"
    assert session.context == {"page": "upload"}
    assert session.created_at == session.updated_at == session.last_activity
    assert session.expires_at == "2026-01-01T01:00:00.000000Z"
    assert {name: each.conversation_id for name, each in session.conversations.items()} == {
        "guide_agent": "conv_guide_agent_s1",
        "content_liaison": "conv_content_liaison_s1",
        "insights_liaison": "conv_insights_liaison_s1",
    }
    assert await sessions.get("s1") == session


@pytest.mark.parametrize("exclusive", [False, True])
async def test_everything_is_there_in_the_next_process(tmp_path: Path, exclusive: bool) -> None:
    clock = FakeClock()
    async with StatePersistenceManager(tmp_path, exclusive=exclusive, clock=clock) as files:
        sessions = session_manager(files)
        created = await sessions.create("ann")
        await sessions.update("s1", {"step": 2})
        await sessions.conversations.add("s1", "guide_agent", "user", "Help me upload")
        await sessions.workflows.track("s1", "w1", data={"step": "upload"})
        await sessions.states.save("s1", {"file": "a.csv"})
        before = await sessions.get("s1")
    async with StatePersistenceManager(tmp_path, exclusive=exclusive, clock=clock) as files:
        sessions = session_manager(files)
        assert await sessions.tokens.resolve(created.session_token) == before
        assert before.state == {"step": 2}
        page = await sessions.conversations.page("s1", "guide_agent")
        assert [message.content for message in page.messages] == ["Help me upload"]
        workflow = await sessions.workflows.get("s1", "w1")
        assert (workflow.status, workflow.data) == ("active", {"step": "upload"})
        assert (await sessions.states.load("s1")).state_data == {"file": "a.csv"}


async def test_an_update_merges_into_nested_objects_or_replaces_all(
    sessions: SessionManager,
) -> None:
    await sessions.create("ann", context={"lang": "en"})
    await sessions.update("s1", {"files": {"a": 1, "b": {"c": 2}}, "open": [1]})
    session = await sessions.update(
        "s1", {"files": {"b": {"d": 3}}, "open": [2]}, context={"theme": "dark"}
    )
    assert session.state == {"files": {"a": 1, "b": {"c": 2, "d": 3}}, "open": [2]}
    assert session.context == {"lang": "en", "theme": "dark"}
    session = await sessions.update("s1", {"only": True}, mode="replace")
    assert session.state == {"only": True}
    assert session.context == {"lang": "en", "theme": "dark"}
    with pytest.raises(StateValidationError, match="merge or replace"):
        await sessions.update("s1", {}, mode="overwrite")  # type: ignore[arg-type]


async def test_what_the_caller_gave_may_change_afterwards(sessions: SessionManager) -> None:
    context, state = {"a": [1]}, {"b": [1]}
    await sessions.create(context=context)
    await sessions.update("s1", state)
    context["a"].append(2)
    state["b"].append(2)
    session = await sessions.get("s1")
    assert (session.context, session.state) == ({"a": [1]}, {"b": [1]})


@pytest.mark.parametrize("session_id", ["nobody", "default", "", "../x", "a_b", "x" * 200])
async def test_an_id_that_is_no_sessions_is_not_found_and_not_made(
    sessions: SessionManager, files: StatePersistenceManager, session_id: str
) -> None:
    with pytest.raises(SessionNotFoundError):
        await sessions.get(session_id)
    with pytest.raises(SessionNotFoundError):
        await sessions.conversations.add(session_id, "guide_agent", "user", "hello")
    assert (await sessions.validate(session_id)).reason == "not_found"
    assert await sessions.destroy(session_id) is False
    assert await files.keys("sessions") == []


async def test_validating_tells_why_a_session_cannot_be_used(
    sessions: SessionManager, clock: FakeClock
) -> None:
    await sessions.create("ann")
    await sessions.create()
    known = await sessions.validate("s1")
    assert (known.valid, known.authenticated, known.reason) == (True, True, None)
    assert known.expires_at == "2026-01-01T01:00:00.000000Z"
    assert (await sessions.validate("nobody")).valid is False
    anonymous = await sessions.validate("s2")
    assert (anonymous.valid, anonymous.authenticated) == (True, False)
    await clock.advance(3600)
    late = await sessions.validate("s1")
    assert (late.valid, late.authenticated, late.reason) == (False, False, "expired")


async def test_the_history_tells_what_happened_page_by_page(sessions: SessionManager) -> None:
    await sessions.create("ann")
    await sessions.update("s1", {"a": 1})
    await sessions.workflows.track("s1", "w1", status="processing")
    await sessions.workflows.track("s1", "w1", status="completed")
    await sessions.conversations.add("s1", "guide_agent", "user", "hello")
    first = await sessions.history("s1", limit=3)
    assert [event.event for event in first.events] == ["created", "updated", "workflow_state"]
    assert first.conversations["guide_agent"].message_count == 1
    assert first.next_after == 3
    rest = await sessions.history("s1", after=first.next_after)
    assert [event.model_extra for event in rest.events] == [
        {"workflow_id": "w1", "status": "completed"}
    ]
    assert rest.next_after is None


async def test_the_history_has_every_change_with_its_facts(sessions: SessionManager) -> None:
    await sessions.create("ann")
    await sessions.update("s1", {"a": 1}, context={"b": 1}, mode="replace")
    await sessions.states.save("s1", {}, state_id="x")
    await sessions.states.delete("s1", "x")
    await sessions.states.delete("s1", "nothing")  # changes nothing
    await sessions.tokens.rotate("s1")
    await sessions.tokens.revoke("s1")

    events = (await sessions.history("s1")).events

    assert [(event.event, event.model_extra) for event in events] == [
        ("created", {}),
        ("updated", {"fields": ["state", "context"], "mode": "replace"}),
        ("state_stored", {"state_id": "x"}),
        ("state_deleted", {"state_id": "x"}),
        ("token_rotated", {}),
        ("token_revoked", {}),
    ]


async def test_a_page_of_the_history_has_a_hundred_events_by_default(
    sessions: SessionManager,
) -> None:
    await sessions.create("ann")
    for number in range(101):
        await sessions.workflows.track("s1", "w1", status=str(number))

    page = await sessions.history("s1", after=1)

    assert [event.seq for event in page.events] == list(range(2, 102))
    assert page.next_after == 101


async def test_an_error_names_the_document_that_it_is_about(
    sessions: SessionManager, clock: FakeClock
) -> None:
    await sessions.create("ann")
    refused: list[tuple[Awaitable[object], str, str]] = [
        (sessions.get("nobody"), "sessions", "nobody"),
        (sessions.update("nobody", {}), "sessions", "nobody"),
        (sessions.workflows.get("s1", "nothing"), "sessions", "s1"),
        (sessions.workflows.track("s1", "w1", status=7), "sessions", "s1"),  # type: ignore[arg-type]
        (sessions.states.load("s1", "nothing"), "session_states", "s1/nothing"),
        (sessions.states.add_contribution("s1", "it", 1), "session_states", "s1/session"),
    ]
    for call, kind, key in refused:
        with pytest.raises(AgentStateError, match=f"{kind}/{key}") as caught:
            await call
        assert (caught.value.kind, "/".join(caught.value.key or ())) == (kind, key)


async def test_what_is_no_text_is_no_session_id(sessions: SessionManager) -> None:
    with pytest.raises(SessionNotFoundError) as caught:
        await sessions.get(7)  # type: ignore[arg-type]
    assert caught.value.key is None


# -- expiry --------------------------------------------------------------------------------------


async def test_every_write_renews_the_expiry_and_reading_does_not(
    sessions: SessionManager, clock: FakeClock
) -> None:
    created = await sessions.create("ann")
    writes: list[Callable[[], Awaitable[object]]] = [
        lambda: sessions.conversations.add("s1", "guide_agent", "user", "still here"),
        lambda: sessions.update("s1", {"a": 1}),
        lambda: sessions.renew("s1"),
        lambda: sessions.workflows.track("s1", "w2"),
        lambda: sessions.states.save("s1", {}),
        lambda: sessions.conversations.update_context("s1", "guide_agent", {}),
    ]
    for write in writes:
        await clock.advance(3000)
        await write()
        session = await sessions.get("s1")
        assert session.last_activity == session.updated_at == stamp(clock.now())
        assert session.expires_at == stamp(later(clock.now(), 3600))
    await clock.advance(3599)
    await sessions.get("s1")
    await sessions.tokens.resolve(created.session_token)
    await clock.advance(1)
    with pytest.raises(SessionExpiredError):
        await sessions.get("s1")


async def test_a_clock_that_goes_back_shortens_no_session(
    sessions: SessionManager, clock: FakeClock
) -> None:
    expires_at = (await sessions.create("ann")).session.expires_at
    clock.jump(-600)
    assert (await sessions.renew("s1")).expires_at == expires_at


async def test_nothing_is_written_to_or_read_from_an_expired_session(
    sessions: SessionManager, clock: FakeClock
) -> None:
    created = await sessions.create("ann")
    await clock.advance(3600)
    with pytest.raises(SessionExpiredError):
        await sessions.tokens.resolve(created.session_token)
    with pytest.raises(SessionExpiredError):
        await sessions.conversations.add("s1", "guide_agent", "user", "too late")
    with pytest.raises(SessionExpiredError):
        await sessions.conversations.page("s1", "guide_agent")
    with pytest.raises(SessionExpiredError):
        await sessions.renew("s1")
    with pytest.raises(SessionExpiredError):
        await sessions.states.save("s1", {})
    with pytest.raises(SessionExpiredError):
        await sessions.tokens.rotate("s1")
    assert await sessions.of_user("ann") == []


@pytest.mark.parametrize(
    ("written", "alive"),
    [
        ("2026-01-01T00:30:00Z", True),
        ("2026-01-01T00:30:00", True),
        ("2026-01-01T02:30:00+02:00", True),
        ("2025-12-31T23:30:00Z", False),
        ("2026-01-01T01:30:00+02:00", False),
    ],
)
async def test_a_person_may_write_the_expiry_in_any_zone_or_none(
    tmp_path: Path, clock: FakeClock, written: str, alive: bool
) -> None:
    async with opened("shared", tmp_path, clock) as files:
        sessions = session_manager(files)
        await sessions.create("ann")
        path = tmp_path / "sessions/s1.json"
        document = json.loads(path.read_text())
        document["expires_at"] = written
        document["notes"] = "written by hand"
        path.write_text(json.dumps(document))
        assert (await sessions.validate("s1")).valid is alive
        if alive:
            await sessions.renew("s1")
            kept = json.loads(path.read_text())
            assert kept["notes"] == "written by hand"
            assert kept["expires_at"] == "2026-01-01T01:00:00.000000Z"


async def test_cleaning_up_destroys_what_has_expired_and_nothing_else(
    sessions: SessionManager, files: StatePersistenceManager, clock: FakeClock
) -> None:
    await sessions.create("ann")
    await sessions.create()
    await clock.advance(1800)
    await sessions.create("ann")
    await sessions.renew("s2")
    await clock.advance(1800)
    result = await sessions.cleanup()
    assert (result.expired, result.completed) == (["s1"], [])
    assert await files.keys("sessions") == [("s2",), ("s3",)]
    assert len(await files.keys("session_tokens")) == 2
    assert (await sessions.cleanup()).expired == []


# -- whose sessions, and how many ----------------------------------------------------------------


async def test_a_known_user_s_oldest_session_gives_way_for_ever(
    sessions: SessionManager, files: StatePersistenceManager
) -> None:
    first = await sessions.create("ann")
    for _ in range(4):
        assert (await sessions.create("ann")).evicted == []
    await sessions.create("bob")
    await sessions.conversations.add("s1", "guide_agent", "user", "hello")
    sixth = await sessions.create("ann")
    assert sixth.evicted == ["s1"]
    with pytest.raises(SessionNotFoundError):
        await sessions.get("s1")
    with pytest.raises(UnknownTokenError):
        await sessions.tokens.resolve(first.session_token)
    assert (await sessions.of_user("ann"))[0].session_id == "s2"
    assert len(await sessions.of_user("ann")) == 5
    assert ("s1",) not in await files.keys("sessions")


@pytest.mark.parametrize("user", [None, "", "anonymous"])
async def test_a_sixth_anonymous_visitor_evicts_nobody(
    sessions: SessionManager, user: str | None
) -> None:
    made = [await sessions.create(user) for _ in range(7)]
    assert all(each.evicted == [] for each in made)
    for each in made:
        session = await sessions.tokens.resolve(each.session_token)
        assert session.user_id is None
    assert await sessions.of_user("anonymous") == []


@pytest.mark.parametrize("store", ["shared", "exclusive"])
async def test_a_session_whose_file_was_removed_hides_no_other(
    store: str, tmp_path: Path, clock: FakeClock
) -> None:
    async with opened(store, tmp_path, clock) as files:
        sessions = session_manager(files, max_sessions_per_user=2)
        await sessions.create("ann")
        await sessions.create("ann")
        await files.flush()
        (tmp_path / "sessions" / "s1.json").unlink()

        assert [each.session_id for each in await sessions.of_user("ann")] == ["s2"]
        assert (await sessions.create("ann")).evicted == []
        assert [each.session_id for each in await sessions.of_user("ann")] == ["s2", "s3"]


async def test_an_expired_session_takes_no_place(
    sessions: SessionManager, clock: FakeClock
) -> None:
    for _ in range(5):
        await sessions.create("ann")
    await clock.advance(1800)
    for number in (3, 4, 5):
        await sessions.renew(f"s{number}")
    await clock.advance(1800)
    created = await sessions.create("ann")
    assert created.evicted == ["s1", "s2"]
    assert len(await sessions.of_user("ann")) == 4


async def test_the_limit_holds_for_sessions_created_at_once(sessions: SessionManager) -> None:
    await asyncio.gather(*(sessions.create("ann") for _ in range(12)))
    assert len(await sessions.of_user("ann")) == 5


async def test_a_user_whose_name_is_a_path_stays_in_the_directory(
    tmp_path: Path, clock: FakeClock
) -> None:
    async with opened("shared", tmp_path / "state", clock) as files:
        sessions = session_manager(files)
        await sessions.create("../../ann\n")
        [session] = await sessions.of_user("../../ann\n")
        assert session.user_id == "../../ann\n"
    assert list(tmp_path.iterdir()) == [tmp_path / "state"]


# -- tokens --------------------------------------------------------------------------------------


async def test_the_token_opens_its_session_and_no_other(sessions: SessionManager) -> None:
    ann = await sessions.create("ann")
    bob = await sessions.create("bob")
    assert (await sessions.tokens.resolve(ann.session_token)).user_id == "ann"
    assert (await sessions.tokens.authorize(bob.session_token, "s2")).user_id == "bob"
    with pytest.raises(UnknownTokenError):
        await sessions.tokens.authorize(bob.session_token, "s1")


@pytest.mark.parametrize(
    "token", ["", "s1", "x" * 43, "x" * 10_000, "\ud800", "../s1", None, 7, b"bytes"]
)
async def test_an_unknown_token_opens_nothing_and_starts_no_session(
    sessions: SessionManager, files: StatePersistenceManager, token: str
) -> None:
    await sessions.create("ann")
    with pytest.raises(UnknownTokenError):
        await sessions.tokens.resolve(token)
    assert await files.keys("sessions") == [("s1",)]


@pytest.mark.parametrize("exclusive", [False, True])
async def test_no_file_holds_the_token(tmp_path: Path, exclusive: bool) -> None:
    async with StatePersistenceManager(tmp_path, exclusive=exclusive) as files:
        created = await SessionManager(files).create("ann")
        new = await SessionManager(files).tokens.rotate(created.session.session_id)
        await files.flush()
        held = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
        for token in (created.session_token, new):
            assert token.encode() not in held
        assert "token" not in created.session.model_dump_json()
        assert created.session_token not in repr(created)


async def test_a_rotated_or_revoked_token_opens_nothing(
    sessions: SessionManager, files: StatePersistenceManager
) -> None:
    created = await sessions.create("ann")
    new = await sessions.tokens.rotate("s1")
    with pytest.raises(UnknownTokenError):
        await sessions.tokens.resolve(created.session_token)
    assert (await sessions.tokens.resolve(new)).session_id == "s1"
    assert await sessions.tokens.revoke("s1") is True
    with pytest.raises(UnknownTokenError):
        await sessions.tokens.resolve(new)
    assert await sessions.tokens.revoke("s1") is False
    assert await files.keys("session_tokens") == []
    assert (await sessions.get("s1")).session_id == "s1"


async def test_no_file_is_left_of_a_rotated_token(tmp_path: Path, clock: FakeClock) -> None:
    async with opened("shared", tmp_path, clock) as files:
        sessions = session_manager(files)
        digest = sha256((await sessions.create("ann")).session_token.encode()).hexdigest()
        noted = {"session_id": "s1", "note": "written by hand"}
        await files.save("session_tokens", digest, noted)  # an earlier version is kept of it
        assert [path for path in tmp_path.rglob("*") if digest in path.name]
        await sessions.tokens.rotate("s1")
        left = [path for path in tmp_path.rglob("*") if digest in path.name]
    assert [path for path in left if ".locks" not in path.parts] == []


async def test_an_index_that_says_more_than_the_session_is_not_believed(
    sessions: SessionManager, files: StatePersistenceManager
) -> None:
    created = await sessions.create("ann")
    [former] = await files.keys("session_tokens")
    entry = await files.load("session_tokens", former)
    assert entry is not None
    await sessions.tokens.rotate("s1")
    await files.save("session_tokens", former, entry)  # as an old backup would
    with pytest.raises(UnknownTokenError):
        await sessions.tokens.resolve(created.session_token)


async def test_tokens_come_from_the_randomness_that_was_given(
    files: StatePersistenceManager,
) -> None:
    asked: list[int] = []

    def zeros(size: int) -> bytes:
        asked.append(size)
        return bytes(size)

    created = await session_manager(files, random_bytes=zeros).create()
    assert asked == [32]
    assert created.session_token == "A" * 43


async def test_neither_a_token_nor_an_id_that_exists_is_given_to_another_session(
    files: StatePersistenceManager,
) -> None:
    drawn = [bytes(32), b"b" * 32]
    made = session_manager(files, random_bytes=lambda _: drawn.pop())
    other = await made.create("bob")
    first = await made.create("ann")
    drawn = [bytes(32), bytes(32)]
    with pytest.raises(RevisionConflictError):
        await made.create("carol")
    with pytest.raises(RevisionConflictError):
        await made.tokens.rotate(other.session.session_id)
    with pytest.raises(RevisionConflictError):
        await session_manager(files, new_id=lambda: first.session.session_id).create("carol")

    for created, user in ((first, "ann"), (other, "bob")):
        assert (await made.tokens.resolve(created.session_token)).user_id == user


async def test_an_id_factory_must_make_ids_that_conversation_ids_can_hold(
    files: StatePersistenceManager,
) -> None:
    with pytest.raises(StateValidationError, match="id factory"):
        await session_manager(files, new_id=lambda: "a_b").create()


@pytest.mark.parametrize(
    "settings",
    [{"ttl_seconds": 0}, {"ttl_seconds": float("nan")}, {"max_sessions_per_user": 0}],
)
async def test_settings_that_make_no_sense_are_refused(
    files: StatePersistenceManager, settings: dict[str, float]
) -> None:
    with pytest.raises(StateValidationError):
        SessionManager(files, **settings)  # type: ignore[arg-type]
