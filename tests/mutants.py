"""Mutation testing: change one thing in a module, and see whether the tests notice.

``python -m tests.mutants MODULE [TEST ...]`` runs mutmut over one module or package, for example
``agent_state.manager`` or ``agent_state_integrations.recorder.writer``, with the tests of its
package. It works on a copy below ``.mutants/``, and prints every mutant that survived as a diff.
A survivor is either killed by a test or explained; ``EQUIVALENT`` explains the kinds of change
that no test notices. Exit code 1: others survived.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

TESTS = {
    "agent_state": ["tests/core", "tests/storage", "tests/runtime", "tests/sessions"],
    "agent_state.cli": ["tests/cli"],
    "agent_state.manager": ["tests/core"],
    "agent_state.redis": ["tests/redis"],
    "agent_state.runtime": ["tests/runtime"],
    "agent_state.sessions": ["tests/sessions"],
    "agent_state.storage": ["tests/storage", "tests/core"],
    "agent_state.web": ["tests/web"],
    "agent_state_integrations.journey": ["tests/journey"],
    "agent_state_integrations.orchestration": ["tests/orchestration"],
    "agent_state_integrations.recorder": ["tests/recorder"],
    "agent_state_integrations.redis_state": ["tests/redis_state"],
}
"""The tests that run against the mutants of a package; the longest name counts."""

ARGUMENTS = ["--in-memory", "--hypothesis-profile=fast", "-m", "not long"]

SOURCES = {"agent_state", "src"}
"""mutmut knows ``src`` as a folder that is no package; the integrations are copied to it."""

EQUIVALENT = {
    "the type in a cast": re.compile(r"(?<=\bcast\()[^,]*, "),
    "the assertion that lists are equally long": re.compile(r",? *strict=\w+|, (?=\)$)"),
    "the words of an error or of the log": re.compile(
        r'(?<=Error\()(f?"(?:[^"\\]|\\.)*"|None)?(, )?|(?<=_logger\.)(\w+\()("[^"]*"|None)'
    ),
}
"""By the reason, what a changed line may differ in."""

# An endless loop is ended after (the time of its tests + 5 s) * 6 of CPU, not after minutes.
CONFIGURATION = """
[tool.mutmut]
timeout_constant = 5
timeout_multiplier = 3
source_paths = {sources}
only_mutate = {only}
also_copy = {copies}
pytest_add_cli_args = {arguments}
pytest_add_cli_args_test_selection = {tests}
"""


def tests_of(module: str) -> list[str]:
    """The folders of tests for a module. Raises ``ValueError`` for a module that is not ours."""
    names = [name for name in TESTS if f"{module}.".startswith(f"{name}.")]
    if not names:
        raise ValueError(f"{module}: not a module of this repository")
    return TESTS[max(names, key=len)]


def files_of(module: str) -> list[str]:
    """Patterns of the files that a module or package consists of, relative to the copy."""
    path = module.replace(".", "/")
    if module.startswith("agent_state_integrations"):
        path = f"integrations/{path}"
    in_copy = path.replace("integrations/", "src/", 1)
    if (ROOT / path).is_dir():
        return [f"{in_copy}/*"]
    if not (ROOT / f"{path}.py").is_file():
        raise ValueError(f"{module}: no such module")
    return [f"{in_copy}.py"]


def prepare(module: str, tests: list[str]) -> Path:
    """A copy of the checkout with mutmut's configuration for this module."""
    home = ROOT / ".mutants" / module
    shutil.rmtree(home, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, home / name)
    shutil.copytree(home / "integrations", home / "src")
    project = home / "pyproject.toml"
    text = project.read_text().replace('[".", "integrations"]', '["."]')
    project.write_text(
        text
        + CONFIGURATION.format(
            sources=json.dumps(sorted(SOURCES)),
            only=json.dumps(files_of(module)),
            copies=json.dumps(sorted({path.name for path in home.iterdir()} - SOURCES)),
            arguments=json.dumps(ARGUMENTS),
            tests=json.dumps(tests),
        )
    )
    return home


def mutmut(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # The processes that tests start import the mutants too, before the installed package.
    copies = [home / "mutants", home / "mutants" / "src"]
    for path in copies:  # Python forgets a path that does not exist when it starts
        path.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, copies))}
    return subprocess.run(
        [Path(sys.executable).with_name("mutmut"), *arguments],
        cwd=home,
        env=environment,
        check=False,
        text=True,
        stdout=None if arguments[0] == "run" else subprocess.PIPE,
    )


def reason_of(diff: str) -> str | None:
    """Why no test notices a mutant, if ``EQUIVALENT`` says so."""
    lines = diff.splitlines()
    removed = [line[1:] for line in lines if line[:1] == "-" and line[:3] != "---"]
    added = [line[1:] for line in lines if line[:1] == "+" and line[:3] != "+++"]
    for reason, pattern in EQUIVALENT.items():
        if [pattern.sub("", line) for line in removed] == [pattern.sub("", line) for line in added]:
            return reason
    return None


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    module, *tests = sys.argv[1:]
    home = prepare(module, tests or tests_of(module))
    if mutmut(home, "run", "--max-children", str(os.cpu_count() or 1)).returncode != 0:
        return 1
    survivors: list[str] = []
    explained: Counter[str] = Counter()
    for line in mutmut(home, "results").stdout.splitlines():
        name, _, outcome = line.strip().partition(": ")
        if outcome in {"survived", "no tests", "suspicious", "segfault"}:
            diff = mutmut(home, "show", name).stdout
            if outcome == "survived" and (reason := reason_of(diff)):
                explained[reason] += 1
            else:
                survivors.append(name)
                print(f"\n{name}: {outcome}\n{diff}")
    mutmut(home, "export-cicd-stats")
    counts = json.loads((home / "mutants" / "mutmut-cicd-stats.json").read_text())
    print(module, {outcome: count for outcome, count in counts.items() if count})
    print(f"{len(survivors)} to be explained, and without a difference:", dict(explained))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
