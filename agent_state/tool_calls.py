"""Repairs conversations in which tool calls and their results do not match.

A process that dies between a tool call and its result leaves a conversation that the model's API
refuses for good. ``repair_tool_calls`` gives each such call a result that says that the outcome is
unknown. It knows the message forms of OpenAI (chat completions, and the items of the Responses
API), Anthropic and Gemini, as plain JSON; messages of other forms stay as they are.

Each form finds its calls and results, and writes the conversation anew. Which result belongs to
which call is decided in one place, ``_pair``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Place = tuple[int, int]
"""The index of a message, and of a part in it."""

UNKNOWN_OUTCOME = (
    "The outcome of this call is unknown: the program stopped before a result was recorded. "
    "The call may have had its effect. Check before you call it again."
)
"""The text of the result that a call without one is given."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that a model asked for."""

    name: str
    """The tool, or the type of a call that names none, such as ``shell_call``."""
    call_id: str | None
    """The model's id for the call; None where the API gives none, as Gemini's may."""


@dataclass(slots=True)
class ToolCallRepair:
    """A repaired conversation, and what was wrong with it. True if anything was."""

    messages: list[Any]
    """The conversation as the model's API accepts it. What was right is as it was."""
    unknown: list[ToolCall] = field(default_factory=list)
    """The calls without a result; the conversation says now that their outcome is unknown."""
    moved: list[ToolCall] = field(default_factory=list)
    """The calls whose result stood in the wrong place; it follows its call now."""
    removed: list[Any] = field(default_factory=list)
    """What was left out, as it was: results of no call, and second results of one."""
    changed: bool = False
    """Whether anything was repaired."""

    def __bool__(self) -> bool:
        return self.changed


def repair_tool_calls(messages: Sequence[Any], *, outcome: str = UNKNOWN_OUTCOME) -> ToolCallRepair:
    """Return the conversation with one result for each tool call, where the model's API wants it.

    ``messages``: the whole conversation, oldest first, as the JSON that the API is sent; it is not
    changed. ``outcome``: the text of the result of a call that has none. A result that was
    recorded is kept, and moved if need be; it also replaces one that an earlier repair made with
    the same ``outcome``. Repairing twice changes nothing more.

    Not for a conversation that the API continues by ``previous_response_id``: its calls are on the
    server. What a server still works on (Anthropic's ``pause_turn``, OpenAI's containers) and what
    a person has yet to approve (``mcp_approval_request``) stays open.
    """
    repair = ToolCallRepair([*messages])
    _repair_chat(repair, outcome)
    _repair_responses(repair, outcome)
    _repair_anthropic(repair, outcome)
    _repair_server_tools(repair, outcome)
    _repair_gemini(repair, outcome)
    return repair


# -- which result belongs to which call ------------------------------------------------------


@dataclass(eq=False, slots=True)
class _Call:
    """A call in a conversation."""

    call: ToolCall
    key: str
    """What its result has, too."""
    place: Place
    turn: int
    """The turn that it is in: any number that its turn alone has."""
    placeholder: Any
    """The result that says that its outcome is unknown; None if it stays open without one."""


@dataclass(eq=False, slots=True)
class _Result:
    """A result in a conversation."""

    key: str
    place: Place
    turn: int | None
    """The turn that it directly follows; None if something else is between them."""
    value: Any
    call: _Call | None = None
    """Its call, if that is known already."""


@dataclass(slots=True)
class _Pairs:
    """What has to change, so that each call has one result."""

    left_out: set[Place] = field(default_factory=set)
    """The results that are not where they belong."""
    added: list[tuple[_Call, Any]] = field(default_factory=list)
    """The calls that need a result, with it."""

    def added_by_turn(self) -> dict[int, list[Any]]:
        turns: dict[int, list[Any]] = defaultdict(list)
        for call, value in self.added:
            turns[call.turn].append(value)
        return turns


