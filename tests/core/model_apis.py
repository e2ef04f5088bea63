"""The message forms of four model APIs, and what each API refuses, as a server behind the real SDK.

The rules are those that the APIs document and answer with status 400, not those of the repair.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, Protocol

import anthropic
import openai
from anthropic.types import MessageParam
from google import genai
from google.genai import types as gemini_types
from openai.types.chat import ChatCompletionMessageParam
from openai.types.responses import ResponseInputItemParam
from pydantic import TypeAdapter

Message = dict[str, Any]


class RefusedError(Exception):
    """The API answers with status 400."""


def refuse_unless(condition: object, text: str) -> None:
    if not condition:
        raise RefusedError(text)


class Form(Protocol):
    """The messages of one API."""

    name: str

    def said(self, text: str) -> Message: ...
    def thought(self, text: str) -> Message:
        """Words of the model."""

    def calls(self, *ids: str) -> list[Message]: ...
    def answers(self, *ids: str) -> list[Message]: ...
    def called(self, message: Message) -> list[str]:
        """The names that ``calls`` was given."""

    def judge(self, messages: list[Any]) -> None:
        """Raise ``RefusedError`` as the API does."""

    def send(self, messages: list[Any]) -> None:
        """Send them with the real SDK, to a server that judges them. Raises the SDK's error."""


@contextmanager
def api(judge: Callable[[Message], None], answer: Message) -> Iterator[str]:
    """The address of a server that gives one answer to all requests that are not refused."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status, body = 200, answer
            try:
                judge(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            except RefusedError as error:
                status, body = 400, {"error": {"code": 400, "message": str(error)}}
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # as above
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        serving = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        serving.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            serving.join()


def _check_types(of: Any, messages: list[Any]) -> None:
    """Raise unless the SDK's types take the messages; iterables are checked as they are read."""
    adapter = TypeAdapter(list[of])
    adapter.dump_json(adapter.validate_python(messages), warnings=False)


class Chat:
    """OpenAI, chat completions."""

    name = "chat"

    def said(self, text: str) -> Message:
        return {"role": "user", "content": text}

    def thought(self, text: str) -> Message:
        return {"role": "assistant", "content": text}

    def calls(self, *ids: str) -> list[Message]:
        function = {"name": "look", "arguments": "{}"}
        asked = [{"id": each, "type": "function", "function": function} for each in ids]
        return [{"role": "assistant", "content": None, "tool_calls": asked}]

    def answers(self, *ids: str) -> list[Message]:
        return [{"role": "tool", "tool_call_id": each, "content": f"result-{each}"} for each in ids]

    def called(self, message: Message) -> list[str]:
        return [call["id"] for call in message.get("tool_calls") or ()]

    def judge(self, messages: list[Any]) -> None:
        waiting: Counter[str] = Counter()
        for message in messages:
            if message["role"] == "tool":
                refuse_unless(
                    waiting[message["tool_call_id"]] > 0,
                    "messages with role 'tool' must be a response to a preceding message with"
                    " 'tool_calls'",
                )
                waiting[message["tool_call_id"]] -= 1
                continue
            refuse_unless(not +waiting, self._unanswered(waiting))
            waiting = Counter(call["id"] for call in message.get("tool_calls") or ())
        refuse_unless(not +waiting, self._unanswered(waiting))

    def _unanswered(self, waiting: Counter[str]) -> str:
        return (
            "An assistant message with 'tool_calls' must be followed by tool messages responding to"
            f" each 'tool_call_id'. Missing: {', '.join(+waiting)}"
        )

    def send(self, messages: list[Any]) -> None:
        _check_types(ChatCompletionMessageParam, messages)
        answer = {"id": "c", "object": "chat.completion", "created": 0, "model": "m", "choices": []}
        with (
            api(lambda body: self.judge(body["messages"]), answer) as url,
            openai.OpenAI(api_key="none", max_retries=0, base_url=url) as client,
        ):
            client.chat.completions.create(model="m", messages=messages)


