"""Claude Code's transcripts: ``~/.claude/projects/<folder>/<session>.jsonl``.

A line is ``{type, uuid, parentUuid, sessionId, timestamp, cwd, gitBranch, isSidechain, …}``;
``user`` and ``assistant`` lines carry ``message`` with ``role`` and ``content`` (text, or blocks
``text``, ``thinking``, ``tool_use``, ``tool_result``, ``image``), ``system`` lines ``content``, and
``summary`` lines ``summary``. A sub-agent's messages are in
``<session>/subagents/agent-<id>.jsonl``, in older versions next to the session or in it, with
``isSidechain``. A session that was resumed repeats its lines in another file under the same
``uuid``. The format is not documented by its makers; this is what files of versions 1 and 2 hold.
"""

from __future__ import annotations

from pathlib import Path

from agent_state.protocols import JsonObject
from agent_state_integrations.recorder.importers.transcript import (
    LogFormat,
    SkippedLineError,
    ToolCalls,
    blocks_of,
    call_text,
    digest_id,
    joined,
    message_of,
    session_in_name,
    text_of,
    texts_in,
    without_empty,
)

TYPES = frozenset({"user", "assistant", "system", "summary"})
"""The types of lines that may hold a message."""
_OTHERS = frozenset(
    {
        "agent-name",
        "ai-title",
        "attachment",
        "custom-title",
        "file-history-snapshot",
        "last-prompt",
        "mode",
        "permission-mode",
        "progress",
        "queue-operation",
    }
)
_MARKS = frozenset({"sessionId", "uuid", "parentUuid"})
_CLAUDE = "claude"


def is_line(line: JsonObject) -> bool:
    """Whether a line is of a transcript."""
    kind = line.get("type")
    if kind == "summary":
        return "leafUuid" in line
    if kind in ("user", "assistant", "system"):
        return not _MARKS.isdisjoint(line) and "payload" not in line
    return type(kind) is str and kind in _OTHERS


class ClaudeCode:
    """The transcript of one session, or of one sub-agent."""

    name: LogFormat = "claude-code"

    def __init__(self, path: Path) -> None:
        self._calls = ToolCalls()
        self._agent = ""
        self._session = session_in_name(path)
        if path.name.startswith("agent-"):
            self._agent = session_in_name(path).removeprefix("agent-")
            if path.parent.name == "subagents":
                self._session = path.parent.parent.name

    def message(self, line: JsonObject, number: int) -> JsonObject:
        kind = line.get("type")
        if type(kind) is not str or kind not in TYPES:
            raise SkippedLineError(f"{kind!s:.60} lines hold no message")
        if line.get("isMeta") is True:
            raise SkippedLineError("put in by the program (isMeta)")
        if kind == "summary":
            said = self._summary(line)
        elif kind == "system":
            said = self._system(line)
        elif line.get("isCompactSummary") is True:
            said = message_of("system", "System", text_of(line.get("message")), "compact_summary")
        elif kind == "user":
            said = self._user(line)
        else:
            said = self._assistant(line)
        return self._placed(line, said)

    def _placed(self, line: JsonObject, said: JsonObject) -> JsonObject:
        """The place and time of the message."""
        said["Id"] = texts_in(line, "uuid") or digest_id("claude-code", line)
        if "timestamp" in line:
            said["Timestamp"] = line["timestamp"]
        said["ContextId"] = texts_in(line, "sessionId") or self._session
        said["Metadata"] = {
            **without_empty(
                source=self.name,
                parent=line.get("parentUuid") or line.get("logicalParentUuid"),
                cwd=line.get("cwd"),
                git_branch=line.get("gitBranch"),
                version=line.get("version"),
                sub_agent=self._sub_agent(line),
            ),
            **said["Metadata"],
        }
        return said

    def _sub_agent(self, line: JsonObject) -> str | None:
        if line.get("isSidechain") is True:
            return texts_in(line, "agentId") or self._agent or "sidechain"
        return self._agent or None

    def _speaker(self, line: JsonObject) -> str:
        agent = self._sub_agent(line)
        return f"{_CLAUDE}/{agent}" if agent else _CLAUDE

    def _summary(self, line: JsonObject) -> JsonObject:
        said = message_of("system", "System", texts_in(line, "summary"), "summary")
        said["Metadata"] |= without_empty(of=line.get("leafUuid"))
        return said

    def _system(self, line: JsonObject) -> JsonObject:
        text = texts_in(line, "content")
        subtype = line.get("subtype", "system")
        if not text:
            raise SkippedLineError(f"system lines without text ({subtype!s:.60})")
        return message_of("system", "System", text, str(subtype))

    def _user(self, line: JsonObject) -> JsonObject:
        message = line.get("message")
        blocks = blocks_of(message.get("content") if type(message) is dict else message)
        results = [block for block in blocks if block.get("type") == "tool_result"]
        if results:
            return self._results(blocks, results)
        said = message_of("user", "User", text_of(blocks), None)
        if agent := self._sub_agent(line):
            # A sub-agent's prompt comes from the agent that started it.
            said |= {"SpeakerName": _CLAUDE, "SpeakerRole": "Agent"}
            said["Metadata"]["receiver"] = f"{_CLAUDE}/{agent}"
        return said

    def _results(self, blocks: list[JsonObject], results: list[JsonObject]) -> JsonObject:
        tool_results = [
            without_empty(
                call=result.get("tool_use_id"),
                tool=self._calls.tool(result.get("tool_use_id")),
                is_error=result.get("is_error") or None,
            )
            for result in results
        ]
        text = joined([*(text_of(result.get("content")) for result in results), text_of(blocks)])
        said = message_of("tool", "Tool", text, "tool_result")
        tools = sorted({result["tool"] for result in tool_results if "tool" in result})
        said["Metadata"] |= without_empty(tools=tools)
        said["Content"] = {"text": text, "tool_results": tool_results}
        return said

    def _assistant(self, line: JsonObject) -> JsonObject:
        message = line.get("message")
        if type(message) is not dict:
            raise SkippedLineError("assistant lines without a message")
        blocks = blocks_of(message.get("content"))
        text = text_of(blocks)
        thinking = joined(texts_in(block, "thinking") for block in blocks)
        calls = [
            without_empty(id=block.get("id"), name=block.get("name"), input=block.get("input"))
            for block in blocks
            if str(block.get("type")).endswith("tool_use")
        ]
        for call in calls:
            self._calls.note(call.get("id"), call.get("name"))
        shown = joined(call_text(call.get("name"), call.get("input", {})) for call in calls)
        kind = "message" if text else "tool_call" if calls else "thinking"
        said = message_of(self._speaker(line), "Agent", text or shown or thinking, kind)
        said["Metadata"] |= without_empty(
            model=message.get("model"),
            api_message=message.get("id"),
            usage=message.get("usage"),
            stop_reason=message.get("stop_reason"),
            is_error=line.get("isApiErrorMessage") or None,
        )
        content = without_empty(tool_calls=calls, thinking=thinking if kind != "thinking" else "")
        if content:
            said["Content"] = {"text": said["Message"], **content}
        if not said["Message"]:
            raise SkippedLineError("assistant lines without text (encrypted thinking)")
        return said
