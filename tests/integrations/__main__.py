"""Runs the tests of the adapters, each framework in the environment that it needs.

``python -m tests.integrations [NAME ...]`` runs the tests and the pages of all frameworks, or of
those that are named, and writes the table of versions into ``integrations/README.md``. Frameworks
that install together run in the environment of this program, the others each in one of their own,
below ``.venv/frameworks``. ``--apart``: only those others; ``--quick``: without the long tests.

It ends with 1 if any of them fails, and with 75 if all that ran passed and an environment could not
be made in three tries: a package index that is away says nothing about an adapter.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import venv
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.frameworks import FRAMEWORKS, ROOT, page_of

HOME = ROOT / ".venv" / "frameworks"
README = ROOT / "integrations" / "README.md"
TOOLS = ("hypothesis", "pytest", "pytest-asyncio", "pytest-timeout", "pytest-xdist", "sybil")
TOGETHER = "together"
BEGIN, END = "<!-- versions -->\n", "<!-- end of versions -->"

TRIES, PAUSE = 3, 20.0
"""How often an installation is tried, and the seconds between two tries."""
NOT_INSTALLED = 75
"""The exit status for "try again later" (``EX_TEMPFAIL`` of sysexits.h)."""

_VERSIONS = """
import json, sys
from importlib.metadata import version
print(json.dumps({name: version(name) for name in sys.argv[1:]}))
"""


class NotInstalledError(Exception):
    """An environment could not be made, though it was tried again."""


def install(pip: Sequence[str], what: Sequence[str]) -> None:
    """Install packages. Raises ``NotInstalledError`` for an index that stays away.

    Requirements that contradict each other are no hiccup: ``CalledProcessError``, at once.
    """
    for left in reversed(range(TRIES)):
        done = subprocess.run(
            [*pip, *what], cwd=ROOT, check=False, stderr=subprocess.PIPE, text=True
        )
        sys.stderr.write(done.stderr)
        if done.returncode == 0:
            return
        if "ResolutionImpossible" in done.stderr:
            done.check_returncode()
        if left:
            time.sleep(PAUSE)
    raise NotInstalledError(" ".join(what))


def environment_of(name: str, members: Sequence[str]) -> Path:
    """The interpreter of an environment with these frameworks, made if it is missing.

    Raises ``NotInstalledError`` if it cannot be made now.
    """
    if name == TOGETHER:
        return Path(sys.executable)
    home = HOME / name
    python = home / "bin" / "python"
    stamp = home / "installed.txt"
    extras = ",".join(member.replace("_", "-") for member in members)
    text = "\n".join([extras, *TOOLS, (ROOT / "pyproject.toml").read_text()])
    if not stamp.exists() or stamp.read_text() != text:
        venv.create(home, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        install(pip, ["-e", f".[{extras}]", *TOOLS])
        stamp.write_text(text)
    return python


def run(python: Path, name: str, *, quick: bool = False) -> bool:
    """Whether the tests and the page of a framework pass. ``quick``: without the long tests."""
    pytest = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "--in-memory"]
    if quick:
        pytest += ["-m", "not long"]
    # A framework's own warnings are its own business here; `make test` has the strict run.
    tests = [*pytest, "-n", "auto", "-W", "default", f"tests/integrations/{name}"]
    page = [*pytest, "-W", "default", f"docs/integrations/{page_of(name)}"]
    return all(
        subprocess.run(each, cwd=ROOT, check=False).returncode == 0 for each in (tests, page)
    )


def versions_of(python: Path, names: Iterable[str]) -> dict[str, str]:
    """The installed versions of distributions."""
    done = subprocess.run(
        [str(python), "-c", _VERSIONS, *names], capture_output=True, text=True, check=True
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


def write_row(changed: str, row: str) -> None:
    """Put a row into the table; those of other frameworks stay."""
    before, rest = README.read_text().split(BEGIN)
    table, after = rest.split(END)
    rows = {changed: row}
    titles = {FRAMEWORKS[name]["title"]: name for name in FRAMEWORKS}
    for line in table.splitlines()[2:]:
        name = titles.get(line.split("|")[1].strip()) if line.startswith("|") else None
        if name is not None:
            rows.setdefault(name, line)
    lines = ["| framework | versions | tests |", "|---|---|---|"]
    lines += [rows[name] for name in FRAMEWORKS if name in rows]
    README.write_text(before + BEGIN + "\n".join(lines) + "\n" + END + after)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*FRAMEWORKS, []], metavar="NAME")
    parser.add_argument("--apart", action="store_true", help="only those with an own environment")
    parser.add_argument("--quick", action="store_true", help="without the long tests")
    asked = parser.parse_args()
    chosen = asked.names or [*FRAMEWORKS]
    if asked.apart:
        chosen = [name for name in chosen if FRAMEWORKS[name]["environment"] != TOGETHER]
    failed, missing = [], []
    for environment in dict.fromkeys(FRAMEWORKS[name]["environment"] for name in chosen):
        members = [name for name in FRAMEWORKS if FRAMEWORKS[name]["environment"] == environment]
        try:
            python = environment_of(environment, members)
        except NotInstalledError as error:
            missing.append(environment)
            sys.stderr.write(f"NOT RUN: {environment} could not be installed: {error}\n")
            continue
        for name in (each for each in members if each in chosen):
            passed = run(python, name, quick=asked.quick)
            each = FRAMEWORKS[name]
            versions = versions_of(python, each["versions"])
            listed = ", ".join(f"{one} {version}" for one, version in versions.items())
            row = f"| {each['title']} | {listed} | {'pass' if passed else 'FAIL'} |"
            write_row(name, row)  # at once: a run that is broken off keeps what it has found
            if not passed:
                failed.append(name)
    if failed:
        sys.stderr.write(f"failed: {', '.join(failed)}\n")
        return 1
    return NOT_INSTALLED if missing else 0


if __name__ == "__main__":
    sys.exit(main())
