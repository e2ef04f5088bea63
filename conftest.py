"""Command-line options of the test run, and the Python blocks of README.md and docs/ as tests.

The blocks of one document run in order and share their names, as one script, in an empty
directory of their own. A block that awaits is a whole program with ``asyncio.run``. A block
that cannot run says why, in a comment right above it::

    <!-- skip: next "needs a Redis server" -->

A page of ``docs/integrations`` is left out where its framework is not installed, and
``tests/browser`` where Playwright is not.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from sybil import Document, Region, Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

from tests.frameworks import ABSENT, page_of

ROOM = 2 << 30
"""Bytes that a run may need; a container often has 64 MiB in memory, which is too little."""


class ReasonedSkipParser(SkipParser):
    """Skips one block at a time, and only for a stated reason."""

    def __call__(self, document: Document) -> Iterable[Region]:
        for region in super().__call__(document):
            action, reason = region.parsed
            if action != "next" or not reason:
                where = document.line_column(region.start)
                raise ValueError(
                    f'{document.path}, {where}: say why: <!-- skip: next "the reason" -->'
                )
            yield region


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full",
        action="store_true",
        help="tests/faults: everything, not the seeded part (many minutes; more with root)",
    )
    parser.addoption(
        "--in-memory",
        action="store_true",
        help="temporary files in /dev/shm, if it has room, where fsync does not wait for a disk",
    )


def pytest_configure(config: pytest.Config) -> None:
    memory = Path("/dev/shm")  # noqa: S108  # pytest makes a private directory in it
    wanted = config.getoption("--in-memory") and memory.is_dir()
    if wanted and shutil.disk_usage(memory).free >= ROOM:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(memory))


def pytest_report_header() -> str:
    """Where the temporary files are, since it decides how fast a run is."""
    return f"temporary files: {os.environ.get('PYTEST_DEBUG_TEMPROOT') or tempfile.gettempdir()}"


@pytest.fixture(scope="module")
def document_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The current directory while the blocks of one document run."""
    with contextlib.chdir(tmp_path_factory.mktemp("document")):
        yield


def _as_script(namespace: dict[str, Any]) -> None:
    # Without it, everything under `if __name__ == "__main__":` would silently not run.
    namespace["__name__"] = "__main__"


_LEFT_OUT = {*map(page_of, ABSENT)}
_BROWSER = Path(__file__).parent / "tests" / "browser"
_NO_BROWSER = find_spec("playwright") is None  # `make test-browser` installs it


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Whether it is the page of a framework that is not installed, or needs a browser."""
    page = collection_path.parent.name == "integrations" and collection_path.name in _LEFT_OUT
    return True if page or (_NO_BROWSER and collection_path == _BROWSER) else None


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), ReasonedSkipParser()],
    patterns=["README.md", "docs/*.md", "docs/*/*.md"],
    setup=_as_script,
    fixtures=["document_directory"],
).pytest()
