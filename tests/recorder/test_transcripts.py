"""Sessions of six tools: a conversation in each one's own form is the same in a recording."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_state.protocols import JsonObject
from agent_state.testing import FakeClock
from agent_state_integrations.recorder.importers import (
    ImportReport,
    TranscriptFile,
    TranscriptFormat,
    import_logs,
    message_of,
    register,
    registry,
)
from agent_state_integrations.recorder.importers.transcript import Outcome
from agent_state_integrations.recorder.reader import read_records
from agent_state_integrations.recorder.writer import RecordWriter
from tests.recorder import transcripts as made
from tests.recorder.transcripts import FIRST, SECOND

Written = Callable[[Path], Path]


def claude(folder: Path) -> Path:
    return made.write(folder / "project" / f"{FIRST}.jsonl", made.claude_session())


def codex(folder: Path) -> Path:
    return made.write(folder / f"rollout-{FIRST}.jsonl", made.codex_session())


def gemini(folder: Path) -> Path:
    return made.write(folder / "chats" / "session-1.jsonl", made.gemini_session())


def qwen(folder: Path) -> Path:
    return made.write(folder / "chats" / f"{FIRST}.jsonl", made.qwen_session())


def pi(folder: Path) -> Path:
    return made.write(folder / f"2026_{FIRST}.jsonl", made.pi_session())


def opencode(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "exported.json"
    path.write_bytes(orjson.dumps(made.opencode_export(), option=orjson.OPT_INDENT_2))
    return path


def opencode_base(folder: Path) -> Path:
    return made.opencode_base(folder / "opencode.db")


TOOLS: list[tuple[str, Written]] = [
    ("claude-code", claude),
    ("codex", codex),
    ("gemini", gemini),
    ("qwen", qwen),
    ("pi", pi),
    ("opencode", opencode),
    ("opencode", opencode_base),
]
each_tool = pytest.mark.parametrize(
    ("name", "written"), TOOLS, ids=[written.__name__ for _, written in TOOLS]
)


def imported(state: Path, *paths: Path) -> ImportReport:
    with RecordWriter(state, clock=FakeClock()) as writer:
        return import_logs(paths, writer)


def records(state: Path) -> list[JsonObject]:
    return sorted(
        (record for _, record in read_records(state)), key=lambda record: str(record["Timestamp"])
    )


def said(state: Path) -> list[tuple[str, str]]:
    return [(record["SpeakerRole"], record["Message"]) for record in records(state)]


def by(state: Path, role: str) -> list[JsonObject]:
    return [record for record in records(state) if record["SpeakerRole"] == role]


@each_tool
def test_a_session_is_known_by_what_only_its_tool_writes(
    tmp_path: Path, name: str, written: Written
) -> None:
    path = written(tmp_path / "log")
    for asked in (path, tmp_path / "log"):
        report = imported(tmp_path / "state", asked)
        (file,) = report.files
        assert (report.ok, file.shape) == (True, name)
        assert file.mark


@each_tool
def test_the_same_conversation_has_the_same_words(
    tmp_path: Path, name: str, written: Written
) -> None:
    imported(tmp_path / "state", written(tmp_path / "log"))
    spoken = [
        (role, text.strip())
        for role, text in said(tmp_path / "state")
        if role in ("User", "Agent", "Tool")
    ]
    assert spoken[0] == ("User", "Is the lamp on?")
    assert ("Agent", "I look.") in spoken
    assert ("Tool", "no lamp") in spoken
    assert ("Agent", "No.") in spoken
    assert [text for role, text in spoken if role == "User"][:1] == ["Is the lamp on?"]


@each_tool
def test_a_command_that_failed_has_its_exit_code(
    tmp_path: Path, name: str, written: Written
) -> None:
    imported(tmp_path / "state", written(tmp_path / "log"))
    (result,) = by(tmp_path / "state", "Tool")
    (outcome,) = result["Content"]["tool_results"]
    assert outcome["call"] in ("c1", "t1")
    assert outcome["about"]["exit_code"] == 2
    assert outcome["is_error"] is True
    assert result["Metadata"]["is_error"] is True


@each_tool
def test_each_response_is_counted_once_and_under_the_same_names(
    tmp_path: Path, name: str, written: Written
) -> None:
    imported(tmp_path / "state", written(tmp_path / "log"))
    usages = [record["Metadata"].get("usage") for record in records(tmp_path / "state")]
    given = 1200 if name == "claude-code" else 900
    once = {"input_tokens": given, "output_tokens": 42, "cache_read_tokens": 300}
    assert [usage for usage in usages if usage] == [once, once]


@each_tool
def test_a_request_that_failed_is_nobodys_words(
    tmp_path: Path, name: str, written: Written
) -> None:
    imported(tmp_path / "state", written(tmp_path / "log"))
    failed = [
        record
        for record in records(tmp_path / "state")
        if record["Metadata"].get("is_error") and record["SpeakerRole"] != "Tool"
    ]
    if name == "gemini":
        assert failed == []  # it writes none
        return
    (failure,) = failed
    assert failure["Message"] in ("529 too busy", "too busy")
    assert failure["SpeakerRole"] in ("System", "Synthetic")


@each_tool
def test_a_second_import_adds_nothing(tmp_path: Path, name: str, written: Written) -> None:
    path = written(tmp_path / "log")
    first = imported(tmp_path / "state", path)
    assert first.recorded > 3
    again = imported(tmp_path / "state", path)
    assert (again.recorded, again.duplicates) == (0, first.recorded)


# -- shapes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        {"role": "user", "content": "hello"},
        {"type": "user", "message": {"role": "user", "parts": [{"text": "hello"}]}},
        {"type": "user", "uuid": "1", "message": {"content": "hello"}},
        {"id": "1", "type": "gemini", "content": "hello"},
        {"turn": 1, "prompt": "hello", "response": "hi"},
    ],
)
def test_a_transcript_of_an_unknown_tool_is_refused(tmp_path: Path, line: JsonObject) -> None:
    path = made.write(tmp_path / "log" / "a.jsonl", [line, line])
    for asked in (path, path.parent):
        report = imported(tmp_path / "state", asked)
        (file,) = report.files
        assert (report.ok, file.shape, file.recorded) == (False, None, 0)
        assert "no known format" in str(file.error)


def test_of_several_files_the_unknown_one_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    claude(tmp_path / "log")
    made.write(tmp_path / "log" / "other.jsonl", [{"role": "user", "content": "hello"}])
    report = imported(tmp_path / "state", tmp_path / "log")
    assert report.recorded > 4
    assert not report.ok


class _Diary:
    """A format of a user's own: ``{"dear": "diary", "words": …}``."""

    def __init__(self, file: TranscriptFile) -> None:
        self._session = file.path.stem

    def messages(self, line: JsonObject, number: int) -> Iterator[Outcome]:
        said = message_of("ada", "User", str(line["words"]), None)
        yield number, {**said, "Id": f"{self._session}/{number}", "ContextId": self._session}

    def rest(self) -> Iterator[Outcome]:
        return iter(())


