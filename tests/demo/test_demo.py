from __future__ import annotations

import asyncio
import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_state.cli.app import run as run_command
from agent_state_integrations.demo import analysis, command, files, proof, server, team
from agent_state_integrations.demo.proof import Evidence
from agent_state_integrations.demo.server_runs import AcknowledgedIds, kill_times
from tests.cli.test_json import check

# -- what the readers see ---------------------------------------------------------------------


def analysed(text: str, path: str = "docs/guide.md", *existing: str) -> analysis.Analysis:
    return analysis.analyse(text, path, set(existing).__contains__)


def test_words_headings_and_marks_are_counted() -> None:
    found = analysed("# One\n\nsome TODO here\n## Two\n#hashtag\nFIXME, XXX and todo\n")

    assert (found["words"], found["headings"], found["todos"]) == (12, 2, 3)


def test_what_is_in_fenced_code_is_neither_heading_nor_link() -> None:
    found = analysed("````sh\n# comment\n```\n[x](gone.md)\n````\n# Heading\n")

    assert (found["headings"], found["broken_links"]) == (1, [])


def test_only_markdown_has_headings_and_links() -> None:
    found = analysed("# a comment [x](gone.md)\n", "setup.py")

    assert (found["headings"], found["broken_links"]) == (0, [])


@pytest.mark.parametrize(
    ("link", "asked_for"),
    [
        ("[x](other.md)", "docs/other.md"),
        ("[x](../top.md#part)", "top.md"),
        ("![x](img/a%20b.png 'title')", "docs/img/a b.png"),
        ("[x](</from the root.md>)", "from the root.md"),
        ("[x](a_(b).md)", "docs/a_(b).md"),
        ("[ref]: other.md", "docs/other.md"),
    ],
)
def test_a_relative_link_is_broken_when_its_target_is_missing(link: str, asked_for: str) -> None:
    assert analysed(link)["broken_links"] == [asked_for]
    assert analysed(link, "docs/guide.md", asked_for)["broken_links"] == []


@pytest.mark.parametrize(
    "link",
    [
        "[x](https://example.org/gone.md)",
        "[x](mailto:a@example.org)",
        "[x](//example.org/gone.md)",
        "[x](#part)",
        "[x](../../outside.md)",
        "`[x](gone.md)`",
        "[^note]: not a link",
        "no link (gone.md) here",
    ],
)
def test_links_that_lead_elsewhere_are_not_followed(link: str) -> None:
    assert analysed(link)["broken_links"] == []


_ANALYSES = st.builds(
    analysis.Analysis,
    file=st.text(min_size=1),
    words=st.integers(0, 10**6),
    headings=st.integers(0, 99),
    todos=st.integers(0, 99),
    broken_links=st.lists(st.text(), max_size=3),
)


@given(st.lists(_ANALYSES, unique_by=lambda found: found["file"]), st.randoms())
def test_the_report_is_the_same_in_whatever_order_replies_come(
    findings: list[analysis.Analysis], random: Random
) -> None:
    shuffled = random.sample(findings, len(findings))

    assert analysis.report(shuffled) == analysis.report(findings)
    assert sorted(analysis.rows(analysis.report(findings))) == sorted(map(analysis.row, findings))


# -- which files ------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten text files, and what is none of the folder's own text."""
    root = tmp_path / "texts"
    (root / "docs").mkdir(parents=True)
    for number in range(9):
        text = f"# Part {number}\n\n" + "word " * number + f"TODO [next](part-{number + 1}.md)\n"
        (root / f"docs/part-{number}.md").write_text(text)
    (root / "notes, with | a bar.txt").write_text("nothing much\n")
    (root / ".hidden.txt").write_text("hidden\n")
    (root / "binary.bin").write_bytes(b"\x00\xff\x00")
    (root / "empty.txt").write_text("\n")
    (root / "node_modules").mkdir()
    (root / "node_modules/theirs.md").write_text("theirs\n")
    return root


def test_a_folder_s_own_text_files_are_found(folder: Path) -> None:
    (folder / "state").mkdir()
    (folder / "state/report.md").write_text("ours\n")

    names = files.text_files(folder, folder / "state")

    assert names == [*(f"docs/part-{number}.md" for number in range(9)), "notes, with | a bar.txt"]


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_in_a_repository_what_git_ignores_is_not_its_own(folder: Path) -> None:
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
    (folder / ".gitignore").write_text("node_modules/\n*.txt\n")

    names = files.text_files(folder, folder / "state")

    assert names == [".gitignore", *(f"docs/part-{number}.md" for number in range(9))]


# -- when it is killed ------------------------------------------------------------------------


def test_the_same_seed_chooses_the_same_moments() -> None:
    assert kill_times(5, 40, 0.2, Random(7)) == kill_times(5, 40, 0.2, Random(7))
    assert kill_times(5, 40, 0.2, Random(7)) != kill_times(5, 40, 0.2, Random(8))
    assert len(kill_times(12, 1, 1.0, Random(1))) == 12
    assert kill_times(0, 40, 0.2, Random(1)) == []


# -- the whole thing, with real processes and real kills --------------------------------------


@pytest.mark.long("runs a team of processes")
def test_a_team_that_is_killed_loses_nothing(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "WORK_SECONDS", 2.0)
    state = tmp_path / "new" / "state"

    code = run_command(
        ["demo", str(folder), "--kills", "2", "--seed", "4", "--state", str(state), "--json"]
    )

    shown = json.loads(capsys.readouterr().out)
    assert code == 0, shown["checks"]
    check("demo", shown)
    assert shown["ok"] is True
    assert shown["kills"] == 2
    assert [life["killed"] for life in shown["lives"]] == [True, True, False]
    assert len(shown["checks"]) == 11
    assert shown["lives"][-1]["restored"]["after_crash"] is True
    assert len(analysis.rows((state / "report.md").read_text())) == 10


