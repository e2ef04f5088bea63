"""Codex's rollouts: ``~/.codex/sessions/<year>/<month>/<day>/rollout-<local time>-<id>.jsonl``.

A line is ``{timestamp, ordinal, type, payload}``. Messages are in lines of type ``response_item``;
``event_msg`` lines repeat most of them for the screen. ``session_meta`` and ``turn_context``
describe the lines that follow. Only events say

- that a turn failed: ``task_complete.error``, or ``error`` in older versions;
- how a command ended: ``item_completed`` with ``CommandExecution``, before the command's output;
- what a response cost: a ``token_usage_record`` line (in older versions a ``token_count`` event)
  after the items of the response, of which the last gets it.

A fork is a file with ``forked_from_id`` and without the past. A sub-agent has a file of its own,
with its parent's id in ``session_id`` and ``parent_thread_id``; its prompt looks like a person's
message. A compaction is an ordinary message with the summary, and then a line ``compacted`` with it
again. Older files have the payloads alone: first ``{id, timestamp, instructions, git}``, then
items, and ``{"record_type": "state"}`` between them. Source: ``RolloutItem`` and ``ResponseItem``
in ``codex-rs/protocol`` of github.com/openai/codex, and what versions up to 0.171.0 write.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from agent_state.protocols import JsonObject
from agent_state_integrations.recorder.importers.transcript import (
    INTERRUPTION,
    NOTIFICATION,
    PROMPT,
    SYSTEM,
    Outcome,
    SkippedLineError,
    ToolCalls,
    TranscriptFile,
    TranscriptFormat,
    call_text,
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
    {"user_message", "agent_message", "agent_reasoning", "agent_reasoning_raw_content"}
)
_NOTICES = frozenset({"error", "stream_error", "warning"})
_PUT_IN = re.compile(
    r"\s*(?:<(?:environment_context|user_instructions|permissions instructions|turn_aborted|"
    r"INSTRUCTIONS|collaboration_mode|skill|user_shell_command)\b|# AGENTS\.md instructions)"
)
_NEWS = "<subagent_notification>"
_IMAGE_WRAPPER = re.compile(r"\s*</?image\b[^>]*>\s*")
_OUTPUT_HEAD = re.compile(
    r"(?:Chunk ID: [^\n]*\n)?(?:Wall time: ([\d.]+) seconds\n)?"
    r"(?:Process exited with code (-?\d+)\n)?(?:Process running with session ID (\d+)\n)?"
    r"(?:Original token count: \d+\n)?Output:\n"
)
_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_IGNORED = re.compile(
    rb'.{0,120}"type":"(?:(world_state)|event_msg","payload":\{"type":"'
    rb'(thread_settings_applied))"'
)
_CODEX = "codex"
_COMMANDS_KEPT = 1000


def _mark(line: JsonObject) -> str | None:
    kind = texts_in(line, "type")
    if type(line.get("payload")) is dict and kind in TYPES and "timestamp" in line:
        return f"a line {kind} with timestamp and payload"
    if line.get("record_type") == "state":
        return "record_type state"
    if {"id", "timestamp", "instructions"} <= line.keys():
        return "a first line with id, timestamp and instructions"
    if kind in ITEMS - {"message"} and ("call_id" in line or "summary" in line):
        return f"an item {kind} of the responses API"
    return None


def _ignores(line: bytes) -> str | None:
    found = _IGNORED.match(line)
    if found is None:
        return None
    return f"{(found[1] or found[2]).decode()} lines hold no message"


class Codex:
    """The rollout of one session, or of one sub-agent."""

    def __init__(self, file: TranscriptFile) -> None:
        found = _ID.findall(file.path.name)
        self._session = found[-1] if found else session_in_name(file.path)
        self._named = False
        self._speaker = _CODEX
        self._parent = ""
        self._about: JsonObject = {}
        self._turn = ""
        self._began: object = None
        self._calls = ToolCalls()
        self._commands: dict[str, JsonObject] = {}
        self._has_records = False
        self._held: tuple[int, JsonObject] | None = None
        """The last item of the model, which may get the usage of its response."""

    def messages(self, line: JsonObject, number: int) -> Iterator[Outcome]:
        kind, payload, when = self._opened(line)
        if kind == "token_usage_record":
            self._has_records = True
            yield from self._counted(object_in(payload, "usage"), payload.get("response_id"))
            raise SkippedLineError("token_usage_record is kept with its response")
        if kind == "event_msg" and _kind(payload) == "token_count":
            if not self._has_records:
                usage = object_in(object_in(payload, "info"), "last_token_usage")
                yield from self._counted(usage, None)
            raise SkippedLineError("token_count is kept with its response")
        if kind == "compacted" and self._held is not None:
            held, self._held = self._held, None
            if held[1]["Message"] and held[1]["Message"] in texts_in(payload, "message"):
                yield held[0], "the compaction repeats it"
            else:
                yield held
        said = self._message_on(kind, payload)
        if not said["Message"]:
            raise SkippedLineError(f"{_kind(payload) or kind} without text")
        if when is not None:
            said["Timestamp"] = when
        said["Id"] = digest_id(_CODEX, self._session, when, payload, "payload" in line or number)
        said["ContextId"] = self._session
        said["Metadata"] = {
            "source": FORMAT.name,
            **self._about,
            **without_empty(turn=self._turn),
            **said["Metadata"],
        }
        yield from self.rest()
        if said["SpeakerRole"] == "Agent" and "message_type" in said["Metadata"]:
            self._held = number, said
        else:
            yield number, said

    def rest(self) -> Iterator[Outcome]:
        held, self._held = self._held, None
        if held is not None:
            yield held

    def _counted(self, usage: JsonObject, response: object) -> Iterator[Outcome]:
        """The last item, with the usage of its response."""
        if self._held is None:
            return
        cached = number_in(usage, "cached_input_tokens")
        found = usage_of(
            given=number_in(usage, "input_tokens") - cached,
            output=number_in(usage, "output_tokens"),
            cache_read=cached,
            cache_write=number_in(usage, "cache_write_input_tokens"),
            reasoning_tokens=number_in(usage, "reasoning_output_tokens"),
        )
        self._held[1]["Metadata"] |= without_empty(usage=found, response=response)
        yield from self.rest()

    def _message_on(self, kind: str, payload: JsonObject) -> JsonObject:
        if kind == "session_meta":
            self._begin(payload)
            raise SkippedLineError("session_meta is kept with what follows")
        if kind == "turn_context":
            self._about |= without_empty(model=payload.get("model"), cwd=payload.get("cwd"))
            self._turn = texts_in(payload, "turn_id") or self._turn
            raise SkippedLineError("turn_context is kept with what follows")
        if kind == "compacted":
            return put_in(SYSTEM, texts_in(payload, "message"), kind)
        if kind == "event_msg":
            return self._event(payload)
        if kind == "inter_agent_communication":
            return self._agent_message(payload)
        if kind == "response_item":
            return self._item(payload)
        raise SkippedLineError(f"{kind!s:.60} lines hold no message")

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
            return  # in older versions a forked session repeats what it was forked from
        self._named = True
        self._session = texts_in(payload, "id") or texts_in(payload, "session_id") or self._session
        self._began = payload.get("timestamp")
        if nickname := texts_in(payload, "agent_nickname"):
            self._speaker = f"{_CODEX}/{nickname}"
        self._parent = texts_in(payload, "parent_thread_id")
        forked = texts_in(payload, "forked_from_id")
        self._about = without_empty(
            cwd=payload.get("cwd"),
            version=payload.get("cli_version"),
            provider=payload.get("model_provider"),
            forked_from=forked,
            parent_context=self._parent or forked,
            sub_agent=(nickname or self._session) if self._parent else None,
            git_branch=texts_in(payload.get("git"), "branch"),
        )

    def _event(self, payload: JsonObject) -> JsonObject:
        kind = _kind(payload)
        if kind == "item_completed":
            self._completed(object_in(payload, "item"))
            raise SkippedLineError("item_completed is kept with its response item")
        if kind in _REPEATED:
            raise SkippedLineError(f"{kind} repeats a response item")
        if kind == "task_started":
            self._turn = texts_in(payload, "turn_id") or self._turn
        error = payload.get("error") if kind == "task_complete" else None
        if error:
            text = texts_in(error, "message")
            inner = texts_in(object_in(as_object(text), "error"), "message")
            said = put_in(SYSTEM, inner or text or str(error), "turn_failed")
            said["Metadata"] |= without_empty(
                is_error=True, reason=error.get("codex_error_info") if type(error) is dict else None
            )
            return said
        if kind == "turn_aborted":
            return put_in(INTERRUPTION, texts_in(payload, "reason") or kind, kind)
        if kind not in _NOTICES:
            raise SkippedLineError(f"{kind:.60} events hold no message")
        said = put_in(SYSTEM, texts_in(payload, "message"), kind)
        said["Metadata"] |= without_empty(is_error=kind != "warning" or None)
        return said

    def _completed(self, item: JsonObject) -> None:
        """Keep how a command ended until its output comes."""
        if texts_in(item, "type") != "CommandExecution":
            return
        duration = object_in(item, "duration")
        seconds = number_in(duration, "secs") + number_in(duration, "nanos") / 1e9
        about = without_empty(status=item.get("status"), seconds=round(seconds, 6) or None)
        if type(item.get("exit_code")) is int:
            about["exit_code"] = item["exit_code"]
        self._commands[texts_in(item, "id")] = about
        if len(self._commands) > _COMMANDS_KEPT:
            del self._commands[next(iter(self._commands))]

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
        role, content = item.get("role"), item.get("content")
        if type(content) is list:
            content = [
                block
                for block in content
                if type(block) is not dict or not _IMAGE_WRAPPER.fullmatch(texts_in(block, "text"))
            ]
        text = text_of(content)
        if role == "assistant":
            return message_of(self._speaker, "Agent", text, "message")
        if role == "user" and text.startswith(_NEWS):
            return put_in(NOTIFICATION, text, "subagent_notification")
        if role != "user" or _PUT_IN.match(text):
            raise SkippedLineError("put in by the program (instructions, environment)")
        if self._parent:
            said = message_of(_CODEX, PROMPT, text, "prompt")
            said["Metadata"]["receiver"] = self._speaker
            return said
        return message_of("user", "User", text, "message")

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
        said["Content"] = {"tool_calls": calls}
        return said

    def _output(self, item: JsonObject, kind: str) -> JsonObject:
        output = item.get("output", item.get("tools"))
        about: JsonObject = {}
        if type(output) is str and (found := as_object(output)) and texts_in(found, "output"):
            # the output of a shell in older versions, and its metadata
            output, about = found["output"], object_in(found, "metadata")
        if type(output) is str and (head := _OUTPUT_HEAD.match(output)) is not None:
            output = output[head.end() :]
            if head[2]:
                about = {"exit_code": int(head[2])}
            about |= without_empty(running=head[3])
        text = text_of(output)
        if not text and type(output) is not str:
            text = call_text(kind, output)
        call = item.get("call_id")
        if type(call) is str:
            about = {**about, **self._commands.pop(call, {})}
        failed = about.get("status") == "failed" or about.get("exit_code", 0) != 0
        result = without_empty(
            call=call, tool=self._calls.tool(call), about=about, is_error=failed or None
        )
        return result_of(text, [result])


def _kind(payload: JsonObject) -> str:
    return texts_in(payload, "type")


FORMAT = TranscriptFormat(name="codex", title="Codex", mark=_mark, reader=Codex, ignores=_ignores)