def _pair(
    calls: Sequence[_Call],
    results: Sequence[_Result],
    repair: ToolCallRepair,
    *,
    anywhere: bool = False,
) -> _Pairs:
    """Choose the result of each call: one in its place, else one elsewhere, else a placeholder.

    ``anywhere``: every place after the call is right.
    """
    pairs, owned = _Pairs(), _owned(calls, results)

    def misplaced(call: _Call, result: _Result) -> bool:
        return result.place < call.place if anywhere else result.turn != call.turn

    def leave_out(superfluous: Iterable[_Result], placeholder: Any) -> None:
        for result in superfluous:
            pairs.left_out.add(result.place)
            if result.value != placeholder:
                repair.removed.append(result.value)

    leave_out(owned.pop(None, ()), None)
    for call in calls:
        found = owned[call]
        # A placeholder comes last: an earlier repair made it, and then the result came.
        found.sort(key=lambda each: (each.value == call.placeholder, misplaced(call, each)))
        leave_out(found[1:], call.placeholder)
        if not found and call.placeholder is not None:
            pairs.added.append((call, call.placeholder))
            repair.unknown.append(call.call)
        elif found and misplaced(call, found[0]):
            pairs.left_out.add(found[0].place)
            pairs.added.append((call, found[0].value))
            repair.moved.append(call.call)
    repair.changed |= bool(pairs.left_out or pairs.added)
    return pairs


def _owned(calls: Sequence[_Call], results: Sequence[_Result]) -> dict[_Call | None, list[_Result]]:
    """Return the results of each call; under None those of no call.

    An id may come again, as some models count their calls anew in each turn: a result belongs to
    the last turn before it, or else to the first call.
    """
    by_key: dict[str, list[_Call]] = defaultdict(list)
    for call in calls:
        by_key[call.key].append(call)
    owned: dict[_Call | None, list[_Result]] = defaultdict(list)
    for result in results:
        owner = result.call
        same = by_key.get(result.key) if result.key else None
        if owner is None and same:
            before = [call for call in same if call.place < result.place] or same[:1]
            turn = [call for call in before if call.turn == before[-1].turn]
            owner = next((call for call in turn if call not in owned), turn[-1])
        owned[owner].append(result)
    return owned


# -- parts of messages -----------------------------------------------------------------------


def _text(message: Any, key: str) -> str | None:
    """The text under a key of a JSON object; None if there is none."""
    value = message.get(key) if isinstance(message, Mapping) else None
    return value if isinstance(value, str) else None


def _parts(message: Any, key: str) -> Iterator[tuple[int, Any]]:
    """The items of a list of a message, with their indexes."""
    items = message.get(key) if isinstance(message, Mapping) else None
    yield from enumerate(items if isinstance(items, list) else ())


def _rebuilt(messages: Sequence[Any], changed: Mapping[int, list[Any]]) -> list[Any]:
    """The messages, with others in the place of those at some indexes."""
    new: list[Any] = []
    for index, message in enumerate(messages):
        new += changed.get(index, [message])
    return new


def _changed_parts(
    messages: Sequence[Any], key: str, left_out: set[Place], inserted: Mapping[Place, list[Any]]
) -> dict[int, list[Any]]:
    """The messages without some of their parts, and with others before some, by index.

    A message of which nothing is left is none.
    """
    changed: dict[int, list[Any]] = {}
    for index in {index for index, _ in (*left_out, *inserted)}:
        parts, new = [part for _, part in _parts(messages[index], key)], list[Any]()
        for number in range(len(parts) + 1):
            new += inserted.get((index, number), [])
            if number < len(parts) and (index, number) not in left_out:
                new.append(parts[number])
        changed[index] = [{**messages[index], key: new}] if new else []
    return changed


# -- OpenAI, chat completions: messages of the role `tool` directly after the assistant's ----


def _repair_chat(repair: ToolCallRepair, outcome: str) -> None:
    calls, results = list[_Call](), list[_Result]()
    ends: dict[int, int] = {}
    turn = None
    for index, message in enumerate(repair.messages):
        role, answered = _text(message, "role"), _text(message, "tool_call_id")
        if role == "tool" and answered is not None:
            results.append(_Result(answered, (index, 0), turn, message))
            if turn is not None:
                ends[turn] = index
            continue
        turn = None
        for number, asked in _parts(message, "tool_calls") if role == "assistant" else ():
            call_id = _text(asked, "id")
            if call_id is not None:
                turn = ends[index] = index
                name = _text(asked.get("function") or asked.get("custom"), "name") or ""
                answer = {"role": "tool", "tool_call_id": call_id, "content": outcome}
                place = (index, number)
                calls.append(_Call(ToolCall(name, call_id), call_id, place, index, answer))
    pairs = _pair(calls, results, repair)
    changed: dict[int, list[Any]] = {index: [] for index, _ in pairs.left_out}
    for turn, added in pairs.added_by_turn().items():
        end = ends[turn]
        changed[end] = [*changed.get(end, [repair.messages[end]]), *added]
    repair.messages = _rebuilt(repair.messages, changed)


