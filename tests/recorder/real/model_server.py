"""A model that answers by rule, on loopback, in the four protocols that agents' tools speak.

Anthropic messages, OpenAI responses, OpenAI chat completions and Gemini content, each as
server-sent events. What the last message of a request asks for decides the answer:

- ``RUN <command>``: a call of the tool's shell, and after its result one sentence;
- ``RUN <command> AND <command>``: two calls in one answer;
- ``ASK <words>``: a call of the tool that starts a sub-agent, with a prompt of these words;
- ``FAIL``: status 400; ``BUSY``: status 529 or 503 once, then an answer;
- anything else: one sentence.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

Json = dict[str, Any]
_SHELLS = ("Bash", "bash", "exec_command", "run_shell_command", "shell", "shell_command")
_AGENTS = ("Agent", "Task", "task", "agent", "spawn_agent", "invoke_agent")
_NAMESPACE = "multi_agent_v1"
"""Codex groups the tools of its sub-agents under this name, and wants it in a call."""
_ORDER = re.compile(r"\b(RUN|ASK|FAIL|BUSY)\b ?([^\n<]*)")
INPUT_TOKENS, OUTPUT_TOKENS, CACHED_TOKENS = 1200, 42, 300


@dataclass
class Answer:
    """What the model says: a text, and calls of tools as pairs of name and input."""

    text: str
    calls: list[tuple[str, Json]] = field(default_factory=list)
    status: int = 200


@dataclass
class Asked:
    """A request, as the rules see it: its last words, whether they are a result, its tools."""

    words: str
    is_result: bool
    tools: dict[str, Json]
    """The JSON Schema of what each is given, by name."""


class ModelServer:
    """Serves until it is closed; ``url`` has no slash at its end."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, Json]] = []
        self._busy_before: set[str] = set()
        self._count = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                server.answer(self)

            def do_GET(self) -> None:
                _send(self, 200, b'{"data":[],"models":[]}')

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def number(self) -> int:
        """A number for an id, never the same."""
        with self._lock:
            self._count += 1
            return self._count

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("content-length") or 0))
        request = json.loads(body or b"{}")
        path = handler.path.partition("?")[0]
        self.requests.append((path, request))
        if path.endswith(("/count_tokens", ":countTokens")):
            _send(handler, 200, b'{"input_tokens":1200,"totalTokens":1200}')
            return
        protocol = _protocol(path)
        if protocol is None:
            _send(handler, 404, b"{}")
            return
        answer = self.decided(protocol.asked(request))
        if answer.status != 200:
            error = {"type": "error", "error": {"type": "invalid_request_error", "message": "no"}}
            _send(handler, answer.status, json.dumps(error).encode())
            return
        model = str(request.get("model") or re.sub(r".*/models/(.*):.*", r"\1", path))
        events = protocol.events(answer, self.number(), model)
        if request.get("stream") or path.endswith(":streamGenerateContent"):
            text = "".join(events)
            _send(handler, 200, text.encode(), "text/event-stream")
        else:
            _send(handler, 200, json.dumps(protocol.whole(answer, self.number(), model)).encode())

    def decided(self, asked: Asked) -> Answer:
        """The answer to a request, by the rules."""
        if asked.is_result:
            return Answer("That is what the command says.")
        found = _ORDER.search(asked.words)
        shell = next((tool for tool in _SHELLS if tool in asked.tools), None)
        agent = next((tool for tool in _AGENTS if tool in asked.tools), None)
        order, what = (found[1], found[2].strip().strip('"')) if found else ("", "")
        if order == "RUN" and shell:
            commands = what.split(" AND ")
            given = [_input(asked.tools[shell], {"command": each}) for each in commands]
            return Answer("I look.", [(shell, each) for each in given])
        if order == "ASK" and agent:
            call = agent, _input(asked.tools[agent], {"prompt": what})
            return Answer("I ask another one.", [call])
        if order == "FAIL":
            return Answer("", status=400)
        if order == "BUSY" and what not in self._busy_before:
            self._busy_before.add(what)
            return Answer("", status=529)
        return Answer("Understood: the lighthouse is on.")


def _input(schema: Json, given: Json) -> Json:
    """What a call gives, of all that any of the tools wants: those of its schema."""
    everything = {
        **given,
        "cmd": given.get("command"),
        "message": given.get("prompt"),
        "description": "look at it",
        "agent_name": "generalist",
        "task_name": "look",
        "subagent_type": "general-purpose",
        "is_background": False,
        "run_in_background": "later" in given.get("prompt", ""),
    }
    known = schema.get("properties", {})
    if "subagent_type" in known and "task_id" in known:
        everything["subagent_type"] = "general"
    return {name: value for name, value in everything.items() if name in known}


