"""The tests themselves are tested: bugs are seeded in a copy, and the tests have to fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.mutations import MUTATIONS, Mutation
from tests.faults.tally import Tally

PROJECT = Path(__file__).parents[2]
NEEDED = ("agent_state", "integrations", "tests", "conftest.py", "pyproject.toml")
FAILED = 1
"""pytest's exit code for tests that ran and failed; an error of collection has another."""


@pytest.fixture(scope="session")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project, to be broken."""
    folder = tmp_path_factory.mktemp("mutated")
    for name in NEEDED:
        source = PROJECT / name
        if source.is_dir():
            shutil.copytree(
                source, folder / name, ignore=shutil.ignore_patterns("__pycache__"), symlinks=True
            )
        else:
            shutil.copy(source, folder / name)
    return folder


def run(project: Path, tests: str) -> subprocess.CompletedProcess[str]:
    """The tests of a project, in a process that finds that project's package and no other."""
    environment = {**os.environ, "PYTHONPATH": str(project), "PYTHONDONTWRITEBYTECODE": "1"}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    # Some bugs leave a thread that never ends: then the process is ended, and has failed too.
    limits = ["--timeout=40", "--timeout-method=thread"]
    options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist", *limits]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests.split()],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.timeout(300)
@pytest.mark.full
@pytest.mark.proof("T23", "bugs seeded on purpose, each caught by its test")
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_seeded_bug_is_caught(name: str, copy: Path, tally: Tally) -> None:
    mutation = MUTATIONS[name]
    path = copy / "agent_state" / mutation.file
    text = path.read_text()
    path.write_text(mutated(text, mutation))
    try:
        broken = run(copy, mutation.caught_by)
    finally:
        path.write_text(text)
    tally.points += 1
    tally.faults += 1
    assert broken.returncode == FAILED, f"not caught:\n{broken.stdout[-2000:]}{broken.stderr}"
    assert " failed" in broken.stdout or "Timeout" in broken.stdout + broken.stderr
    assert "SyntaxError" not in broken.stdout


@pytest.mark.timeout(600)
@pytest.mark.full
def test_without_a_seeded_bug_the_same_tests_pass(copy: Path) -> None:
    plain = {m.caught_by for m in MUTATIONS.values() if "--full" not in m.caught_by}
    sound = run(copy, " ".join(sorted(plain)))
    assert sound.returncode == 0, sound.stdout[-2000:]


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_bug_fits_the_code_it_is_seeded_in(name: str) -> None:
    mutation = MUTATIONS[name]
    text = (PROJECT / "agent_state" / mutation.file).read_text()
    compile(mutated(text, mutation), mutation.file, "exec")


def mutated(text: str, mutation: Mutation) -> str:
    assert text.count(mutation.old) == 1, f"{mutation.file} has changed; so must its mutation"
    return text.replace(mutation.old, mutation.new)
