"""Claude Code's transcripts: ``~/.claude/projects/<folder>/<session>.jsonl``.

A line is ``{type, uuid, parentUuid, sessionId, timestamp, cwd, gitBranch, isSidechain, promptId,
…}``; ``user`` and ``assistant`` lines carry ``message`` with ``role`` and ``content`` (text, or
blocks ``text``, ``thinking``, ``tool_use``, ``tool_result``, ``image``), ``system`` lines
``content``, and ``summary`` lines ``summary``. All other types describe requests, settings and the
queue.

- A response has a line for each block, each with the usage of the whole response, and in older
  versions with what was known of it by then: what a line adds to the lines before it is counted.
- A sub-agent's messages are in ``<session>/subagents/agent-<id>.jsonl``, in older versions next to
  the session or in it, with ``isSidechain``. Its first line repeats the prompt of the call.
- A fork, and in older versions a resumed session, repeats lines under the same ``uuid`` with
  another ``sessionId``, and nothing says so. Only lines without a ``uuid`` have the time at which a
  file was begun.
- A large output is in ``<session>/tool-results/<name>.txt``, and the line has its beginning.
- A compaction is two lines: ``compact_boundary`` with its figures, then the summary.

The format is not documented by its makers; this is what versions 1 to 2.1.332 write.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from agent_state.protocols import JsonObject
from agent_state_integrations.recorder.importers.transcript import (
    COMMAND,
    HOOK,
    INTERRUPTION,
    LARGEST_OUTPUT,
    NOTIFICATION,
    PROMPT,
    SYNTHETIC,
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
    text_of,
    texts_in,
    usage_of,
    without_empty,
)

TYPES = frozenset({"user", "assistant", "system", "summary"})
"""The types of lines that may hold a message."""
_CLAUDE = "claude"
_TYPE_FIRST = re.compile(rb'\{"type":"([a-z-]+)"')
_ATTACHMENT = re.compile(rb'"attachment":\{"type":"([a-z_]+)"')
_UUID = re.compile(rb'"uuid":"([0-9a-f-]{36})"')
_TIME = re.compile(rb'"timestamp":"([^"]{10,40})"')
_OF_FILE = frozenset({b"queue-operation", b"api-request", b"api-request-shape"})
"""Lines that a fork does not copy, and which have a time."""
_HEAD = 1024 * 1024
"""Bytes in which the first message of a file is looked for."""
_TAG = re.compile(r"\s*<(/?[a-z-]+)>")
_INNER = re.compile(r"<[a-z-]+>(.*?)</[a-z-]+>", re.DOTALL)
_COMMANDS = frozenset({"command-name", "command-message", "bash-input"})
_OUTPUTS = frozenset({"local-command-stdout", "local-command-stderr", "bash-stdout", "bash-stderr"})
_NEWS = frozenset({"task-notification", "agent-notification", "system-reminder"})
_EXIT = re.compile(r"(?:Error: )?Exit code (\d+)\n?")
_WRAPPED = re.compile(r"\s*<tool_use_error>(.*)</tool_use_error>\s*", re.DOTALL)
_PERSISTED = re.compile(r"\s*<persisted-output>.*?saved to: ([^\n]+)", re.DOTALL)


def _mark(line: JsonObject) -> str | None:
    kind = texts_in(line, "type")
    if kind == "summary" and "leafUuid" in line:
        return "a summary with leafUuid"
    message = object_in(line, "message")
    if "parts" in message or "payload" in line or not texts_in(line, "uuid"):
        return None
    if kind not in TYPES or "parentUuid" not in line:
        return None
    if "isSidechain" in line:
        return "uuid, parentUuid and isSidechain, without parts"
    if "content" in message and "sessionId" in line:  # other tools have lines without a message too
        return "uuid, parentUuid, sessionId and message.content"
    return None


def _ignores(line: bytes) -> str | None:
    first = _TYPE_FIRST.match(line)
    if first is not None:
        kind = first[1].decode()
        return None if kind in TYPES else f"{kind} lines hold no message"
    attachment = _ATTACHMENT.search(line, 0, 400)
    if attachment is not None and not attachment[1].startswith(b"hook"):
        return "attachment lines hold no message"
    return None


class ClaudeCode:
    """The transcript of one session, or of one sub-agent."""

    def __init__(self, file: TranscriptFile) -> None:
        path = file.path
        self._calls = ToolCalls()
        self._agent = ""
        self._session = session_in_name(path)
        self._folder = path.parent / self._session
        self._about = file.about
        self._turn = ""
        self._response: object = None
        self._counted: JsonObject = {}
        self._boundary: tuple[int, JsonObject] | None = None
        if path.name.startswith("agent-"):
            self._agent = session_in_name(path).removeprefix("agent-")
            if path.parent.name == "subagents":
                self._session = path.parent.parent.name
                self._folder = path.parent.parent

    def messages(self, line: JsonObject, number: int) -> Iterator[Outcome]:
        kind = line.get("type")
        is_summary = line.get("isCompactSummary") is True
        boundary, self._boundary = self._boundary, None
        if boundary is not None and not is_summary:
            yield boundary
        if kind == "attachment":
            said = self._hook(line)
        elif type(kind) is not str or kind not in TYPES:
            raise SkippedLineError(f"{kind!s:.60} lines hold no message")
        elif line.get("isMeta") is True:
            raise SkippedLineError("put in by the program (isMeta)")
        elif kind == "summary":
            said = put_in(SYSTEM, texts_in(line, "summary"), "summary")
            said["Metadata"] |= without_empty(of=line.get("leafUuid"))
        elif kind == "system":
            said = self._system(line)
        elif is_summary:
            said = put_in(SYSTEM, text_of(line.get("message")), "compact_summary")
            if boundary is not None:
                yield boundary[0], "the summary of the compaction follows"
                said["Metadata"] |= {"compaction": boundary[1]["Metadata"].get("compaction")}
        elif kind == "user":
            said = self._user(line)
        else:
            said = self._assistant(line)
        said = self._placed(line, said)
        if line.get("subtype") == "compact_boundary":
            self._boundary = number, said
        else:
            yield number, said

    def rest(self) -> Iterator[Outcome]:
        if self._boundary is not None:
            yield self._boundary

    def _placed(self, line: JsonObject, said: JsonObject) -> JsonObject:
        """The place and time of the message."""
        self._turn = texts_in(line, "promptId") or self._turn
        said["Id"] = texts_in(line, "uuid") or digest_id("claude-code", line)
        if "timestamp" in line:
            said["Timestamp"] = line["timestamp"]
        said["ContextId"] = texts_in(line, "sessionId") or self._session
        said["Metadata"] = {
            **without_empty(
                source=FORMAT.name,
                parent=line.get("parentUuid") or line.get("logicalParentUuid"),
                turn=self._turn,
                cwd=line.get("cwd"),
                git_branch=line.get("gitBranch"),
                version=line.get("version"),
                sub_agent=self._sub_agent(line),
            ),
            **self._about,
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

    def _hook(self, line: JsonObject) -> JsonObject:
        attachment = object_in(line, "attachment")
        kind = texts_in(attachment, "type")
        text = joined(texts_in(attachment, name) for name in ("content", "stdout", "stderr"))
        if not kind.startswith("hook") or not text:
            raise SkippedLineError("attachment lines hold no message")
        said = put_in(HOOK, text, kind)
        said["Metadata"] |= without_empty(
            hook=attachment.get("hookName"), exit_code=attachment.get("exitCode")
        )
        return said

    def _system(self, line: JsonObject) -> JsonObject:
        subtype = str(line.get("subtype", "system"))
        text = texts_in(line, "content")
        if subtype == "local_command":
            return put_in(COMMAND, _inner(text), "command_output")
        if subtype == "api_error":
            error = object_in(line, "error")
            text = text or texts_in(error, "formatted") or texts_in(error, "message")
        if not text:
            raise SkippedLineError(f"system lines without text ({subtype:.60})")
        said = put_in(SYSTEM, text, subtype)
        said["Metadata"] |= without_empty(
            is_error=line.get("level") == "error" or None,
            status=object_in(line, "error").get("status"),
            retry=line.get("retryAttempt"),
            compaction=_figures(line.get("compactMetadata")),
        )
        return said

    def _user(self, line: JsonObject) -> JsonObject:
        message = line.get("message")
        blocks = blocks_of(message.get("content") if type(message) is dict else message)
        results = [block for block in blocks if block.get("type") == "tool_result"]
        if results:
            return self._results(line, blocks, results)
        text = text_of(blocks)
        if (said := _put_in_by_program(line, text)) is not None:
            return said
        if agent := self._sub_agent(line):
            # A sub-agent's prompt comes from the agent that started it.
            said = message_of(_CLAUDE, PROMPT, text, "prompt")
            said["Metadata"]["receiver"] = f"{_CLAUDE}/{agent}"
            return said
        return message_of("user", "User", text, None)

    def _results(
        self, line: JsonObject, blocks: list[JsonObject], results: list[JsonObject]
    ) -> JsonObject:
        outcome = line.get("toolUseResult")
        found, texts = list[JsonObject](), list[str]()
        for result in results:
            text, about = self._output(text_of(result.get("content")), outcome)
            texts.append(text)
            found.append(
                without_empty(
                    call=result.get("tool_use_id"),
                    tool=self._calls.tool(result.get("tool_use_id")),
                    is_error=result.get("is_error") or None,
                    about=about,
                )
            )
        return result_of(joined([*texts, text_of(blocks)]), found)

    def _output(self, text: str, outcome: object) -> tuple[str, JsonObject]:
        """What the tool gave, without what was put around it, and what is known about it."""
        if (wrapped := _WRAPPED.fullmatch(text)) is not None:
            return wrapped[1], {}
        if text.startswith("[Subagent hand-back]"):
            return text_of(outcome) or text, without_empty(agent=texts_in(outcome, "agentId"))
        if (persisted := _PERSISTED.match(text)) is not None:
            return self._kept_output(persisted[1].strip()) or text, {"output_file": persisted[1]}
        if (exit_code := _EXIT.match(text)) is not None:
            return text[exit_code.end() :], {"exit_code": int(exit_code[1])}
        stopped = type(outcome) is dict and outcome.get("interrupted") is True
        return text, {"interrupted": True} if stopped else {}

    def _kept_output(self, name: str) -> str:
        """A large output, from the folder of its session next to this one, as the tool wrote it."""
        *_, session, _, file_name = ("", "", "", *Path(name).parts)  # a fork has none of its own
        path = self._folder.parent / session / "tool-results" / file_name
        try:
            with path.open("rb") as file:
                return file.read(LARGEST_OUTPUT).decode(errors="replace")
        except OSError:
            return ""  # it was removed: the line has the beginning

    def _assistant(self, line: JsonObject) -> JsonObject:
        message = line.get("message")
        if type(message) is not dict:
            raise SkippedLineError("assistant lines without a message")
        blocks = blocks_of(message.get("content"))
        calls = [
            without_empty(id=block.get("id"), name=block.get("name"), input=block.get("input"))
            for block in blocks
            if str(block.get("type")).endswith("tool_use")
        ]
        for call in calls:
            self._calls.note(call.get("id"), call.get("name"))
        thinking = joined(texts_in(block, "thinking") for block in blocks)
        if message.get("model") == "<synthetic>" or line.get("isApiErrorMessage") is True:
            said = put_in(SYNTHETIC, text_of(blocks), "api_error")
            if line.get("isApiErrorMessage") is not True:
                said["Metadata"]["message_type"] = "synthetic"
        else:
            said = call_of(self._speaker(line), text_of(blocks), calls, thinking)
            said["Metadata"] |= without_empty(
                model=message.get("model"), usage=self._usage(message)
            )
        said["Metadata"] |= without_empty(
            api_message=message.get("id"),
            stop_reason=message.get("stop_reason"),
            is_error=line.get("isApiErrorMessage") or None,
            status=line.get("apiErrorStatus"),
        )
        if not said["Message"]:
            raise SkippedLineError("assistant lines without text (encrypted thinking)")
        return said

    def _usage(self, message: JsonObject) -> JsonObject:
        """What this line adds to the usage that the lines of its response had before it."""
        usage, response = message.get("usage"), message.get("id")
        found = usage_of(
            given=number_in(usage, "input_tokens"),
            output=number_in(usage, "output_tokens"),
            cache_read=number_in(usage, "cache_read_input_tokens"),
            cache_write=number_in(usage, "cache_creation_input_tokens"),
        )
        if response is None or response != self._response:
            self._response, self._counted = response, {}
        more = {
            name: value - self._counted.get(name, 0)
            for name, value in found.items()
            if value > self._counted.get(name, 0)
        }
        self._counted |= found
        return more


def _figures(about: object) -> JsonObject:
    """What is known of a compaction, without the list of what it kept."""
    found = about if type(about) is dict else {}
    return {name: value for name, value in found.items() if type(value) in (str, int, float)}


def _put_in_by_program(line: JsonObject, text: str) -> JsonObject | None:
    """The message, if the program wrote this line in the person's place."""
    tag = found[1] if (found := _TAG.match(text)) is not None else ""
    if tag in _COMMANDS:
        return put_in(COMMAND, _command(text), "command")
    if tag in _OUTPUTS:
        return put_in(COMMAND, _inner(text), "command_output")
    if tag in _NEWS or texts_in(line.get("origin"), "kind") == "task-notification":
        return put_in(NOTIFICATION, text, tag.replace("-", "_") or "notification")
    if tag.endswith("-hook"):
        return put_in(HOOK, _inner(text), "hook")
    if text.startswith(("[Request interrupted", "[Tool call interrupted")):
        return put_in(INTERRUPTION, text, "interruption")
    return None


