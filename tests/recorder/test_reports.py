"""Reports for programs and for people: JSON, Markdown, a page, files, and the command."""

from __future__ import annotations

import json
import re
import sys
from datetime import UTC, datetime
from html.parser import HTMLParser
from itertools import count
from pathlib import Path
from typing import Any

import orjson
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from agent_state.errors import MissingExtraError, StorageError
from agent_state.testing import FakeClock
from agent_state_integrations.recorder.analytics import page as charts
from agent_state_integrations.recorder.analytics import report as reports
from agent_state_integrations.recorder.analytics.analysis import LogAnalysis, analyse
from agent_state_integrations.recorder.commands.analytics import analytics

NOW = datetime(2025, 12, 1, 17, 9, 21, tzinfo=UTC)
EVIL = '<script>alert("x")</script> | **bold** `code` & "quotes" \x1b[31m'
SECTIONS = [
    "Overview",
    "Speaker Activity",
    "Sessions",
    "Domain Focus",
    "ACE Tier Distribution",
    "Top Keywords",
    "Timeline (Last 10 Days)",
    "Tokens",
    "Metadata Insights",
    "Collaboration Metrics",
    "Key Findings",
]

_NUMBERS = count(1)


def record(text: str, speaker: str = "ada", day: int = 1, **metadata: Any) -> dict[str, Any]:
    return {
        "Id": f"message-{next(_NUMBERS)}",
        "Timestamp": f"2026-01-{day:02d}T10:00:00Z",
        "SpeakerName": speaker,
        "SpeakerRole": "Agent",
        "Message": text,
        "ConversationType": 0,
        "ContextId": "one",
        "Metadata": metadata,
    }


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return path


@pytest.fixture
def log(tmp_path: Path) -> Path:
    rows = [
        record("Should we use Redis or Kafka?", day=day, speaker=("ada", "bob")[day % 2])
        for day in range(1, 13)
    ]
    evil = record("hello", EVIL, chain_type=EVIL, ace_tier=EVIL, shl_tags=[EVIL], keywords=[EVIL])
    return write(tmp_path / "log.jsonl", *rows, evil)


def analysed(path: Path) -> LogAnalysis:
    return analyse(path, clock=FakeClock(NOW))


@pytest.fixture(params=["full", "empty"])
def analysis(request: pytest.FixtureRequest, tmp_path: Path, log: Path) -> LogAnalysis:
    return analysed(log if request.param == "full" else write(tmp_path / "empty.jsonl"))


def test_json_says_what_the_report_says(analysis: LogAnalysis) -> None:
    assert json.loads(reports.to_json(analysis)) == analysis.report()


def test_markdown_has_the_sections_in_their_order_and_four_findings(analysis: LogAnalysis) -> None:
    text = reports.to_markdown(analysis)
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == SECTIONS
    assert len(re.findall(r"^\d\. ", text.partition("## Key Findings")[2], re.MULTILINE)) == 4


def test_markdown_shows_other_peoples_text_as_it_stands(log: Path) -> None:
    text = reports.to_markdown(analysed(log))
    assert "\x1b" not in text
    html = MarkdownIt("commonmark").enable("table").render(text)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", html)
    shown = EVIL.replace("\x1b", " ").replace("&", "&amp;").replace("<", "&lt;")
    shown = shown.replace(">", "&gt;").replace('"', "&quot;")
    assert cells.count(shown) >= 4
    timeline = text.partition("## Timeline")[2].partition("## ")[0]
    assert "2026-01-12" in timeline
    assert "2026-01-02" not in timeline  # the last ten days alone