# -- OpenAI, Responses API: an output item somewhere after the call item ---------------------

_OUTPUTS = {
    "apply_patch_call": "apply_patch_call_output",
    "computer_call": "computer_call_output",
    "custom_tool_call": "custom_tool_call_output",
    "function_call": "function_call_output",
    "local_shell_call": "local_shell_call_output",
    "shell_call": "shell_call_output",
    "tool_search_call": "tool_search_output",
}
_ITEMS = frozenset(_OUTPUTS) | frozenset(_OUTPUTS.values())


def _repair_responses(repair: ToolCallRepair, outcome: str) -> None:
    calls, results = list[_Call](), list[_Result]()
    ends = [*_ends_of_runs(repair.messages)]
    for index, item in enumerate(repair.messages):
        kind = _text(item, "type")
        call_id = _text(item, "call_id") or _text(item, "id")
        if kind not in _ITEMS or call_id is None:
            continue
        key = f"{_OUTPUTS.get(kind, kind)} {call_id}"
        if kind in _OUTPUTS:
            asked = ToolCall(_text(item, "name") or kind, call_id)
            answer = _output(kind, item, call_id, outcome)
            calls.append(_Call(asked, key, (index, 0), ends[index], answer))
        elif _text(item, "call_id") is not None or kind == "local_shell_call_output":
            results.append(_Result(key, (index, 0), None, item))
    pairs = _pair(calls, results, repair, anywhere=True)
    changed: dict[int, list[Any]] = {index: [] for index, _ in pairs.left_out}
    outputs = _Pairs()
    for call, value in pairs.added:
        index = call.place[0]
        if value is call.placeholder and repair.messages[index]["type"] == "computer_call":
            # Its output is a screenshot. Nobody has one, so a message is in the call's place.
            changed[index] = [value]
            repair.removed.append(repair.messages[index])
            while index and _text(repair.messages[index - 1], "type") == "reasoning":
                index -= 1  # reasoning without the item that it led to is refused
                changed[index] = []
        else:
            outputs.added.append((call, value))
    for end, added in outputs.added_by_turn().items():
        changed[end] = [*changed.get(end, [repair.messages[end]]), *added]
    repair.messages = _rebuilt(repair.messages, changed)


def _ends_of_runs(items: Sequence[Any]) -> Iterator[int]:
    """For each item the index of the last one of the calls and outputs that it stands among."""
    end = -1
    for index in range(len(items)):
        if index > end:
            end = index
            while end + 1 < len(items) and _text(items[end + 1], "type") in _ITEMS:
                end += 1
        yield end


def _output(kind: str, call: Mapping[str, Any], call_id: str, outcome: str) -> Any:
    """The output of a call whose outcome is unknown; None for one that a server runs."""
    environment = _text(call.get("environment"), "type") or ""
    if environment.startswith("container") or _text(call, "execution") == "server":
        return None
    if kind == "computer_call":
        return {"role": "developer", "content": f"Computer call {call_id}: {outcome}"}
    output: dict[str, Any] = {"type": _OUTPUTS[kind], "call_id": call_id}
    if kind == "local_shell_call":
        output = {"type": _OUTPUTS[kind], "id": call_id, "status": "incomplete"}
    if kind == "shell_call":
        result = {"stdout": "", "stderr": outcome, "outcome": {"type": "timeout"}}
        output |= {"output": [result]}
    elif kind == "tool_search_call":
        output |= {"execution": "client", "status": "incomplete", "tools": []}
    else:
        output |= {"output": outcome}
    if kind == "apply_patch_call":
        output |= {"status": "failed"}
    if call.get("caller") is not None:  # a program of the model's made the call
        output |= {"caller": call["caller"]}
    return output


# -- Anthropic: blocks at the beginning of the user's turn after the assistant's --------------