def _send(handler: BaseHTTPRequestHandler, status: int, body: bytes, kind: str = "") -> None:
    handler.send_response(status)
    handler.send_header("content-type", kind or "application/json")
    handler.send_header("content-length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def _event(content: Json, name: str = "") -> str:
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(content)}\n\n"


def _words(content: object) -> str:
    """The last text of a content that no program put in."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    texts = [str(item.get("text", "")) for item in content if type(item) is dict]
    return next((text for text in reversed(texts) if text and not text.startswith("<")), "")


def _by_name(request: Json, schema: str) -> dict[str, Json]:
    """The tools of a request, those in groups too, each with its JSON Schema."""
    found: dict[str, Json] = {}
    waiting = list(request.get("tools") or [])
    while waiting:
        tool = waiting.pop()
        waiting += tool.get("functionDeclarations") or tool.get("tools") or []
        tool = tool.get("function", tool)
        if schema in tool:
            found[tool["name"]] = tool[schema]
    return found


class Messages:
    """Anthropic's ``/v1/messages``."""

    @staticmethod
    def asked(request: Json) -> Asked:
        last = request["messages"][-1]
        content = last["content"]
        blocks = content if isinstance(content, list) else []
        result = any(block.get("type") == "tool_result" for block in blocks)
        return Asked(_words(content), result, _by_name(request, "input_schema"))

    @staticmethod
    def whole(answer: Answer, number: int, model: str) -> Json:
        blocks: list[Json] = [{"type": "text", "text": answer.text}]
        for at, (name, given) in enumerate(answer.calls):
            call = {"type": "tool_use", "id": f"toolu_{number:04}{at}", "name": name}
            blocks.append({**call, "input": given})
        usage = {
            "input_tokens": INPUT_TOKENS,
            "cache_read_input_tokens": CACHED_TOKENS,
            "cache_creation_input_tokens": 0,
            "output_tokens": OUTPUT_TOKENS,
        }
        return {
            "id": f"msg_{number:04}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": blocks,
            "stop_reason": "tool_use" if answer.calls else "end_turn",
            "stop_sequence": None,
            "usage": usage,
        }

    @classmethod
    def events(cls, answer: Answer, number: int, model: str) -> Iterator[str]:
        whole = cls.whole(answer, number, model)
        begun = {**whole, "content": [], "stop_reason": None}
        begun["usage"] = {**whole["usage"], "output_tokens": 1}
        yield _event({"type": "message_start", "message": begun}, "message_start")
        thought = {"type": "thinking", "thinking": "", "signature": ""}
        for at, block in enumerate([thought, *whole["content"]]):
            kind, shown = block["type"], block
            if kind == "thinking":
                deltas: list[Json] = [
                    {"type": "thinking_delta", "thinking": "Where is the switch?"},
                    {"type": "signature_delta", "signature": "c2lnbmVk"},
                ]
            elif kind == "text":
                deltas = [{"type": "text_delta", "text": block["text"]}]
                shown = {"type": "text", "text": ""}
            else:
                given = json.dumps(block["input"])
                deltas = [{"type": "input_json_delta", "partial_json": given}]
                shown = {**block, "input": {}}
            start = {"type": "content_block_start", "index": at, "content_block": shown}
            yield _event(start, "content_block_start")
            for delta in deltas:
                content = {"type": "content_block_delta", "index": at, "delta": delta}
                yield _event(content, "content_block_delta")
            yield _event({"type": "content_block_stop", "index": at}, "content_block_stop")
        delta = {"stop_reason": whole["stop_reason"], "stop_sequence": None}
        usage = whole["usage"]
        yield _event({"type": "message_delta", "delta": delta, "usage": usage}, "message_delta")
        yield _event({"type": "message_stop"}, "message_stop")


