"""The site of the documentation builds without a warning, with every public name."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import agent_state
import agent_state.errors
import agent_state.sync
import agent_state.testing

ROOT = Path(__file__).resolve().parent.parent
MODULES: tuple[ModuleType, ...] = (
    agent_state,
    agent_state.errors,
    agent_state.sync,
    agent_state.testing,
)


def public_names(module: ModuleType) -> list[str]:
    """Those of ``__all__``, or else the public classes and functions that it defines."""
    return getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
        and not name.startswith("_")
    ]


def test_the_site_is_whole_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr

    anchors: set[str] = set()
    for page in tmp_path.rglob("*.html"):
        text = page.read_text()
        assert re.findall(r'<(?:script|img|iframe)[^>]* src="(?:https?:)?//', text) == [], page
        assert re.findall(r'<link[^>]* href="(?:https?:)?//', text) == [], page
        if page.parent.parent.name == "reference":
            anchors.update(re.findall(r' id="(agent_state[.\w]*)"', text))
    wanted = {f"{module.__name__}.{name}" for module in MODULES for name in public_names(module)}
    assert wanted - anchors == set()
