"""Models, older versions, credentials, patterns: what needs no server, or just any."""

from __future__ import annotations

import itertools
import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from agent_state.errors import SchemaTooNewError, StateCorruptedError, StateValidationError
from agent_state.redis.client import connect
from agent_state_integrations.redis_state import BackendType, FlowStatus, Keys, UniversalSession
from agent_state_integrations.redis_state.keys import escape_glob, glob
from agent_state_integrations.redis_state.records import (
    REDACTED,
    Redactor,
    from_session,
    to_session,
)
from tests.redis.servers import RedisServer
from tests.redis_state.redis_states import full_session, session

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
OBJECTS = st.dictionaries(st.text(), JSON)


def test_naive_times_are_read_as_utc_and_others_are_converted() -> None:
    east = timezone(timedelta(hours=5))
    made = session(
        "s",
        created_at=datetime(2025, 1, 2, 3),  # noqa: DTZ001  # the point of the test
        updated_at=datetime(2025, 1, 2, 3, tzinfo=east),
    )

    assert made.created_at == datetime(2025, 1, 2, 3, tzinfo=UTC)
    assert made.updated_at == datetime(2025, 1, 1, 22, tzinfo=UTC)
    assert made.updated_at.tzinfo is UTC
    assert session("s").created_at.tzinfo is UTC


