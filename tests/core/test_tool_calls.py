"""A conversation whose tool calls and results do not match is one that its model's API accepts."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import anthropic
import google.genai.errors
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_state import UNKNOWN_OUTCOME, ToolCallRepair, repair_tool_calls
from tests.core.model_apis import FORMS, Anthropic, Chat, Form, Gemini, RefusedError, Responses

REFUSALS = (openai.BadRequestError, anthropic.BadRequestError, google.genai.errors.ClientError)


@pytest.fixture(params=FORMS, ids=lambda form: form.name)
def form(request: pytest.FixtureRequest) -> Form:
    chosen: Form = request.param
    return chosen


def repaired(form: Form, messages: list[Any]) -> ToolCallRepair:
    """Repair a conversation, and check what holds for every one."""
    before = copy.deepcopy(messages)
    repair = repair_tool_calls(messages)
    assert messages == before
    form.judge(repair.messages)
    again = repair_tool_calls(repair.messages)
    assert again.messages == repair.messages
    assert not again
    assert bool(repair) == (repair.messages != messages)
    return repair


def text(messages: list[Any], pattern: str) -> list[str]:
    return re.findall(pattern, json.dumps(messages))


def ids(form: Form, *names: str) -> list[str | None]:
    """The ids that the form gives calls."""
    if isinstance(form, Gemini):
        return [form._id(name).get("id") for name in names]
    return [*names]


def test_the_real_sdk_has_a_call_without_a_result_refused_and_the_repaired_one_accepted(
    form: Form,
) -> None:
    messages = [form.said("hello"), *form.calls("a", "b"), *form.answers("b"), form.said("well?")]
    with pytest.raises(REFUSALS):
        form.send(messages)

    form.send(repaired(form, messages).messages)


def test_a_conversation_that_ends_in_a_call_gets_the_unknown_outcome(form: Form) -> None:
    messages = [form.said("hello"), *form.calls("a")]

    repair = repaired(form, messages)

    assert repair.messages[:-1] == messages
    assert text(repair.messages[-1:], re.escape(UNKNOWN_OUTCOME))
    assert [call.call_id for call in repair.unknown] == ids(form, "a")


def test_of_parallel_calls_those_without_a_result_get_one(form: Form) -> None:
    messages = [form.said("hello"), *form.calls("a", "b", "c"), *form.answers("b")]

    repair = repaired(form, messages)

    assert [call.call_id for call in repair.unknown] == ids(form, "a", "c")
    assert text(repair.messages, r"result-\w") == ["result-b"]


def test_several_turns_are_repaired_and_what_was_said_stays(form: Form) -> None:
    messages = [
        form.said("text-1"), *form.calls("a"), form.said("text-2"),
        *form.calls("b"), *form.answers("b"), form.thought("text-3"),
        *form.calls("c", "d"), form.said("text-4"),
    ]  # fmt: skip

    repair = repaired(form, messages)

    assert [call.call_id for call in repair.unknown] == ids(form, "a", "c", "d")
    assert text(repair.messages, r"text-\d") == ["text-1", "text-2", "text-3", "text-4"]
    assert not repair.removed


def test_a_result_whose_call_was_cut_off_is_left_out(form: Form) -> None:
    messages = [*form.answers("z"), form.said("text-1"), *form.calls("a"), *form.answers("a")]

    repair = repaired(form, messages)

    assert repair.messages == messages[1:]
    assert text(repair.removed, r"result-\w") == ["result-z"]


def test_the_second_result_of_a_call_is_left_out(form: Form) -> None:
    second = json.loads(json.dumps(form.answers("a")).replace("result-a", "result-z"))
    messages = [form.said("hello"), *form.calls("a"), *form.answers("a"), *second]

    repair = repaired(form, messages)

    assert text(repair.messages, r"result-\w") == ["result-a"]
    assert text(repair.removed, r"result-\w") == ["result-z"]


def test_a_late_result_stays_the_outcome_of_its_call(form: Form) -> None:
    messages = [form.said("text-1"), *form.calls("a"), form.said("text-2"), *form.answers("a")]

    repair = repaired(form, messages)

    assert not repair.unknown
    assert not repair.removed
    assert text(repair.messages, r"result-\w") == ["result-a"]
    assert text(repair.messages, r"text-\d") == ["text-1", "text-2"]
    moved = [] if isinstance(form, Responses) else ids(form, "a")  # it may stand anywhere there
    assert [call.call_id for call in repair.moved] == moved


def test_a_result_that_comes_after_a_repair_replaces_the_unknown_outcome(form: Form) -> None:
    messages = repaired(form, [form.said("hello"), *form.calls("a", "b"), *form.answers("b")])

    repair = repaired(form, [*messages.messages, *form.answers("a")])

    assert not text(repair.messages, re.escape(UNKNOWN_OUTCOME))
    assert sorted(text(repair.messages, r"result-\w")) == ["result-a", "result-b"]
    assert not repair.removed


@pytest.mark.parametrize("later", ["text", "nothing"])
def test_ids_that_come_again_in_each_turn_are_told_apart(form: Form, later: str) -> None:
    messages = [
        form.said("text-1"), *form.calls("a"), form.said("text-2"),
        *form.calls("a"), *form.answers("a"), *([form.said("text-3")] if later == "text" else []),
    ]  # fmt: skip

    repair = repaired(form, messages)

    assert len(repair.unknown) == 1
    assert text(repair.messages, "result-a|unknown") == ["unknown", "result-a"]


def test_a_right_conversation_is_not_touched(form: Form) -> None:
    messages = [
        form.said("text-1"), *form.calls("a", "b"), *form.answers("b", "a"),
        form.thought("text-2"), form.said("text-3"), *form.calls("c"), *form.answers("c"),
    ]  # fmt: skip

    repair = repaired(form, messages)

    assert not repair
    assert repair.messages == messages


def test_what_is_no_message_of_an_api_stays(form: Form) -> None:
    odd: list[Any] = ["a line", None, 7, {"role": "user"}, {"tool_calls": "?"}, {"content": [3]}]
    messages = [*odd, {"role": "assistant", "content": [None], "tool_calls": [None, {"id": 4}]}]

    assert repair_tool_calls([*messages, *form.calls("a")]).messages[: len(messages)] == messages


def test_the_text_of_the_outcome_can_be_chosen(form: Form) -> None:
    repair = repair_tool_calls(form.calls("a"), outcome="nobody knows")

    assert text(repair.messages, "nobody knows")
    assert not text(repair.messages, re.escape(UNKNOWN_OUTCOME))


conversations = st.lists(
    st.one_of(
        st.tuples(st.just("said")),
        st.tuples(st.just("thought")),
        st.tuples(
            st.just("calls"), st.integers(1, 3), st.permutations([0, 1, 2]), st.integers(0, 3)
        ),
    ),
    max_size=6,
)


@given(
    form=st.sampled_from(FORMS),
    turns=conversations,
    edits=st.lists(
        st.tuples(st.sampled_from(["drop", "repeat", "swap"]), st.integers(0, 20)), max_size=5
    ),
)
def test_however_a_conversation_was_cut_it_is_accepted_and_keeps_what_was_recorded(
    form: Form, turns: list[Any], edits: list[tuple[str, int]]
) -> None:
    messages: list[Any] = []
    for number, (what, *how) in enumerate(turns):
        if what == "calls":
            count, order, answered = how
            names = [f"{number}{letter}" for letter in "xyz"[:count]]
            messages += form.calls(*names)
            given_order = [names[place] for place in order if place < count][:answered]
            messages += form.answers(*given_order) if given_order else []
        else:
            messages.append(getattr(form, what)(f"text-{number}"))
    for how, place in edits:
        if not messages:
            break
        index = place % len(messages)
        if how == "drop":
            del messages[index]
        elif how == "repeat":
            messages.insert(index, messages[index])
        else:
            messages[index - 1], messages[index] = messages[index], messages[index - 1]

    repair = repaired(form, messages)

    said = r"text-\d+"
    assert text(repair.messages, said) == text(messages, said)
    called = {name for each in messages for name in form.called(each)}
    answers = {name for name in text(messages, r"result-(\d[xyz])") if name in called}
    by_order = isinstance(form, Gemini) and ids(form, "x") == [None]  # a swap makes it another's
    if called_once(messages) and not (by_order and "swap" in dict(edits)):
        assert set(text(repair.messages, r"result-(\d[xyz])")) == answers


def called_once(messages: list[Any]) -> bool:
    """No call was repeated: else its second result is another call's."""
    return len(messages) == len({json.dumps(message) for message in messages})