def test_a_user_adds_a_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    path = made.write(tmp_path / "may.jsonl", [{"dear": "diary", "words": "It rained."}])
    assert not imported(tmp_path / "state", path).ok
    register(
        TranscriptFormat(
            name="diary",
            title="a diary",
            mark=lambda line: "dear diary" if line.get("dear") == "diary" else None,
            reader=_Diary,
        )
    )
    report = imported(tmp_path / "state", path)
    assert (report.ok, report.files[0].shape) == (True, "diary")
    assert said(tmp_path / "state") == [("User", "It rained.")]


# -- identity --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("original", "fork"), [("a", "z"), ("z", "a")])
@pytest.mark.parametrize("version", ["with times of the file", "older"])
def test_a_shared_past_stays_with_its_original_whichever_file_sorts_first(
    tmp_path: Path, original: str, fork: str, version: str
) -> None:
    lines = made.claude_session()
    forked = made.claude_fork(lines)
    if version == "older":
        lines, forked = ([line for line in each if "uuid" in line] for each in (lines, forked))
    made.write(tmp_path / "log" / f"{original}.jsonl", lines)
    made.write(tmp_path / "log" / f"{fork}.jsonl", forked)
    report = imported(tmp_path / "state", tmp_path / "log")
    assert report.ok
    contexts = {record["Message"]: record["ContextId"] for record in records(tmp_path / "state")}
    assert contexts.pop("And the door?") == contexts.pop("Shut.") == SECOND
    assert set(contexts.values()) == {FIRST}
    (door,) = (each for each in records(tmp_path / "state") if each["Message"] == "And the door?")
    assert door["Metadata"]["forked_from"] == original


