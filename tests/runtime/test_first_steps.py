"""The ten minutes of docs/tutorial.md, as the page says, each command with what it prints."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "tutorial.md").read_text(encoding="utf-8")
PROGRAMS = dict(re.findall(r"^```python\n# (\S+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
GIT = "[user]\n\tname = Newcomer\n\temail = newcomer@example.com\n[init]\n\tdefaultBranch = main\n"

pytestmark = pytest.mark.long("starts a program three times, and a command line some more")


def commands(part: str) -> Iterator[tuple[str, str]]:
    """The commands of a part of the page, each with what it prints."""
    for block in re.findall(r"^```console\n(.*?)^```", part, re.MULTILINE | re.DOTALL):
        for command in block.split("$ ")[1:]:
            typed, _, printed = command.partition("\n")
            yield typed, printed


def check(folder: Path, part: str) -> None:
    """Run the commands of a part of the page, and compare."""
    for command, wanted in commands(part):
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=folder,
            env=environment(folder),
            capture_output=True,
            text=True,
            check=False,
        )
        found = done.stdout + done.stderr
        assert done.returncode == 0, f"{command}: {found}"
        fits = doctest.OutputChecker().check_output(
            wanted, found, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        )
        assert fits, f"{command} is to print\n{wanted}\nand prints\n{found}"


def environment(folder: Path) -> dict[str, str]:
    """As a newcomer has it: the command on the path, a git that knows who commits."""
    config = folder.parent / "gitconfig"
    config.write_text(GIT)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "GIT_CONFIG_GLOBAL": str(config), "COLUMNS": "100"}


def pages_read(folder: Path, *, until: str | None = None) -> list[str]:
    """What the program prints. ``until``: the line at which it is killed."""
    with subprocess.Popen(
        [sys.executable, "reader.py"], cwd=folder, stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        lines = []
        for line in program.stdout:
            lines.append(line.rstrip("\n"))
            if lines[-1] == until:
                program.kill()
    return lines


def test_ten_minutes(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    for name, text in PROGRAMS.items():
        (folder / name).write_text(text, encoding="utf-8")
    killed, _, rest = PAGE.partition("Start it again:")

    assert pages_read(folder, until="read page 2") == ["read page 1", "read page 2"]
    check(folder, killed)
    again = pages_read(folder)
    whole = [*(f"read page {page}" for page in range(2, 6)), "done: 5 pages"]
    assert again in (whole, whole[1:])
    check(folder, rest)
