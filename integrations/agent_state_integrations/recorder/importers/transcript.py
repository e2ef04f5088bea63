"""Common parts of the log formats: a line becomes a message, or is skipped for a reason."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import orjson

from agent_state.protocols import JsonObject

LogFormat = Literal["recorded", "claude-code", "codex"]
LOG_FORMATS: tuple[LogFormat, ...] = get_args(LogFormat)

_SHOWN = 500
"""Characters of a tool's input that stand in the text; ``Content`` has all of it."""
_REMEMBERED = 10_000


class SkippedLineError(Exception):
    """A line holds no message; the error names its kind."""


class TranscriptReader(Protocol):
    """Reads the lines of one file, in order."""

    name: LogFormat

    def message(self, line: JsonObject, number: int) -> JsonObject:
        """The message on a line, in a form that ``normalize`` understands.

        Raises ``NotAMessageError``.
        """


def message_of(speaker: str, role: str, text: str, kind: str | None) -> JsonObject:
    """A message without its id, time and context."""
    return {
        "SpeakerName": speaker,
        "SpeakerRole": role,
        "Message": text,
        "Metadata": without_empty(message_type=kind),
    }


class ToolCalls:
    """Which tool each call was of, among the newest calls of a file."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def note(self, call: object, tool: object) -> None:
        if type(call) is str and type(tool) is str:
            self._names[call] = tool
            if len(self._names) > _REMEMBERED:
                del self._names[next(iter(self._names))]

    def tool(self, call: object) -> str | None:
        return self._names.get(call) if type(call) is str else None


def blocks_of(content: object) -> list[JsonObject]:
    """A message's content as blocks: a text is one of them."""
    if type(content) is str:
        return [{"type": "text", "text": content}]
    if type(content) is not list:
        return []
    blocks = []
    for item in content:
        if type(item) is dict:
            blocks.append(item)
        elif type(item) is str:
            blocks.append({"type": "text", "text": item})
    return blocks


def text_of(content: object) -> str:
    """The text in a content that is text, or a list of blocks; an image is named, not shown."""
    if type(content) is dict:
        content = content.get("content", content.get("text"))
    return joined(_text_of_block(block) for block in blocks_of(content))


def _text_of_block(block: JsonObject) -> str:
    kind = block.get("type")
    if "image" in str(kind):
        return "[image]"
    text = block.get("text")
    return text if type(text) is str else ""


def joined(texts: Iterable[str]) -> str:
    """Paragraphs as one text, empty ones left out."""
    return "\n\n".join(text for text in texts if text)


def call_text(tool: object, given: object) -> str:
    """A call as a line for people: the tool, and the beginning of what it was given."""
    shown = given if type(given) is str else orjson.dumps(given).decode()
    return f"{tool} {shown[:_SHOWN]}{'…' if len(shown) > _SHOWN else ''}"


def digest_id(*parts: Any) -> str:
    """An id for a line without one: 32 hex digits of the SHA-256 of its content."""
    data = orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(data).hexdigest()[:32]


def without_empty(**values: Any) -> JsonObject:
    """The values that are there."""
    return {name: value for name, value in values.items() if value not in (None, "", [], {})}


def texts_in(value: object, name: str) -> str:
    """The text under a name; empty if it is missing."""
    found = value.get(name) if type(value) is dict else None
    return found if type(found) is str else ""


def session_in_name(path: Path) -> str:
    """The session id of a file that holds none: its name."""
    return path.name.partition(".")[0]
