"""Leaves out the tests of frameworks that are not installed (`make test-integrations` has all)."""

from __future__ import annotations

from tests.frameworks import ABSENT

collect_ignore = ABSENT


def pytest_report_header() -> str:
    return f"frameworks that are not installed, and left out: {', '.join(ABSENT) or 'none'}"
