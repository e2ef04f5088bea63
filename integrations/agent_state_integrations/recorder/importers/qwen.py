"""Qwen Code's transcripts: ``~/.qwen/projects/<folder>/chats/<session>.jsonl``.

A line is ``{uuid, parentUuid, sessionId, timestamp, type, provenance, cwd, version, …}``. ``user``,
``assistant`` and ``tool_result`` lines carry ``message`` with ``role`` (``user`` or ``model``) and
``parts``: ``{text}``, ``{text, thought}``, ``{functionCall}``, ``{functionResponse}``.
``assistant`` lines have ``model`` and ``usageMetadata``, ``tool_result`` lines ``toolCallResult``
with the status and, for a command, its plain output and exit code. ``system`` lines are telemetry
that repeats the answers; only there is a request that failed (``qwen-code.api_error``).

A sub-agent's messages are in ``subagents/<session>/agent-<id>.jsonl``, with ``agentId`` and
``isSidechain``. A fork repeats lines under the same ``uuid`` with another ``sessionId``, and names
the original in ``forkedFrom``. This is what version 0.24.4 writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from agent_state.protocols import JsonObject
from agent_state_integrations.recorder.importers.transcript import (
    COMMAND,
    NOTIFICATION,
    PROMPT,
    SYSTEM,
    Outcome,
    SkippedLineError,
    ToolCalls,
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
    texts_in,
    usage_of,
    without_empty,
)

_QWEN = "qwen"
_TELEMETRY = re.compile(rb'.{0,600}"subtype":"(?:ui_telemetry|attribution_snapshot)"')
_PERSON = frozenset({"", "real_user"})
_OUTPUT = re.compile(
    r"Command: .*?\nDirectory: [^\n]*\nOutput: (.*?)\nError: .*?\nExit Code: (\S+)\n", re.DOTALL
)


def _mark(line: JsonObject) -> str | None:
    if "uuid" not in line or "sessionId" not in line:
        return None
    if type(object_in(line, "message").get("parts")) is list:
        return "uuid, sessionId and message.parts"
    if line.get("type") == "system" and "systemPayload" in line:
        return "uuid, sessionId and systemPayload"
    return None


def _ignores(line: bytes) -> str | None:
    if _TELEMETRY.match(line) is None or b'"qwen-code.api_error"' in line[:900]:
        return None
    return "telemetry repeats the messages"


class QwenCode:
    """The transcript of one session, or of one sub-agent."""

    def __init__(self, file: TranscriptFile) -> None:
        self._session = session_in_name(file.path)
        self._calls = ToolCalls()
        self._origin = ""
        """The session that this one was forked from."""

    def messages(self, line: JsonObject, number: int) -> Iterator[Outcome]:
        kind = texts_in(line, "type")
        parts = blocks_of(object_in(line, "message").get("parts"))
        if kind == "system":
            said = _failure(line)
        elif kind == "tool_result" or any("functionResponse" in part for part in parts):
            said = self._result(line, parts)
        elif kind == "assistant":
            said = self._assistant(line, parts)
        elif kind == "user":
            said = self._user(line, parts)
        else:
            raise SkippedLineError(f"{kind:.60} lines hold no message")
        if not said["Message"]:
            raise SkippedLineError(f"{kind} lines without text")
        forked = texts_in(line.get("forkedFrom"), "sessionId")
        said["Id"] = texts_in(line, "uuid") or digest_id(_QWEN, self._session, line)
        if "timestamp" in line:
            said["Timestamp"] = line["timestamp"]
        # What a fork repeats stays with the session that it is from.
        session = forked or texts_in(line, "sessionId") or self._session
        said["ContextId"] = session
        self._origin = forked or self._origin
        said["Metadata"] = {
            **without_empty(
                source=FORMAT.name,
                parent=line.get("parentUuid"),
                cwd=line.get("cwd"),
                git_branch=line.get("gitBranch"),
                version=line.get("version"),
                sub_agent=line.get("agentId"),
                forked_from=None if forked else self._origin,
                parent_context=None if forked else self._origin,
            ),
            **said["Metadata"],
        }
        yield number, said

    def rest(self) -> Iterator[Outcome]:
        return iter(())

    def _speaker(self, line: JsonObject) -> str:
        agent = texts_in(line, "agentId")
        return f"{_QWEN}/{agent}" if agent else _QWEN

    def _user(self, line: JsonObject, parts: list[JsonObject]) -> JsonObject:
        text = joined(texts_in(part, "text") for part in parts)
        provenance = texts_in(line, "provenance")
        if line.get("isSidechain") is True:
            said = message_of(_QWEN, PROMPT, text, "prompt")
            said["Metadata"]["receiver"] = self._speaker(line)
            return said
        if provenance in _PERSON and not text.startswith(
            ("<task-notification>", "<system-reminder>")
        ):
            return message_of("user", "User", text, "message")
        role = COMMAND if "command" in provenance else NOTIFICATION
        return put_in(role, text, provenance or "notification")

    def _assistant(self, line: JsonObject, parts: list[JsonObject]) -> JsonObject:
        called = [object_in(part, "functionCall") for part in parts if "functionCall" in part]
        calls = [
            without_empty(id=call.get("id"), name=call.get("name"), input=call.get("args"))
            for call in called
        ]
        for call in calls:
            self._calls.note(call.get("id"), call.get("name"))
        said = call_of(
            self._speaker(line),
            joined(texts_in(part, "text") for part in parts if part.get("thought") is not True),
            calls,
            joined(texts_in(part, "text") for part in parts if part.get("thought") is True),
        )
        usage = line.get("usageMetadata")
        cached = number_in(usage, "cachedContentTokenCount")
        said["Metadata"] |= without_empty(
            model=line.get("model"),
            usage=usage_of(
                given=number_in(usage, "promptTokenCount") - cached,
                output=number_in(usage, "candidatesTokenCount"),
                cache_read=cached,
                reasoning_tokens=number_in(usage, "thoughtsTokenCount"),
            ),
        )
        return said

    def _result(self, line: JsonObject, parts: list[JsonObject]) -> JsonObject:
        outcome = object_in(line, "toolCallResult")
        shown = object_in(outcome, "resultDisplay")
        texts, results = list[str](), list[JsonObject]()
        for part in parts:
            response = object_in(part, "functionResponse")
            given = object_in(response, "response")
            text = texts_in(given, "output") or texts_in(given, "error")
            about = without_empty(status=outcome.get("status"))
            if (found := _OUTPUT.match(text)) is not None:
                text = "" if found[1] == "(empty)" else found[1]
                if found[2].lstrip("-").isdigit():
                    about["exit_code"] = int(found[2])
            if shown.get("type") == "shell_result":
                text = texts_in(shown, "output") or text
                if type(shown.get("exitCode")) is int:
                    about["exit_code"] = shown["exitCode"]
            failed = "error" in given or outcome.get("status") == "error"
            call = response.get("id")
            tool = response.get("name") or self._calls.tool(call)
            texts.append(text)
            results.append(
                without_empty(call=call, tool=tool, is_error=failed or None, about=about)
            )
        return result_of(joined(texts), results)


def _failure(line: JsonObject) -> JsonObject:
    """A request that failed; no other telemetry says what the messages do not say."""
    event = object_in(object_in(line, "systemPayload"), "uiEvent")
    if texts_in(event, "event.name") != "qwen-code.api_error":
        raise SkippedLineError("telemetry repeats the messages")
    said = put_in(SYSTEM, texts_in(event, "error_message"), "api_error")
    said["Metadata"] |= without_empty(
        is_error=True, status=event.get("status_code"), turn=event.get("prompt_id")
    )
    return said


FORMAT = TranscriptFormat(
    name="qwen", title="Qwen Code", mark=_mark, reader=QwenCode, ignores=_ignores
)