def _repair_anthropic(repair: ToolCallRepair, outcome: str) -> None:
    calls, results = list[_Call](), list[_Result]()
    ends: dict[int, int] = {}
    window: int | None = None
    known = set[tuple[int, str]]()
    for index, (turn, message) in enumerate(_turns(repair.messages, "assistant")):
        if turn is not None:
            window, ends[turn] = turn, index
        elif _text(message, "role") != "user" or not isinstance(message.get("content"), list):
            window = None
        for number, block in _parts(message, "content"):
            kind, place = _text(block, "type"), (index, number)
            call_id, answered = _text(block, "id"), _text(block, "tool_use_id")
            if turn is not None and kind == "tool_use" and call_id is not None:
                if (turn, call_id) in known:
                    continue  # one result answers both
                known.add((turn, call_id))
                call = ToolCall(_text(block, "name") or "", call_id)
                answer = _tool_result("tool_result", call_id, outcome)
                calls.append(_Call(call, call_id, place, turn, answer))
            elif turn is None and kind == "tool_result" and answered is not None:
                results.append(_Result(answered, place, window, block))
            elif turn is None:
                window = None  # text comes after all results
    pairs = _pair(calls, results, repair)
    inserted: dict[Place, list[Any]] = {}
    changed: dict[int, list[Any]] = {}
    for turn, added in pairs.added_by_turn().items():
        index = ends[turn] + 1
        message = repair.messages[index] if index < len(repair.messages) else {}
        content = message.get("content") if _text(message, "role") == "user" else None
        if isinstance(content, list):
            kinds = [_text(block, "type") for block in content]
            first = next((n for n, kind in enumerate(kinds) if kind != "tool_result"), len(kinds))
            inserted[index, first] = added
        elif isinstance(content, str):
            said = [{"type": "text", "text": content}] if content.strip() else []
            changed[index] = [{**message, "content": [*added, *said]}]
        else:
            changed[index - 1] = [repair.messages[index - 1], {"role": "user", "content": added}]
    changed |= _changed_parts(repair.messages, "content", pairs.left_out, inserted)
    repair.messages = _rebuilt(repair.messages, changed)


def _turns(messages: Sequence[Any], role: str) -> Iterator[tuple[int | None, Any]]:
    """Each message with the turn of the role that it is in, as an API joins those in a row."""
    turn = None
    for index, message in enumerate(messages):
        if _text(message, "role") != role:
            turn = None
        elif turn is None:
            turn = index
        yield turn, message


def _tool_result(kind: str, call_id: str, outcome: str) -> dict[str, Any]:
    content = [{"type": "text", "text": outcome}]
    return {"type": kind, "tool_use_id": call_id, "content": content, "is_error": True}


# -- Anthropic, tools that the server runs: blocks in the assistant's own turn ---------------


def _repair_server_tools(repair: ToolCallRepair, outcome: str) -> None:
    messages, open_from = repair.messages, len(repair.messages)
    while open_from and _is_only_results(messages[open_from - 1]):
        open_from -= 1  # results for the client's calls: the server may still be at work
    calls, results = list[_Call](), list[_Result]()
    last_turn = None
    for index, (turn, message) in enumerate(_turns(messages, "assistant")):
        if turn is None:
            continue
        last_turn = turn if index == open_from - 1 else last_turn
        for number, block in _parts(message, "content"):
            kind, place = _text(block, "type") or "", (index, number)
            call_id, answered = _text(block, "id"), _text(block, "tool_use_id")
            if kind in {"server_tool_use", "mcp_tool_use"} and call_id is not None:
                name = _text(block, "name") or ""
                answer = _server_result(kind, name, call_id, outcome)
                calls.append(_Call(ToolCall(name, call_id), call_id, place, turn, answer))
            elif kind.endswith("_tool_result") and answered is not None:
                results.append(_Result(answered, place, turn, block))
    for call in calls:
        if call.turn == last_turn:
            call.placeholder = None
    pairs = _pair(calls, results, repair, anywhere=True)
    inserted = {(call.place[0], call.place[1] + 1): [value] for call, value in pairs.added}
    changed = _changed_parts(messages, "content", pairs.left_out, inserted)
    repair.messages = _rebuilt(messages, changed)


def _is_only_results(message: Any) -> bool:
    blocks = [block for _, block in _parts(message, "content")]
    of_user = bool(blocks) and _text(message, "role") == "user"
    return of_user and all(_text(block, "type") == "tool_result" for block in blocks)


