"""Codex's rollouts: ``~/.codex/sessions/<year>/<month>/<day>/rollout-<time>-<id>.jsonl``.

A line is ``{timestamp, type, payload}``. Messages are in lines of type ``response_item``;
``event_msg`` lines repeat most of them for the screen, and only errors and interruptions are
taken from them. ``session_meta`` and ``turn_context`` describe the lines that follow.
Older files have the payloads alone: first ``{id, timestamp, instructions, git}``, then items, and
``{"record_type": "state"}`` between them. Source: ``RolloutItem`` and ``ResponseItem`` in
``codex-rs/protocol`` of github.com/openai/codex.
"""

from __future__ import annotations

import re
from pathlib import Path

from agent_state.protocols import JsonObject
from agent_state_integrations.recorder.importers.transcript import (
    LogFormat,
    SkippedLineError,
    ToolCalls,
    call_text,
    digest_id,
    joined,
    message_of,
    session_in_name,
    text_of,
    texts_in,
    without_empty,
)
from agent_state_integrations.recorder.normalize import as_object

TYPES = frozenset({"session_meta", "response_item", "event_msg", "turn_context", "compacted"})
ITEMS = frozenset(
    {
        "message",
        "reasoning",
        "function_call",
        "function_call_output",
        "custom_tool_call",
        "custom_tool_call_output",
        "local_shell_call",
        "web_search_call",
    }
)
_REPEATED = frozenset(
    {
        "user_message",
        "agent_message",
        "agent_reasoning",
        "agent_reasoning_raw_content",
        "item_completed",
    }
)
_NOTICES = frozenset({"error", "stream_error", "warning", "turn_aborted"})
_PUT_IN = re.compile(
    r"\s*(?:<(?:environment_context|user_instructions|permissions instructions|turn_aborted|"
    r"INSTRUCTIONS|collaboration_mode|skill|user_shell_command)\b|# AGENTS\.md instructions)"
)
_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_CODEX = "codex"


def is_line(line: JsonObject) -> bool:
    """Whether a line is of a rollout."""
    if "payload" in line:
        return str(line.get("type")) in TYPES
    if line.get("record_type") == "state" or {"id", "timestamp", "instructions"} <= line.keys():
        return True
    return str(line.get("type")) in ITEMS and not {"uuid", "sender_id", "from"} & line.keys()


