"""Laws of understanding, for any JSON object."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import orjson
from hypothesis import assume, given
from hypothesis import strategies as st

from agent_state.errors import UnreadableMessageError
from agent_state.protocols import JsonObject
from agent_state.serializers import JSONStateSerializer
from agent_state_integrations.recorder.message import RecordedMessage
from agent_state_integrations.recorder.normalize import normalize

NAMES = [
    *("message_id", "Id", "timestamp", "Timestamp", "sender_id", "from", "agent", "SpeakerName"),
    *("SpeakerRole", "role", "context_id", "ContextId", "content", "message", "text", "Message"),
    *("Content", "Metadata", "metadata", "ConversationType", "type", "event_type", "to"),
    *("chain_type", "_seq", "sender_role", "summary"),
]
TEXTS = ["{}", '{"message":"x"}', '{"a":1}', '{"text":"{}"}', '{"message":"{\\"a\\":1}"}', " {}"]
names = st.one_of(st.sampled_from(NAMES), st.text(max_size=4))
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.sampled_from([*TEXTS, "2026-01-01", "unknown"]),
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=5)),
    max_leaves=10,
)
objects = st.builds(
    lambda rest, name, said: {**rest, name: said},
    st.dictionaries(names, values, max_size=6),
    st.sampled_from(["content", "message", "text", "Message", "other"]),
    values,
)


def read(data: bytes | JsonObject, *, year: int = 2026, new_id: str = "new") -> JsonObject:
    return normalize(data, received=datetime(year, 1, 1, tzinfo=UTC), new_id=lambda: new_id)


def read_if_any(data: JsonObject) -> JsonObject | None:
    """The record; None for what is refused, and any other error is a failure."""
    try:
        return read(orjson.dumps(data))
    except UnreadableMessageError:
        return None


@given(objects)
def test_a_record_has_the_right_types_and_can_be_stored(data: JsonObject) -> None:
    record = read_if_any(data)
    if record is None:
        return
    message = RecordedMessage.from_record(record)
    assert message.to_record() == record
    for text in (message.id, message.speaker, message.role, message.context):
        assert type(text) is str
        assert text
    assert type(message.text) is str
    assert type(message.type) in (int, str)
    assert type(message.metadata) is dict
    assert datetime.fromisoformat(message.timestamp).tzinfo is not None
    assert orjson.loads(JSONStateSerializer().dumps(record)) == record


@given(objects)
def test_understanding_a_record_again_changes_nothing(data: JsonObject) -> None:
    record = read_if_any(data)
    if record is None:
        return
    assert read(orjson.dumps(record), year=2030, new_id="other") == record


@given(objects)
def test_bytes_and_objects_are_understood_alike(data: JsonObject) -> None:
    record = read_if_any(data)
    if record is not None:
        assert read(data) == record


speech: st.SearchStrategy[Any] = st.text(min_size=1, max_size=20).filter(lambda t: t[0] != "{")
named = st.text(min_size=1, max_size=10)


@given(speech, named, named, st.sampled_from(["text", "object"]))
def test_flat_and_wrapped_are_the_same_and_name_the_speaker(
    text: str, speaker: str, context: str, kind: str
) -> None:
    assume(speaker != "unknown")
    flat = {
        "message_id": "m",
        "timestamp": "2026-03-02T09:00:00Z",
        "sender_id": speaker,
        "context_id": context,
        "content": text if kind == "text" else {"message": text},
        "metadata": {},
    }
    record = read(flat)
    assert record["SpeakerName"] == speaker
    assert record["Message"] == text
    wrapper = {"agent": speaker, "timestamp": flat["timestamp"], "message": flat}
    assert read(wrapper) == record
    bare = {"agent": speaker, "event_type": "e", "message": flat["content"]}
    assert (read(bare)["SpeakerName"], read(bare)["Message"]) == (speaker, text)
