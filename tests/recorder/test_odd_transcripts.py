"""Odd but valid files of agents' tools: what editors, shells and crashes make of them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from agent_state.protocols import JsonObject
from agent_state_integrations.recorder.importers import FileReport, import_logs
from agent_state_integrations.recorder.reader import read_records
from agent_state_integrations.recorder.writer import RecordWriter
from tests.recorder import transcripts as made
from tests.recorder.transcripts import FIRST

SESSIONS = {
    "claude-code": (f"{FIRST}.jsonl", made.claude_session()),
    "codex": (f"rollout-2026-05-01T10-00-00-{FIRST}.jsonl", made.codex_session()),
    "gemini": ("session-1.jsonl", made.gemini_session()),
    "qwen": (f"{FIRST}.jsonl", made.qwen_session()),
    "pi": (f"2026_{FIRST}.jsonl", made.pi_session()),
}
TOOLS = pytest.mark.parametrize("tool", SESSIONS)


def lines_of(tool: str) -> list[bytes]:
    return [orjson.dumps(line) for line in SESSIONS[tool][1]]


def joined(lines: list[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)


def imported(folder: Path, name: str, data: bytes) -> tuple[FileReport, list[JsonObject]]:
    """The report of a file that stands in a folder, and what was recorded of it."""
    path = folder / "logs" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    with RecordWriter(folder / "state") as writer:
        report = import_logs([path.parent], writer)
        again = import_logs([path.parent], writer)
    [file] = report.files
    counted = file.recorded + file.duplicates + file.skipped
    assert counted >= file.lines
    assert again.recorded == 0
    return file, [record for _, record in read_records(folder / "state")]


def said(records: list[JsonObject]) -> list[tuple[str, str, str]]:
    return [(each["SpeakerRole"], each["Message"], each["Timestamp"]) for each in records]


def spelled_otherwise(lines: list[bytes]) -> bytes:
    return joined([json.dumps(orjson.loads(line), sort_keys=True).encode() for line in lines])


ODD: dict[str, Callable[[list[bytes]], bytes]] = {
    "a byte order mark": lambda lines: b"\xef\xbb\xbf" + joined(lines),
    "one on every line": lambda lines: joined([b"\xef\xbb\xbf" + line for line in lines]),
    "lines of Windows": lambda lines: joined([line + b"\r" for line in lines]),
    "no last newline": lambda lines: joined(lines)[:-1],
    "a torn last line": lambda lines: joined(lines) + lines[-1][: len(lines[-1]) // 2],
    "torn in a character": lambda lines: joined(lines) + lines[-1][:30] + b"\xc3",
    "NULs at the end": lambda lines: joined(lines) + b"\0" * 4096,
    "NULs in the middle": lambda lines: joined(lines[:3]) + b"\0" * 99 + b"\n" + joined(lines[3:]),
    "blank lines": lambda lines: joined([each for line in lines for each in (b"", line, b"  ")]),
    "a damaged first line": lambda lines: b"{broken\n" + joined(lines),
    "other values": lambda lines: joined([b"null", b"[]", b'"x"', *lines, b"7"]),
    "spaces around": lambda lines: joined([b"  " + line + b" \t" for line in lines]),
    "keys in another order": spelled_otherwise,
    "the file twice": lambda lines: joined([*lines, *lines]),
}


@TOOLS
@pytest.mark.parametrize("odd", ODD)
def test_an_odd_file_says_what_the_usual_one_says(tmp_path: Path, tool: str, odd: str) -> None:
    name, lines = SESSIONS[tool][0], lines_of(tool)
    _, usual = imported(tmp_path / "usual", name, joined(lines))
    file, found = imported(tmp_path / "odd", name, ODD[odd](lines))
    assert (file.shape, file.error) == (tool, None)
    assert said(found) == said(usual)


@TOOLS
def test_a_packed_session_says_the_same(tmp_path: Path, tool: str) -> None:
    name, lines = SESSIONS[tool][0], lines_of(tool)
    _, usual = imported(tmp_path / "usual", name, joined(lines))
    _, found = imported(tmp_path / "packed", f"{name}.gz", gzip.compress(joined(lines)))
    assert said(found) == said(usual)


@TOOLS
def test_bytes_that_are_no_text_cost_a_character_and_no_message(tmp_path: Path, tool: str) -> None:
    name, lines = SESSIONS[tool][0], lines_of(tool)
    file, found = imported(tmp_path, name, joined(lines).replace(b"lamp", b"l\xffmp"))
    assert (file.shape, file.replaced) == (tool, 2)
    assert {"Is the l\ufffdmp on?", "no l\ufffdmp"} <= {record["Message"] for record in found}


def test_a_session_of_qwen_that_begins_with_a_system_line_is_not_one_of_claude_code(
    tmp_path: Path,
) -> None:
    system = made.qwen(0, "system", None, subtype="attribution_snapshot")
    name, lines = SESSIONS["qwen"][0], lines_of("qwen")
    file, found = imported(tmp_path, name, joined([orjson.dumps(system), *lines]))
    assert (file.shape, len(found)) == ("qwen", 5)


@TOOLS
@pytest.mark.parametrize("other", SESSIONS)
def test_lines_of_another_tool_are_not_left_out_in_silence(
    tmp_path: Path, tool: str, other: str
) -> None:
    if tool == other:
        pytest.skip("the same tool")
    lines = lines_of(tool)
    file, found = imported(tmp_path, SESSIONS[tool][0], joined([*lines, *lines_of(other)]))
    assert file.shape == tool
    assert file.error is not None
    assert other in file.error
    assert found


@pytest.mark.parametrize("levels", [150, 260, 600])
def test_a_line_that_is_nested_too_deeply_costs_only_itself(tmp_path: Path, levels: int) -> None:
    deep: object = 1
    for _ in range(levels):
        deep = {"a": deep}
    block = {"type": "tool_use", "id": "t9", "name": "Deep", "input": deep}
    head = json.dumps(made.claude(30, "assistant", made.answer("r9", block)))
    name, lines = SESSIONS["claude-code"][0], lines_of("claude-code")
    file, found = imported(tmp_path, name, joined([head.encode(), *lines]))
    assert len(found) == 7 + (levels < 200)
    assert sum("nesting is deeper" in reason for reason in file.reasons) == (levels >= 200)


@pytest.mark.parametrize("fields", [{"message_id": "m1"}, {}])
def test_a_recorded_message_that_is_nested_too_deeply_costs_only_itself(
    tmp_path: Path, fields: JsonObject
) -> None:
    deep = '{"a":' * 400 + "1" + "}" * 400
    about = "".join(f'"{name}":"{value}",' for name, value in fields.items())
    line = f'{{{about}"sender_id":"ada","content":"hello","metadata":{deep}}}'.encode()
    good = b'{"message_id":"m2","sender_id":"ada","content":"hi"}'
    file, found = imported(tmp_path, "log.jsonl", joined([line, good]))
    assert [record["Message"] for record in found] == ["hi"]
    assert file.skipped == 1


@TOOLS
@pytest.mark.parametrize("value", [["user"], {"a": 1}, 7, None, True])
def test_a_line_with_a_type_that_is_no_text_costs_only_itself(
    tmp_path: Path, tool: str, value: object
) -> None:
    odd = {
        "type": value,
        "uuid": value,
        "sessionId": "s",
        "id": value,
        "payload": {},
        "timestamp": 1,
    }
    lines = [orjson.dumps({**odd, "message": value, "parentUuid": None}), *lines_of(tool)]
    _, usual = imported(tmp_path / "usual", SESSIONS[tool][0], joined(lines[1:]))
    file, found = imported(tmp_path / "odd", SESSIONS[tool][0], joined(lines))
    assert file.shape == tool
    assert said(found)[-len(usual) :] == said(usual)


EXPORT = orjson.dumps(made.opencode_export())


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbf" + EXPORT,
        EXPORT.decode().encode("utf-16"),
        b"\n  " + EXPORT + b"\n",
        json.dumps(made.opencode_export(), indent=4).encode(),
    ],
    ids=["byte order mark", "UTF-16, as PowerShell writes it", "spaces around", "indented"],
)
def test_an_export_of_opencode_through_a_shell_or_an_editor(tmp_path: Path, data: bytes) -> None:
    file, found = imported(tmp_path, "session.json", data)
    assert (file.shape, len(found)) == ("opencode", 6)


def test_an_empty_database_has_no_torn_line(tmp_path: Path) -> None:
    made.opencode_base(tmp_path / "made" / "opencode.db")
    log = (tmp_path / "made" / "opencode.db-wal").read_bytes()
    folder = tmp_path / "logs"
    folder.mkdir()
    (folder / "opencode.db").write_bytes((tmp_path / "made" / "opencode.db").read_bytes())
    for size in range(4096, len(log), 8192):  # from some size on, the tables are there
        (folder / "opencode.db-wal").write_bytes(log[:size])
        report = import_logs([folder], None)
        assert "the last line is torn" not in report.reasons
        assert all(count > 0 for count in report.reasons.values())
