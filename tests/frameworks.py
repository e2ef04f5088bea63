"""The frameworks that have an adapter, and which of them are installed here."""

from __future__ import annotations

import tomllib
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
FRAMEWORKS = tomllib.loads((ROOT / "integrations" / "frameworks.toml").read_text())


def is_installed(module: str) -> bool:
    """Whether a module can be imported."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it is in is missing
        return False


ABSENT = [name for name, each in FRAMEWORKS.items() if not is_installed(each["module"])]
"""The names of those that are not installed: their tests and pages are left out."""


def page_of(name: str) -> str:
    """The name of a framework's page in ``docs/integrations``."""
    return f"{name.replace('_', '-')}.md"