# -- what one API alone has ------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        {"type": "custom_tool_call", "call_id": "a", "name": "sql", "input": "select 1"},
        {"type": "local_shell_call", "call_id": "a", "id": "lsh_1", "status": "completed",
         "action": {"type": "exec", "command": ["ls"], "env": {}}},
        {"type": "shell_call", "call_id": "a", "action": {"commands": ["ls"]}},
        {"type": "apply_patch_call", "call_id": "a", "status": "completed",
         "operation": {"type": "delete_file", "path": "x"}},
        {"type": "tool_search_call", "call_id": "a", "execution": "client", "arguments": {}},
        {"type": "computer_call", "call_id": "a", "id": "cu_1", "status": "completed",
         "action": {"type": "wait"}, "pending_safety_checks": []},
        {"type": "function_call", "call_id": "a", "name": "look", "arguments": "{}",
         "caller": {"type": "program", "caller_id": "p"}},
    ],
    ids=lambda call: call["type"],
)  # fmt: skip
def test_every_kind_of_call_of_the_responses_api_is_repaired(call: dict[str, Any]) -> None:
    form = Responses()
    reasoning = {"type": "reasoning", "id": "rs_1", "summary": []}
    messages = [form.said("hello"), reasoning, call, form.said("text-1")]
    with pytest.raises(RefusedError):
        form.judge(messages)

    repair = repaired(form, messages)

    form.send(repair.messages)
    assert [each.call_id for each in repair.unknown] == ["a"]
    assert repair.messages[-1] == messages[-1]
    if "caller" in call:
        assert repair.messages[-2]["caller"] == call["caller"]