class _Page(HTMLParser):
    """What is in a page. Raises where elements do not close in their order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_whole_and_needs_nothing_else(analysis: LogAnalysis) -> None:
    text = reports.to_html(analysis)
    page = _Page(text)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "img", "iframe", "b-"})
    assert not any(name in {"href", "src"} for _, attrs in page.tags for name in attrs)
    assert "url(" not in text
    assert "prefers-color-scheme:dark" in text
    for heading in ("Messages over time", "Speakers", "Domains", "Tiers", "Tags"):
        assert heading in page.text


def test_each_chart_of_the_page_has_a_name_titles_and_a_table(log: Path) -> None:
    page = _Page(reports.to_html(analysed(log)))
    drawings = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(drawings) == 5
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in drawings)
    assert [tag for tag, _ in page.tags].count("details") == 5
    assert "2026-01-03: 1" in page.text


def test_other_peoples_text_is_only_text_in_the_page(log: Path) -> None:
    text = reports.to_html(analysed(log))
    assert "<script" not in text
    assert "\x1b" not in text
    assert EVIL.replace("\x1b", "�") in _Page(text).text


@given(
    st.dictionaries(st.text(max_size=40), st.integers(1, 10**9), max_size=8),
    st.dictionaries(st.dates().map(str), st.integers(1, 10**9), max_size=8),
)
def test_charts_bear_any_names_and_any_days(names: dict[str, int], days: dict[str, int]) -> None:
    _Page(charts.bars("Names", names, sum(names.values())))
    drawn = _Page(charts.columns("Days", days))
    heights = [float(attrs["height"] or 0) for tag, attrs in drawn.tags if tag == "rect"]
    assert len(heights) <= 120
    assert bool(heights) == bool(days)
    assert all(0 <= height <= 176.1 for height in heights)


def test_files_are_named_by_the_moment_and_never_overwritten(log: Path, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "reports"
    stem = "analytics_report_20251201_170921"
    names = [f"{stem}.json", f"{stem}.md", f"{stem}.html"]
    analysis = analysed(log)
    assert [path.name for path in reports.write(analysis, folder)] == names
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert reports.write(analysis, folder)[0].name == f"{stem}_2.json"
    (folder / f"{stem}_3.md").write_text("mine")
    assert reports.write(analysis, folder)[1].name == f"{stem}_4.md"
    assert (folder / f"{stem}_3.md").read_text() == "mine"
    assert {name: (folder / name).read_bytes() for name in names} == first
    assert json.loads(first[names[0]]) == analysis.report()


def test_a_folder_that_cannot_be_made_is_named(log: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"writing a report.*file"):
        reports.write(analysed(log), tmp_path / "file" / "reports")


# -- the command -----------------------------------------------------------------------------------


app = typer.Typer()
app.command()(analytics)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("AGENT_STATE_DIR", raising=False)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def test_json_alone_is_printed_and_nothing_is_written(log: Path) -> None:
    assert json.loads(run(log, "--json"))["total_items"] == 13
    assert run(log, "--markdown").startswith("# Conversation Analytics Report\n")
    assert run(log, "--html").startswith("<!doctype html>")
    assert list(Path().iterdir()) == []


def test_without_a_format_a_summary_is_shown_and_three_files_are_written(log: Path) -> None:
    said = run(log)
    assert "13 messages, 3 speakers, 12 days" in said
    assert "\x1b" not in said
    written = sorted(Path("reports").iterdir())
    assert [path.suffix for path in written] == [".html", ".json", ".md"]
    assert all(path.name in said for path in written)


def test_without_jinja_the_page_is_left_out_and_a_line_says_so(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    charts.page(analysed(log).report())  # a template that is loaded needs the package no more
    charts._macros.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    result = CliRunner().invoke(app, [str(log)])
    assert result.exit_code == 0
    assert "agent-state[recorder]" in result.stderr
    assert sorted(path.suffix for path in Path("reports").iterdir()) == [".json", ".md"]
    assert isinstance(CliRunner().invoke(app, [str(log), "--html"]).exception, MissingExtraError)


def test_with_out_the_files_are_written_there_also_beside_what_is_printed(log: Path) -> None:
    json.loads(run(log, "--json", "--out", "mine"))
    assert len(list(Path("mine").iterdir())) == 3


def test_the_recording_of_the_state_directory_is_the_default(log: Path) -> None:
    Path("elsewhere/record").mkdir(parents=True)
    assert CliRunner().invoke(app, ["--state", "elsewhere", "--json"]).exit_code == 1
    log.rename("elsewhere/record/current.jsonl")
    assert json.loads(run("--state", "elsewhere", "--json"))["total_items"] == 13


def test_score_and_rules_are_chosen(log: Path) -> None:
    found = json.loads(run(log, "--json", "--score", "legacy-flat", "--rules", "legacy"))
    assert (found["score"]["name"], found["rules"]) == ("legacy-flat", "legacy")


@pytest.mark.parametrize(
    "arguments",
    [("--json", "--html"), ("--score", "mine"), ("--rules", "mine"), ("--rules", "mine.toml")],
)
def test_misuse_is_refused(log: Path, arguments: tuple[str, ...]) -> None:
    assert CliRunner().invoke(app, [str(log), *arguments]).exit_code != 0
