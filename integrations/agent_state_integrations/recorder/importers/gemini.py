"""Gemini CLI's sessions: ``~/.gemini/tmp/<folder>/chats/session-<minute>-<8 hex digits>.jsonl``.

The first line is ``{sessionId, projectHash, startTime, lastUpdated, kind}``. Then come messages,
``{id, timestamp, type, content}`` with type ``user``, ``gemini``, ``info``, ``error`` or
``warning``, and updates, ``{"$set": {…}}``. A message that changes is written again under its
``id``, and the last line counts. ``gemini`` lines have ``model``, ``tokens``, ``thoughts`` and
``toolCalls`` with the results in them; a ``user`` line with ``functionResponse`` has the results
once more, as the model got them.

The message that is put in first has the same id in every session, so that ids are of a file. A
sub-agent's messages are in ``chats/<session>/<own id>.jsonl``, with ``kind: "subagent"``. A session
that is resumed goes on in its file, and another file has the same ``sessionId`` and repeats some
lines. Older versions write one document, ``{sessionId, projectHash, messages}``. This is what
version 0.61.0 writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain

from agent_state.errors import AgentStateError, StateCorruptedError
from agent_state.protocols import JsonObject
from agent_state.serializers import parse_line
from agent_state_integrations.recorder import formats
from agent_state_integrations.recorder.importers.transcript import (
    COMMAND,
    PROMPT,
    SYSTEM,
    Outcome,
    SkippedLineError,
    TranscriptFile,
    TranscriptFormat,
    blocks_of,
    call_of,
    digest_id,
    joined,
    message_of,
    number_in,
    object_in,
    put_in,
    result_of,
    session_in_name,
    text_of,
    texts_in,
    usage_of,
    without_empty,
)

_GEMINI = "gemini"
_ID = re.compile(rb'\{"id":"([^"\\]+)"')
"""What the tool writes; other programs put keys in another order, and spaces between them."""
_UPDATE = b'{"$'
_PUT_IN = "<session_context>"
_WRAPPER, _WRAPPER_END = "<untrusted_context>\n", "\n</untrusted_context>"
_OUTPUT = "Output: "
_AFTER_OUTPUT = tuple(
    re.compile(form)
    for form in (
        r"Process Group PGID: \d+",
        r"Signal: .*",
        r"Exit Code: (?P<code>-?\d+)",
        r"Error: .*",
    )
)
"""Lines that may follow an output, the last one first."""


def _mark(line: JsonObject) -> str | None:
    if "sessionId" in line and "projectHash" in line:
        return "a first line with sessionId and projectHash"
    return None


class GeminiCli:
    """One session, or one sub-agent."""

    def __init__(self, file: TranscriptFile) -> None:
        self._session = session_in_name(file.path)
        self._about: JsonObject = {}
        self._parent = ""
        folder = file.path.parent
        if folder.parent.name == "chats":
            self._parent = folder.name
        self._last = _last_lines(file)
        self._waiting: dict[str, tuple[int, JsonObject]] = {}
        """Messages that a later line has again, until that line was read: it may be damaged."""
        self._status: dict[str, JsonObject] = {}

    def messages(self, line: JsonObject, number: int) -> Iterator[Outcome]:
        if "$set" in line or "$rewindTo" in line:
            raise SkippedLineError("updates of the session hold no message")
        if "projectHash" in line:
            self._session = texts_in(line, "sessionId") or self._session
            is_agent = line.get("kind") == "subagent"
            self._about = without_empty(
                source=FORMAT.name,
                sub_agent=self._session if is_agent else None,
                parent_context=self._parent if is_agent else None,
            )
            raise SkippedLineError("the first line is kept with what follows")
        name = texts_in(line, "id")
        if name in self._waiting:
            yield self._waiting.pop(name)[0], "a later line has this message"
        if self._last.get(name, number) > number:
            self._waiting[name] = number, line
        else:
            yield number, self._placed(line, name)

    def rest(self) -> Iterator[Outcome]:
        for name, (number, line) in self._waiting.items():
            try:
                yield number, self._placed(line, name)
            except SkippedLineError as why:
                yield number, str(why)

    def _placed(self, line: JsonObject, name: str) -> JsonObject:
        """The message on a line, with its place and time."""
        said = self._message(line)
        if not said["Message"]:
            raise SkippedLineError(f"{texts_in(line, 'type'):.60} lines without text")
        said["Id"] = f"{_GEMINI}/{self._session}/{name or digest_id(line)}"
        if "timestamp" in line:
            said["Timestamp"] = line["timestamp"]
        said["ContextId"] = self._session
        said["Metadata"] = {**self._about, **said["Metadata"]}
        return said

    def _message(self, line: JsonObject) -> JsonObject:
        kind, content = texts_in(line, "type"), line.get("content")
        if kind == "gemini":
            return self._answer(line)
        if kind in ("info", "error", "warning"):
            said = put_in(SYSTEM, text_of(content), kind)
            said["Metadata"] |= without_empty(is_error=kind == "error" or None)
            return said
        if kind != "user":
            raise SkippedLineError(f"{kind:.60} lines hold no message")
        parts = blocks_of(content)
        if any("functionResponse" in part for part in parts):
            return self._results(parts)
        text = text_of(content)
        if text.startswith(_PUT_IN):
            raise SkippedLineError("put in by the program (instructions, environment)")
        if "sub_agent" in self._about:
            said = message_of(_GEMINI, PROMPT, text, "prompt")
            said["Metadata"]["receiver"] = f"{_GEMINI}/{self._session}"
            return said
        if text.startswith("/"):
            return put_in(COMMAND, text, "command")
        return message_of("user", "User", text, "message")

    def _answer(self, line: JsonObject) -> JsonObject:
        called = [call for call in blocks_of(line.get("toolCalls")) if "name" in call]
        calls = [
            without_empty(id=call.get("id"), name=call.get("name"), input=call.get("args"))
            for call in called
        ]
        for call in called:
            self._status[texts_in(call, "id")] = without_empty(status=call.get("status"))
        agent = self._about.get("sub_agent")
        thoughts = blocks_of(line.get("thoughts"))
        said = call_of(
            f"{_GEMINI}/{agent}" if agent else _GEMINI,
            text_of(line.get("content")),
            calls,
            joined(
                joined([texts_in(thought, "subject"), texts_in(thought, "description")])
                for thought in thoughts
            ),
        )
        tokens = object_in(line, "tokens")
        cached, thought = number_in(tokens, "cached"), number_in(tokens, "thoughts")
        said["Metadata"] |= without_empty(
            model=line.get("model"),
            usage=usage_of(
                given=number_in(tokens, "input") + number_in(tokens, "tool") - cached,
                output=number_in(tokens, "output") + thought,
                cache_read=cached,
                reasoning_tokens=thought,
            ),
        )
        return said

    def _results(self, parts: list[JsonObject]) -> JsonObject:
        texts, results = list[str](), list[JsonObject]()
        for part in parts:
            response = object_in(part, "functionResponse")
            given = object_in(response, "response")
            text = texts_in(given, "output") or texts_in(given, "error")
            about = self._status.pop(texts_in(response, "id"), {})
            text, code = _output(text)
            if code is not None:
                about["exit_code"] = code
            failed = "error" in given or bool(about.get("exit_code"))
            texts.append(text)
            results.append(
                without_empty(
                    call=response.get("id"),
                    tool=response.get("name"),
                    is_error=failed or None,
                    about=about,
                )
            )
        return result_of(joined(texts), results)


def _output(text: str) -> tuple[str, int | None]:
    """What a command printed, and its exit code, without the lines that the tool put around it."""
    begin = len(_WRAPPER) if text.startswith(_WRAPPER) else 0
    if not text.startswith(_OUTPUT, begin):
        return text, None
    text = text[begin + len(_OUTPUT) :]
    output, code = text.rstrip(), None
    if output.endswith(("\nError:", "\nSignal:")) and text.startswith(" ", len(output)):
        output += " "  # a label without a value
    output = output.removesuffix(_WRAPPER_END)
    for form in _AFTER_OUTPUT:
        before, newline, last = output.rpartition("\n")
        if newline and (found := form.fullmatch(last)) is not None:
            output = before
            code = int(found["code"]) if "code" in found.groupdict() else code
    return "" if output == "(empty)" else output, code


def _last_lines(file: TranscriptFile) -> dict[str, int]:
    """For each message that is written more than once, the number of its last line."""
    last: dict[str, int] = {}
    more = set[str]()
    try:
        opened = formats.open_file(file.path)
        kind = formats.format_of(file.path) or "jsonl"
        lines = chain.from_iterable(formats.batches(opened, file.path, kind))
        for number, line in enumerate(lines, 1):
            if (name := _id_on(line)) is not None:
                if name in last:
                    more.add(name)
                last[name] = number
    except (OSError, AgentStateError):
        return {}  # reading it says so
    return {name: last[name] for name in more}


def _id_on(line: bytes) -> str | None:
    """The id of the message on a line, which may be torn."""
    if (found := _ID.match(line)) is not None:
        return found[1].decode(errors="replace")
    if line.startswith(_UPDATE):
        return None
    try:
        return texts_in(parse_line(line), "id") or None
    except StateCorruptedError:
        return None


FORMAT = TranscriptFormat(name="gemini", title="Gemini CLI", mark=_mark, reader=GeminiCli)
