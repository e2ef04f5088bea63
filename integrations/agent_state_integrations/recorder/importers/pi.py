"""Sessions of the coding agent pi: ``~/.pi/agent/sessions/<folder>/<time>_<session>.jsonl``.

The first line is ``{type: "session", version, id, timestamp, cwd}``; a fork has ``parentSession``,
the path of the file that it is from. Then come entries, ``{type, id, parentId, timestamp, …}``.
Those of type ``message`` carry ``message`` with ``role`` (``user``, ``assistant``, ``toolResult``,
``bashExecution``) and ``content``, blocks ``text``, ``thinking``, ``toolCall``, ``image``; answers
have ``model``, ``usage``, ``stopReason`` and ``errorMessage``. ``compaction`` and
``branch_summary`` carry ``summary``.

Ids have eight digits and are of one file. A fork repeats entries that are older than its first line
under the same ids. This is what versions 1 to 3 of the format are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from agent_state.errors import StateCorruptedError
from agent_state.protocols import JsonObject
from agent_state.serializers import parse_line
from agent_state_integrations.recorder.importers.transcript import (
    COMMAND,
    NOTIFICATION,
    SYNTHETIC,
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

_PI = "pi"
_EXIT = re.compile(r"\n*Command exited with code (-?\d+)\s*$")
_DEEPEST = 50
"""Forks of forks that are followed."""


def _mark(line: JsonObject) -> str | None:
    if (
        line.get("type") == "session"
        and "id" in line
        and ("cwd" in line or "parentSession" in line)
    ):
        return "a first line of type session with id and cwd"
    if "parentId" in line and "role" in object_in(line, "message"):
        return "parentId and message.role"
    return None


class PiSession:
    """One session."""

    def __init__(self, file: TranscriptFile) -> None:
        self._session = file.path.stem.rpartition("_")[2] or session_in_name(file.path)
        self._began = ""
        self._ancestors: list[tuple[str, str]] = []
        """Where this was forked from, the nearest first: the session, and when it began."""
        self._about: JsonObject = {}
        self._model: object = None

    def messages(self, line: JsonObject, number: int) -> Iterator[Outcome]:
        kind = texts_in(line, "type")
        if kind == "session":
            self._begin(line)
            raise SkippedLineError("the first line is kept with what follows")
        if kind == "message":
            said = self._message(object_in(line, "message"))
        elif kind in ("compaction", "branch_summary"):
            said = put_in(SYSTEM, texts_in(line, "summary"), kind)
        elif kind == "custom_message":
            said = put_in(NOTIFICATION, text_of(line.get("content")), "custom_message")
        else:
            if kind == "model_change":
                self._model = line.get("modelId")
            raise SkippedLineError(f"{kind:.60} lines hold no message")
        if not said["Message"]:
            raise SkippedLineError(f"{kind} lines without text")
        when = texts_in(line, "timestamp")
        session = self._session_of(when)
        said["Id"] = f"{_PI}/{session}/{texts_in(line, 'id') or digest_id(line)}"
        if when:
            said["Timestamp"] = when
        said["ContextId"] = session
        parent = texts_in(line, "parentId")
        forked = self._ancestors[0][0] if self._ancestors and session == self._session else None
        said["Metadata"] = {
            **self._about,
            **without_empty(parent=parent, forked_from=forked, parent_context=forked),
            **said["Metadata"],
        }
        yield number, said

    def rest(self) -> Iterator[Outcome]:
        return iter(())

    def _begin(self, line: JsonObject) -> None:
        self._session = texts_in(line, "id") or self._session
        self._began = texts_in(line, "timestamp")
        self._ancestors = list(_ancestors(texts_in(line, "parentSession")))
        self._about = without_empty(source=FORMAT.name, cwd=line.get("cwd"))

    def _session_of(self, when: str) -> str:
        """The session in which an entry was written: the latest that had begun by then."""
        if not when or when >= self._began or not self._ancestors:
            return self._session
        for session, began in self._ancestors:
            if when >= began:
                return session
        return self._ancestors[-1][0]

    def _message(self, message: JsonObject) -> JsonObject:
        role, content = message.get("role"), message.get("content")
        if role == "user":
            return message_of("user", "User", text_of(content), "message")
        if role == "assistant":
            return self._answer(message)
        if role == "toolResult":
            return _result(message)
        if role == "bashExecution":
            text = joined([texts_in(message, "command"), texts_in(message, "output")])
            return put_in(COMMAND, text, "command")
        return put_in(NOTIFICATION, text_of(content), str(role))

    def _answer(self, message: JsonObject) -> JsonObject:
        blocks = blocks_of(message.get("content"))
        calls = [
            without_empty(id=block.get("id"), name=block.get("name"), input=block.get("arguments"))
            for block in blocks
            if block.get("type") == "toolCall"
        ]
        thinking = joined(texts_in(block, "thinking") for block in blocks)
        said = call_of(_PI, text_of(blocks), calls, thinking)
        error = texts_in(message, "errorMessage")
        if error and not said["Message"]:
            said = put_in(SYNTHETIC, error, "api_error")
        usage = object_in(message, "usage")
        said["Metadata"] |= without_empty(
            model=message.get("model") or self._model,
            provider=message.get("provider"),
            stop_reason=message.get("stopReason"),
            is_error=bool(error) or None,
            error=error if said["Message"] != error else None,
            response=message.get("responseId"),
            usage=usage_of(
                given=number_in(usage, "input"),
                output=number_in(usage, "output"),
                cache_read=number_in(usage, "cacheRead"),
                cache_write=number_in(usage, "cacheWrite"),
            ),
        )
        return said


def _result(message: JsonObject) -> JsonObject:
    text = text_of(message.get("content"))
    about: JsonObject = {}
    if (found := _EXIT.search(text)) is not None:
        text, about = text[: found.start()], {"exit_code": int(found[1])}
    return result_of(
        text,
        [
            without_empty(
                call=message.get("toolCallId"),
                tool=message.get("toolName"),
                is_error=message.get("isError") or None,
                about=about,
            )
        ],
    )


def _ancestors(parent: str) -> Iterator[tuple[str, str]]:
    """The sessions before a fork. The name of a file has its session; its first line the rest."""
    for _ in range(_DEEPEST):
        if not parent:
            return
        path, header = Path(parent), {}
        try:
            with path.open("rb") as file:
                header = parse_line(file.readline())
        except (OSError, StateCorruptedError):
            pass  # it was removed: what its name says has to do
        session = texts_in(header, "id") or path.stem.rpartition("_")[2]
        yield session, texts_in(header, "timestamp")
        parent = texts_in(header, "parentSession")


FORMAT = TranscriptFormat(name="pi", title="pi", mark=_mark, reader=PiSession)