class Responses:
    """OpenAI's ``/responses``."""

    @staticmethod
    def asked(request: Json) -> Asked:
        last = request["input"][-1]
        result = str(last.get("type", "")).endswith("_output")
        return Asked(_words(last.get("content", "")), result, _by_name(request, "parameters"))

    @staticmethod
    def whole(answer: Answer, number: int, model: str) -> Json:
        text = {"type": "output_text", "text": answer.text, "annotations": []}
        message = {"type": "message", "role": "assistant", "id": f"msg_{number:04}"}
        items: list[Json] = [{**message, "content": [text], "status": "completed"}]
        for at, (name, given) in enumerate(answer.calls):
            call = {"type": "function_call", "id": f"fc_{number:04}{at}", "name": name}
            call |= {"call_id": f"call_{number:04}{at}", "arguments": json.dumps(given)}
            if name == "spawn_agent":
                call["namespace"] = _NAMESPACE
            items.append({**call, "status": "completed"})
        usage = {
            "input_tokens": INPUT_TOKENS,
            "input_tokens_details": {"cached_tokens": CACHED_TOKENS},
            "output_tokens": OUTPUT_TOKENS,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": INPUT_TOKENS + OUTPUT_TOKENS,
        }
        head = {"id": f"resp_{number:04}", "object": "response", "model": model}
        return {**head, "status": "completed", "output": items, "usage": usage}

    @classmethod
    def events(cls, answer: Answer, number: int, model: str) -> Iterator[str]:
        whole = cls.whole(answer, number, model)
        created = {"type": "response.created", "response": {**whole, "output": []}}
        yield _event(created, "response.created")
        for at, item in enumerate(whole["output"]):
            for step in ("added", "done"):
                name = f"response.output_item.{step}"
                yield _event({"type": name, "output_index": at, "item": item}, name)
        yield _event({"type": "response.completed", "response": whole}, "response.completed")


class Completions:
    """OpenAI's ``/chat/completions``."""

    @staticmethod
    def asked(request: Json) -> Asked:
        last = request["messages"][-1]
        return Asked(
            _words(last.get("content")), last["role"] == "tool", _by_name(request, "parameters")
        )

    @staticmethod
    def whole(answer: Answer, number: int, model: str) -> Json:
        message: Json = {"role": "assistant", "content": answer.text}
        if answer.calls:
            message["tool_calls"] = [
                {
                    "id": f"call_{number:04}{at}",
                    "index": at,
                    "type": "function",
                    "function": {"name": name, "arguments": json.dumps(given)},
                }
                for at, (name, given) in enumerate(answer.calls)
            ]
        usage = {
            "prompt_tokens": INPUT_TOKENS,
            "completion_tokens": OUTPUT_TOKENS,
            "total_tokens": INPUT_TOKENS + OUTPUT_TOKENS,
            "prompt_tokens_details": {"cached_tokens": CACHED_TOKENS},
        }
        choice = {"index": 0, "message": message}
        choice["finish_reason"] = "tool_calls" if answer.calls else "stop"
        head = {"id": f"chat_{number:04}", "object": "chat.completion", "created": 1}
        return {**head, "model": model, "choices": [choice], "usage": usage}

    @classmethod
    def events(cls, answer: Answer, number: int, model: str) -> Iterator[str]:
        whole = cls.whole(answer, number, model)
        (choice,) = whole["choices"]
        head = {**whole, "object": "chat.completion.chunk"}
        said = {"index": 0, "delta": choice["message"], "finish_reason": None}
        yield _event({**head, "choices": [said], "usage": None})
        ended = {"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}
        yield _event({**head, "choices": [ended], "usage": None})
        yield _event({**head, "choices": [], "usage": whole["usage"]})
        yield "data: [DONE]\n\n"


class Contents:
    """Gemini's ``:generateContent`` and ``:streamGenerateContent``."""

    @staticmethod
    def asked(request: Json) -> Asked:
        parts = request["contents"][-1]["parts"]
        result = any("functionResponse" in part for part in parts)
        return Asked(_words(parts), result, _by_name(request, "parametersJsonSchema"))

    @staticmethod
    def whole(answer: Answer, number: int, model: str) -> Json:
        parts: list[Json] = [{"text": answer.text}]
        for at, (name, given) in enumerate(answer.calls):
            call = {"name": name, "args": given, "id": f"call_{number:04}{at}"}
            parts.append({"functionCall": call})
        usage = {
            "promptTokenCount": INPUT_TOKENS,
            "candidatesTokenCount": OUTPUT_TOKENS,
            "cachedContentTokenCount": CACHED_TOKENS,
            "totalTokenCount": INPUT_TOKENS + OUTPUT_TOKENS,
        }
        content = {"role": "model", "parts": parts}
        candidate = {"content": content, "finishReason": "STOP", "index": 0}
        return {"candidates": [candidate], "usageMetadata": usage, "modelVersion": model}

    @classmethod
    def events(cls, answer: Answer, number: int, model: str) -> Iterator[str]:
        yield _event(cls.whole(answer, number, model))


Protocol = type[Messages] | type[Responses] | type[Completions] | type[Contents]


def _protocol(path: str) -> Protocol | None:
    for end, protocol in (
        ("/messages", Messages),
        ("/responses", Responses),
        ("/chat/completions", Completions),
        ("enerateContent", Contents),
    ):
        if path.endswith(end):
            return protocol
    return None
