"""How much is proved, and the table at the end.

Every test here is a row (or a part of one) of that table: ``@pytest.mark.proof("T5", "…")`` names
the row, the ``tally`` fixture counts. ``--full`` runs everything; without it a seeded part runs,
which needs no root, and tests marked ``full`` are left out altogether.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest

from tests.faults.attempts import Scene, make_scene
from tests.faults.keyrings import FOLDER, make_keyring
from tests.faults.ledger import encrypted
from tests.faults.operations import SCENES
from tests.faults.tally import COLUMNS, Tally

LONGEST = {
    *("test_kill", "test_runtime_kill", "test_soak", "test_mutations", "test_histories"),
    "test_laws_processes",
}


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether everything is asked for, and not the seeded part."""
    return bool(request.config.getoption("--full"))


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    """The test's counts. They are told whether the test passes or not."""
    marker = request.node.get_closest_marker("proof")
    assert marker is not None, "a test that counts belongs to a row: @pytest.mark.proof(id, title)"
    counted = Tally()
    yield counted
    if counted != Tally():  # a test that was skipped has no row
        row = {"id": marker.args[0], "title": marker.args[1], **asdict(counted)}
        request.node.user_properties.append(("tally", json.dumps(row)))


@pytest.fixture(scope="session")
def scenes(_keyring: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scene]:
    """The directories that operations start from, each to be copied for an attempt."""
    base = tmp_path_factory.mktemp("scenes")

    async def prepare() -> dict[str, Scene]:
        made = {}
        for name, prepare in SCENES.items():
            await prepare(base / name, None)
            made[name] = await make_scene(base / name, base / "spare")
            sealed = encrypted(name)
            await prepare(base / sealed, make_keyring())
            made[sealed] = await make_scene(base / sealed, base / "spare", encrypted("exclusive"))
        return made

    return asyncio.run(prepare())


@pytest.fixture(scope="session", autouse=True)
def _keyring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where all processes find the keys of encrypted stores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(tmp_path_factory.mktemp("keyring")))
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        # Workers that take one test after another end together when the long ones come first.
        items.sort(key=lambda item: item.path.stem not in LONGEST)
        return
    beyond = [item for item in items if item.get_closest_marker("full")]
    if beyond:
        config.hook.pytest_deselected(items=beyond)
        items[:] = [item for item in items if item not in beyond]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    reports = [
        report
        for outcome in terminalreporter.stats.values()
        for report in outcome
        if isinstance(report, pytest.TestReport)
    ]
    seconds = {report.nodeid: report.duration for report in reports if report.when == "call"}
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for report in reports:
        for name, value in report.user_properties:
            if name == "tally" and report.when == "teardown":
                counted = json.loads(str(value))
                row = rows.setdefault(
                    (counted["id"], counted["title"]), dict.fromkeys((*COLUMNS, "seconds"), 0)
                )
                for column in COLUMNS:
                    row[column] += counted[column]
                row["seconds"] += seconds.get(report.nodeid, 0)
    if not rows:
        return
    say = terminalreporter.write_line
    terminalreporter.section("proof: " + ("everything" if config.getoption("--full") else "seeded"))
    say(f"| test | what | {' | '.join(COLUMNS)} | seconds |")
    say("|---|---|" + "---:|" * (len(COLUMNS) + 1))
    for (number, title), row in sorted(rows.items(), key=lambda entry: _order(entry[0][0])):
        counts = " | ".join(f"{int(row[column]):,}" for column in COLUMNS)
        say(f"| {number} | {title} | {counts} | {row['seconds']:.0f} |")
    left_out = sorted({_reason(report) for report in terminalreporter.stats.get("skipped", ())})
    for reason in left_out:
        say(f"left out: {reason}")


def _order(number: str) -> tuple[int, str]:
    digits = "".join(letter for letter in number if letter.isdigit())
    return int(digits or 99), number


def _reason(report: Any) -> str:
    place = report.nodeid.rpartition("/")[2]
    return f"{place}: {report.longrepr[2] if isinstance(report.longrepr, tuple) else ''}"