def test_an_original_that_goes_on_after_its_fork_is_still_the_original(tmp_path: Path) -> None:
    lines = made.claude_session()
    later = made.claude(30, "user", made.person("And later?"), timestamp=made.at(200))
    made.write(tmp_path / "log" / "z.jsonl", [*lines, later])
    made.write(tmp_path / "log" / "a.jsonl", made.claude_fork(lines))
    imported(tmp_path / "state", tmp_path / "log")
    contexts = [record["ContextId"] for record in records(tmp_path / "state")]
    assert contexts.count(SECOND) == 2


def test_forks_of_qwen_and_pi_leave_the_past_where_it_was(tmp_path: Path) -> None:
    lines = made.qwen_session()
    made.write(tmp_path / "log" / "a.jsonl", made.qwen_fork(lines))
    made.write(tmp_path / "log" / "z.jsonl", lines)
    session = made.write(tmp_path / "log" / f"2026_{FIRST}.jsonl", made.pi_session())
    made.write(tmp_path / "log" / "1_fork.jsonl", made.pi_fork(made.pi_session(), session))
    imported(tmp_path / "state", tmp_path / "log")
    own = [each for each in records(tmp_path / "state") if each["ContextId"] == SECOND]
    assert [each["Message"] for each in own] == ["And the door?"] * 2
    assert {each["Metadata"]["forked_from"] for each in own} == {FIRST}
    assert {each["Metadata"]["parent_context"] for each in own} == {FIRST}


def test_a_fork_of_opencode_leaves_the_past_where_it_was(tmp_path: Path) -> None:
    report = imported(tmp_path / "state", opencode_base(tmp_path / "log"))
    assert report.reasons["a fork repeats a message of ses_one"] == 8
    (door,) = (each for each in records(tmp_path / "state") if each["ContextId"] == "ses_two")
    assert door["Message"] == "And the door?"
    assert door["Metadata"]["forked_from"] == "ses_one"


def test_ids_of_one_file_are_of_that_file(tmp_path: Path) -> None:
    for session in (FIRST, SECOND):
        folder = tmp_path / "log" / session
        made.write(folder / f"x_{session}.jsonl", made.pi_session(session))
        made.write(folder / "g.jsonl", made.gemini_session(session))
    report = imported(tmp_path / "state", tmp_path / "log")
    assert report.duplicates == 0
    assert not any("original_id" in each["Metadata"] for each in records(tmp_path / "state"))


def test_a_fork_and_a_sub_agent_of_codex_have_parents(tmp_path: Path) -> None:
    spawned = {"parent_thread_id": FIRST, "agent_nickname": "ida"}
    lines = made.codex_session()
    head = {**lines[0], "payload": {**lines[0]["payload"], "id": SECOND, **spawned}}
    made.write(tmp_path / "log" / "agent.jsonl", [head, *lines[1:]])
    imported(tmp_path / "state", tmp_path / "log")
    prompts = by(tmp_path / "state", "Prompt")
    assert [prompt["Message"] for prompt in prompts] == ["Is the lamp on?", "Again."]
    for record in records(tmp_path / "state"):
        assert record["ContextId"] == SECOND
        assert record["Metadata"]["parent_context"] == FIRST
    assert by(tmp_path / "state", "Agent")[0]["SpeakerName"] == "codex/ida"
    assert by(tmp_path / "state", "User") == []


