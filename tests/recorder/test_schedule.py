"""Analytics again and again: alerts, the pruning of reports, and the timer that is written."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import orjson
import pytest

from agent_state.cli.app import run
from agent_state.errors import QueryError
from agent_state_integrations.recorder.analytics import schedule
from agent_state_integrations.recorder.analytics.analysis import LogAnalysis, analyse
from agent_state_integrations.recorder.analytics.schedule import AlertFailedError, ScoreAlert
from tests.recorder import transcripts as made

NOW = datetime(2026, 5, 31, tzinfo=UTC)


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "log.jsonl"
    lines = [{"message_id": f"m{n}", "sender_id": "ada", "content": f"one {n}"} for n in range(9)]
    path.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    return path


def scored(log: Path) -> LogAnalysis:
    return analyse(log, score_name="spread")


@pytest.mark.parametrize(
    ("text", "hours"), [("30m", 0.5), ("6h", 6), ("2d", 48), ("1w", 168), ("7200s", 2)]
)
def test_a_time_is_written_as_people_write_it(text: str, hours: float) -> None:
    assert schedule.span(text) == timedelta(hours=hours)


@pytest.mark.parametrize("text", ["", "0h", "6", "h", "-6h", "6 years"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(QueryError):
        schedule.span(text)


def test_the_work_is_done_until_the_waiting_ends() -> None:
    done: list[str] = []
    waited: list[float] = []

    def wait(seconds: float) -> bool:
        waited.append(seconds)
        return len(waited) == 3

    schedule.repeat(lambda: done.append("report"), timedelta(hours=6), wait)
    assert (len(done), waited) == (3, [21600.0] * 3)
    waited[:] = [0.0, 0.0]
    schedule.repeat(lambda: done.append("report"), schedule.span("999999w"), wait)
    assert waited[2] <= threading.TIMEOUT_MAX


def test_an_alert_is_due_below_its_limit_only(log: Path) -> None:
    analysis = scored(log)
    assert analysis.score.value is not None
    assert ScoreAlert(analysis.score.value + 1).is_due(analysis)
    assert not ScoreAlert(analysis.score.value).is_due(analysis)
    assert not ScoreAlert(100.0).is_due(analyse(log))


def test_an_alert_runs_a_command_with_the_report(log: Path, tmp_path: Path) -> None:
    ScoreAlert(70.0, command=f"tee {tmp_path}/alert.json").give(scored(log))
    report = json.loads((tmp_path / "alert.json").read_text())
    assert (report["alert"], report["total_messages"]) == ({"below": 70.0}, 9)


@pytest.mark.parametrize("command", ["false", "no-such-command-anywhere", "'"])
def test_a_command_that_fails_is_an_error(log: Path, command: str) -> None:
    with pytest.raises(AlertFailedError):
        ScoreAlert(70.0, command=command).give(scored(log))


def test_an_alert_is_posted(log: Path) -> None:
    got: list[bytes] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Hook) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        ScoreAlert(70.0, webhook=f"http://127.0.0.1:{server.server_port}/x").give(scored(log))
        thread.join()
        port = server.server_port
    assert json.loads(got[0])["total_messages"] == 9
    for url in (f"http://127.0.0.1:{port}/gone", "file:///etc/passwd", "http://[/", "http://h/ x"):
        with pytest.raises(AlertFailedError):
            ScoreAlert(70.0, webhook=url).give(scored(log))


def test_a_webhook_that_does_not_speak_http_is_an_error(log: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                while not connection.recv(65536).endswith(b"}"):
                    pass
                connection.sendall(b"SSH-2.0-x\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(AlertFailedError):
            ScoreAlert(70.0, webhook=f"http://127.0.0.1:{server.getsockname()[1]}/").give(
                scored(log)
            )
        thread.join()


def test_old_reports_go_and_nothing_else(tmp_path: Path) -> None:
    old = ["analytics_report_20260401_000000.json", "analytics_report_20260401_000000_2.html"]
    new = ["analytics_report_20260530_000000.md", "notes.md", "analytics_report_x.json"]
    new.append("analytics_report_99999999_999999.json")  # digits that are no time
    for name in (*old, *new):
        (tmp_path / name).touch()
    gone = schedule.prune(tmp_path, timedelta(days=30), NOW)
    assert sorted(path.name for path in gone) == sorted(old)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(new)
    assert schedule.prune(tmp_path / "missing", timedelta(days=30), NOW) == []


def test_the_timer_runs_the_same_command(tmp_path: Path) -> None:
    words = ["my logs", "--alert-command", "notify $HOME 5%"]
    paths = schedule.install(words, timedelta(hours=6), tmp_path / "units", tmp_path)
    assert [path.name for path in paths] == [schedule.SERVICE, schedule.TIMER]
    service, timer = (path.read_text() for path in paths)
    wanted = '-m agent_state analytics "my logs" --alert-command "notify $$HOME 5%%"'
    assert wanted in service
    assert f"WorkingDirectory={tmp_path}" in service
    assert "OnUnitActiveSec=21600s" in timer


def test_a_low_score_on_the_command_line(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["analytics", str(log), "--alert-below", "99"]
    assert run([*command, "--alert-command", f"tee {tmp_path}/alert.json"]) == 0
    assert "the score spread is" in capsys.readouterr().err
    assert (tmp_path / "alert.json").exists()
    assert run([*command, "--alert-command", "false"]) == 1
    assert run(["analytics", str(log), "--alert-command", "true"]) == 2
    assert run(["analytics", str(log), "--alert-below", "0"]) == 0
    assert list((tmp_path / "reports").glob("*.json"))


def test_the_install_command_writes_the_units(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["analytics", "install", "--every", "6h", "--units", str(tmp_path / "units")]
    assert run(command) == 0
    assert "systemctl" in capsys.readouterr().out
    assert (tmp_path / "units" / schedule.TIMER).exists()
    assert run(["analytics", "install"]) == 2


EMPTY = [
    ["record", "query", "empty"],
    ["record", "query", "empty", "--count"],
    ["record", "query", "--state", "empty"],
    ["record", "conversations", "empty"],
    ["record", "import", "empty"],
    ["analytics", "empty"],
    ["analytics", "--state", "empty", "--markdown"],
    ["record", "archive", "--state", "empty"],
    ["record", "archive", "--verify", "--state", "empty"],
    ["record", "status", "--state", "empty"],
    ["record", "checkpoints", "ls", "--state", "empty"],
    ["record", "checkpoints", "verify", "--state", "empty"],
    ["record", "checkpoints", "make", "--state", "empty"],
]


@pytest.mark.parametrize("command", EMPTY, ids=" ".join)
def test_on_an_empty_folder_every_command_says_so(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert run(command) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("agent-state: there is no recording")
    assert "here [empty]" in printed.err
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.parametrize(
    "command", [["record", "query"], ["record", "conversations"], ["analytics"]], ids=" ".join
)
@pytest.mark.parametrize("where", ["a file", "its folder"])
def test_a_transcript_is_not_read_as_if_it_were_a_log(
    command: list[str], where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = made.write(tmp_path / "log" / "a.jsonl", made.qwen_session())
    assert run([*command, str(path if where == "a file" else path.parent)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "a.jsonl is a transcript of Qwen Code" in printed.err


def test_what_is_installed_makes_the_same_report(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    units, out = tmp_path / "units", tmp_path / "my reports"
    command = ["analytics", "install", log.name, "--score", "spread", "--alert-below=99.5"]
    command += ["--alert-command", f"tee '{tmp_path}/low 5%.json'", "--markdown", "--keep", "30d"]
    assert run([*command, "--out", str(out), "--every=6h", "--units", str(units)]) == 0
    service = (units / schedule.SERVICE).read_text()
    [start] = [line for line in service.splitlines() if line.startswith("ExecStart=")]
    words = shlex.split(start.removeprefix("ExecStart=").replace("%%", "%").replace("$$", "$"))
    assert "--every" not in words
    assert "--units" not in words
    capsys.readouterr()
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("# Conversation Analytics Report")
    assert json.loads((tmp_path / "low 5%.json").read_text())["total_messages"] == 9
    assert list(out.glob("*.md"))


@pytest.mark.parametrize(
    "more", [["--alert-command", "true"], ["--no-such-option"], ["two", "logs"]]
)
def test_options_that_cannot_be_run_are_not_installed(
    log: Path, tmp_path: Path, more: list[str]
) -> None:
    units = tmp_path / "units"
    command = ["analytics", "install", "--every", "6h", "--units", str(units)]
    assert run([*command, *more]) == 2
    assert not units.exists()


def test_two_logs_are_refused_without_install(log: Path) -> None:
    assert run(["analytics", str(log), str(log)]) == 2
