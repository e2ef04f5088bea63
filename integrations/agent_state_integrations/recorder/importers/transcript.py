"""What all transcript formats share: a format, its reader, and the parts of a message.

A format is one module with a ``TranscriptFormat``. ``registry.register`` adds one of your own, as
does a package with an entry point in the group ``agent_state.transcripts``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import orjson

from agent_state.protocols import JsonObject

_SHOWN = 500
"""Characters of a tool's input that stand in the text; ``Content`` has all of it."""
_REMEMBERED = 10_000
_CONTAINERS = frozenset({str, list, dict})
LARGEST_OUTPUT = 16 * 1024 * 1024
"""Bytes of a tool's output in a file of its own that are read; of a larger one the beginning."""

COMMAND, HOOK, INTERRUPTION = "Command", "Hook", "Interruption"
NOTIFICATION, PROMPT, SYNTHETIC, SYSTEM = "Notification", "Prompt", "Synthetic", "System"
"""Roles of what neither a person nor a model said: a command of the tool and its output, a hook's
output, a note that somebody stopped the model, news of a sub-agent, the prompt that started one, a
line in the model's place that the tool wrote, and what else the tool says."""


class SkippedLineError(Exception):
    """A line holds no message; the error names its kind."""


Outcome = tuple[int, JsonObject | str]
"""The number of a line, and the message on it; or why it holds none."""


class TranscriptReader(Protocol):
    """Reads the lines of one file, in order."""

    def messages(self, line: JsonObject, number: int) -> Iterator[Outcome]:
        """The messages on a line, in a form that ``normalize`` understands.

        A message may be held back until a later line, with whose messages it then comes. Raises
        ``SkippedLineError`` where this line holds none.
        """

    def rest(self) -> Iterator[Outcome]:
        """The messages that are still held back, after the last line."""


@dataclass(frozen=True, slots=True)
class TranscriptFile:
    """A file to be read, and what is known of its session from other files."""

    path: Path
    about: JsonObject = field(default_factory=dict)
    """Metadata for each message: where its session was forked from."""


def _nothing(_: bytes) -> str | None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class TranscriptFormat:
    """How the transcripts of one tool are known and read."""

    name: str
    """The value of ``--from``, and of ``Metadata.source``."""
    title: str
    """The tool, for people."""
    mark: Callable[[JsonObject], str | None]
    """What a line has that only this tool writes, in words; None where it has nothing of it."""
    reader: Callable[[TranscriptFile], TranscriptReader]
    ignores: Callable[[bytes], str | None] = _nothing
    """Why a line, before it is parsed, holds no message; None where it has to be looked at."""
    document: Callable[[Path, bytes], str | None] | None = None
    """Like ``mark``, of a file that is not JSON lines, by its path and its first bytes."""
    lines: Callable[[Path], Iterator[JsonObject]] | None = None
    """The lines of such a file."""
    arrange: Callable[[Sequence[Path]], Iterable[TranscriptFile]] | None = None
    """The order in which the files of one import are read: what others refer to first."""


def message_of(speaker: str, role: str, text: str, kind: str | None) -> JsonObject:
    """A message without its id, time and context."""
    return {
        "SpeakerName": speaker,
        "SpeakerRole": role,
        "Message": text,
        "Metadata": without_empty(message_type=kind),
    }


def put_in(role: str, text: str, kind: str) -> JsonObject:
    """A message that the tool itself wrote."""
    return message_of("system", role, text, kind)


def usage_of(
    *,
    given: object,
    output: object,
    cache_read: object = 0,
    cache_write: object = 0,
    **more: object,
) -> JsonObject:
    """The tokens of one response, under the same names whatever the tool calls them.

    ``input_tokens`` are those that came from no cache, ``output_tokens`` include reasoning.
    """
    return {
        name: value
        for name, value in {
            "input_tokens": given,
            "output_tokens": output,
            "cache_read_tokens": cache_read,
            "cache_write_tokens": cache_write,
            **more,
        }.items()
        if type(value) in (int, float) and value
    }


def number_in(value: object, name: str) -> int:
    """The whole number under a name; 0 if it is missing."""
    found = value.get(name) if type(value) is dict else None
    return found if type(found) is int else 0


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


def result_of(text: str, results: list[JsonObject]) -> JsonObject:
    """The message of a tool. ``results``: call, tool, is_error, about for each result in it."""
    said = message_of("tool", "Tool", text or "(nothing)", "tool_result")
    tools = sorted({str(result["tool"]) for result in results if result.get("tool")})
    failed = any(result.get("is_error") for result in results)
    said["Metadata"] |= without_empty(tools=tools, is_error=failed or None)
    said["Content"] = {"tool_results": results}
    return said


def call_of(speaker: str, text: str, calls: list[JsonObject], thinking: str = "") -> JsonObject:
    """The message of a model that says something, thinks, calls tools, or all of it."""
    shown = joined(call_text(call.get("name"), call.get("input", {})) for call in calls)
    kind = "message" if text else "tool_call" if calls else "thinking"
    said = message_of(speaker, "Agent", text or shown or thinking, kind)
    content = without_empty(tool_calls=calls, thinking=thinking if kind != "thinking" else "")
    if content:
        said["Content"] = content
    return said


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
    return {
        name: value
        for name, value in values.items()
        if value or (value is not None and type(value) not in _CONTAINERS)
    }


def texts_in(value: object, name: str) -> str:
    """The text under a name; empty if it is missing."""
    found = value.get(name) if type(value) is dict else None
    return found if type(found) is str else ""


def object_in(value: object, name: str) -> JsonObject:
    """The object under a name; an empty one if it is missing."""
    found = value.get(name) if type(value) is dict else None
    return found if type(found) is dict else {}


def session_in_name(path: Path) -> str:
    """The session id of a file that holds none: its name."""
    return path.name.partition(".")[0]
