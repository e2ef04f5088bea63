"""Normalizes messages, in any form that agents send, to records.

Three forms are read, under any of the names in ``NAMES``:

- flat: ``{message_id, timestamp, sender_id, context_id, content, metadata}``, the content as
  text or as an object with a text in it;
- wrapped: ``{event_type, agent, timestamp, message}``, the message as text, as a flat one, or as
  any object;
- stored: ``{Id, Timestamp, SpeakerName, SpeakerRole, Message, ConversationType, ContextId,
  Metadata}``, ours and the older one with JSON inside the text of ``Message`` and what enrichment
  found next to it.

Nothing that was sent is lost: values without a field of their own are kept in ``Metadata``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Any, NamedTuple

import orjson

from agent_state.clock import IdFactory, instant, stamp
from agent_state.errors import SerializationError, StateCorruptedError, UnreadableMessageError
from agent_state.protocols import JsonObject
from agent_state.serializers import (
    MAX_DEPTH,
    JSONStateSerializer,
    parse_foreign,
    replace_surrogates_in,
)
from agent_state.storage.logs import RESERVED
from agent_state_integrations.recorder.message import DEFAULT_ROLE, UNKNOWN

_NUMBER = re.compile(r"[+-]?[0-9]+(?:\.[0-9]+)?")
_CALENDAR = re.compile(r"(?:19|20)[0-9]{6}(?:[0-9]{6})?")
_ZONE_NAME = re.compile(r"\s*(?:z|UTC|GMT)$", re.IGNORECASE)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LONGEST = 64
"""Characters; a longer text is not a time."""
_UNITS = ((10**11, 1), (10**14, 10**3), (10**17, 10**6), (10**20, 10**9))
"""Below which size a number since 1970 counts in which part of a second."""


def parse_timestamp(value: object, *, fallback: datetime | None = None) -> str:
    """The time as ``2026-11-21T03:11:00.000000Z``.

    Understood are ISO 8601 with ``T`` or a space, with ``Z``, an offset or nothing (which is
    UTC), a date alone (its first moment), more digits of a second than six (the rest is cut off,
    .NET writes seven), seconds, milli-, micro- or nanoseconds since 1970 as a number or as text
    (distinguished by size), and ``datetime`` and ``date``.

    Raises ``ValueError`` for anything else, or gives the ``fallback`` where there is one.
    """
    try:
        if type(value) is str and _is_ours(value):
            datetime.fromisoformat(value)  # the 31st of February has this form too
            return value
        if type(value) is str and len(value) == 24 and _is_ours(f"{value[:23]}000Z"):
            datetime.fromisoformat(value)  # milliseconds, as most tools write them
            return f"{value[:23]}000Z"
        return stamp(_moment(value))
    except (ValueError, OverflowError) as error:
        if fallback is not None:
            return stamp(fallback)
        raise ValueError(f"{value!r:.80} is not a time") from error


def _is_ours(text: str) -> bool:
    """Whether only one form of ISO 8601 is left that it can be: a month after the year, no week."""
    return (
        len(text) == 27
        and text[26] == "Z"
        and text[19] == "."
        and text[10] == "T"
        and text[5] in "01"
    )


def _moment(value: object) -> datetime:
    if isinstance(value, str):
        return _written(value.strip())
    if isinstance(value, datetime):
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day, tzinfo=UTC)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _since_1970(value)
    raise ValueError(f"a value of type {type(value).__name__} is not a time")


def _written(text: str) -> datetime:
    if len(text) > _LONGEST:
        raise ValueError("too long for a time")
    if text[4:5] == "-":
        return instant(text if text[-1].isdigit() else _ZONE_NAME.sub("Z", text))
    if _CALENDAR.fullmatch(text):
        return instant(f"{text[:8]}T{text[8:] or '000000'}")
    if _NUMBER.fullmatch(text):
        if len(text.partition(".")[0].lstrip("+-")) < 9:
            raise ValueError("a short number names no instant")
        return _since_1970(float(text) if "." in text else int(text))
    return instant(_ZONE_NAME.sub("Z", text))


def _since_1970(number: float) -> datetime:
    for limit, parts in _UNITS:
        if abs(number) < limit:
            if isinstance(number, int):
                return _EPOCH + timedelta(microseconds=number * 10**6 // parts)
            return _EPOCH + timedelta(seconds=number / parts)
    raise ValueError(f"{number} is too large for a time")


_IN_ORDER = ("message", "text", "content", "body", "msg", "summary", "description")
"""Where the text of an object is, the first of them that has one."""
_FIELDS = frozenset(_IN_ORDER)
_DEEPEST = 16
"""Levels at which a text is looked for."""


def read(value: object, content: object, field: str) -> tuple[str, JsonObject | None]:
    """The text of a message, and the object it is from if that holds more than the text.

    ``content`` is the object of a record that has been understood before: it is left as it is.
    Raises ``UnreadableMessageError``.
    """
    if type(value) is str:
        if type(content) is dict:
            return value, content
        found = as_object(value)
        return (value, None) if found is None else _of_object(found)
    if type(value) is dict:
        return _of_object(value)
    if type(value) is list:
        return _of_object({field: value}) if value else ("", None)
    return orjson.dumps(value).decode(), None


def as_object(text: str) -> JsonObject | None:
    """The JSON object that a text is; None when it is only a text."""
    if text[:1] != "{":
        return None
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return found if type(found) is dict else None


def _of_object(value: JsonObject) -> tuple[str, JsonObject | None]:
    text = _text_in(value, _DEEPEST)
    more = _holds_more(value, text)
    if not text:
        return (_compact(value), value) if more else ("", None)
    if (found := as_object(text)) is None:
        return text, value if more else None
    # The text of this object is again JSON: the innermost content is the message.
    inner, content = _of_object(found)
    return inner, value if more else content


def _text_in(value: object, levels: int) -> str:
    if type(value) is str:
        return value
    if levels and type(value) is dict:
        for field in _IN_ORDER:
            if field in value and (text := _text_in(value[field], levels - 1)):
                return text
    elif levels and type(value) is list:
        found = [text for item in value if (text := _text_in(item, levels - 1))]
        return "\n".join(found)
    return ""


def _holds_more(value: object, text: str) -> bool:
    """Whether there is anything in the value except this text and the fields it is in."""
    level: list[Any] = [value]
    for _ in range(_DEEPEST):
        if not level:
            return False
        deeper: list[Any] = []
        for item in level:
            if type(item) is dict:
                if len(item) > 1 or not _FIELDS.issuperset(item):
                    return True
                deeper.extend(item.values())
            elif item not in ("", None, text):
                return True
        level = deeper
    return True


def _compact(value: JsonObject) -> str:
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()
    except orjson.JSONEncodeError as error:
        raise UnreadableMessageError(
            f"content: nesting is deeper than {MAX_DEPTH} levels"
        ) from error


MAX_NAME_BYTES = 4096
"""The longest id, speaker, role or context."""

NAMES = {
    "id": ("message_id", "Id", "id", "messageId", "msg_id", "uuid"),
    "time": ("timestamp", "Timestamp", "time", "ts", "created_at", "createdAt"),
    "speaker": (
        "sender_id",
        "from",
        "sender",
        "speaker",
        "SpeakerName",
        "agent",
        "agent_id",
        "senderId",
        "sender_name",
        "author",
    ),
    "role": ("sender_role", "SpeakerRole", "role", "senderRole"),
    "context": (
        "context_id",
        "ContextId",
        "conversation_id",
        "session_id",
        "thread_id",
        "contextId",
        "conversationId",
        "sessionId",
        "context",
    ),
    "content": ("content", "message", "text", "Message", "body", "msg"),
    "object": ("Content",),
    "metadata": ("metadata", "Metadata", "meta"),
    "conversation_type": ("ConversationType", "conversation_type"),
    "type": ("message_type", "type", "event_type", "messageType"),
    "receiver": ("receiver", "receiver_id", "recipient", "recipient_id", "to"),
}
"""For each field its names, in the order of their precedence."""
_MEANING = {
    name: (meaning, rank) for meaning, names in NAMES.items() for rank, name in enumerate(names)
}
CONTENT_NAMES = frozenset(NAMES["content"])
"""The names under which an object holds the content."""
_ENVELOPE = frozenset(
    name for meaning in ("id", "speaker", "context") for name in NAMES[meaning]
) | {"content"}
"""An object with one of these names, and with content, is a message and not only its content."""
_SPARE_LEVELS = 8
_CONTAINERS = frozenset({dict, list})
BOM = b"\xef\xbb\xbf"

_serializer = JSONStateSerializer()


class _MessageFields(NamedTuple):
    """The fields of an object by what they mean, under which name they came, and the rest."""

    fields: dict[str, Any]
    names: dict[str, str]
    rest: dict[str, Any]


def normalize(
    data: bytes | str | Mapping[str, Any], *, received: datetime, new_id: IdFactory
) -> JsonObject:
    """The record of a message: not redacted, not enriched, and an object of its own.

    ``received`` replaces a missing or invalid time, and the invalid value is kept in ``Metadata``.
    Raises ``UnreadableMessageError``, which names the field and the reason, for a message that is
    not a JSON object, has no content, or has names that are not text. Half a surrogate pair becomes
    U+FFFD, and ``Metadata.replaced`` says so.
    """
    value, replaced = _object(data)
    record = normalize_parsed(value, received=received, new_id=new_id)
    if replaced:
        mark_replaced(record)
    return record


def mark_replaced(record: JsonObject) -> None:
    """Say in a record that its text was not all text."""
    record["Metadata"]["replaced"] = "half a surrogate pair, by U+FFFD"


class NormalRecord(dict[str, Any]):
    """A record that needs no ``normalize``: it came from there, or from ``record_of``."""


def record_of(message: JsonObject) -> NormalRecord:
    """The record of a message that a reader of transcripts made.

    It has the keys of a record, and JSON values only; what is checked is the rest: the time, the
    length of names, the depth. Raises ``UnreadableMessageError``.
    """
    record = NormalRecord(
        Id=message["Id"],
        Timestamp=message["Timestamp"],
        SpeakerName=message["SpeakerName"],
        SpeakerRole=message["SpeakerRole"],
        Message=message["Message"],
        ConversationType=0,
        ContextId=message["ContextId"] or UNKNOWN,
        Metadata=message["Metadata"],
    )
    for field in ("Id", "SpeakerName", "ContextId"):
        value = record[field]
        if type(value) is not str:
            raise UnreadableMessageError(f"{field}: {_kind(value)} is not a name")
        if len(value) * 4 > MAX_NAME_BYTES and len(value.encode()) > MAX_NAME_BYTES:
            raise UnreadableMessageError(f"{field}: longer than {MAX_NAME_BYTES} bytes")
    try:
        record["Timestamp"] = parse_timestamp(message["Timestamp"])
    except ValueError:
        record["Metadata"]["timestamp_given"] = message["Timestamp"]
        raise
    if "Content" in message:
        record["Content"] = message["Content"]
        _check_depth(message["Content"], "content")
    _check_depth(record["Metadata"], "metadata")
    return record


def normalize_parsed(data: JsonObject, *, received: datetime, new_id: IdFactory) -> JsonObject:
    """``normalize`` of an object that was read from JSON. It may become part of the record."""
    parts = _fields_of(data)
    if parts.names.get("content") == "message":
        parts = _unwrapped(parts)
    fields, names, rest = parts
    if "content" not in fields:
        raise UnreadableMessageError("no content: none of content, message or text is there")
    text, content = read(fields["content"], fields.get("object"), names["content"])
    metadata = _metadata(parts)
    speaker = _name(parts, "speaker", metadata) or UNKNOWN
    if speaker == UNKNOWN and content is not None:
        speaker = _speaker_within(content)
    record: JsonObject = {
        "Id": _name(parts, "id", metadata) or new_id(),
        "Timestamp": _time(parts, received, metadata),
        "SpeakerName": speaker,
        "SpeakerRole": _role(parts, metadata),
        "Message": text,
        "ConversationType": _conversation_type(fields),
        "ContextId": _name(parts, "context", metadata) or UNKNOWN,
        "Metadata": metadata,
    }
    if content is not None:
        record["Content"] = content
        _check_depth(content, "content")
    for name, meaning in (("receiver", "receiver"), ("message_type", "type")):
        if (value := fields.get(meaning)) not in (None, ""):
            _keep(metadata, name, value)
    for name, value in rest.items():
        if name not in RESERVED:
            _keep(metadata, name, value)
    if metadata:
        _check_depth(metadata, "metadata")
    return record


def _object(data: bytes | str | Mapping[str, Any]) -> tuple[JsonObject, bool]:
    """A message of its own, and whether half a surrogate pair was replaced in it."""
    replaced = False
    if isinstance(data, Mapping):
        # Through JSON and back: what could not be stored is refused, and the caller's stays his.
        try:
            given = _with_written_times(data)
            try:
                data = _serializer.dumps(given)
            except SerializationError:
                data, replaced = _serializer.dumps(replace_surrogates_in(given)), True
        except SerializationError as error:
            raise UnreadableMessageError(error.message) from error
    elif isinstance(data, str):
        data = data.encode("utf-8", "surrogatepass")
    try:
        value, halves = parse_foreign(data)
    except StateCorruptedError as error:
        raise UnreadableMessageError(error.message) from error
    if type(value) is not dict:
        raise UnreadableMessageError(f"a message is a JSON object, not {_kind(value)}")
    return value, replaced or halves


def _with_written_times(data: Mapping[str, Any]) -> JsonObject:
    return {
        name: parse_timestamp(value) if isinstance(value, date) else value
        for name, value in data.items()
    }


def _fields_of(data: JsonObject) -> _MessageFields:
    fields: dict[str, Any] = {}
    names: dict[str, str] = {}
    rest: dict[str, Any] = {}
    known_as = _MEANING.get
    for name, value in data.items():
        known = known_as(name)
        if known is None:
            rest[name] = value
            continue
        meaning, rank = known
        if value is None:
            continue
        if meaning in fields:
            other = names[meaning]
            if fields[meaning] != "" and (value == "" or rank > _MEANING[other][1]):
                rest[name] = value
                continue
            rest[other] = fields[meaning]
        fields[meaning] = value
        names[meaning] = name
    return _MessageFields(fields, names, rest)


def _unwrapped(outer: _MessageFields) -> _MessageFields:
    """One message from a wrapper and the message in it; unchanged if it contains none."""
    content = outer.fields["content"]
    if type(content) is str:
        content = as_object(content)
    if type(content) is not dict or _ENVELOPE.isdisjoint(content):
        return outer
    inner = _fields_of(content)
    if "content" not in inner.fields:
        return outer
    fields, names, rest = dict(outer.fields), dict(outer.names), dict(outer.rest)
    del fields["content"]
    for meaning, value in inner.fields.items():
        if value == "" and meaning != "content":
            continue
        if meaning == "metadata" and type(value) is type(fields.get(meaning)) is dict:
            for name, item in fields[meaning].items():
                _keep(value, name, item)
        elif meaning in fields and fields[meaning] != value:
            _keep(rest, names[meaning], fields[meaning])
        fields[meaning], names[meaning] = value, inner.names[meaning]
    for name, value in inner.rest.items():
        _keep(rest, name, value)
    return _MessageFields(fields, names, rest)


def _metadata(parts: _MessageFields) -> JsonObject:
    given = parts.fields.get("metadata")
    if type(given) is dict:
        return given
    if type(given) is str and (found := as_object(given)) is not None:
        return found
    return {} if given in (None, "") else {parts.names["metadata"]: given}


def _name(parts: _MessageFields, meaning: str, metadata: JsonObject) -> str:
    """The text of an id; empty when none is given."""
    value: Any = parts.fields.get(meaning, "")
    field = parts.names.get(meaning, meaning)
    kind = type(value)
    if (kind is dict and meaning != "id") or (kind is list and field == "context"):
        # {"name": "Ada", "model": …} is a speaker, too.
        _keep(metadata, field, value)
        value = _name_in(value)
        kind = type(value)
    if kind is int or kind is float:
        value = str(value)
    elif kind is not str:
        raise UnreadableMessageError(f"{field}: {_kind(value)} is not a name")
    if len(value) * 4 > MAX_NAME_BYTES and len(value.encode()) > MAX_NAME_BYTES:
        raise UnreadableMessageError(f"{field}: longer than {MAX_NAME_BYTES} bytes")
    return str(value)


def _name_in(value: object) -> Any:
    if type(value) is dict:
        for key in ("name", "id"):
            if type(found := value.get(key)) in (str, int, float) and found != "":
                return found
    return ""


def _role(parts: _MessageFields, metadata: JsonObject) -> str:
    if "role" in parts.fields:
        return _name(parts, "role", metadata) or DEFAULT_ROLE
    role = metadata.get("sender_role")
    if type(role) is str and role and len(role) * 4 <= MAX_NAME_BYTES:
        del metadata["sender_role"]
        return role
    return DEFAULT_ROLE


def _time(parts: _MessageFields, received: datetime, metadata: JsonObject) -> str:
    given = parts.fields.get("time", "")
    if given == "":
        return stamp(received)
    try:
        return parse_timestamp(given)
    except ValueError:
        _keep(metadata, "timestamp_given", given)
        _keep(metadata, "timestamp_source", "received")
        return stamp(received)


def _conversation_type(fields: JsonObject) -> int | str:
    value = fields.get("conversation_type")
    if value is None:
        # A number is what the other field of this name holds.
        return fields.pop("type") if type(fields.get("type")) is int else 0
    if isinstance(value, int | str):
        return value if type(value) is not bool else int(value)
    if isinstance(value, float):
        return int(value) if value.is_integer() else str(value)
    raise UnreadableMessageError(f"ConversationType: {_kind(value)} is not a type")


def _speaker_within(content: JsonObject) -> str:
    for name in NAMES["speaker"]:
        value = content.get(name)
        if type(value) is str and value and len(value) * 4 <= MAX_NAME_BYTES:
            return value
    return UNKNOWN


def _keep(metadata: JsonObject, name: str, value: object) -> None:
    """Add what has no place of its own, over nothing that is there."""
    while name in metadata and metadata[name] != value:
        name += "_"
    metadata[name] = value


def _check_depth(value: JsonObject, field: str) -> None:
    """Raise for what can be read and could not be written again."""
    if _CONTAINERS.isdisjoint(map(type, value.values())):
        return
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH - _SPARE_LEVELS):
        level = [
            item
            for container in level
            for item in (container.values() if type(container) is dict else container)
            if type(item) is dict or type(item) is list
        ]
        if not level:
            return
    raise UnreadableMessageError(f"{field}: nesting is deeper than {MAX_DEPTH} levels")


def _kind(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "text", bool: "a truth value"}
    return "null" if value is None else names.get(type(value), "a number")