class Responses:
    """OpenAI, the items of the Responses API."""

    name = "responses"

    def said(self, text: str) -> Message:
        return {"role": "user", "content": text}

    def thought(self, text: str) -> Message:
        return {"role": "assistant", "content": text}

    def calls(self, *ids: str) -> list[Message]:
        return [
            {"type": "function_call", "call_id": each, "name": "look", "arguments": "{}"}
            for each in ids
        ]

    def answers(self, *ids: str) -> list[Message]:
        return [
            {"type": "function_call_output", "call_id": each, "output": f"result-{each}"}
            for each in ids
        ]

    def called(self, message: Message) -> list[str]:
        return [message["call_id"]] if message.get("type") == "function_call" else []

    def judge(self, messages: list[Any]) -> None:
        outputs = {
            "function_call": "function_call_output",
            "custom_tool_call": "custom_tool_call_output",
            "computer_call": "computer_call_output",
            "local_shell_call": "local_shell_call_output",
            "shell_call": "shell_call_output",
            "apply_patch_call": "apply_patch_call_output",
            "tool_search_call": "tool_search_output",
        }
        waiting: Counter[tuple[str, str]] = Counter()
        for index, item in enumerate(messages):
            kind = item.get("type", "message")
            if kind in outputs:
                waiting[outputs[kind], item["call_id"]] += 1
            elif kind in outputs.values():
                call_id = item["id"] if kind == "local_shell_call_output" else item["call_id"]
                refuse_unless(
                    waiting[kind, call_id] > 0,
                    f"No tool call found for function call output with call_id {call_id}.",
                )
                waiting[kind, call_id] -= 1
            elif kind == "reasoning":
                following = messages[index + 1] if index + 1 < len(messages) else {}
                refuse_unless(
                    following.get("role") == "assistant" or following.get("type") in outputs,
                    f"Item '{item['id']}' of type 'reasoning' was provided without its required"
                    " following item.",
                )
        missing = ", ".join(call_id for _, call_id in +waiting)
        refuse_unless(not missing, f"No tool output found for function call {missing}.")

    def send(self, messages: list[Any]) -> None:
        _check_types(ResponseInputItemParam, messages)
        answer = {"id": "r", "object": "response", "created_at": 0, "model": "m", "output": []}
        with (
            api(lambda body: self.judge(body["input"]), answer) as url,
            openai.OpenAI(api_key="none", max_retries=0, base_url=url) as client,
        ):
            client.responses.create(model="m", input=messages)


def _merged(messages: list[Any]) -> list[tuple[str, list[Any]]]:
    """The turns that the API joins messages of one role in a row to."""
    turns: list[tuple[str, list[Any]]] = []
    for message in messages:
        content = message["content"]
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not turns or turns[-1][0] != message["role"]:
            turns.append((message["role"], []))
        turns[-1][1].extend(blocks)
    return turns


class Anthropic:
    """Anthropic's messages."""

    name = "anthropic"

    def said(self, text: str) -> Message:
        return {"role": "user", "content": text}

    def thought(self, text: str) -> Message:
        return {"role": "assistant", "content": [{"type": "text", "text": text}]}

    def calls(self, *ids: str) -> list[Message]:
        blocks = [{"type": "tool_use", "id": each, "name": "look", "input": {}} for each in ids]
        return [{"role": "assistant", "content": blocks}]

    def answers(self, *ids: str) -> list[Message]:
        blocks = [
            {"type": "tool_result", "tool_use_id": each, "content": f"result-{each}"}
            for each in ids
        ]
        return [{"role": "user", "content": blocks}]

    def called(self, message: Message) -> list[str]:
        content = message["content"] if isinstance(message["content"], list) else []
        return [block["id"] for block in content if block["type"] == "tool_use"]

    def judge(self, messages: list[Any]) -> None:
        turns = _merged(messages)
        for number, (role, blocks) in enumerate(turns):
            after = turns[number + 1] if number + 1 < len(turns) else ("", [])
            if role == "assistant":
                asked = [block["id"] for block in blocks if block["type"] == "tool_use"]
                leading = []
                for block in after[1] if after[0] == "user" else ():
                    if block["type"] != "tool_result":
                        break
                    leading.append(block["tool_use_id"])
                missing = ", ".join(set(asked) - set(leading))
                refuse_unless(
                    not missing,
                    "`tool_use` ids were found without `tool_result` blocks immediately after:"
                    f" {missing}. Each `tool_use` block must have a corresponding `tool_result`"
                    " block in the next message.",
                )
                self._judge_server_tools(blocks, turns[number + 1 :])
                continue
            before = turns[number - 1][1] if number else []
            answered = [b["tool_use_id"] for b in blocks if b["type"] == "tool_result"]
            known = {block["id"] for block in before if block["type"] == "tool_use"}
            refuse_unless(
                set(answered) <= known,
                "unexpected `tool_use_id` found in `tool_result` blocks. Each `tool_result` block"
                " must have a corresponding `tool_use` block in the previous message.",
            )
            refuse_unless(
                len(set(answered)) == len(answered),
                "each tool_use must have a single result. Found multiple `tool_result` blocks",
            )
        self._judge_server_results(turns)

    def _judge_server_tools(self, blocks: list[Any], after: list[tuple[str, list[Any]]]) -> None:
        """A server's tool may have its result later only while nothing but results follow."""
        later = {b["tool_use_id"] for _, turn in after for b in turn if "tool_use_id" in b}
        here = {b["tool_use_id"] for b in blocks if "tool_use_id" in b}
        still_open = all(b["type"] == "tool_result" for _, turn in after for b in turn)
        for block in blocks:
            if block["type"] in {"server_tool_use", "mcp_tool_use"} and not still_open:
                refuse_unless(
                    block["id"] in here | later,
                    f"`{block['name']}` tool use with id `{block['id']}` was found without a"
                    f" corresponding `{block['name']}_tool_result` block",
                )

    def _judge_server_results(self, turns: list[tuple[str, list[Any]]]) -> None:
        known = set[str]()
        for _, blocks in turns:
            for block in blocks:
                if block["type"] in {"server_tool_use", "mcp_tool_use"}:
                    known.add(block["id"])
                elif block["type"].endswith("_tool_result"):
                    refuse_unless(block["tool_use_id"] in known, "unexpected `tool_use_id`")

    def send(self, messages: list[Any]) -> None:
        _check_types(MessageParam, messages)
        answer = {
            "id": "m", "type": "message", "role": "assistant", "model": "m", "content": [],
            "stop_reason": "end_turn", "usage": {"input_tokens": 1, "output_tokens": 1},
        }  # fmt: skip
        with (
            api(lambda body: self.judge(body["messages"]), answer) as url,
            anthropic.Anthropic(api_key="none", max_retries=0, base_url=url) as client,
        ):
            client.messages.create(model="m", max_tokens=1, messages=messages)