# -- who spoke -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "role", "shown"),
    [
        (
            "<task-notification>\n<status>completed</status>\n</task-notification>",
            "Notification",
            "",
        ),
        ("<system-reminder>Today is Friday.</system-reminder>", "Notification", ""),
        (
            "<command-name>/cost</command-name>\n<command-args>all</command-args>",
            "Command",
            "/cost all",
        ),
        ("<local-command-stdout>4 tokens</local-command-stdout>", "Command", "4 tokens"),
        ("<bash-input>ls</bash-input>", "Command", "ls"),
        ("<user-prompt-submit-hook>checked</user-prompt-submit-hook>", "Hook", "checked"),
        ("[Request interrupted by user for tool use]", "Interruption", ""),
        ("Why is there a <lamp> here?", "User", ""),
    ],
)
def test_what_the_program_put_in_the_persons_place(
    tmp_path: Path, words: str, role: str, shown: str
) -> None:
    lines = [made.claude(1, "user", made.person(words))]
    imported(tmp_path / "state", made.write(tmp_path / "a.jsonl", lines))
    assert said(tmp_path / "state") == [(role, shown or words)]


def test_what_the_program_put_in_the_models_place(tmp_path: Path) -> None:
    silent = {**made.answer("r1", made.text("No response requested.")), "model": "<synthetic>"}
    hook = {"type": "hook_success", "hookName": "Stop", "stdout": "checked", "exitCode": 0}
    lines = [
        made.claude(1, "assistant", silent),
        made.claude(2, "attachment", attachment=hook),
    ]
    imported(tmp_path / "state", made.write(tmp_path / "a.jsonl", lines))
    assert said(tmp_path / "state") == [
        ("Synthetic", "No response requested."),
        ("Hook", "checked"),
    ]
    assert all("usage" not in each["Metadata"] for each in records(tmp_path / "state"))


def test_news_interruptions_and_image_wrappers_of_codex(tmp_path: Path) -> None:
    wrapped = [
        {"type": "input_text", "text": "<image name=[Image #1]>"},
        {"type": "input_image", "image_url": "data:"},
        {"type": "input_text", "text": "</image>"},
        {"type": "input_text", "text": "What is this?"},
    ]
    lines = [
        *made.codex_session()[:2],
        made.codex_item(2, "message", role="user", content=wrapped),
        made.codex_message(3, "user", "<subagent_notification>\n{}\n</subagent_notification>"),
        made.codex(4, "event_msg", type="turn_aborted", reason="interrupted"),
    ]
    imported(tmp_path / "state", made.write(tmp_path / "a.jsonl", lines))
    assert said(tmp_path / "state") == [
        ("User", "[image]\n\nWhat is this?"),
        ("Notification", "<subagent_notification>\n{}\n</subagent_notification>"),
        ("Interruption", "interrupted"),
    ]


def test_what_nobody_said_has_no_tier_no_tag_and_no_domain(tmp_path: Path) -> None:
    words = "Decided: the database design is done, but the test is blocked?"
    lines = [
        made.claude(1, "user", made.person(words)),
        made.claude(2, "user", made.person(f"<task-notification>{words}</task-notification>")),
        made.claude(3, "user", made.person(f"<command-name>/{words}</command-name>")),
    ]
    imported(tmp_path / "state", made.write(tmp_path / "a.jsonl", lines))
    person, *others = records(tmp_path / "state")
    assert (person["Metadata"]["ace_tier"], person["Metadata"]["chain_type"] != "none") == (
        "A",
        True,
    )
    assert person["Metadata"]["shl_tags"]
    assert len(others) == 2
    for other in others:
        assert other["Metadata"]["ace_tier"] == other["Metadata"]["chain_type"] == "none"
        assert other["Metadata"]["shl_tags"] == []


# -- what failed, and what is said twice -----------------------------------------------------------


def test_a_retry_and_its_turn(tmp_path: Path) -> None:
    imported(tmp_path / "state", claude(tmp_path / "log"))
    (retry,) = by(tmp_path / "state", "System")
    wanted = {"turn": "turn-1", "retry": 1, "status": 529, "message_type": "api_error"}
    assert wanted.items() <= retry["Metadata"].items()