class Codex:
    """The rollout of one session."""

    name: LogFormat = "codex"

    def __init__(self, path: Path) -> None:
        found = _ID.findall(path.name)
        self._session = found[-1] if found else session_in_name(path)
        self._named = False
        self._speaker = _CODEX
        self._about: JsonObject = {}
        self._began: object = None
        self._calls = ToolCalls()

    def message(self, line: JsonObject, number: int) -> JsonObject:
        kind, payload, when = self._opened(line)
        if kind == "session_meta":
            self._begin(payload)
            raise SkippedLineError("session_meta is kept with what follows")
        if kind == "turn_context":
            self._about |= without_empty(model=payload.get("model"), cwd=payload.get("cwd"))
            raise SkippedLineError("turn_context is kept with what follows")
        if kind == "compacted":
            said = message_of("system", "System", texts_in(payload, "message"), kind)
        elif kind == "event_msg":
            said = _event(payload)
        elif kind == "inter_agent_communication":
            said = self._agent_message(payload)
        elif kind == "response_item":
            said = self._item(payload)
        else:
            raise SkippedLineError(f"{kind!s:.60} lines hold no message")
        if not said["Message"]:
            raise SkippedLineError(f"{_kind(payload) or kind} without text")
        if when is not None:
            said["Timestamp"] = when
        said["Id"] = digest_id(_CODEX, self._session, when, payload, "payload" in line or number)
        said["ContextId"] = self._session
        said["Metadata"] = {"source": self.name, **self._about, **said["Metadata"]}
        return said

    def _opened(self, line: JsonObject) -> tuple[str, JsonObject, object]:
        """The type of a line, what it holds, and its time; of an older line, too."""
        payload = line.get("payload")
        if type(payload) is dict:
            return str(line.get("type")), payload, line.get("timestamp")
        if "record_type" in line:
            raise SkippedLineError("record_type lines hold no message")
        when = line.get("timestamp", self._began)
        if "type" in line:
            return "response_item", line, when
        if {"id", "timestamp"} <= line.keys():
            return "session_meta", line, when
        raise SkippedLineError("no line of a rollout")

    def _begin(self, payload: JsonObject) -> None:
        if self._named:
            return  # a forked session repeats what it was forked from
        self._named = True
        self._session = texts_in(payload, "id") or texts_in(payload, "session_id") or self._session
        self._began = payload.get("timestamp")
        if nickname := texts_in(payload, "agent_nickname"):
            self._speaker = f"{_CODEX}/{nickname}"
        git = payload.get("git")
        self._about = without_empty(
            cwd=payload.get("cwd"),
            version=payload.get("cli_version"),
            provider=payload.get("model_provider"),
            forked_from=payload.get("forked_from_id"),
            git_branch=texts_in(git, "branch"),
        )

    def _item(self, item: JsonObject) -> JsonObject:
        kind = _kind(item)
        if kind == "message":
            return self._message(item)
        if kind == "agent_message":
            return self._agent_message(item)
        if kind == "reasoning":
            text = joined([text_of(item.get("summary")), text_of(item.get("content"))])
            if not text:
                raise SkippedLineError("reasoning that is encrypted")
            return message_of(self._speaker, "Agent", text, kind)
        if kind.endswith("_output"):
            return self._output(item, kind)
        if kind.endswith("_call"):
            return self._call(item, kind)
        raise SkippedLineError(f"{kind:.60} items hold no message")

    def _message(self, item: JsonObject) -> JsonObject:
        role, text = item.get("role"), text_of(item.get("content"))
        if role not in ("user", "assistant") or (role == "user" and _PUT_IN.match(text)):
            raise SkippedLineError("put in by the program (instructions, environment)")
        if role == "user":
            return message_of("user", "User", text, "message")
        return message_of(self._speaker, "Agent", text, "message")

    def _agent_message(self, item: JsonObject) -> JsonObject:
        author = texts_in(item, "author") or self._speaker
        said = message_of(author, "Agent", text_of(item.get("content")), "agent_message")
        said["Metadata"] |= without_empty(receiver=item.get("recipient"))
        return said

    def _call(self, item: JsonObject, kind: str) -> JsonObject:
        given = next((item[key] for key in ("arguments", "input", "action") if key in item), None)
        tool = item.get("name") or kind.removesuffix("_call")
        call = item.get("call_id") or item.get("id")
        self._calls.note(call, tool)
        said = message_of(self._speaker, "Agent", call_text(tool, given or ""), "tool_call")
        calls = [without_empty(id=call, name=tool, input=given, status=item.get("status"))]
        said["Content"] = {"text": said["Message"], "tool_calls": calls}
        return said

    def _output(self, item: JsonObject, kind: str) -> JsonObject:
        output = item.get("output", item.get("tools"))
        about = None
        if type(output) is str and (found := as_object(output)) and texts_in(found, "output"):
            output, about = (
                found["output"],
                found.get("metadata"),
            )  # the output of a shell, and its metadata
        text = text_of(output)
        if not text and type(output) is not str:
            text = call_text(kind, output)
        tool = self._calls.tool(item.get("call_id"))
        said = message_of("tool", "Tool", text or "(nothing)", "tool_result")
        said["Metadata"] |= without_empty(tools=[tool] if tool else None)
        result = without_empty(call=item.get("call_id"), tool=tool, about=about)
        said["Content"] = {"text": said["Message"], "tool_results": [result]}
        return said


def _event(payload: JsonObject) -> JsonObject:
    kind = _kind(payload)
    if kind in _REPEATED:
        raise SkippedLineError(f"{kind} repeats a response item")
    if kind not in _NOTICES:
        raise SkippedLineError(f"{kind:.60} events hold no message")
    text = texts_in(payload, "message") or texts_in(payload, "reason")
    return message_of("system", "System", text, kind)


def _kind(payload: JsonObject) -> str:
    return texts_in(payload, "type")