def _server_result(kind: str, name: str, call_id: str, outcome: str) -> dict[str, Any]:
    if kind == "mcp_tool_use":
        return _tool_result("mcp_tool_result", call_id, outcome)
    tool = "tool_search_tool" if name.startswith("tool_search_tool") else name
    error = {"type": f"{tool}_tool_result_error", "error_code": "unavailable"}
    return {"type": f"{tool}_tool_result", "tool_use_id": call_id, "content": error}


# -- Gemini: parts of the contents directly after the model's ---------------------------------

_CALL_KEYS = {"function_call": "function_response", "functionCall": "functionResponse"}


def _repair_gemini(repair: ToolCallRepair, outcome: str) -> None:
    calls, results = list[_Call](), list[_Result]()
    ends: dict[int, int] = {}
    window: int | None = None
    for index, (turn, message) in enumerate(_turns(repair.messages, "model")):
        if turn is not None:
            window, ends[turn] = turn, index
        found = []
        for number, part in _parts(message, "parts"):
            place = (index, number)
            for call_key, result_key in _CALL_KEYS.items():
                asked, answer = (_object(part, key) for key in (call_key, result_key))
                if turn is not None and asked is not None:
                    call = ToolCall(_text(asked, "name") or "", _text(asked, "id") or None)
                    response = {"name": call.name, "response": {"error": outcome}}
                    response |= {"id": call.call_id} if call.call_id else {}
                    made = {result_key: response}
                    calls.append(_Call(call, call.call_id or "", place, turn, made))
                elif turn is None and answer is not None:
                    found.append(_Result(_text(answer, "id") or "", place, window, part))
        results += found
        if turn is None:
            window = window if found else None
            if found and window is not None:
                ends[window] = index
    _know_by_name(calls, results)
    pairs = _pair(calls, results, repair)
    inserted: dict[Place, list[Any]] = {}
    changed: dict[int, list[Any]] = {}
    for turn, added in pairs.added_by_turn().items():
        index = ends[turn]
        message = repair.messages[index]
        answers = [n for n, part in _parts(message, "parts") if _response(part) is not None]
        if _text(message, "role") == "model":
            changed[index] = [message, {"role": "user", "parts": added}]
        else:
            inserted[index, answers[-1] + 1] = added
    changed |= _changed_parts(repair.messages, "parts", pairs.left_out, inserted)
    repair.messages = _rebuilt(repair.messages, changed)


def _object(part: Any, key: str) -> Mapping[str, Any] | None:
    value = part.get(key) if isinstance(part, Mapping) else None
    return value if isinstance(value, Mapping) else None


def _response(part: Any) -> Mapping[str, Any] | None:
    return _object(part, "function_response") or _object(part, "functionResponse")


def _know_by_name(calls: Sequence[_Call], results: Sequence[_Result]) -> None:
    """Find the calls of those results that have no id, or whose calls have none, by their names.

    What was recorded comes before what an earlier repair made.
    """
    answered = {(result.key, result.turn) for result in results}
    by_name = {call.call.name: call for call in calls}
    waiting: dict[tuple[int | None, str], list[_Call]] = defaultdict(list)
    for call in reversed(calls):
        if not call.key or (call.key, call.turn) not in answered:
            waiting[call.turn, call.call.name].append(call)
            waiting[None, call.call.name].append(call)
    ids = {call.key for call in calls if call.key}
    made: tuple[list[_Result], list[_Result]] = ([], [])  # recorded, and by an earlier repair
    for result in results:
        if result.key not in ids:
            known = by_name.get(_name_of(result))
            made[known is not None and result.value == known.placeholder].append(result)
    taken = set[_Call]()
    for unknown in made:
        in_turn = [(result, result.turn) for result in unknown if result.turn is not None]
        for result, turn in [*in_turn, *((result, None) for result in unknown)]:
            stack = waiting[turn, _name_of(result)]
            while result.call is None and stack and stack[-1].place < result.place:
                call = stack.pop()
                if call not in taken:
                    taken.add(call)
                    result.call = call
    for result in made[1]:
        result.call = result.call or by_name[_name_of(result)]


def _name_of(result: _Result) -> str:
    return _text(_response(result.value), "name") or ""