def test_a_person_sees_what_was_killed_restored_and_proved(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "WORK_SECONDS", 0.4)

    code = run_command(["demo", str(folder), "--kills", "1", "--seed", "4"])

    out = capsys.readouterr().out
    assert code == 0
    for words in (
        "SIGKILL",
        "killed after",
        "restored in",
        "no mail came twice",
        "nothing was lost",
    ):
        assert words in out
    state = Path(out.split("State, as plain JSON: ")[1].split("\n")[0])
    assert json.loads((state / "agents/reporter.json").read_text())["agent_id"] == "reporter"
    shutil.rmtree(state)


@pytest.mark.long("runs the demo as a process")
def test_a_proof_that_fails_is_shown_and_exits_with_1(folder: Path, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "agent_state", "demo", str(folder), "--kills", "1"]
    with subprocess.Popen(
        [*program, "--state", str(tmp_path / "state")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "killed after" in line:  # a person saves a file in the middle of it
                (folder / "docs/part-3.md").write_text("changed\n")
                break
        rest = process.stdout.read()

    assert process.returncode == 1
    assert "NO  the files are as they were at the start" in rest
    assert "not so: docs/part-3.md" in rest
    assert "not proved" in rest


@pytest.mark.parametrize("what", ["no folder", "no text", "not empty"])
def test_a_demo_with_nothing_to_read_or_nowhere_to_write_is_misuse(
    tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a.txt").write_text("text\n")
    args = {
        "no folder": [str(tmp_path / "nothing")],
        "no text": [str(tmp_path / "empty")],
        "not empty": [str(tmp_path / "full"), "--state", str(tmp_path / "full")],
    }[what]

    assert run_command(["demo", *args]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_server_ends_when_whoever_started_it_is_gone(folder: Path, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "agent_state_integrations.demo.server", "--pause", "60"]
    for name in ("folder", "state", "report"):
        program += [f"--{name}", str(folder if name == "folder" else tmp_path / name)]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert json.loads(server.stdout.readline())["event"] == "restored"
        assert server.stdin is not None
        server.stdin.close()

        assert server.wait(timeout=60) == 3


# -- that the proof would see a loss ----------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Evidence, AcknowledgedIds]:
    """The evidence of a real run without kills, and all it acknowledged."""
    root = tmp_path_factory.mktemp("finished")
    (root / "texts").mkdir()
    for number in range(3):
        (root / f"texts/{number}.md").write_text(f"# {number}\n")
    stored = AcknowledgedIds()
    job = team.Job(root / "texts", root / "state", root / "report.md", 0.0)
    asyncio.run(server.serve(job, lambda event, **facts: stored.note({"event": event, **facts})))
    return root / "texts", proof.gather(job.state, job.report), stored


def claims_that_fail(finished: tuple[Path, Evidence, AcknowledgedIds], seen: Evidence) -> set[str]:
    folder, calm, stored = finished
    before = files.fingerprint(folder, files.text_files(folder, folder / "none"))
    return {
        check.claim for check in proof.prove(folder, before, seen, calm, stored) if not check.holds
    }


def test_an_undisturbed_run_proves_every_claim(
    finished: tuple[Path, Evidence, AcknowledgedIds],
) -> None:
    assert claims_that_fail(finished, finished[1]) == set()


def _lose_a_task(seen: Evidence) -> None:
    seen.tasks.remove(next(task for task in seen.tasks if task["name"] == "read"))


def _leave_a_task(seen: Evidence) -> None:
    seen.tasks[0]["status"] = "in_progress"


def _lose_a_mail(seen: Evidence) -> None:
    seen.mail.pop()


def _deliver_twice(seen: Evidence) -> None:
    seen.mail.append({**seen.mail[0], "message_id": "another"})


def _forget(seen: Evidence) -> None:
    seen.memories["reader-1"]["words"].clear()


def _leave_somebody_asleep(seen: Evidence) -> None:
    seen.asleep.append("reporter")


def _lose_a_row(seen: Evidence) -> None:
    seen.report = seen.report.replace(analysis.rows(seen.report)[0] + "\n", "")


def _repeat_a_row(seen: Evidence) -> None:
    first = analysis.rows(seen.report)[0] + "\n"
    seen.report = seen.report.replace(first, first * 2)


def _miscount(seen: Evidence) -> None:
    seen.report = seen.report.replace("| 2 | 1 |", "| 3 | 1 |", 1)


SAME = "tasks, mail and memories equal those of a run without kills"
SAME_REPORT = "the report equals that of a run without kills"
ONCE = "every file is in the report, once"
RIGHT = "its numbers are right, counted again here"


@pytest.mark.parametrize(
    ("spoil", "claims"),
    [
        (_lose_a_task, {"no acknowledged task is lost", SAME}),
        (_leave_a_task, {"every task is completed", SAME}),
        (_lose_a_mail, {"no acknowledged mail is lost", SAME}),
        (_deliver_twice, {"no mail came twice", SAME}),
        (_forget, {SAME}),
        (_leave_somebody_asleep, {SAME}),
        (_lose_a_row, {ONCE, RIGHT, SAME_REPORT}),
        (_repeat_a_row, {ONCE, RIGHT, SAME_REPORT}),
        (_miscount, {RIGHT, SAME_REPORT}),
    ],
)
def test_the_proof_sees_every_kind_of_loss(
    finished: tuple[Path, Evidence, AcknowledgedIds],
    spoil: Callable[[Evidence], None],
    claims: set[str],
) -> None:
    seen = copy.deepcopy(finished[1])
    spoil(seen)

    assert claims_that_fail(finished, seen) == claims