class Gemini:
    """Gemini's contents; ``ids``: the API gives calls ids; ``camel``: names as on the wire."""

    def __init__(self, *, ids: bool, camel: bool) -> None:
        self.name = f"gemini{' ids' if ids else ''}{' camel' if camel else ''}"
        self._ids = ids
        self._call, self._response = (
            ("functionCall", "functionResponse")
            if camel
            else ("function_call", "function_response")
        )

    def said(self, text: str) -> Message:
        return {"role": "user", "parts": [{"text": text}]}

    def thought(self, text: str) -> Message:
        return {"role": "model", "parts": [{"text": text}]}

    def calls(self, *ids: str) -> list[Message]:
        parts = [{self._call: {"name": each, "args": {}, **self._id(each)}} for each in ids]
        return [{"role": "model", "parts": parts}]

    def answers(self, *ids: str) -> list[Message]:
        parts = [
            {self._response: {"name": each, "response": {"output": f"result-{each}"}}}
            for each in ids
        ]
        for part, each in zip(parts, ids, strict=True):
            part[self._response] |= self._id(each)
        return [{"role": "user", "parts": parts}]

    def _id(self, each: str) -> dict[str, str]:
        return {"id": f"id-{each}"} if self._ids else {}

    def called(self, message: Message) -> list[str]:
        return [part[self._call]["name"] for part in message["parts"] if self._call in part]

    def judge(self, messages: list[Any]) -> None:
        asked: Counter[str] = Counter()
        given: Counter[str] = Counter()
        former = ""
        for message in [*messages, self.said("the end")]:
            parts = message["parts"]
            calls = [part for part in parts if "function_call" in part or "functionCall" in part]
            answers = [
                part.get("function_response") or part.get("functionResponse")
                for part in parts
                if "function_response" in part or "functionResponse" in part
            ]
            if message["role"] == "model":
                if former != "model":
                    self._compare(asked, given)
                    asked, given = Counter(), Counter()
                asked.update((c.get("function_call") or c["functionCall"])["name"] for c in calls)
                former = "model"
            elif answers:
                refuse_unless(
                    former == "model",
                    "Please ensure that function response turn comes immediately after a function"
                    " call turn.",
                )
                given.update(answer["name"] for answer in answers)
            else:
                self._compare(asked, given)
                asked, given = Counter(), Counter()
                former = "user"

    def _compare(self, asked: Counter[str], given: Counter[str]) -> None:
        refuse_unless(
            asked == given,
            "Please ensure that the number of function response parts is equal to the number of"
            f" function call parts of the function call turn: {asked} {given}",
        )

    def send(self, messages: list[Any]) -> None:
        for message in messages:
            gemini_types.Content.model_validate(message)
        answer = {"candidates": [{"content": {"role": "model", "parts": [{"text": "ok"}]}}]}
        with (
            api(lambda body: self.judge(body["contents"]), answer) as url,
            genai.Client(
                api_key="none", http_options=gemini_types.HttpOptions(base_url=url)
            ) as client,
        ):
            client.models.generate_content(model="m", contents=messages)


FORMS: list[Form] = [
    Chat(),
    Responses(),
    Anthropic(),
    Gemini(ids=False, camel=False),
    Gemini(ids=True, camel=True),
]
