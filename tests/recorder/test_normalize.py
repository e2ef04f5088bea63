"""Every form in which messages are sent becomes the same record, or is refused with a reason."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest

from agent_state.errors import UnreadableMessageError
from agent_state.protocols import JsonObject
from agent_state_integrations.recorder.normalize import MAX_NAME_BYTES, normalize

RECEIVED = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)
STAMP = "2026-05-04T03:02:01.000000Z"


def read(data: bytes | str | Mapping[str, Any]) -> JsonObject:
    numbers = itertools.count(1)
    return normalize(data, received=RECEIVED, new_id=lambda: f"new-{next(numbers)}")


FLAT: JsonObject = {
    "message_id": "ada_1",
    "timestamp": "2026-03-02T09:00:00Z",
    "sender_id": "ada",
    "context_id": "upload",
    "content": {"message": "Four at a time."},
    "metadata": {"sender_role": "architect", "turn": 3},
}
RECORD: JsonObject = {
    "Id": "ada_1",
    "Timestamp": "2026-03-02T09:00:00.000000Z",
    "SpeakerName": "ada",
    "SpeakerRole": "architect",
    "Message": "Four at a time.",
    "ConversationType": 0,
    "ContextId": "upload",
    "Metadata": {"turn": 3},
}


def wrapped(message: object, **more: Any) -> JsonObject:
    return {"agent": "ada", "timestamp": "2026-03-02T09:00:00Z", "message": message, **more}


@pytest.mark.parametrize(
    "sent",
    [
        FLAT,
        orjson.dumps(FLAT),
        orjson.dumps(FLAT).decode(),
        b"\xef\xbb\xbf" + orjson.dumps(FLAT),
        wrapped(FLAT),
        wrapped(orjson.dumps(FLAT).decode()),
        {**FLAT, "content": "Four at a time."},
        {**FLAT, "content": None, "text": "Four at a time."},
        {**FLAT, "content": '{"message": "Four at a time."}'},
        {**FLAT, "content": {"content": {"text": "Four at a time."}}},
        {**FLAT, "timestamp": datetime(2026, 3, 2, 9, tzinfo=UTC)},
        {**FLAT, "timestamp": 1772442000},
        {
            "Id": "ada_1",
            "Timestamp": "2026-03-02T09:00:00.0000000",
            "SpeakerName": "ada",
            "SpeakerRole": "architect",
            "Message": '{"message": "Four at a time."}',
            "ConversationType": 0,
            "ContextId": "upload",
            "Metadata": {"turn": 3},
            "_crc": "00000000",
            "_seq": 9,
        },
        {
            "id": "ada_1",
            "ts": 1772442000000,
            "from": "ada",
            "role": "architect",
            "text": "Four at a time.",
            "conversation_id": "upload",
            "meta": {"turn": 3},
        },
        RECORD,
    ],
)
def test_all_forms_of_a_message_are_one_record(sent: Any) -> None:
    assert read(sent) == RECORD


def test_a_wrapper_says_what_kind_of_event_it_was() -> None:
    record = read(wrapped({"status": "idle", "queue": 0}, event_type="status"))
    assert record["SpeakerName"] == "ada"
    assert record["Message"] == '{"queue":0,"status":"idle"}'
    assert record["Content"] == {"queue": 0, "status": "idle"}
    assert record["Metadata"] == {"message_type": "status"}


def test_the_author_is_believed_before_the_one_who_passes_it_on() -> None:
    sent = wrapped({**FLAT, "sender_id": "ben"}, event_type="relay")
    record = read(sent)
    assert record["SpeakerName"] == "ben"
    assert record["Metadata"]["agent"] == "ada"


def test_what_a_wrapper_lacks_inside_is_taken_from_outside() -> None:
    record = read(wrapped({"content": "hello", "sender_id": ""}, context_id="c"))
    assert (record["SpeakerName"], record["ContextId"]) == ("ada", "c")


def test_defaults() -> None:
    assert read({"content": "hello"}) == {
        "Id": "new-1",
        "Timestamp": STAMP,
        "SpeakerName": "unknown",
        "SpeakerRole": "Agent",
        "Message": "hello",
        "ConversationType": 0,
        "ContextId": "unknown",
        "Metadata": {},
    }


def test_an_unknown_speaker_may_be_named_in_the_content() -> None:
    stored = {"SpeakerName": "unknown", "Message": '{"from": "ben", "message": "hi"}'}
    assert read(stored)["SpeakerName"] == "ben"


def test_a_speaker_may_be_an_object_with_a_name() -> None:
    record = read({"from": {"name": "ada", "model": "m"}, "text": "hi"})
    assert record["SpeakerName"] == "ada"
    assert record["Metadata"] == {"from": {"name": "ada", "model": "m"}}


@pytest.mark.parametrize("context", [{"page": 3}, ["a", "name"], {"name": None}])
def test_a_context_that_is_no_name_is_kept_as_it_is(context: object) -> None:
    record = read({"text": "hi", "context": context})
    assert (record["ContextId"], record["Metadata"]) == ("unknown", {"context": context})


def test_a_type_that_is_a_number_is_the_conversations() -> None:
    record = read({"text": "hi", "context": "c", "type": 3, "speaker": "ada"})
    assert (record["ConversationType"], record["ContextId"], record["Metadata"]) == (3, "c", {})


def test_nothing_that_was_sent_is_lost() -> None:
    record = read(
        {
            "sender_id": "ada",
            "from": "relay",
            "to": ["ben", "cy"],
            "type": "question",
            "text": "Who?",
            "priority": 2,
            "turn": 4,
            "metadata": {"turn": 3, "priority": 2},
        }
    )
    assert record["Metadata"] == {
        "turn": 3,
        "turn_": 4,
        "priority": 2,
        "from": "relay",
        "receiver": ["ben", "cy"],
        "message_type": "question",
    }


def test_enrichment_beside_the_metadata_is_moved_into_it() -> None:
    record = read({"Message": "x", "Metadata": {}, "chain_type": "ui_ux", "shl_tags": ["@A"]})
    assert record["Metadata"] == {"chain_type": "ui_ux", "shl_tags": ["@A"]}


def test_a_time_that_is_none_is_kept_beside_the_one_it_came() -> None:
    record = read({"text": "hi", "timestamp": "soon"})
    assert record["Timestamp"] == STAMP
    assert record["Metadata"] == {"timestamp_given": "soon", "timestamp_source": "received"}


@pytest.mark.parametrize(
    ("content", "text", "kept"),
    [
        ("", "", None),
        ({}, "", None),
        ([], "", None),
        ("{}", "", None),
        ({"message": ""}, "", None),
        ({"message": {"text": "deep"}}, "deep", None),
        ({"message": "hi", "n": 1}, "hi", {"message": "hi", "n": 1}),
        ({"message": "", "n": 1}, '{"message":"","n":1}', {"message": "", "n": 1}),
        ({"message": '{"text": "inner", "n": 2}'}, "inner", {"text": "inner", "n": 2}),
        ("{not json}", "{not json}", None),
        ("[1, 2]", "[1, 2]", None),
        (5, "5", None),
        (False, "false", None),
        ([{"type": "text", "text": "a"}, {"text": "b"}], "a\nb", ...),
        ([1, 2], '{"content":[1,2]}', {"content": [1, 2]}),
    ],
)
def test_the_text_of_a_content(content: object, text: str, kept: object) -> None:
    record = read({"content": content})
    assert record["Message"] == text
    if kept is not ...:
        assert record.get("Content") == kept


def test_the_callers_message_is_not_touched() -> None:
    sent = {**FLAT, "metadata": {"sender_role": "x", "list": [1]}}
    before = orjson.dumps(sent)
    record = read(sent)
    record["Metadata"]["list"].append(2)
    assert orjson.dumps(sent) == before


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"content": "torn', "not JSON"),
        ("\ud800", "not JSON"),
        (b'{"content": NaN}', "not JSON"),
        (b"[1]", "not an array"),
        (b"5", "not a number"),
        (b"null", "not null"),
        (b'"text"', "not text"),
        ({"sender_id": "ada"}, "no content"),
        ({"content": None}, "no content"),
        (wrapped(None), "no content"),
        ({"content": "x", "message_id": [1]}, "message_id: an array"),
        ({"content": "x", "message_id": True}, "message_id: a truth value"),
        ({"content": "x", "sender_id": ["a"]}, "sender_id: an array"),
        ({"content": "x", "context_id": "é" * MAX_NAME_BYTES}, "context_id: longer than 4096"),
        ({"content": "x", "ConversationType": []}, "ConversationType: an array"),
        ({"content": float("nan")}, "content.*nan"),
        ({"content": {"a": {1: 2}}}, "content.a"),
        ({"content": {"a": {1, 2}}}, "content.a"),
        ({"content": 2**70}, "content.*64 bits"),
    ],
)
def test_what_cannot_be_understood_says_why(data: Any, reason: str) -> None:
    with pytest.raises(UnreadableMessageError, match=reason):
        read(data)


@pytest.mark.parametrize("field", ["content", "metadata", "other"])
@pytest.mark.parametrize("depth", [195, 300, 1000])
def test_what_is_nested_too_deep_to_be_stored_is_refused(field: str, depth: int) -> None:
    deep = b'{"a":' * depth + b"1" + b"}" * depth
    message = b'{"text": "x", "content": %b}' % deep
    if field != "content":
        message = b'{"content": "x", "%b": %b}' % (field.encode(), deep)
    with pytest.raises(UnreadableMessageError, match=r"nesting|recursion"):
        read(message)


def test_a_message_of_ten_megabytes_is_a_message() -> None:
    text = "long " * 2_000_000
    assert read(orjson.dumps({"content": text}))["Message"] == text


def test_a_number_is_an_id() -> None:
    record = read({"content": "x", "message_id": 1772442000.25, "context_id": 7})
    assert (record["Id"], record["ContextId"]) == ("1772442000.25", "7")