def test_a_turn_of_codex_that_failed(tmp_path: Path) -> None:
    imported(tmp_path / "state", codex(tmp_path / "log"))
    (failure,) = by(tmp_path / "state", "System")
    assert (failure["Message"], failure["Metadata"]["turn"]) == ("too busy", "turn-2")
    assert failure["Metadata"]["message_type"] == "turn_failed"
    (result,) = by(tmp_path / "state", "Tool")
    about = result["Content"]["tool_results"][0]["about"]
    assert about == {"exit_code": 2, "seconds": 1.5, "status": "failed"}


def test_a_compaction_is_recorded_once(tmp_path: Path) -> None:
    figures = {"trigger": "manual", "preTokens": 900, "preservedMessages": {"uuids": ["x"]}}
    summary = made.person("The lamp is off.")
    boundary = made.claude(
        1, "system", subtype="compact_boundary", content="compacted", compactMetadata=figures
    )
    lines = [boundary, made.claude(2, "user", summary, isCompactSummary=True)]
    imported(tmp_path / "one", made.write(tmp_path / "a.jsonl", lines))
    (once,) = records(tmp_path / "one")
    assert (once["SpeakerRole"], once["Message"]) == ("System", "The lamp is off.")
    assert once["Metadata"]["compaction"] == {"trigger": "manual", "preTokens": 900}

    rollout = [
        *made.codex_session()[:2],
        made.codex_message(2, "assistant", "The lamp is off."),
        made.codex(3, "compacted", message="Another model said:\nThe lamp is off."),
    ]
    imported(tmp_path / "two", made.write(tmp_path / "b.jsonl", rollout))
    (once,) = records(tmp_path / "two")
    assert (once["SpeakerRole"], once["Metadata"]["message_type"]) == ("System", "compacted")


def test_a_boundary_without_a_summary_is_kept(tmp_path: Path) -> None:
    boundary = made.claude(1, "system", subtype="compact_boundary", content="compacted")
    for name, more in (("end", []), ("on", [made.claude(2, "user", made.person("Go on."))])):
        imported(tmp_path / name, made.write(tmp_path / f"{name}.jsonl", [boundary, *more]))
        assert said(tmp_path / name)[0] == ("System", "compacted")


@pytest.mark.parametrize("where", ["its own session", "the session it was forked from"])
def test_a_large_output_is_read_from_its_file(tmp_path: Path, where: str) -> None:
    folder = tmp_path / "log"
    kept = folder / FIRST / "tool-results" / "one.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("lamp\n" * 50_000)
    shown = f"<persisted-output>\nOutput too large. Full output saved to: {kept}\n\nPreview:\nlamp"
    result = {"type": "tool_result", "tool_use_id": "t1", "content": shown}
    line = made.claude(1, "user", {"role": "user", "content": [result]})
    name = FIRST if where == "its own session" else SECOND
    imported(tmp_path / "state", made.write(folder / f"{name}.jsonl", [line]))
    assert said(tmp_path / "state") == [("Tool", "lamp\n" * 50_000)]


