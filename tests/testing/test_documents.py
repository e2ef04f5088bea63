"""The test suites that docs/testing.md shows pass, in an empty directory."""

from __future__ import annotations

import re
from pathlib import Path

from tests.testing.test_plugin import ASYNCIO, KINDS_OF_STORES, ROOT, run

SUITES = ROOT / "docs" / "testing.md"


def test_the_tests_of_the_page_pass(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", SUITES.read_text(), re.DOTALL | re.MULTILINE)
    (tmp_path / "test_page.py").write_text("\n\n".join(blocks))
    tests = len(re.findall(r"^ *(?:async )?def test_", "".join(blocks), re.MULTILINE))
    assert tests

    code, output = run(tmp_path, *ASYNCIO, "--asyncio-mode=auto", "--snapshot-update")

    assert code == 0, output
    assert f"{tests - 1 + len(KINDS_OF_STORES)} passed" in output
