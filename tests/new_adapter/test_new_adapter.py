"""``agent-state new-adapter``: what it writes works, and its tests notice a fault."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agent_state.cli.app import run as main


def run_tests(folder: Path, *selected: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), *(each for each in sys.path if each)])
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder), *selected],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.long("eight processes, and one that is killed")
def test_what_it_writes_passes_its_tests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "my_adapter"
    assert main(["new-adapter", "note_book", "--out", str(folder)]) == 0
    assert str(folder / "agent_state_note_book/__init__.py") in capsys.readouterr().out
    done = run_tests(
        folder, "--deselect", "tests/test_agent_state_note_book.py::TestNoteBook::test_many_entries"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 passed" in done.stdout

    assert main(["new-adapter", "note_book", "--out", str(folder)]) == 2  # nothing is overwritten
    assert "there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fault", "mended", "test"),
    [
        ("(as_segment(page),)", "(page.lower() or '0',)", "test_every_id_is_one_of_its_own"),
        ('{"text": text}', '{"text": str(text)}', "test_what_could_not_be_read_is_refused"),
    ],
)
def test_its_tests_notice_a_fault(fault: str, mended: str, test: str, tmp_path: Path) -> None:
    assert main(["new-adapter", "notebook", "--out", str(tmp_path)]) == 0
    module = tmp_path / "agent_state_notebook/__init__.py"
    text = module.read_text()
    assert fault in text
    module.write_text(text.replace(fault, mended))

    assert run_tests(tmp_path, "-k", test).returncode == 1


@pytest.mark.parametrize("name", ["Notebook", "note-book", "class", "", "../x", "1a"])
def test_a_name_that_is_none_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["new-adapter", name, "--out", str(tmp_path / "out")]) == 2
    assert "no name of a module" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
