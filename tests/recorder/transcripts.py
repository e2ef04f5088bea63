"""Small sessions in the forms that agents' tools write, in words of our own.

The shapes are those that ``tests/recorder/real`` saw; ``make transcripts`` shows when they change.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import orjson

Json = dict[str, Any]
FIRST = "11111111-0000-4000-8000-000000000001"
SECOND = "22222222-0000-4000-8000-000000000002"


def at(second: int) -> str:
    return f"2026-05-01T10:{second // 60:02}:{second % 60:02}.000Z"


def write(path: Path, lines: Iterable[Json]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    return path


# -- Claude Code -----------------------------------------------------------------------------------


def claude(number: int, kind: str, message: Json | None = None, **more: Any) -> Json:
    line: Json = {
        "parentUuid": claude_uuid(number - 1) if number > 1 else None,
        "isSidechain": False,
        "type": kind,
        "uuid": claude_uuid(number),
        "timestamp": at(number),
        "sessionId": FIRST,
        "version": "2.1.332",
    }
    return line | ({} if message is None else {"message": message}) | more


def claude_uuid(number: int) -> str:
    return f"aaaaaaaa-0000-4000-8000-{number:012}"


def person(text: str) -> Json:
    return {"role": "user", "content": text}


def answer(response: str, block: Json, *, output: int = 42, **more: Any) -> Json:
    usage = {"input_tokens": 1200, "output_tokens": output, "cache_read_input_tokens": 300}
    return {
        "id": response,
        "role": "assistant",
        "model": "model-one",
        "content": [block],
        "usage": usage,
        **more,
    }


def text(words: str) -> Json:
    return {"type": "text", "text": words}


def claude_session() -> list[Json]:
    """A question and its answer in three lines, and a request that was repeated."""
    call = {"type": "tool_use", "id": "t1", "name": "Bash", "input": {"command": "ls"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "Exit code 2\nno lamp"}
    error = {"status": 529, "formatted": "529 too busy", "message": "529 {}"}
    return [
        {"type": "queue-operation", "operation": "enqueue", "timestamp": at(0), "sessionId": FIRST},
        claude(1, "user", person("Is the lamp on?"), promptId="turn-1"),
        claude(2, "system", subtype="api_error", error=error, retryAttempt=1, level="error"),
        claude(3, "assistant", answer("r1", {"type": "thinking", "thinking": "Look."})),
        claude(4, "assistant", answer("r1", text("I look."))),
        claude(5, "assistant", answer("r1", call)),
        claude(
            6,
            "user",
            {"role": "user", "content": [{**result, "is_error": True}]},
            promptId="turn-1",
        ),
        claude(7, "assistant", answer("r2", text("No."))),
    ]


def claude_fork(lines: Iterable[Json]) -> list[Json]:
    """The lines again with another session, as a fork has them, and two of its own."""
    copied = [{**line, "sessionId": SECOND} for line in lines if "uuid" in line]
    own = [
        {"type": "queue-operation", "operation": "enqueue", "timestamp": at(100)},
        claude(20, "user", person("And the door?")),
        claude(21, "assistant", answer("r9", text("Shut."))),
    ]
    return [*copied, *({**line, "sessionId": SECOND} for line in own)]


# -- Codex -----------------------------------------------------------------------------------------


def codex(second: int, kind: str, **payload: Any) -> Json:
    return {"timestamp": at(second), "ordinal": second, "type": kind, "payload": payload}


def codex_item(second: int, kind: str, **more: Any) -> Json:
    return codex(second, "response_item", type=kind, **more)


def codex_message(second: int, role: str, words: str) -> Json:
    kind = "output_text" if role == "assistant" else "input_text"
    return codex_item(second, "message", role=role, content=[{"type": kind, "text": words}])


def codex_usage(second: int) -> Json:
    usage = {"input_tokens": 1200, "cached_input_tokens": 300, "output_tokens": 42}
    return codex(second, "token_usage_record", response_id=f"resp-{second}", usage=usage)


def codex_count(second: int) -> Json:
    usage = {"input_tokens": 1200, "cached_input_tokens": 300, "output_tokens": 42}
    info = {"total_token_usage": usage, "last_token_usage": usage}
    return codex(second, "event_msg", type="token_count", info=info)


def codex_session(**about: Any) -> list[Json]:
    """A command that fails, and a turn that fails."""
    command = {
        "type": "CommandExecution",
        "id": "c1",
        "status": "failed",
        "exit_code": 2,
        "duration": {"secs": 1, "nanos": 500_000_000},
    }
    output = "Chunk ID: 1a\nWall time: 1.5 seconds\nProcess exited with code 2\nOutput:\nno lamp"
    error = '{"error": {"message": "too busy", "type": "server_error"}}'
    return [
        codex(0, "session_meta", id=FIRST, session_id=FIRST, cli_version="0.171.0", **about),
        codex(1, "turn_context", turn_id="turn-1", model="model-two"),
        codex_message(2, "user", "Is the lamp on?"),
        codex_message(3, "assistant", "I look."),
        codex_item(4, "function_call", name="exec_command", arguments="{}", call_id="c1"),
        codex_usage(5),
        codex(6, "event_msg", type="item_completed", item=command),
        codex_item(7, "function_call_output", call_id="c1", output=output),
        codex_count(8),
        codex_message(9, "assistant", "No."),
        codex_usage(10),
        codex_count(11),
        codex(12, "turn_context", turn_id="turn-2", model="model-two"),
        codex_message(13, "user", "Again."),
        codex(14, "event_msg", type="task_complete", turn_id="turn-2", error={"message": error}),
    ]


# -- Gemini CLI ------------------------------------------------------------------------------------


def gemini_session(session: str = FIRST, **about: Any) -> list[Json]:
    call = {"id": "c1", "name": "run_shell_command", "args": {"command": "ls"}}
    tokens = {"input": 1200, "output": 42, "cached": 300, "thoughts": 0}
    answered = {
        "id": "g-2",
        "timestamp": at(2),
        "type": "gemini",
        "content": "I look.",
        "tokens": tokens,
        "model": "model-three",
    }
    output = "Output: no lamp\nExit Code: 2\nProcess Group PGID: 7"
    output = f"<untrusted_context>\n{output}\n</untrusted_context>"
    response = {"id": "c1", "name": "run_shell_command", "response": {"output": output}}
    put_in = [{"text": "<session_context>\nToday is Friday."}]
    return [
        {"sessionId": session, "projectHash": "f0", "startTime": at(0), "kind": "main", **about},
        {"$set": {"messages": [{"id": "same", "type": "user", "content": put_in}]}},
        {"id": "same", "timestamp": at(0), "type": "user", "content": put_in},
        {"id": "g-1", "timestamp": at(1), "type": "user", "content": [{"text": "Is the lamp on?"}]},
        answered,
        {"$set": {"lastUpdated": at(2)}},
        {**answered, "toolCalls": [{**call, "status": "success"}]},
        {
            "id": "g-3",
            "timestamp": at(3),
            "type": "user",
            "content": [{"functionResponse": response}],
        },
        {**answered, "id": "g-4", "timestamp": at(4), "content": "No."},
    ]


# -- Qwen Code -------------------------------------------------------------------------------------


def qwen(number: int, kind: str, parts: list[Json] | None, **more: Any) -> Json:
    line: Json = {
        "uuid": f"bbbbbbbb-0000-4000-8000-{number:012}",
        "parentUuid": None,
        "sessionId": FIRST,
        "timestamp": at(number),
        "type": kind,
        "provenance": "real_user" if kind == "user" else kind,
        "cwd": "/home/dev",
    }
    if parts is not None:
        line["message"] = {"role": "model" if kind == "assistant" else "user", "parts": parts}
    return line | more


def qwen_session() -> list[Json]:
    usage = {"promptTokenCount": 1200, "candidatesTokenCount": 42, "cachedContentTokenCount": 300}
    call = {"functionCall": {"id": "c1", "name": "run_shell_command", "args": {"command": "ls"}}}
    given = (
        "Command: ls\nDirectory: (root)\nOutput: no lamp\nError: (none)\nExit Code: 2\nSignal: -"
    )
    shown = {"type": "shell_result", "exitCode": 2, "output": "no lamp"}
    outcome = {"callId": "c1", "status": "error", "resultDisplay": shown}
    response = {"id": "c1", "name": "run_shell_command", "response": {"error": given}}
    failure = {"event.name": "qwen-code.api_error", "error_message": "too busy", "status_code": 503}
    repeated = {"event.name": "qwen-code.api_response", "response_text": "I look."}
    return [
        qwen(1, "user", [{"text": "Is the lamp on?"}]),
        qwen(2, "system", None, subtype="ui_telemetry", systemPayload={"uiEvent": repeated}),
        qwen(3, "assistant", [text("I look."), call], model="model-four", usageMetadata=usage),
        qwen(4, "tool_result", [{"functionResponse": response}], toolCallResult=outcome),
        qwen(5, "assistant", [text("No.")], model="model-four", usageMetadata=usage),
        qwen(6, "system", None, subtype="ui_telemetry", systemPayload={"uiEvent": failure}),
    ]


def qwen_fork(lines: Iterable[Json]) -> list[Json]:
    copied = [
        {
            **line,
            "sessionId": SECOND,
            "forkedFrom": {"sessionId": FIRST, "messageUuid": line["uuid"]},
        }
        for line in lines
    ]
    return [*copied, qwen(20, "user", [{"text": "And the door?"}]) | {"sessionId": SECOND}]


# -- pi --------------------------------------------------------------------------------------------


def pi(number: int, message: Json) -> Json:
    line = {"type": "message", "id": f"{number:08}", "parentId": None, "timestamp": at(number)}
    return {**line, "message": message}


def pi_session(session: str = FIRST) -> list[Json]:
    usage = {"input": 900, "output": 42, "cacheRead": 300, "cacheWrite": 0}
    call = {"type": "toolCall", "id": "c1", "name": "bash", "arguments": {"command": "ls"}}
    answered = {"role": "assistant", "model": "model-five", "usage": usage, "stopReason": "stop"}
    output = [text("no lamp\n\nCommand exited with code 2")]
    result = {"role": "toolResult", "toolCallId": "c1", "toolName": "bash", "isError": True}
    failed = {"role": "assistant", "content": [], "stopReason": "error", "errorMessage": "too busy"}
    return [
        {"type": "session", "version": 3, "id": session, "timestamp": at(0), "cwd": "/home/dev"},
        {"type": "model_change", "id": "00000000", "timestamp": at(0), "modelId": "model-five"},
        pi(1, {"role": "user", "content": [text("Is the lamp on?")]}),
        pi(2, {**answered, "content": [text("I look."), call]}),
        pi(3, {**result, "content": output}),
        pi(4, {**answered, "content": [text("No.")]}),
        pi(5, failed),
    ]


def pi_fork(lines: list[Json], parent: Path) -> list[Json]:
    head = {"type": "session", "id": SECOND, "timestamp": at(50), "parentSession": str(parent)}
    return [head, *lines[1:], pi(60, {"role": "user", "content": [text("And the door?")]})]


# -- opencode --------------------------------------------------------------------------------------


def milliseconds(second: int) -> int:
    return 1_777_629_600_000 + second * 1000  # 2026-05-01T10:00:00Z


def opencode_export() -> Json:
    def info(name: str, role: str, second: int, **more: Any) -> Json:
        return {"id": name, "role": role, "time": {"created": milliseconds(second)}, **more}

    def part(name: str, kind: str, **more: Any) -> Json:
        return {"id": name, "type": kind, **more}

    tokens = {"input": 900, "output": 42, "reasoning": 0, "cache": {"read": 300, "write": 0}}
    state = {
        "status": "completed",
        "input": {"command": "ls"},
        "output": "no lamp",
        "metadata": {"exit": 2},
        "time": {"start": milliseconds(3), "end": milliseconds(4)},
    }
    error = {"name": "APIError", "data": {"message": "too busy", "statusCode": 503}}
    return {
        "info": {"id": "ses_one", "directory": "/home/dev", "title": "Lamp"},
        "messages": [
            {
                "info": info("msg_1", "user", 1),
                "parts": [part("prt_1", "text", text="Is the lamp on?")],
            },
            {
                "info": info("msg_2", "assistant", 2, parentID="msg_1", modelID="model-six"),
                "parts": [
                    part("prt_2", "step-start"),
                    part("prt_3", "text", text="I look."),
                    part("prt_4", "tool", tool="bash", callID="c1", state=state),
                    part("prt_5", "step-finish", tokens=tokens, reason="tool-calls"),
                ],
            },
            {
                "info": info("msg_3", "assistant", 5, parentID="msg_1", modelID="model-six"),
                "parts": [
                    part("prt_6", "text", text="No."),
                    part("prt_7", "step-finish", tokens=tokens, reason="stop"),
                ],
            },
            {"info": info("msg_4", "assistant", 6, parentID="msg_1", error=error), "parts": []},
        ],
    }


def opencode_base(path: Path) -> Path:
    """The same session in a database whose write-ahead log holds it, and a fork of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = opencode_export()
    base = sqlite3.connect(path)
    with closing(base):
        base.execute("pragma journal_mode = wal")
        base.execute("pragma wal_autocheckpoint = 0")
        base.executescript(
            "create table session (id text primary key, parent_id text, directory text, "
            "title text, version text, time_created integer);"
            "create table message (id text primary key, session_id text, time_created integer, "
            "data text);"
            "create table part (id text primary key, message_id text, session_id text, data text);"
        )
        _store(base, document, "ses_one", "", "Lamp", milliseconds(0))
        _store(base, document, "ses_two", "f", "Lamp (fork #1)", milliseconds(50))
        own = {"id": "f_own", "role": "user", "time": {"created": milliseconds(60)}}
        _add(base, "ses_two", "", own, [{"id": "p_own", "type": "text", "text": "And the door?"}])
        base.commit()
        # As a tool leaves it that was killed: nothing of the log has reached the database.
        log = path.with_name(path.name + "-wal").read_bytes()
        data = path.read_bytes()
    path.write_bytes(data)
    path.with_name(path.name + "-wal").write_bytes(log)
    return path


def _store(
    base: sqlite3.Connection, document: Json, session: str, prefix: str, title: str, began: int
) -> None:
    row = (session, None, "/home/dev", title, "1.18.33", began)
    base.execute("insert into session values (?, ?, ?, ?, ?, ?)", row)
    for message in document["messages"]:
        _add(base, session, prefix, message["info"], message["parts"])


def _add(
    base: sqlite3.Connection, session: str, prefix: str, info: Json, parts: list[Json]
) -> None:
    name, created = prefix + info["id"], info["time"]["created"]
    data = orjson.dumps({key: value for key, value in info.items() if key != "id"}).decode()
    base.execute("insert into message values (?, ?, ?, ?)", (name, session, created, data))
    for part in parts:
        data = orjson.dumps({key: value for key, value in part.items() if key != "id"}).decode()
        row = (prefix + part["id"], name, session, data)
        base.execute("insert into part values (?, ?, ?, ?)", row)