@pytest.mark.parametrize(
    "wrong",
    [
        {"id": ""},
        {"backend": "none"},
        {"status": "idle"},
        {"total_queries": -1},
        {"total_response_time": float("inf")},
        {"history": ["text"]},
        {"created_at": None},
    ],
)
def test_a_session_that_is_none_cannot_be_made(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        UniversalSession.model_validate({"id": "s", "backend": "custom"} | wrong)
    with pytest.raises(ValidationError):
        name, value = next(iter(wrong.items()))
        setattr(session("s"), name, value)


@settings(max_examples=40)
@given(
    context=OBJECTS,
    history=st.lists(OBJECTS, max_size=3),
    times=st.datetimes(timezones=st.timezones()).filter(lambda each: 1 < each.year < 9999),
    queries=st.integers(0, 2**53 - 1),
    seconds=st.floats(0, allow_infinity=False, allow_nan=False),
    status=st.sampled_from(FlowStatus),
    backend=st.sampled_from(BackendType),
    user=st.none() | st.text(),
)
def test_every_session_comes_back_from_its_record(
    context: Any,
    history: Any,
    times: datetime,
    queries: int,
    seconds: float,
    status: FlowStatus,
    backend: BackendType,
    user: str | None,
) -> None:
    made = UniversalSession(
        id="s",
        backend=backend,
        status=status,
        context=context,
        history=history,
        created_at=times,
        expires_at=times,
        total_queries=queries,
        total_response_time=seconds,
        user_id=user,
    )

    record = json.loads(json.dumps(from_session(made)))

    assert to_session(record) == made


# As two earlier implementations wrote them: with the times in `metadata`, and flat.
WITH_METADATA: dict[str, Any] = {
    "_schema_version": "1.0",
    "id": "s",
    "backend": "flowise",
    "backend_session_id": "fw-1",
    "status": None,
    "current_flow_id": "csv2507",
    "context": {"topic": "x"},
    "history": [{"q": "a"}],
    "metadata": {"created_at": "2025-11-18T09:30:12.5", "last_active": "2025-11-18T10:00:00"},
}
FLAT: dict[str, Any] = {
    "id": "s",
    "backend": "langflow",
    "backend_session_id": "lf-1",
    "status": "completed",
    "current_flow_id": None,
    "context": {},
    "history": [],
    "created_at": "2025-11-18T09:30:12",
}


def test_records_of_version_one_are_read() -> None:
    read = to_session(WITH_METADATA)

    assert read.created_at == datetime(2025, 11, 18, 9, 30, 12, 500_000, tzinfo=UTC)
    assert read.updated_at == datetime(2025, 11, 18, 10, tzinfo=UTC)
    assert read.status is FlowStatus.PENDING
    assert read.history == [{"q": "a"}]
    assert not read.model_extra
    assert from_session(read)["_schema_version"] == "2.0"
    without = WITH_METADATA | {"metadata": {"created_at": "2025-11-18T09:30:12.5"}}
    assert to_session(without).updated_at == read.created_at


def test_records_without_a_version_are_read() -> None:
    read = to_session(FLAT)

    assert read.created_at == datetime(2025, 11, 18, 9, 30, 12, tzinfo=UTC)
    assert read.status is FlowStatus.COMPLETED
    assert read.current_flow_id is None


@pytest.mark.parametrize("version", ["3.0", "10", "999999999.1"])
def test_a_record_of_a_newer_version_is_refused(version: str) -> None:
    with pytest.raises(SchemaTooNewError, match=version):
        to_session(from_session(full_session()) | {"_schema_version": version})


@pytest.mark.parametrize("version", ["", "two", None, 2, "2x", ["2.0"]])
def test_a_version_that_is_none_is_damage(version: object) -> None:
    with pytest.raises(StateCorruptedError, match="_schema_version"):
        to_session(from_session(full_session()) | {"_schema_version": version})


def test_names_that_are_reserved_are_refused() -> None:
    wrong = UniversalSession.model_validate({"id": "s", "backend": "custom", "_ttl_seconds": 1})

    with pytest.raises(StateValidationError, match="_ttl_seconds"):
        from_session(wrong)


@pytest.mark.parametrize(
    "name",
    ["api_key", "apiKey", "OPENAI_API_KEY", "x-api-key", "password", "dbPassword", "Authorization",
     "client_secret", "token", "access_token", "refreshToken", "aws_secret_access_key", "Cookie"],
)  # fmt: skip
def test_credentials_are_known_by_their_names(name: str) -> None:
    redacted, found = Redactor()({"a": [{name: {"deep": "value"}}]})

    assert redacted == {"a": [{name: REDACTED}]}
    assert found == [f"a[0].{name}"]


def test_other_names_are_left_and_the_caller_chooses() -> None:
    innocent = {"max_tokens": 1, "page_token": "p", "passwords_changed": 3, "secretary": "Ann"}

    assert Redactor()(innocent) == (innocent, [])
    assert Redactor([])({"password": "x"}) == ({"password": "x"}, [])
    assert Redactor(["page_*"])(innocent)[1] == ["page_token"]
    with pytest.raises(TypeError):
        Redactor("password")


@given(value=OBJECTS)
def test_redacting_twice_changes_nothing_more(value: dict[str, Any]) -> None:
    once, _ = Redactor()(value)

    assert Redactor()(once) == (once, [])


@pytest.mark.parametrize("prefix", ["", ":", "a:session", "session:", "x:index:y"])
def test_a_prefix_that_could_be_mistaken_is_refused(prefix: str) -> None:
    with pytest.raises(StateValidationError, match="prefix"):
        Keys(prefix)


def test_no_two_histories_share_a_key() -> None:
    parts = ("a", ":", "%", "%3A", "%25")
    names = ["".join(each) for n in (1, 2, 3) for each in itertools.product(parts, repeat=n)]
    pairs = set(itertools.product(names, repeat=2))

    assert len({Keys().history(*pair) for pair in pairs}) == len(pairs)


@given(text=st.text())
def test_an_escaped_text_matches_itself_alone(text: str) -> None:
    assert glob(escape_glob(text)).match(text)
    assert not glob(escape_glob(text)).match(text + "x")


async def test_patterns_mean_what_they_mean_to_redis(server: RedisServer) -> None:
    texts = ["", "a", "b", "ab", "a]", "-", "^", "\\", "[a]", "a\nb", "*", "abc", "c"]
    patterns = ["*", "a*", "?", "[ab]", "[^a]", "[a-c]", "[c-a]*", r"\*", r"[\]a]", "a**", "[]", "",
                "[a", "*b", "[-a]", r"\\", "[^]", "a?b"]  # fmt: skip
    async with connect(server.url) as redis:
        await redis.mset({f"k{text}": "" for text in texts})
        for pattern in patterns:
            found = set(await redis.keys(f"k{pattern}"))
            ours = {f"k{text}".encode() for text in texts if glob(pattern).match(text)}
            assert ours == found, pattern
    assert glob("?").match("é")  # one letter; Redis counts bytes