@pytest.mark.parametrize(
    "call",
    [
        {"type": "shell_call", "call_id": "a", "action": {"commands": ["ls"]},
         "environment": {"type": "container_reference", "container_id": "c"}},
        {"type": "tool_search_call", "call_id": "a", "execution": "server", "arguments": {}},
        {"type": "mcp_approval_request", "id": "a", "name": "x", "server_label": "s",
         "arguments": "{}"},
    ],
    ids=["container", "server", "approval"],
)  # fmt: skip
def test_what_a_server_or_a_person_has_to_answer_stays_open(call: dict[str, Any]) -> None:
    assert not repair_tool_calls([call])


def server_call(name: str, call_id: str = "s") -> dict[str, Any]:
    return {"type": "server_tool_use", "id": call_id, "name": name, "input": {}}


@pytest.mark.parametrize(
    "name",
    ["web_search", "web_fetch", "code_execution", "bash_code_execution",
     "text_editor_code_execution", "tool_search_tool_regex", "tool_search_tool_bm25"],
)  # fmt: skip
def test_a_tool_that_anthropics_server_ran_gets_an_error_of_its_own_type(name: str) -> None:
    form = Anthropic()
    said = {"type": "text", "text": "let me see"}
    messages = [
        form.said("hello"),
        {"role": "assistant", "content": [said, server_call(name)]},
        form.said("and?"),
    ]
    with pytest.raises(RefusedError):
        form.judge(messages)

    repair = repaired(form, messages)

    form.send(repair.messages)
    assert [call.name for call in repair.unknown] == [name]


def test_a_server_tool_in_the_last_turn_is_still_at_work() -> None:
    form = Anthropic()
    code = [server_call("code_execution"), *form.calls("a")[0]["content"]]
    messages = [form.said("hello"), {"role": "assistant", "content": code}]

    assert not repair_tool_calls([form.said("hello"), {"role": "assistant", "content": code[:1]}])
    repair = repaired(form, messages)  # the client's call has no result, the server's may come
    assert [call.call_id for call in repair.unknown] == ["a"]


def test_an_mcp_tool_that_anthropic_called_gets_the_unknown_outcome() -> None:
    call = {"type": "mcp_tool_use", "id": "m", "name": "x", "server_name": "s", "input": {}}
    messages = [{"role": "assistant", "content": [call]}, Anthropic().said("and?")]

    repair = repaired(Anthropic(), messages)

    assert repair.messages[0]["content"][1]["type"] == "mcp_tool_result"
    assert text(repair.messages, re.escape(UNKNOWN_OUTCOME))


def test_anthropics_results_come_before_what_the_user_said() -> None:
    form = Anthropic()
    answer = form.answers("a")[0]["content"]
    said = {"type": "text", "text": "text-1"}
    messages = [
        form.said("hello"),
        *form.calls("a", "b"),
        {"role": "user", "content": [said, *answer]},
    ]

    repair = repaired(form, messages)

    assert [block["type"] for block in repair.messages[2]["content"]] == [
        "tool_result", "tool_result", "text",
    ]  # fmt: skip
    assert [call.call_id for call in repair.moved] == ["a"]


def test_a_turn_with_a_time_keeps_it() -> None:
    said = {"role": "user", "content": "text-1", "timestamp": "2026-01-01T00:00:00.000000Z"}

    repair = repaired(Anthropic(), [*Anthropic().calls("a"), said])

    assert repair.messages[1]["timestamp"] == said["timestamp"]


def test_gemini_pairs_by_order_where_calls_of_one_name_have_no_id() -> None:
    form = Gemini(ids=False, camel=False)
    twice = {"role": "model", "parts": [*form.calls("a")[0]["parts"], *form.calls("a")[0]["parts"]]}

    repair = repaired(form, [form.said("hello"), twice, *form.answers("a")])

    assert len(repair.unknown) == 1
    assert len(repair.messages[-1]["parts"]) == 2


def test_gemini_takes_a_result_without_the_id_of_its_call() -> None:
    """As ``Part.from_function_response`` makes them."""
    asked = Gemini(ids=True, camel=False).calls("a", "b")
    answered = Gemini(ids=False, camel=False).answers("b", "a")

    assert not repair_tool_calls([*asked, *answered])
    assert [call.call_id for call in repair_tool_calls([*asked, *answered[:0]]).unknown] == [
        "id-a", "id-b",
    ]  # fmt: skip


def test_a_custom_tool_of_chat_completions_is_repaired() -> None:
    custom = {"id": "a", "type": "custom", "custom": {"name": "sql", "input": "select 1"}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [custom]}]

    repair = repaired(Chat(), messages)

    assert [(call.name, call.call_id) for call in repair.unknown] == [("sql", "a")]
    Chat().send(repair.messages)
