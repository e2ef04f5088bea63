"""The rules for Python blocks in README.md and docs/, which conftest.py enforces."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_document(directory: Path, text: str) -> str:
    """Run pytest on a README.md with this text; returns everything it printed.

    It loads no plugin but the one in conftest.py: loading them all takes longer than the test.
    """
    shutil.copy(ROOT / "conftest.py", directory)
    (directory / "pytest.ini").write_text("[pytest]\naddopts = -ra -p no:cacheprovider\n")
    (directory / "README.md").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "README.md"],
        cwd=directory,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": os.fspath(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


def block(code: str) -> str:
    return f"```python\n{code}\n```\n\n"


def test_blocks_run_as_one_script_and_leave_the_checkout_alone(tmp_path: Path) -> None:
    text = block("from pathlib import Path\nPath('state').mkdir()") + block(
        "if __name__ == '__main__':\n    assert Path('state').is_dir()\n    raise OSError('ran')"
    )

    output = run_document(tmp_path, text)

    assert "1 failed, 1 passed" in output
    assert "OSError: ran" in output
    assert not (tmp_path / "state").exists()


def test_a_block_that_awaits_is_a_whole_program(tmp_path: Path) -> None:
    program = "import asyncio\nasync def main(): await asyncio.sleep(0)\nasyncio.run(main())"

    output = run_document(tmp_path, block(program) + block("await asyncio.sleep(0)"))

    assert "1 failed, 1 passed" in output
    assert "'await' outside function" in output


def test_a_block_is_skipped_only_for_a_stated_reason(tmp_path: Path) -> None:
    output = run_document(tmp_path, '<!-- skip: next "needs a server" -->\n' + block("1 / 0"))

    assert "needs a server" in output
    assert "1 skipped" in output
    assert "failed" not in output

    output = run_document(tmp_path, "<!-- skip: next -->\n" + block("1 / 0"))

    assert "line 1, column 1: say why" in output
    assert "1 error" in output
