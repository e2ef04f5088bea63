"""Fixtures: what a test that uses the pytest plugin costs over one that uses ``tmp_path``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.report import Row, at_most
from benchmarks.workload import Setting

TESTS = 500
SUITES = {
    "tmp_path": "tmp_path",
    "state_dir, fake_clock, fake_llm, crash_at": "state_dir, fake_clock, fake_llm, crash_at",
    "state_manager in memory": "state_manager",
    "state_manager, shared files": "state_manager",
    "agent_runtime in memory": "agent_runtime",
    "agent_runtime, exclusive files": "agent_runtime",
}
_STORES = {"in memory": "memory", "shared files": "shared", "exclusive files": "exclusive"}

_SUITE = """
import time
import pytest

began = []

@pytest.mark.parametrize("n", range({tests} + 1))
{chosen}
async def test_it(n, {fixtures}):
    if n == 1:  # the first has imported what the fixtures need
        began.append(time.process_time())

@pytest.fixture(scope="session", autouse=True)
def told():
    yield
    print("CPU", time.process_time() - began[0])
"""


def fixtures(setting: Setting) -> list[Row]:
    """CPU time of the process for each of 500 tests, after a first one, turn by turn."""
    tests = setting.scaled(TESTS)
    took: dict[str, list[float]] = {name: [] for name in SUITES}
    with setting.folder() as folder:
        for name in SUITES:
            _write(folder, name, tests)
        for _ in range(setting.runs):
            for name in SUITES:
                took[name].append(_run(folder, name) / tests * 1e3)
    base = took.pop("tmp_path")
    rows = [Row("a test with tmp_path", base, "ms CPU")]
    for name, values in took.items():
        over = [value - least for value, least in zip(values, base, strict=True)]
        target = at_most(1.0) if "files" not in name else None
        rows.append(Row(f"over it: {name}", over, "ms CPU", target))
    return rows


def _write(folder: Path, name: str, tests: int) -> None:
    fixtures = SUITES[name]
    store = next((store for words, store in _STORES.items() if name.endswith(words)), None)
    chosen = f'@pytest.mark.parametrize("{fixtures}", ["{store}"], indirect=True)' if store else ""
    text = _SUITE.format(tests=tests, fixtures=fixtures, chosen=chosen)
    _file(folder, name).write_text(text)


def _run(folder: Path, name: str) -> float:
    plugins = ("-p", "agent_state", "-p", "pytest_asyncio.plugin", "--asyncio-mode=auto")
    quiet = ("-q", "-s", "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={folder}")
    done = subprocess.run(  # noqa: S603  # our own interpreter and suite
        [sys.executable, "-m", "pytest", *plugins, *quiet, str(_file(folder, name))],
        cwd=folder,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        check=True,
        text=True,
    )
    return next(
        float(line.rpartition(" ")[2]) for line in done.stdout.splitlines() if "CPU" in line
    )


def _file(folder: Path, name: str) -> Path:
    return folder / f"test_{[*SUITES].index(name)}.py"
