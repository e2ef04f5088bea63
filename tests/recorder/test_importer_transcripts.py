"""Claude Code's transcripts and Codex's rollouts: who said what, and what is no message."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_state.errors import UnreadableMessageError
from agent_state.protocols import JsonObject
from agent_state_integrations.recorder.importers import (
    FileReport,
    SkippedLineError,
    TranscriptFile,
    import_logs,
    known,
)
from agent_state_integrations.recorder.normalize import normalize
from agent_state_integrations.recorder.reader import read, read_records
from agent_state_integrations.recorder.writer import RecordWriter

SAMPLES = Path(__file__).parents[2] / "examples" / "recordings"
CLAUDE = SAMPLES / "claude-code" / "-home-dev-shop"
SESSION = "5b0c2f7e-1111-4222-8333-9a4d5e6f7a01"
RESUMED = "5b0c2f7e-1111-4222-8333-9a4d5e6f7a02"
NEW = SAMPLES / "codex" / "2026"
OLD = SAMPLES / "codex" / "2025"


CLAUDE_LINE = {"uuid": "1", "parentUuid": None, "isSidechain": False}


def imported(tmp_path: Path, path: Path) -> tuple[list[FileReport], list[JsonObject]]:
    with RecordWriter(tmp_path / "state") as writer:
        report = import_logs([path], writer)
    found = [record for _, record in read_records(tmp_path / "state")]
    return report.files, found


def lines_of(tmp_path: Path, *lines: JsonObject, name: str = "s.jsonl") -> list[JsonObject]:
    path = tmp_path / name
    path.write_bytes(b"\n".join(map(orjson.dumps, lines)))
    return imported(tmp_path, path)[1]


def said(records: list[JsonObject]) -> list[tuple[str, str]]:
    return [(record["SpeakerName"], record["Message"][:40]) for record in records]


def test_a_session_of_claude_code(tmp_path: Path) -> None:
    (file,), records = imported(tmp_path, CLAUDE / f"{SESSION}.jsonl")
    assert (file.shape, file.lines, file.recorded) == ("claude-code", 21, 14)
    assert file.reasons == {
        "file-history-snapshot lines hold no message": 1,
        "put in by the program (isMeta)": 1,
        "queue-operation lines hold no message": 1,
        "progress lines hold no message": 1,
        "system lines without text (turn_duration)": 1,
        "the summary of the compaction follows": 1,
        "the last line is torn": 1,
    }
    assert file.examples == [(21, "the last line is torn")]
    assert said(records) == [
        ("system", "The cart forgets its items"),
        ("user", "The cart loses its items after a reload."),
        ("claude", "The cart may only be in memory. Look at "),
        ("claude", "I look at how the cart is stored."),
        ("claude", 'Read {"file_path":"/home/dev/shop/cart.j'),
        ("tool", "1\tlet items = [];\n2\texport function add("),
        ("claude", 'Task {"description":"Find the tests","pr'),
        ("tool", "Only cart.test.js; nothing about a reloa"),
        ("claude", "The items are kept in a variable and nev"),
        ("claude", 'Bash {"command":"npm test -- cart","desc'),
        ("tool", "1 failed: reload keeps the items"),
        ("user", "This is what I see:\n\n[image]"),
        ("system", "This session goes on from an earlier one"),
        ("claude", "Fixed: the reload test passes now."),
    ]
    assert {record["ContextId"] for record in records} == {SESSION}
    question = records[1]
    assert question["Id"].endswith("000000000001")
    assert question["SpeakerRole"] == "User"
    assert question["Timestamp"] == "2026-03-04T16:33:20.250000Z"
    assert question["Metadata"]["cwd"] == "/home/dev/shop"
    assert question["Metadata"]["git_branch"] == "main"
    call, result = records[9], records[10]
    assert call["Content"]["tool_calls"][0]["input"]["command"] == "npm test -- cart"
    assert call["Metadata"]["model"] == "claude-sonnet-4-5"
    assert call["Metadata"]["usage"]["output_tokens"] == 57
    assert call["Metadata"]["parent"].endswith("000000000009")
    assert result["Content"]["tool_results"] == [
        {"call": "toolu_03", "tool": "Bash", "is_error": True}
    ]
    assert result["Metadata"]["tools"] == ["Bash"]
    kinds = [record["Metadata"].get("message_type") for record in records]
    assert kinds[:5] == ["summary", None, "thinking", "message", "tool_call"]
    assert "iVBOR" not in str(records)


def test_a_project_with_a_sub_agent_and_a_resumed_session(tmp_path: Path) -> None:
    files, records = imported(tmp_path, CLAUDE)
    resumed = next(file for file in files if RESUMED in file.path)
    assert (resumed.recorded, resumed.duplicates) == (1, 8)
    agent = next(file for file in files if "subagents" in file.path)
    assert agent.recorded == 4
    inside = [record for record in records if "sub_agent" in record["Metadata"]]
    assert said(inside) == [
        ("claude", "Which tests cover the cart?"),
        ("claude/a1b2c3d4", 'Grep {"pattern":"cart","path":"/home/dev'),
        ("tool", "Found 1 file\ncart.test.js"),
        ("claude/a1b2c3d4", "Only cart.test.js; nothing about a reloa"),
    ]
    assert {record["ContextId"] for record in inside} == {SESSION}
    assert inside[0]["Metadata"]["receiver"] == "claude/a1b2c3d4"


def test_a_sub_agent_is_known_by_its_file_too(tmp_path: Path) -> None:
    folder = tmp_path / "session-1" / "subagents"
    folder.mkdir(parents=True)
    line = {**CLAUDE_LINE, "type": "assistant", "message": {"content": "hi", "model": "m"}}
    (folder / "agent-ff.jsonl").write_bytes(orjson.dumps(line))
    _, (record,) = imported(tmp_path, folder / "agent-ff.jsonl")
    assert (record["SpeakerName"], record["ContextId"]) == ("claude/ff", "session-1")


@pytest.mark.parametrize(
    "line",
    [
        {**CLAUDE_LINE, "type": "user"},
        {**CLAUDE_LINE, "type": "user", "message": None},
        {**CLAUDE_LINE, "type": "user", "message": {"content": 5}},
        {**CLAUDE_LINE, "type": "user", "message": {"content": [5, None, {"type": "tool_result"}]}},
        {**CLAUDE_LINE, "type": "assistant"},
        {**CLAUDE_LINE, "type": "assistant", "message": {"content": [{"type": "thinking"}]}},
        {**CLAUDE_LINE, "type": "assistant", "message": {"content": [{"type": "tool_use"}]}},
        {"type": "assistant", "uuid": 5, "message": {"content": "x"}, "sessionId": []},
        {**CLAUDE_LINE, "type": "system", "content": {}},
        {"type": "summary", "leafUuid": "1", "summary": None},
        {"type": ["user"], "uuid": "1"},
        {"type": "of-tomorrow", "uuid": "1", "message": {"content": "x"}},
    ],
)
def test_odd_lines_of_claude_code_stop_nothing(tmp_path: Path, line: JsonObject) -> None:
    good = {**CLAUDE_LINE, "type": "user", "uuid": "good", "message": {"content": "hello"}}
    records = lines_of(tmp_path, good, line)
    assert records[0]["Message"] == "hello"


def test_a_rollout_of_codex(tmp_path: Path) -> None:
    (file,), records = imported(tmp_path, NEW)
    assert (file.shape, file.lines, file.recorded) == ("codex", 21, 10)
    assert file.examples == []
    assert file.reasons == {
        "session_meta is kept with what follows": 1,
        "turn_context is kept with what follows": 1,
        "put in by the program (instructions, environment)": 2,
        "user_message repeats a response item": 1,
        "agent_reasoning repeats a response item": 1,
        "agent_message repeats a response item": 1,
        "reasoning that is encrypted": 1,
        "token_count is kept with its response": 1,
        "ghost_snapshot items hold no message": 1,
        "world_state lines hold no message": 1,
    }
    assert said(records) == [
        ("user", "Which tests fail, and why?"),
        ("codex", "**Run the tests**"),
        ("codex", 'shell {"command":["bash","-lc","npm test'),
        ("tool", "1 failed, 11 passed"),
        ("codex", "apply_patch *** Begin Patch\n*** Update F"),
        ("tool", "Success. Updated the following files:\nM "),
        ("codex", 'web_search {"type":"search","query":"loc'),
        ("codex", "One test failed: the cart was never load"),
        ("system", "The cart is loaded from localStorage; al"),
        ("system", "interrupted"),
    ]
    assert {record["ContextId"] for record in records} == {"019a2d7a-41c4-78b1-b7cc-a45d62a89c01"}
    call, result = records[2], records[3]
    assert call["Content"]["tool_calls"][0]["id"] == "call_1"
    assert result["Content"]["tool_results"] == [
        {"call": "call_1", "tool": "shell", "about": {"exit_code": 1}, "is_error": True}
    ]
    assert call["Metadata"]["model"] == "gpt-5-codex"
    assert call["Metadata"]["git_branch"] == "main"
    assert call["Timestamp"] == "2026-03-05T20:20:04.250000Z"


def test_a_rollout_of_the_older_form(tmp_path: Path) -> None:
    (file,), records = imported(tmp_path, OLD)
    assert file.reasons == {
        "record_type lines hold no message": 2,
        "session_meta is kept with what follows": 1,
    }
    assert said(records) == [
        ("user", "Create a README file."),
        ("codex", "Plan the README"),
        ("codex", 'local_shell {"type":"exec","command":["l'),
        ("tool", "cart.js"),
        ("codex", "The README is there."),
        ("user", "Thanks."),
    ]
    assert {record["Timestamp"] for record in records} == {"2025-07-11T10:00:00.000000Z"}
    assert {record["ContextId"] for record in records} == {"8d3b1f60-2222-4333-8444-0c1d2e3f4a02"}


def wrapped(kind: str, payload: Any) -> JsonObject:
    return {"timestamp": "2026-03-05T20:20:00Z", "type": kind, "payload": payload}


@pytest.mark.parametrize(
    "line",
    [
        wrapped("response_item", {}),
        wrapped("response_item", None),
        wrapped("response_item", []),
        wrapped("response_item", {"type": "message", "role": "user"}),
        wrapped("response_item", {"type": "message", "role": "user", "content": [{"text": 5}]}),
        wrapped("response_item", {"type": "function_call"}),
        wrapped("response_item", {"type": "function_call_output", "output": {"content": "x"}}),
        wrapped("response_item", {"type": "reasoning", "summary": None}),
        wrapped("event_msg", {"type": "of_tomorrow"}),
        wrapped("event_msg", {"type": "error"}),
        wrapped("compacted", {"message": None}),
        wrapped("session_meta", {"id": 5, "git": []}),
        wrapped("of_tomorrow", {"type": "message"}),
        {"timestamp": [], "type": "event_msg", "payload": {"type": "error", "message": "x"}},
    ],
)
def test_odd_lines_of_codex_stop_nothing(tmp_path: Path, line: JsonObject) -> None:
    good = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}
    records = lines_of(tmp_path, line, wrapped("response_item", good), wrapped("turn_context", {}))
    assert records[-1]["Message"] == "hi"


def test_a_fork_repeats_the_first_lines_of_another_session(tmp_path: Path) -> None:
    records = lines_of(
        tmp_path,
        wrapped("session_meta", {"id": "child", "agent_nickname": "ida"}),
        wrapped("session_meta", {"id": "parent"}),
        wrapped("response_item", {"type": "message", "role": "assistant", "content": "hi"}),
        wrapped("turn_context", {}),
    )
    assert [(r["ContextId"], r["SpeakerName"]) for r in records] == [("child", "codex/ida")]


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        ("response_item", {"type": "agent_message", "content": [{"text": "Done."}]}),
        ("inter_agent_communication", {"content": "Done.", "trigger_turn": True}),
    ],
)
def test_what_agents_of_codex_say_to_each_other(
    tmp_path: Path, kind: str, payload: JsonObject
) -> None:
    payload |= {"author": "/root/ida", "recipient": "/root"}
    (record,) = lines_of(tmp_path, wrapped(kind, payload), wrapped("turn_context", {}))
    assert (record["SpeakerName"], record["Message"]) == ("/root/ida", "Done.")
    assert record["Metadata"]["receiver"] == "/root"


NAMES = [
    *("type", "payload", "message", "content", "uuid", "sessionId", "isSidechain", "isMeta"),
    *("role", "text", "thinking", "name", "input", "output", "arguments", "call_id", "id"),
    *("timestamp", "git", "summary", "subtype", "action", "tool_use_id", "is_error", "usage"),
]
KINDS = [
    *("user", "assistant", "system", "summary", "tool_use", "tool_result", "text", "image"),
    *("session_meta", "response_item", "event_msg", "turn_context", "compacted", "message"),
    *("reasoning", "function_call", "function_call_output", "error", "agent_message"),
]
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(0, 9), st.sampled_from(KINDS), st.text()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(NAMES), inner, max_size=5)
    ),
    max_leaves=12,
)


@given(
    st.sampled_from(sorted(known())),
    st.lists(st.dictionaries(st.sampled_from(NAMES), values, max_size=6), max_size=3),
)
def test_any_line_is_a_message_or_has_a_reason(name: str, lines: list[JsonObject]) -> None:
    reader = known()[name].reader(TranscriptFile(Path("s.jsonl")))
    outcomes = []
    for number, line in enumerate(lines, 1):
        try:
            outcomes += list(reader.messages(line, number))
        except SkippedLineError:
            continue
    outcomes += list(reader.rest())
    for number, said in outcomes:
        assert 1 <= number <= len(lines)
        if isinstance(said, str):
            continue
        try:
            new_id = str if name == "recorded" else fail
            normalize(said, received=datetime(2026, 1, 1, tzinfo=UTC), new_id=new_id)
        except UnreadableMessageError:
            continue


def fail() -> str:
    raise AssertionError("every line has an id of its own")


def test_a_summary_before_everything_else_has_the_time_of_what_follows(tmp_path: Path) -> None:
    path = tmp_path / "5b0c2f7e-1111-4222-8333-9a4d5e6f7a09.jsonl"
    lines = [
        {"type": "summary", "summary": "The cart is faster now", "leafUuid": "u9"},
        {
            "type": "user",
            "uuid": "u1",
            "sessionId": "s1",
            "timestamp": "2026-03-04T16:33:20.000Z",
            "message": {"role": "user", "content": "Make the cart faster"},
        },
    ]
    path.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    with RecordWriter(tmp_path / "state") as writer:
        import_logs([path], writer)
    times = {message.timestamp for message in read(tmp_path / "state")}
    assert times == {"2026-03-04T16:33:20.000000Z"}
