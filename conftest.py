"""Runs the Python blocks of README.md and docs/ as tests.

The blocks of one document run in order and share their names, as one script, in an empty
directory of their own. A block that awaits is a whole program with ``asyncio.run``. A block
that cannot run says why, in a comment right above it::

    <!-- skip: next "needs a Redis server" -->
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from sybil import Document, Region, Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser


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


@pytest.fixture(scope="module")
def document_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The current directory while the blocks of one document run."""
    with contextlib.chdir(tmp_path_factory.mktemp("document")):
        yield


def _as_script(namespace: dict[str, Any]) -> None:
    # Without it, everything under `if __name__ == "__main__":` would silently not run.
    namespace["__name__"] = "__main__"


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), ReasonedSkipParser()],
    patterns=["README.md", "docs/*.md", "docs/*/*.md"],
    setup=_as_script,
    fixtures=["document_directory"],
).pytest()