def _command(text: str) -> str:
    named = dict(re.findall(r"<([a-z-]+)>(.*?)</\1>", text, re.DOTALL))
    words = (named.get("command-name") or named.get("bash-input"), named.get("command-args"))
    return " ".join(word.strip() for word in words if word) or text


def _inner(text: str) -> str:
    return joined(part.strip() for part in _INNER.findall(text)) or text


# -- which session a past belongs to ---------------------------------------------------------------


def _arrange(paths: Sequence[Path]) -> Iterable[TranscriptFile]:
    """Sessions with the same first message in the order in which they were begun.

    What they share is of the first one, and the others are forks of it.
    """
    families: dict[bytes, list[Path]] = {}
    for path in paths:
        families.setdefault(_first_uuid(path), []).append(path)
    for first, family in families.items():
        if len(family) == 1 or not first:
            yield from map(TranscriptFile, family)
            continue
        began = {
            path: _began(path, {other for other in family if other != path}) for path in family
        }
        original, *forks = sorted(family, key=lambda path: (began[path], str(path)))
        yield TranscriptFile(original)
        for path in forks:
            session = session_in_name(original)
            yield TranscriptFile(path, {"forked_from": session, "parent_context": session})


def _first_uuid(path: Path) -> bytes:
    """The uuid of the first message of a session; empty for a sub-agent, or where there is none."""
    if path.name.startswith("agent-") or path.suffix != ".jsonl":
        return b""
    with path.open("rb") as file:
        for line in file:
            if b'"parentUuid":null' in line and (found := _UUID.search(line)) is not None:
                return found[1]
            if file.tell() > _HEAD:
                break
    return b""


def _began(path: Path, others: set[Path]) -> tuple[str, int]:
    """When a file was begun: the first time in lines that no fork copies.

    Older versions have none of these lines. Then it is the time of the first line that the others
    lack; a file without any is the one that the others repeat, and comes first.
    """
    times: list[bytes] = []
    with path.open("rb") as file:
        for line in file:
            kind = _TYPE_FIRST.match(line)
            if kind is not None and kind[1] in _OF_FILE and (time := _TIME.search(line, 0, 400)):
                times.append(time[1])
    if times:
        return min(times).decode(), 0
    theirs = set[bytes]()
    for other in others:
        theirs.update(_uuids(other))
    with path.open("rb") as file:
        for line in file:
            if (uuid := _UUID.search(line)) is not None and uuid[1] not in theirs:
                return (time[1].decode() if (time := _TIME.search(line)) else "~"), 1
    return "", 0


def _uuids(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for line in file:
            if (found := _UUID.search(line)) is not None:
                yield found[1]


FORMAT = TranscriptFormat(
    name="claude-code",
    title="Claude Code",
    mark=_mark,
    reader=ClaudeCode,
    ignores=_ignores,
    arrange=_arrange,
)