def test_no_file_outside_the_sessions_is_read(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    shown = f"<persisted-output>\nFull output saved to: {tmp_path}/log/../secret.txt\n\nlamp"
    result = {"type": "tool_result", "tool_use_id": "t1", "content": shown}
    line = made.claude(1, "user", {"role": "user", "content": [result]})
    imported(tmp_path / "state", made.write(tmp_path / "log" / "a.jsonl", [line]))
    assert said(tmp_path / "state") == [("Tool", shown)]


# -- usage -----------------------------------------------------------------------------------------


def test_usage_that_grows_from_line_to_line_is_counted_once(tmp_path: Path) -> None:
    lines = [
        made.claude(1, "assistant", made.answer("r1", made.text("I"), output=1)),
        made.claude(2, "assistant", made.answer("r1", made.text("look."), output=30)),
        made.claude(3, "assistant", made.answer("r1", made.text("No."), output=42)),
    ]
    imported(tmp_path / "state", made.write(tmp_path / "a.jsonl", lines))
    usages = [record["Metadata"].get("usage", {}) for record in records(tmp_path / "state")]
    assert sum(usage.get("output_tokens", 0) for usage in usages) == 42
    assert sum(usage.get("input_tokens", 0) for usage in usages) == 1200


def test_an_older_rollout_has_its_usage_in_events(tmp_path: Path) -> None:
    lines = [
        *made.codex_session()[:2],
        made.codex_message(2, "assistant", "I look."),
        made.codex_item(3, "function_call", name="shell", arguments="{}", call_id="c1"),
        made.codex_count(4),
        made.codex_item(5, "function_call_output", call_id="c1", output="no lamp"),
        made.codex_message(6, "assistant", "No."),
        made.codex_count(7),
    ]
    imported(tmp_path / "state", made.write(tmp_path / "a.jsonl", lines))
    usages = [record["Metadata"].get("usage") for record in records(tmp_path / "state")]
    assert [usage is not None for usage in usages] == [False, True, False, True]


# -- the database ----------------------------------------------------------------------------------


def test_a_database_stays_as_it_is(tmp_path: Path) -> None:
    path = opencode_base(tmp_path / "log")
    before = {each.name: digest(each) for each in path.parent.iterdir()}
    assert set(before) == {"opencode.db", "opencode.db-wal"}
    imported(tmp_path / "state", path)
    assert {each.name: digest(each) for each in path.parent.iterdir()} == before


def test_a_database_is_read_while_another_program_writes_it(tmp_path: Path) -> None:
    import sqlite3
    from contextlib import closing

    path = opencode_base(tmp_path / "log")
    with closing(sqlite3.connect(path)) as base:
        base.execute("begin immediate")
        base.execute("delete from message")
        assert imported(tmp_path / "state", path).recorded > 4
        base.rollback()


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_last_line_of_a_message_counts(tmp_path: Path) -> None:
    imported(tmp_path / "state", gemini(tmp_path / "log"))
    first: dict[str, Any] = next(
        each for each in records(tmp_path / "state") if each["Message"] == "I look."
    )
    assert first["Content"]["tool_calls"][0]["name"] == "run_shell_command"
    assert [text for _, text in said(tmp_path / "state")].count("I look.") == 1


OUTPUT_OF_GEMINI = re.compile(
    r"(?:<untrusted_context>\n)?Output: (.*?)(?:\nError: [^\n]*)?(?:\nExit Code: (-?\d+))?"
    r"(?:\nSignal: [^\n]*)?(?:\nProcess Group PGID: \d+)?(?:\n</untrusted_context>)?\s*",
    re.DOTALL,
)
PARTS_OF_OUTPUT = (
    "<untrusted_context>\n", "Output: ", "lamp", "\n", "\nError: x", "\nError: ", "\nExit Code: 3",
    "\nExit Code: -1", "\nExit Code: x", "\nSignal: 9", "\nSignal: ", "\nProcess Group PGID: 77",
    "\n</untrusted_context>", " ", "(empty)", "Error: ", "\r", "\u2028", "\t",
)  # fmt: skip


@given(st.lists(st.sampled_from(PARTS_OF_OUTPUT), max_size=9).map("".join))
def test_the_output_of_gemini_is_what_its_form_says(end: str) -> None:
    for text in (end, f"Output: {end}", f"<untrusted_context>\nOutput: {end}"):
        found = OUTPUT_OF_GEMINI.fullmatch(text)
        said = text if found is None else "" if found[1] == "(empty)" else found[1]
        code = None if found is None or not found[2] else int(found[2])
        response = {"id": "c1", "name": "run_shell_command", "response": {"output": text}}
        line = {"id": "g-1", "type": "user", "content": [{"functionResponse": response}]}
        reader = registry.known()["gemini"].reader(TranscriptFile(Path("session.jsonl")))
        [(_, message)] = reader.messages(line, 1)
        assert isinstance(message, dict)
        assert message["Message"] == (said or "(nothing)")
        [result] = message["Content"]["tool_results"]
        assert result.get("about", {}).get("exit_code") == code
