"""The test suites that docs/testing.md and examples/crew show pass, as a user runs them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tests.testing.test_plugin import ASYNCIO, KINDS_OF_STORES, ROOT, run

CREW = "examples/crew"
SUITES = ROOT / "docs" / "testing.md"


def test_the_tests_of_the_page_pass(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", SUITES.read_text(), re.DOTALL | re.MULTILINE)
    (tmp_path / "test_page.py").write_text("\n\n".join(blocks))
    alone = len(re.findall(r"^(?:async )?def test_", "".join(blocks), re.MULTILINE))
    contracts = re.findall(r"^class (Test\w+)\(", "".join(blocks), re.MULTILINE)
    assert len(contracts) == 4

    code, output = run(tmp_path, *ASYNCIO, "--asyncio-mode=auto", "--snapshot-update", "-v")

    assert code == 0, output
    assert all(f"::{name}::" in output for name in contracts)
    assert output.count("test_page.py::test_") == alone - 1 + len(KINDS_OF_STORES)


def test_the_suite_of_the_example_framework_passes() -> None:
    code, output = run(ROOT, *ASYNCIO, "-c", os.devnull, "--rootdir=.", "--asyncio-mode=auto", CREW)

    assert code == 0, output
    assert "12 passed" in output
