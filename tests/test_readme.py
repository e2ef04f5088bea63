"""Each example of the README is a program: alone, twice, with the output that is shown."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PROGRAMS = [text for language, text in BLOCKS if language == "python"]
OUTPUTS = [text for language, text in BLOCKS if language == "text"]
DOCUMENTS = [text for language, text in BLOCKS if language == "json"]
STAMPS = {"_checksum", "_saved_at", "created_at", "last_active"}


def run(program: str, folder: Path) -> str:
    """What the program prints as a file of that folder; nothing may be on stderr."""
    (folder / "example.py").write_text(program, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_an_example_alone_prints_what_is_shown_each_time_it_is_run(
    number: int, tmp_path: Path
) -> None:
    first = run(PROGRAMS[number], tmp_path)
    second = run(PROGRAMS[number], tmp_path)

    assert first == second == OUTPUTS[number]


def test_the_document_that_is_shown_is_the_one_that_the_example_writes(tmp_path: Path) -> None:
    run(PROGRAMS[0], tmp_path)

    [shown] = DOCUMENTS
    written = (tmp_path / "state" / "agents" / "ann.json").read_text(encoding="utf-8")
    assert [*json.loads(written)] == [*json.loads(shown)]
    assert {name: value for name, value in json.loads(written).items() if name not in STAMPS} == {
        name: value for name, value in json.loads(shown).items() if name not in STAMPS
    }


def test_there_are_examples() -> None:
    assert len(PROGRAMS) == len(OUTPUTS) == 2
